//! What a VM is allowed: its name, grants and budgets. Written by the operator, checked by `host/config`.

use serde::{Deserialize, Serialize};

/// A VM, as the core sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Number given by the keeper, never used again.
    pub vm: u64,
    pub name: String,
    pub shares: Vec<ShareGrant>,
    /// VMs it may reach; empty: all.
    pub reach: Vec<String>,
    /// May send to all.
    pub send_to_all: bool,
    pub limits: VmLimits,
    /// Ends with its last session (a VM of a shared socket).
    pub transient: bool,
}

impl VmConfig {
    /// As the template of a shared socket: these rights for one of its VMs.
    #[must_use]
    pub fn rights_for(&self, vm: &Self) -> Self {
        Self {
            vm: vm.vm,
            name: vm.name.clone(),
            ..self.clone()
        }
    }
}

/// A share granted to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareGrant {
    /// Name of the share.
    pub share: String,
    pub access: Access,
}

/// What a VM may do in a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// Budgets of a VM. Defaults are generous and written down in the README.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLimits {
    pub submissions_per_second_max: u64,
    pub bytes_per_second_max: u64,
    pub bytes_in_flight_max: u64,
    pub submissions_in_flight_max: u32,
    pub open_files_max: u32,
    pub mailbox_bytes_max: u64,
    /// Messages that wait in the mailbox longer than this are dropped (and counted), in seconds.
    pub mailbox_seconds_max: u64,
    pub message_bytes_max: u64,
    pub offers_max: u32,
    pub receives_max: u32,
}

impl Default for VmLimits {
    fn default() -> Self {
        Self {
            submissions_per_second_max: u64::MAX,
            bytes_per_second_max: u64::MAX,
            bytes_in_flight_max: 1 << 30,
            submissions_in_flight_max: 8192,
            open_files_max: 1024,
            mailbox_bytes_max: 4 << 20,
            mailbox_seconds_max: 24 * 3600,
            message_bytes_max: 1 << 20,
            offers_max: 64,
            receives_max: 1024,
        }
    }
}
