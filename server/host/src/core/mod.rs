//! The core: rings, hub, modes, workers, in one event loop.

pub mod journal;
pub mod lines;
pub mod memory;
