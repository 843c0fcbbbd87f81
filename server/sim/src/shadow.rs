//! GARDEN, the shadow: what each VM has sent and stored, and what therefore may and must be seen.
//!
//! In: what guests did and saw. Out: complaints. Must never know how anything is done.

mod offers;

use crate::disk::Disk;
use crate::ram::{Complaints, mark};
use std::collections::{BTreeMap, BTreeSet};

/// The operator, as a target.
pub const HOST: u64 = u64::MAX;
/// All VMs that have published themselves.
pub const ALL: u64 = u64::MAX - 1;
/// Bytes at the start of a message's body and of a file's contents.
pub const HEAD_BYTES: usize = 24;
const MESSAGE_MAGIC: u64 = 0x6567_6173_7365_4d01;
const FILE_MAGIC: u64 = 0x0065_6c69_4602;

/// How far something has come that can be known by its sender's completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Submitted, or under way.
    Open,
    /// Its completion said so.
    Done,
    /// Its completion said no.
    Refused,
    /// Its submission was cancelled by a reset, or its completion says that nobody knows.
    Unknown,
}

/// A message.
#[derive(Clone, Debug)]
struct Message {
    target: u64,
    fate: Fate,
    delivered: BTreeSet<u64>,
    /// To all: how many took it.
    takers: u64,
    /// Asked for a second time, perhaps behind newer ones: it has no place in their order.
    asked_again: bool,
}

/// A put.
#[derive(Clone, Debug)]
struct Put {
    bytes: u64,
    /// COMMIT was submitted.
    asked: bool,
    fate: Fate,
    committed: u32,
}

/// What everybody may know.
#[derive(Debug)]
pub struct Shadow {
    complaints: Complaints,
    messages: BTreeMap<(u64, u64), Message>,
    next_message: BTreeMap<u64, u64>,
    /// Newest message delivered, per source and target.
    newest: BTreeMap<(u64, u64), u64>,
    puts: BTreeMap<(u64, u64), Put>,
    next_put: BTreeMap<u64, u64>,
    commits_seen: usize,
    /// VMs whose messages and files mean nothing.
    pub hostile: BTreeSet<u64>,
    /// What came out since the core that lives now has taken over.
    life: Vec<(u64, u64, u64)>,
    /// May come again: its target was reset between the death of the core that delivered it and the next one's look.
    repeatable: BTreeSet<(u64, u64, u64)>,
    /// VMs of which that is so and that have not yet looked for the last time at what was there.
    blurring: BTreeSet<u64>,
    /// Newest message per source and target when that happened.
    blurred: BTreeMap<(u64, u64), u64>,
    /// What the host got of whom under which number.
    host_numbers: BTreeMap<(u64, u64), u64>,
    /// What the host got in the round of the core that runs, or that died in it.
    host_unsure: Vec<(u64, u64)>,
    pub offers: offers::Offers,
    pub repeats: u64,
    pub delivered: u64,
    pub completions: u64,
    pub committed: u64,
}

impl Shadow {
    pub fn new(complaints: &Complaints) -> Self {
        Self {
            complaints: complaints.clone(),
            messages: BTreeMap::new(),
            next_message: BTreeMap::new(),
            newest: BTreeMap::new(),
            puts: BTreeMap::new(),
            next_put: BTreeMap::new(),
            commits_seen: 0,
            hostile: BTreeSet::new(),
            life: Vec::new(),
            repeatable: BTreeSet::new(),
            blurring: BTreeSet::new(),
            blurred: BTreeMap::new(),
            host_numbers: BTreeMap::new(),
            host_unsure: Vec::new(),
            offers: offers::Offers::default(),
            repeats: 0,
            delivered: 0,
            completions: 0,
            committed: 0,
        }
    }

    // ---- messages

    /// A VM is about to send: the message's number, and its body.
    pub fn send(&mut self, source: u64, target: u64, bytes: usize) -> (u64, Vec<u8>) {
        let next = self.next_message.entry(source).or_default();
        *next += 1;
        let number = *next;
        let message = Message {
            target,
            fate: Fate::Open,
            delivered: BTreeSet::new(),
            takers: 0,
            asked_again: false,
        };
        self.messages.insert((source, number), message);
        (number, body(MESSAGE_MAGIC, source, number, bytes))
    }

