//! The endurance runs' trouble: the core killed, killed again, killed while it adopts, stopped; and parts upgraded.
//!
//! In: a daemon, a plan. Out: each disruption in the ledger, with the stalls that it caused. It must never touch another process than the
//! daemon's own children.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use rustix::process::Signal;
use vmgmt_ctl::protocol::{Part, UpgradeReport, UpgradeState};
use vmgmt_testkit::process::{Daemon, wait_until};

use super::crew::Course;
use super::deaths::{Cause, unexplained};
use super::operator::ask_status;
use super::stall::{Stalls, Watches};

/// How long a core, or a part that is upgraded, may take to be in service again.
const BACK_DEADLINE: Duration = Duration::from_secs(60);
/// Longest wait between a new core's birth and its death: adoption of some hundred sessions.
const ADOPTION_MS: u64 = 60;
/// A window in which nothing happens, to compare with.
const QUIET_WINDOW: Duration = Duration::from_millis(300);
/// How a part says that it cannot be upgraded at all.
const UNSUPPORTED: &str = "not supported by this build";
/// After a part is in service again: what the guests submit now belongs to the window.
const AFTERWARDS: Duration = Duration::from_millis(100);

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `kill -9` of the core.
    Kill,
    /// And of the next one as soon as it is there.
    KillTwice,
    /// And of the next one while it adopts the sessions.
    KillWhileAdopting,
    /// The core is stopped until its beat is missed and the front has it killed.
    Stop,
    /// `vmgmtctl upgrade` of a part, to the same program.
    Upgrade(Part),
}

impl Kind {
    pub fn name(self) -> String {
        match self {
            Self::Kill => "kill -9".into(),
            Self::KillTwice => "kill -9 twice".into(),
            Self::KillWhileAdopting => "kill -9 while adopting".into(),
            Self::Stop => "core stopped".into(),
            Self::Upgrade(part) => format!("upgrade of {}", part.name()),
        }
    }
}

/// One round of everything: the kinds of deaths with the upgrades between, and then so many plain kills that kills are twice as many.
pub fn round(upgrades: &[Kind]) -> Vec<Kind> {
    let deaths = [Kind::Kill, Kind::Stop, Kind::KillTwice, Kind::KillWhileAdopting];
    let mut plan = Vec::new();
    let mut upgrades = upgrades.iter().copied();
    for death in deaths {
        plan.push(death);
        plan.extend(upgrades.next());
    }
    plan.extend(upgrades);
    let upgraded = plan.len() - deaths.len();
    plan.extend(std::iter::repeat_n(
        Kind::Kill,
        (2 * upgraded).saturating_sub(deaths.len()),
    ));
    plan
}

/// Plain kills mostly; the others in turn, so that few are enough for all.
pub fn kills(count: u32) -> Vec<Kind> {
    let kind = |number| match number % 10 {
        3 => Kind::KillTwice,
        6 => Kind::KillWhileAdopting,
        8 => Kind::Stop,
        _ => Kind::Kill,
    };
    (0..count).map(kind).collect()
}

/// Who causes it.
pub struct Trouble<'a> {
    pub daemon: &'a Daemon,
    vmgmtctl: PathBuf,
    course: &'a Course,
    watches: &'a Watches,
    pub stalls: Stalls,
    /// The deaths of cores that are this run's doing.
    deaths: Vec<Cause>,
    /// What was done, to the end.
    done: Vec<Kind>,
    /// Front and core as they were left: until the next disruption they stay these.
    left: [u32; 2],
}

impl<'a> Trouble<'a> {
    /// Before anything happens.
    ///
    /// # Errors
    /// A part is not there.
    pub fn new(
        daemon: &'a Daemon,
        vmgmtctl: PathBuf,
        course: &'a Course,
        watches: &'a Watches,
    ) -> Result<Self> {
        Ok(Self {
            left: parts(daemon)?,
            daemon,
            vmgmtctl,
            course,
            watches,
            stalls: Stalls::default(),
            deaths: Vec::new(),
            done: Vec::new(),
        })
    }

