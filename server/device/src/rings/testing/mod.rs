//! What tests and benchmarks of the rings stand on: memory in this process, and a guest and a shell that use it.

mod bed;
mod flat;

pub use bed::{Bed, RingPlan};
pub use flat::{FlatGuest, FlatMemory, FlatRegion};
