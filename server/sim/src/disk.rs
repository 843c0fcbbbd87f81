//! GARDEN, the disk: shares in memory, with inodes, that outlive every core. What takes time ends later, in virtual time.
//!
//! In: work of cores. Out: its results, at their time. A dead core's work may still land (a worker in disk sleep), or never. Must never know
//! who asked for what.

use crate::reach::Lease;
use std::collections::BTreeMap;
use std::rc::Rc;
use vmgmt_abi::Status;
use vmgmt_abi::file::{existing, kind};
use vmgmt_core::effect::{Effect, FailedAt, Identity, Outcome, StatRecord, entry_bytes};

/// How temporary names begin.
pub const TEMPORARY_PREFIX: &str = ".vmgmt-put-";

/// Something with a name.
#[derive(Clone, Debug)]
pub enum Inode {
    File(Vec<u8>),
    Directory,
}

/// Work of a worker.
#[derive(Debug)]
pub enum Work {
    /// On names, or on an open file.
    Effect { effect: Effect, inode: Option<u64> },
    /// Part of a file into scratch.
    ReadPiece { inode: u64, offset: u64, bytes: u64 },
    /// Guest memory into a file. `skip` bytes of the lease come first.
    WritePiece {
        inode: u64,
        offset: u64,
        lease: Rc<Lease>,
        skip: u64,
        bytes: u64,
        checksum: bool,
    },
    /// Private bytes into a file.
    WriteData {
        inode: u64,
        offset: u64,
        data: Vec<u8>,
        checksum: bool,
    },
}

/// What came of it.
#[derive(Debug)]
pub enum Done {
    Outcome(Outcome),
    Opened {
        inode: u64,
        stat: StatRecord,
        identity: Identity,
    },
    Scratch(Vec<u8>),
    Stored {
        bytes: u64,
        crc32: Option<u32>,
    },
    Revoked,
}

/// All shares.
#[derive(Debug, Default)]
pub struct Disk {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<(String, String), u64>,
    /// Names that Commit gave: what must be whole.
    pub committed: Vec<Named>,
}

/// A file at the instant it got its name. The name may be another file's, or nobody's, by the time anybody looks: several works end at one
/// instant.
#[derive(Clone, Debug)]
pub struct Named {
    pub share: String,
    pub path: String,
    pub inode: u64,
    pub contents: Vec<u8>,
}

impl Disk {
    /// The bytes of a file as they are now, whatever its name is.
    #[must_use]
    pub fn contents(&self, inode: u64) -> Option<&Vec<u8>> {
        match self.inodes.get(&inode)? {
            Inode::File(bytes) => Some(bytes),
            Inode::Directory => None,
        }
    }

    /// All names of files and directories with their bytes.
    pub fn files(&self) -> impl Iterator<Item = (&(String, String), &Vec<u8>)> {
        self.names
            .iter()
            .filter_map(|(name, inode)| Some((name, self.contents(*inode)?)))
    }

    /// Does work now. `error`: it fails with this instead (a worker met a full or a broken disk).
    pub fn perform(&mut self, work: &Work, error: Option<Status>) -> Done {
        if let Some(status) = error {
            return Done::Outcome(failed(status));
        }
        match work {
            Work::Effect { effect, inode } => self.effect(effect, *inode),
            Work::ReadPiece { inode, offset, bytes } => {
                let contents = self.contents(*inode).map_or(&[][..], Vec::as_slice);
                let start = contents.len().min(*offset as usize);
                let end = contents.len().min((*offset + *bytes) as usize);
                Done::Scratch(contents[start..end].to_vec())
            }
            Work::WritePiece {
                inode,
                offset,
                lease,
                skip,
                bytes,
                checksum,
            } => {
                if lease.revoked.get() {
                    return Done::Revoked;
                }
                let mut data = Vec::new();
                for (ram, at, length) in &lease.parts {
                    let start = data.len();
                    data.resize(start + *length as usize, 0);
                    ram.read(*at, &mut data[start..]);
                }
                let data = data[*skip as usize..(*skip + *bytes) as usize].to_vec();
                self.store(*inode, *offset, &data, *checksum)
            }
            Work::WriteData {
                inode,
                offset,
                data,
                checksum,
            } => self.store(*inode, *offset, data, *checksum),
        }
    }

