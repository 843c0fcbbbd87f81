//! The sandbox of front and core, tried from within and looked at from outside, with real processes.
//!
//! From within: the debug build makes one attempt when `VMGMT_PROBE=ROLE:ATTEMPT` asks for it, in the real process, right after it was
//! sealed (server/host/src/sandbox/probe.rs). That the attempts are real is shown by the same ones without a sandbox, where they succeed.

use std::collections::BTreeMap;
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmgmt_ctl::Client as Operator;
use vmgmt_ctl::protocol::{Call, SandboxedRole, Status};
use vmgmt_driver::abi::file::existing;
use vmgmt_driver::transfer::Descriptor;
use vmgmt_driver::{Mode, TransferOptions};
use vmgmt_testkit::client::Client as Device;
use vmgmt_testkit::guest::SimulatedVm;
use vmgmt_testkit::process::{Daemon, DaemonBuilder, wait_until};
use vmgmt_testkit::skipped;

const PATIENCE: Duration = Duration::from_secs(60);
const EPERM: &str = "Operation not permitted (os error 1)";
const KILLED: &str = "signal 31 (SIGSYS)";
const NO_SUCH_FILE: &str = "No such file or directory (os error 2)";
const DENIED: &str = "Permission denied (os error 13)";

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A daemon with a VM `vm0` and the share `work`.
fn plan(sandbox: &str) -> DaemonBuilder {
    DaemonBuilder::new(env!("CARGO_BIN_EXE_vmgmtd"))
        .configuration(format!(
            "[server]\ncontrol = \"@DIR@/control.sock\"\n[sandbox]\n{sandbox}\n[[share]]\nname = \"work\"\npath = \"@DIR@/share\"\n\
             [[vm]]\nname = \"vm0\"\nsocket = \"@DIR@/vm0.sock\"\nshares = [\"work\"]\n"
        ))
        .folder("share")
}

fn status(daemon: &Daemon) -> Result<Status> {
    wait_until("a serving core", PATIENCE, || {
        let mut client = Operator::connect(&daemon.path("control.sock"))?;
        let value = client.call(&Call::Status, &[], Some(PATIENCE), &mut |_| true)?;
        let status: Status = serde_json::from_value(value)?;
        Ok((status.sandbox.len() == 2).then_some(status))
    })
}

fn role<'a>(status: &'a Status, name: &str) -> Result<&'a SandboxedRole> {
    status
        .sandbox
        .iter()
        .find(|role| role.role == name)
        .with_context(|| format!("{status:?}"))
}

/// What came of an attempt: "done", the error, or the signal that the role died of.
fn outcome(daemon: &Daemon, attempt: &str) -> Result<String> {
    let begin = format!("probe: {attempt}: ");
    wait_until(&format!("what becomes of {attempt}"), PATIENCE, || {
        let text = daemon.log().text();
        let said = text
            .lines()
            .filter_map(|line| line.strip_prefix(&begin))
            .find(|said| *said != "trying");
        let died = text.contains(KILLED).then_some(KILLED);
        Ok(said.or(died).map(str::to_owned))
    })
    .with_context(|| daemon.log().tail())
}

/// Makes one attempt in a daemon of its own.
fn attempt(builder: DaemonBuilder, role: &str, attempt: &str) -> Result<String> {
    let builder = builder.variable("VMGMT_PROBE", format!("{role}:{attempt}"));
    // A core that dies of it is never ready.
    let socket = PathBuf::from("vm0.sock");
    let daemon = builder
        .ready(vmgmt_testkit::process::Ready::Socket(socket))
        .start()?;
    // A session, for the attempts on its page. (Whoever looked whether the socket is there has to leave first.)
    let device = if attempt.starts_with("page") {
        Some(wait_until("the VM's place", PATIENCE, || {
            Ok(Device::connect_ready(daemon.path("vm0.sock")).ok())
        })?)
    } else {
        None
    };
    let found = outcome(&daemon, attempt)?;
    drop(device);
    Ok(found)
}

