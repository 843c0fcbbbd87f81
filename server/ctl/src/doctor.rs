//! Looks at the host: what vmgmtd needs of kernel, limits, sockets and QEMU. Each finding is ok, a warning or a failure with a remedy.
//!
//! Works without a daemon; changes nothing.

use crate::cli::{Session, parse};
use crate::client::Client;
use crate::protocol::{Call, Status, Vms};
use rustix::fs::{
    CWD, MemfdFlags, Mode, OFlags, ResolveFlags, SealFlags, fcntl_add_seals, memfd_create, openat2,
};
use rustix::process::{PidfdFlags, Resource, getpid, getrlimit, pidfd_open};
use serde_json::json;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Descriptors that a connected device costs the front: its socket, 16 interrupts, pages, memory, in round numbers.
const DESCRIPTORS_PER_DEVICE: u64 = 32;
/// Mappings that a connected device costs the core.
const MAPPINGS_PER_DEVICE: u64 = 16;
/// Devices that a host should be good for.
const DEVICES_WANTED: u64 = 128;
/// QEMU's help takes a second where the disk is cold.
const QEMU_WAIT: Duration = Duration::from_secs(20);

/// Options of `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A socket of the daemon to look at, beside those it tells. Can be given several times.
    #[arg(long, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// The user that QEMU runs as [default: libvirt-qemu, where it exists, else you].
    #[arg(long, value_name = "USER")]
    qemu_user: Option<String>,
    /// The QEMU to look at.
    #[arg(
        long,
        value_name = "PROGRAM",
        env = "QEMU",
        default_value = "qemu-system-x86_64"
    )]
    qemu: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

#[derive(Debug)]
struct Finding {
    verdict: Verdict,
    what: String,
    remedy: String,
}

fn ok(what: impl Into<String>) -> Finding {
    Finding {
        verdict: Verdict::Ok,
        what: what.into(),
        remedy: String::new(),
    }
}
fn warn(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        verdict: Verdict::Warn,
        what: what.into(),
        remedy: remedy.into(),
    }
}
fn fail(what: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        verdict: Verdict::Fail,
        what: what.into(),
        remedy: remedy.into(),
    }
}

