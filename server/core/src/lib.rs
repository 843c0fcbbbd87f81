//! OFFICE and WORKSHOPS: the hub (who may do what; routing, budgets, fairness, deadlines) and the four modes.
//!
//! Sans-IO: [`Hub`] takes [`Input`]s and gives [`Output`]s; what touches a disk, guest memory or the host is an
//! [`Effect`] that the shell carries out and answers with an [`Outcome`].
//!
//! What must never come in here: a descriptor, a path of the host, an `Instant`, a thread, a random source, guest memory,
//! the order of a `HashMap`.
#![forbid(unsafe_code)]

mod adoption;
mod budgets;
mod cbor;
mod control;
mod deadlines;
pub mod doors;
pub mod effect;
mod effects;
mod hub;
pub mod interface;
pub mod journal;
mod kept;
mod ledger;
pub mod limits;
mod modes;
mod office;
pub mod policy;
pub mod refusal;
mod saved;
mod sessions;
mod shed;
mod state;
mod table;

pub use effect::{BufferRange, Effect, EffectId, FailedAt, FileSlot, Identity, Outcome};
pub use hub::Hub;
pub use interface::{ControlReply, ControlRequest, Input, Output};
pub use journal::{Message, Record, Unreadable};
pub use kept::{Change, Settled, feature};
pub use state::{RestoreError, Saved};