/// All attempts of a list, a few at a time, each compared.
fn attempts(
    builder: &(dyn Fn() -> Result<DaemonBuilder> + Sync),
    role: &str,
    expected: &[(&str, &str)],
) -> Result<()> {
    let tried: Vec<Result<String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|first| {
                scope.spawn(move || -> Vec<(usize, Result<String>)> {
                    let mine = expected.iter().enumerate().skip(first).step_by(4);
                    mine.map(|(at, (name, _))| {
                        (at, builder().and_then(|builder| attempt(builder, role, name)))
                    })
                    .collect()
                })
            })
            .collect();
        let found: BTreeMap<usize, _> = threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .flatten()
            .collect();
        found.into_values().collect()
    });
    ensure!(tried.len() == expected.len(), "a thread of the test failed");
    for ((name, wanted), found) in expected.iter().zip(tried) {
        let found = found.with_context(|| format!("{role}: {name}"))?;
        ensure!(
            found.contains(wanted),
            "{role}: {name}: {found:?} instead of {wanted:?}"
        );
    }
    Ok(())
}

#[test]
fn code_in_the_front_opens_nothing_starts_nothing_and_reaches_nobody() -> Result<()> {
    let names = [
        "open",
        "openat2",
        "look",
        "create",
        "own-memory",
        "exec",
        "thread",
        "tcp",
        "unix",
        "kill-keeper",
        "executable",
        "ptrace",
        "keeper-memory",
        "become-root",
    ];
    attempts(&|| Ok(plan("")), "front", &names.map(|name| (name, EPERM)))
}

#[test]
fn code_in_the_core_dies_of_what_it_never_does_and_finds_no_file_of_the_host() -> Result<()> {
    if !is_root() {
        skipped("only root gives the core an empty root directory");
        return Ok(());
    }
    let killed = [
        "exec",
        "thread",
        "tcp",
        "unix",
        "kill-keeper",
        "executable",
        "ptrace",
        "keeper-memory",
        "become-root",
    ];
    attempts(&|| Ok(plan("")), "core", &killed.map(|name| (name, KILLED)))?;
    // A call that libraries try by themselves: refused, and survived.
    attempts(&|| Ok(plan("")), "core", &[("open", DENIED)])?;
    let absent = ["openat2", "look", "create", "own-memory"];
    attempts(&|| Ok(plan("")), "core", &absent.map(|name| (name, NO_SUCH_FILE)))
}

#[test]
fn code_in_the_core_can_neither_write_nor_cut_the_front_page() -> Result<()> {
    let expected = [
        ("page-reopen", if is_root() { NO_SUCH_FILE } else { DENIED }),
        ("page-map", DENIED),
        ("page-protect", DENIED),
        ("page-truncate", "Invalid argument"),
        ("page-chmod", KILLED),
        ("page-write", "Bad file descriptor"),
    ];
    attempts(&|| Ok(plan("")), "core", &expected)
}

#[test]
fn without_the_sandbox_the_same_attempts_succeed() -> Result<()> {
    let names = [
        "open",
        "openat2",
        "look",
        "create",
        "own-memory",
        "thread",
        "executable",
        "kill-keeper",
    ];
    for role in ["front", "core"] {
        attempts(
            &|| Ok(plan("enabled = false")),
            role,
            &names.map(|name| (name, "done")),
        )?;
    }
    let off = || Ok(plan("").argument("--sandbox").argument("off"));
    attempts(
        &off,
        "core",
        &[("page-chmod", "done"), ("tcp", "Connection refused")],
    )?;
    let daemon = off()?.start()?;
    let status = status(&daemon)?;
    ensure!(
        role(&status, "core")?
            .notes
            .iter()
            .any(|note| note.contains("off")),
        "{status:?}"
    );
    ensure!(!role(&status, "front")?.seccomp && role(&status, "front")?.landlock == 0);
    daemon
        .log()
        .wait_for("front and core are not sandboxed", PATIENCE)
}

