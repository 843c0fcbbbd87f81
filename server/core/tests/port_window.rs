//! A guest without a driver, the front's half of its port window, the rings and the hub: the core dies between any two of its stores and records,
//! and what is asked by I/O ports is done once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use vmgmt_abi::chat::MessageHeader;
use vmgmt_abi::file::SIZE_UNKNOWN;
use vmgmt_abi::{Completion, Mode, Opcode, Status, Submission, port};
use vmgmt_core::policy::{VmConfig, VmLimits};
use vmgmt_core::{Effect, FailedAt, Hub, Input, Outcome, Output, Record};
use vmgmt_device::Tick;
use vmgmt_device::page::{CorePage, FrontPage, PlainWords, Words};
use vmgmt_device::registers::{self, Function};
use vmgmt_device::rings::testing::{FlatGuest, FlatMemory};
use vmgmt_device::rings::{self, Channel, Fetched, Modes, Rings, STATE_WORDS, Token};
use vmgmt_wire::{Command, RegionAccess, RegionWrite, Reply, ReplyHandle};
use zerocopy::{FromBytes, IntoBytes};

/// VM 1, the one with the port window.
const A: u64 = 7;
/// VM 2.
const B: u64 = 8;
const MAPS: usize = 8;
const NOW: Tick = Tick(1_000_000);
/// (That a result's last word is not whole is an error to the window.)
const IN_USE: u32 = port::STATUS_BUSY | port::STATUS_DONE;

/// Steps until death; negative: immortal.
#[derive(Clone, Debug)]
struct Life(Rc<Cell<i64>>);

/// What a death unwinds with.
struct Death;

impl Life {
    fn step(&self) {
        let left = self.0.get();
        if left == 0 {
            resume_unwind(Box::new(Death));
        }
        self.0.set((left - 1).max(-1));
    }
    /// Who does this does not die of it.
    fn spared<T>(&self, act: impl FnOnce() -> T) -> T {
        let left = self.0.replace(-1);
        let result = act();
        self.0.set(left);
        result
    }
}

/// Words whose writer dies.
#[derive(Clone, Debug)]
struct MortalWords {
    words: PlainWords,
    life: Life,
}

impl Words for MortalWords {
    fn len(&self) -> usize {
        self.words.len()
    }
    fn load(&self, index: usize) -> u64 {
        self.words.load(index)
    }
    fn store(&self, index: usize, value: u64) {
        self.life.step();
        self.words.store(index, value);
    }
}

/// What the guest does by ports.
#[derive(Clone, Debug)]
enum Act {
    /// Commits a submission, and polls until it is done.
    Ask(Submission, Vec<u8>),
    /// Commits one, and takes it back before anybody has looked.
    AskAndAbort(Submission, Vec<u8>),
    /// Commits one, takes it back when the core has nothing left to do.
    AskAndAbortLate(Submission, Vec<u8>),
}

struct World {
    life: Life,
    front: Function<MortalWords>,
    front_page: FrontPage<MortalWords>,
    core_page: CorePage<MortalWords>,
    core_life: u64,
    state: MortalWords,
    rings: Rings<MortalWords>,
    memory: FlatMemory,
    hub: Hub,
    /// What survives of the hub.
    journal: Vec<Record>,
    accesses: u64,
    deaths: u32,
    /// So many steps after its first death the core dies once more.
    dies_again: Option<i64>,
    /// Completions and their output, in the order the guest read them.
    results: Vec<(Completion, Vec<u8>)>,
}

fn config(vm: u64, name: &str) -> VmConfig {
    VmConfig {
        vm,
        name: name.to_owned(),
        shares: Vec::new(),
        reach: Vec::new(),
        send_to_all: false,
        limits: VmLimits {
            offers_max: 1,
            ..VmLimits::default()
        },
        transient: false,
    }
}

impl World {
    fn new() -> Self {
        let life = Life(Rc::new(Cell::new(-1)));
        let words = |count| MortalWords {
            words: PlainWords::new(count),
            life: life.clone(),
        };
        let front_words = words(FrontPage::<MortalWords>::words_needed(MAPS));
        let settings = registers::Settings {
            session: A,
            vm: 1,
            pci_vendor: vmgmt_abi::PCI_VENDOR,
            pci_device: vmgmt_abi::PCI_DEVICE,
            msix: false,
            vectors: 4,
            rings: 4,
            maps_max: MAPS as u32,
            mapped_bytes_max: 1 << 32,
            objects_max: 4,
            features: 0,
        };
        let front = Function::new(settings, front_words.clone()).unwrap();
        let front_page = FrontPage::new(front_words);
        let core_page = CorePage::new(words(CorePage::<MortalWords>::WORDS));
        let state = words(STATE_WORDS);
        let rings = attach(&state, &front_page, &core_page);
        let mut world = Self {
            life,
            front,
            front_page,
            core_page,
            core_life: 0,
            state,
            rings,
            memory: FlatMemory::new(&FlatGuest::new(1 << 12)),
            hub: Hub::new(1),
            journal: Vec::new(),
            accesses: 0,
            deaths: 0,
            dies_again: None,
            results: Vec::new(),
        };
        for (vm, name) in [(1, "a"), (2, "b")] {
            world.hub.handle(NOW, Input::Vm(config(vm, name)));
        }
        world.carry();
        world.begin_core();
        world
    }

