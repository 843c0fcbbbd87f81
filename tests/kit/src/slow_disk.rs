//! A disk that is as slow as a test wants it: a file system (FUSE) served by the test itself.
//!
//! Comes in: what its files hold; when to answer. Goes out: a mounted folder. Reads and writes of the *held* file wait while the disk
//! [`SlowDisk::hold`]s, in the kernel, as on a disk that hangs: the calling thread sleeps and no signal ends it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, SessionACL, WriteFlags,
};

use crate::process::wait_until;

/// The file that is never held.
pub const QUICK: &str = "quick";
/// The file that is held, through the page cache.
pub const HELD: &str = "held";
/// The file that is held, past the page cache: the system call itself waits for the disk.
pub const HELD_DIRECT: &str = "held-direct";

const FILES: [&str; 3] = [QUICK, HELD, HELD_DIRECT];
const DIRECT: u64 = 4;
const ATTRIBUTES_LAST: Duration = Duration::from_secs(3600);

#[derive(Debug, Default)]
struct Gate {
    holding: bool,
    /// Requests that wait.
    waiting: usize,
}

#[derive(Debug, Default)]
struct Disk {
    gate: Mutex<Gate>,
    moved: Condvar,
    bytes: Vec<u8>,
    written: Mutex<Vec<u8>>,
}

impl Disk {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the disk does not hold.
    fn pass(&self) {
        let mut gate = self.gate();
        gate.waiting += 1;
        while gate.holding {
            gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.waiting -= 1;
    }
}

/// A mounted slow disk. Dropping it lets everything through and unmounts it.
#[derive(Debug)]
pub struct SlowDisk {
    disk: Arc<Disk>,
    mount: Option<BackgroundSession>,
    folder: tempfile::TempDir,
}

impl SlowDisk {
    /// Mounts one whose files hold `bytes` each.
    ///
    /// # Errors
    /// This machine has no FUSE for us; the caller reports that as the reason of a skipped test.
    pub fn mount(bytes: Vec<u8>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("vmgmt-slow-disk").tempdir()?;
        let disk = Arc::new(Disk {
            bytes,
            ..Disk::default()
        });
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("slow-disk".into())];
        // The daemon's core is another user.
        config.acl = SessionACL::All;
        let mount = fuser::spawn_mount(Root(Arc::clone(&disk)), folder.path(), &config)
            .context("mounting a FUSE file system")?;
        Ok(Self {
            disk,
            mount: Some(mount),
            folder,
        })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The file of that name.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// From now on reads and writes of the held files wait.
    pub fn hold(&self) {
        self.disk.gate().holding = true;
    }

    /// They go on.
    pub fn release(&self) {
        self.disk.gate().holding = false;
        self.disk.moved.notify_all();
    }

    /// Waits until at least one request waits.
    ///
    /// # Errors
    /// None came in time.
    pub fn wait_for_request(&self, patience: Duration) -> Result<()> {
        wait_until("a request that the disk holds", patience, || {
            Ok((self.disk.gate().waiting > 0).then_some(()))
        })
    }

    /// What was written, from the files' beginning on.
    #[must_use]
    pub fn written(&self) -> Vec<u8> {
        self.disk
            .written
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.release();
        if let Some(mount) = self.mount.take() {
            // What still has it open keeps it until then; the mount point goes now.
            let _unmounted = mount.umount_and_join();
        }
    }
}

/// The file system: one folder with the three files.
struct Root(Arc<Disk>);

impl Root {
    fn attributes(&self, inode: u64) -> FileAttr {
        let is_root = inode == INodeNo::ROOT.0;
        FileAttr {
            ino: INodeNo(inode),
            size: if is_root { 0 } else { self.0.bytes.len() as u64 },
            blocks: 0,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: if is_root {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if is_root { 0o777 } else { 0o666 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Does it when the disk lets it through; on another thread, so that the file system goes on.
    fn when_let(&self, inode: INodeNo, answer: impl FnOnce(&Disk) + Send + 'static) {
        let disk = Arc::clone(&self.0);
        if inode.0 == 2 {
            return answer(&disk);
        }
        std::thread::spawn(move || {
            disk.pass();
            answer(&disk);
        });
    }
}

impl Filesystem for Root {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match FILES.iter().position(|file| name == *file) {
            Some(index) => reply.entry(
                &ATTRIBUTES_LAST,
                &self.attributes(index as u64 + 2),
                Generation(0),
            ),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ATTRIBUTES_LAST, &self.attributes(inode.0));
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = if inode.0 == DIRECT {
            FopenFlags::FOPEN_DIRECT_IO
        } else {
            FopenFlags::empty()
        };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.when_let(inode, move |disk| {
            let start = usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(disk.bytes.len());
            let end = start.saturating_add(size as usize).min(disk.bytes.len());
            reply.data(&disk.bytes[start..end]);
        });
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.when_let(inode, move |disk| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let mut written = disk.written.lock().unwrap_or_else(PoisonError::into_inner);
            let end = start.saturating_add(data.len());
            if end > disk.bytes.len() {
                return reply.error(Errno::ENOSPC);
            }
            if written.len() < end {
                written.resize(end, 0);
            }
            written[start..end].copy_from_slice(&data);
            reply.written(data.len() as u32);
        });
    }
}
