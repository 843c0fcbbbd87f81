//! Answers as words and tables. Values in, text out.

use crate::protocol::{
    LastFault, LogLine, Message, Peers, SandboxedRole, Shares, Status, UpgradeReport, UpgradeState, VmState,
    Vms,
};
use std::fmt::Write;

/// Replaces control characters except line ends and tabs: what a guest says must not move an operator's cursor.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// Columns as wide as their longest cell. Cells have no line ends.
fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heads.iter().map(|head| head.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let heads: Vec<String> = heads.iter().map(|head| (*head).to_owned()).collect();
    for row in std::iter::once(&heads).chain(rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{:width$}", cell.replace(['\n', '\t'], " ")))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn yes(it_is: bool) -> String {
    if it_is { "yes" } else { "no" }.into()
}

fn words(list: &[String]) -> String {
    if list.is_empty() {
        "-".into()
    } else {
        list.join(",")
    }
}

/// A number of bytes for a person.
pub(crate) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

pub(crate) fn status(status: Status) -> String {
    let Status {
        state,
        answered_by,
        version,
        pid,
        life,
        uptime_seconds,
        vms,
        sessions,
        notices,
        counters,
        upgrade,
        sandbox,
        vm_states,
    } = status;
    let mut text = format!(
        "vmgmtd {version} is {state} (process {pid}; the {answered_by} answers)\n\
         core life {life}, for {uptime_seconds} s; {vms} VMs, {sessions} devices connected\n"
    );
    for (name, number) in counters {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name}: {number}");
    }
    for role in sandbox {
        text.push_str(&sandboxed(&role));
    }
    for vm in &vm_states {
        text.push_str(&vm_state(vm));
    }
    if let Some(upgrade) = upgrade {
        text.push_str(&self::upgrade(&upgrade));
    }
    for notice in notices {
        let _ = writeln!(text, "! {notice}");
    }
    text
}

/// A VM of which there is something to tell; those that are as they should be are in `vmgmtctl vms`.
fn vm_state(vm: &VmState) -> String {
    let VmState {
        name,
        state,
        cause,
        last_fault,
    } = vm;
    let usual = matches!(state.as_str(), "connected" | "away");
    let cause = match cause.as_str() {
        "" => String::new(),
        cause => format!(" ({cause})"),
    };
    match last_fault {
        None if usual => String::new(),
        None => format!("VM {name}: {state}{cause}\n"),
        Some(LastFault { time_ns, text }) => {
            let moment = moment(*time_ns);
            format!("VM {name}: {state}{cause}; last fault {moment}: {text}\n")
        }
    }
}

/// A time since 1970, in UTC, to the second.
fn moment(time_ns: u64) -> String {
    if time_ns == 0 {
        return "at an unknown time".into();
    }
    let seconds = time_ns / 1_000_000_000;
    let (year, month, day) = date(seconds / 86_400);
    let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}Z")
}

/// Year, month and day, so many days after 1 January 1970. (Counted from 1 March of the year 0, so that a leap day is a year's last.)
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + next, month, day)
}

/// An upgrade, a line for the whole and one for each part.
pub(crate) fn upgrade(report: &UpgradeReport) -> String {
    let mut text = format!("{}: {}\n", report.title(), report.state.name());
    for change in &report.changes {
        let _ = match report.state {
            UpgradeState::Done => writeln!(text, "    {change}"),
            _ => writeln!(text, "    (not in force) {change}"),
        };
    }
    if report.state == UpgradeState::Done && !report.configuration.is_empty() && report.changes.is_empty() {
        text.push_str("    nothing has changed; the shares' directories were opened anew\n");
    }
    for part in &report.parts {
        let _ = write!(text, "    {}: {}", part.part.name(), part.state.name());
        if matches!(
            part.state,
            UpgradeState::Done | UpgradeState::RolledBack | UpgradeState::Failed
        ) {
            let _ = write!(text, ", out of service for {} ms", part.stall_ms);
        }
        if !part.reason.is_empty() {
            let _ = write!(text, ": {}", part.reason.replace('\n', "\n        "));
        }
        text.push('\n');
    }
    text
}

fn sandboxed(role: &SandboxedRole) -> String {
    let capabilities = match role.capabilities {
        0 => "no capabilities".to_owned(),
        mask => format!("CAPABILITIES {mask:#x}"),
    };
    let landlock = match role.landlock {
        0 => "NO landlock".to_owned(),
        abi => format!("landlock (ABI {abi})"),
    };
    let seccomp = if role.seccomp { "seccomp" } else { "NO seccomp" };
    let mut text = format!(
        "{}: process {} as user {}, {capabilities}, {landlock}, {seccomp}\n",
        role.role, role.process, role.user
    );
    for note in &role.notes {
        // Writing to a string does not fail.
        let _ = writeln!(text, "! {}: {note}", role.role);
    }
    text
}

