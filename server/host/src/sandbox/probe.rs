//! Attempts from within: what an intruder would try first. In debug builds only; a test asks for one by `VMGMT_PROBE=ROLE:ATTEMPT`.
//!
//! It runs in the real process, behind the real sandbox, right after it was sealed (the attempts on the front page: when the first
//! session's page has come). Nothing is changed for it. It says what came of it on standard error: "probe: ATTEMPT: done" or the error; a
//! process that is killed for it says no more than "trying".
#![allow(unsafe_code, reason = "an intruder would")]

use super::Role;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use std::io::{Error, Write};
use std::os::unix::process::CommandExt;

const VARIABLE: &str = "VMGMT_PROBE";

/// The attempt that this role is asked for.
fn asked(role: Role) -> Option<String> {
    let text = std::env::var(VARIABLE).ok()?;
    let (who, attempt) = text.split_once(':')?;
    (who == role.name()).then(|| attempt.to_owned())
}

/// One line by one write: three processes share the standard error, and `eprintln!` writes each piece of its text by itself, between which
/// somebody else's line may come.
fn say(attempt: &str, what: &dyn std::fmt::Display) {
    let line = format!("probe: {attempt}: {what}\n");
    // Nobody is there to hear that nobody hears.
    let _unheard = std::io::stderr().write_all(line.as_bytes());
}

fn report(attempt: &str, run: impl FnOnce() -> std::io::Result<()>) {
    say(attempt, &"trying");
    match run() {
        Ok(()) => say(attempt, &"done"),
        Err(error) => say(attempt, &error),
    }
}

/// Makes the attempt, if there is one to make here.
pub(super) fn run(role: Role) {
    let Some(attempt) = asked(role) else { return };
    let call: fn() -> std::io::Result<()> = match attempt.as_str() {
        "open" => || std::fs::File::open("/etc/shadow").map(drop),
        // Anybody may read it, so that it is not the user that keeps it closed.
        "openat2" => || open_by_name("/etc/passwd", OFlags::RDONLY),
        "look" => || open_by_name("/etc", OFlags::PATH),
        "create" => || {
            let path = format!("/tmp/vmgmt-probe-{}", std::process::id());
            open_by_name(&path, OFlags::WRONLY | OFlags::CREATE).and_then(|()| std::fs::remove_file(path))
        },
        "own-memory" => || open_by_name("/proc/self/mem", OFlags::RDWR),
        "exec" => || Err(std::process::Command::new("/bin/true").exec()),
        "thread" => || std::thread::Builder::new().spawn(|| ()).map(drop),
        "tcp" => || std::net::TcpStream::connect("127.0.0.1:1").map(drop),
        "unix" => || std::os::unix::net::UnixStream::connect("/run/probe.sock").map(drop),
        "kill-keeper" => || {
            // SAFETY: both take no pointer. (The library takes it for granted that the first is allowed; in the front it is not.)
            checked(unsafe { libc::syscall(libc::SYS_kill, libc::getppid(), 0) })
        },
        // SAFETY: fresh private memory that nobody uses.
        "executable" => || unsafe {
            let rights = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
            mmap_anonymous(std::ptr::null_mut(), 4096, rights, MapFlags::PRIVATE)?;
            Ok(())
        },
        // SAFETY: takes no pointer.
        "ptrace" => {
            || checked(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, libc::getppid(), 0, 0) })
        }
        "keeper-memory" => read_of_keeper,
        // SAFETY: takes no pointer.
        "become-root" => || checked(unsafe { libc::syscall(libc::SYS_setuid, 0) }),
        _ => return,
    };
    report(&attempt, call);
}

/// The core's attempts on a session's front page, as it came from the front.
pub(crate) fn front_page(fds: &[OwnedFd]) {
    let (Some(attempt), Some(page)) = (asked(Role::Core), fds.first()) else {
        return;
    };
    let call: fn(BorrowedFd<'_>) -> std::io::Result<()> = match attempt.as_str() {
        "page-reopen" => |page| open_by_name(&format!("/proc/self/fd/{}", page.as_raw_fd()), OFlags::RDWR),
        // SAFETY: a fresh mapping that nobody uses.
        "page-map" => |page| unsafe {
            mmap(
                std::ptr::null_mut(),
                4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                page,
                0,
            )?;
            Ok(())
        },
        // SAFETY: as above; it is read-only when it is made.
        "page-protect" => |page| unsafe {
            let at = mmap(
                std::ptr::null_mut(),
                4096,
                ProtFlags::READ,
                MapFlags::SHARED,
                page,
                0,
            )?;
            Ok(rustix::mm::mprotect(
                at,
                4096,
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
            )?)
        },
        "page-truncate" => |page| Ok(rustix::fs::ftruncate(page, 0)?),
        "page-chmod" => |page| Ok(rustix::fs::fchmod(page, Mode::from_raw_mode(0o666))?),
        "page-write" => |page| Ok(rustix::io::pwrite(page, &[1], 0).map(drop)?),
        _ => return,
    };
    report(&attempt, || call(page.as_fd()));
}

/// By the one call that opens files which the core has.
fn open_by_name(path: &str, flags: OFlags) -> std::io::Result<()> {
    let mode = if flags.contains(OFlags::CREATE) {
        Mode::RUSR
    } else {
        Mode::empty()
    };
    openat2(CWD, path, flags | OFlags::CLOEXEC, mode, ResolveFlags::empty())?;
    Ok(())
}

fn read_of_keeper() -> std::io::Result<()> {
    let mut byte = [0u8; 1];
    let local = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // The address of a variable of ours: the kernel looks at the rights before it looks at the address.
    let remote = libc::iovec {
        iov_base: (&raw const byte).cast_mut().cast(),
        iov_len: 1,
    };
    // SAFETY: the local side is a private byte.
    checked(unsafe {
        libc::process_vm_readv(libc::getppid(), &raw const local, 1, &raw const remote, 1, 0) as i64
    })
}

fn checked(result: i64) -> std::io::Result<()> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(())
    }
}