    /// At the end: everything of this plan happened, and nobody died of anything else.
    pub fn account(&self, plan: &[Kind]) {
        for (place, kind) in plan.iter().enumerate() {
            if plan[..place].contains(kind) {
                continue;
            }
            let planned = plan.iter().filter(|other| *other == kind).count();
            let done = self.done.iter().filter(|other| *other == kind).count();
            if done < planned {
                self.course.ledger.mismatch(format!(
                    "{} was to happen {planned} times and happened {done} times",
                    kind.name()
                ));
            }
        }
        self.look_at_parts();
        for what in unexplained(&self.daemon.log().text(), &self.deaths) {
            self.course.ledger.mismatch(what);
        }
    }

    /// Nobody may have been replaced since the last disruption.
    fn look_at_parts(&self) {
        match parts(self.daemon) {
            Ok(now) if now == self.left => {}
            Ok(now) => self.course.ledger.mismatch(format!(
                "front and core were processes {:?} after the last disruption and are {now:?}: somebody died",
                self.left
            )),
            Err(error) => self.course.ledger.mismatch(format!("{error:#}")),
        }
    }

    fn control(&self) -> PathBuf {
        self.daemon.path("control.sock")
    }

    /// A window without trouble.
    pub fn nothing(&mut self) -> Result<()> {
        let begin = self.watches.open();
        std::thread::sleep(QUIET_WINDOW);
        let sample = self.watches.close(begin)?;
        self.stalls.add("nothing", &sample);
        Ok(())
    }

    /// Does it, and waits until the daemon is in service again.
    pub fn cause(&mut self, kind: Kind, chance: &mut ChaCha8Rng) -> Result<()> {
        let name = kind.name();
        self.look_at_parts();
        let deaths = self.back_offs().len();
        let number = self.course.ledger.disruption_begins(&name);
        let window = self.watches.open();
        let done = self.act(kind, chance).and_then(|()| self.in_service());
        let back = Instant::now();
        std::thread::sleep(AFTERWARDS);
        self.course.ledger.disruption_ends();
        done.with_context(|| {
            format!(
                "disruption {number}, {name}; vmgmtd said:\n{}",
                self.daemon.log().tail()
            )
        })?;
        self.left = parts(self.daemon)?;
        self.done.push(kind);
        let sample = self.watches.close(back)?;
        // The keeper waits before it starts a core after several deaths in a row: that is its rule, not its slowness.
        let waited: u64 = self.back_offs().values().skip(deaths).sum();
        let shown = match waited {
            0 => name,
            some => format!("{name}, back-off {some} ms"),
        };
        self.stalls.add(&shown, &sample);
        println!(
            "  {number:>4}  {shown:<42} registers {:>8.1} ms, completions {:>8.1} ms, in service after {:>8.1} ms",
            longest(&sample.registers),
            longest(&sample.completions),
            (back - window).as_secs_f64() * 1e3,
        );
        Ok(())
    }

    fn kill(&mut self) -> Result<u32> {
        self.deaths.push(Cause::Killed);
        self.daemon.kill_role("core")
    }

    fn act(&mut self, kind: Kind, chance: &mut ChaCha8Rng) -> Result<()> {
        match kind {
            Kind::Kill => {
                let old = self.kill()?;
                self.daemon.wait_for_new("core", old, BACK_DEADLINE).map(drop)
            }
            Kind::KillTwice | Kind::KillWhileAdopting => {
                let old = self.kill()?;
                let new = self.daemon.wait_for_new("core", old, BACK_DEADLINE)?;
                if kind == Kind::KillWhileAdopting {
                    std::thread::sleep(Duration::from_millis(chance.next_u64() % ADOPTION_MS));
                }
                self.kill()?;
                self.daemon.wait_for_new("core", new, BACK_DEADLINE).map(drop)
            }
            Kind::Stop => {
                self.deaths.push(Cause::Stopped);
                let old = self.daemon.signal_role("core", Signal::STOP)?;
                let replaced = self.daemon.wait_for_new("core", old, BACK_DEADLINE);
                replaced
                    .map(drop)
                    .context("a stopped core owes doorbells and is not replaced")
            }
            Kind::Upgrade(part) => {
                let old = self.daemon.role(part.name());
                let report = upgrade(&self.vmgmtctl, &self.control(), part)?;
                ensure!(
                    report.state == UpgradeState::Done,
                    "it is {}: {}",
                    report.state.name(),
                    report.reason
                );
                match part {
                    // The same process goes on with another program.
                    Part::Keeper => Ok(()),
                    Part::Core | Part::Front => self
                        .daemon
                        .wait_for_new(part.name(), old?, BACK_DEADLINE)
                        .map(drop),
                }
            }
        }
    }