pub(crate) fn vms(vms: Vms) -> String {
    let rows: Vec<_> = vms
        .vms
        .into_iter()
        .map(|vm| {
            let devices = match (vm.frozen, vm.frozen_seconds_left) {
                (false, _) => vm.sessions.len().to_string(),
                (true, None) => format!("{} (frozen)", vm.sessions.len()),
                (true, Some(seconds)) => format!("{} (frozen, {seconds} s)", vm.sessions.len()),
            };
            let devices = match vm.counters.get("messages_given_up") {
                None | Some(0) => devices,
                Some(count) => format!("{devices}, {count} messages given up"),
            };
            let mailbox = format!("{} ({})", vm.mailbox_messages, bytes(vm.mailbox_bytes));
            let listening = yes(vm.listening);
            let shares = words(&vm.shares);
            let socket = vm.socket.unwrap_or_else(|| "(shared)".into());
            vec![
                vm.name,
                devices,
                yes(vm.published),
                listening,
                mailbox,
                shares,
                socket,
            ]
        })
        .collect();
    table(
        &[
            "NAME",
            "DEVICES",
            "PUBLISHED",
            "LISTENING",
            "MAILBOX",
            "SHARES",
            "SOCKET",
        ],
        &rows,
    )
}

pub(crate) fn peers(peers: Peers) -> String {
    let rows: Vec<_> = peers
        .peers
        .into_iter()
        .map(|peer| {
            vec![
                peer.name,
                yes(peer.connected),
                yes(peer.listening),
                peer.description,
            ]
        })
        .collect();
    table(&["NAME", "CONNECTED", "LISTENING", "DESCRIPTION"], &rows)
}

pub(crate) fn shares(shares: Shares) -> String {
    let rows: Vec<_> = shares
        .shares
        .into_iter()
        .map(|share| {
            let bytes_max = share.bytes_max.map_or_else(|| "-".into(), bytes);
            let files_max = share
                .files_max
                .map_or_else(|| "-".into(), |files| files.to_string());
            vec![
                share.name,
                share.path,
                bytes_max,
                files_max,
                words(&share.granted),
            ]
        })
        .collect();
    table(&["NAME", "PATH", "BYTES-MAX", "FILES-MAX", "GRANTED"], &rows)
}

pub(crate) fn message(message: &Message) -> String {
    match (&message.text, message.bytes()) {
        (Some(text), _) => format!("{}: {}\n", message.from, text.strip_suffix('\n').unwrap_or(text)),
        (None, Ok(bytes)) => format!(
            "{}: ({} bytes that are no text; --json shows them)\n",
            message.from,
            bytes.len()
        ),
        (None, Err(_)) => format!("{}: (a message that cannot be read)\n", message.from),
    }
}

