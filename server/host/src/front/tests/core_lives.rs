//! Core lives: what a core is told, how it is woken, how its death is survived.

use super::*;
use crate::messages::{FrontToCore, FrontToKeeper, KeeperToFront};
use vmgmt_abi::Status;
use vmgmt_abi::registers as abi;
use vmgmt_abi::registers::DeviceState;
use vmgmt_device::page::control;

#[test]
fn a_core_is_told_all_there_is_and_what_comes_after() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    let ram = GuestRam::new(1 << 20, Seal::Shrink).unwrap();
    map(&mut client, 0, 1 << 20, &ram).unwrap();
    client
        .assign_irqs(irq::MSI, 0, &[eventfd().unwrap(), eventfd().unwrap()])
        .unwrap();
    let core = bench.core(1);
    let told = core.session();
    assert_eq!(
        (told.session, told.front.session()),
        (admitted.session, admitted.session)
    );
    let object = core.next();
    assert!(matches!(
        object.header,
        FrontToCore::Object {
            object: 1,
            writable: true,
            ..
        }
    ));
    assert_eq!((object.fds.len(), told.front.map(0).unwrap().object), (1, 1));
    let vectors = core.next();
    assert!(matches!(vectors.header, FrontToCore::Vectors { present: 3, .. }) && vectors.fds.len() == 2);
    core.adopted();
    // A second client, after adoption.
    let (_second, two) = bench.client();
    assert_eq!(core.session().session, two.session);
    bench.stop();
}

#[test]
fn a_doorbell_wakes_a_sleeping_core_and_a_kick_a_sleeping_front() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let core = bench.core(1);
    let told = core.session();
    core.adopted();
    let mut seen = core.touched.total();
    for round in 1..50u32 {
        client
            .region_write_posted(BAR0, u64::from(abi::DOORBELLS), &round.to_le_bytes())
            .unwrap();
        while told.front.doorbell(0) as u32 != round {
            seen = core.sleep(seen);
        }
    }
    // A fence that passes while the front sleeps.
    let ram = GuestRam::new(1 << 20, Seal::Shrink).unwrap();
    map(&mut client, 0, 1 << 20, &ram).unwrap();
    for _ in 0..20 {
        told.page.set_busy(true);
        let fence = told.front.fence();
        let reset = client.start(13, &[], &[]).unwrap();
        while told.front.fence() == fence {
            seen = core.sleep(seen);
        }
        told.page.set_fenced(told.front.fence());
        core.kick(told.slot);
        client.finish(reset).unwrap();
    }
    bench.stop();
}

#[test]
fn resets_wait_for_the_core_and_go_on_without_one() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    client.reset().unwrap();
    assert_eq!(admitted.page.generation(), 1);
    let core = bench.core(1);
    let told = core.session();
    told.page.set_busy(true);
    client
        .write_u32(BAR0, u64::from(abi::CONTROL), abi::CONTROL_RESET)
        .unwrap();
    assert_eq!(
        client.read_u32(BAR0, u64::from(abi::STATE)).unwrap(),
        DeviceState::RESETTING.0
    );
    let reset = client.start(13, &[], &[]).unwrap();
    // Register accesses go on while the reset waits.
    assert_eq!(
        client.read_u32(BAR0, u64::from(abi::MAGIC)).unwrap(),
        vmgmt_abi::MAGIC
    );
    bench.tell(&KeeperToFront::CoreDead { life: 1 });
    client.finish(reset).unwrap();
    assert_eq!(
        client.read_u32(BAR0, u64::from(abi::STATE)).unwrap(),
        DeviceState::BLANK.0
    );
    core.wait_closed();
    // The next life gets a page of its own; the words of the old one say nothing any more.
    let next = bench.core(2);
    let again = next.session();
    assert!(!again.page.busy());
    told.page.set_state(3, DeviceState::FAILED, Status::BAD_ADDRESS);
    assert_eq!(
        client.read_u32(BAR0, u64::from(abi::STATE)).unwrap(),
        DeviceState::BLANK.0
    );
    assert_eq!(client.read_u32(BAR0, u64::from(abi::CORE_LIFE_LOW)).unwrap(), 2);
    bench.stop();
}

