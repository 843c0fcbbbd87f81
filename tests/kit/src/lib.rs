//! What the tests share: machines and programs as guarded processes, a raw vfio-user client, and a guest simulated over it.

pub mod client;
pub mod deaths;
pub mod guest;
pub mod huge_pages;
pub mod late_disk;
pub mod process;
pub mod setup;
pub mod slow_disk;
pub mod vm;

/// Says that something cannot be tried here, and why, in a line that reaches the table of `cargo xtask test` though the test passes: the test
/// runner keeps what is printed by macros to itself.
pub fn skipped(reason: impl std::fmt::Display) {
    use std::io::Write;
    // A line of its own, whatever the runner has begun. Where nobody listens there is nobody to tell.
    let _ = writeln!(std::io::stdout().lock(), "\nskipped: {reason}");
}