    /// A send without an answer is asked for again, with its key.
    pub fn ask_again(&mut self, source: u64, number: u64) {
        if let Some(message) = self.messages.get_mut(&(source, number)) {
            message.asked_again = true;
        }
    }

    /// What became of a send.
    pub fn sent(&mut self, source: u64, number: u64, fate: Fate, takers: u64) {
        let Some(message) = self.messages.get_mut(&(source, number)) else {
            return;
        };
        message.fate = fate;
        message.takers = takers;
        if fate == Fate::Refused && !message.delivered.is_empty() {
            self.complaints.add(format!(
                "message {number} of VM {source} was refused, and yet delivered to {:?}",
                message.delivered
            ));
        }
    }

    /// A message came out at `target`, whole.
    pub fn deliver(&mut self, target: u64, stamped: u64, contents: &[u8]) {
        if self.hostile.contains(&stamped) {
            return;
        }
        let Some((source, number)) = read(MESSAGE_MAGIC, contents) else {
            return self.complaints.add(format!(
                "VM {target} got {} bytes from {stamped} that nobody sent: {:x?}",
                contents.len(),
                contents.get(..32.min(contents.len()))
            ));
        };
        if source != stamped {
            self.complaints.add(format!(
                "message {number} of VM {source} came to VM {target} stamped as from {stamped}"
            ));
        }
        let Some(message) = self.messages.get_mut(&(source, number)) else {
            return self.complaints.add(format!(
                "VM {target} got message {number} of VM {source}, never sent"
            ));
        };
        let meant = message.target == target || message.target == ALL && target != source;
        if !meant {
            self.complaints.add(format!(
                "VM {target} got message {number} of VM {source} to {:#x}",
                message.target
            ));
        }
        if message.fate == Fate::Refused {
            self.complaints.add(format!(
                "VM {target} got message {number} of VM {source}, which was refused"
            ));
        }
        self.life.push((target, source, number));
        let blurring = self.blurring.contains(&target);
        if !message.delivered.insert(target) {
            if self.repeatable.contains(&(target, source, number)) {
                self.repeats += 1;
                return;
            }
            self.complaints
                .add(format!("VM {target} got message {number} of VM {source} twice"));
        }
        self.delivered += 1;
        if message.asked_again {
            if blurring {
                self.repeatable.insert((target, source, number));
            }
            return;
        }
        let newest = self.newest.entry((source, target)).or_default();
        let blurred = self.blurred.get(&(source, target)).copied().unwrap_or_default();
        if number < *newest && number > blurred {
            self.complaints.add(format!(
                "VM {target} got message {number} of VM {source} after number {newest}"
            ));
        }
        *newest = number.max(*newest);
        if blurring {
            self.blurred.insert((source, target), *newest);
            self.repeatable.insert((target, source, number));
        }
    }

    /// A message is in the operator's hands, under the number that the core gave it. `unsure`: the core that gave it may not have noted that.
    pub fn tell_host(&mut self, stamped: u64, sequence: u64, contents: &[u8], unsure: bool) {
        if let Some((source, number)) = read(MESSAGE_MAGIC, contents)
            && !self.hostile.contains(&stamped)
        {
            let known = *self.host_numbers.entry((stamped, sequence)).or_insert(number);
            if known != number {
                self.complaints.add(format!(
                    "the host got message {number} of VM {source} under number {sequence}, as {known} before"
                ));
            }
            if unsure {
                self.host_unsure.push((source, number));
            }
        }
        self.deliver(HOST, stamped, contents);
    }

    /// The core is dead. `may_repeat`: in the middle of a round, so what it gave the host in it may come again.
    pub fn unsure_of_host(&mut self, may_repeat: bool) {
        for (source, number) in std::mem::take(&mut self.host_unsure) {
            if may_repeat {
                self.repeatable.insert((HOST, source, number));
            }
        }
    }

    /// A core has taken over all that the one before left in this VM's memory.
    pub fn new_life(&mut self, vm: u64) {
        self.life.retain(|(target, ..)| *target != vm);
    }

    /// A VM's device was reset (or its ring, or its process ended) and no core has seen it yet. What the dead core had delivered, and had not
    /// noted, goes back to the mailbox: nobody can tell any more whether the guest had it.
    /// `still`: the guest will look once more at what was there (until [`Shadow::sharpen`]).
    pub fn blur(&mut self, vm: u64, still: bool) {
        if still {
            self.blurring.insert(vm);
        }
        let life = self.life.iter().filter(|(target, ..)| *target == vm);
        self.repeatable.extend(life);
        for ((source, target), newest) in &self.newest {
            if *target == vm {
                self.blurred.insert((*source, *target), *newest);
            }
        }
    }

