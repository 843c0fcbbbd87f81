//! A guest without a VM: the real driver over the raw client, so that it drives the real `vmgmtd` without QEMU.
//!
//! ```text
//!  vmgmt_driver::{Device, Ring, PortChannel, Client}   the guest's program, unchanged
//!  SocketBacking                                       what QEMU and a kernel driver do between them
//!  client::Client, GuestMemory                         the socket; a memfd as RAM
//! ```
//!
//! In: a socket's path, what the machine is to be like. Out: a device as a guest's program sees it. It must never know what a ring
//! carries, nor share code with the server.

mod backing;
mod machine;
mod memory;
mod site;

pub use backing::{GuestInterrupts, SocketBacking};
pub use machine::{GuestOptions, SimulatedVm};
pub use memory::{GuestMemory, Sharing};
pub use site::{Pids, Site, SitePlan};
