//! The front's upgrade: another front takes everything over from the one in service, or nothing happens at all.
//!
//! In: turns of the loop, words of both fronts, their deaths. Out: the new front in the old one's place, or the old one as it was. Must never
//! know: what is handed over.
//!
//! The new front is started, and ready, before the old one stops. What the keeper has to say to a front is held back until it is decided
//! which of the two serves. The decision falls here, in [`Keeper::decide`], once; until then the new front touches nothing, after it the old
//! one only leaves.

use super::binary::Binary;
use super::child::Child;
use super::limits::{CHECK_DEADLINE, HAND_OVER_DEADLINE, LEAVE_DEADLINE, SERVE_DEADLINE};
use super::upgrade::{Progress, Step};
use super::{Keeper, watch};
use crate::channel::Channel;
use crate::messages::{FrontToKeeper, KeeperToFront};
use std::time::{Duration, Instant};

/// A hand-over that is under way.
pub(super) struct HandOver {
    phase: Phase,
    since: Instant,
}

enum Phase {
    /// The new front starts; nobody has stopped.
    Starting(Child<KeeperToFront>),
    /// The old front has been told to stop.
    Moving(Child<KeeperToFront>),
    /// The new front has been told to serve.
    Serving,
    /// The new front has been killed, for this reason.
    Killing(Child<KeeperToFront>, String),
    /// The old front has been told to go on, for this reason.
    Resuming(String),
}

impl Keeper {
    /// One step of the front's upgrade.
    pub(super) fn upgrade_front(&mut self, binary: &Binary, step: Step) -> Progress {
        let hand_over = match step {
            Step::Front(hand_over) => hand_over,
            _ => match self.start_second_front(binary) {
                Ok(front) => HandOver {
                    phase: Phase::Starting(front),
                    since: Instant::now(),
                },
                Err(error) => return Progress::Denied(format!("{error:#}")),
            },
        };
        let HandOver { phase, since } = hand_over;
        let deadline = match phase {
            // While the new one starts, the old one serves.
            Phase::Starting(_) => CHECK_DEADLINE,
            Phase::Serving | Phase::Resuming(_) => SERVE_DEADLINE,
            Phase::Moving(_) | Phase::Killing(..) => HAND_OVER_DEADLINE,
        };
        let late = (since.elapsed() > deadline).then_some(deadline);
        let stay = |phase| Progress::Running(Step::Front(HandOver { phase, since }));
        let go = |phase| {
            let since = Instant::now();
            Progress::Running(Step::Front(HandOver { phase, since }))
        };
        match phase {
            Phase::Starting(mut new) => match self.word_of(&mut new, late) {
                Ok(Some(FrontToKeeper::Ready)) if self.front_ready => match self.begin_to_move(&mut new) {
                    Ok(()) => go(Phase::Moving(new)),
                    Err(error) => self.deny(new, error.to_string()),
                },
                Ok(Some(other)) => self.deny(new, format!("the new front says {other:?}")),
                Ok(None) => stay(Phase::Starting(new)),
                Err(reason) => self.deny(new, reason),
            },
            Phase::Moving(mut new) => {
                new.flush();
                let reason = match (self.word_of(&mut new, late), self.front_said.take()) {
                    (
                        Ok(Some(FrontToKeeper::CanServe {
                            sessions,
                            descriptors,
                        })),
                        _,
                    ) => {
                        tracing::info!(
                            "the front is handed over: {sessions} sessions, {descriptors} descriptors"
                        );
                        return go(self.decide(new));
                    }
                    (Ok(Some(FrontToKeeper::CannotHandOver { reason })), _)
                    | (Err(reason), _)
                    | (Ok(None), Some(FrontToKeeper::CannotHandOver { reason })) => reason,
                    (Ok(Some(other)), _) => format!("the new front says {other:?}"),
                    (Ok(None), _) => return stay(Phase::Moving(new)),
                };
                new.kill(None);
                go(Phase::Killing(new, reason))
            }
            Phase::Killing(mut new, reason) => {
                // The old one goes on only when the new one can touch nothing any more: it has ended; or it sleeps in the kernel, for ever if
                // the server of a client's file likes, and does not come back out of it. It is waited for with those who leave.
                if new.ended().is_none() {
                    if !new.is_dead_for_memory() {
                        return stay(Phase::Killing(new, reason));
                    }
                    self.leaving.push((new, Instant::now()));
                }
                self.front_said = None;
                self.front.go_on(KeeperToFront::Resume);
                go(Phase::Resuming(reason))
            }
            // Nothing can be taken back from here on; but the operator is told, and other parts can be replaced.
            Phase::Serving => match self.front_said.take() {
                Some(FrontToKeeper::Serves { stood_still_ns }) => {
                    Progress::Done(Duration::from_nanos(stood_still_ns))
                }
                _ if late.is_some() => {
                    Progress::Failed(silent("the new front was told to serve"), since.elapsed())
                }
                _ => stay(Phase::Serving),
            },
            Phase::Resuming(reason) => match self.front_said.take() {
                Some(FrontToKeeper::Serves { stood_still_ns }) => {
                    Progress::RolledBack(reason, Duration::from_nanos(stood_still_ns))
                }
                _ if late.is_some() => {
                    let silent = silent("the old front was told to go on");
                    Progress::Failed(format!("{reason}; {silent}"), since.elapsed())
                }
                _ => stay(Phase::Resuming(reason)),
            },
        }
    }

