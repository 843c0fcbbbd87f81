//! DEVICE: the management PCI function.
//!
//! Two halves that share two pages of words and nothing else:
//! * [`registers`], in the front: configuration space, BARs, ports, DMA table, interrupts. Answers at once.
//! * [`rings`], in the core: fetches submissions, publishes completions.
//! * [`page`]: the words between them, level-triggered, so that forgetting is harmless.
//!
//! What must never come in here: a file descriptor (they are [`FdSlot`]s), an `Instant` (time is [`Tick`]), a thread,
//! a random source, the order of a `HashMap`, a reference to guest memory ([`GuestMemory`] is handed in).
#![forbid(unsafe_code)]

pub mod guest_memory;
pub mod page;
pub mod registers;
pub mod rings;
pub mod tick;

pub use guest_memory::{Direction, GuestMemory, MemoryError};
pub use tick::Tick;