    /// A core life begins on what the one before left.
    fn begin_core(&mut self) {
        self.core_life += 1;
        let life = self.core_life;
        let words = MortalWords {
            words: PlainWords::new(CorePage::<MortalWords>::WORDS),
            life: self.life.clone(),
        };
        self.core_page = CorePage::new(words.clone());
        if life > 1 {
            self.front_input(registers::Input::CoreDead { life: life - 1 });
        }
        self.front_input(registers::Input::CoreBegins { life, page: words });
        self.hub = Hub::replay(life, None, self.journal.iter().cloned()).unwrap();
        self.rings = attach(&self.state, &self.front_page, &self.core_page);
        let now_ns = 1_700_000_000_000_000_000 + life;
        self.hub.handle(NOW, Input::WallClock { now_ns });
        for (session, vm) in [(A, 1), (B, 2)] {
            self.hub.handle(NOW, Input::SessionOpened { session, vm });
        }
        self.hub.handle(NOW, Input::Adopted);
        self.carry();
    }

    fn front_input(&mut self, input: registers::Input<MortalWords>) {
        self.front.handle(NOW, input);
        while self.front.poll_output().is_some() {}
    }

    /// An access of the guest's to a port; what it read.
    fn access(&mut self, command: Command) -> Vec<u8> {
        self.accesses += 1;
        let handle = ReplyHandle {
            sequence: self.accesses,
            message_id: self.accesses as u16,
            command: 0,
            no_reply: false,
            reply_bytes_max: u32::MAX,
        };
        let input = registers::Input::Command { handle, command };
        self.life.clone().spared(|| self.front.handle(NOW, input));
        let mut read = Vec::new();
        while let Some(output) = self.front.poll_output() {
            if let registers::Output::Reply {
                reply: Reply::RegionRead { data, .. },
                ..
            } = output
            {
                read = data;
            }
        }
        read
    }

    fn write(&mut self, register: u32, data: &[u8]) {
        let write = RegionWrite::new(2, u64::from(register), data.to_vec()).unwrap();
        self.access(Command::RegionWrite(write));
    }

    fn read(&mut self, register: u32) -> u32 {
        let access = RegionAccess::new(2, u64::from(register), 4).unwrap();
        u32::from_le_bytes(self.access(Command::RegionRead(access)).try_into().unwrap())
    }

    fn commit(&mut self, submission: &Submission, input: &[u8]) {
        let mode = Mode(u32::from(submission.opcode >> 8));
        self.write(port::MODE, &mode.0.to_le_bytes());
        for byte in submission.as_bytes().iter().chain(input) {
            self.write(port::DATA, &[*byte]);
        }
        self.write(port::COMMIT, &[1, 0, 0, 0]);
        assert_eq!(self.read(port::STATUS) & IN_USE, port::STATUS_BUSY);
    }

    fn abort(&mut self) {
        self.write(port::ABORT, &[1, 0, 0, 0]);
        assert_eq!(self.read(port::STATUS) & IN_USE, 0);
    }

    /// Reads the result, if it is there.
    fn take(&mut self) -> bool {
        if self.read(port::STATUS) & port::STATUS_DONE == 0 {
            return false;
        }
        let bytes = self.read(port::READABLE) as usize;
        let mut all = Vec::new();
        while all.len() < bytes {
            all.extend(self.read(port::DATA).to_le_bytes());
        }
        all.truncate(bytes);
        let (completion, output) = Completion::read_from_prefix(&all).unwrap();
        self.results.push((completion, output.to_vec()));
        true
    }

    /// The guest's program, and the core that serves it.
    fn run(&mut self, acts: &[Act]) {
        for act in acts {
            match act {
                Act::Ask(submission, input) => {
                    self.commit(submission, input);
                    // (As many turns as deaths and adoptions can take.)
                    assert!((0..12).any(|_| {
                        self.turn();
                        self.take()
                    }));
                }
                Act::AskAndAbort(submission, input) => {
                    self.commit(submission, input);
                    self.abort();
                }
                Act::AskAndAbortLate(submission, input) => {
                    self.commit(submission, input);
                    (0..4).for_each(|_| self.turn());
                    self.abort();
                }
            }
        }
    }