    /// Whether a front that has died may still be replaced by one that has everything already.
    pub(super) fn is_front_moving(&self) -> bool {
        let step = self.upgrading.as_ref().map(|(_, step)| step);
        let Some(Step::Front(HandOver { phase, since })) = step else {
            return false;
        };
        matches!(phase, Phase::Moving(_)) && since.elapsed() <= HAND_OVER_DEADLINE
    }

    fn start_second_front(&mut self, binary: &Binary) -> anyhow::Result<Child<KeeperToFront>> {
        anyhow::ensure!(
            self.front_ready,
            "the front in service is still starting: ask again"
        );
        let front = Child::start(binary, "front", false, &self.arguments)?;
        watch(&self.poll, &front.pidfd)?;
        watch(&self.poll, &front.channel)?;
        Ok(front)
    }

    /// What the new front says next; an error: it never will.
    fn word_of(
        &self,
        new: &mut Child<KeeperToFront>,
        late: Option<Duration>,
    ) -> Result<Option<FrontToKeeper>, String> {
        if let Ok(Some(packet)) = new.receive::<FrontToKeeper>() {
            return Ok(Some(packet.header));
        }
        if let Some(exit) = new.ended() {
            return Err(format!("the new front ended by {}", exit.text));
        }
        late.map_or(Ok(None), |deadline| {
            Err(format!(
                "the new front did not answer within {} s",
                deadline.as_secs()
            ))
        })
    }

    fn deny(&mut self, mut new: Child<KeeperToFront>, reason: String) -> Progress {
        new.kill(None);
        self.leaving.push((new, Instant::now()));
        Progress::Denied(reason)
    }

    fn begin_to_move(&mut self, new: &mut Child<KeeperToFront>) -> anyhow::Result<()> {
        let (one, other) = Channel::pair()?;
        self.front_said = None;
        self.front.queue(KeeperToFront::HandOver, vec![one.into_fd()]);
        self.front.hold();
        new.queue(KeeperToFront::TakeOver, vec![other.into_fd()]);
        new.flush();
        Ok(())
    }

    /// The new front serves from now on; or the old one cannot be understood, and goes on as when the new one fails.
    fn decide(&mut self, mut new: Child<KeeperToFront>) -> Phase {
        // What the old one has said before it stopped comes first.
        loop {
            match self.take_from_front() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    new.kill(None);
                    return Phase::Killing(new, error.to_string());
                }
            }
        }
        self.front_said = None;
        let mut old = std::mem::replace(&mut self.front, new);
        self.front.take_held(&mut old);
        self.front.go_on(KeeperToFront::Serve);
        old.go_on(KeeperToFront::Leave);
        old.flush();
        self.leaving.push((old, Instant::now() + LEAVE_DEADLINE));
        Phase::Serving
    }

    /// Fronts that have nothing to do any more: they end, or are ended.
    pub(super) fn see_off(&mut self) {
        self.leaving.retain_mut(|(front, until)| {
            if Instant::now() > *until {
                front.kill(None);
            }
            front.ended().is_none()
        });
    }
}