pub(crate) fn log_line(line: &LogLine) -> String {
    let (seconds, milliseconds) = (line.time_ns / 1_000_000_000, line.time_ns / 1_000_000 % 1000);
    let of_day = seconds % 86_400;
    let (hours, minutes, seconds) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let vm = line.vm.as_ref().map_or_else(String::new, |vm| format!("{vm}: "));
    format!(
        "{hours:02}:{minutes:02}:{seconds:02}.{milliseconds:03}Z {vm}{}\n",
        line.text
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Part, PartReport};
    use crate::protocol::{Peer, Vm};
    use std::collections::BTreeMap;

    #[test]
    fn tables_are_aligned_and_keep_a_guests_lines_in_their_row() {
        let vm = Vm {
            name: "web".into(),
            sessions: vec![4],
            mailbox_bytes: 2048,
            mailbox_messages: 3,
            ..Vm::default()
        };
        let long = Vm {
            name: "a longer name".into(),
            socket: Some("/run/a".into()),
            shares: vec!["pub:ro".into()],
            ..vm.clone()
        };
        let text = vms(Vms { vms: vec![vm, long] });
        assert_eq!(
            text,
            "NAME           DEVICES  PUBLISHED  LISTENING  MAILBOX       SHARES  SOCKET\n\
             web            1        no         no         3 (2.00 KiB)  -       (shared)\n\
             a longer name  1        no         no         3 (2.00 KiB)  pub:ro  /run/a\n"
        );
        let peer = Peer {
            name: "x".into(),
            description: "two\nlines".into(),
            connected: true,
            listening: true,
        };
        assert!(peers(Peers { peers: vec![peer] }).ends_with("x     yes        yes        two lines\n"));
    }

    #[test]
    fn what_a_guest_says_moves_no_cursor() {
        assert_eq!(
            printable("a\x1b[2Jb\r\n\tc\u{9b}d"),
            "a\u{fffd}[2Jb\u{fffd}\n\tc\u{fffd}d"
        );
    }

    #[test]
    fn messages_lines_and_states_read_well() {
        let text = Message {
            from: "web".into(),
            text: Some("hello\n".into()),
            ..Message::default()
        };
        assert_eq!(message(&text), "web: hello\n");
        let binary = Message {
            from: "web".into(),
            ..Message::default()
        }
        .with_bytes(vec![0xff; 3]);
        assert_eq!(
            message(&binary),
            "web: (3 bytes that are no text; --json shows them)\n"
        );
        let line = LogLine {
            time_ns: 86_400_000_000_000 + 3_661_007_000_000,
            vm: Some("web".into()),
            text: "no".into(),
        };
        assert_eq!(log_line(&line), "01:01:01.007Z web: no\n");
        let given = Status {
            state: "serving".into(),
            answered_by: "core".into(),
            version: "0.1.0".into(),
            pid: 7,
            life: 2,
            uptime_seconds: 5,
            vms: 3,
            sessions: 1,
            notices: vec!["core life 1 died".into()],
            counters: BTreeMap::from([("refusals".into(), 4)]),
            upgrade: Some(UpgradeReport {
                number: 3,
                binary: "/new".into(),
                state: UpgradeState::Denied,
                parts: vec![
                    PartReport {
                        part: Part::Core,
                        state: UpgradeState::Done,
                        reason: String::new(),
                        stall_ms: 12,
                    },
                    PartReport {
                        part: Part::Front,
                        state: UpgradeState::Denied,
                        reason: "it is old".into(),
                        stall_ms: 0,
                    },
                ],
                ..UpgradeReport::default()
            }),
            sandbox: vec![
                SandboxedRole {
                    role: "front".into(),
                    process: 8,
                    user: "61184:61184".into(),
                    landlock: 7,
                    seccomp: true,
                    ..SandboxedRole::default()
                },
                SandboxedRole {
                    role: "core".into(),
                    process: 9,
                    user: "0:0".into(),
                    capabilities: 0x21,
                    notes: vec!["the sandbox is off by configuration".into()],
                    ..SandboxedRole::default()
                },
            ],
            vm_states: ["connected", "frozen", "failed", "away"]
                .into_iter()
                .map(|state| VmState {
                    name: format!("vm-{state}"),
                    state: state.into(),
                    cause: if state == "failed" { "bad" } else { "" }.into(),
                    last_fault: (state == "away").then(|| LastFault {
                        time_ns: 1_709_164_799_000_000_000,
                        text: "a fault".into(),
                    }),
                })
                .collect(),
        };
        assert_eq!(
            status(given),
            "vmgmtd 0.1.0 is serving (process 7; the core answers)\ncore life 2, for 5 s; 3 VMs, 1 devices connected\nrefusals: 4\n\
             front: process 8 as user 61184:61184, no capabilities, landlock (ABI 7), seccomp\n\
             core: process 9 as user 0:0, CAPABILITIES 0x21, NO landlock, NO seccomp\n\
             ! core: the sandbox is off by configuration\n\
             VM vm-frozen: frozen\nVM vm-failed: failed (bad)\nVM vm-away: away; last fault 2024-02-28 23:59:59Z: a fault\n\
             upgrade 3 to /new: denied\n    core: done, out of service for 12 ms\n    front: denied: it is old\n! core life 1 died\n"
        );
    }

    #[test]
    fn a_time_is_told_with_its_date() {
        for (seconds, told) in [
            (1, "1970-01-01 00:00:01Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (1_709_164_800, "2024-02-29 00:00:00Z"),
            (1_709_251_200, "2024-03-01 00:00:00Z"),
            (1_795_420_331, "2026-11-23 07:52:11Z"),
            (4_107_542_399, "2100-02-28 23:59:59Z"),
            (4_107_542_400, "2100-03-01 00:00:00Z"),
        ] {
            assert_eq!(moment(seconds * 1_000_000_000), told);
        }
        assert_eq!(moment(0), "at an unknown time");
    }

    #[test]
    fn a_reload_says_what_has_changed_or_what_has_not() {
        let mut report = UpgradeReport {
            number: 4,
            configuration: "/etc/v.toml".into(),
            changes: vec!["share data: added".into()],
            state: UpgradeState::Done,
            ..UpgradeReport::default()
        };
        assert_eq!(
            upgrade(&report),
            "reload 4 of /etc/v.toml: done\n    share data: added\n"
        );
        report.changes.clear();
        assert!(upgrade(&report).contains("nothing has changed"));
        report.state = UpgradeState::Denied;
        report.changes = vec!["share data: added".into()];
        report.parts = vec![PartReport {
            part: Part::Core,
            state: UpgradeState::Denied,
            reason: "1 mistake\nv.toml:3: no".into(),
            stall_ms: 0,
        }];
        assert_eq!(
            upgrade(&report),
            "reload 4 of /etc/v.toml: denied\n    (not in force) share data: added\n    core: denied: 1 mistake\n        v.toml:3: no\n"
        );
    }
}
