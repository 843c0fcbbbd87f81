//! Several VMs do anything in any order, effects end in any order and fail, sessions come and go, time passes.
//!
//! After every step (in the house): one completion for each submission, no byte into a buffer whose submission has ended, a saved and restored hub is
//! the same hub, the journal replayed tells the same story. Here: messages are conserved, none goes outside policy, nothing is left over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod house;

use house::{Ask, House, config};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use vmgmt_abi::chat::{MessageHeader, PEER_ALL, PEER_HOST};
use vmgmt_abi::file::{OfferHeader, SIZE_UNKNOWN, open, put};
use vmgmt_abi::ring::{completion_flag, flag};
use vmgmt_abi::{Opcode, Status};
use vmgmt_core::policy::VmConfig;
use vmgmt_core::{ControlRequest, Hub, Input, Record, Saved};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Channel, Token};
use zerocopy::FromBytes;

const VMS: u64 = 4;

fn configs() -> Vec<VmConfig> {
    let mut configs: Vec<VmConfig> = ["a", "b", "c", "d"]
        .iter()
        .zip(1..)
        .map(|(name, vm)| config(vm, name))
        .collect();
    configs[0].send_to_all = true;
    configs[1].reach = vec!["a".into(), "c".into()];
    configs[2].limits.mailbox_bytes_max = 900;
    configs[2].limits.receives_max = 3;
    configs[3].limits.submissions_per_second_max = 5;
    configs[3].limits.open_files_max = 2;
    configs
}

fn may_reach(source: u64, target: u64) -> bool {
    source != 2 || [1, 3].contains(&target)
}

/// One thing that happens.
type Step = (u8, u8, u8, u16);

struct World {
    house: House,
    asked: Vec<Token>,
    /// SEND submissions: source VM and target as asked.
    sends: BTreeMap<Token, (u64, u64)>,
    receives: BTreeSet<Token>,
    next_session: u64,
    /// The session of each VM.
    sessions: BTreeMap<u64, u64>,
    /// The VM of each session there ever was.
    vms: BTreeMap<u64, u64>,
}

impl World {
    fn new() -> Self {
        let mut house = House::with(configs());
        house.manual = true;
        Self {
            house,
            asked: Vec::new(),
            sends: BTreeMap::new(),
            receives: BTreeSet::new(),
            next_session: 100,
            sessions: (1..=VMS).map(|vm| (vm, 10 + vm)).collect(),
            vms: (1..=VMS).map(|vm| (10 + vm, vm)).collect(),
        }
    }

    fn ask(&mut self, vm: u64, ring: u8, ask: Ask) -> Token {
        let channel = if ring == 3 {
            Channel::Port
        } else {
            Channel::Ring(ring)
        };
        let token = self.house.ask_on(self.sessions[&vm], channel, ask);
        self.asked.push(token);
        token
    }

    /// A handle that some answer gave to this VM, or to another, or to nobody.
    fn some_handle(&self, choice: u16) -> u64 {
        let handles: BTreeSet<u64> = self
            .house
            .answers
            .values()
            .map(|(answer, _)| answer.result)
            .filter(|handle| *handle > 1 << 40)
            .collect();
        let offers = self.house.answers.values().filter_map(|(_, payload)| {
            Some(OfferHeader::read_from_prefix(payload).ok()?.0.handle).filter(|handle| *handle > 1 << 40)
        });
        let all: Vec<u64> = handles.into_iter().chain(offers).collect();
        all.get(usize::from(choice) % all.len().max(1))
            .copied()
            .unwrap_or(7)
    }

