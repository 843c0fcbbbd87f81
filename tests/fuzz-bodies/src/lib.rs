//! The garden's weeds: what each fuzz target does with the bytes it is given.
//!
//! In: any bytes. Out: nothing, or a panic, which is a finding. The same functions are run by libFuzzer (`tests/fuzz/`) and, over the
//! committed corpus, by this crate's ordinary test, so that what was found stays fixed. Must never come in here: a second copy of what the
//! rooms do; the bodies drive the real ones and state what must hold.

// A finding is a panic: that is how a fuzz target says it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod config;
mod control;
mod driver;
mod edits;
mod front;
mod pages;
mod registers;
mod rings;
mod saved;
mod wire;

/// One fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Of the target, its folder in the corpus and its binary.
    pub name: &'static str,
    /// Takes any bytes. A panic is a finding.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 9] = [
    Target {
        name: "wire",
        run: wire::run,
    },
    Target {
        name: "registers",
        run: registers::run,
    },
    Target {
        name: "rings",
        run: rings::run,
    },
    Target {
        name: "pages",
        run: pages::run,
    },
    Target {
        name: "saved",
        run: saved::run,
    },
    Target {
        name: "config",
        run: config::run,
    },
    Target {
        name: "control",
        run: control::run,
    },
    Target {
        name: "front",
        run: front::run,
    },
    Target {
        name: "driver",
        run: driver::run,
    },
];

/// Runs the target of this name.
///
/// # Panics
/// There is none, or it found something.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("no such fuzz target").run)(bytes);
}