/// Fields of `/proc/PID/task/TID/status`, for every thread.
fn threads(pid: u32) -> Result<Vec<BTreeMap<String, String>>> {
    let mut threads = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("status"))?;
        let fields = text.lines().filter_map(|line| line.split_once(":\t"));
        threads.push(
            fields
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect(),
        );
    }
    Ok(threads)
}

#[test]
fn every_thread_is_another_user_without_capabilities_and_the_status_says_so() -> Result<()> {
    let mut daemon = plan("").start()?;
    let status = status(&daemon)?;
    let mut users = Vec::new();
    for name in ["front", "core"] {
        let told = role(&status, name)?;
        let pid = daemon.role(name)?;
        ensure!(
            (told.process, told.capabilities, told.seccomp) == (pid, 0, true),
            "{told:?}"
        );
        let seen = threads(pid)?;
        ensure!(seen.len() >= 2, "{name} has {} threads", seen.len());
        for thread in &seen {
            let field = |name: &str| thread.get(name).map(String::as_str).unwrap_or_default();
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                ensure!(
                    field(set).chars().all(|digit| digit == '0'),
                    "{name}: {set} {}",
                    field(set)
                );
            }
            ensure!(
                (field("NoNewPrivs"), field("Seccomp")) == ("1", "2"),
                "{name}: {thread:?}"
            );
            if is_root() {
                let (uid, gid) = told.user.split_once(':').context("a user")?;
                ensure!(
                    field("Uid") == [uid; 4].join("\t") && field("Gid") == [gid; 4].join("\t"),
                    "{thread:?}"
                );
                ensure!(uid != "0" && field("Groups").is_empty(), "{thread:?}");
                ensure!(field("CapBnd").chars().all(|digit| digit == '0'), "{thread:?}");
            }
        }
        if is_root() {
            ensure!(
                std::fs::read_dir(format!("/proc/{pid}/root/"))?.count() == 0,
                "{name} sees files"
            );
            ensure!(told.notes.is_empty(), "{told:?}");
        }
        users.push(told.user.clone());
    }
    ensure!(!is_root() || users[0] != users[1], "{users:?}");
    // They die with the keeper although their user has changed since they asked for it.
    let children = [daemon.role("front")?, daemon.role("core")?];
    daemon.process().signal(rustix::process::Signal::KILL)?;
    wait_until("their death", PATIENCE, || {
        let lives = |pid: &u32| {
            let threads = threads(*pid).unwrap_or_default();
            threads.iter().any(|thread| {
                thread
                    .get("State")
                    .is_some_and(|state| !state.starts_with(['Z', 'X']))
            })
        };
        Ok((!children.iter().any(lives)).then_some(()))
    })
}

#[test]
fn files_of_guests_belong_to_the_owner_of_the_share_whoever_that_is() -> Result<()> {
    if !is_root() {
        skipped("only root makes shares of other owners");
        return Ok(());
    }
    // On disk and in memory, closed to everybody but the owner.
    let places = [std::env::temp_dir(), PathBuf::from("/dev/shm")];
    for (place, owner) in places.iter().flat_map(|place| [(place, 0), (place, 12_345)]) {
        let share = tempfile::tempdir_in(place)?;
        std::fs::set_permissions(share.path(), std::fs::Permissions::from_mode(0o700))?;
        std::os::unix::fs::chown(share.path(), Some(owner), Some(owner))?;
        let text = format!(
            "[[share]]\nname = \"work\"\npath = {:?}\n[[vm]]\nname = \"vm0\"\nsocket = \"@DIR@/vm0.sock\"\nshares = [\"work\"]\n",
            share.path()
        );
        let daemon = DaemonBuilder::new(env!("CARGO_BIN_EXE_vmgmtd"))
            .configuration(format!("[server]\ncontrol = \"@DIR@/control.sock\"\n{text}"))
            .start()?;
        use_share(&daemon)?;
        // And with the next core as well.
        let old = daemon.kill_role("core")?;
        daemon.wait_for_new("core", old, PATIENCE)?;
        use_share(&daemon).with_context(|| daemon.log().tail())?;
        for name in ["deep", "deep/file", "moved"] {
            let metadata = std::fs::metadata(share.path().join(name)).with_context(|| name.to_owned())?;
            ensure!(
                (metadata.uid(), metadata.gid()) == (owner, owner),
                "{name} of {owner}: {metadata:?}"
            );
        }
        let mode = std::fs::metadata(share.path().join("deep/file"))?
            .permissions()
            .mode();
        ensure!(mode & 0o7711 == 0o600, "{mode:o}");
        let status = status(&daemon)?;
        ensure!(role(&status, "core")?.notes.is_empty(), "{status:?}");
    }
    Ok(())
}