    fn step(&mut self, (what, who, how, size): Step) {
        let vm = u64::from(who) % VMS + 1;
        let ring = how % 4;
        let bytes = usize::from(size) % 700;
        let path = format!("rw/f{}", how % 3);
        let handle = self.some_handle(size);
        match what % 26 {
            0..=3 => {
                let target = match how % 7 {
                    5 => PEER_ALL,
                    6 => PEER_HOST,
                    number => u64::from(number),
                };
                let bytes = if size % 11 == 0 { 5000 } else { bytes };
                let key = if size % 5 == 0 { u64::from(size % 3) + 1 } else { 0 };
                let token = self.ask(
                    vm,
                    ring,
                    Ask::new(Opcode::SEND)
                        .handle(target)
                        .argument(key)
                        .data(vec![how; bytes]),
                );
                self.sends.insert(token, (vm, target));
            }
            4..=6 => {
                let token = self.ask(vm, ring, Ask::new(Opcode::RECEIVE).room(104 + bytes));
                if size % 9 == 0 {
                    self.house.unpublished.insert(token);
                }
                self.receives.insert(token);
            }
            7 => drop(self.ask(
                vm,
                ring,
                Ask::new(Opcode::PUBLISH).argument(u64::from(how % 2)).data("x"),
            )),
            8 => drop(self.ask(vm, ring, Ask::new(Opcode::PEERS).room(bytes))),
            9 => {
                let bits = open::READ | open::WRITE | open::CREATE;
                self.ask(vm, ring, Ask::new(Opcode::OPEN).meta(&path).argument(bits));
            }
            10 => {
                let argument = if how % 2 == 0 { put::RESUME } else { 1 };
                self.ask(
                    vm,
                    ring,
                    Ask::new(Opcode::PUT)
                        .meta(&path)
                        .offset(SIZE_UNKNOWN)
                        .argument(argument),
                );
            }
            11 => drop(
                self.ask(
                    vm,
                    ring,
                    Ask::new(Opcode::WRITE)
                        .handle(handle)
                        .offset(u64::from(how))
                        .data(vec![1; bytes]),
                ),
            ),
            12 => drop(
                self.ask(
                    vm,
                    ring,
                    Ask::new(Opcode::READ)
                        .handle(handle)
                        .room(bytes)
                        .deadline_ns(1000),
                ),
            ),
            13 => {
                let check = if how % 2 == 0 { flag::CHECK } else { 0 };
                self.ask(
                    vm,
                    ring,
                    Ask::new(Opcode::COMMIT)
                        .handle(handle)
                        .offset(bytes as u64)
                        .flags(check)
                        .room(64),
                );
            }
            14 => drop(self.ask(vm, ring, Ask::new(Opcode::CLOSE).handle(handle))),
            15 => {
                let name = ["a", "b", "c", "host"][usize::from(how) % 4];
                let deadline_ns = if size % 2 == 0 { 0 } else { 1_000_000 };
                let ask = Ask::new(Opcode::OFFER)
                    .meta(format!("{name}\0file"))
                    .offset(SIZE_UNKNOWN);
                self.ask(vm, ring, ask.deadline_ns(deadline_ns));
            }
            16 => drop(self.ask(vm, ring, Ask::new(Opcode::NEXT_OFFER).room(300))),
            17 => {
                let opcode = if how % 5 == 0 {
                    Opcode::REFUSE
                } else {
                    Opcode::ACCEPT
                };
                self.ask(vm, ring, Ask::new(opcode).handle(handle));
            }
            18 => {
                let opcode = [Opcode::STREAM_WRITE, Opcode::STREAM_READ][usize::from(how) % 2];
                self.ask(vm, ring, Ask::new(opcode).handle(handle).data(vec![2; bytes]));
            }
            19 => {
                let opcode =
                    [Opcode::STREAM_END, Opcode::STREAM_CONFIRM, Opcode::FSYNC][usize::from(how) % 3];
                self.ask(vm, ring, Ask::new(opcode).handle(handle));
            }
            20 => {
                if let Some(token) = self
                    .asked
                    .get(usize::from(size) % self.asked.len().max(1))
                    .copied()
                {
                    if how % 2 == 0 {
                        self.house.input(Input::Cancel(token));
                    } else if self.house.open.contains(&token) {
                        self.house.open.remove(&token);
                        self.house.unmapped.insert(token);
                        self.house.input(Input::Void(token));
                    }
                }
            }
            21 => self.come_and_go(vm, how, size),
            24 => match how % 4 {
                0 => self.house.crash(),
                1 => self.house.crash_after_effect(usize::from(size)),
                _ => self.house.dies_after = Some(usize::from(size % 9)),
            },
            25 => {
                let ask = match how % 4 {
                    0 => Ask::new(Opcode::MAKE_DIRECTORY).meta(format!("rw/d{}", size % 2)),
                    1 => Ask::new(Opcode::REMOVE).meta(&path),
                    2 => Ask::new(Opcode::REMOVE).meta(format!("rw/d{}", size % 2)),
                    _ => Ask::new(Opcode::RENAME)
                        .meta(format!("{path}\0rw/f{}", size % 3))
                        .argument(1),
                };
                self.ask(vm, ring, ask);
            }
            22 => self.house.pass_ns(u64::from(size) * 10_000),
            _ => {
                self.house.failing = how % 8 == 0;
                self.house.step(usize::from(size));
                self.house.failing = false;
            }
        }
        for _ in 0..how % 3 {
            self.house.step(usize::from(size));
        }
    }

