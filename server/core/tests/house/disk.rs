//! The house's disk and buffers: effects carried out in memory.

use super::House;
use vmgmt_abi::Status;
use vmgmt_abi::file::{existing, kind};
use vmgmt_core::effect::{Identity, StatRecord, entry_bytes};
use vmgmt_core::{BufferRange, Effect, FailedAt, FileSlot, Outcome};

#[derive(Clone, Debug, Default)]
pub(super) struct OpenFile {
    share: String,
    path: String,
}

impl House {
    pub fn file(&self, share: &str, path: &str) -> Option<&Vec<u8>> {
        self.files.get(&(share.to_owned(), path.to_owned()))
    }

    pub fn slots_open(&self) -> usize {
        self.slots.len()
    }

    /// Opens a host file, as the shell does for push and pull.
    pub fn host_file(&mut self, share: &str, path: &str, contents: &[u8]) -> FileSlot {
        self.files
            .insert((share.to_owned(), path.to_owned()), contents.to_vec());
        self.slot(share, path)
    }

    fn slot(&mut self, share: &str, path: &str) -> FileSlot {
        self.next_slot += 1;
        self.slots.insert(
            self.next_slot,
            OpenFile {
                share: share.to_owned(),
                path: path.to_owned(),
            },
        );
        FileSlot {
            index: self.next_slot,
            generation: 7,
        }
    }

    fn named(&self, durable: bool, path: String) -> Outcome {
        if durable && self.undurable {
            Outcome::NotDurable { path }
        } else {
            Outcome::Committed { path }
        }
    }

    fn opened(&mut self, share: &str, path: &str) -> Outcome {
        let size = self.files[&(share.to_owned(), path.to_owned())].len() as u64;
        let slot = self.slot(share, path);
        let stat = StatRecord {
            size,
            kind: kind::FILE,
            ..StatRecord::default()
        };
        Outcome::Opened {
            slot,
            stat,
            identity: self.identity(share, path),
        }
    }

    fn identity(&mut self, share: &str, path: &str) -> Identity {
        let inode = self
            .inodes
            .entry((share.to_owned(), path.to_owned()))
            .or_insert_with(|| {
                self.next_inode += 1;
                self.next_inode
            });
        Identity {
            device: 1,
            inode: *inode,
            born_ns: 0,
        }
    }

    /// Which file or directory a name is, if it is there.
    fn identity_of(&mut self, share: &str, path: &str) -> Option<Identity> {
        let name = (share.to_owned(), path.to_owned());
        if let Some(inode) = self.directories.get(&name) {
            return Some(Identity {
                device: 1,
                inode: *inode,
                born_ns: 0,
            });
        }
        self.files.contains_key(&name).then(|| self.identity(share, path))
    }

    fn make_directory(&mut self, share: &str, path: &str) -> Identity {
        self.next_inode += 1;
        let inode = self.next_inode;
        self.directories
            .insert((share.to_owned(), path.to_owned()), inode);
        Identity {
            device: 1,
            inode,
            born_ns: 0,
        }
    }

    /// Moves a file or directory.
    fn move_name(&mut self, share: &str, from: &str, to: &str) {
        let (from, to) = (
            (share.to_owned(), from.to_owned()),
            (share.to_owned(), to.to_owned()),
        );
        for slot in self.slots.values_mut() {
            if (&slot.share, &slot.path) == (&from.0, &from.1) {
                slot.path.clone_from(&to.1);
            }
        }
        match self.directories.remove(&from) {
            Some(inode) => drop(self.directories.insert(to, inode)),
            None => {
                let contents = self.files.remove(&from).expect("the file is there");
                self.files.insert(to.clone(), contents);
                self.inodes.remove(&to);
                let inode = self.inodes.remove(&from).expect("somebody knows the file");
                self.inodes.insert(to, inode);
            }
        }
    }

    fn remove_name(&mut self, share: &str, path: &str) -> bool {
        let name = (share.to_owned(), path.to_owned());
        for (index, slot) in &mut self.slots {
            if (&slot.share, &slot.path) == (&name.0, &name.1)
                && let Some(contents) = self.files.get(&name)
            {
                self.orphans.insert(*index, contents.clone());
                slot.path.clear();
            }
        }
        self.inodes.remove(&name);
        self.directories.remove(&name).is_some() || self.files.remove(&name).is_some()
    }

    fn bytes(&self, range: &BufferRange) -> Option<Vec<u8>> {
        if self.unmapped.contains(&range.token) {
            return None;
        }
        let start = range.offset as usize;
        Some(self.buffers[&range.token][start..start + range.bytes as usize].to_vec())
    }

    fn fill(&mut self, range: &BufferRange, bytes: &[u8]) -> bool {
        if self.unmapped.contains(&range.token) {
            return false;
        }
        assert!(
            self.open.contains(&range.token),
            "a buffer was written after its submission had ended"
        );
        let start = range.offset as usize;
        self.buffers.get_mut(&range.token).unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
        true
    }

