//! DEVICE, the front half: the management PCI function as a client of vfio-user sees it.
//!
//! In: typed requests of the hall ([`vmgmt_wire::Command`]), which core lives own this session's core page, kicks of the core.
//! Out: replies, words on the front page, eventfds to signal ([`Output`]).
//!
//! A register access is answered at once, from the function's own state and the core page; what ends DMA (unmap, reset,
//! function-level reset, bus mastering off) is answered when no DMA that began before can go on ([`fences`]).
//!
//! What must never come in here: a descriptor (they are [`vmgmt_wire::FdSlot`]s), a clock, guest memory.

mod bar0;
mod config_space;
mod dma_table;
mod fences;
mod function;
mod interrupts;
pub mod limits;
mod memory_bar;
mod msix_table;
mod port_bar;
mod port_window;
mod regions;
mod reset;
mod saved;
mod settings;
#[cfg(test)]
mod tests;

pub use dma_table::MapObject;
pub use function::{Function, Input, Output};
pub use saved::{RestoreError, SavedFunction};
pub use settings::{Settings, SettingsError};