    fn come_and_go(&mut self, vm: u64, how: u8, size: u16) {
        let session = self.sessions[&vm];
        match how % 4 {
            0 => {
                self.house.close_session(session);
                self.next_session += 1;
                self.sessions.insert(vm, self.next_session);
                self.vms.insert(self.next_session, vm);
                self.house.input(Input::SessionOpened {
                    session: self.next_session,
                    vm,
                });
            }
            1 => {
                self.house.void_session(session);
                self.house.input(Input::SessionReset { session });
            }
            2 => {
                let channel = Channel::Ring(size as u8 % 3);
                let gone = |token: &Token| (token.session, token.channel) == (session, channel);
                self.house.open.retain(|token| !gone(token));
                self.house.confirming.retain(|token| !gone(token));
                self.house
                    .unmapped
                    .extend(self.asked.iter().filter(|token| gone(token)));
                self.house.input(Input::ChannelClosed { session, channel });
            }
            _ => {
                let file = self.house.host_file("host", &format!("h{size}"), &[3; 100]);
                // Few keys, so that transfers are taken up again, refused and told once more; some have none.
                let key = u64::from(size / 3 % 4);
                let (target, name) = ("abcd"[(vm as usize - 1)..vm as usize].to_owned(), "n".to_owned());
                let request = if size.is_multiple_of(2) {
                    ControlRequest::Push {
                        key,
                        target,
                        file,
                        size: 100,
                        name,
                        wait_ns: 1_000_000,
                    }
                } else {
                    ControlRequest::Pull {
                        key,
                        source: target,
                        path: name,
                        file,
                        wait_ns: 1_000_000,
                    }
                };
                self.house.input(Input::Control {
                    client: u64::from(size % 3),
                    id: u64::from(size),
                    request,
                });
            }
        }
    }

    fn finish(mut self) {
        for client in 0..3 {
            self.house.input(Input::ControlClosed { client });
        }
        self.house.settle();
        // Operators that have not asked again since the core's last death are not waited for any longer.
        self.house.pass_ns(31_000_000_000);
        self.check_messages();
        for session in self.sessions.clone().into_values() {
            self.house.close_session(session);
        }
        self.house.settle();
        assert!(
            self.house.open.is_empty(),
            "without an answer: {:?}",
            self.house.open
        );
        assert_eq!(
            (self.house.hub.effects_open(), self.house.hub.submissions_open()),
            (0, 0)
        );
        assert_eq!(self.house.slots_open(), 0, "slots left open");
        for vm in self.house.hub.vm_statuses() {
            assert_eq!(
                (vm.open_files, vm.transfers, vm.receives_posted),
                (0, 0, 0),
                "{vm:?}"
            );
        }
    }