    /// What a VM takes from now on, until [`Shadow::sharpen`], may come again; not what it has taken.
    pub fn blur_what_comes(&mut self, vm: u64) {
        self.blurring.insert(vm);
    }

    /// A VM has taken all that was there before its reset (or its ring's, or its process's end): what comes now comes from a core that has seen it.
    pub fn sharpen(&mut self, vm: u64) {
        self.blurring.remove(&vm);
    }

    /// Messages that were accepted and have not come out yet.
    #[must_use]
    pub fn undelivered(&self) -> Vec<(u64, u64, u64)> {
        self.messages
            .iter()
            .filter(|(_, message)| message.fate == Fate::Done && message.target != ALL)
            .filter(|(_, message)| !message.delivered.contains(&message.target))
            .map(|((source, number), message)| (*source, *number, message.target))
            .collect()
    }

    /// Messages to all that were taken by more or fewer than the sender was told.
    #[must_use]
    pub fn unbalanced(&self) -> Option<String> {
        self.messages.iter().find_map(|((source, number), message)| {
            let delivered = message.delivered.len() as u64;
            (message.fate == Fate::Done && message.target == ALL && delivered != message.takers).then(|| {
                format!(
                    "message {number} of VM {source} to all: {} took it, {delivered} got it",
                    message.takers
                )
            })
        })
    }

    // ---- files

    /// A VM is about to put a file: the put's number.
    pub fn put(&mut self, vm: u64, bytes: u64) -> u64 {
        let next = self.next_put.entry(vm).or_default();
        *next += 1;
        let put = Put {
            bytes,
            asked: false,
            fate: Fate::Open,
            committed: 0,
        };
        self.puts.insert((vm, *next), put);
        *next
    }

    /// What a put's file is to hold.
    #[must_use]
    pub fn contents(vm: u64, put: u64, bytes: u64) -> Vec<u8> {
        body(FILE_MAGIC, vm, put, bytes as usize)
    }

    /// COMMIT is submitted.
    pub fn commit(&mut self, vm: u64, put: u64) {
        if let Some(put) = self.puts.get_mut(&(vm, put)) {
            put.asked = true;
        }
    }

    /// What became of a put.
    pub fn ended(&mut self, vm: u64, number: u64, fate: Fate) {
        let Some(put) = self.puts.get_mut(&(vm, number)) else {
            return;
        };
        put.fate = fate;
        match fate {
            Fate::Done if put.committed != 1 => self.complaints.add(format!(
                "put {number} of VM {vm} is said to be done; its file was named {} times",
                put.committed
            )),
            Fate::Refused if put.committed != 0 => self.complaints.add(format!(
                "put {number} of VM {vm} is said to have failed, and its file is there"
            )),
            _ => {}
        }
    }

    /// Looks at the files that got their names since the last look: each was whole at that instant, and is now. (Not at what has the name
    /// now: two puts of one name may end between two looks, and the second one's file would be counted twice.)
    pub fn look_at(&mut self, disk: &Disk) {
        let seen = std::mem::replace(&mut self.commits_seen, disk.committed.len());
        for named in &disk.committed[seen..] {
            if self.is_hostile(&named.share) {
                continue;
            }
            let name = format!("{}/{}", named.share, named.path);
            self.committed += 1;
            let Some((vm, number)) = self.judge(&name, &named.contents) else {
                continue;
            };
            if disk.contents(named.inode) != Some(&named.contents) {
                self.complaints.add(format!(
                    "{name}, put {number} of VM {vm}, was changed after it got its name"
                ));
            }
            let Some(put) = self.puts.get_mut(&(vm, number)) else {
                continue;
            };
            put.committed += 1;
            if !put.asked || put.committed > 1 || put.fate == Fate::Refused {
                self.complaints.add(format!(
                    "put {number} of VM {vm} got the name {name} (time {}), asked: {}, {:?}",
                    put.committed, put.asked, put.fate
                ));
            }
        }
    }

    /// A share of a hostile VM's own.
    #[must_use]
    pub fn is_hostile(&self, share: &str) -> bool {
        self.hostile.iter().any(|vm| share == format!("own{vm}"))
    }

