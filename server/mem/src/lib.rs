//! MEM: the one unsafe crate. Access to memory that another process owns: guest RAM, and the pages between front and core; and signals
//! through descriptors that it owns too.
//!
//! In: descriptors of memory, offsets and lengths that were checked. Out: copies, in both directions.
//! What it must never give away: a Rust reference into that memory. Its owner changes it at any time, so everything here is
//! an atomic access, or a copy that the compiler cannot see into. Memory that its owner could shrink is never touched by an
//! instruction of ours, only by system calls, which answer EFAULT where an instruction would raise SIGBUS.
#![allow(unsafe_code)]

mod calls;
mod copy;
mod mapping;
pub mod order;
mod signals;
mod words;

pub use calls::{GuestSlice, SLICES_MAX, copy_guest, read_file, write_file};
pub use mapping::{CopyFault, Fault, GuestMapping};
pub use signals::Signals;
pub use words::SharedWords;

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The owner could shrink it under our hands.
    #[error("the memory is not sealed against shrinking (F_SEAL_SHRINK): seal it before handing it over")]
    Unsealed,
    /// It holds nothing, or less than is asked for.
    #[error("the memory object has {object_bytes} bytes, {needed_bytes} are needed")]
    TooSmall {
        /// Bytes that it has.
        object_bytes: u64,
        /// Bytes that it should have.
        needed_bytes: u64,
    },
    /// The operating system refused.
    #[error("memory cannot be mapped: {0}")]
    System(#[from] rustix::io::Errno),
}