pub(crate) fn run(session: &Session, options: &Options) -> ExitCode {
    let mut worst_is_fail = false;
    let mut show = |finding: Finding| {
        worst_is_fail |= finding.verdict == Verdict::Fail;
        let Finding {
            verdict,
            what,
            remedy,
        } = finding;
        if session.json {
            session.print(
                &json!({"verdict": verdict.word().to_lowercase(), "what": what, "remedy": remedy})
                    .to_string(),
            );
        } else {
            session.print_text(&format!("{:4}  {what}\n", verdict.word()));
            if !remedy.is_empty() {
                session.print_text(&format!("      -> {remedy}\n"));
            }
        }
    };
    kernel().into_iter().for_each(&mut show);
    show(descriptors(getrlimit(Resource::Nofile).maximum));
    show(mappings(&read("/proc/sys/vm/max_map_count")));
    show(huge_pages(&read("/proc/meminfo")));
    let (daemon, mut sockets) = daemon(session);
    show(daemon);
    sockets.extend(options.socket.iter().cloned());
    let user = User::find(options.qemu_user.as_deref());
    match &user {
        Ok(user) => sockets.iter().for_each(|path| show(socket(path, user))),
        Err(name) => show(fail(
            format!("no user {name:?} on this host"),
            "name the user that QEMU runs as: --qemu-user USER",
        )),
    }
    qemu(&options.qemu).into_iter().for_each(&mut show);
    show(kvm());
    if worst_is_fail {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn kernel() -> Vec<Finding> {
    let release = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let mut findings = vec![match kernel_version(&release) {
        Some(version) if version >= (5, 10) => ok(format!("kernel {release}")),
        Some(_) => fail(
            format!("kernel {release} is older than 5.10"),
            "use a newer kernel: pidfd, openat2 and sealed memory are needed",
        ),
        None => warn(
            format!("kernel {release:?}: its version cannot be told"),
            "5.10 or later is needed",
        ),
    }];
    let sealed = memfd_create("doctor", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)
        .and_then(|fd| fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    findings.push(match sealed {
        Ok(()) => ok("sealed memory (memfd)"),
        Err(errno) => fail(
            format!("no sealed memory: memfd_create: {errno}"),
            "allow it in the container's or service's filter",
        ),
    });
    findings.push(match pidfd_open(getpid(), PidfdFlags::empty()) {
        Ok(_) => ok("process handles (pidfd)"),
        Err(errno) => fail(
            format!("no process handles: pidfd_open: {errno}"),
            "allow it in the container's or service's filter",
        ),
    });
    findings.push(
        match openat2(
            CWD,
            ".",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH,
        ) {
            Ok(_) => ok("paths held beneath a directory (openat2)"),
            Err(errno) => fail(
                format!("openat2: {errno}"),
                "allow it in the container's or service's filter: shares depend on it",
            ),
        },
    );
    findings
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn descriptors(hard: Option<u64>) -> Finding {
    let Some(hard) = hard else {
        return ok("descriptors: no limit");
    };
    let devices = hard / DESCRIPTORS_PER_DEVICE;
    let what = format!("descriptors: {hard}, good for about {devices} devices");
    if devices >= DEVICES_WANTED {
        ok(what)
    } else {
        warn(
            what,
            "raise it: LimitNOFILE=1048576 in the systemd unit, or `ulimit -Hn` as root",
        )
    }
}

fn mappings(text: &str) -> Finding {
    let Ok(count) = text.trim().parse::<u64>() else {
        return warn(
            "mappings per process: cannot be read",
            "look at /proc/sys/vm/max_map_count",
        );
    };
    let devices = count / MAPPINGS_PER_DEVICE;
    let what = format!("mappings per process: {count}, good for about {devices} devices");
    if devices >= DEVICES_WANTED {
        ok(what)
    } else {
        warn(what, "sysctl vm.max_map_count=262144")
    }
}

fn huge_pages(meminfo: &str) -> Finding {
    let number = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':')
            .split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
    };
    match (number("HugePages_Total"), number("HugePages_Free")) {
        (Some(0) | None, _) => {
            ok("huge pages: none reserved (only needed if a VM's memory is to come from them)")
        }
        (Some(total), Some(0)) => warn(
            format!("huge pages: all {total} are taken"),
            "a VM that touches more of them is stopped: sysctl vm.nr_hugepages",
        ),
        (Some(total), free) => ok(format!("huge pages: {} of {total} free", free.unwrap_or(0))),
    }
}

/// Asks the daemon, if there is one: how it is, and the VMs' sockets.
fn daemon(session: &Session) -> (Finding, Vec<PathBuf>) {
    let path = session.control.display();
    let ask = |call: Call| {
        let wait = Some(Duration::from_secs(5));
        Client::connect(&session.control)?.call(&call, &[], wait, &mut |_| true)
    };
    match ask(Call::Status).and_then(parse::<Status>) {
        Err(error) => {
            let remedy = format!(
                "{}; without one the sockets cannot be known (--socket PATH looks at one)",
                error.remedy()
            );
            (warn(format!("daemon: {error}"), remedy), Vec::new())
        }
        Ok(status) if status.state != "serving" => (
            warn(
                format!("daemon at {path} is {}", status.state),
                "ask again; vmgmtctl status tells more",
            ),
            Vec::new(),
        ),
        Ok(status) => {
            let vms = ask(Call::Vms).and_then(parse::<Vms>).unwrap_or_default();
            let sockets = vms
                .vms
                .into_iter()
                .filter_map(|vm| vm.socket.map(PathBuf::from))
                .collect();
            (
                ok(format!(
                    "daemon {} at {path} serves {} VMs",
                    status.version, status.vms
                )),
                sockets,
            )
        }
    }
}

/// A user, as far as file modes care.
#[derive(Debug)]
struct User {
    name: String,
    uid: u32,
    gids: Vec<u32>,
}

impl User {
    /// A user by name; without one libvirt's, else oneself. The error is the name that is not there.
    fn find(name: Option<&str>) -> Result<Self, String> {
        let (passwd, group) = (read("/etc/passwd"), read("/etc/group"));
        let own = || {
            let mut gids: Vec<u32> = rustix::process::getgroups()
                .unwrap_or_default()
                .iter()
                .map(|gid| gid.as_raw())
                .collect();
            gids.push(rustix::process::getegid().as_raw());
            Self {
                name: "you".into(),
                uid: rustix::process::geteuid().as_raw(),
                gids,
            }
        };
        match name {
            Some(name) => Self::of_files(name, &passwd, &group).ok_or_else(|| name.to_owned()),
            None => Ok(Self::of_files("libvirt-qemu", &passwd, &group).unwrap_or_else(own)),
        }
    }

    fn of_files(name: &str, passwd: &str, group: &str) -> Option<Self> {
        let line = passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| fields.first() == Some(&name))?;
        let mut gids = vec![line.get(3)?.parse().ok()?];
        for line in group.lines() {
            let fields: Vec<_> = line.split(':').collect();
            if let (Some(gid), Some(members)) =
                (fields.get(2).and_then(|gid| gid.parse().ok()), fields.get(3))
                && members.split(',').any(|member| member == name)
            {
                gids.push(gid);
            }
        }
        Some(Self {
            name: name.to_owned(),
            uid: line.get(2)?.parse().ok()?,
            gids,
        })
    }

    /// Whether the mode lets it do `bit` (1 search, 2 write).
    fn may(&self, metadata: &std::fs::Metadata, bit: u32) -> bool {
        let shift = if metadata.uid() == self.uid {
            6
        } else if self.gids.contains(&metadata.gid()) {
            3
        } else {
            0
        };
        self.uid == 0 || metadata.mode() >> shift & bit != 0
    }
}

fn socket(path: &Path, user: &User) -> Finding {
    let shown = path.display();
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => metadata,
        Ok(_) => {
            return fail(
                format!("{shown} is no socket"),
                "remove it, and restart the daemon",
            );
        }
        Err(error) => {
            return fail(
                format!("{shown}: {error}"),
                "is it the daemon's? vmgmtctl vms lists its sockets",
            );
        }
    };
    for directory in path
        .ancestors()
        .skip(1)
        .filter(|directory| !directory.as_os_str().is_empty())
    {
        if std::fs::metadata(directory).is_ok_and(|metadata| !user.may(&metadata, 1)) {
            let directory = directory.display();
            return fail(
                format!("{shown}: {} cannot enter {directory}", user.name),
                format!("chmod o+x {directory}, or move the socket"),
            );
        }
    }
    if !user.may(&metadata, 2) {
        let what = format!(
            "{shown}: {} may not connect (mode {:04o}, owner {}, group {})",
            user.name,
            metadata.mode() & 0o777,
            metadata.uid(),
            metadata.gid()
        );
        return fail(
            what,
            "set group and mode of the VM in vmgmtd.toml: group = \"kvm\", mode = \"0660\"",
        );
    }
    ok(format!("{shown}: {} may connect", user.name))
}

