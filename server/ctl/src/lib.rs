//! `vmgmtctl`: the operator's side of the control socket.
//!
//! [`protocol`] is what is said there, the daemon uses the same types; [`Client`] says it. [`run`] is the command line. What must never
//! come in here: anything of the daemon's inside (this crate depends on none of its rooms).

mod cli;
pub mod client;
mod doctor;
mod output;
pub mod protocol;
mod qemu_args;
mod transfer;
mod upgrade;

pub use cli::run;
pub use client::{Client, ClientError, default_control_path};
