//! GARDEN, what lies between front and core in one core life: the channel, the shared pages, the eventfds. And what outlives it: the disk's work.
//!
//! In and out: packets with object slots, words, signals, work. All of it can be cut off at any point.

use crate::clockwork::{Clock, SimWords};
use crate::disk::{Disk, Done, Work};
use crate::limits::{CHANNEL_PACKETS_MAX, UNDEAD_NS_MAX};
use crate::ram::{Complaints, Ram};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use vmgmt_abi::Status;
use vmgmt_core::EffectId;
use vmgmt_device::Tick;
use vmgmt_device::page::{LifePage, TouchedPage};
use vmgmt_host::messages::CoreToFront;

/// Packets to the core: `FrontToCore` with its descriptors.
#[derive(Clone, Debug)]
pub enum ToCore {
    Session {
        session: u64,
        slot: usize,
        vm: u64,
        front: SimWords,
        core: SimWords,
        state: SimWords,
    },
    Object {
        session: u64,
        object: u64,
        ram: Rc<Ram>,
    },
    ObjectGone {
        session: u64,
        object: u64,
    },
    /// Each vector's eventfd.
    Vectors {
        session: u64,
        eventfds: Vec<Option<Eventfd>>,
    },
    SessionGone {
        session: u64,
    },
    Adopted,
    Frozen {
        vm: u64,
        until: Option<Tick>,
        request: u64,
        kept: bool,
    },
    DmaAnswer {
        session: u64,
        request: u64,
        error: u32,
        data: Vec<u8>,
    },
}

/// An eventfd: its count.
pub type Eventfd = Rc<Cell<u64>>;

/// One core life's.
#[derive(Debug)]
pub struct Wires {
    pub life: u64,
    pub to_core: RefCell<VecDeque<ToCore>>,
    pub to_front: RefCell<VecDeque<(CoreToFront, Vec<u8>)>>,
    pub touched: SimWords,
    pub life_page: SimWords,
    pub wake_core: Cell<bool>,
    pub wake_front: Cell<bool>,
    pub finished: RefCell<VecDeque<(EffectId, Done)>>,
}

impl Wires {
    pub fn new(life: u64) -> Rc<Self> {
        let touched = SimWords::new(TouchedPage::<SimWords>::WORDS);
        let life_page = SimWords::new(LifePage::<SimWords>::WORDS);
        TouchedPage::new(touched.clone()).init();
        LifePage::new(life_page.clone()).init();
        Rc::new(Self {
            life,
            to_core: RefCell::default(),
            to_front: RefCell::default(),
            touched,
            life_page,
            wake_core: Cell::new(false),
            wake_front: Cell::new(false),
            finished: RefCell::default(),
        })
    }

    /// Room for one more packet to the core.
    pub fn has_room(&self) -> bool {
        self.to_core.borrow().len() < CHANNEL_PACKETS_MAX
    }
}

/// How the disk is today.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mood {
    /// Nothing ends.
    pub hangs: bool,
    /// Virtual time that work takes at most.
    pub slow_ns: u64,
    /// Of 1000 works so many fail.
    pub errors_permille: u32,
}

#[derive(Debug)]
struct Job {
    wires: Rc<Wires>,
    effect: EffectId,
    /// In whose name; 0: nobody's.
    vm: u64,
    work: Work,
    error: Option<Status>,
    /// Its core is dead and a worker in disk sleep still has it: it lands, and nobody hears of it.
    undead: bool,
}

/// The disk with its queue, which outlives cores.
#[derive(Debug)]
pub struct Spindle {
    complaints: Complaints,
    pub disk: Disk,
    pub mood: Mood,
    pub clock: Clock,
    jobs: BTreeMap<(Tick, u64), Job>,
    next: u64,
    /// When the last work of each open file ends: writes to one file take turns.
    turns: BTreeMap<(u64, u64), Tick>,
    /// A source of chances of its own.
    dice: u64,
}

impl Spindle {
    pub fn new(clock: &Clock, complaints: &Complaints, seed: u64) -> Self {
        Self {
            complaints: complaints.clone(),
            disk: Disk::default(),
            mood: Mood::default(),
            clock: clock.clone(),
            jobs: BTreeMap::new(),
            next: 0,
            turns: BTreeMap::new(),
            dice: seed | 1,
        }
    }