    /// One turn of the core, as the shell's; it may die in it, and another one begins.
    fn turn(&mut self) {
        let turn = catch_unwind(AssertUnwindSafe(|| {
            self.rings_take(rings::Input::Touched);
            self.rings_take(rings::Input::Poll { budget: 8 });
            self.route();
            self.carry();
            self.rings_take(rings::Input::TurnEnd);
            self.route();
        }));
        if let Err(cause) = turn {
            if cause.downcast_ref::<Death>().is_none() {
                resume_unwind(cause);
            }
            self.deaths += 1;
            self.life.0.set(-1);
            self.begin_core();
            self.life.0.set(self.dies_again.take().unwrap_or(-1));
        }
    }

    fn rings_take(&mut self, input: rings::Input) {
        self.rings
            .handle(NOW, &self.front_page, &self.core_page, &mut self.memory, input);
    }

    fn route(&mut self) {
        while let Some(output) = self.rings.poll_output() {
            let input = match output {
                rings::Output::Submission(fetched) => Input::Submission(fetched),
                rings::Output::Cancel(token) => Input::Cancel(token),
                rings::Output::Void(token) => Input::Void(token),
                rings::Output::ChannelClosed { session, channel } => {
                    Input::ChannelClosed { session, channel }
                }
                rings::Output::Reset { session } => Input::SessionReset { session },
                rings::Output::Published { token, published } => Input::Published { token, published },
                rings::Output::Signal { .. } | rings::Output::Kick => continue,
            };
            self.hub.handle(NOW, input);
        }
    }

    fn carry(&mut self) {
        while let Some(output) = self.hub.poll_output() {
            match output {
                Output::Journal(record) => {
                    self.life.step();
                    self.journal.push(record);
                }
                Output::Complete {
                    token,
                    answer,
                    payload,
                    confirm,
                } if token.session == A => {
                    self.rings_take(rings::Input::Complete {
                        token,
                        answer,
                        payload,
                        confirm,
                    });
                    self.route();
                }
                // B sees all of its completions.
                Output::Complete { token, .. } => {
                    let published = true;
                    self.hub.handle(NOW, Input::Published { token, published });
                }
                Output::Effect { id, effect } => {
                    assert!(matches!(effect, Effect::Sweep { .. }), "{effect:?}");
                    let outcome = Outcome::failed(Status::IO_ERROR, FailedAt::File);
                    self.hub.handle(NOW, Input::Outcome { effect: id, outcome });
                }
                Output::Control { .. } | Output::Log { .. } => {}
            }
        }
    }

    /// A message of one to the other, which comes to the hub under this token.
    fn send(&mut self, token: Token, again: bool) {
        let fetched = Fetched {
            token,
            mode: Mode::CHAT,
            opcode: Opcode::SEND,
            flags: 0,
            tag: 5,
            handle: if token.session == A { 2 } else { 1 },
            offset: 0,
            argument: 0,
            deadline: Tick::NEVER,
            meta: Vec::new(),
            data_bytes: 4,
            data: Some(b"text".to_vec()),
            again,
        };
        self.hub.handle(NOW, Input::Submission(Box::new(fetched)));
    }

    fn waiting_for(&self, vm: u64) -> u64 {
        let statuses = self.hub.vm_statuses();
        let status = statuses.iter().find(|status| status.vm == vm).unwrap();
        status.mailbox_messages
    }

    /// The core has nothing left to do, and nothing is in doubt.
    fn settle(&mut self) {
        (0..6).for_each(|_| self.turn());
        assert_eq!(self.hub.unresolved(), []);
    }

    /// Statuses of all results, and which messages they carried.
    fn received(&self) -> Vec<(Status, u64)> {
        let parsed = self.results.iter().map(|(completion, output)| {
            let header = MessageHeader::read_from_prefix(output);
            (
                Status(completion.status),
                header.map_or(0, |(header, _)| header.sequence),
            )
        });
        parsed.collect()
    }
}

fn attach(
    state: &MortalWords,
    front: &FrontPage<MortalWords>,
    core: &CorePage<MortalWords>,
) -> Rings<MortalWords> {
    let settings = rings::Settings {
        session: A,
        modes: Modes::default(),
    };
    Rings::attach(settings, state.clone(), front, core).unwrap()
}

/// All that the guest asks has the same tag, as firmware does it that has one submission in flight.
fn of(opcode: Opcode) -> Submission {
    Submission {
        tag: 5,
        opcode: opcode.0,
        ..Submission::default()
    }
}

