//! The endurance house: what `cargo xtask soak` and `cargo xtask stress` are made of.
//!
//! ```text
//!  guest, operator     who works: simulated guests with the real driver, the host by vmgmtctl's client
//!  disruption          what happens to the daemon meanwhile
//!  deaths              whether somebody died of something else
//!  ledger, content     what was sent and received, to the byte
//!  stall, report       how long who waited; the table, the JSON, the one line
//!  crew, site          threads with a name; the daemon
//! ```
//!
//! In: numbers. Out: a balance. It must never look into the daemon: all that it knows came through a guest's device, the operator's socket, the
//! share's folder or the process table.

pub mod content;
pub mod crew;
pub mod deaths;
pub mod disruption;
pub mod guest;
pub mod ledger;
pub mod operator;
pub mod report;
pub mod site;
pub mod stall;
