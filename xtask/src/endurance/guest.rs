//! The endurance runs' simulated guests: the real driver, a thread for letters, one for files, one that takes files in.
//!
//! In: a connected [`SimulatedVm`] and the course. Out: the driver's work, entered into the ledger when the guest knows of it. All waits sleep
//! until an interrupt; a ring has a vector of its own, so that no thread takes another's. It must never know why something failed: only
//! the ledger excuses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use vmgmt_driver::abi::chat::HOST_NAME;
use vmgmt_driver::abi::file::{existing, put};
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_driver::operations::offer::Offer;
use vmgmt_driver::transfer::{Sink, Source};
use vmgmt_driver::{Client, DmaMemory, DriverError, Mode, RingOptions, Status, TransferOptions};
use vmgmt_testkit::guest::{GuestInterrupts, GuestOptions, SimulatedVm};

use super::content::{self, Paper};
use super::crew::{Course, Crew, Hand};
use super::ledger::Way;

/// Vectors, one for each ring of a guest.
const CHAT: u32 = 0;
const FILES: u32 = 1;
const ACCEPTOR: u32 = 2;
pub const PROBE: u32 = 3;
const VECTORS: u32 = 4;
/// RAM of a guest: only what is touched costs anything.
const RAM_BYTES: u64 = 64 << 20;
/// Receives that wait.
const RECEIVES: usize = 8;
/// Longest sleep without a look at the clock.
const NAP: Duration = Duration::from_millis(500);
/// How long an offer may wait for its answer: every acceptor finishes what it has first.
const OFFER_DEADLINE: Duration = Duration::from_secs(60);
/// Of a file, mostly; every so many one is long.
const FILE_BYTES_MAX: u64 = 200_000;
const LONG_EVERY: u64 = 9;
const LONG_BYTES_MAX: u64 = 3_000_000;
/// The share's name.
pub const SHARE: &str = "work";
/// Every so many letters one goes to the host.
const HOST_EVERY: u64 = 8;

/// What a guest does.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: String,
    /// Puts, gets, passes on and takes in files as well.
    pub files: bool,
    /// Between two letters, and between two files.
    pub letter_pause: Duration,
    pub file_pause: Duration,
}

/// How a simulated guest of these runs is connected.
pub fn options() -> GuestOptions {
    GuestOptions::default()
        .ram_bytes(RAM_BYTES)
        .interrupts(GuestInterrupts::Msi(VECTORS))
}

/// A ring that sleeps at once, on a vector of its own.
pub fn ring(vm: &SimulatedVm, mode: Mode, vector: u32) -> Result<Client> {
    vm.ring_with(RingOptions {
        vector,
        spin: Duration::ZERO,
        ..RingOptions::new(mode)
    })
}

/// Puts a guest to work.
pub fn start(crew: &mut Crew, course: &Arc<Course>, vm: &Arc<SimulatedVm>, plan: &Plan) -> Result<()> {
    let (machine, chat, sender) = (Arc::clone(vm), plan.clone(), course.sender());
    crew.hire(course, format!("{}, letters", plan.name), move |course, hand| {
        letters(course, hand, &machine, &chat, sender)
    })?;
    if plan.files {
        let (machine, own) = (Arc::clone(vm), plan.clone());
        crew.hire(course, format!("{}, files", plan.name), move |course, hand| {
            Files::new(course, hand, &machine, &own)?.work(own.file_pause)
        })?;
        let (machine, name) = (Arc::clone(vm), plan.name.clone());
        crew.hire(course, format!("{}, acceptor", plan.name), move |course, hand| {
            Acceptor::new(course, hand, &machine, &name)?.work()
        })?;
    }
    Ok(())
}

fn random(course: &Course, hand: &Hand) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(content::mix(&[&hand.name], course.seed))
}

/// Half to one and a half of a pause.
fn about(random: &mut ChaCha8Rng, pause: Duration) -> Duration {
    pause.mul_f64(0.5 + f64::from(random.next_u32()) / f64::from(u32::MAX))
}

/// One of several that is not oneself.
fn other<'a>(random: &mut ChaCha8Rng, names: &'a [String], own: &str) -> Option<&'a str> {
    let others = names.iter().filter(|name| *name != own).count() as u64;
    let place = usize::try_from(random.next_u64().checked_rem(others)?).ok()?;
    names
        .iter()
        .filter(|name| *name != own)
        .nth(place)
        .map(String::as_str)
}

