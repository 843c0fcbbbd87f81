//! GARDEN, an honest guest: its driver and its programs, one action at a time.
//!
//! In: chance, completions, interrupts, answers of its VM's process. Out: submissions, register accesses; what it did and saw goes to the shadow.
//! It believes only what the contract with guests promises.

mod completions;
mod submissions;

use crate::chance::Chance;
use crate::files::{Files, Step as FileStep};
use crate::front::Front;
use crate::limits::{ARENA, BUFFER_BYTES, BUFFERS, PLUGGED, RING_ENTRIES};
use crate::offers::{Offers, Step as OfferStep};
use crate::ring::Ring;
use crate::shadow::{ALL, Fate, HEAD_BYTES, HOST, Shadow};
use crate::vm::{About, Vm};
use vmgmt_abi::registers as abi;
use vmgmt_abi::ring::completion_flag;
use vmgmt_abi::{Budget, Completion, Mode, Opcode, Status, Submission, chat, feature};

/// The host's page.
const HOST_PAGE: u64 = 0x5000;
const HOST_PAGE_BYTES: u64 = size_of::<abi::HostPage>() as u64;
/// Ring of chat, ring of files.
pub const CHAT: usize = 0;
pub const FILES: usize = 1;

/// Everything a guest's action may touch.
pub struct Site<'a> {
    pub vm: &'a mut Vm,
    pub front: &'a mut Front,
    pub shadow: &'a mut Shadow,
    pub chance: &'a mut Chance,
    pub complain: &'a dyn Fn(String),
    /// Numbers of all VMs.
    pub peers: &'a [u64],
    pub suppression: bool,
}

/// What is in flight.
#[derive(Clone, Debug)]
pub enum Kind {
    Noop,
    Echo,
    Identity,
    Publish,
    Peers,
    Cancel,
    Send { number: u64, plugged: bool },
    Receive,
    File(FileStep),
    Offer(OfferStep),
}

/// A submission in flight.
#[derive(Clone, Debug)]
pub struct Flight {
    pub kind: Kind,
    first: usize,
    buffers: usize,
    /// Data area.
    data: u64,
    data_bytes: u64,
    meta: Vec<u8>,
    /// It may end as CANCELLED or TIMED_OUT.
    cut: bool,
    /// What [`Guest::dma_ends`] said when it was published; `None`: there was no DMA then.
    dma: Option<u64>,
}

/// Where the driver stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    Off,
    /// Connected; the device is to be set up.
    Blank,
    Running,
    /// The reset register was written; BLANK is awaited.
    Resetting,
    /// A reset that the VM's process asked for; its answer is awaited.
    FunctionReset,
    /// The process is gone; the end of its session is awaited.
    Leaving,
}

/// The guest.
#[derive(Debug)]
pub struct Guest {
    pub state: State,
    pub rings: Vec<Ring<Flight>>,
    used: [bool; BUFFERS],
    next_tag: u32,
    /// Parts of the message that is being received: whose, and what came.
    partial: Option<(u64, u64, Vec<u8>)>,
    pub files: Files,
    pub offers: Offers,
    pub bus_master: bool,
    /// How often DMA was to end by now: bus mastering off, a reset.
    dma_ends: u64,
}

/// What a guest may do; the weights are the plan's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    Noop,
    Echo,
    Identity,
    Publish,
    Peers,
    Cancel,
    Send,
    SendHost,
    SendAll,
    Receive,
    File,
    Reap,
    Sleep,
    Look,
    Reset,
    FunctionReset,
    ToggleRing,
    BusMaster,
    Plug,
    Leave,
}

impl Act {
    /// All of them, and how often.
    pub const BASE: [(Self, u32); 20] = [
        (Self::Noop, 8),
        (Self::Echo, 20),
        (Self::Identity, 4),
        (Self::Publish, 4),
        (Self::Peers, 4),
        (Self::Cancel, 6),
        (Self::Send, 60),
        (Self::SendHost, 6),
        (Self::SendAll, 6),
        (Self::Receive, 70),
        (Self::File, 80),
        (Self::Reap, 120),
        (Self::Sleep, 30),
        (Self::Look, 10),
        (Self::Reset, 2),
        (Self::FunctionReset, 2),
        (Self::ToggleRing, 3),
        (Self::BusMaster, 3),
        (Self::Plug, 6),
        (Self::Leave, 2),
    ];
}

impl Guest {
    pub fn new(vm: u64) -> Self {
        Self {
            state: State::Off,
            rings: vec![Ring::new(CHAT, Mode::CHAT), Ring::new(FILES, Mode::FILE)],
            used: [false; BUFFERS],
            next_tag: 1,
            partial: None,
            files: Files::new(vm),
            offers: Offers::new(vm),
            bus_master: false,
            dma_ends: 0,
        }
    }

    /// What must be done before anything else: the answers of the VM's process, the driver's set-up. True: the guest runs.
    pub fn settle(&mut self, site: &mut Site<'_>) -> bool {
        site.vm.step(site.front);
        while let Some(about) = site.vm.ended.pop_front() {
            match about {
                About::FunctionReset => self.was_reset(site, "the function was reset"),
                About::BusMaster(on) => self.bus_master = on,
                _ => {}
            }
        }
        let over = site
            .vm
            .session
            .is_some_and(|session| !site.front.clients.contains_key(&session));
        if over {
            if self.state != State::Leaving {
                (site.complain)(format!("VM {}: its session is gone", site.vm.number));
            }
            self.was_reset(site, "the session has ended");
            site.vm.gone();
            self.state = State::Off;
        }
        if !site.vm.is_free() {
            return false;
        }
        match self.state {
            State::Off | State::Leaving | State::FunctionReset => false,
            State::Blank => {
                if !self.bus_master {
                    site.vm.bus_master(true);
                    return false;
                }
                self.set_up(site);
                true
            }
            State::Resetting => {
                if site.vm.register(site.front, abi::STATE) == abi::DeviceState::BLANK.0 {
                    self.was_reset(site, "the reset register said BLANK");
                }
                false
            }
            State::Running => {
                self.doorbells(site);
                self.closed_rings(site);
                true
            }
        }
    }

