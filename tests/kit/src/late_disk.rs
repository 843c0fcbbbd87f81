//! A disk that is late with one write: a file system (FUSE) served by the test itself, whose files can be made, written, renamed and removed.
//!
//! Goes out: a mounted folder; what its files hold. After [`LateDisk::hold_next_write`] the next write waits, in the kernel, as on a disk that
//! hangs: the calling thread sleeps and no signal ends it. Everything that comes later goes on at once, also to the same file; what was
//! held lands when the disk is [`LateDisk::release`]d, over what was written meanwhile. So do disks that freeze or are far away, where the
//! kernel lets two writers of one file in at once; here it is a promise that the file system makes (`FOPEN_PARALLEL_DIRECT_WRITES`, for
//! writes within the file's length).

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL, TimeOrNow,
    WriteFlags,
};

use crate::process::wait_until;

/// The kernel asks each time: somebody else may have changed it.
const NOTHING_LASTS: Duration = Duration::ZERO;
const OPENED: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// A write that was held.
struct Held {
    inode: u64,
    offset: usize,
    data: Vec<u8>,
    reply: ReplyWrite,
}

#[derive(Default)]
struct Disk {
    names: BTreeMap<OsString, u64>,
    /// Contents by inode; those without a name stay.
    files: BTreeMap<u64, (Vec<u8>, SystemTime)>,
    holds_next: bool,
    held: Option<Held>,
    /// What is asked to be on the disk for good does not get there.
    directories_fail: bool,
    files_fail: bool,
}

impl Disk {
    fn make(&mut self, name: &OsStr) -> u64 {
        let inode = self.files.keys().next_back().unwrap_or(&INodeNo::ROOT.0) + 1;
        self.files.insert(inode, (Vec::new(), SystemTime::now()));
        self.names.insert(name.to_owned(), inode);
        inode
    }

    fn store(&mut self, inode: u64, offset: usize, data: &[u8]) -> bool {
        let Some((bytes, changed)) = self.files.get_mut(&inode) else {
            return false;
        };
        let end = offset + data.len();
        bytes.resize(bytes.len().max(end), 0);
        bytes[offset..end].copy_from_slice(data);
        *changed = SystemTime::now();
        true
    }