fn letters(course: &Course, hand: &Hand, vm: &SimulatedVm, plan: &Plan, sender: Arc<()>) -> Result<()> {
    let mut sender = Some(sender);
    let mut chance = random(course, hand);
    let mut chat = ring(vm, Mode::CHAT, CHAT)?;
    let mut receiver = Receiver::default();
    let mut next = Instant::now() + about(&mut chance, plan.letter_pause);
    let mut sent = 0_u64;
    while !course.over() {
        if course.working() && Instant::now() >= next {
            next = Instant::now() + about(&mut chance, plan.letter_pause);
            sent += 1;
            let target = match sent.is_multiple_of(HOST_EVERY) {
                true => Some(HOST_NAME),
                false => other(&mut chance, &course.addressees, &plan.name),
            };
            if let Some(target) = target {
                send(course, hand, &mut chat, &plan.name, target)?;
            }
        }
        if !course.working() {
            drop(sender.take());
        }
        hand.doing("waiting for letters");
        chat.post_receives(&mut receiver, RECEIVES)?;
        let until = Instant::now() + NAP;
        let until = if course.working() { until.min(next) } else { until };
        if let Some(message) = chat.receive(&mut receiver, Some(until))? {
            course
                .ledger
                .received(&plan.name, &message.source_name, &message.bytes);
        }
    }
    Ok(())
}

/// Whatever happens to the core, a letter is taken or refused for a budget; there is no third answer.
fn send(course: &Course, hand: &Hand, chat: &mut Client, own: &str, target: &str) -> Result<()> {
    let sequence = course.ledger.number(own, target, false);
    let text = content::letter(own, target, sequence, false);
    hand.doing(format!("sending letter {sequence} to {target}"));
    // Half of them with an idempotency key, though nobody repeats them: both ways must hold.
    let key = if sequence.is_multiple_of(2) { sequence } else { 0 };
    match chat.send(target, text.as_bytes(), key) {
        Ok(_) => course.ledger.accepted(own, target, sequence, text.len()),
        Err(error) if error.status() == Some(Status::OVER_BUDGET) => course.ledger.refused(),
        Err(error) => {
            return Err(anyhow::Error::new(error).context(format!("letter {sequence} to {target}")));
        }
    }
    Ok(())
}

/// Bytes of this program as a source.
struct Reading<'a>(&'a [u8]);

impl Source for Reading<'_> {
    fn fill(&mut self, memory: &DmaMemory, start: usize, length: usize) -> vmgmt_driver::Result<usize> {
        let (now, rest) = self.0.split_at(length.min(self.0.len()));
        memory.write(start, now)?;
        self.0 = rest;
        Ok(now.len())
    }
}

/// Bytes of this program as a sink.
#[derive(Default)]
struct Collecting(Vec<u8>);

impl Sink for Collecting {
    fn take(&mut self, memory: &DmaMemory, start: usize, length: usize) -> vmgmt_driver::Result<()> {
        self.0.extend_from_slice(&memory.to_vec(start, length)?);
        Ok(())
    }
}

const fn transfer() -> TransferOptions {
    TransferOptions {
        chunk_bytes: 64 << 10,
        chunks_in_flight: 4,
        check: true,
    }
}

struct Files<'a> {
    course: &'a Course,
    hand: &'a Hand,
    name: &'a str,
    ring: Client,
    chance: ChaCha8Rng,
    count: u64,
}

impl<'a> Files<'a> {
    fn new(course: &'a Course, hand: &'a Hand, vm: &SimulatedVm, plan: &'a Plan) -> Result<Self> {
        Ok(Self {
            course,
            hand,
            name: &plan.name,
            ring: ring(vm, Mode::FILE, FILES)?,
            chance: random(course, hand),
            count: 0,
        })
    }

    fn work(mut self, pause: Duration) -> Result<()> {
        while self.course.working() {
            match self.chance.next_u32() % 3 {
                0 => self.put()?,
                1 => self.get()?,
                _ => self.pass_on()?,
            }
            self.hand.doing("resting");
            let until = Instant::now() + about(&mut self.chance, pause);
            while self.course.working() && Instant::now() < until {
                std::thread::sleep(until.saturating_duration_since(Instant::now()).min(NAP));
            }
        }
        Ok(())
    }

    fn paper(&mut self, kind: &str) -> Paper {
        self.count += 1;
        let most = match self.count.is_multiple_of(LONG_EVERY) {
            true => LONG_BYTES_MAX,
            false => FILE_BYTES_MAX,
        };
        let length = usize::try_from(self.chance.next_u64() % most).unwrap_or(0);
        let seed = content::mix(&[self.name, kind], self.count);
        Paper::new(kind, self.count, seed, length)
    }

