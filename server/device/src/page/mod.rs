//! The words that front and core share, one writer each, and how they are read.
//!
//! Per session a *front page* (the front writes, the core maps it read-only) and a *core page* (the core writes; a new
//! one for each core life); per core life a *touched page* (front writes) and a *life page* (core writes). All words are u64,
//! little-endian. A record is published by its sequence word, with release order; booleans lose off/on pairs, so each
//! transition also moves a counter, and the counters are what is compared. Neither side trusts the other's words:
//! readers bound everything they take.

mod core_page;
mod front_page;
mod shared;
mod words;

pub use core_page::{CorePage, OpenAnswer};
pub use front_page::{
    ChangedMaps, FrontPage, Interrupts, MapRecord, PortSubmission, RingSetup, control, rights,
};
pub use shared::{LifePage, SLOTS_MAX, TouchedPage};
pub use words::{FENCE, PlainWords, Words};

/// Layout version of all pages, first word of each.
pub const LAYOUT: u64 = 0x564d_474d_0000_0001;
/// The oldest that this version reads: its own, and the one before where there is one. A page keeps the layout that it was made with.
pub const LAYOUT_OLDEST: u64 = LAYOUT;

/// Whether this version reads a page of this layout.
#[must_use]
pub const fn is_readable(layout: u64) -> bool {
    LAYOUT_OLDEST <= layout && layout <= LAYOUT
}
