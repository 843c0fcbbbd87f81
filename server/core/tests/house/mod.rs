//! A house for the hub to live in: buffers, files and rings in memory, carried out as the shell does, with every promise between
//! the rooms asserted: one completion for each submission, none for a void one, journal before answer, a saved hub is the same hub.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use vmgmt_abi::file::{existing, kind};
use vmgmt_abi::{Mode, Opcode, Status};
use vmgmt_core::effect::{Identity, StatRecord, entry_bytes};
use vmgmt_core::policy::{Access, ShareGrant, VmConfig, VmLimits};
use vmgmt_core::{
    BufferRange, ControlReply, ControlRequest, Effect, EffectId, FailedAt, FileSlot, Hub, Input, Outcome,
    Output, Record, Saved,
};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Channel, Fetched, Token};

pub fn config(vm: u64, name: &str) -> VmConfig {
    let grant = |share: &str, access| ShareGrant {
        share: share.to_owned(),
        access,
    };
    VmConfig {
        vm,
        name: name.to_owned(),
        shares: vec![grant("rw", Access::ReadWrite), grant("ro", Access::ReadOnly)],
        reach: Vec::new(),
        send_to_all: false,
        limits: VmLimits::default(),
        transient: false,
    }
}

/// A submission, as a guest's program thinks of it.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    pub opcode: u16,
    pub handle: u64,
    pub offset: u64,
    pub argument: u64,
    pub flags: u16,
    pub meta: Vec<u8>,
    /// The data area.
    pub data: Vec<u8>,
    pub deadline_ns: u64,
    pub tag: u32,
    pub again: bool,
}

impl Ask {
    pub fn new(opcode: Opcode) -> Self {
        Self {
            opcode: opcode.0,
            ..Self::default()
        }
    }
    pub fn handle(self, handle: u64) -> Self {
        Self { handle, ..self }
    }
    pub fn offset(self, offset: u64) -> Self {
        Self { offset, ..self }
    }
    pub fn argument(self, argument: u64) -> Self {
        Self { argument, ..self }
    }
    pub fn flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }
    pub fn meta(self, meta: impl AsRef<[u8]>) -> Self {
        Self {
            meta: meta.as_ref().to_vec(),
            ..self
        }
    }
    pub fn data(self, data: impl AsRef<[u8]>) -> Self {
        Self {
            data: data.as_ref().to_vec(),
            ..self
        }
    }
    pub fn room(self, bytes: usize) -> Self {
        Self {
            data: vec![0; bytes],
            ..self
        }
    }
    pub fn deadline_ns(self, deadline_ns: u64) -> Self {
        Self { deadline_ns, ..self }
    }
    pub fn tag(self, tag: u32) -> Self {
        Self { tag, ..self }
    }
    pub fn again(self) -> Self {
        Self { again: true, ..self }
    }
}

#[derive(Clone, Debug, Default)]
struct OpenFile {
    share: String,
    path: String,
}

pub struct House {
    pub hub: Hub,
    pub now: Tick,
    pub files: BTreeMap<(String, String), Vec<u8>>,
    pub directories: BTreeSet<(String, String)>,
    slots: BTreeMap<u32, OpenFile>,
    next_slot: u32,
    pub buffers: BTreeMap<Token, Vec<u8>>,
    next_index: u32,
    pub open: BTreeSet<Token>,
    pub answers: BTreeMap<Token, (Answer, Vec<u8>)>,
    pub confirming: Vec<Token>,
    /// Completions that the guest saw, of those that asked to be told.
    pub published: Vec<Token>,
    pub pending: Vec<(EffectId, Effect)>,
    pub journal: Vec<Record>,
    pub replies: Vec<(u64, u64, ControlReply, bool)>,
    pub logs: Vec<(u64, String)>,
    /// Effects and confirmations wait until told.
    pub manual: bool,
    /// Tokens whose completion the guest cannot see (its buffer is not mapped).
    pub unpublished: BTreeSet<Token>,
    /// Tokens whose buffer fails.
    pub unmapped: BTreeSet<Token>,
    /// Effects fail, but those that tidy up.
    pub failing: bool,
    /// After each input the hub is packed and unpacked.
    pub repack: bool,
    /// After each input the journal is replayed on an empty hub.
    pub replay: bool,
    /// A snapshot of a while ago, with the records there were then.
    snapshot: Option<(Saved, usize)>,
    inputs: u64,
}

impl House {
    /// Three VMs: a (1), b (2), c (3), with sessions 11, 12, 13.
    pub fn new() -> Self {
        Self::with(vec![config(1, "a"), config(2, "b"), config(3, "c")])
    }