    /// A worker was killed in the middle: the first half of what it wrote is there. (Anything else is done or not.)
    pub fn perform_half(&mut self, work: &Work) {
        if let Work::WriteData {
            inode, offset, data, ..
        } = work
        {
            self.store(*inode, *offset, &data[..data.len() / 2], false);
        } else if let Work::WritePiece {
            inode,
            offset,
            lease,
            skip,
            bytes,
            ..
        } = work
        {
            let piece = Work::WritePiece {
                inode: *inode,
                offset: *offset,
                lease: Rc::clone(lease),
                skip: *skip,
                bytes: *bytes / 2,
                checksum: false,
            };
            self.perform(&piece, None);
        }
    }

    fn store(&mut self, inode: u64, offset: u64, data: &[u8], checksum: bool) -> Done {
        let Some(Inode::File(bytes)) = self.inodes.get_mut(&inode) else {
            return Done::Outcome(failed(Status::IO_ERROR));
        };
        let (start, end) = (offset as usize, offset as usize + data.len());
        bytes.resize(bytes.len().max(end), 0);
        bytes[start..end].copy_from_slice(data);
        Done::Stored {
            bytes: data.len() as u64,
            crc32: checksum.then(|| crc32fast::hash(&bytes[start..end])),
        }
    }

    fn effect(&mut self, effect: &Effect, inode: Option<u64>) -> Done {
        match self.try_effect(effect, inode) {
            Ok(done) => done,
            Err(status) => Done::Outcome(failed(status)),
        }
    }

