//! The filters of system calls against what the roles really call: no entry too many, none too few.
//!
//! The other tests of this file run again with their daemons under strace(1). Whether they pass is not asked here (they are slow then,
//! and run by themselves too); what front and core called after they were sealed is.

use super::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use vmgmt_driver::abi::file::open;
use vmgmt_host::sandbox::Role;
use vmgmt_host::sandbox::rules::{self, Used};
use vmgmt_testkit::process::TRACE_VARIABLE;

/// Which thread belongs to which role, and what each role called.
#[derive(Default)]
struct Seen {
    roles: BTreeMap<u32, (String, u32)>,
    filters: BTreeMap<u32, u32>,
    sealed: BTreeSet<u32>,
    calls: BTreeMap<String, BTreeMap<String, u64>>,
    /// Processes that were sealed, by role.
    counted: BTreeMap<String, u64>,
}

impl Seen {
    /// One line of `strace -f`: `TID call(arguments) = result`.
    fn line(&mut self, line: &str) {
        let Some((tid, rest)) = line
            .split_once(' ')
            .and_then(|(tid, rest)| Some((tid.parse().ok()?, rest.trim_start())))
        else {
            return;
        };
        if rest.starts_with("execve")
            && let Some(role) = rest
                .split_once("[\"vmgmtd-")
                .and_then(|(_, text)| text.split('"').next())
        {
            self.roles.insert(tid, (role.to_owned(), tid));
            return;
        }
        let Some((role, process)) = self.roles.get(&tid).cloned() else {
            return;
        };
        let (name, arguments) = match rest.strip_prefix("<... ") {
            Some(resumed) => (resumed.split(' ').next().unwrap_or_default(), resumed),
            None => rest.split_once('(').unwrap_or(("", "")),
        };
        // A new thread is of the same process. (None is made after the seal.)
        if name.starts_with("clone")
            && let Some(thread) = rest.rsplit("= ").next().and_then(|text| text.parse().ok())
        {
            self.roles.insert(thread, (role.clone(), process));
        }
        let seals = name == "seccomp" && arguments.contains("SECCOMP_SET_MODE_FILTER");
        if self.sealed.contains(&process) && !rest.starts_with(['<', '+', '-']) {
            *self
                .calls
                .entry(role)
                .or_default()
                .entry(name.to_owned())
                .or_default() += 1;
        } else if seals {
            let filters = self.filters.entry(process).or_default();
            *filters += 1;
            // A core sets two filters; what comes between is not service yet.
            let last = if role == Role::Core.name() { 2 } else { 1 };
            if *filters == last {
                *self.counted.entry(role).or_default() += 1;
                self.sealed.insert(process);
            }
        }
    }
}

/// Nobody traces into this folder any more.
fn is_quiet(folder: &Path) -> bool {
    let shown = folder.as_os_str().as_encoded_bytes();
    let tracers = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            command.starts_with(b"strace\0") && command.windows(shown.len()).any(|part| part == shown)
        });
    tracers.count() == 0
}

#[test]
fn no_rule_of_the_filters_is_unused_and_none_is_missing() -> Result<()> {
    if Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        ensure!(
            std::env::var_os("CI").is_none(),
            "strace is missing: apt-get install strace"
        );
        vmgmt_testkit::skipped("strace is missing (apt-get install strace)");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let output = Command::new(std::env::current_exe()?)
        .args([
            "--test-threads=2",
            "--skip",
            "no_rule_of_the_filters",
            "--skip",
            "an_interrupt_wakes_each_sleeper",
            // Many deaths of many cores, slowly, and no call that the others do not make.
            "--skip",
            "cores_die",
        ])
        .env(TRACE_VARIABLE, folder.path())
        .env("VMGMT_PATIENCE", "5")
        .output()?;
    wait_until("the end of the tracers", PATIENCE, || {
        Ok(is_quiet(folder.path()).then_some(()))
    })?;
    let mut seen = Seen::default();
    for trace in std::fs::read_dir(folder.path())? {
        // Numbers of processes are used again from one daemon to the next.
        seen.roles.clear();
        seen.filters.clear();
        seen.sealed.clear();
        let text = std::fs::read(trace?.path())?;
        String::from_utf8_lossy(&text)
            .lines()
            .for_each(|line| seen.line(line));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let mut wrong = Vec::new();
    for role in [Role::Front, Role::Core] {
        let name = role.name();
        ensure!(
            seen.counted.get(name).is_some_and(|count| *count > 10),
            "{:?}; the tests said:\n{said}",
            seen.counted
        );
        let calls = seen.calls.get(name).cloned().unwrap_or_default();
        for rule in rules::of(role) {
            let count = calls.get(rule.name()).copied().unwrap_or_default();
            match rule.used {
                Used::Always if count == 0 => wrong.push(format!(
                    "{name}: nobody calls {}: why is it allowed?",
                    rule.name()
                )),
                Used::Never if count > 0 => wrong.push(format!(
                    "{name}: {} is called, and the table says never",
                    rule.name()
                )),
                _ => {}
            }
        }
        let allowed: BTreeSet<&str> = rules::of(role).map(rules::Rule::name).collect();
        let refused = |call: &str| role == Role::Core && rules::REFUSED_NAMES.contains(&call);
        for (call, count) in calls
            .iter()
            .filter(|(call, _)| !allowed.contains(call.as_str()) && !refused(call))
        {
            wrong.push(format!(
                "{name}: {call} is called ({count} times) and not allowed"
            ));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn what_the_other_tests_leave_out_is_done_as_well() -> Result<()> {
    let site = site(1)?;
    let many = site.share().join("many");
    std::fs::create_dir(&many)?;
    for number in 0..3000 {
        std::fs::write(
            many.join(format!(
                "a rather long name, so that a listing has parts: {number:08}"
            )),
            "",
        )?;
    }
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    ensure!(files.list("work/many")?.len() == 3000);
    let how = open::WRITE | open::CREATE;
    let opened = files.open_file("work/cut", how)?;
    files.truncate(opened.handle, 5)?;
    files.fsync(opened.handle)?;
    files.close(opened.handle)?;
    ensure!(files.stat("work/cut")?.size == 5);
    let mut operator = vmgmt_ctl::Client::connect(&site.control())?;
    operator.call(
        &vmgmt_ctl::protocol::Call::Status,
        &[],
        Some(PATIENCE),
        &mut |_| true,
    )?;
    drop((files, vm, operator));
    let ended = site.daemon.stop(PATIENCE)?;
    ensure!(ended.success(), "{ended}");
    Ok(())
}