fn receive() -> (Submission, Vec<u8>) {
    let submission = Submission {
        length: 200,
        ..of(Opcode::RECEIVE)
    };
    (submission, Vec::new())
}

fn send(text: &[u8]) -> (Submission, Vec<u8>) {
    let submission = Submission {
        handle: 2,
        length: text.len() as u64,
        ..of(Opcode::SEND)
    };
    (submission, text.to_vec())
}

fn offer() -> (Submission, Vec<u8>) {
    let submission = Submission {
        offset: SIZE_UNKNOWN,
        length: 6,
        meta_bytes: 6,
        ..of(Opcode::OFFER)
    };
    (submission, b"b\0file".to_vec())
}

/// Something of the same mode that is answered at once.
fn shares() -> (Submission, Vec<u8>) {
    let submission = Submission {
        length: 100,
        ..of(Opcode::SHARES)
    };
    (submission, Vec::new())
}

fn ask((submission, input): (Submission, Vec<u8>)) -> Act {
    Act::Ask(submission, input)
}

fn ask_and_abort((submission, input): (Submission, Vec<u8>)) -> Act {
    Act::AskAndAbort(submission, input)
}

/// Runs a program with a core that dies at any of its steps, and perhaps once more soon after, until it dies no more in it.
fn at_every_step(acts: &[Act], messages: u32, is_right: impl Fn(&mut World)) {
    for again in [None, Some(1), Some(5), Some(12)] {
        at_every_step_and(again, acts, messages, &is_right);
    }
}

fn at_every_step_and(again: Option<i64>, acts: &[Act], messages: u32, is_right: impl Fn(&mut World)) {
    for steps in 0.. {
        let mut world = World::new();
        world.dies_again = again;
        for index in 0..messages {
            let token = Token {
                session: B,
                channel: Channel::Ring(0),
                index,
                generation: 1,
            };
            world.send(token, false);
            world.carry();
        }
        world.life.0.set(steps);
        world.run(acts);
        world.settle();
        let deaths = world.deaths;
        is_right(&mut world);
        if deaths == 0 {
            assert!(steps > 20, "only {steps} steps");
            break;
        }
    }
}

#[test]
fn each_message_is_received_once_by_a_guest_that_asks_again_at_once() {
    let acts = [ask(receive()), ask(receive()), ask(receive())];
    at_every_step(&acts, 3, |world| {
        let once = [1, 2, 3].map(|sequence| (Status::OK, sequence));
        assert_eq!(world.received(), once);
        assert_eq!(world.waiting_for(1), 0);
    });
}

#[test]
fn a_message_that_was_read_does_not_come_again_because_the_next_receive_is_taken_back() {
    for aborts in 1..=3 {
        let mut acts = vec![ask(receive())];
        acts.extend(vec![ask_and_abort(receive()); aborts]);
        acts.push(ask(receive()));
        at_every_step(&acts, 2, |world| {
            let once = [1, 2].map(|sequence| (Status::OK, sequence));
            assert_eq!(world.received(), once);
            assert_eq!(world.waiting_for(1), 0);
        });
    }
}

#[test]
fn two_sends_with_the_same_tag_are_two_messages() {
    let acts = [ask(send(b"first")), ask(send(b"second"))];
    at_every_step(&acts, 0, |world| {
        let numbers: Vec<_> = (world.results.iter())
            .map(|(completion, _)| (Status(completion.status), completion.result))
            .collect();
        assert_eq!(numbers, [(Status::OK, 1), (Status::OK, 2)]);
        assert_eq!(world.waiting_for(2), 2);
    });
}

#[test]
fn an_offer_that_was_taken_back_leaves_its_place() {
    let (submission, input) = offer();
    let acts = [
        Act::AskAndAbortLate(submission, input),
        ask(shares()),
        ask(shares()),
    ];
    at_every_step(&acts, 0, |world| {
        // There is one place: the next offer waits in it for its answer, and is not refused.
        let (submission, input) = offer();
        world.commit(&submission, &input);
        (0..4).for_each(|_| world.turn());
        assert!(!world.take(), "{:?}", world.results);
    });
}

#[test]
fn an_answer_is_that_of_its_own_submission_whatever_the_tag() {
    let mut world = World::new();
    let mut results = Vec::new();
    for (generation, again) in [(1, false), (2, true), (1, true)] {
        let token = Token {
            session: A,
            channel: Channel::Port,
            index: 0,
            generation,
        };
        world.send(token, again);
        // The answers are seen by nobody.
        while let Some(output) = world.hub.poll_output() {
            if let Output::Complete { answer, .. } = output {
                results.push(answer.result);
            }
        }
    }
    assert_eq!(results, [1, 2, 1]);
    assert_eq!(world.waiting_for(2), 2);
}