    pub fn with(configs: Vec<VmConfig>) -> Self {
        let mut house = Self {
            hub: Hub::new(1),
            now: Tick(1_000_000),
            files: BTreeMap::new(),
            directories: BTreeSet::new(),
            slots: BTreeMap::new(),
            next_slot: 0,
            buffers: BTreeMap::new(),
            next_index: 0,
            open: BTreeSet::new(),
            answers: BTreeMap::new(),
            confirming: Vec::new(),
            published: Vec::new(),
            pending: Vec::new(),
            journal: Vec::new(),
            replies: Vec::new(),
            logs: Vec::new(),
            manual: false,
            unpublished: BTreeSet::new(),
            unmapped: BTreeSet::new(),
            failing: false,
            repack: true,
            replay: true,
            snapshot: None,
            inputs: 0,
        };
        house.input(Input::WallClock {
            now_ns: 1_700_000_000_000_000_000,
        });
        for config in configs {
            let vm = config.vm;
            house.input(Input::Vm(config));
            house.input(Input::SessionOpened { session: 10 + vm, vm });
        }
        house
    }

    pub fn input(&mut self, input: Input) {
        self.hub.handle(self.now, input);
        self.outputs();
    }

    pub fn pass_ns(&mut self, ns: u64) {
        self.now = self.now.after_ns(ns);
        self.hub.handle_timeout(self.now);
        self.outputs();
    }

    fn outputs(&mut self) {
        if self.repack {
            let saved = Saved::from_bytes(&self.hub.save().to_bytes()).unwrap();
            let restored = Hub::restore(saved).unwrap();
            assert!(
                restored == self.hub,
                "a saved and restored hub differs: {}",
                difference(&restored, &self.hub)
            );
            self.hub = restored;
        }
        while let Some(output) = self.hub.poll_output() {
            match output {
                Output::Complete {
                    token,
                    answer,
                    payload,
                    confirm,
                } => {
                    assert!(
                        self.open.remove(&token),
                        "a second answer, or one nobody waits for: {token:?} {answer:?}"
                    );
                    let room = self.buffers.get(&token).map_or(0, Vec::len);
                    assert!(
                        payload.len() <= room,
                        "an answer larger than its buffer: {} > {room}",
                        payload.len()
                    );
                    self.answers.insert(token, (answer, payload));
                    if confirm {
                        self.confirming.push(token);
                    }
                }
                Output::Effect { id, effect } => self.pending.push((id, effect)),
                Output::Journal(record) => self.journal.push(record),
                Output::Control {
                    client,
                    id,
                    reply,
                    last,
                } => self.replies.push((client, id, reply, last)),
                Output::Log { vm, text } => self.logs.push((vm, text)),
            }
        }
        if self.replay {
            let replayed = Hub::replay(2, None, self.journal.iter().cloned()).unwrap();
            let (replayed, hub) = (replayed.surviving(), self.hub.surviving());
            assert!(
                replayed == hub,
                "the journal tells another story: {}",
                difference(&replayed, &hub)
            );
        }
        self.inputs += 1;
        if self.replay {
            if let Some((snapshot, records)) = &self.snapshot {
                let since = self.journal[*records..].iter().cloned();
                let replayed = Hub::replay(2, Some(snapshot.clone()), since).unwrap().surviving();
                assert!(
                    replayed == self.hub.surviving(),
                    "snapshot and journal tell another story"
                );
            }
            if self.inputs.is_multiple_of(16) {
                self.snapshot = Some((self.hub.save(), self.journal.len()));
            }
        }
        if !self.manual {
            self.settle();
        }
    }

    /// Carries out everything that waits.
    pub fn settle(&mut self) {
        while self.step(0) {}
    }

    /// One effect or confirmation; `choice` picks which.
    pub fn step(&mut self, choice: usize) -> bool {
        let count = self.pending.len() + self.confirming.len();
        if count == 0 {
            return false;
        }
        let choice = choice % count;
        let manual = std::mem::replace(&mut self.manual, true);
        if choice < self.pending.len() {
            let (effect_id, effect) = self.pending.remove(choice);
            let tidies = matches!(effect, Effect::Close { .. } | Effect::Discard { .. });
            let outcome = if self.failing && !tidies {
                failed(Status::IO_ERROR)
            } else {
                self.carry_out(&effect)
            };
            self.input(Input::Outcome {
                effect: effect_id,
                outcome,
            });
        } else {
            let token = self.confirming.remove(choice - self.pending.len());
            let published = !self.unpublished.contains(&token);
            if published {
                self.published.push(token);
            }
            self.input(Input::Published { token, published });
        }
        self.manual = manual;
        true
    }

    pub fn ask_on(&mut self, session: u64, channel: Channel, ask: Ask) -> Token {
        self.next_index += 1;
        let token = Token {
            session,
            channel,
            index: self.next_index,
            generation: 1,
        };
        let opcode = Opcode(ask.opcode);
        let port = channel == Channel::Port;
        let fetched = Fetched {
            token,
            mode: opcode.mode(),
            opcode,
            flags: ask.flags,
            tag: if ask.tag == 0 { self.next_index } else { ask.tag },
            handle: ask.handle,
            offset: ask.offset,
            argument: ask.argument,
            deadline: if ask.deadline_ns == 0 {
                Tick::NEVER
            } else {
                self.now.after_ns(ask.deadline_ns)
            },
            meta: ask.meta,
            data_bytes: ask.data.len() as u64,
            data: (port || (matches!(opcode, Opcode::SEND | Opcode::PUBLISH) && ask.data.len() <= 4096))
                .then(|| ask.data.clone()),
            again: ask.again,
        };
        self.buffers.insert(token, ask.data);
        self.open.insert(token);
        self.input(Input::Submission(Box::new(fetched)));
        token
    }

