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
use super::limits::{CHECK_DEADLINE, HAND_OVER_DEADLINE, LEAVE_DEADLINE};
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
        // While the new one starts, the old one serves.
        let starts = matches!(phase, Phase::Starting(_));
        let deadline = if starts {
            CHECK_DEADLINE
        } else {
            HAND_OVER_DEADLINE
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
                        return match self.decide(new) {
                            Ok(()) => go(Phase::Serving),
                            Err(error) => Progress::RolledBack(error.to_string(), Duration::ZERO),
                        };
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
                // The old one goes on only when the new one can touch nothing any more.
                if new.ended().is_none() {
                    return stay(Phase::Killing(new, reason));
                }
                self.front_said = None;
                self.front.go_on(KeeperToFront::Resume);
                go(Phase::Resuming(reason))
            }
            Phase::Serving => match self.front_said.take() {
                Some(FrontToKeeper::Serves { stood_still_ns }) => {
                    Progress::Done(Duration::from_nanos(stood_still_ns))
                }
                _ => stay(Phase::Serving),
            },
            Phase::Resuming(reason) => match self.front_said.take() {
                Some(FrontToKeeper::Serves { stood_still_ns }) => {
                    Progress::RolledBack(reason, Duration::from_nanos(stood_still_ns))
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

    /// The new front serves from now on.
    fn decide(&mut self, new: Child<KeeperToFront>) -> anyhow::Result<()> {
        // What the old one has said before it stopped comes first.
        while self.take_from_front()? {}
        self.front_said = None;
        let mut old = std::mem::replace(&mut self.front, new);
        self.front.take_held(&mut old);
        self.front.go_on(KeeperToFront::Serve);
        self.front.flush();
        old.go_on(KeeperToFront::Leave);
        old.flush();
        self.leaving.push((old, Instant::now() + LEAVE_DEADLINE));
        Ok(())
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