fn qemu(program: &Path) -> Vec<Finding> {
    let shown = program.display();
    let version = match output_of(program, &["--version"]) {
        Ok(text) => text.lines().next().unwrap_or_default().to_owned(),
        Err(error) => {
            return vec![warn(
                format!("{shown}: {error}"),
                "install QEMU 10.1 or later, or name it: --qemu PROGRAM",
            )];
        }
    };
    let finding = match qemu_version(&version) {
        Some(numbers) if numbers >= (10, 1) => ok(version.clone()),
        Some(_) => fail(
            format!("{version}: too old for vfio-user"),
            "use QEMU 10.1 or later",
        ),
        None => warn(
            format!("{shown}: its version cannot be told from {version:?}"),
            "10.1 or later is needed",
        ),
    };
    let has_device = output_of(program, &["-device", "help"]).map(|text| text.contains("\"vfio-user-pci\""));
    let device = match has_device {
        Ok(true) => ok("QEMU has the device vfio-user-pci"),
        Ok(false) => fail(
            "QEMU has no device vfio-user-pci",
            "use QEMU 10.1 or later, built with vfio-user (Debian's and Fedora's are)",
        ),
        Err(error) => warn(
            format!("QEMU's devices cannot be listed: {error}"),
            "run it by hand: qemu-system-x86_64 -device help",
        ),
    };
    vec![finding, device]
}

