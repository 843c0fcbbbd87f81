//! The endurance runs' crew: threads that work until they are told to stop, and say what they are doing.
//!
//! In: work. Out: its errors in the ledger, and, where somebody does not come home, what it was doing. It must never know what the work is.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmgmt_testkit::process::locked;

use super::content::Paper;
use super::ledger::Ledger;

/// Enough for the driver and a listing; 600 threads of it are 150 MiB of address space.
const STACK_BYTES: usize = 256 << 10;
/// Between two looks whether a thread has come home.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What all of one run share.
pub struct Course {
    pub ledger: Ledger,
    /// Who gets letters, `host` not among them.
    pub addressees: Vec<String>,
    /// Who answers offers of files.
    pub acceptors: Vec<String>,
    /// The folder behind the share `work`.
    pub share: PathBuf,
    /// Files that lie in it from the beginning, for reading.
    pub library: Vec<Paper>,
    pub seed: u64,
    phase: AtomicU8,
    /// One more reference for each thread that may still send letters.
    senders: Arc<()>,
}

const WORKING: u8 = 0;
const QUIET: u8 = 1;
const OVER: u8 = 2;

impl Course {
    pub fn new(ledger: Ledger, share: PathBuf, seed: u64) -> Self {
        Self {
            ledger,
            addressees: Vec::new(),
            acceptors: Vec::new(),
            share,
            library: Vec::new(),
            seed,
            phase: AtomicU8::new(WORKING),
            senders: Arc::default(),
        }
    }

    /// Whether new work is begun.
    pub fn working(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == WORKING
    }

    /// To be held by whoever sends letters, until it has seen that no new work is begun.
    pub fn sender(&self) -> Arc<()> {
        Arc::clone(&self.senders)
    }

    /// Whether somebody may still send a letter.
    pub fn sending(&self) -> bool {
        Arc::strong_count(&self.senders) > 1
    }

    /// Whether all go home.
    pub fn over(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == OVER
    }

    /// Nothing new is begun; what is under way is finished, what comes is taken.
    pub fn quiet(&self) {
        self.phase.store(QUIET, Ordering::SeqCst);
    }

    pub fn end(&self) {
        self.phase.store(OVER, Ordering::SeqCst);
    }
}

/// One thread's own things.
pub struct Hand {
    pub name: String,
    doing: Arc<Mutex<(String, Instant)>>,
}

impl Hand {
    /// Says what it is about to do.
    pub fn doing(&self, what: impl Into<String>) {
        *locked(&self.doing) = (what.into(), Instant::now());
    }
}

struct Member {
    name: String,
    doing: Arc<Mutex<(String, Instant)>>,
    thread: JoinHandle<()>,
}

/// All threads of a run.
#[derive(Default)]
pub struct Crew {
    members: Vec<Member>,
}

impl Crew {
    /// Lets a thread do `work`; its error is a mismatch.
    pub fn hire(
        &mut self,
        course: &Arc<Course>,
        name: String,
        work: impl FnOnce(&Course, &Hand) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let doing = Arc::new(Mutex::new((String::from("beginning"), Instant::now())));
        let hand = Hand {
            name: name.clone(),
            doing: Arc::clone(&doing),
        };
        let course = Arc::clone(course);
        let run = move || {
            if let Err(error) = work(&course, &hand) {
                let doing = locked(&hand.doing).0.clone();
                course
                    .ledger
                    .mismatch(format!("{} gave up ({doing}): {error:#}", hand.name));
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .stack_size(STACK_BYTES)
            .spawn(run)
            .with_context(|| format!("starting a thread for {name}"))?;
        self.members.push(Member { name, doing, thread });
        Ok(())
    }

    /// Waits until all are home. Who is not by `deadline` is a mismatch, with what it was doing.
    pub fn wait(self, course: &Course, deadline: Duration) {
        let end = Instant::now() + deadline;
        for Member { name, doing, thread } in self.members {
            while !thread.is_finished() && Instant::now() < end {
                std::thread::sleep(LOOK_AGAIN);
            }
            if thread.is_finished() {
                if thread.join().is_err() {
                    course.ledger.mismatch(format!("{name} panicked"));
                }
                continue;
            }
            let (what, since) = locked(&doing).clone();
            let seconds = since.elapsed().as_secs_f64();
            course
                .ledger
                .mismatch(format!("{name} hangs for {seconds:.0} s: {what}"));
        }
    }
}
