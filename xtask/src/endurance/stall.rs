//! The endurance runs' stop watches: how long a register access and a completion waited while something was replaced.
//!
//! In: simulated guests with nothing else to do, and windows of time. Out: the longest wait in each window, for registers and completions apart;
//! median, p99 and most over all windows of a kind.
//!
//! A register access: one read of BAR0 over the vfio-user connection, from the request to its answer, as QEMU would wait with its whole
//! VM. A completion: one no-op through a ring, from its submission to the sleep's end. Both begin again about a millisecond after
//! they ended, so that (but for that millisecond) the wait that a window catches began when the window did.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vmgmt_driver::abi::registers;
use vmgmt_driver::backing::Backing;
use vmgmt_driver::{Client, Mode};
use vmgmt_testkit::guest::{SimulatedVm, SocketBacking};

use super::crew::{Course, Crew};
use super::guest::{PROBE, ring};

/// Between two accesses: the machine belongs to the daemon.
const PAUSE: Duration = Duration::from_millis(1);
/// A watch that was not round once in this time is dead.
const ROUND_DEADLINE: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// One watch: its longest wait since the window was opened, and when its last round began.
struct Watch {
    longest_ns: AtomicU64,
    last_begin_ns: AtomicU64,
}

/// All watches of a run.
pub struct Watches {
    begin: Instant,
    registers: Vec<Arc<Watch>>,
    completions: Vec<Arc<Watch>>,
}

/// The longest wait of each watch in one window.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub registers: Vec<Duration>,
    pub completions: Vec<Duration>,
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Watches {
    /// A watch on the registers of each of these machines, and one on the completions of each of those.
    pub fn start(
        crew: &mut Crew,
        course: &Arc<Course>,
        registers: Vec<Arc<SocketBacking>>,
        completions: &[Arc<SimulatedVm>],
    ) -> Result<Self> {
        let begin = Instant::now();
        let mut watches = Self {
            begin,
            registers: Vec::new(),
            completions: Vec::new(),
        };
        for (number, machine) in registers.into_iter().enumerate() {
            let work = move || {
                let value = machine.read32(registers::MAGIC)?;
                ensure!(value == vmgmt_driver::abi::MAGIC, "a register reads {value:#x}");
                Ok(())
            };
            let watch = watch(crew, course, format!("register watch {number}"), begin, || {
                Ok(work)
            })?;
            watches.registers.push(watch);
        }
        for (number, vm) in completions.iter().enumerate() {
            let vm = Arc::clone(vm);
            let open = move || {
                let mut ring: Client = ring(&vm, Mode::COMMON, PROBE)?;
                Ok(move || Ok(ring.noop()?))
            };
            let watch = watch(crew, course, format!("completion watch {number}"), begin, open)?;
            watches.completions.push(watch);
        }
        Ok(watches)
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Watch>> {
        self.registers.iter().chain(&self.completions)
    }

    /// Opens a window.
    pub fn open(&self) -> Instant {
        for watch in self.all() {
            watch.longest_ns.store(0, Ordering::SeqCst);
        }
        Instant::now()
    }

    /// Closes it, after each watch was round at least once with a round that began behind `after`.
    pub fn close(&self, after: Instant) -> Result<Sample> {
        let after_ns = ns(after.saturating_duration_since(self.begin));
        let deadline = Instant::now() + ROUND_DEADLINE;
        while self
            .all()
            .any(|watch| watch.last_begin_ns.load(Ordering::SeqCst) <= after_ns)
        {
            ensure!(
                Instant::now() < deadline,
                "a watch was not round once in {ROUND_DEADLINE:?}: a register or a completion is not answered"
            );
            std::thread::sleep(LOOK_AGAIN);
        }
        let read = |watches: &[Arc<Watch>]| {
            let times = watches
                .iter()
                .map(|watch| Duration::from_nanos(watch.longest_ns.load(Ordering::SeqCst)));
            times.collect()
        };
        Ok(Sample {
            registers: read(&self.registers),
            completions: read(&self.completions),
        })
    }
}

fn watch<W>(
    crew: &mut Crew,
    course: &Arc<Course>,
    name: String,
    begin: Instant,
    open: impl FnOnce() -> Result<W> + Send + 'static,
) -> Result<Arc<Watch>>
where
    W: FnMut() -> Result<()>,
{
    let watch = Arc::new(Watch {
        longest_ns: AtomicU64::new(0),
        last_begin_ns: AtomicU64::new(0),
    });
    let own = Arc::clone(&watch);
    crew.hire(course, name, move |course, hand| {
        let mut work = open()?;
        while !course.over() {
            hand.doing("one round");
            let round = Instant::now();
            work()?;
            own.longest_ns.fetch_max(ns(round.elapsed()), Ordering::SeqCst);
            own.last_begin_ns
                .store(ns(round.saturating_duration_since(begin)), Ordering::SeqCst);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    })?;
    Ok(watch)
}

/// Windows of one kind.
#[derive(Clone, Debug, Default)]
struct Series {
    windows: u64,
    registers: Vec<Duration>,
    completions: Vec<Duration>,
}

/// Figures of many.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    pub median_ms: f64,
    pub p99_ms: f64,
    pub most_ms: f64,
}

/// All windows.
#[derive(Clone, Debug, Default)]
pub struct Stalls {
    series: BTreeMap<String, Series>,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Line {
    pub kind: String,
    pub windows: u64,
    pub registers: Figures,
    pub completions: Figures,
}

impl Stalls {
    pub fn add(&mut self, kind: &str, sample: &Sample) {
        let series = self.series.entry(kind.into()).or_default();
        series.windows += 1;
        series.registers.extend(&sample.registers);
        series.completions.extend(&sample.completions);
    }

    pub fn lines(&self) -> Vec<Line> {
        let line = |(kind, series): (&String, &Series)| Line {
            kind: kind.clone(),
            windows: series.windows,
            registers: figures(&series.registers),
            completions: figures(&series.completions),
        };
        self.series.iter().map(line).collect()
    }
}

fn figures(times: &[Duration]) -> Figures {
    let mut times = times.to_vec();
    times.sort_unstable();
    // Nearest rank: the smallest value that so many are not above.
    let at = |share: f64| {
        let rank = (share * times.len() as f64).ceil() as usize;
        times
            .get(rank.saturating_sub(1))
            .map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    Figures {
        median_ms: at(0.5),
        p99_ms: at(0.99),
        most_ms: at(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_nearest_ranks() {
        let times: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        let figures = figures(&times);
        assert_eq!(
            (figures.median_ms, figures.p99_ms, figures.most_ms),
            (100.0, 198.0, 200.0)
        );
        assert_eq!(super::figures(&[]), Figures::default());
    }
}
