//! GARDEN: the same rooms as in service, with another door and another cellar. Many VMs, honest and hostile; virtual time; faults at every step;
//! one seed, one story.
//!
//! In: a seed. Out: the first thing that must not be, and how to see it again. Nothing here touches the system: no thread, clock or file.
//!
//! What is real: the connection codec (`vmgmt-wire`), registers, pages and rings (`vmgmt-device`), the hub with its modes (`vmgmt-core`), the
//! journal and the queues of message DMA (`vmgmt-host`). What is a model: the two shells' loops, mapped memory, disk, workers, keeper, clients, guests.
#![forbid(unsafe_code)]
// Development only: a panic here is a finding, told with its seed. The rooms themselves keep the workspace's lints.
#![allow(clippy::panic, missing_docs)]

mod bulk;
mod chance;
mod clockwork;
mod core;
mod disk;
mod faults;
mod files;
mod front;
mod guest;
mod limits;
mod offers;
mod ram;
mod reach;
mod ring;
mod run;
mod shadow;
mod town;
mod trace;
mod vm;
mod wires;
mod world;

pub use faults::Fault;
pub use run::{Failure, Options, Report, run};
