//! Wake-ups both ways: event words, doorbells, interrupts.

use crate::{bed, of, open, turn};
use vmgmt_abi::ring::event_offset;
use vmgmt_abi::{Mode, Opcode};
use vmgmt_device::page::{Interrupts, PlainWords};
use vmgmt_device::rings::Output;

#[test]
fn event_words_spare_wake_ups_and_lose_none() {
    let mut bed = bed();
    let mut ring = open(&mut bed, Mode::COMMON);
    assert!(bed.arm(), "nobody has looked yet");
    assert_eq!(turn(&mut bed), []);
    assert!(!bed.arm());
    assert!(
        ring.submit(&bed.guest, &of(Opcode::NOOP, 1)),
        "armed: the doorbell is wanted"
    );
    assert!(!ring.submit(&bed.guest, &of(Opcode::NOOP, 2)), "busy: it is not");
    assert!(bed.arm(), "work that came before arming is seen");
    bed.poll(64);
    bed.end_turn();
    assert_eq!(bed.outputs(), [Output::Signal { vector: 0 }], "one for both");
    // The guest waits for the fourth completion only.
    bed.guest.store_u32(event_offset::COMPLETION_EVENT, 3);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 3));
    bed.poll(64);
    bed.end_turn();
    assert_eq!(bed.outputs(), []);
    ring.submit(&bed.guest, &of(Opcode::NOOP, 4));
    bed.poll(64);
    bed.end_turn();
    assert_eq!(bed.outputs(), [Output::Signal { vector: 0 }]);
    bed.end_turn();
    assert_eq!(bed.outputs(), []);
    assert_eq!(bed.rings.counters().signals_spared, 1);
    bed.front.set_features(0);
    bed.touch();
    ring.submit(&bed.guest, &of(Opcode::NOOP, 5));
    bed.poll(64);
    bed.end_turn();
    assert_eq!(
        bed.outputs(),
        [Output::Signal { vector: 0 }],
        "a driver without event words is always signalled"
    );
}

#[test]
fn intx_is_raised_in_the_core_page() {
    let mut bed = bed();
    bed.front.set_interrupts(Interrupts::Intx);
    bed.front.set_ack(0, 41);
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    let mut ring = open(&mut bed, Mode::COMMON);
    assert_eq!(bed.core.raise(0), 41, "nothing is pending");
    ring.submit(&bed.guest, &of(Opcode::NOOP, 1));
    bed.poll(64);
    bed.end_turn();
    assert!(bed.outputs().contains(&Output::Kick));
    assert_eq!(bed.core.raise(0), 42);
}
