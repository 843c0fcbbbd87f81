//! CORE, memory: tests against real memory objects, a real front page, and an in-test front that answers message DMA.

mod bulk;
mod fences;
pub mod fixture;
mod messages;
mod model;
mod sharing;