    fn chance(&mut self, below: u64) -> u64 {
        // xorshift: all this decides about is how long work takes and whether it fails.
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice % below.max(1)
    }

    /// A worker takes it on.
    pub fn submit(&mut self, wires: &Rc<Wires>, effect: EffectId, vm: u64, work: Work) {
        let now = self.clock.now();
        let slow = self.mood.slow_ns;
        let mut due = now.after_ns(1_000 + self.chance(slow.max(2)));
        let inode = match &work {
            Work::Effect { inode, .. } => *inode,
            Work::ReadPiece { .. } => None,
            Work::WritePiece { inode, .. } | Work::WriteData { inode, .. } => Some(*inode),
        };
        if let Work::WritePiece { inode, .. } | Work::WriteData { inode, .. } = &work
            && self.sleeper_writes(*inode)
        {
            self.complaints.add(format!(
                "core life {} writes into a file (inode {inode}) that a dead one's worker, asleep in the disk, may still write",
                wires.life
            ));
        }
        if let Some(inode) = inode {
            let turn = self.turns.entry((wires.life, inode)).or_default();
            due = due.max(turn.after_ns(1));
            *turn = due;
        }
        let fails = self.chance(1000) < u64::from(self.mood.errors_permille);
        let error = fails.then(|| {
            if self.chance(2) == 0 {
                Status::IO_ERROR
            } else {
                Status::NO_SPACE
            }
        });
        self.next += 1;
        let job = Job {
            wires: Rc::clone(wires),
            effect,
            vm,
            work,
            error,
            undead: false,
        };
        self.jobs.insert((due, self.next), job);
    }

    /// A dead core's worker, asleep in the disk, is writing there in a VM's name.
    fn sleeper_writes(&self, file: u64) -> bool {
        let mut sleepers = self.jobs.values().filter(|job| job.undead && job.vm != 0);
        sleepers.any(|job| {
            matches!(&job.work, Work::WritePiece { inode, .. } | Work::WriteData { inode, .. } if *inode == file)
        })
    }

    /// When the next work ends.
    #[must_use]
    pub fn next_due(&self) -> Option<Tick> {
        if self.mood.hangs {
            return None;
        }
        self.jobs.keys().next().map(|(due, _)| *due)
    }

    /// Work whose time has come.
    pub fn run(&mut self) {
        let now = self.clock.now();
        while let Some(entry) = self.jobs.first_entry() {
            if self.mood.hangs || entry.key().0 > now {
                break;
            }
            let job = entry.remove();
            if let Work::WritePiece { lease, .. } = &job.work
                && !job.undead
                && !lease.revoked.get()
            {
                for (ram, at, bytes) in &lease.parts {
                    ram.judge_read(*at, *bytes);
                }
            }
            let done = self.disk.perform(&job.work, job.error);
            if !job.undead {
                job.wires.finished.borrow_mut().push_back((job.effect, done));
                job.wires.wake_core.set(true);
            }
        }
    }

    /// A core died. What its workers had begun lands in part, later, or never; true: one of them is in disk sleep.
    pub fn core_died(&mut self, life: u64, undead: bool) -> bool {
        let keys: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.wires.life == life)
            .map(|(key, _)| *key)
            .collect();
        let mut any = false;
        for key in keys {
            let in_sleep = undead && self.chance(2) == 0;
            if !in_sleep {
                let half = self.chance(2) == 0;
                if let Some(job) = self.jobs.remove(&key).filter(|_| half) {
                    self.disk.perform_half(&job.work);
                }
            } else if let Some(mut job) = self.jobs.remove(&key) {
                job.undead = true;
                any = true;
                // It sleeps for longer than a disk usually takes: the next core is there by then.
                let due = key.0.after_ns(self.chance(UNDEAD_NS_MAX));
                self.jobs.insert((due, key.1), job);
            }
        }
        any
    }

    /// VMs for which a dead core's workers, asleep in the disk, still do something.
    #[must_use]
    pub fn haunted(&self) -> BTreeSet<u64> {
        let undead = self.jobs.values().filter(|job| job.undead && job.vm != 0);
        undead.map(|job| job.vm).collect()
    }

    /// Work under way.
    #[must_use]
    pub fn len(&self) -> usize {
        self.jobs.len()
    }
}