#[test]
fn a_core_that_stands_still_or_closes_its_channel_is_reported() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let core = bench.core(1);
    let told = core.session();
    told.page.set_busy(true);
    let reset = client.start(13, &[], &[]).unwrap();
    bench.stuck(1);
    bench.tell(&KeeperToFront::CoreDead { life: 1 });
    client.finish(reset).unwrap();

    let core = bench.core(2);
    core.session();
    core.adopted();
    drop(core);
    bench.stuck(2);
    assert_eq!(client.read_u32(BAR0, 0).unwrap(), vmgmt_abi::MAGIC);
    bench.stop();
}

#[test]
fn a_core_that_takes_no_packets_holds_up_maps_and_nothing_is_lost() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let core = bench.core(1);
    core.session();
    core.adopted();
    // Vectors are told each time; at some point the channel is full.
    let vectors: Vec<_> = (0..16).map(|_| eventfd().unwrap()).collect();
    for _ in 0..400 {
        client.assign_irqs(irq::MSI, 0, &vectors).unwrap();
    }
    let ram = GuestRam::new(1 << 20, Seal::Shrink).unwrap();
    let mapping = Mapping {
        iova: 0,
        bytes: 1 << 20,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    };
    let map = client.start_dma_map(mapping).unwrap();
    let mut told = 0;
    loop {
        match core.next().header {
            FrontToCore::Vectors { .. } => told += 1,
            FrontToCore::Object { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(told, 400);
    client.finish(map).unwrap();
    bench.stop();
}

#[test]
fn a_quarantined_device_fails_until_it_is_released() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    let session = admitted.session;
    bench.core(1).session();
    let state = u64::from(abi::STATE);
    for (quarantined, shown) in [(true, DeviceState::QUARANTINED), (false, DeviceState::BLANK)] {
        bench.tell(&KeeperToFront::Quarantine { session, quarantined });
        // The keeper's word is taken between two register accesses.
        while client.read_u32(BAR0, state).unwrap() != shown.0 {}
        assert_eq!(admitted.page.control() & control::QUARANTINED != 0, quarantined);
    }
    bench.stop();
}

#[test]
fn a_hostile_core_page_harms_nobody_else() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let (mut other, _) = bench.client();
    let core = bench.core(1);
    let (first, second) = (core.session(), core.session());
    core.adopted();
    for n in 0..16 {
        first.page.set_raise(n, u64::MAX);
        let answer = vmgmt_device::page::OpenAnswer {
            epoch: u32::MAX,
            state: vmgmt_abi::registers::RingState(0xffff),
            status: Status(u16::MAX),
        };
        first.page.set_open_answer(n, answer);
    }
    first.page.set_fenced(u64::MAX);
    first.page.set_state(0, DeviceState(u32::MAX), Status(u16::MAX));
    for slot in 0..100 {
        core.kick(slot);
    }
    assert_eq!(
        client.read_u32(BAR0, u64::from(abi::STATE)).unwrap(),
        DeviceState::BLANK.0
    );
    assert_eq!(
        client.read_u32(BAR0, u64::from(abi::INTERRUPT_PENDING)).unwrap(),
        0xffff
    );
    // Nonsense on the channel is a broken core.
    core.channel.send(&"nonsense", b"", &[]).unwrap();
    bench.stuck(1);
    assert_eq!(other.read_u32(BAR0, 0).unwrap(), vmgmt_abi::MAGIC);
    assert_eq!(second.front.control() & control::GONE, 0);
    bench.stop();
}

#[test]
fn the_end_of_a_session_waits_for_its_fence() {
    let mut bench = Bench::new();
    let (client, admitted) = bench.client();
    let core = bench.core(1);
    let told = core.session();
    core.adopted();
    told.page.set_busy(true);
    drop(client);
    assert!(
        matches!(core.next().header, FrontToCore::SessionGone { session } if session == admitted.session)
    );
    assert_eq!(told.front.control() & control::GONE, control::GONE);
    // Another one is served meanwhile, in another slot.
    let (_other, _) = bench.client();
    assert_ne!(core.session().slot, told.slot);
    told.page.set_fenced(told.front.fence());
    core.kick(told.slot);
    assert!(
        matches!(bench.next(), FrontToKeeper::SessionGone { session, .. } if session == admitted.session)
    );
    bench.stop();
}