    fn land(&mut self) {
        if let Some(Held {
            inode,
            offset,
            data,
            reply,
        }) = self.held.take()
        {
            if self.store(inode, offset, &data) {
                reply.written(data.len() as u32);
            } else {
                reply.error(Errno::EIO);
            }
        }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let root = inode == INodeNo::ROOT;
        let file = self.files.get(&inode.0);
        if !root && file.is_none() {
            return None;
        }
        let changed = file.map_or(SystemTime::UNIX_EPOCH, |(_, changed)| *changed);
        let size = file.map_or(0, |(bytes, _)| bytes.len() as u64);
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: changed,
            mtime: changed,
            ctime: changed,
            crtime: SystemTime::UNIX_EPOCH,
            kind: if root {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if root { 0o777 } else { 0o666 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

/// A mounted late disk. Dropping it lets everything through and unmounts it.
pub struct LateDisk {
    disk: Arc<Mutex<Disk>>,
    mount: Option<BackgroundSession>,
    folder: tempfile::TempDir,
}

impl LateDisk {
    /// Mounts an empty one.
    ///
    /// # Errors
    /// This machine has no FUSE for us; the caller reports that as the reason of a skipped test.
    pub fn mount() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("vmgmt-late-disk").tempdir()?;
        let disk = Arc::default();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("late-disk".into())];
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

    fn disk(&self) -> MutexGuard<'_, Disk> {
        lock(&self.disk)
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The next write waits, alone.
    pub fn hold_next_write(&self) {
        self.disk().holds_next = true;
    }

    /// From now on no name can be made durable (`true`), or each can: `fsync` of the directory fails.
    pub fn fail_directory_syncs(&self, fail: bool) {
        self.disk().directories_fail = fail;
    }

    /// From now on no file's bytes can be made durable (`true`), or each file's can: `fsync` fails.
    pub fn fail_file_syncs(&self, fail: bool) {
        self.disk().files_fail = fail;
    }

    /// Waits until it has come.
    ///
    /// # Errors
    /// It did not in time.
    pub fn wait_for_write(&self, patience: Duration) -> Result<()> {
        wait_until("a write that the disk holds", patience, || {
            Ok(self.disk().held.is_some().then_some(()))
        })
    }

    /// It lands.
    pub fn release(&self) {
        let mut disk = self.disk();
        disk.holds_next = false;
        disk.land();
    }

    /// What a file holds.
    #[must_use]
    pub fn contents(&self, name: &str) -> Option<Vec<u8>> {
        let disk = self.disk();
        let inode = disk.names.get(OsStr::new(name))?;
        disk.files.get(inode).map(|(bytes, _)| bytes.clone())
    }

    /// All names.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let disk = self.disk();
        disk.names
            .keys()
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    }
}

impl Drop for LateDisk {
    fn drop(&mut self) {
        self.release();
        if let Some(mount) = self.mount.take() {
            // What still has it open keeps it until then; the mount point goes now.
            let _unmounted = mount.umount_and_join();
        }
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file system: one folder.
struct Root(Arc<Mutex<Disk>>);

impl Filesystem for Root {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let disk = lock(&self.0);
        match disk
            .names
            .get(name)
            .and_then(|inode| disk.attributes(INodeNo(*inode)))
        {
            Some(attributes) => reply.entry(&NOTHING_LASTS, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match lock(&self.0).attributes(inode) {
            Some(attributes) => reply.attr(&NOTHING_LASTS, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut disk = lock(&self.0);
        if let (Some(size), Some((bytes, _))) = (size, disk.files.get_mut(&inode.0)) {
            bytes.resize(usize::try_from(size).unwrap_or(usize::MAX), 0);
        }
        match disk.attributes(inode) {
            Some(attributes) => reply.attr(&NOTHING_LASTS, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let mut disk = lock(&self.0);
        let there = disk.names.get(name).copied();
        if there.is_some() && flags & libc::O_EXCL != 0 {
            return reply.error(Errno::EEXIST);
        }
        let inode = there.unwrap_or_else(|| disk.make(name));
        match disk.attributes(INodeNo(inode)) {
            Some(attributes) => {
                reply.created(&NOTHING_LASTS, &attributes, Generation(0), FileHandle(0), OPENED)
            }
            None => reply.error(Errno::EIO),
        }
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), OPENED);
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
        let disk = lock(&self.0);
        let Some((bytes, _)) = disk.files.get(&inode.0) else {
            return reply.error(Errno::EIO);
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = start.saturating_add(size as usize).min(bytes.len());
        reply.data(&bytes[start..end]);
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
        let mut disk = lock(&self.0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if std::mem::take(&mut disk.holds_next) {
            disk.held = Some(Held {
                inode: inode.0,
                offset,
                data: data.to_vec(),
                reply,
            });
        } else if disk.store(inode.0, offset, data) {
            reply.written(data.len() as u32);
        } else {
            reply.error(Errno::EIO);
        }
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut disk = lock(&self.0);
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && disk.names.contains_key(new_name) {
            return reply.error(Errno::EEXIST);
        }
        match disk.names.remove(name) {
            Some(inode) => {
                disk.names.insert(new_name.to_owned(), inode);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match lock(&self.0).names.remove(name) {
            Some(_) => reply.ok(),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn fsync(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        if lock(&self.0).files_fail {
            reply.error(Errno::EIO);
        } else {
            reply.ok();
        }
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        if lock(&self.0).directories_fail {
            reply.error(Errno::EIO);
        } else {
            reply.ok();
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let disk = lock(&self.0);
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, (name, inode)) in disk.names.iter().enumerate().skip(skip) {
            if reply.add(INodeNo(*inode), place as u64 + 1, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }
}