    fn try_effect(&mut self, effect: &Effect, inode: Option<u64>) -> Result<Done, Status> {
        let key = |share: &String, path: &String| (share.clone(), path.clone());
        let done = match effect {
            Effect::Open {
                share,
                path,
                create,
                exclusive,
                truncate,
                write,
                ..
            } => {
                let name = key(share, path);
                let inode = match self.names.get(&name) {
                    Some(_) if *create && *exclusive => return Err(Status::EXISTS),
                    Some(inode) => *inode,
                    None if !create => return Err(Status::NO_SUCH_NAME),
                    None => self.make(&name, Inode::File(Vec::new()))?,
                };
                match self.inodes.get_mut(&inode) {
                    Some(Inode::File(bytes)) if *truncate && *write => bytes.clear(),
                    Some(Inode::File(_)) => {}
                    _ => return Err(Status::NOT_A_FILE),
                }
                return self.opened(inode);
            }
            Effect::CreateTemporary {
                share,
                target,
                temporary,
                resume,
                ..
            } => {
                if let Some(Inode::Directory) = self
                    .names
                    .get(&key(share, target))
                    .and_then(|inode| self.inodes.get(inode))
                {
                    return Err(Status::IS_A_DIRECTORY);
                }
                let name = key(share, temporary);
                if let Some(inode) = self.names.get(&name).copied().filter(|_| *resume) {
                    return self.opened(inode);
                }
                self.names.remove(&name);
                let inode = self.make(&name, Inode::File(Vec::new()))?;
                return self.opened(inode);
            }
            Effect::Reopen {
                share,
                path,
                put,
                identity,
                ..
            } => {
                let named = put
                    .as_ref()
                    .and_then(|(target, policy)| self.name_of(&key(share, target), *policy, *identity));
                if !self.is_at(&key(share, path), *identity) && named.is_none() {
                    return Err(Status::STALE);
                }
                return self.opened(identity.inode);
            }
            Effect::Commit {
                share,
                temporary,
                target,
                existing,
                bytes,
                again,
                ..
            } => {
                let inode = inode.ok_or(Status::STALE)?;
                let (from, to) = (key(share, temporary), key(share, target));
                if self.names.get(&from) != Some(&inode) {
                    // An earlier core life gave it its name.
                    return match self.name_of(&to, *existing, self.identity(inode)) {
                        Some(path) => Ok(Done::Outcome(Outcome::Committed { path })),
                        None if *again => Err(Status::OUTCOME_UNKNOWN),
                        None => Err(Status::STALE),
                    };
                }
                if let Some(Inode::File(contents)) = self.inodes.get_mut(&inode) {
                    contents.resize(*bytes as usize, 0);
                }
                let path = self.give_name(&from, &to, *existing)?;
                self.committed.push(Named {
                    share: share.clone(),
                    path: path.clone(),
                    inode,
                    contents: self.contents(inode).cloned().unwrap_or_default(),
                });
                Outcome::Committed { path }
            }
            Effect::Rename {
                share,
                source,
                target,
                existing,
                intended,
                ..
            } => {
                let (from, to) = (key(share, source), key(share, target));
                let done = intended.and_then(|identity| self.name_of(&to, *existing, identity));
                let path = match (done, intended) {
                    (Some(path), _) => path,
                    (None, Some(identity)) if !self.is_at(&from, *identity) => {
                        return Err(Status::OUTCOME_UNKNOWN);
                    }
                    (None, _) => self.give_name(&from, &to, *existing)?,
                };
                Outcome::Committed { path }
            }
            Effect::Identify { share, path } => {
                let inode = self.names.get(&key(share, path)).ok_or(Status::NO_SUCH_NAME)?;
                Outcome::Identified(self.identity(*inode))
            }
            Effect::PrepareDirectory {
                share,
                path,
                temporary,
            } => {
                if self.names.contains_key(&key(share, path)) {
                    return Err(Status::EXISTS);
                }
                let inode = self.make(&key(share, temporary), Inode::Directory)?;
                Outcome::Identified(self.identity(inode))
            }
            Effect::Discard { share, temporary, .. } => {
                self.names.remove(&key(share, temporary));
                Outcome::Done
            }
            Effect::Remove {
                share,
                path,
                intended,
            } => {
                let name = key(share, path);
                if intended.is_some_and(|identity| !self.is_at(&name, identity)) {
                    return Ok(Done::Outcome(Outcome::Done));
                }
                let inode = self.names.get(&name).ok_or(Status::NO_SUCH_NAME)?;
                if matches!(self.inodes.get(inode), Some(Inode::Directory)) && self.has_children(&name) {
                    return Err(Status::NOT_EMPTY);
                }
                self.names.remove(&name);
                Outcome::Done
            }
            Effect::MakeDirectory {
                share,
                path,
                temporary,
                intended,
            } => {
                let (from, to) = (key(share, temporary), key(share, path));
                if intended.is_some_and(|identity| self.is_at(&to, identity)) {
                    return Ok(Done::Outcome(Outcome::Done));
                }
                if self.names.contains_key(&to) {
                    self.names.remove(&from);
                    return Err(Status::EXISTS);
                }
                match self.names.remove(&from) {
                    Some(inode) => self.names.insert(to, inode),
                    None if intended.is_some() => return Err(Status::OUTCOME_UNKNOWN),
                    None => return Err(Status::NO_SUCH_NAME),
                };
                Outcome::Done
            }
            Effect::Stat { share, path } => {
                if path.is_empty() {
                    return Ok(Done::Outcome(Outcome::Stat(stat(&Inode::Directory))));
                }
                let inode = self.names.get(&key(share, path)).ok_or(Status::NO_SUCH_NAME)?;
                Outcome::Stat(self.inodes.get(inode).map(stat).unwrap_or_default())
            }
            Effect::List {
                share,
                path,
                cursor,
                bytes_max,
            } => self.list(share, path, *cursor, *bytes_max)?,
            Effect::BytesLeft { shares } => Outcome::BytesLeft(vec![u64::MAX; shares.len()]),
            // Nothing here is ever a day old.
            Effect::Sweep { .. } => Outcome::Done,
            Effect::Checksum { offset, bytes, .. } => {
                let contents = inode
                    .and_then(|inode| self.contents(inode))
                    .ok_or(Status::STALE)?;
                let start = contents.len().min(*offset as usize);
                let end = contents.len().min(offset.saturating_add(*bytes) as usize);
                Outcome::Checksum {
                    bytes: (end - start) as u64,
                    crc32: crc32fast::hash(&contents[start..end]),
                }
            }
            Effect::Truncate { bytes, .. } => match inode.and_then(|inode| self.inodes.get_mut(&inode)) {
                Some(Inode::File(contents)) => {
                    contents.resize(*bytes as usize, 0);
                    Outcome::Done
                }
                _ => return Err(Status::STALE),
            },
            Effect::Sync { .. } | Effect::Close { .. } => Outcome::Done,
            Effect::Copy { .. } | Effect::Fetch { .. } | Effect::Read { .. } | Effect::Write { .. } => {
                return Err(Status::NOT_SUPPORTED);
            }
        };
        Ok(Done::Outcome(done))
    }

    fn identity(&self, inode: u64) -> Identity {
        Identity {
            device: 1,
            inode,
            // No number is used twice here.
            born_ns: 1,
        }
    }

    fn is_at(&self, name: &(String, String), identity: Identity) -> bool {
        self.names
            .get(name)
            .is_some_and(|inode| self.identity(*inode) == identity)
    }