/// Makes, writes, renames, lists, removes as a guest.
fn use_share(daemon: &Daemon) -> Result<()> {
    let vm = wait_until("the VM's place", PATIENCE, || {
        Ok(SimulatedVm::connect(daemon.path("vm0.sock")).ok())
    })?;
    let mut files = vm.ring(Mode::FILE)?;
    if files.stat("work/deep").is_err() {
        files.make_directory("work/deep")?;
    }
    for name in ["work/deep/file", "work/first", "work/deep/gone"] {
        put_file(&mut files, name, b"contents")?;
    }
    files.rename("work/first", "work/moved", existing::REPLACE, true)?;
    files.remove("work/deep/gone")?;
    let names: Vec<_> = files
        .list("work/deep")?
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    ensure!(names == ["file"], "{names:?}");
    let open = files.open_for_reading("work/moved")?;
    ensure!(files.checksum(open.handle, 0, 8)?.0 == 8);
    Ok(files.close(open.handle)?)
}

/// Puts a file as the guest's tool does.
fn put_file(files: &mut vmgmt_driver::Client, path: &str, data: &[u8]) -> Result<()> {
    let mut source = tempfile::tempfile()?;
    source.write_all(data)?;
    source.rewind()?;
    let begun = files.put(path, data.len() as u64, existing::REPLACE)?;
    let mut input = Descriptor::new(source.as_fd(), "source");
    let done = files.write_all(
        begun.handle,
        None,
        &mut input,
        &TransferOptions::default(),
        &mut |_| {},
    )?;
    files.commit(begun.handle, done.bytes, done.checksum, false)?;
    Ok(())
}

#[test]
fn a_share_that_the_core_may_not_use_is_named_with_what_helps() -> Result<()> {
    if !is_root() {
        skipped("only root mounts");
        return Ok(());
    }
    // A file system that cannot map users.
    let place = tempfile::tempdir()?;
    let shown = place.path().to_str().context("a path")?.to_owned();
    if !Command::new("mount")
        .args(["-t", "ramfs", "none", &shown])
        .status()?
        .success()
    {
        skipped("ramfs cannot be mounted here");
        return Ok(());
    }
    let result = with_share_that_cannot_be_mapped(&shown);
    Command::new("umount").args(["-l", &shown]).status()?;
    result
}

fn with_share_that_cannot_be_mapped(share: &str) -> Result<()> {
    let text = format!(
        "[server]\ncontrol = \"@DIR@/control.sock\"\n[[share]]\nname = \"work\"\npath = {share:?}\n\
         [[vm]]\nname = \"vm0\"\nsocket = \"@DIR@/vm0.sock\"\nshares = [\"work\"]\n"
    );
    let builder =
        |more: &str| DaemonBuilder::new(env!("CARGO_BIN_EXE_vmgmtd")).configuration(format!("{text}{more}"));
    std::fs::set_permissions(share, std::fs::Permissions::from_mode(0o700))?;
    let daemon = builder("").start()?;
    let told = status(&daemon)?;
    let core = role(&told, "core")?;
    ensure!(
        core.notes
            .iter()
            .any(|note| note.contains("\"work\"") && note.contains("may not read") && note.contains("chown")),
        "{core:?}"
    );
    daemon
        .log()
        .wait_for("its file system cannot map users", PATIENCE)?;
    ensure!(use_share(&daemon).is_err());
    drop(daemon);
    // What it says helps: the owner named as the core's user.
    std::os::unix::fs::chown(share, Some(23_456), Some(23_456))?;
    let daemon = builder("[sandbox]\ncore-user = \"23456\"\n").start()?;
    let told = status(&daemon)?;
    ensure!(
        role(&told, "core")?.user == "23456:23456" && role(&told, "core")?.notes.is_empty(),
        "{told:?}"
    );
    use_share(&daemon)
}