    /// Puts a file, looks at it on the host, gets it back, removes it.
    fn put(&mut self) -> Result<()> {
        let paper = self.paper(self.name);
        let path = format!("{SHARE}/{}", paper.name);
        let data = paper.bytes();
        self.course.ledger.begun(Way::Put);
        let (mut again, mut unknown) = (false, false);
        loop {
            let since = self.course.ledger.epoch();
            self.hand.doing(format!("putting {path}"));
            match self.put_once(&path, &data, again) {
                Ok(()) => break,
                // The COMMIT of which nobody knew the outcome was done; the bytes are compared below.
                Err(error) if unknown && error.status() == Some(Status::EXISTS) => break,
                Err(error) => {
                    unknown |= error.status() == Some(Status::OUTCOME_UNKNOWN);
                    again = true;
                    self.excuse(&format!("put of {path}"), error, since)?;
                }
            }
        }
        let found = std::fs::read(self.course.share.join(&paper.name))
            .with_context(|| format!("{path} was put and is not there"))?;
        paper.check(&found).context("put")?;
        self.course.ledger.done(Way::Put, found.len());
        self.fetch(&paper)?;
        self.remove(&path)
    }

    fn excuse(&self, what: &str, error: DriverError, since: u64) -> Result<()> {
        self.course.ledger.excuse(self.name, what, error, since)
    }

    /// `again`: an attempt before broke off, and its beginning may be there.
    fn put_once(&mut self, path: &str, data: &[u8], again: bool) -> vmgmt_driver::Result<()> {
        let resume = if again { put::RESUME } else { 0 };
        let begun = self
            .ring
            .put(path, data.len() as u64, existing::REFUSE | resume)?;
        let written = self.fill(begun.handle, begun.resumed_bytes, data);
        written.inspect_err(|_| {
            // A handle of an earlier core life is gone anyway.
            let _closed = self.ring.close(begun.handle);
        })
    }

    fn fill(&mut self, handle: u64, there: u64, data: &[u8]) -> vmgmt_driver::Result<()> {
        let there = usize::try_from(there)
            .ok()
            .filter(|there| *there <= data.len())
            .ok_or_else(|| DriverError::BadArgument(format!("{there} bytes are there of {}", data.len())))?;
        let (before, rest) = data.split_at(there);
        let mine = crc32fast::hash(before);
        if there > 0 {
            let (bytes, theirs) = self.ring.checksum(handle, 0, there as u64)?;
            if (bytes, theirs) != (there as u64, mine) {
                return Err(DriverError::Integrity {
                    what: format!("the first {there} bytes of a put that broke off"),
                    expected: mine,
                    found: theirs,
                });
            }
        }
        let prefix = (there > 0).then_some((there as u64, mine));
        let done = self
            .ring
            .write_all(handle, prefix, &mut Reading(rest), &transfer(), &mut |_| {})?;
        self.ring
            .commit(handle, done.bytes, done.checksum, false)
            .map(drop)
    }

    fn get(&mut self) -> Result<()> {
        let count = self.course.library.len() as u64;
        let place = self.chance.next_u64().checked_rem(count).unwrap_or(0);
        let library = &self.course.library;
        match usize::try_from(place).ok().and_then(|place| library.get(place)) {
            Some(paper) => self.fetch(paper),
            None => Ok(()),
        }
    }

    /// Gets a file and compares it; goes on where it broke off.
    fn fetch(&mut self, paper: &Paper) -> Result<()> {
        let path = format!("{SHARE}/{}", paper.name);
        self.course.ledger.begun(Way::Get);
        let mut got = Collecting::default();
        loop {
            let since = self.course.ledger.epoch();
            self.hand
                .doing(format!("getting {path} from byte {}", got.0.len()));
            match self.fetch_once(&path, &mut got) {
                Ok(()) => break,
                Err(error) => self.excuse(&format!("get of {path}"), error, since)?,
            }
        }
        paper.check(&got.0).context("get")?;
        self.course.ledger.done(Way::Get, got.0.len());
        Ok(())
    }

    fn fetch_once(&mut self, path: &str, got: &mut Collecting) -> vmgmt_driver::Result<()> {
        let file = self.ring.open_for_reading(path)?;
        let at = got.0.len() as u64;
        let read = self
            .ring
            .get(file.handle, at, file.size, got, &transfer(), &mut |_| {});
        // All is here; whether the handle is still known does not matter.
        let _closed = self.ring.close(file.handle);
        read.map(drop)
    }

    fn remove(&mut self, path: &str) -> Result<()> {
        self.course.ledger.begun(Way::Remove);
        let mut unknown = false;
        loop {
            let since = self.course.ledger.epoch();
            self.hand.doing(format!("removing {path}"));
            match self.ring.remove(path) {
                Ok(()) => break,
                Err(error) if unknown && error.status() == Some(Status::NO_SUCH_NAME) => break,
                Err(error) => {
                    unknown |= error.status() == Some(Status::OUTCOME_UNKNOWN);
                    self.excuse(&format!("remove of {path}"), error, since)?;
                }
            }
        }
        self.course.ledger.done(Way::Remove, 0);
        Ok(())
    }

