//! The core dies between any two of its outputs, once and again: the guest gets one answer to each submission, and it is the one it would have got.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod files;
#[path = "../house/mod.rs"]
mod house;
mod messages;
mod operators;
mod saved;
mod waiting;

use house::House;

const A: u64 = 11;
const B: u64 = 12;

/// Runs a scenario with a core that dies after so many outputs, until it dies no more in it.
fn at_every_output(scenario: impl Fn(&mut House)) {
    for again in 0..3 {
        for after in 0.. {
            let mut house = House::new();
            (house.dies_after, house.dies_again) = (Some(after), again);
            // That what is saved is the same after every input is asserted once; it takes most of the time.
            (house.repack, house.replay) = (again == 0, again == 0);
            scenario(&mut house);
            assert!(house.open.is_empty(), "without an answer: {:?}", house.open);
            if house.crashes == 0 {
                break;
            }
        }
    }
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|place| (place * 7 + place / 251) as u8).collect()
}