    fn check_messages(&self) {
        let mut accepted: BTreeMap<u64, u64> = BTreeMap::new();
        for record in &self.house.journal {
            if let Record::Accepted { message, targets, .. } = record {
                for target in targets.numbers() {
                    assert!(
                        may_reach(message.source, *target) || *target == PEER_HOST,
                        "outside policy: {record:?}"
                    );
                    *accepted.entry(*target).or_default() += 1;
                }
            }
        }
        let mut delivered: BTreeMap<u64, BTreeSet<(u64, u64)>> = BTreeMap::new();
        for token in self
            .house
            .published
            .iter()
            .filter(|token| self.receives.contains(token))
        {
            let (answer, payload) = self.house.answer(*token);
            let header = MessageHeader::read_from_prefix(payload).unwrap().0;
            let vm = self.vms[&token.session];
            if answer.flags & completion_flag::MORE == 0 {
                let new = delivered
                    .entry(vm)
                    .or_default()
                    .insert((header.source, header.sequence));
                assert!(new, "delivered twice: {header:?}");
            }
        }
        for status in self.house.hub.vm_statuses() {
            let wanted = accepted.get(&status.vm).copied().unwrap_or(0);
            let got = delivered
                .get(&status.vm)
                .map_or(0, |messages| messages.len() as u64);
            let dropped =
                self.house.journal.iter().filter(
                    |record| matches!(record, Record::Dropped { target, .. } if *target == status.vm),
                );
            assert_eq!(
                wanted,
                got + status.mailbox_messages + dropped.count() as u64,
                "{status:?}"
            );
            // Counters do not survive.
            if self.house.crashes == 0 {
                assert_eq!(got, status.messages_delivered);
            }
        }
        let ok = self.sends.iter().filter(|(token, _)| {
            self.house
                .answers
                .get(token)
                .is_some_and(|(answer, _)| answer.status == Status::OK.0)
        });
        assert!(
            ok.clone()
                .all(|(_, (source, target))| *target >= PEER_ALL || may_reach(*source, *target))
        );
    }
}

/// `PROPTEST_CASES=1000` for a longer walk.
fn walks() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(48);
    ProptestConfig {
        cases,
        max_shrink_iters: 2000,
        // What a walk finds becomes a test of its own.
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(walks())]
    /// What comes back is checked as a stranger's: a saved hub with wrong bytes is refused, or is a hub that works.
    #[test]
    fn a_damaged_state_is_no_panic(
        steps in proptest::collection::vec(any::<Step>(), 1..60),
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8),
    ) {
        let mut world = World::new();
        world.house.repack = false;
        world.house.replay = false;
        for step in steps {
            world.step(step);
        }
        let mut bytes = world.house.hub.save().to_bytes();
        for (place, byte) in damage {
            let place = place % bytes.len();
            bytes[place] = byte;
        }
        if let Ok(mut hub) = Saved::from_bytes(&bytes).and_then(Hub::restore) {
            let _ = Hub::replay(3, Some(hub.save()), []);
            for session in 0..200 {
                hub.handle(Tick(1), Input::SessionClosed { session });
            }
            hub.handle_timeout(Tick(1 << 50));
            while hub.poll_output().is_some() {}
        }
    }

    #[test]
    fn anything_in_any_order_fits_its_memory(
        steps in proptest::collection::vec(any::<Step>(), 1..160),
        room in 0..12_u64 << 10,
    ) {
        let mut world = World::new();
        let begun = world.house.hub.state_bytes();
        world.house.has_room(begun / 4 * 5 + room);
        for step in steps {
            world.step(step);
        }
    }

    #[test]
    fn anything_in_any_order(steps in proptest::collection::vec(any::<Step>(), 1..160)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.finish();
    }
}
