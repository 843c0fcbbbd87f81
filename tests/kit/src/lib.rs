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