fn qemu_version(line: &str) -> Option<(u32, u32)> {
    kernel_version(line.split("version ").nth(1)?)
}

/// What a program prints, if it ends in time.
fn output_of(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut child = std::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| error.to_string())?;
    let Some(mut stdout) = child.stdout.take() else {
        return Err("no output".into());
    };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let read = stdout
            .read_to_end(&mut text)
            .map(|_| String::from_utf8_lossy(&text).into_owned());
        // Nobody waits any more: too late.
        let _ = sender.send(read);
    });
    let text = receiver.recv_timeout(QEMU_WAIT);
    if text.is_err() {
        let _ = child.kill(); // it may have ended just now
    }
    let _ = child.wait();
    match text {
        Ok(text) => text.map_err(|error| error.to_string()),
        Err(_) => Err(format!("does not end within {} s", QEMU_WAIT.as_secs())),
    }
}

fn kvm() -> Finding {
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => ok("/dev/kvm can be opened"),
        Err(error) => warn(
            format!("/dev/kvm: {error}"),
            "QEMU falls back to TCG, which is much slower; add the user to group kvm",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_limits_are_judged() {
        assert_eq!(kernel_version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(kernel_version("nonsense"), None);
        assert_eq!(
            qemu_version("QEMU emulator version 11.1.3 (Debian 1:11.1.3)"),
            Some((11, 1))
        );
        assert_eq!(descriptors(Some(1024)).verdict, Verdict::Warn);
        assert_eq!(descriptors(Some(1 << 20)).verdict, Verdict::Ok);
        assert_eq!(mappings("65530\n").verdict, Verdict::Ok);
        assert_eq!(mappings("1000").verdict, Verdict::Warn);
        assert_eq!(
            huge_pages("HugePages_Total:       4\nHugePages_Free:        0\n").verdict,
            Verdict::Warn
        );
        assert_eq!(
            huge_pages("HugePages_Total:       4\nHugePages_Free:        3\n").what,
            "huge pages: 3 of 4 free"
        );
    }

    #[test]
    fn a_socket_is_judged_by_its_mode_for_that_user() {
        use std::os::unix::fs::PermissionsExt;
        let passwd = "root:x:0:0::/:\nlibvirt-qemu:x:64055:106::/:\n";
        let user = User::of_files("libvirt-qemu", passwd, "kvm:x:104:libvirt-qemu,me\nother:x:9:\n").unwrap();
        assert_eq!((user.uid, user.gids.as_slice()), (64055, [106, 104].as_slice()));
        assert!(User::of_files("nobody", passwd, "").is_none());

        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let path = directory.path().join("a.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        for (mode, verdict) in [(0o600, Verdict::Fail), (0o666, Verdict::Ok)] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(socket(&path, &user).verdict, verdict);
        }
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o700)).unwrap();
        assert!(socket(&path, &user).what.contains("cannot enter"));
        assert_eq!(socket(Path::new("/nowhere"), &user).verdict, Verdict::Fail);
    }

    #[test]
    fn a_program_that_is_not_there_is_a_warning() {
        assert_eq!(qemu(Path::new("/nowhere/qemu"))[0].verdict, Verdict::Warn);
        assert_eq!(
            output_of(Path::new("echo"), &["QEMU emulator version 10.1.0"]).unwrap(),
            "QEMU emulator version 10.1.0\n"
        );
    }
}
