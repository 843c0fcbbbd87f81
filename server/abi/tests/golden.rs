//! The whole contract as text, compared with `tests/golden/abi.txt`: a change of a number, an offset or a size is seen in review, or it fails.
//!
//! `UPDATE_GOLDEN=1 cargo test -p vmgmt-abi --test golden` writes the file anew.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Write;
use std::path::Path;
use vmgmt_abi::registers::{DeviceState, HostPage, RingState};
use vmgmt_abi::{Budget, Completion, ListEntry, Mode, Opcode, Status, Submission};
use vmgmt_abi::{chat, ring};

/// Constants by module, under their full names.
macro_rules! numbers {
    ($dump:ident, $($module:ident)::+: $($name:ident),*) => {
        {
            use $($module)::+ as module;
            let path = stringify!($($module)::+).replace(' ', "");
            $(writeln!($dump, "const {path}::{} = {}", stringify!($name), Value::text(module::$name)).unwrap();)*
        }
    };
}

/// A record's size and its fields' offsets.
macro_rules! record {
    ($dump:ident, $kind:ident: $($field:ident),*) => {
        writeln!($dump, "record {} {} bytes", stringify!($kind), size_of::<$kind>()).unwrap();
        $(writeln!($dump, "  +{:#04x} {}", std::mem::offset_of!($kind, $field), stringify!($field)).unwrap();)*
        // A field that is not named here does not compile.
        let _ = |value: $kind| { let $kind { $($field: _),* } = value; };
    };
}

/// Numbers that have names of their own.
macro_rules! named {
    ($dump:ident, $kind:ident) => {
        for (value, name, text) in $kind::NAMED {
            writeln!($dump, "{} {:#06x} {name}: {text}", stringify!($kind), value.0).unwrap();
        }
    };
}

trait Value {
    fn text(self) -> String;
}

macro_rules! value {
    ($($kind:ty),*) => { $(impl Value for $kind { fn text(self) -> String { format!("{self:#x}") } })* };
}
value!(u16, u32, u64, usize);

impl Value for &str {
    fn text(self) -> String {
        format!("{self:?}")
    }
}

