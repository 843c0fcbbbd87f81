//! The two system calls of the sandbox for which no library has a safe form.
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

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
