//! The front: what speaks vfio-user.
//!
//! In: listeners, admissions and core lives from the keeper; clients' sockets; the core's kicks. Out: answers to the clients, packets
//! and words for the core. It answers every register access by itself, so that a VM does not notice that the core is
//! replaced. It maps no guest memory, opens no file, starts nothing.
//!
//! One event loop ([`server`]); each client is a [`session`]. No other thread knows anything but descriptors to close ([`closer`]).

mod closer;
mod core_link;
mod descriptors;
pub mod frozen;
mod hand_over;
mod limits;
mod log_budget;
pub mod message_dma;
mod outbox;
pub mod saved;
mod server;
mod server_core;
mod server_keeper;
mod session;
mod session_outputs;
mod socket;
#[cfg(test)]
mod tests;

use crate::channel::Channel;
use crate::sandbox::Entered;
use rustix::fd::OwnedFd;

/// Runs the front until the keeper says Stop or its channel ends.
///
/// `keeper`: the SEQPACKET channel on which [`crate::messages::KeeperToFront`] comes and [`crate::messages::FrontToKeeper`] goes.
///
/// It has no thread but this one and the log's, and has entered its sandbox; it starts those that close ([`closer`]), and seals it.
///
/// # Errors
/// The event loop cannot be set up or breaks. Nothing that a client or the core does leads to an error here.
pub fn run(keeper: OwnedFd, sandbox: Entered) -> anyhow::Result<()> {
    let mut front = server::Front::new(Channel::from_fd(keeper))?;
    front.sandbox = sandbox.seal()?;
    front.run()
}
