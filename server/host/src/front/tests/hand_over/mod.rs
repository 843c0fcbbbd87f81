//! Hand-overs between any two steps: neither a client nor the core can tell that there was one.

mod faults;
mod golden;
mod invisible;
mod refusals;
pub(super) mod stage;
