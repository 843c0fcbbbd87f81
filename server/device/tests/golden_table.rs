//! The in-flight table as version 1 wrote it is adopted by the code of today.
//!
//! `UPDATE_GOLDEN=1 cargo test -p vmgmt-device --test golden_table` writes `tests/golden/in-flight-v1.txt` anew: once for each version,
//! and never again once a release has that version.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Write as _;
use std::path::PathBuf;
use vmgmt_abi::{Mode, Opcode, Submission};
use vmgmt_device::page::{PlainWords, Words};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Answer, Input, Output, STATE_WORDS, check_state};

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/in-flight-v1.txt")
}

/// A session with three submissions fetched, of which one is answered: two are in flight.
fn session() -> (Bed<PlainWords, FlatMemory>, RingPlan) {
    let guest = FlatGuest::new(1 << 20);
    let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
    let mut plan = RingPlan::new(0, 0, 64, 64, Mode::FILE.0);
    bed.enable(&mut plan);
    bed.outputs();
    for tag in 1..=3 {
        let submission = Submission {
            opcode: Opcode::CLOSE.0,
            tag,
            ..Submission::default()
        };
        plan.submit(&guest, &submission);
    }
    bed.poll(64);
    (bed, plan)
}

fn tokens(outputs: &[Output]) -> Vec<(u32, bool)> {
    let fetched = outputs.iter().filter_map(|output| match output {
        Output::Submission(fetched) => Some((fetched.tag, fetched.again)),
        _ => None,
    });
    fetched.collect()
}

/// The words that are not 0, a line each.
fn dump(words: &PlainWords) -> String {
    let mut text = String::new();
    for index in 0..words.len() {
        let word = words.load(index);
        if word != 0 {
            writeln!(text, "{index} {word:#018x}").unwrap();
        }
    }
    text
}

#[test]
fn what_version_1_left_in_flight_is_taken_up_again() {
    let (mut bed, _) = session();
    let outputs = bed.outputs();
    assert_eq!(tokens(&outputs), [(1, false), (2, false), (3, false)]);
    let Some(Output::Submission(first)) = outputs
        .into_iter()
        .find(|output| matches!(output, Output::Submission(_)))
    else {
        panic!("nothing was fetched")
    };
    bed.handle(Input::Complete {
        token: first.token,
        answer: Answer::ok(0),
        payload: vec![],
        confirm: false,
    });
    bed.end_turn();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(golden(), dump(&bed.state)).unwrap();
    }
    let text = std::fs::read_to_string(golden())
        .expect("tests/golden/in-flight-v1.txt is there; UPDATE_GOLDEN=1 makes it");
    // The state of then in place of that of now.
    bed.state = PlainWords::new(STATE_WORDS);
    for line in text.lines() {
        let (index, word) = line.split_once(" 0x").unwrap();
        bed.state
            .store(index.parse().unwrap(), u64::from_str_radix(word, 16).unwrap());
    }
    assert_eq!(check_state(bed.state.clone()), Ok(()));
    bed.replace_core(PlainWords::new).unwrap();
    bed.touch();
    bed.poll(64);
    assert_eq!(tokens(&bed.outputs()), [(2, true), (3, true)]);
}