    /// Hands a file to another guest.
    fn pass_on(&mut self) -> Result<()> {
        let Some(target) = other(&mut self.chance, &self.course.acceptors, self.name) else {
            return Ok(());
        };
        let paper = self.paper("pass");
        let data = paper.bytes();
        loop {
            let since = self.course.ledger.epoch();
            self.hand.doing(format!("passing {} to {target}", paper.name));
            match offer(&mut self.ring, target, &paper, 0, &data) {
                Ok(()) => break,
                Err(error) => {
                    self.course.ledger.broke(self.name, target, &paper.name);
                    self.excuse(&format!("pass of {} to {target}", paper.name), error, since)?;
                }
            }
        }
        self.course
            .ledger
            .sent(self.name, target, &paper.name, data.len());
        Ok(())
    }
}

fn offer(
    ring: &mut Client,
    target: &str,
    paper: &Paper,
    answers: u64,
    data: &[u8],
) -> vmgmt_driver::Result<()> {
    let size = Some(data.len() as u64);
    let stream = ring.offer(target, &paper.name, size, answers, Some(OFFER_DEADLINE))?;
    let sent = ring.stream_send(stream, &mut Reading(data), &transfer(), &mut |_| {});
    sent.map(drop).inspect_err(|_| {
        let _aborted = ring.close(stream);
    })
}

/// Takes in what others offer, and gives the host what it asks for.
struct Acceptor<'a> {
    course: &'a Course,
    hand: &'a Hand,
    name: &'a str,
    ring: Client,
}

impl<'a> Acceptor<'a> {
    fn new(course: &'a Course, hand: &'a Hand, vm: &SimulatedVm, name: &'a str) -> Result<Self> {
        let ring = ring(vm, Mode::FILE, ACCEPTOR)?;
        Ok(Self {
            course,
            hand,
            name,
            ring,
        })
    }

    fn work(mut self) -> Result<()> {
        let mut posted = self.ring.post_next_offer()?;
        while !self.course.over() {
            self.hand.doing("waiting for an offer");
            // A wait for an offer holds no handle: it outlives every core, without an error.
            let Some(offer) = self.ring.next_offer(posted, Some(Instant::now() + NAP))? else {
                continue;
            };
            posted = self.ring.post_next_offer()?;
            let since = self.course.ledger.epoch();
            self.hand
                .doing(format!("with {} of {}", offer.file_name, offer.source_name));
            match offer.is_request {
                true => self.serve(&offer, since)?,
                false => self.take(&offer, since)?,
            }
        }
        Ok(())
    }

    fn take(&mut self, offer: &Offer, since: u64) -> Result<()> {
        let (source, name) = (&offer.source_name, &offer.file_name);
        let paper = Paper::from_name(name).with_context(|| format!("{source} offered {name}"))?;
        let what = format!("take of {name} from {source}");
        let mut received = Collecting::default();
        let taken = self.ring.accept(offer.handle).and_then(|stream| {
            let done = self
                .ring
                .stream_receive(stream, &mut received, &transfer(), &mut |_| {})?;
            Ok((stream, done))
        });
        let stream = match taken {
            Ok((stream, (done, theirs))) => {
                ensure!(
                    theirs.is_some() && done.matches(theirs),
                    "{what}: the sender's checksum is another one"
                );
                paper.check(&received.0).with_context(|| what.clone())?;
                // Before it is confirmed: the sender must never know more than we have.
                self.course.ledger.took(source, self.name, name, received.0.len());
                stream
            }
            Err(error) => {
                self.course.ledger.broke(source, self.name, name);
                return self.course.ledger.excuse(self.name, &what, error, since);
            }
        };
        match self.ring.stream_confirm(stream, Status::OK) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.course.ledger.broke(source, self.name, name);
                self.course.ledger.excuse(self.name, &what, error, since)
            }
        }
    }

    fn serve(&mut self, request: &Offer, since: u64) -> Result<()> {
        let paper = Paper::from_name(&request.file_name)
            .with_context(|| format!("the host asked for {}", request.file_name))?;
        let data = paper.bytes();
        match offer(&mut self.ring, HOST_NAME, &paper, request.handle, &data) {
            Ok(()) => {
                self.course
                    .ledger
                    .sent(self.name, HOST_NAME, &paper.name, data.len());
                Ok(())
            }
            Err(error) => {
                self.course.ledger.broke(self.name, HOST_NAME, &paper.name);
                let what = format!("serve of {}", paper.name);
                self.course.ledger.excuse(self.name, &what, error, since)
            }
        }
    }
}
