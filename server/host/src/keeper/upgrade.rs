//! A planned upgrade: parts of the daemon are replaced one after another, with one report.
//!
//! In: the operator's wish, turns of the loop. Out: steps of the parts, the report. Must never know how a part is replaced.
//!
//! How a part plugs in: it has one function on [`Keeper`], `fn upgrade_PART(&mut self, binary: &Binary, step: Step) -> Progress`, in a
//! file of its own, and a variant of [`Step`] with what it remembers between turns. The function is called with [`Step::Begin`] first,
//! then in each turn of the loop (at least every `LOOK_AGAIN`) with the step that it returned, until it returns something else than
//! [`Progress::Running`]. It must never wait. `Denied`: the old program was never touched; `RolledBack`: it is in service again; `Failed`:
//! neither says that it is. All three end the upgrade. The part that is the keeper itself saves [`Upgrades::report`] before it executes the new program; that one goes on
//! with [`Upgrades::resume`] and ends the part with [`Keeper::end_part`].

use super::Keeper;
use super::binary::Binary;
use super::core_upgrade::CoreStep;
use super::hand_over::HandOver;
use super::re_exec::Check;
use super::reload::Reading;
use crate::control::protocol::{Part, PartReport, Upgrade, UpgradeReport, UpgradeState};
use crate::messages::KeeperToCore;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// What a part remembers between two turns.
pub(super) enum Step {
    /// Its turn has just come.
    Begin,
    /// A core's upgrade that is a reload: the configuration is read.
    Reading(Reading),
    Core(CoreStep),
    Front(HandOver),
    Keeper(Check),
}

/// What came of a part's step.
pub(super) enum Progress {
    Running(Step),
    /// The new program is in service; the part was out of service that long.
    Done(Duration),
    Denied(String),
    RolledBack(String, Duration),
    /// Neither is known to be in service, since then.
    Failed(String, Duration),
}

/// The last upgrade. Pure.
#[derive(Debug, Default)]
pub(super) struct Upgrades {
    report: Option<UpgradeReport>,
    /// The core has said that its state asks for no newer program than it must.
    pub(super) tidied: bool,
}

impl Upgrades {
    pub(super) const fn report(&self) -> Option<&UpgradeReport> {
        self.report.as_ref()
    }

    /// Goes on with what an earlier keeper saved.
    pub(super) fn resume(&mut self, report: Option<UpgradeReport>) {
        self.report = report;
    }

    /// The part whose turn it is.
    pub(super) fn part(&self) -> Option<Part> {
        let report = self.report.as_ref().filter(|report| !report.is_over())?;
        let its_turn =
            |part: &&PartReport| matches!(part.state, UpgradeState::Waiting | UpgradeState::Running);
        report.parts.iter().find(its_turn).map(|part| part.part)
    }

    pub(super) fn begin(&mut self, binary: &Path, parts: &[Part], now_ns: u64) -> u64 {
        let number = self.report.as_ref().map_or(0, |report| report.number) + 1;
        let wanted = |part: &Part| parts.is_empty() || parts.contains(part);
        let mut report = UpgradeReport {
            number,
            binary: binary.display().to_string(),
            state: UpgradeState::Running,
            begun_ns: now_ns,
            ..UpgradeReport::default()
        };
        report.parts = (Part::ALL.into_iter().filter(wanted))
            .map(|part| PartReport {
                part,
                state: UpgradeState::Waiting,
                reason: String::new(),
                stall_ms: 0,
            })
            .collect();
        self.report = Some(report);
        number
    }

    /// It is a reload: of this configuration, and (once that is known) with these changes.
    pub(super) fn is_reload(&mut self, configuration: &str, changes: Vec<String>) {
        if let Some(report) = &mut self.report {
            (report.configuration, report.changes) = (configuration.to_owned(), changes);
        }
    }

    /// The part whose turn it is runs.
    pub(super) fn begin_part(&mut self) {
        self.tidied = false;
        if let Some(part) = self.current() {
            part.state = UpgradeState::Running;
        }
    }

    /// The part whose turn it is has ended so. Whether another is to come.
    fn end_part(&mut self, state: UpgradeState, reason: String, stall: Duration, now_ns: u64) -> bool {
        let Some(part) = self.current() else { return false };
        part.state = state;
        part.reason = reason;
        part.stall_ms = u64::try_from(stall.as_millis()).unwrap_or(u64::MAX);
        let ended = part.clone();
        let more = self.part().is_some();
        let Some(report) = &mut self.report else {
            return false;
        };
        if state == UpgradeState::Done && more {
            return true;
        }
        report.state = state;
        if state != UpgradeState::Done {
            report.reason = format!("{}: {}", ended.part.name(), ended.reason);
        }
        report.ended_ns = now_ns;
        for part in &mut report.parts {
            if part.state == UpgradeState::Waiting {
                part.state = UpgradeState::Skipped;
            }
        }
        false
    }

    fn current(&mut self) -> Option<&mut PartReport> {
        let part = self.part()?;
        self.report
            .as_mut()?
            .parts
            .iter_mut()
            .find(|other| other.part == part)
    }
}