    fn contents(&mut self, slot: &FileSlot) -> &mut Vec<u8> {
        if self.orphans.contains_key(&slot.index) {
            return self.orphans.get_mut(&slot.index).unwrap();
        }
        let file = self
            .slots
            .get(&slot.index)
            .unwrap_or_else(|| panic!("slot {slot:?} is closed"));
        self.files
            .get_mut(&(file.share.clone(), file.path.clone()))
            .expect("an open file is there")
    }

    /// Somebody does it of whom the hub does not hear.
    pub fn perform(&mut self, effect: &Effect) {
        self.carry_out(effect);
    }

    pub(super) fn carry_out(&mut self, effect: &Effect) -> Outcome {
        match effect {
            Effect::Copy { from, into } => {
                assert_eq!(from.bytes, into.bytes);
                assert!(from.bytes > 0);
                let Some(bytes) = self.bytes(from) else {
                    return bad_address(FailedAt::From);
                };
                if self.fill(into, &bytes) {
                    Outcome::Bytes(from.bytes)
                } else {
                    bad_address(FailedAt::Into)
                }
            }
            Effect::Fetch { from } => self
                .bytes(from)
                .map_or(bad_address(FailedAt::From), Outcome::Data),
            Effect::Read { slot, offset, into } => {
                let contents = self.contents(slot).clone();
                let start = (*offset as usize).min(contents.len());
                let end = (start + into.bytes as usize).min(contents.len());
                if self.fill(into, &contents[start..end]) {
                    Outcome::Bytes((end - start) as u64)
                } else {
                    bad_address(FailedAt::From)
                }
            }
            Effect::Write {
                slot,
                offset,
                from,
                checksum,
            } => {
                let Some(bytes) = self.bytes(from) else {
                    return bad_address(FailedAt::From);
                };
                let contents = self.contents(slot);
                let (start, end) = (*offset as usize, *offset as usize + bytes.len());
                contents.resize(contents.len().max(end), 0);
                contents[start..end].copy_from_slice(&bytes);
                Outcome::Written {
                    bytes: from.bytes,
                    crc32: checksum.then(|| crc32fast::hash(&bytes)),
                }
            }
            Effect::Checksum { slot, offset, bytes } => {
                let contents = self.contents(slot);
                let start = (*offset as usize).min(contents.len());
                let end = (start + *bytes as usize).min(contents.len());
                Outcome::Checksum {
                    bytes: (end - start) as u64,
                    crc32: crc32fast::hash(&contents[start..end]),
                }
            }
            Effect::Truncate { slot, bytes } => {
                self.contents(slot).resize(*bytes as usize, 0);
                Outcome::Done
            }
            Effect::Sync { slot } => {
                self.contents(slot);
                Outcome::Done
            }
            Effect::Close { slot } => {
                assert!(self.slots.remove(&slot.index).is_some(), "closed twice");
                Outcome::Done
            }
            _ => self.carry_out_name(effect),
        }
    }

