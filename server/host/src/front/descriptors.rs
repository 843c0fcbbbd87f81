//! The descriptors of one session: those that wait for their message or serve as interrupts, and the memory objects.
//!
//! In: descriptors of the client's. Out: tokens and object numbers. Must never know: a message, a map.
//!
//! Every DMA map carries a fresh duplicate of the same descriptor; one per (device, inode, access mode) is kept, the others are closed at
//! once. Numbers are never used again.

use super::closer::SharedFd;
use rustix::fd::AsFd;
use rustix::fs::{
    AtFlags, FileType, OFlags, Statx, StatxFlags, fcntl_get_seals, fcntl_getfl, makedev, statx,
};
use slab::Slab;
use std::collections::BTreeMap;
use vmgmt_device::page::rights;
use vmgmt_device::registers::MapObject;
use vmgmt_wire::{DmaMap, Errno, FdSlot};

/// Tokens and the descriptors behind them.
#[derive(Debug, Default)]
pub struct Descriptors {
    pub(super) slots: Slab<SharedFd>,
}

impl Descriptors {
    pub fn insert(&mut self, fd: SharedFd) -> FdSlot {
        FdSlot(self.slots.insert(fd) as u32)
    }

    pub fn get(&self, slot: FdSlot) -> Option<&SharedFd> {
        self.slots.get(slot.0 as usize)
    }

    /// Takes a descriptor out; it is closed when the last user drops it.
    pub fn remove(&mut self, slot: FdSlot) -> Option<SharedFd> {
        self.slots.try_remove(slot.0 as usize)
    }

    pub fn clear(&mut self) {
        self.slots.clear();
    }
}

/// Whether a descriptor is the kernel's own memory (memfd, tmpfs, huge pages): only such has seals, and nobody else is asked to tell.
pub fn is_memory(fd: impl AsFd) -> bool {
    fcntl_get_seals(fd).is_ok()
}

/// Whether a file lies neither in memory nor on a device of this host, but where a server may have whoever touches it wait for ever, past any
/// signal: a file system of a user's own, of the network, or on top of another. The core must not map it; its client reads and writes it.
pub fn is_served_elsewhere(fd: impl AsFd) -> bool {
    !is_memory(&fd) && look_at(&fd).is_ok_and(|stat| is_file(&stat) && stat.stx_dev_major == 0)
}

/// What the kernel knows of a file. `fstat` would ask a file's server, and wait for it.
fn look_at(fd: impl AsFd) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    statx(fd, c"", flags, StatxFlags::BASIC_STATS).map_err(|_| Errno::EINVAL)
}

fn is_file(stat: &Statx) -> bool {
    FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile
}

/// What makes two descriptors the same memory in the same way.
type Key = (u64, u64, u64);

/// A memory object.
#[derive(Debug)]
pub struct Object {
    pub fd: SharedFd,
    pub writable: bool,
    key: Key,
}

/// The memory objects that maps name.
#[derive(Debug)]
pub struct Objects {
    objects: BTreeMap<u64, Object>,
    numbers: BTreeMap<Key, u64>,
    pub(super) next: u64,
}

/// A descriptor looked at: which object it is or would become.
#[derive(Debug)]
pub struct Interned {
    pub object: MapObject,
    /// It is not known yet: [`Objects::insert`] makes it so.
    pub is_new: bool,
    key: Key,
}

impl Objects {
    pub const fn new() -> Self {
        Self {
            objects: BTreeMap::new(),
            numbers: BTreeMap::new(),
            next: 1,
        }
    }

    /// Looks at the descriptor of a map: is it memory, is it large enough, which rights does it give?
    ///
    /// # Errors
    /// EINVAL: no regular file, or smaller than the map. EACCES: not open for reading.
    pub fn look(&self, map: &DmaMap, fd: impl AsFd) -> Result<Interned, Errno> {
        let (key, bytes) = key_of(&fd)?;
        let end = map
            .file_offset
            .checked_add(map.range.bytes())
            .ok_or(Errno::EINVAL)?;
        if bytes < end {
            return Err(Errno::EINVAL);
        }
        let (_, _, rights) = key;
        let known = self.numbers.get(&key).copied();
        let object = MapObject {
            number: known.unwrap_or(self.next),
            rights,
        };
        Ok(Interned {
            object,
            is_new: known.is_none(),
            key,
        })
    }

    /// Keeps a new object.
    pub fn insert(&mut self, interned: &Interned, fd: SharedFd) {
        let number = interned.object.number;
        self.next = self.next.max(number + 1);
        self.numbers.insert(interned.key, number);
        let writable = interned.object.rights & rights::WRITE != 0;
        self.objects.insert(
            number,
            Object {
                fd,
                writable,
                key: interned.key,
            },
        );
    }

    /// Takes an object over from another front; its key is looked up anew.
    ///
    /// # Errors
    /// It is no memory, or its number or memory is there already.
    pub fn take_over(&mut self, number: u64, fd: SharedFd) -> Result<(), &'static str> {
        let (key, _) = key_of(&fd).map_err(|_| "a memory object is no memory that can be read")?;
        let (_, _, rights) = key;
        let object = MapObject { number, rights };
        if number == 0 || self.objects.contains_key(&number) || self.numbers.contains_key(&key) {
            return Err("a memory object is there twice");
        }
        let interned = Interned {
            object,
            is_new: true,
            key,
        };
        self.insert(&interned, fd);
        Ok(())
    }

    /// Lets an object go that no map names any more.
    pub fn remove(&mut self, number: u64) {
        if let Some(object) = self.objects.remove(&number) {
            self.numbers.remove(&object.key);
        }
    }

    pub fn contains(&self, number: u64) -> bool {
        self.objects.contains_key(&number)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Object)> {
        self.objects.iter().map(|(number, object)| (*number, object))
    }

    pub fn clear(&mut self) {
        self.objects.clear();
        self.numbers.clear();
    }
}

/// What memory a descriptor is, how it is open, and its bytes.
fn key_of(fd: impl AsFd) -> Result<(Key, u64), Errno> {
    let stat = look_at(&fd)?;
    if !is_file(&stat) {
        return Err(Errno::EINVAL);
    }
    let flags = fcntl_getfl(&fd).map_err(|_| Errno::EINVAL)?;
    let rights = match flags & OFlags::RWMODE {
        OFlags::RDWR => rights::READ | rights::WRITE,
        OFlags::RDONLY => rights::READ,
        _ => return Err(Errno::EACCES),
    };
    let device = makedev(stat.stx_dev_major, stat.stx_dev_minor);
    Ok(((device, stat.stx_ino, rights), stat.stx_size))
}
