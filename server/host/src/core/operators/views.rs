//! What the core knows, in the words of the control protocol.

use super::Books;
use crate::config::{Access, ShareGrant, VmConfig};
use crate::control::protocol::{self, ErrorCode, Failure, Shares, Vm, VmState};
use crate::core::sessions::Session;
use vmgmt_abi::Status;
use vmgmt_abi::registers::DeviceState;
use vmgmt_core::interface::VmStatus;
use vmgmt_device::Tick;
use vmgmt_device::page::control;

pub(super) fn grant_text(grant: &ShareGrant) -> String {
    granted(&grant.share, grant.access)
}

/// A share of a VM, or a VM of a share, and what it may do there.
fn granted(name: &str, access: Access) -> String {
    let may = if access == Access::ReadOnly { "ro" } else { "rw" };
    format!("{name}:{may}")
}

pub(super) fn shares(books: &Books<'_>) -> Shares {
    let shares = books.config.shares.iter().map(|share| protocol::Share {
        name: share.name.clone(),
        path: share.path.display().to_string(),
        bytes_max: share.bytes_max,
        files_max: share.files_max,
        granted: books
            .vms
            .values()
            .filter_map(|vm| {
                vm.shares
                    .iter()
                    .find(|grant| grant.share == share.name)
                    .map(|grant| (vm, grant))
            })
            .map(|(vm, grant)| granted(&vm.name, grant.access))
            .collect(),
    });
    Shares {
        shares: shares.collect(),
    }
}

pub(super) fn peer(vm: &VmStatus) -> protocol::Peer {
    protocol::Peer {
        name: vm.name.clone(),
        description: vm.description.clone(),
        connected: !vm.sessions.is_empty(),
        listening: vm.receives_posted > 0,
    }
}

pub(super) fn vm_of(vm: &VmStatus, books: &Books<'_>) -> Vm {
    let config = books.vms.get(&vm.vm);
    let given_up = vm
        .sessions
        .iter()
        .map(|session| books.sessions.messages_given_up(*session))
        .sum();
    let counters = [
        ("open_files", vm.open_files),
        ("transfers", vm.transfers),
        ("submissions", vm.submissions),
        ("messages_sent", vm.messages_sent),
        ("messages_delivered", vm.messages_delivered),
        ("messages_dropped", vm.messages_dropped),
        ("bytes_from_vm", vm.bytes_from_vm),
        ("bytes_to_vm", vm.bytes_to_vm),
        ("refusals", vm.refusals),
        ("messages_given_up", given_up),
    ];
    Vm {
        vm: vm.vm,
        name: vm.name.clone(),
        transient: config.is_some_and(|config| config.transient),
        sessions: vm.sessions.clone(),
        socket: books
            .config
            .sockets
            .iter()
            .find(|(name, _)| name.as_deref() == Some(vm.name.as_str()))
            .map(|(_, path)| path.display().to_string()),
        shares: config
            .map(|config| config.shares.iter().map(grant_text).collect())
            .unwrap_or_default(),
        published: vm.published,
        description: vm.description.clone(),
        listening: vm.receives_posted > 0,
        mailbox_messages: vm.mailbox_messages,
        mailbox_bytes: vm.mailbox_bytes,
        frozen: books.frozen.contains_key(&vm.vm),
        frozen_seconds_left: books
            .frozen
            .get(&vm.vm)
            .filter(|until| **until != Tick::NEVER)
            .map(|until| until.since_ns(books.now).div_ceil(1_000_000_000)),
        counters: counters
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    }
}

/// How each VM's devices are.
pub(super) fn states(books: &Books<'_>) -> Vec<VmState> {
    let of = |vm: &VmConfig| {
        let (state, cause) = state(vm.vm, books);
        VmState {
            name: vm.name.clone(),
            state: state.into(),
            cause,
            last_fault: books.faults.get(&vm.name).cloned(),
        }
    };
    books.vms.values().map(of).collect()
}

/// The worst of a VM's devices.
fn state(vm: u64, books: &Books<'_>) -> (&'static str, String) {
    let devices = || books.sessions.of_vm(vm).map(|(_, session)| session);
    if devices().any(|device| device.front.control() & control::QUARANTINED != 0) {
        return ("quarantined", String::new());
    }
    let failed = |device: &Session| match device.core.state(device.front.generation()) {
        Some((DeviceState::FAILED, cause)) => Some(cause.describe().to_owned()),
        _ => None,
    };
    if let Some(cause) = devices().find_map(failed) {
        return ("failed", cause);
    }
    let state = match devices().next() {
        None => "away",
        Some(_) if books.frozen.contains_key(&vm) => "frozen",
        Some(_) => "connected",
    };
    (state, String::new())
}

/// The protocol's failure for a hub's status.
pub(super) fn failure(status: Status, text: String) -> Failure {
    let code = match status {
        Status::BAD_ARGUMENT => ErrorCode::BadRequest,
        Status::NOT_SUPPORTED => ErrorCode::NotSupported,
        Status::DENIED | Status::REFUSED | Status::READ_ONLY => ErrorCode::Denied,
        Status::OVER_BUDGET => ErrorCode::OverBudget,
        Status::PEER_ABSENT => ErrorCode::Absent,
        Status::NO_SUCH_NAME => ErrorCode::NoSuchName,
        Status::EXISTS => ErrorCode::Exists,
        Status::BUSY => ErrorCode::Busy,
        Status::TIMED_OUT => ErrorCode::TimedOut,
        Status::CANCELLED => ErrorCode::Cancelled,
        Status::INTEGRITY => ErrorCode::Integrity,
        Status::STALE => ErrorCode::Stale,
        _ => ErrorCode::Failed,
    };
    Failure::new(code, text, "")
}
