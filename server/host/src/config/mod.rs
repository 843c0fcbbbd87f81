//! The configuration: what the operator wrote, checked, as the roles need it.
//!
//! In: a TOML file or command line flags. Out: [`ListenerConfig`]s for the front, [`VmConfig`]s and a [`CoreConfig`] for the
//! core. Every mistake is named with its place and a remedy before anything is started.

mod roles;

pub use roles::{
    Access, CoreConfig, DeviceConfig, Identity, ListenerConfig, ShareConfig, ShareGrant, VmConfig, VmLimits,
};