fn dump() -> String {
    use chat::{MessageHeader, PeerEntry};
    use ring::RingEvents;
    use vmgmt_abi::file::{DirectoryEntry, FileStat, OfferHeader, ShareEntry};
    let mut dump = String::new();
    numbers!(dump, vmgmt_abi: PCI_VENDOR, PCI_DEVICE, PCI_CLASS, MAGIC, ABI_VERSION, NAME_BYTES_MAX, PATH_BYTES_MAX);
    numbers!(dump, vmgmt_abi::feature: EVENT_SUPPRESSION, HOST_PAGE, MODE_FILE, MODE_CHAT, MODE_STATISTICS, MODE_CALCULATION);
    numbers!(dump, vmgmt_abi::registers: BAR0_BYTES, MAGIC, ABI_VERSION, FEATURES_LOW, FEATURES_HIGH, FEATURES_ACK_LOW, FEATURES_ACK_HIGH, STATE, FAIL_CAUSE, CONTROL, RING_COUNT, RING_ENTRIES_MAX, VECTORS, CORE_LIFE_LOW, CORE_LIFE_HIGH, SESSION_LOW, SESSION_HIGH, GENERATION, TRANSFER_BYTES_MAX, LIST_ENTRIES_MAX, BAD_ACCESSES, INTERRUPT_PENDING, INTERRUPT_ENABLE, INTERRUPT_ACK, HOST_PAGE_LOW, HOST_PAGE_HIGH, RINGS, RING_STRIDE, RING_SUBMISSIONS_LOW, RING_SUBMISSIONS_HIGH, RING_COMPLETIONS_LOW, RING_COMPLETIONS_HIGH, RING_EVENTS_LOW, RING_EVENTS_HIGH, RING_SUBMISSION_ENTRIES, RING_COMPLETION_ENTRIES, RING_MODE, RING_VECTOR, RING_NONCE_LOW, RING_NONCE_HIGH, RING_ENABLE, RING_STATUS, RING_EPOCH, DOORBELLS, CONTROL_RESET, RINGS_MAX, ENTRIES_MAX, VECTORS_MAX);
    numbers!(dump, vmgmt_abi::port: BAR2_BYTES, PORT_MAGIC, MAGIC, ABI_VERSION, CLAIM, MODE, STATUS, READABLE, WRITABLE, EPOCH, DATA, COMMIT, ABORT, DEVICE_STATE, STATUS_BUSY, STATUS_DONE, STATUS_UNDERFLOW, STATUS_OVERFLOW, STATUS_ERROR, INPUT_BYTES_MAX, OUTPUT_BYTES_MAX);
    numbers!(dump, vmgmt_abi::ring: SUBMISSION_BYTES, COMPLETION_BYTES, LIST_ENTRY_BYTES, RING_EVENTS_BYTES, LIST_ENTRIES_MAX, TRANSFER_BYTES_MAX, META_BYTES_MAX);
    numbers!(dump, vmgmt_abi::ring::flag: LIST, CHECK, DURABLE, KNOWN);
    numbers!(dump, vmgmt_abi::ring::completion_flag: PHASE, MORE, END);
    numbers!(dump, vmgmt_abi::ring::event_offset: SUBMISSION_TAIL, COMPLETION_HEAD, COMPLETION_EVENT, NONCE, SUBMISSION_HEAD, SUBMISSION_EVENT);
    numbers!(dump, vmgmt_abi::file: SIZE_UNKNOWN);
    numbers!(dump, vmgmt_abi::file::unknown: NOT_DURABLE);
    numbers!(dump, vmgmt_abi::file::existing: REFUSE, REPLACE, RENAME, MASK);
    numbers!(dump, vmgmt_abi::file::put: RESUME, SET_PERMISSIONS, PERMISSIONS_SHIFT, UNCHECKED, KNOWN);
    numbers!(dump, vmgmt_abi::file::open: READ, WRITE, CREATE, EXCLUSIVE, TRUNCATE, KNOWN);
    numbers!(dump, vmgmt_abi::file::kind: FILE, DIRECTORY, OTHER);
    numbers!(dump, vmgmt_abi::file::offer_kind: OFFER, REQUEST);
    numbers!(dump, vmgmt_abi::chat: PEER_BY_NAME, PEER_HOST, PEER_ALL, HOST_NAME, ALL_NAME, DESCRIPTION_BYTES_MAX);
    numbers!(dump, vmgmt_abi::chat::message_flag: TO_ALL, CONTINUED, FROM_MAILBOX);
    numbers!(dump, vmgmt_abi::chat::presence: CONNECTED, PUBLISHED, LISTENING);
    record!(dump, Submission: tag, opcode, flags, handle, offset, buffer, length, list_entries, meta_bytes, deadline_ns, argument);
    record!(dump, Completion: result, extra, detail, reserved, tag, status, flags);
    record!(dump, ListEntry: address, length);
    record!(dump, RingEvents: submission_tail, completion_head, completion_event, reserved_guest, nonce, reserved_guest_line, submission_head, submission_event, reserved_device, reserved_device_line);
    record!(dump, HostPage: sequence, core_life, throttled_ns, granted_cpu_milli, granted_memory_bytes, reserved);
    record!(dump, FileStat: size, allocated, modified_ns, kind, permissions);
    record!(dump, DirectoryEntry: stat, name_bytes, reserved);
    record!(dump, ShareEntry: bytes_left, writable, name_bytes);
    record!(dump, OfferHeader: handle, source, size, kind, source_name_bytes, file_name_bytes);
    record!(dump, MessageHeader: sequence, source, message_bytes, accepted_ns, source_name_bytes, flags);
    record!(dump, PeerEntry: number, presence, name_bytes, description_bytes);
    for (name, state) in [
        ("BLANK", DeviceState::BLANK),
        ("ACTIVE", DeviceState::ACTIVE),
        ("RESETTING", DeviceState::RESETTING),
        ("FAILED", DeviceState::FAILED),
        ("QUARANTINED", DeviceState::QUARANTINED),
    ] {
        writeln!(dump, "DeviceState {} {name}", state.0).unwrap();
    }
    for (name, state) in [
        ("CLOSED", RingState::CLOSED),
        ("OPENING", RingState::OPENING),
        ("OPEN", RingState::OPEN),
        ("REFUSED", RingState::REFUSED),
    ] {
        writeln!(dump, "RingState {} {name}", state.0).unwrap();
    }
    named!(dump, Mode);
    named!(dump, Opcode);
    named!(dump, Status);
    named!(dump, Budget);
    dump
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

#[test]
fn the_contract_is_what_it_was() {
    let path = root().join("tests/golden/abi.txt");
    let now = dump();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &now).unwrap();
    }
    let golden =
        std::fs::read_to_string(&path).expect("tests/golden/abi.txt is there; UPDATE_GOLDEN=1 makes it");
    let differences: Vec<_> = golden
        .lines()
        .filter(|line| !now.contains(&format!("{line}\n")))
        .map(|line| format!("- {line}"))
        .chain(
            now.lines()
                .filter(|line| !golden.contains(&format!("{line}\n")))
                .map(|line| format!("+ {line}")),
        )
        .collect();
    assert!(
        golden == now,
        "the contract changed; if that is meant, UPDATE_GOLDEN=1:\n{}",
        differences.join("\n")
    );
}

/// A constant that somebody adds to the contract is missed here until it is in the dump.
#[test]
fn no_constant_is_left_out() {
    let now = dump();
    for source in ["lib", "registers", "port", "ring", "file", "chat"] {
        let text = std::fs::read_to_string(root().join(format!("server/abi/src/{source}.rs"))).unwrap();
        let names = text.lines().filter_map(|line| {
            let (name, kind) = line.trim().strip_prefix("pub const ")?.split_once(": ")?;
            // States are dumped by their names above; functions are not numbers.
            (!kind.starts_with("Self") && !name.contains("fn ")).then(|| name.to_owned())
        });
        for name in names {
            assert!(
                now.contains(&format!("::{name} = ")),
                "{source}.rs: {name} is not in the dump"
            );
        }
    }
}

/// Whoever writes a driver by the text finds every operation, status and budget in it, in the words of the code.
#[test]
fn the_text_for_driver_writers_is_complete() {
    let text = std::fs::read_to_string(root().join("docs/abi.md")).unwrap();
    for (opcode, name, _) in Opcode::NAMED {
        let row = format!("| {:#06x} | {name} | ", opcode.0);
        assert!(text.contains(&row), "docs/abi.md has no row {row:?}");
    }
    for (number, name, words) in Status::NAMED {
        let row = format!("| {} | {name} | {words} |", number.0);
        assert!(text.contains(&row), "docs/abi.md has no row {row:?}");
    }
    for (number, name, words) in Budget::NAMED {
        let row = format!("| {} | {name} | {words} |", number.0);
        assert!(text.contains(&row), "docs/abi.md has no row {row:?}");
    }
}
