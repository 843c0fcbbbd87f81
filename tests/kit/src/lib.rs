//! What the tests share: machines and programs as guarded processes, and a raw vfio-user client.

pub mod client;
pub mod process;
pub mod setup;
pub mod vm;
