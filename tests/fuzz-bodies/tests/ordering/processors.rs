//! The same without a model: two real processors, a great many rounds.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as RealU64, Ordering};
use std::time::{Duration, Instant};
use vmgmt_device::page::{LifePage, PlainWords, TouchedPage};
use vmgmt_device::rings::testing::{Bed, FlatGuest, FlatMemory, RingPlan};
use vmgmt_device::rings::{Input, Output};
use vmgmt_driver::order::{RingWords, arm, publish};

/// An eventfd made of a word. Waiting for it has an end: a wake-up that does not come is named.
#[derive(Clone, Default)]
struct Bell(Arc<RealU64>);

/// Far more than any scheduler lets a thread wait that can run.
const WATCHDOG: Duration = Duration::from_secs(60);

impl Bell {
    fn ring(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn wait(&self, heard: &Cell<u64>, who: &str, round: u64) {
        let started = Instant::now();
        let mut looks = 0u32;
        loop {
            let rung = self.0.load(Ordering::SeqCst);
            if rung != heard.get() {
                heard.set(rung);
                return;
            }
            looks += 1;
            if looks.is_multiple_of(64) {
                std::thread::yield_now();
                assert!(
                    started.elapsed() < WATCHDOG,
                    "lost wake-up: {who} sleeps for ever in round {round}"
                );
            }
            std::hint::spin_loop();
        }
    }
}

/// Rounds of the tests below. Where more than two processors' worth of other work goes on, each costs two changes of context.
fn rounds() -> u64 {
    std::env::var("VMGMT_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(200_000)
}

/// The rounds end after this time, however many they were: on a processor that others want too, each may take milliseconds.
const ROUNDS_LAST: Duration = Duration::from_secs(30);

/// When the rounds are over: after so many, or when one of the two says so.
#[derive(Clone)]
struct End {
    rounds: u64,
    since: Instant,
    over: Arc<std::sync::atomic::AtomicBool>,
}

impl End {
    fn new() -> Self {
        Self {
            rounds: rounds(),
            since: Instant::now(),
            over: Arc::default(),
        }
    }
    fn is_there(&self, done: u64) -> bool {
        done >= self.rounds || self.over.load(Ordering::SeqCst)
    }
    /// Asked by the one that begins each round, before it does.
    fn begins_no_more(&self, round: u64) -> bool {
        if round.is_multiple_of(256) && self.since.elapsed() > ROUNDS_LAST {
            self.over.store(true, Ordering::SeqCst);
        }
        self.is_there(round)
    }
}

/// The guest's event words in memory that is really shared.
struct FlatWords(FlatGuest);

impl RingWords for FlatWords {
    fn load32(&self, start: usize) -> vmgmt_driver::Result<u32> {
        Ok(self.0.load_u32(start as u64))
    }
    fn store32(&self, start: usize, value: u32) -> vmgmt_driver::Result<()> {
        self.0.store_u32(start as u64, value);
        Ok(())
    }
    fn load64(&self, start: usize) -> vmgmt_driver::Result<u64> {
        Ok(self.0.load_u64(start as u64))
    }
    fn write(&self, start: usize, bytes: &[u8]) -> vmgmt_driver::Result<()> {
        self.0.write(start as u64, bytes);
        Ok(())
    }
}

#[test]
fn rounds_of_a_ring_between_two_processors() {
    let end = End::new();
    let guest = FlatGuest::new(0x2_0000);
    let mut bed = Bed::new(&guest, FlatMemory::new(&guest), PlainWords::new).unwrap();
    let mut plan = RingPlan::new(0, 0, 16, 16, 1);
    bed.enable(&mut plan);
    bed.poll(1);
    bed.outputs();
    let front = bed.front.clone();
    let (to_core, to_guest) = (Bell::default(), Bell::default());
    let (core_bell, guest_bell) = (to_core.clone(), to_guest.clone());
    let core_end = end.clone();
    let core = std::thread::spawn(move || {
        let heard = Cell::new(0);
        let (mut done, mut sleeps) = (0u64, 0u64);
        while !core_end.is_there(done) {
            let turn = bed.poll(16);
            bed.end_turn();
            done += u64::from(turn.fetched);
            for output in bed.outputs() {
                if matches!(output, Output::Signal { .. }) {
                    guest_bell.ring();
                }
            }
            if turn.fetched == 0 && !bed.arm() {
                sleeps += 1;
                core_bell.wait(&heard, "the core", done);
                bed.handle(Input::Touched);
            }
        }
        sleeps
    });
    let words = FlatWords(guest.clone());
    let heard = Cell::new(0);
    let (mut sleeps, mut doorbells, mut round) = (0u64, 0u64, 0u64);
    while !end.begins_no_more(round) {
        let old = plan.tail;
        // Written, not published: the driver's own code does that.
        let slot = u64::from(old % plan.setup.submission_entries) * 64;
        guest.write(plan.setup.submissions + slot, &[0; 64]);
        plan.tail = old.wrapping_add(1);
        if publish(&words, old, plan.tail).unwrap() {
            doorbells += 1;
            front.ring_doorbell(0, plan.tail);
            to_core.ring();
        }
        while plan.take(&guest).is_none() {
            arm(&words, plan.head).unwrap();
            if plan.take(&guest).is_some() {
                break;
            }
            sleeps += 1;
            to_guest.wait(&heard, "the guest", round);
        }
        round += 1;
    }
    to_core.ring();
    let core_sleeps = core.join().unwrap();
    println!(
        "{round} rounds: the guest slept {sleeps} times, the core {core_sleeps} times, {doorbells} doorbells"
    );
    if sleeps == 0 || core_sleeps == 0 {
        // A machine that is busy otherwise may never run both at once.
        vmgmt_testkit::skipped("one of the two never slept on this machine, so its sleep was not tried");
    }
}

#[test]
fn sleeps_of_front_and_core_between_two_processors() {
    let end = End::new();
    let touched = TouchedPage::new(PlainWords::new(TouchedPage::<PlainWords>::WORDS));
    let life = LifePage::new(PlainWords::new(LifePage::<PlainWords>::WORDS));
    let (to_core, to_front) = (Bell::default(), Bell::default());
    let (core_touched, core_life) = (touched.clone(), life.clone());
    let (core_bell, front_bell) = (to_core.clone(), to_front.clone());
    let core_end = end.clone();
    // The core answers each touch with a kick.
    let core = std::thread::spawn(move || {
        let heard = Cell::new(0);
        let (mut seen, mut sleeps) = (0, 0u64);
        while !core_end.is_there(seen) {
            let total = core_touched.total();
            if total == seen {
                if core_life.core_falls_asleep(&core_touched, seen) {
                    sleeps += 1;
                    core_bell.wait(&heard, "the core", seen);
                }
                core_life.set_core_asleep(false);
                continue;
            }
            seen = total;
            core_life.kick(1);
            if core_touched.must_wake_front() {
                front_bell.ring();
            }
        }
        sleeps
    });
    let heard = Cell::new(0);
    let (mut sleeps, mut round) = (0u64, 0u64);
    while !end.begins_no_more(round) {
        let kicks_seen = life.kicks();
        touched.touch(1);
        if life.must_wake_core() {
            to_core.ring();
        }
        while life.kicks() == kicks_seen {
            if touched.front_falls_asleep(&life, kicks_seen) {
                sleeps += 1;
                to_front.wait(&heard, "the front", round);
            }
            touched.set_front_asleep(false);
        }
        round += 1;
    }
    to_core.ring();
    let core_sleeps = core.join().unwrap();
    println!("{round} rounds: the front slept {sleeps} times, the core {core_sleeps} times");
    if sleeps == 0 || core_sleeps == 0 {
        // A machine that is busy otherwise may never run both at once.
        vmgmt_testkit::skipped("one of the two never slept on this machine, so its sleep was not tried");
    }
}
