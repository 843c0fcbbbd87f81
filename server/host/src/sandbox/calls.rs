//! The system calls of the sandbox for which no library has a safe form, or one that waits for a disk.
#![allow(unsafe_code)]

use rustix::fd::{AsFd, AsRawFd};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

/// Attributes of a mount that is not attached anywhere: it maps users by `namespace`, and what lies on it gives no rights
/// (no setuid, no device, no program, no symbolic link).
pub(super) fn map_mount(mount: impl AsFd, namespace: impl AsFd) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC
            | libc::MOUNT_ATTR_NOSYMFOLLOW,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_fd().as_raw_fd().unsigned_abs().into(),
    };
    // SAFETY: the path is an empty string with its end, the attributes are a whole structure and live until the call returns; the
    // kernel reads both and changes only the mount of the descriptor.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// Puts this process into a new user namespace.
pub(super) fn new_user_namespace() -> Result<(), Errno> {
    // SAFETY: the process has one thread and holds nothing yet but its standard streams; no descriptor table or memory is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
}

/// Has the threads that this one makes be ordinary ones, whatever its own priority; false: it is not scheduled as an ordinary thread itself.
pub(crate) fn has_ordinary_threads() -> bool {
    let none = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the kernel takes two numbers and reads a structure that lives until the call returns.
    unsafe {
        libc::sched_getscheduler(0) == libc::SCHED_OTHER
            && libc::sched_setscheduler(0, policy, &raw const none) == 0
    }
}

/// The kernel's ABI of landlock.
pub(super) fn landlock_abi() -> Result<i32, Errno> {
    /// LANDLOCK_CREATE_RULESET_VERSION (linux/landlock.h): nothing is made, the version is told.
    const VERSION: u32 = 1;
    // SAFETY: with this flag the kernel takes no address and no size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0,
            VERSION,
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|abi| *abi > 0)
        .ok_or_else(last_error)
}

/// Lets a ruleset of landlock give these rights beneath a directory. (The library's own rule asks the file system first what the
/// descriptor is; on a disk that hangs that takes for ever.)
pub(super) fn allow_beneath(ruleset: impl AsFd, directory: impl AsFd, rights: u64) -> Result<(), Errno> {
    /// LANDLOCK_RULE_PATH_BENEATH.
    const PATH_BENEATH: i32 = 1;
    /// struct landlock_path_beneath_attr.
    #[repr(C, packed)]
    struct PathBeneath {
        allowed_access: u64,
        parent_fd: i32,
    }
    let rule = PathBeneath {
        allowed_access: rights,
        parent_fd: directory.as_fd().as_raw_fd(),
    };
    // SAFETY: the rule is a whole structure and lives until the call returns; the kernel only reads it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_fd().as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// Process and user at the other end of a socket. The process is 0 where it has no number here, being of another PID namespace; `rustix` has no
/// form for that.
pub(crate) fn peer_of(socket: impl AsFd) -> Result<(i32, u32), Errno> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most so many bytes into a structure of that size, in which any bits are a value.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut bytes,
        )
    };
    if result == 0 {
        Ok((peer.pid, peer.uid))
    } else {
        Err(last_error())
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
