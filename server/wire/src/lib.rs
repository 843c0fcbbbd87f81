//! The hall: vfio-user messages, server side, without I/O.
//!
//! In: bytes that the door read from a client's socket, and tokens ([`FdSlot`]) for the descriptors
//! that came with them. Out: typed requests whose every length, flag and range was checked here once,
//! bytes to send back, and the tokens of descriptors that nobody wants (to be closed).
//!
//! It must never know: a file descriptor's number, the time, a thread, what the device does with a
//! request. Nothing in here panics on a peer's bytes, and nothing is allocated because a peer merely
//! announced it.
//!
//! The protocol is the vfio-user specification (QEMU `docs/interop/vfio-user.rst`), version 0.0.

#![forbid(unsafe_code)]

pub mod connection;
pub mod dma;
pub mod errno;
mod input;
pub mod limits;
mod output;
pub mod pci;
pub mod reply;
pub mod request;
mod request_decode;
mod saved;
pub mod uapi;
pub mod version;

pub use connection::{Connection, Counters, Event, FatalError, Phase};
pub use dma::{DmaAnswer, DmaFailure, DmaReply, DmaSendError};
pub use errno::Errno;
pub use output::PendingOutput;
pub use reply::{
    DeviceFeatureReply, DeviceInfo, IrqInfo, RegionInfo, Reply, ReplyHandle, ReplyRefused, SparseArea,
};
pub use request::{
    Command, DeviceFeature, DmaMap, DmaUnmap, FeatureOperation, IovaRange, IrqAction, IrqOperation, Refusal,
    RegionAccess, RegionWrite, Request, SetIrqs,
};
pub use saved::{RestoreError, SavedConnection};
pub use version::{ClientCapabilities, Negotiated, ServerOffer, VersionProposal};

/// A token for one descriptor that the door received or will send. The door keeps the table from token
/// to descriptor; in here it is only a name that travels with the message it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct FdSlot(pub u32);