    pub fn ask(&mut self, session: u64, ask: Ask) -> Token {
        self.ask_on(session, Channel::Ring(0), ask)
    }

    /// The answer to a submission that must have ended.
    pub fn answer(&self, token: Token) -> &(Answer, Vec<u8>) {
        self.answers
            .get(&token)
            .unwrap_or_else(|| panic!("no answer to {token:?}"))
    }

    pub fn status(&self, token: Token) -> Status {
        Status(self.answer(token).0.status)
    }

    /// Asks, expects OK, gives the result.
    pub fn ok(&mut self, session: u64, ask: Ask) -> u64 {
        let what = format!("{ask:?}");
        let token = self.ask(session, ask);
        let (answer, _) = self.answer(token);
        assert_eq!(Status(answer.status), Status::OK, "{what}");
        answer.result
    }

    /// Asks, expects a refusal.
    pub fn fails(&mut self, session: u64, ask: Ask, status: Status) {
        let what = format!("{ask:?}");
        let token = self.ask(session, ask);
        assert_eq!(self.status(token), status, "{what}");
    }

    pub fn control(&mut self, client: u64, request: ControlRequest) {
        self.input(Input::Control {
            client,
            id: 1,
            request,
        });
    }

    pub fn void_session(&mut self, session: u64) {
        self.open.retain(|token| token.session != session);
        self.confirming.retain(|token| token.session != session);
        self.unmapped
            .extend(self.buffers.keys().filter(|token| token.session == session));
    }

    pub fn close_session(&mut self, session: u64) {
        self.void_session(session);
        self.input(Input::SessionClosed { session });
    }

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
            identity: Identity {
                device: 1,
                inode: u64::from(self.next_slot),
            },
        }
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
        let file = self
            .slots
            .get(&slot.index)
            .unwrap_or_else(|| panic!("slot {slot:?} is closed"));
        self.files
            .get_mut(&(file.share.clone(), file.path.clone()))
            .expect("an open file is there")
    }

    fn carry_out(&mut self, effect: &Effect) -> Outcome {
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
                    (false, true, _) => drop(self.files.insert(name.clone(), Vec::new())),
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
                ..
            } => {
                let mut target = target.clone();
                if self.files.contains_key(&key(share, &target)) {
                    match *existing {
                        existing::REFUSE => return failed(Status::EXISTS),
                        existing::RENAME => target.push_str(".1"),
                        _ => {}
                    }
                }
                let mut contents = self
                    .files
                    .remove(&key(share, temporary))
                    .expect("the temporary file is there");
                contents.resize(*bytes as usize, 0);
                self.files.insert(key(share, &target), contents);
                assert!(self.slots.remove(&slot.index).is_some());
                Outcome::Committed { path: target }
            }
            Effect::Discard {
                slot,
                share,
                temporary,
            } => {
                assert!(self.files.remove(&key(share, temporary)).is_some());
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
            Effect::MakeDirectory { share, path } => {
                if self.directories.insert(key(share, path)) {
                    Outcome::Done
                } else {
                    failed(Status::EXISTS)
                }
            }
            Effect::Remove { share, path } => match self.files.remove(&key(share, path)) {
                Some(_) => Outcome::Done,
                None => failed(Status::NO_SUCH_NAME),
            },
            Effect::Rename {
                share,
                source,
                target,
                existing,
                ..
            } => {
                if *existing == existing::REFUSE && self.files.contains_key(&key(share, target)) {
                    return failed(Status::EXISTS);
                }
                let Some(contents) = self.files.remove(&key(share, source)) else {
                    return failed(Status::NO_SUCH_NAME);
                };
                self.files.insert(key(share, target), contents);
                Outcome::Committed { path: target.clone() }
            }
            Effect::Sweep { share, .. } => {
                self.files
                    .retain(|name, _| name.0 != *share || !name.1.contains(".vmgmt-put-"));
                Outcome::Done
            }
            other => panic!("not an effect on names: {other:?}"),
        }
    }
}

/// The lines in which two values differ.
fn difference(one: &impl std::fmt::Debug, other: &impl std::fmt::Debug) -> String {
    let (one, other) = (format!("{one:#?}"), format!("{other:#?}"));
    let lines = one
        .lines()
        .zip(other.lines())
        .filter(|(one, other)| one != other)
        .take(8);
    lines
        .map(|(one, other)| format!("\n- {one}\n+ {other}"))
        .collect()
}

pub fn failed(status: Status) -> Outcome {
    Outcome::failed(status, FailedAt::File)
}

fn bad_address(at: FailedAt) -> Outcome {
    Outcome::failed(Status::BAD_ADDRESS, at)
}

pub const MODES: [Mode; 2] = [Mode::STATISTICS, Mode::CALCULATION];