    /// The name that a file got under a policy for an existing target, if it has one of those.
    fn name_of(&self, target: &(String, String), policy: u64, identity: Identity) -> Option<String> {
        let numbers = if policy == existing::RENAME { 1000 } else { 1 };
        (0..numbers)
            .map(|number| (target.0.clone(), numbered(&target.1, number)))
            .find(|name| self.is_at(name, identity))
            .map(|(_, path)| path)
    }

    fn opened(&self, inode: u64) -> Result<Done, Status> {
        let stat = self.inodes.get(&inode).map(stat).ok_or(Status::STALE)?;
        let identity = self.identity(inode);
        Ok(Done::Opened {
            inode,
            stat,
            identity,
        })
    }

    fn make(&mut self, name: &(String, String), inode: Inode) -> Result<u64, Status> {
        if let Some((above, _)) = name.1.rsplit_once('/')
            && !matches!(
                self.names
                    .get(&(name.0.clone(), above.to_owned()))
                    .and_then(|inode| self.inodes.get(inode)),
                Some(Inode::Directory)
            )
        {
            return Err(Status::NO_SUCH_NAME);
        }
        let number = self.inodes.keys().next_back().map_or(1, |last| last + 1);
        self.inodes.insert(number, inode);
        self.names.insert(name.clone(), number);
        Ok(number)
    }

    fn has_children(&self, name: &(String, String)) -> bool {
        let prefix = format!("{}/", name.1);
        self.names
            .keys()
            .any(|(share, path)| *share == name.0 && path.starts_with(&prefix))
    }

    fn give_name(
        &mut self,
        from: &(String, String),
        to: &(String, String),
        policy: u64,
    ) -> Result<String, Status> {
        let inode = *self.names.get(from).ok_or(Status::NO_SUCH_NAME)?;
        if matches!(self.inodes.get(&inode), Some(Inode::Directory)) {
            return Err(Status::NOT_SUPPORTED);
        }
        let mut to = to.clone();
        if let Some(there) = self.names.get(&to) {
            match policy {
                existing::REPLACE if matches!(self.inodes.get(there), Some(Inode::Directory)) => {
                    return Err(Status::IS_A_DIRECTORY);
                }
                existing::REPLACE => {}
                existing::RENAME => {
                    let free = (1..1000)
                        .map(|number| (to.0.clone(), numbered(&to.1, number)))
                        .find(|name| !self.names.contains_key(name));
                    to = free.ok_or(Status::EXISTS)?;
                }
                _ => return Err(Status::EXISTS),
            }
        }
        self.names.remove(from);
        self.names.insert(to.clone(), inode);
        Ok(to.1)
    }

    fn list(&self, share: &str, path: &str, cursor: u64, bytes_max: u64) -> Result<Outcome, Status> {
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("{path}/")
        };
        let children = self.names.iter().filter_map(|((of, name), inode)| {
            let rest = name.strip_prefix(&prefix).filter(|_| of == share)?;
            let hidden = rest.contains('/') || rest.starts_with(TEMPORARY_PREFIX) || rest.is_empty();
            (!hidden).then(|| {
                (
                    rest.to_owned(),
                    self.inodes.get(inode).map(stat).unwrap_or_default(),
                )
            })
        });
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for (index, (name, stat)) in children.enumerate().skip(cursor as usize) {
            bytes += entry_bytes(&name) as u64;
            if bytes > bytes_max {
                if entries.is_empty() {
                    return Err(Status::TOO_LARGE);
                }
                return Ok(Outcome::Listed {
                    entries,
                    next: index as u64,
                });
            }
            entries.push((name, stat));
        }
        Ok(Outcome::Listed { entries, next: 0 })
    }
}

/// `name` → `name.1`; number 0 is the name itself.
fn numbered(name: &str, number: u32) -> String {
    if number == 0 {
        name.to_owned()
    } else {
        format!("{name}.{number}")
    }
}

fn stat(inode: &Inode) -> StatRecord {
    match inode {
        Inode::File(bytes) => StatRecord {
            size: bytes.len() as u64,
            allocated: bytes.len() as u64,
            kind: kind::FILE,
            permissions: 0o644,
            modified_ns: 1,
        },
        Inode::Directory => StatRecord {
            kind: kind::DIRECTORY,
            permissions: 0o755,
            ..StatRecord::default()
        },
    }
}

/// A failure of the disk's.
#[must_use]
pub fn failed(status: Status) -> Outcome {
    Outcome::failed(status, FailedAt::File)
}