impl Keeper {
    /// Whether an upgrade may begin now.
    pub(super) fn may_begin(&self) -> Result<(), String> {
        if self.stop_at.is_some() {
            return Err("vmgmtd is stopping".into());
        }
        if let (Some(_), Some(report)) = (&self.upgrading, self.upgrades.report()) {
            return Err(format!(
                "{} is under way: wait for its end (vmgmtctl status)",
                report.title()
            ));
        }
        Ok(())
    }

    /// Begins an upgrade as the operator wants it: gives its number, or why not.
    pub(super) fn begin_upgrade(&mut self, wish: &Upgrade) -> Result<u64, String> {
        self.may_begin()?;
        let binary = Binary::open(wish.to.as_deref().map_or(&self.path, Path::new))?;
        let number = self.upgrades.begin(binary.path(), &wish.parts, now_ns());
        tracing::info!("upgrade {number} to {}", binary.path().display());
        self.upgrading = Some((binary, Step::Begin));
        // Before the answer: who has that finds the report in the status.
        self.tell_report();
        Ok(number)
    }

    /// Takes the upgrade that is under way as far as it goes now.
    pub(super) fn step_upgrade(&mut self) {
        while let (Some((binary, step)), Some(part)) = (self.upgrading.take(), self.upgrades.part()) {
            if matches!(step, Step::Begin) {
                self.upgrades.begin_part();
                self.tell_report();
            }
            let progress = match part {
                Part::Core => self.upgrade_core(&binary, step),
                Part::Front => self.upgrade_front(&binary, step),
                Part::Keeper => self.upgrade_keeper(&binary, step),
            };
            let more = match progress {
                Progress::Running(step) => {
                    self.upgrading = Some((binary, step));
                    return;
                }
                Progress::Done(stall) => self.end_part(UpgradeState::Done, String::new(), stall),
                Progress::Denied(reason) => self.end_part(UpgradeState::Denied, reason, Duration::ZERO),
                Progress::RolledBack(reason, stall) => self.end_part(UpgradeState::RolledBack, reason, stall),
                Progress::Failed(reason, stall) => self.end_part(UpgradeState::Failed, reason, stall),
            };
            self.upgrading = more.then_some((binary, Step::Begin));
        }
    }

    /// Notes how the part whose turn it is has ended; whether another is to come.
    pub(super) fn end_part(&mut self, state: UpgradeState, reason: String, stall: Duration) -> bool {
        let more = self.upgrades.end_part(state, reason, stall, now_ns());
        if let Some(reload) = self.reload.take().filter(|_| state == UpgradeState::Done) {
            self.settle(reload);
        }
        if let Some(report) = self.upgrades.report().filter(|report| report.is_over()) {
            let text = match report.state {
                UpgradeState::Done => format!("{} is done", report.title()),
                state => format!("{} is {}: {}", report.title(), state.name(), report.reason),
            };
            self.notice(text);
        }
        self.tell_report();
        more
    }

    /// Gives the core the report, for its status.
    pub(super) fn tell_report(&mut self) {
        if let Some(report) = self.upgrades.report().cloned() {
            self.tell_core(KeeperToCore::Upgrade(Box::new(report)), Vec::new());
        }
    }
}

pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(upgrades: &Upgrades) -> Vec<UpgradeState> {
        let report = upgrades.report().unwrap();
        report.parts.iter().map(|part| part.state).collect()
    }

    #[test]
    fn parts_go_in_their_order_and_the_first_that_is_not_done_ends_it() {
        let mut upgrades = Upgrades::default();
        assert_eq!(upgrades.part(), None);
        assert_eq!(upgrades.begin(Path::new("/new"), &[], 5), 1);
        let stall = Duration::from_millis(7);
        assert_eq!(upgrades.part(), Some(Part::Core));
        upgrades.begin_part();
        assert!(upgrades.end_part(UpgradeState::Done, String::new(), stall, 6));
        assert_eq!(upgrades.part(), Some(Part::Front));
        assert!(!upgrades.end_part(UpgradeState::Denied, "it is old".into(), Duration::ZERO, 7));
        assert_eq!(upgrades.part(), None);
        assert_eq!(
            states(&upgrades),
            [UpgradeState::Done, UpgradeState::Denied, UpgradeState::Skipped]
        );
        let report = upgrades.report().unwrap();
        assert_eq!((report.state, report.ended_ns), (UpgradeState::Denied, 7));
        assert_eq!(
            (report.reason.as_str(), report.parts[0].stall_ms),
            ("front: it is old", 7)
        );
        // The next has its own number, and an order of its own is not asked for.
        assert_eq!(upgrades.begin(Path::new("/n"), &[Part::Front, Part::Core], 8), 2);
        assert_eq!(upgrades.part(), Some(Part::Core));
        assert!(upgrades.end_part(UpgradeState::Done, String::new(), stall, 9));
        let mut next = Upgrades::default();
        next.resume(upgrades.report().cloned());
        assert_eq!(next.part(), Some(Part::Front));
        assert!(!next.end_part(UpgradeState::Done, String::new(), stall, 10));
        assert!(next.report().unwrap().is_over() && next.report().unwrap().reason.is_empty());
    }
}
