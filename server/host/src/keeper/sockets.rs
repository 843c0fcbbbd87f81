//! Listening sockets: bound, with mode and group, and removed at the end. In: paths. Out: descriptors. Never accepts.

use super::limits::{BACKLOG, DYING_DEADLINE, LOOK_AGAIN};
use super::vms::is_there;
use crate::config::Mistake;
use crate::sandbox::peer_of;
use rustix::fd::OwnedFd;
use rustix::fs::{Gid, Mode, chmod, chown};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::umask;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A socket and its file, which is removed with it, if it is still the one that was made here.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    /// Device and inode of the file.
    pub(super) file: Option<(u64, u64)>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.file.is_some() && self.file == file_at(&self.path) {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path)
        .ok()
        .map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Makes a socket to listen on. A file that a dead daemon left is replaced, any other is not.
pub(super) fn listen_on(path: &Path, mode: u32, group: Option<&str>) -> Result<Socket, Mistake> {
    let mistake = |what, remedy| mistake_at(path, what, remedy);
    let failed = |doing: &str, errno: Errno| {
        mistake(
            format!("{doing}: {errno}"),
            "let vmgmtd's user write in that directory, or choose another",
        )
    };
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        std::fs::create_dir_all(directory).map_err(|error| {
            mistake(
                format!("its directory cannot be made: {error}"),
                "make it yourself",
            )
        })?;
    }
    let address = SocketAddrUnix::new(path).map_err(|errno| failed("the path is no address", errno))?;
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(mistake(
                "a file of that name is there and is no socket".into(),
                "remove it or choose another path",
            ));
        }
        match listener_of(path) {
            // Nobody listens any more; or only a process does that a dead daemon has left, asleep in the kernel: nobody comes to accept.
            Err(Errno::CONNREFUSED) => {}
            Ok(pid) if !is_there(pid) => {}
            Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::PROTOTYPE)) => {
                return Err(failed(
                    "it is there, and whether somebody listens cannot be seen",
                    errno,
                ));
            }
            _ => {
                let remedy = "stop the other vmgmtd first (vmgmtctl status shows it), or choose another path";
                return Err(mistake("somebody listens on it already".into(), remedy));
            }
        }
        std::fs::remove_file(path).map_err(|error| {
            mistake(
                format!("an old socket there cannot be removed: {error}"),
                "remove it yourself",
            )
        })?;
    }
    let fd = new_socket().map_err(|errno| failed("socket", errno))?;
    // Nobody may connect before mode and group are as they should be.
    let before = umask(Mode::from_raw_mode(0o777));
    let bound = bind(&fd, &address);
    umask(before);
    bound.map_err(|errno| failed("bind", errno))?;
    let socket = Socket {
        fd,
        path: path.to_owned(),
        file: file_at(path),
    };
    set_access(path, mode, group)?;
    listen(&socket.fd, BACKLOG).map_err(|errno| failed("listen", errno))?;
    Ok(socket)
}

fn mistake_at(path: &Path, what: String, remedy: &str) -> Mistake {
    Mistake {
        place: format!("socket {}", path.display()),
        what,
        remedy: remedy.to_owned(),
    }
}

/// Who may connect to a socket.
pub(super) fn set_access(path: &Path, mode: u32, group: Option<&str>) -> Result<(), Mistake> {
    let mistake = |what, remedy| mistake_at(path, what, remedy);
    if let Some(group) = group {
        let Some(number) = crate::config::group_id(group) else {
            return Err(mistake(
                format!("no group {group:?} on this host"),
                "see /etc/group",
            ));
        };
        chown(path, None, Some(Gid::from_raw(number))).map_err(|errno| {
            mistake(
                format!("cannot be given to group {group}: {errno}"),
                "run vmgmtd as a member of it, or as root",
            )
        })?;
    }
    chmod(path, Mode::from_raw_mode(mode)).map_err(|errno| {
        mistake(
            format!("chmod: {errno}"),
            "let vmgmtd's user write in that directory, or choose another",
        )
    })
}

/// For a daemon that starts: waits while a process that has ended still listens, since the kernel may close that a moment after its death.
pub(super) fn outlive_the_dead<'a>(paths: impl Iterator<Item = &'a Path>) {
    let until = Instant::now() + DYING_DEADLINE;
    for path in paths {
        while listener_of(path).is_ok_and(|pid| !is_there(pid)) && Instant::now() < until {
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

/// The process that began to listen there, if somebody listens.
fn listener_of(path: &Path) -> Result<i32, Errno> {
    let socket = new_socket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    peer_of(&socket).map(|(pid, _)| pid)
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn stale_sockets_are_replaced_living_ones_and_other_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/a.sock");
        let socket = listen_on(&path, 0o640, None).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
        UnixStream::connect(&path).unwrap();
        let error = listen_on(&path, 0o600, None).unwrap_err();
        assert!(
            error.what.contains("somebody listens") && error.remedy.contains("stop the other"),
            "{error}"
        );
        drop(socket);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves it");
        // (A process that another test is just starting may have inherited it, for a moment.)
        while UnixStream::connect(&path).is_ok() {
            std::thread::yield_now();
        }
        let socket = listen_on(&path, 0o600, None).unwrap();
        // A successor's file is not ours to remove.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        drop(socket);
        assert!(path.exists());
        assert!(
            listen_on(&path, 0o600, None)
                .unwrap_err()
                .what
                .contains("is no socket")
        );
        assert!(listen_on(Path::new("/proc/x.sock"), 0o600, None).is_err());
    }

    /// Set in a process that only listens, on its standard input, for a test of this one.
    const LISTENS: &str = "VMGMT_TEST_LISTENS";

    #[test]
    fn a_socket_of_a_process_that_has_ended_is_replaced_though_it_still_answers() {
        if std::env::var_os(LISTENS).is_some() {
            return listen(std::io::stdin(), 1).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let left = new_socket().unwrap();
        bind(&left, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let test = "keeper::sockets::tests::a_socket_of_a_process_that_has_ended_is_replaced_though_it_still_answers";
        let mut listening = std::process::Command::new("/proc/self/exe");
        listening.args(["--exact", test]).env(LISTENS, "1");
        listening
            .stdin(left.try_clone().unwrap())
            .stdout(std::process::Stdio::null());
        assert!(listening.status().unwrap().success());
        UnixStream::connect(&path).unwrap();
        let socket = listen_on(&path, 0o600, None).unwrap();
        assert_eq!(listener_of(&path), Ok(std::process::id() as i32));
        drop((socket, left));
    }

    #[test]
    fn a_group_is_given_by_number_or_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let own = rustix::process::getegid().as_raw().to_string();
        drop(listen_on(&path, 0o660, Some(&own)).unwrap());
        assert!(
            listen_on(&path, 0o660, Some("no such group"))
                .unwrap_err()
                .what
                .contains("no group")
        );
        assert!(!path.exists(), "nothing is left of a failure");
    }
}
