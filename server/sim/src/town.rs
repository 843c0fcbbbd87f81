//! GARDEN, the town: everything but the core: the front, the VMs, chance, the shadow. What may happen while a core runs happens here.
//!
//! In: turns. Out: actions of guests, clients and front. Must never know the core but by its wires.

use crate::chance::Chance;
use crate::clockwork::{Clock, Steps};
use crate::faults::Fault;
use crate::front::Front;
use crate::guest::{Act, CHAT, Guest, Site, State};
use crate::limits::{ARENA, RAM_BYTES, RING_ENTRIES};
use crate::ram::{Complaints, mark};
use crate::shadow::Shadow;
use crate::trace::Trace;
use crate::vm::Vm;
use std::cell::Cell;
use std::rc::Rc;
use vmgmt_abi::registers as abi;

/// What happens how often in this run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub vms: usize,
    pub suppression: bool,
    pub acts: Vec<u32>,
    pub world: Vec<u32>,
    pub hostile: usize,
    /// Of 1000 waiting VMs' turns, in so many the process is killed.
    pub kills_permille: u32,
    /// Of 1000 guests' turns, so many are about files that they offer each other.
    pub offers_permille: u32,
}

/// Everything but the core.
pub struct Town {
    pub clock: Clock,
    pub complaints: Complaints,
    pub chance: Chance,
    pub plan: Plan,
    pub front: Front,
    pub vms: Vec<Vm>,
    pub guests: Vec<Guest>,
    pub hostile: Vec<bool>,
    pub peers: Vec<u64>,
    pub shadow: Shadow,
    pub trace: Trace,
    /// For each VM: a core serves that has taken over what the one before left, and has looked at all of it.
    served: Vec<bool>,
    /// VMs whose process stands still: it reads and answers nothing.
    pub still: Vec<bool>,
    /// What happens between two accesses of a core is guests' work that the front tells of at once.
    pub hurries: bool,
}

impl Town {
    pub fn new(
        clock: &Clock,
        complaints: &Complaints,
        (steps, fault): (&Rc<Steps>, &Rc<Cell<Fault>>),
        mut chance: Chance,
        plan: Plan,
    ) -> Self {
        let plan_vms = plan.vms;
        let numbers: Vec<u64> = (1..=plan.vms as u64).collect();
        let mut shadow = Shadow::new(complaints);
        let hostile: Vec<bool> = (0..plan.vms)
            .map(|index| index >= plan.vms - plan.hostile)
            .collect();
        let vms: Vec<Vm> = numbers
            .iter()
            .map(|number| {
                let unshared = chance.permille(150);
                let bare = chance.permille(200);
                Vm::new(*number, clock, complaints, unshared, bare)
            })
            .collect();
        for (vm, hostile) in vms.iter().zip(&hostile) {
            vm.ram.honest.set(!hostile);
            if *hostile {
                shadow.hostile.insert(vm.number);
            }
        }
        Self {
            clock: clock.clone(),
            complaints: complaints.clone(),
            chance,
            plan,
            front: Front::new(clock, complaints, steps, fault),
            guests: numbers.iter().map(|number| Guest::new(*number)).collect(),
            vms,
            hostile,
            peers: numbers,
            shadow,
            trace: Trace::default(),
            served: vec![false; plan_vms],
            still: vec![false; plan_vms],
            hurries: false,
        }
    }

    pub fn note(&mut self, text: String) {
        self.trace.add(self.clock.now(), text);
    }

