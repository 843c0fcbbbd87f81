//! The shells of vmgmtd: what knows the operating system.
//!
//! One binary, four roles, each with one event loop: [`keeper`] starts all and holds what must outlive them, [`front`]
//! speaks vfio-user, [`core`] does the work. [`channel`] joins them; [`messages`] is what they say.
//!
//! Rooms (`wire`, `device`, `core`) know no descriptor, clock or thread; this crate does, and knows nothing of a guest's
//! operations.

pub mod channel;
pub mod config;
pub mod control;
pub mod core;
pub mod descriptor_room;
mod fault;
pub mod front;
pub mod keeper;
pub mod messages;
pub mod packed;
pub mod reader;
pub mod sandbox;
mod state_memory;
pub mod store;
pub mod words;