#[test]
fn a_daemon_of_an_ordinary_user_is_sandboxed_as_far_as_it_can() -> Result<()> {
    if !is_root() {
        skipped("the other tests run as an ordinary user here");
        return Ok(());
    }
    // The program where that user can reach it.
    let place = tempfile::tempdir()?;
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755))?;
    let program = place.path().join("vmgmtd");
    std::fs::copy(env!("CARGO_BIN_EXE_vmgmtd"), &program)?;
    let start = |probe: &str| -> Result<(tempfile::TempDir, std::process::Child, String)> {
        let folder = tempfile::tempdir()?;
        let shown = folder.path().to_str().context("a path")?.to_owned();
        std::fs::create_dir(folder.path().join("pub"))?;
        for path in [folder.path().to_owned(), folder.path().join("pub")] {
            std::os::unix::fs::chown(path, Some(34_567), Some(34_567))?;
        }
        let log = std::fs::File::create(folder.path().join("log"))?;
        let process = Command::new("setpriv")
            .args([
                "--reuid=34567",
                "--regid=34567",
                "--clear-groups",
                "--pdeathsig=KILL",
                "--",
            ])
            .arg(&program)
            .args([
                "--control",
                &format!("{shown}/control.sock"),
                "--socket",
                &format!("{shown}/vm0.sock"),
            ])
            .args(["--share", &format!("pub={shown}/pub")])
            .env("VMGMT_PROBE", probe)
            .stderr(log)
            .spawn()?;
        Ok((folder, process, shown))
    };
    let said = |shown: &str, text: &str| -> Result<()> {
        let read = || std::fs::read_to_string(format!("{shown}/log")).unwrap_or_default();
        wait_until(text, PATIENCE, || Ok(read().contains(text).then_some(()))).with_context(read)
    };
    // Landlock stands alone here: anybody may read /etc/passwd ("openat2"), but not from in there.
    for (attempt, wanted) in [
        ("core:openat2", DENIED),
        ("core:create", DENIED),
        ("core:own-memory", DENIED),
        ("core:page-reopen", DENIED),
        ("core:page-chmod", KILLED),
        ("front:open", EPERM),
    ] {
        let (folder, mut process, shown) = start(attempt)?;
        let result = (|| {
            if attempt.contains("page") {
                said(&shown, "vmgmtd: ready")?;
                drop(Device::connect_ready(folder.path().join("vm0.sock")));
            }
            said(&shown, wanted)
        })();
        process.kill()?;
        process.wait()?;
        result.with_context(|| attempt.to_owned())?;
    }
    let (folder, mut process, shown) = start("")?;
    let result = (|| {
        said(&shown, "vmgmtd: ready")?;
        let mut client = Operator::connect(&folder.path().join("control.sock"))?;
        let value = client.call(&Call::Status, &[], Some(PATIENCE), &mut |_| true)?;
        let status: Status = serde_json::from_value(value)?;
        for name in ["front", "core"] {
            let told = role(&status, name)?;
            ensure!(
                told.user == "34567:34567" && told.seccomp && told.capabilities == 0,
                "{told:?}"
            );
            ensure!(
                told.notes.iter().any(|note| note.contains("only root")),
                "{told:?}"
            );
        }
        let landlock = |name: &str| role(&status, name).map(|told| told.landlock);
        ensure!(landlock("front")? == landlock("core")?, "{status:?}");
        if landlock("core")? == 0 {
            skipped("this kernel has no landlock");
        }
        Ok(())
    })();
    process.kill()?;
    process.wait()?;
    result
}