    fn carry_out_name(&mut self, effect: &Effect) -> Outcome {
        let key = |share: &String, path: &String| (share.clone(), path.clone());
        match effect {
            Effect::Open {
                share,
                path,
                create,
                exclusive,
                truncate,
                ..
            } => {
                let name = key(share, path);
                match (self.files.contains_key(&name), create, exclusive) {
                    (true, _, true) => return failed(Status::EXISTS),
                    (false, false, _) => return failed(Status::NO_SUCH_NAME),
                    (false, true, _) => {
                        self.inodes.remove(&name);
                        self.files.insert(name.clone(), Vec::new());
                    }
                    _ => {}
                }
                if *truncate {
                    self.files.insert(name, Vec::new());
                }
                self.opened(share, path)
            }
            Effect::CreateTemporary {
                share,
                temporary,
                resume,
                ..
            } => {
                let name = key(share, temporary);
                if !*resume || !self.files.contains_key(&name) {
                    self.remove_name(share, temporary);
                    self.files.insert(name, Vec::new());
                }
                self.opened(share, temporary)
            }
            Effect::Commit {
                slot,
                share,
                temporary,
                target,
                existing,
                bytes,
                durable,
                ..
            } => {
                let open = self.slots[&slot.index].path.clone();
                if open != *temporary {
                    self.slots.remove(&slot.index);
                    return self.named(*durable, open);
                }
                let mut target = target.clone();
                if self.files.contains_key(&key(share, &target)) {
                    match *existing {
                        existing::REFUSE => return failed(Status::EXISTS),
                        existing::RENAME => target.push_str(".1"),
                        _ => {}
                    }
                }
                self.contents(slot).resize(*bytes as usize, 0);
                self.remove_name(share, &target);
                self.move_name(share, temporary, &target);
                assert!(self.slots.remove(&slot.index).is_some());
                self.named(*durable, target)
            }
            Effect::Reopen {
                share,
                path,
                put,
                identity,
                ..
            } => {
                let targets = put
                    .iter()
                    .flat_map(|(target, _)| [target.clone(), format!("{target}.1")]);
                for path in [path.clone()].into_iter().chain(targets) {
                    if self.identity_of(share, &path) == Some(*identity) {
                        return self.opened(share, &path);
                    }
                }
                failed(Status::STALE)
            }
            Effect::Discard {
                slot,
                share,
                temporary,
            } => {
                assert!(self.remove_name(share, temporary) || self.crashes > 0);
                assert!(self.slots.remove(&slot.index).is_some());
                Outcome::Done
            }
            Effect::Stat { share, path } => match self.files.get(&key(share, path)) {
                Some(contents) => Outcome::Stat(StatRecord {
                    size: contents.len() as u64,
                    kind: kind::FILE,
                    ..StatRecord::default()
                }),
                None => failed(Status::NO_SUCH_NAME),
            },
            Effect::BytesLeft { shares } => Outcome::BytesLeft(shares.iter().map(|_| u64::MAX).collect()),
            Effect::List {
                share,
                cursor,
                bytes_max,
                ..
            } => {
                let names: Vec<_> = self
                    .files
                    .keys()
                    .filter(|name| name.0 == *share && !name.1.contains(".vmgmt-put-"))
                    .collect();
                let (mut entries, mut bytes) = (Vec::new(), 0);
                for (index, name) in names.iter().enumerate().skip(*cursor as usize) {
                    bytes += entry_bytes(&name.1) as u64;
                    if bytes > *bytes_max {
                        return Outcome::Listed {
                            entries,
                            next: index as u64,
                        };
                    }
                    entries.push((name.1.clone(), StatRecord::default()));
                }
                Outcome::Listed { entries, next: 0 }
            }
            Effect::Identify { share, path } => match self.identity_of(share, path) {
                Some(identity) => Outcome::Identified(identity),
                None => failed(Status::NO_SUCH_NAME),
            },
            Effect::PrepareDirectory {
                share,
                path,
                temporary,
            } => {
                if self.identity_of(share, path).is_some() {
                    return failed(Status::EXISTS);
                }
                Outcome::Identified(self.make_directory(share, temporary))
            }
            Effect::MakeDirectory {
                share,
                path,
                temporary,
                intended,
            } => {
                if intended.is_some() && self.identity_of(share, path) == *intended {
                    return Outcome::Done;
                }
                if self.identity_of(share, path).is_some() {
                    self.remove_name(share, temporary);
                    return failed(Status::EXISTS);
                }
                self.move_name(share, temporary, path);
                Outcome::Done
            }
            Effect::Remove {
                share,
                path,
                intended,
            } => {
                if intended.is_some() && self.identity_of(share, path) != *intended {
                    return Outcome::Done;
                }
                if self.remove_name(share, path) {
                    Outcome::Done
                } else {
                    failed(Status::NO_SUCH_NAME)
                }
            }
            Effect::Rename {
                share,
                source,
                target,
                existing,
                intended,
                durable,
                ..
            } => {
                if intended.is_some() && self.identity_of(share, target) == *intended {
                    return self.named(*durable, target.clone());
                }
                if self.identity_of(share, source).is_none() {
                    return failed(if intended.is_some() {
                        Status::OUTCOME_UNKNOWN
                    } else {
                        Status::NO_SUCH_NAME
                    });
                }
                if source == target && *existing != existing::REFUSE {
                    return self.named(*durable, target.clone());
                }
                if *existing == existing::REFUSE && self.identity_of(share, target).is_some() {
                    return failed(Status::EXISTS);
                }
                self.remove_name(share, target);
                self.move_name(share, source, target);
                self.named(*durable, target.clone())
            }
            Effect::Sweep {
                share,
                keep,
                adoption,
                ..
            } => {
                let files = self.files.keys().map(|name| (name, self.inodes.get(name)));
                let all = files.chain(self.directories.iter().map(|(name, inode)| (name, Some(inode))));
                let goes = |name: &(String, String), inode: Option<&u64>| {
                    let of_before = inode.is_some_and(|inode| *inode <= self.life_inode);
                    name.0 == *share
                        && name.1.contains(".vmgmt-put-")
                        && !keep.contains(&name.1)
                        && (!*adoption || (name.1.ends_with("-once") && of_before))
                };
                let names: Vec<_> = all.filter(|(name, inode)| goes(name, *inode)).collect();
                for name in names
                    .into_iter()
                    .map(|(name, _)| name.clone())
                    .collect::<Vec<_>>()
                {
                    self.remove_name(&name.0, &name.1);
                }
                Outcome::Done
            }
            other => panic!("not an effect on names: {other:?}"),
        }
    }
}

pub fn failed(status: Status) -> Outcome {
    Outcome::failed(status, FailedAt::File)
}

fn bad_address(at: FailedAt) -> Outcome {
    Outcome::failed(Status::BAD_ADDRESS, at)
}
