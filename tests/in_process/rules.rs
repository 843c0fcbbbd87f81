//! The filters of system calls against what the roles really call: no entry too many, none too few.
//!
//! The other tests of this file run again with their daemons under strace(1). Whether they pass is not asked here (they are slow then,
//! and run by themselves too); what front and core called after they were sealed is.

use super::*;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use vmgmt_driver::abi::file::open;
use vmgmt_host::sandbox::Role;
use vmgmt_host::sandbox::rules::{self, Only, Used};
use vmgmt_testkit::client::irq;
use vmgmt_testkit::process::TRACE_VARIABLE;

/// Which thread belongs to which role, and what each role called.
#[derive(Default)]
struct Seen {
    roles: BTreeMap<u32, (String, u32)>,
    filters: BTreeMap<u32, u32>,
    sealed: BTreeSet<u32>,
    calls: BTreeMap<String, BTreeMap<String, u64>>,
    /// What was asked for by fcntl, by role.
    commands: BTreeMap<String, BTreeSet<String>>,
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
            if name == "fcntl"
                && let Some(command) = arguments
                    .split([',', ')', ' '])
                    .find(|word| word.starts_with("F_"))
            {
                let commands = self.commands.entry(role.clone()).or_default();
                commands.insert(command.to_owned());
            }
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

/// What the tables allow of fcntl, as strace(1) writes it.
const FCNTL: &[(&str, i32)] = &[
    ("F_GETFD", libc::F_GETFD),
    ("F_GETFL", libc::F_GETFL),
    ("F_SETFL", libc::F_SETFL),
    ("F_DUPFD_CLOEXEC", libc::F_DUPFD_CLOEXEC),
    ("F_ADD_SEALS", libc::F_ADD_SEALS),
    ("F_GET_SEALS", libc::F_GET_SEALS),
];

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
    let seen_by = |role: &str, call: &str| {
        let calls = seen.calls.get(role);
        calls
            .and_then(|calls| calls.get(call))
            .copied()
            .unwrap_or_default()
    };
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
            let count = seen_by(name, rule.name());
            match rule.used {
                Used::Always if count == 0 => wrong.push(format!(
                    "{name}: nobody calls {}: why is it allowed?",
                    rule.name()
                )),
                Used::Once
                    if [Role::Front, Role::Core]
                        .iter()
                        .all(|role| seen_by(role.name(), rule.name()) == 0) =>
                {
                    wrong.push(format!("nobody calls {}: why is it allowed?", rule.name()));
                }
                Used::Never if count > 0 => wrong.push(format!(
                    "{name}: {} is called, and the table says never",
                    rule.name()
                )),
                _ => {}
            }
        }
        for (command, number) in FCNTL {
            let allows = |only: &Only| matches!(only, Only::OneOf(1, of) if of.contains(&(*number as u64)));
            let allowed = rules::of(role).any(|rule| rule.name() == "fcntl" && rule.only.iter().any(allows));
            let called = seen
                .commands
                .get(name)
                .is_some_and(|seen| seen.contains(*command));
            if allowed && !called {
                wrong.push(format!(
                    "{name}: nobody calls fcntl {command}: why is it allowed?"
                ));
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
    // Of a failure and by who likes to know: what is called, how often.
    if std::env::var_os("VMGMT_SHOW_CALLS").is_some() {
        println!("{:#?}\n{:#?}", seen.calls, seen.commands);
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// What is called only when something breaks or is replaced.
#[test]
fn what_breaks_and_what_is_replaced_calls_what_the_table_says() -> Result<()> {
    let site = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2)
        .variable("VMGMT_FAULT", "submission=kill the core")
        .start()?;
    let vm = site.vm(1)?;
    let works = |vm: &SimulatedVm| vm.ring(Mode::COMMON)?.noop().map_err(anyhow::Error::from);
    // A panic or an abort of its own, and a fault from outside.
    let core = site.daemon.role("core")?;
    let culprit = site.vm(0)?;
    ensure!(
        culprit
            .ring(Mode::FILE)?
            .open_for_reading("work/kill the core")
            .is_err()
    );
    let core = site.daemon.wait_for_new("core", core, PATIENCE)?;
    works(&vm)?;
    // (The device that killed it may have killed the next one too.)
    let end = |pid, signal| rustix::process::kill_process(pid, signal).map_err(anyhow::Error::from);
    let pid = |number: u32| rustix::process::Pid::from_raw(number.cast_signed()).context("no process");
    drop(culprit);
    let core = site.daemon.role("core").unwrap_or(core);
    // The first finds the standard library's handler, which puts the default back; no instruction failed, so it goes on, until the second.
    wait_until("the end of the core", PATIENCE, || {
        let now = site.daemon.role("core").ok().filter(|now| *now != core);
        if now.is_none() {
            let _ = end(pid(core)?, rustix::process::Signal::SEGV);
        }
        Ok(now)
    })?;
    works(&vm)?;
    // Whoever is replaced waits for the keeper's word. Under a tracer that may take too long, and is taken back: it has waited all the same.
    for part in ["core", "front"] {
        let upgrade = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
            .arg("--control")
            .arg(site.control())
            .args(["upgrade", "--part", part])
            .output()?;
        let traced = std::env::var_os(TRACE_VARIABLE).is_some();
        ensure!(traced || upgrade.status.success(), "{part}: {upgrade:?}");
        works(&vm)?;
    }
    // An eventfd that unmasks INTx.
    let unmask = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
    let interrupt = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
    let mut client = wait_until("VM 0's place", PATIENCE, || {
        Ok(vmgmt_testkit::client::Client::connect_ready(site.socket(0)).ok())
    })?;
    client.assign_irqs(irq::INTX, 0, std::slice::from_ref(&interrupt))?;
    let by_eventfd = irq::DATA_EVENTFD | irq::UNMASK;
    client.set_irqs(irq::INTX, by_eventfd, 0, 1, &[], &[unmask.as_fd()])?;
    rustix::io::write(&unmask, &1_u64.to_ne_bytes())?;
    // It is empty when the front has read it.
    wait_until("the front's look at the eventfd", PATIENCE, || {
        let mut fds = [rustix::event::PollFd::new(&unmask, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default()))?;
        Ok(fds[0].revents().is_empty().then_some(()))
    })
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