    /// Calls a guest with its site.
    pub fn with<T>(&mut self, index: usize, call: impl FnOnce(&mut Guest, &mut Site<'_>) -> T) -> T {
        let complaints = self.complaints.clone();
        let complain = move |text| complaints.add(text);
        let mut site = Site {
            vm: &mut self.vms[index],
            front: &mut self.front,
            shadow: &mut self.shadow,
            chance: &mut self.chance,
            complain: &complain,
            peers: &self.peers,
            suppression: self.plan.suppression,
        };
        call(&mut self.guests[index], &mut site)
    }

    /// What happens between two accesses of a core.
    pub fn overtake(&mut self) {
        if self.hurries {
            for _ in 0..self.chance.between(1, 4) {
                self.guest_turn();
            }
            for _ in 0..3 {
                self.front_turn();
            }
            return;
        }
        for _ in 0..self.chance.between(1, 4) {
            if self.chance.below(2) == 0 {
                self.front_turn();
            } else {
                self.guest_turn();
            }
        }
    }

    /// A turn of the front: now and then it reads no more than a few bytes of a message.
    pub fn front_turn(&mut self) {
        let bytes_max = if self.chance.permille(100) {
            self.chance.between(1, 40) as usize
        } else {
            usize::MAX
        };
        self.front.turn(bytes_max);
        self.note(format!("front, {bytes_max} bytes at most"));
    }

    /// A turn of some VM.
    pub fn guest_turn(&mut self) {
        let index = self.chance.below(self.vms.len() as u64) as usize;
        if self.still[index] {
            return;
        }
        let number = self.vms[index].number;
        if self.hostile[index] {
            let what = self.hostile_turn(index);
            return self.note(format!("hostile VM {number}: {what}"));
        }
        let runs = self.with(index, |guest, site| guest.settle(site));
        if !runs {
            let kill = self.vms[index].session.is_some() && self.chance.permille(self.plan.kills_permille);
            if self.guests[index].state == State::Off && self.chance.permille(200) {
                self.with(index, |guest, site| guest.start(site));
                self.note(format!("VM {number} starts"));
            } else if kill && self.guests[index].state != State::Leaving {
                self.vms[index].close(&mut self.front);
                self.shadow.leaves(number);
                self.guests[index].state = State::Leaving;
                self.blur_if_unserved(number);
                self.blur_what_is_posted(number);
                self.note(format!("VM {number} is killed"));
            }
            return;
        }
        if self.guests[index].state != State::Running {
            return;
        }
        if self.plan.offers_permille > 0 && self.chance.permille(self.plan.offers_permille) {
            if let Some(what) = self.with(index, |guest, site| guest.offer(site, false)) {
                self.note(format!("VM {number}: {what}"));
            }
            return;
        }
        let act = Act::BASE[self.chance.weighted(&self.plan.acts)].0;
        if let Some(what) = self.with(index, |guest, site| guest.act(site, act)) {
            if matches!(
                act,
                Act::Reset | Act::FunctionReset | Act::ToggleRing | Act::Leave
            ) {
                self.blur_if_unserved(number);
            }
            if act == Act::Leave {
                self.blur_what_is_posted(number);
            }
            self.note(format!("VM {number}: {what}"));
        }
    }

    /// What follows from what is there already: processes read and answer, honest drivers ring and set up. Nobody begins anything.
    pub fn react(&mut self) {
        for index in 0..self.vms.len() {
            if self.still[index] {
                continue;
            }
            if self.hostile[index] {
                self.vms[index].step(&mut self.front);
            } else {
                self.with(index, |guest, site| guest.settle(site));
            }
        }
    }

    fn blur_if_unserved(&mut self, vm: u64) {
        let ring = &self.guests[vm as usize - 1].rings[CHAT];
        let concerned = ring.closing || self.guests[vm as usize - 1].state != State::Running;
        if !self.served[vm as usize - 1] && concerned {
            self.shadow.blur(vm, ring.prepared);
        }
    }

    /// A VM's process that ends may have done a write by message (and its guest has even taken it) whose answer nobody waits for any more: the hub
    /// takes the message for not delivered.
    fn blur_what_is_posted(&mut self, vm: u64) {
        if self.vms[vm as usize - 1].unshared {
            self.shadow
                .blur(vm, self.guests[vm as usize - 1].rings[CHAT].prepared);
            self.shadow.blur_what_comes(vm);
        }
    }

    /// A core died: what guests have just reset it may not have seen.
    pub fn core_died(&mut self) {
        self.served.fill(false);
        for (vm, guest) in self.vms.iter().zip(&self.guests) {
            let closing = guest.rings[CHAT].closing;
            if closing || !matches!(guest.state, State::Running | State::Off) {
                self.shadow.blur(vm.number, guest.rings[CHAT].prepared);
            }
        }
    }

    /// A core has taken over all that concerns these VMs. (Where memory is reached by message that takes longer than to be told of a session.)
    pub fn core_serves(&mut self, is_taken_up: impl Fn(u64) -> bool) {
        for (vm, served) in self.peers.iter().zip(&mut self.served) {
            if !*served && is_taken_up(*vm) {
                *served = true;
                self.shadow.new_life(*vm);
            }
        }
    }

    /// Something that no driver would do.
    fn hostile_turn(&mut self, index: usize) -> String {
        let Self {
            vms,
            guests,
            front,
            chance,
            ..
        } = self;
        let (vm, guest) = (&mut vms[index], &mut guests[index]);
        vm.step(front);
        vm.ended.clear();
        if vm
            .session
            .is_some_and(|session| !front.clients.contains_key(&session))
        {
            vm.gone();
            guest.state = State::Off;
            return "gone".into();
        }
        if guest.state == State::Off {
            self.with(index, |guest, site| guest.start(site));
            return "starts".into();
        }
        if !vm.is_free() || guest.state == State::Leaving {
            return "waits".into();
        }
        if guest.state == State::Blank {
            vm.ram.quiet.set(None);
            self.with(index, |guest, site| {
                guest.bus_master = true;
                guest.settle(site)
            });
            return "sets its device up".into();
        }
        vm.ram.quiet.set(None);
        match chance.below(16) {
            0..6 => {
                let at = chance.below(0x2000 / 4) * 4;
                let value = odd_word(chance);
                vm.ram.store_u32(at, value);
                format!("{value:#x} at {at:#x}")
            }
            6..10 => {
                // A submission of nonsense, properly rung.
                let ring = &mut guest.rings[chance.below(2) as usize];
                let slot = chance.below(u64::from(RING_ENTRIES));
                for word in 0..16 {
                    let value = if word == 1 {
                        [0, 1, 2, 3, 0x100, 0x10c, 0x106, 0x202, 0x203, 0x1_0202][chance.below(10) as usize]
                    } else {
                        odd_word(chance)
                    };
                    vm.ram.store_u32(ring.submissions() + slot * 64 + word * 4, value);
                }
                let tail = vm.ram.load_u32(ring.base).wrapping_add(chance.below(3) as u32);
                vm.ram.store_u32(ring.base, tail);
                let at = abi::DOORBELLS + 4 * ring.n as u32;
                vm.set_register(front, at, tail);
                format!("nonsense on ring {}", ring.n)
            }
            10 | 11 => {
                let at = [0x400, 0x430, 0x440, 0x470, 0x10, 0x54, 0x58, 0x60, 0x64, 0x2000]
                    [chance.below(10) as usize]
                    + chance.below(4) as u32 * 4;
                let value = odd_word(chance);
                vm.set_register(front, at, value);
                format!("register {at:#x} = {value:#x}")
            }
            12 => {
                let data: Vec<u8> = (0..chance.between(1, 4).next_power_of_two())
                    .map(|_| chance.any() as u8)
                    .collect();
                let at = chance.below(16) as u32 * 4;
                vm.set_port(front, at, &data);
                format!("port {at:#x}")
            }
            13 => {
                let at = chance.below(16) as u32 * 4;
                format!("port {at:#x} is {:#x}", vm.port(front, at))
            }
            14 => {
                vm.set_register(front, abi::CONTROL, abi::CONTROL_RESET);
                guest.state = State::Blank;
                "reset".into()
            }
            _ if chance.permille(100) => {
                vm.close(front);
                guest.state = State::Leaving;
                "leaves".into()
            }
            _ if chance.permille(300) => {
                vm.device_reset();
                guest.state = State::Blank;
                "DEVICE_RESET".into()
            }
            _ => "nothing".into(),
        }
    }

    /// Nobody's memory holds a run of another's: each VM fills its own with its mark.
    pub fn check_secrets(&self) {
        for vm in &self.vms {
            let mut bytes = vec![0; RAM_BYTES as usize];
            vm.ram.read(0, &mut bytes);
            for other in self.peers.iter().filter(|other| **other != vm.number) {
                let (mut run, longest) = (0, 24);
                for byte in &bytes {
                    run = if *byte == mark(*other) { run + 1 } else { 0 };
                    if run == longest {
                        self.complaints.add(format!(
                            "memory of VM {} holds {longest} bytes of VM {other}'s memory",
                            vm.number
                        ));
                        break;
                    }
                }
            }
        }
    }
}

fn odd_word(chance: &mut Chance) -> u32 {
    match chance.below(6) {
        0 => u32::MAX,
        1 => 0,
        2 => chance.below(64) as u32,
        3 => (ARENA + chance.below(RAM_BYTES)) as u32,
        _ => chance.any() as u32,
    }
}
