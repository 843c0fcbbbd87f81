//! One test per command: exact, too small, too large, wrong argsz, wrong flags, wrong descriptors.

mod device;
mod dma;
mod order;
mod regions;
#[path = "../support/mod.rs"]
mod support;

const READ_WRITE: u32 = 3;
