//! The configuration: what the operator wrote, checked, as the roles need it.
//!
//! In: a TOML file or command line flags. Out: [`ListenerConfig`]s for the front, [`VmConfig`]s and a [`CoreConfig`] for the
//! core. Every mistake is named with its place and a remedy before anything is started, all that can be found at once.

mod change;
mod check;
mod fields;
mod file;
mod mistake;
mod roles;
mod sandbox;

pub use change::{Change, Present};
pub use check::added_vm;
pub(crate) use fields::group_id;
pub use mistake::{Mistake, Mistakes};
pub use roles::{
    Access, CoreConfig, DeviceConfig, Identity, ListenerConfig, ShareConfig, ShareGrant, VmConfig, VmLimits,
};

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Numbers of the configuration.
pub mod limits {
    /// Bytes of a configuration file: thousands of VMs.
    pub const FILE_BYTES_MAX: u64 = 16 << 20;
    /// Bytes of a socket's path: `sun_path` holds 108 with its end.
    pub const SOCKET_PATH_BYTES_MAX: usize = 107;
    /// Bytes of a name of a VM or a share: what a guest's buffers are made for.
    pub const NAME_BYTES_MAX: usize = 63;
    /// Devices of one VM at once; QEMU has no more slots on a bus.
    pub const DEVICES_MAX: u32 = 32;
    /// DMA maps per session: what QEMU's client promises at most, and one more for good measure.
    pub const MAPS_MAX: u32 = 65_536;
    /// Memory objects per session: descriptors of the front.
    pub const OBJECTS_MAX: u32 = 1024;
    /// Worker threads of the core.
    pub const WORKERS_MAX: u32 = 256;
    /// The core's polling, in microseconds: longer than this it would only burn a processor.
    pub const POLL_US_MAX: u64 = 100_000;
    /// How long the core polls after its last work, if nothing is said: about one wake-up across processors.
    pub const POLL_US_DEFAULT: u64 = 50;
    /// How long a core that is to be replaced may take to end its bulk work: longer, and the VMs would rather have it go on with the next.
    pub const DRAIN_DEADLINE_MS_MAX: u64 = 60_000;
    /// The same, if nothing is said.
    pub const DRAIN_DEADLINE_MS_DEFAULT: u64 = 2_000;
    /// Shares: their directories go to the core in one packet, which takes 253 descriptors.
    pub const SHARES_MAX: usize = 200;
    /// Worker threads, if nothing is said.
    pub const WORKERS_DEFAULT: u32 = 4;
    /// Names that begin so are given to VMs of shared sockets.
    pub const ANONYMOUS_PREFIX: &str = "anon-";
}

/// All that vmgmtd is told before it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub server: ServerConfig,
    pub core: CoreConfig,
    /// Sockets; their numbers are given by the keeper. An own socket's VM is beside it.
    pub listeners: Vec<(ListenerConfig, Option<VmConfig>)>,
    /// What is allowed but looks like an oversight.
    pub warnings: Vec<Mistake>,
}

/// What the keeper itself needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerConfig {
    /// Path of the control socket.
    pub control: PathBuf,
    pub control_mode: u32,
    pub control_group: Option<String>,
    /// Log filter, as the flag `--log` has it.
    pub log: Option<String>,
    /// How long a core that is to be replaced may take to end its bulk work, in milliseconds.
    pub drain_deadline_ms: u64,
}

/// Where the configuration is read, each time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// An absolute path.
    pub file: Option<PathBuf>,
    pub flags: Flags,
}

impl Source {
    /// For people.
    #[must_use]
    pub fn name(&self) -> String {
        let flags = || "the command line".to_owned();
        self.file
            .as_ref()
            .map_or_else(flags, |file| file.display().to_string())
    }
}

/// What the command line says; it adds to the file and wins over it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flags {
    /// Shared sockets.
    pub sockets: Vec<PathBuf>,
    /// `NAME=DIR` or `NAME=DIR:ro`, granted to all VMs of those sockets.
    pub shares: Vec<String>,
    pub control: Option<PathBuf>,
    pub log: Option<String>,
    /// Whether front and core are sandboxed.
    pub sandbox: Option<bool>,
}

/// Reads the configuration: a file, flags, or both.
///
/// # Errors
/// All mistakes that were found.
pub fn load(file: Option<&Path>, flags: &Flags) -> Result<Config, Mistakes> {
    let mut mistakes = Mistakes::default();
    let mut sections = match file {
        Some(path) => file::read(path, &mut mistakes),
        None => file::Sections::default(),
    };
    file::add_flags(&mut sections, flags, &mut mistakes);
    let config = check::check(sections, flags, &mut mistakes);
    if mistakes.0.is_empty() {
        Ok(config)
    } else {
        Err(mistakes)
    }
}

#[cfg(test)]
mod tests;
