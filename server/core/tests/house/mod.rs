//! A house for the hub to live in: buffers, files and rings in memory, carried out as the shell does, with every promise between
//! the rooms asserted: one completion for each submission, none for a void one, journal before answer, a saved hub is the same hub.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod ask;
mod disk;

pub use ask::Ask;
use disk::OpenFile;
pub use disk::failed;
use std::collections::{BTreeMap, BTreeSet};
use vmgmt_abi::{Mode, Opcode, Status};
use vmgmt_core::policy::{Access, ShareGrant, VmConfig, VmLimits};
use vmgmt_core::{ControlReply, ControlRequest, Effect, EffectId, Hub, Input, Output, Record, Saved};
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

pub struct House {
    pub hub: Hub,
    pub now: Tick,
    pub files: BTreeMap<(String, String), Vec<u8>>,
    pub directories: BTreeMap<(String, String), u64>,
    /// Which file a name is; moves with it.
    inodes: BTreeMap<(String, String), u64>,
    next_inode: u64,
    /// Those above were made in this life.
    life_inode: u64,
    /// Contents of open files whose name is gone, by slot.
    orphans: BTreeMap<u32, Vec<u8>>,
    /// What was asked, to be asked again after a crash.
    asks: BTreeMap<Token, Ask>,
    /// Sessions connected, with their VM. Who is taken out while no core lives is not told to the next one.
    pub connected: BTreeMap<u64, u64>,
    life: u64,
    /// The core dies after so many more outputs.
    pub dies_after: Option<usize>,
    /// How often it did.
    pub crashes: usize,
    /// How often more it dies after as many.
    pub dies_again: usize,
    dies_every: Option<usize>,
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
    /// The operators' sockets take nothing.
    pub sockets_full: bool,
    pub logs: Vec<(u64, String)>,
    /// Effects and confirmations wait until told.
    pub manual: bool,
    /// Tokens whose completion the guest cannot see (its buffer is not mapped).
    pub unpublished: BTreeSet<Token>,
    /// Tokens whose buffer fails.
    pub unmapped: BTreeSet<Token>,
    /// Effects fail, but those that tidy up.
    pub failing: bool,
    /// The disk fails when a name is to be made durable.
    pub undurable: bool,
    /// After each input the hub is packed and unpacked.
    pub repack: bool,
    /// After each input the journal is replayed on an empty hub.
    pub replay: bool,
    /// VMs for which a worker of a core that crashed still sleeps in a disk.
    pub undead: BTreeSet<u64>,
    /// What a snapshot may have: see [`House::has_room`].
    room: Option<u64>,
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
            directories: BTreeMap::new(),
            inodes: BTreeMap::new(),
            next_inode: 0,
            life_inode: 0,
            orphans: BTreeMap::new(),
            asks: BTreeMap::new(),
            connected: BTreeMap::new(),
            life: 1,
            dies_after: None,
            crashes: 0,
            dies_again: 0,
            dies_every: None,
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
            sockets_full: false,
            logs: Vec::new(),
            manual: false,
            unpublished: BTreeSet::new(),
            unmapped: BTreeSet::new(),
            failing: false,
            undurable: false,
            repack: true,
            replay: true,
            undead: BTreeSet::new(),
            room: None,
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

    /// The hub's memory has so many bytes for a snapshot: from now on every one must fit, also that of a later core.
    pub fn has_room(&mut self, bytes: u64) {
        self.room = Some(bytes);
        self.input(Input::StateRoom(bytes));
    }

    pub fn input(&mut self, input: Input) {
        match &input {
            Input::SessionOpened { session, vm } => drop(self.connected.insert(*session, *vm)),
            Input::SessionClosed { session } => drop(self.connected.remove(session)),
            _ => {}
        }
        self.hub.handle(self.now, input);
        self.outputs();
    }

    /// `kill -9`, and another core life: it has the journal, the guests' rings, and nothing else. What had no completion comes again, in the
    /// order it was asked; of completions the guest has, the ring tells.
    pub fn crash(&mut self) {
        self.crash_untold();
        let manual = std::mem::replace(&mut self.manual, true);
        self.adopt();
        self.manual = manual;
        if !self.manual {
            self.settle();
        }
    }

    /// As [`House::crash`], up to the instant in which the next core has read what survives and was told of nobody yet.
    pub fn crash_untold(&mut self) {
        self.life += 1;
        self.crashes += 1;
        let after = self.dies_after.take().and(self.dies_every);
        if let Some(left) = self.dies_again.checked_sub(1) {
            (self.dies_again, self.dies_after) = (left, after);
        }
        self.pending.clear();
        self.slots.clear();
        self.orphans.clear();
        self.life_inode = self.next_inode;
        let snapshot = self.snapshot.take();
        let (saved, since) = match snapshot {
            Some((saved, since)) => (Some(saved), since),
            None => (None, 0),
        };
        let records = self.journal[since..].iter().cloned();
        let saved = saved.map(|saved| Saved::from_bytes(&saved.to_bytes()).unwrap());
        self.hub = Hub::replay_beside(self.life, self.undead.clone(), saved, records).unwrap();
        if let Some(room) = self.room {
            self.hub.handle(self.now, Input::StateRoom(room));
        }
    }

