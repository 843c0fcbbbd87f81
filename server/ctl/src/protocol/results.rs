//! The control protocol's results: what each method gives back.

use super::{METHODS, UpgradeReport, VERSION};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Result of `hello`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub product: String,
    pub version: String,
    pub protocol: u32,
    pub methods: Vec<String>,
}

impl Hello {
    /// What a daemon of this version says.
    #[must_use]
    pub fn of_this_version() -> Self {
        Self {
            product: "vmgmtd".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: VERSION,
            methods: METHODS.iter().map(|method| (*method).to_owned()).collect(),
        }
    }
}

/// Result of `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// `serving`, `starting` or `restarting` (then the keeper answers, because no core is ready).
    pub state: String,
    /// Which role answered: `core` or `keeper`.
    pub answered_by: String,
    pub version: String,
    /// The keeper's process.
    pub pid: u32,
    /// Core lives so far, this one included.
    pub life: u64,
    /// Seconds since this core life (or the keeper, if it answers) is in service.
    pub uptime_seconds: u64,
    pub vms: u64,
    pub sessions: u64,
    /// Deaths of the core and other things an operator should know, oldest first.
    pub notices: Vec<String>,
    /// Further numbers, by name.
    pub counters: BTreeMap<String, u64>,
    /// The last upgrade.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeReport>,
    /// How front and core are sandboxed; while the keeper answers, the front alone.
    pub sandbox: Vec<SandboxedRole>,
    /// How each VM's devices are; empty while the keeper answers, whose notices tell of faults.
    pub vm_states: Vec<VmState>,
}

/// How a VM's devices are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmState {
    pub name: String,
    /// The worst of its devices: `quarantined`, `failed`, `frozen`, `connected`; `away`: it has none now.
    pub state: String,
    /// Of a device that failed: why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cause: String,
    /// The last time that a fault of the daemon's took a device of it out of service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_fault: Option<LastFault>,
}

/// A fault of the daemon's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LastFault {
    /// Nanoseconds since 1970; 0: not known.
    pub time_ns: u64,
    pub text: String,
}

/// What a role may still do to the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxedRole {
    /// `front` or `core`.
    pub role: String,
    pub process: u32,
    /// User and group it runs as: `UID:GID`.
    pub user: String,
    /// Capabilities that it has, as a mask: 0 is none.
    pub capabilities: u64,
    /// The kernel's ABI of landlock that is in force; 0: none.
    pub landlock: u32,
    /// Its system calls are filtered.
    pub seccomp: bool,
    /// What is not as it should be, and why.
    pub notes: Vec<String>,
}

/// Result of `vms`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vms {
    pub vms: Vec<Vm>,
}

/// One VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vm {
    pub vm: u64,
    pub name: String,
    /// Ends with its QEMU.
    pub transient: bool,
    /// Numbers of the sessions connected now.
    pub sessions: Vec<u64>,
    /// Its own socket, if it has one.
    pub socket: Option<String>,
    /// `NAME:rw` or `NAME:ro`.
    pub shares: Vec<String>,
    /// It has published itself.
    pub published: bool,
    pub description: String,
    /// Somebody in it waits for messages.
    pub listening: bool,
    pub mailbox_messages: u64,
    pub mailbox_bytes: u64,
    /// The operator has frozen it: no DMA.
    pub frozen: bool,
    /// It is thawed by itself after that time; `None`: never, or it is not frozen.
    pub frozen_seconds_left: Option<u64>,
    /// Counted since the VM exists, by name.
    pub counters: BTreeMap<String, u64>,
}

/// Result of `peers`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    pub peers: Vec<Peer>,
}

/// One published peer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Peer {
    pub name: String,
    pub description: String,
    pub connected: bool,
    pub listening: bool,
}

/// Result of `shares`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    pub shares: Vec<Share>,
}

/// One share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Share {
    pub name: String,
    pub path: String,
    pub bytes_max: Option<u64>,
    pub files_max: Option<u64>,
    /// `VM:rw` or `VM:ro`.
    pub granted: Vec<String>,
}

/// Result of `send`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Number of the message; to `all`: how many VMs took it.
    pub number: u64,
}

/// Result of `recv`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Messages given before.
    pub messages: u64,
}

/// Result of `push` and `pull`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transferred {
    pub bytes: u64,
    /// Over all bytes, hexadecimal.
    pub crc32: String,
}

/// Result of `freeze`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Devices of the VM that are quiet now (0: it is not connected; whatever connects is frozen).
    pub devices: u64,
}

/// Result of what gives nothing back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}