/// What is known of a front that does not say that it serves.
fn silent(what: &str) -> String {
    format!(
        "{what} and has not said within {} s that it does: devices may stand still until it does (a front that is stuck ends all devices when \
         vmgmtd is started anew)",
        SERVE_DEADLINE.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::super::saved_tests::{child, scene};
    use super::*;
    use std::io::{Read, Write};

    /// One step of a hand-over in this phase; what it became.
    fn step(keeper: &mut Keeper, phase: Phase, age: Duration) -> Progress {
        let since = Instant::now().checked_sub(age).unwrap();
        let binary = Binary::own().unwrap();
        keeper.upgrade_front(&binary, Step::Front(HandOver { phase, since }))
    }

    #[test]
    fn an_old_front_that_cannot_be_understood_is_told_to_go_on_and_gets_what_was_held_back() {
        let mut keeper = scene();
        keeper.front.waiting.clear();
        keeper.front.hold();
        keeper.front.queue(KeeperToFront::CloseVm { vm: 7 }, Vec::new());
        let (ours, theirs) = Channel::pair().unwrap();
        let mut new = child(102, Vec::new(), None);
        new.channel = ours;
        let said = FrontToKeeper::CanServe {
            sessions: 1,
            descriptors: 1,
        };
        theirs.send(&said, &[], &[]).unwrap();
        // (The scene's channels are none: what the old front said cannot be taken.)
        let Progress::Running(Step::Front(moved)) = step(&mut keeper, Phase::Moving(new), Duration::ZERO)
        else {
            panic!("it is over");
        };
        assert_eq!(keeper.front.pid, 100, "the old one is the front");
        let Phase::Killing(..) = moved.phase else {
            panic!("another phase");
        };
        let Progress::Running(Step::Front(moved)) = step(&mut keeper, moved.phase, Duration::ZERO) else {
            panic!("it is over");
        };
        let told: Vec<_> = keeper.front.waiting.iter().map(|(message, _)| message).collect();
        assert!(
            matches!(
                told[..],
                [KeeperToFront::Resume, KeeperToFront::CloseVm { vm: 7 }]
            ),
            "{told:?}"
        );
        assert!(keeper.front.held.is_none());
        keeper.front_said = Some(FrontToKeeper::Serves { stood_still_ns: 5 });
        let over = step(&mut keeper, moved.phase, Duration::ZERO);
        let Progress::RolledBack(reason, stall) = over else {
            panic!("it is not over");
        };
        assert!(
            reason.contains("cannot be understood") && stall.as_nanos() == 5,
            "{reason}"
        );
    }

    #[test]
    fn an_old_front_goes_on_though_the_killed_new_one_cannot_be_waited_for() {
        let mut keeper = scene();
        keeper.front.waiting.clear();
        keeper.leaving.clear();
        // A process that ends stands for one that sleeps in the kernel; and one that does not, for a pidfd that does not tell.
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        let mut sleeper = std::process::Command::new("cat");
        let piped = std::process::Stdio::piped;
        let mut sleeper = sleeper.stdin(piped()).stdout(piped()).spawn().unwrap();
        // When it has answered it sleeps for no disk any more.
        sleeper.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        sleeper.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let mut new: Child<KeeperToFront> = child(sleeper.id(), Vec::new(), Some("killed"));
        new.pidfd = rustix::process::pidfd_open(
            rustix::process::Pid::from_child(&sleeper),
            rustix::process::PidfdFlags::empty(),
        )
        .unwrap();
        let killing = Phase::Killing(new, "it was late".into());
        let Progress::Running(Step::Front(HandOver { phase, .. })) =
            step(&mut keeper, killing, Duration::ZERO)
        else {
            panic!("it is over");
        };
        let Phase::Killing(mut new, reason) = phase else {
            panic!("the old one goes on beside a new one that runs");
        };
        new.pid = dead.id();
        while !new.is_dead_for_memory() {
            std::thread::yield_now();
        }
        let killing = Phase::Killing(new, reason);
        let Progress::Running(Step::Front(HandOver { phase, .. })) =
            step(&mut keeper, killing, Duration::ZERO)
        else {
            panic!("it is over");
        };
        assert!(matches!(phase, Phase::Resuming(reason) if reason == "it was late"));
        let told = keeper.front.waiting.front().map(|(message, _)| message);
        assert!(matches!(told, Some(KeeperToFront::Resume)), "{told:?}");
        assert_eq!(keeper.leaving.len(), 1, "it is waited for");
        while !keeper.leaving.is_empty() {
            keeper.see_off();
        }
        dead.wait().unwrap();
        // (It was killed, and waited for by its pidfd.)
        let _ = sleeper.wait();
    }

    #[test]
    fn fronts_that_do_not_say_that_they_serve_hold_up_nothing_else() {
        let mut keeper = scene();
        for (phase, why) in [
            (Phase::Serving, "the new front was told to serve"),
            (
                Phase::Resuming("it died".into()),
                "it died; the old front was told to go on",
            ),
        ] {
            let Progress::Failed(reason, _) = step(&mut keeper, phase, SERVE_DEADLINE * 2) else {
                panic!("it goes on");
            };
            assert!(reason.starts_with(why), "{reason}");
        }
    }
}