    /// Its process starts.
    pub fn start(&mut self, site: &mut Site<'_>) {
        site.vm.connect(site.front, site.suppression);
        self.state = State::Blank;
        self.bus_master = false;
    }

    fn set_up(&mut self, site: &mut Site<'_>) {
        if site.vm.register(site.front, abi::MAGIC) != vmgmt_abi::MAGIC {
            (site.complain)(format!("VM {}: no device there", site.vm.number));
        }
        let features = feature::HOST_PAGE
            | feature::MODE_FILE
            | feature::MODE_CHAT
            | if site.suppression {
                feature::EVENT_SUPPRESSION
            } else {
                0
            };
        site.vm
            .set_register(site.front, abi::FEATURES_ACK_LOW, features as u32);
        site.vm
            .set_register(site.front, abi::FEATURES_ACK_HIGH, (features >> 32) as u32);
        site.vm.ram.quiet.set(None);
        site.vm.ram.expect(HOST_PAGE, HOST_PAGE_BYTES);
        site.vm
            .set_register(site.front, abi::HOST_PAGE_LOW, HOST_PAGE as u32);
        site.vm.set_register(site.front, abi::HOST_PAGE_HIGH, 0);
        for n in 0..self.rings.len() {
            self.enable(site, n);
        }
        self.state = State::Running;
    }

    fn enable(&mut self, site: &mut Site<'_>, n: usize) {
        let nonce = site.chance.any() | 1;
        let ring = &mut self.rings[n];
        ring.prepare(&site.vm.ram, nonce);
        ring.interrupts_seen = site.vm.eventfds.get(n).map_or(0, |fd| fd.get());
        let base = abi::RINGS + n as u32 * abi::RING_STRIDE;
        let writes = [
            (abi::RING_SUBMISSIONS_LOW, ring.submissions() as u32),
            (abi::RING_SUBMISSIONS_HIGH, 0),
            (abi::RING_COMPLETIONS_LOW, ring.completions() as u32),
            (abi::RING_COMPLETIONS_HIGH, 0),
            (abi::RING_EVENTS_LOW, ring.base as u32),
            (abi::RING_EVENTS_HIGH, 0),
            (abi::RING_SUBMISSION_ENTRIES, RING_ENTRIES),
            (abi::RING_COMPLETION_ENTRIES, RING_ENTRIES),
            (abi::RING_MODE, ring.mode.0),
            (abi::RING_VECTOR, n as u32),
            (abi::RING_NONCE_LOW, nonce as u32),
            (abi::RING_NONCE_HIGH, (nonce >> 32) as u32),
            (abi::RING_ENABLE, 1),
        ];
        for (offset, value) in writes {
            site.vm.set_register(site.front, base + offset, value);
        }
        ring.enabled = true;
    }

    fn doorbells(&mut self, site: &mut Site<'_>) {
        for ring in &mut self.rings {
            if ring.enabled && std::mem::take(&mut ring.doorbell_due) {
                let at = abi::DOORBELLS + 4 * ring.n as u32;
                site.vm.set_register(site.front, at, ring.tail());
            }
        }
    }

    fn closed_rings(&mut self, site: &mut Site<'_>) {
        for n in 0..self.rings.len() {
            if !self.rings[n].closing {
                continue;
            }
            let at = abi::RINGS + n as u32 * abi::RING_STRIDE + abi::RING_STATUS;
            if site.vm.register(site.front, at) & 0xff == abi::RingState::CLOSED.0 {
                self.drop_ring(site, n);
                self.enable(site, n);
            }
        }
    }

    /// The device was reset, and said that its DMA is over: what it has published counts, what it has not is cancelled.
    fn was_reset(&mut self, site: &mut Site<'_>, why: &'static str) {
        for n in 0..self.rings.len() {
            self.drop_ring(site, n);
        }
        self.offers.reset();
        site.vm.ram.forbid_all();
        site.vm.ram.quiet.set(Some(why));
        self.state = State::Blank;
        if why != "the reset register said BLANK" {
            self.bus_master = false;
        }
    }

    fn drop_ring(&mut self, site: &mut Site<'_>, n: usize) {
        self.reap(site, n, usize::MAX);
        let flights = std::mem::take(&mut self.rings[n].flights);
        for flight in flights.into_values() {
            self.free(site, &flight);
            match flight.kind {
                Kind::Send { number, .. } => site.shadow.sent(site.vm.number, number, Fate::Unknown, 0),
                Kind::File(step) => self.files.lost(site.shadow, step),
                Kind::Offer(step) => self.offers.lost(site.shadow, step),
                _ => {}
            }
        }
        if n == CHAT {
            // What came of a message goes with its ring; it comes again from its start.
            self.partial = None;
        }
        if n == FILES {
            self.files.reset(site.shadow);
        }
        self.rings[n].retire(&site.vm.ram);
        if n == CHAT {
            site.shadow.sharpen(site.vm.number);
        }
    }
}