    /// Until a core answers for the status again.
    fn in_service(&self) -> Result<()> {
        wait_until("a core to be in service again", BACK_DEADLINE, || {
            let status = ask_status(&self.control())?;
            Ok((status.answered_by == "core" && status.state == "serving").then_some(()))
        })
    }

    /// What the keeper said it would wait, by core life (each new core is told of the deaths before it, and says so again).
    fn back_offs(&self) -> BTreeMap<u64, u64> {
        let log = self.daemon.log().text();
        let said = log.lines().filter_map(|line| {
            let (_, rest) = line.split_once("core life ")?;
            let life = rest.split(' ').next()?.parse().ok()?;
            let (_, rest) = rest.split_once("the next starts in ")?;
            Some((life, rest.split(' ').next()?.parse().ok()?))
        });
        said.collect()
    }
}

/// The processes of front and core.
fn parts(daemon: &Daemon) -> Result<[u32; 2]> {
    Ok([daemon.role("front")?, daemon.role("core")?])
}

/// Which parts can be upgraded; for the others, why not. Asked by doing it, before anybody works.
///
/// # Errors
/// An upgrade that this build supports, and that fails.
pub fn upgradable(vmgmtctl: &Path, control: &Path) -> Result<Vec<(Part, Option<String>)>> {
    let mut parts = Vec::new();
    for part in Part::ALL {
        let reason = match upgrade(vmgmtctl, control, part)? {
            report if report.state == UpgradeState::Done => None,
            report if report.reason.contains(UNSUPPORTED) => Some(report.reason),
            report => bail!(
                "the upgrade of the {} is {}: {}",
                part.name(),
                report.state.name(),
                report.reason
            ),
        };
        parts.push((part, reason));
    }
    Ok(parts)
}

/// Has the same program take a part over; the report, whatever it says.
fn upgrade(vmgmtctl: &Path, control: &Path, part: Part) -> Result<UpgradeReport> {
    let output = Command::new(vmgmtctl)
        .arg("--control")
        .arg(control)
        .args(["--json", "upgrade", "--part", part.name()])
        .stdin(Stdio::null())
        .output()
        .context("cannot run vmgmtctl")?;
    let said = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&said).with_context(|| {
        format!(
            "vmgmtctl upgrade --part {} ended with {}: {said}{}",
            part.name(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        )
    })
}

fn longest(times: &[Duration]) -> f64 {
    times.iter().max().map_or(0.0, |time| time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_every_kind_and_twice_as_many_kills() {
        let upgrades = Part::ALL.map(Kind::Upgrade);
        let plan = round(&upgrades);
        let kinds = [Kind::Kill, Kind::Stop, Kind::KillTwice, Kind::KillWhileAdopting];
        for kind in kinds.into_iter().chain(upgrades) {
            assert!(plan.contains(&kind), "{kind:?} is not in {plan:?}");
        }
        let upgraded = plan.iter().filter(|kind| upgrades.contains(kind)).count();
        assert_eq!((upgraded, plan.len()), (3, 9));
        assert_eq!(round(&[]).len(), 4);
    }

    #[test]
    fn ten_kills_are_of_every_kind() {
        let kinds = kills(10);
        let count = |wanted| kinds.iter().filter(|kind| **kind == wanted).count();
        assert_eq!(count(Kind::Kill), 7);
        for kind in [Kind::KillTwice, Kind::KillWhileAdopting, Kind::Stop] {
            assert_eq!(count(kind), 1, "{kind:?}");
        }
    }
}