    /// Whether bytes are one put's file, whole; whose.
    pub fn judge(&self, name: &str, contents: &[u8]) -> Option<(u64, u64)> {
        let found = read(FILE_MAGIC, contents);
        let put = found.and_then(|key| self.puts.get(&key));
        match (found, put) {
            (Some(key), Some(put)) if put.bytes == contents.len() as u64 => {
                let own = name
                    .strip_prefix("own")
                    .and_then(|rest| rest.split('/').next())
                    .and_then(|vm| vm.parse::<u64>().ok());
                if own.is_some_and(|vm| vm != key.0) {
                    self.complaints
                        .add(format!("{name} holds a file of VM {}", key.0));
                }
                Some(key)
            }
            _ => {
                self.complaints.add(format!(
                    "{name} ({} bytes) is no whole file of any put ({found:?}): {:x?}",
                    contents.len(),
                    contents.get(..32.min(contents.len()))
                ));
                None
            }
        }
    }
}

fn body(magic: u64, vm: u64, number: u64, bytes: usize) -> Vec<u8> {
    let mut body = magic.to_le_bytes().to_vec();
    body.extend(vm.to_le_bytes());
    body.extend(number.to_le_bytes());
    body.extend((HEAD_BYTES..bytes.max(HEAD_BYTES)).map(|at| filler(vm, number, at)));
    body
}

/// Each byte tells whose it is, of what, and where it stands.
fn filler(vm: u64, number: u64, at: usize) -> u8 {
    mark(vm)
        .wrapping_add((number as u8).wrapping_mul(31))
        .wrapping_add((at as u8).wrapping_mul(7) ^ (at >> 8) as u8)
}

fn read(magic: u64, contents: &[u8]) -> Option<(u64, u64)> {
    let word = |at: usize| Some(u64::from_le_bytes(contents.get(at..at + 8)?.try_into().ok()?));
    let (vm, number) = (word(8)?, word(16)?);
    let whole = contents
        .iter()
        .enumerate()
        .skip(HEAD_BYTES)
        .all(|(at, byte)| *byte == filler(vm, number, at));
    (word(0)? == magic && whole).then_some((vm, number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Done, Work};
    use vmgmt_abi::file::existing;
    use vmgmt_core::effect::{Effect, FileSlot};

    fn commit(shadow: &mut Shadow, disk: &mut Disk, vm: u64, number: u64) {
        let temporary = format!(".vmgmt-put-{vm}-{number}");
        let (share, target) = ("common".to_owned(), "f".to_owned());
        let slot = FileSlot {
            index: 0,
            generation: 0,
        };
        let create = Effect::CreateTemporary {
            share: share.clone(),
            target: target.clone(),
            temporary: temporary.clone(),
            resume: false,
            permissions: None,
        };
        let Done::Opened { inode, .. } = perform(disk, create, None) else {
            panic!("no temporary file");
        };
        disk.perform(
            &Work::WriteData {
                inode,
                offset: 0,
                data: Shadow::contents(vm, number, 100),
                checksum: false,
            },
            None,
        );
        shadow.commit(vm, number);
        let commit = Effect::Commit {
            slot,
            share,
            temporary,
            target,
            existing: existing::REPLACE,
            durable: false,
            bytes: 100,
            again: false,
        };
        perform(disk, commit, Some(inode));
    }

    fn perform(disk: &mut Disk, effect: Effect, inode: Option<u64>) -> Done {
        disk.perform(&Work::Effect { effect, inode }, None)
    }

    #[test]
    fn two_puts_that_end_at_one_instant_under_one_name_are_two_files() {
        let complaints = Complaints::default();
        let mut shadow = Shadow::new(&complaints);
        let mut disk = Disk::default();
        for vm in [1, 4] {
            let number = shadow.put(vm, 100);
            commit(&mut shadow, &mut disk, vm, number);
        }
        shadow.look_at(&disk);
        shadow.ended(1, 1, Fate::Done);
        shadow.ended(4, 1, Fate::Done);
        assert_eq!(complaints.first(), None);
        assert_eq!(shadow.committed, 2);
        // And one that gets its name a second time is still told.
        commit(&mut shadow, &mut disk, 4, 1);
        shadow.look_at(&disk);
        assert!(complaints.first().is_some());
    }
}