    /// The workers that slept are gone.
    pub fn bury(&mut self) {
        self.undead.clear();
        self.input(Input::Buried);
    }

    /// What a new core life is told, until it dies itself.
    fn adopt(&mut self) {
        let life = self.life;
        self.input(Input::WallClock {
            now_ns: 1_700_000_001_000_000_000 + life,
        });
        for (session, vm) in self.connected.clone() {
            if self.life == life {
                self.input(Input::SessionOpened { session, vm });
            }
        }
        if self.life == life {
            self.input(Input::Adopted);
        }
        for token in self.confirming.clone() {
            if self.life == life {
                self.tell(token);
            }
        }
        let mut open: Vec<Token> = self.open.iter().copied().collect();
        open.sort_by_key(|token| token.index);
        for token in open {
            if self.life == life && self.open.contains(&token) {
                let fetched = self.fetched(token, true);
                self.input(Input::Submission(Box::new(fetched)));
            }
        }
    }

    /// The ring tells what became of a completion; its record stays until the hub knows.
    fn tell(&mut self, token: Token) {
        let published = !self.unpublished.contains(&token);
        if published && !self.published.contains(&token) {
            self.published.push(token);
        }
        let life = self.life;
        self.input(Input::Published { token, published });
        if self.life == life {
            self.confirming.retain(|other| *other != token);
        }
    }

    pub fn pass_ns(&mut self, ns: u64) {
        self.now = self.now.after_ns(ns);
        self.hub.handle_timeout(self.now);
        self.outputs();
    }

    /// An effect is done, and the core dies before it hears of it.
    pub fn crash_after_effect(&mut self, choice: usize) {
        if !self.pending.is_empty() {
            let (_, effect) = self.pending.remove(choice % self.pending.len());
            self.carry_out(&effect);
        }
        self.crash();
    }

    fn outputs(&mut self) {
        if self.repack {
            let saved = Saved::from_bytes(&self.hub.save().to_bytes()).unwrap();
            let mut restored = Hub::restore(saved).unwrap();
            if let Some(room) = self.room {
                restored.handle(self.now, Input::StateRoom(room));
            }
            assert!(
                restored == self.hub,
                "a saved and restored hub differs: {}",
                difference(&restored, &self.hub)
            );
            self.hub = restored;
        }
        while let Some(output) = self.hub.poll_output() {
            if self.dies_after == Some(0) {
                return self.crash();
            }
            self.dies_every = self.dies_every.or(self.dies_after);
            self.dies_after = self.dies_after.map(|left| left - 1);
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
                } => {
                    let told = matches!(reply, ControlReply::Message { .. }) && !self.sockets_full;
                    self.replies.push((client, id, reply, last));
                    if told {
                        self.hub.handle(self.now, Input::Told { client, id });
                    }
                }
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
        if self.replay || self.room.is_some() {
            let snapshot = self.hub.snapshot().to_bytes().len() as u64;
            let bound = self.hub.state_bytes();
            assert!(
                snapshot <= bound,
                "a snapshot of {snapshot} bytes, and {bound} in the books"
            );
            assert!(
                self.room.is_none_or(|room| bound <= room),
                "{bound} bytes and room for {:?}",
                self.room
            );
        }
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
            let token = self.confirming[choice - self.pending.len()];
            self.tell(token);
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
        let ask = Ask {
            tag: if ask.tag == 0 { self.next_index } else { ask.tag },
            deadline_ns: if ask.deadline_ns == 0 {
                Tick::NEVER.0
            } else {
                self.now.after_ns(ask.deadline_ns).0
            },
            ..ask
        };
        self.buffers.insert(token, ask.data.clone());
        self.asks.insert(token, ask);
        self.open.insert(token);
        let fetched = self.fetched(token, false);
        self.input(Input::Submission(Box::new(fetched)));
        token
    }

    /// A submission of before comes again, as it does after a crash.
    pub fn ask_again(&mut self, token: Token) {
        self.open.insert(token);
        let fetched = self.fetched(token, true);
        self.input(Input::Submission(Box::new(fetched)));
    }

    fn fetched(&self, token: Token, again: bool) -> Fetched {
        let ask = self.asks[&token].clone();
        let opcode = Opcode(ask.opcode);
        let port = token.channel == Channel::Port;
        Fetched {
            token,
            mode: opcode.mode(),
            opcode,
            flags: ask.flags,
            tag: ask.tag,
            handle: ask.handle,
            offset: ask.offset,
            argument: ask.argument,
            deadline: Tick(ask.deadline_ns),
            meta: ask.meta,
            data_bytes: ask.data.len() as u64,
            data: (port || (matches!(opcode, Opcode::SEND | Opcode::PUBLISH) && ask.data.len() <= 4096))
                .then(|| ask.data.clone()),
            again: again || ask.again,
        }
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

    pub fn cancel(&mut self, token: Token) {
        self.input(Input::Cancel(token));
    }

    pub fn reset_session(&mut self, session: u64) {
        self.void_session(session);
        self.input(Input::SessionReset { session });
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

pub const MODES: [Mode; 2] = [Mode::STATISTICS, Mode::CALCULATION];
