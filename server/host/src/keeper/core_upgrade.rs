//! Another program becomes the core: asked on copies first, then tried, and taken back where it fails.
//!
//! In: turns of the upgrade (`upgrade.rs`). Out: its steps. Must never know what is in the state.
//!
//! 1. The old core stands still for as long as its state is copied; the new program looks at the copies (`--check`). 2. The old core ends
//!    its bulk work, as far as a deadline lets it, and goes. 3. The new one starts on trial, with a copy of the hub's state: it writes
//!    no page, no table and no guest memory before it hears `Go`. 4. With `Go` it takes the sessions over, and writes no state and no guest
//!    memory before it has all of them and says READY: from then on its state is the state. Whatever goes wrong before that leaves the old
//!    program's state as it was, and the old program is started on it.

use super::Keeper;
use super::binary::Binary;
use super::child::Child;
use super::limits::{
    CHECK_DEADLINE, DRAIN_GRACE, FREEZE_DEADLINE, RETURN_DEADLINE, TIDY_DEADLINE, TRIAL_DEADLINE,
};
use super::lives::{CoreLife, Standing};
use super::upgrade::{Progress, Step};
use super::watch;
use crate::messages::{CoreToKeeper, KeeperToCore, spoken};
use crate::state_memory;
use rustix::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Where a core's upgrade stands. `begun`: when the old core's service ended.
pub(super) enum CoreStep {
    /// The old core, which is told of the upgrade, writes its state so that the oldest program can read it that can.
    Asking { since: Instant },
    /// The old core is to stand still.
    Freezing { since: Instant },
    /// The new program looks at the copies.
    Checking {
        checker: Box<Child<KeeperToCore>>,
        since: Instant,
    },
    /// The old core ends its work.
    Draining { begun: Instant },
    /// The new program looks at everything, with this copy of the hub's state.
    Trying {
        hub: OwnedFd,
        begun: Instant,
        since: Instant,
    },
    /// It was told to go.
    Going(Going),
    /// The old program is to be in service again.
    Returning {
        reason: String,
        begun: Instant,
        since: Instant,
    },
}

/// A new core on its way into service.
pub(super) struct Going {
    /// Program and state of before, which the new one has not touched while it does not serve.
    old: (Binary, OwnedFd),
    /// How many cores had died in service.
    deaths: u64,
    begun: Instant,
    since: Instant,
}

impl CoreStep {
    /// No core is to be started but by the upgrade.
    pub(super) const fn holds_core(&self) -> bool {
        matches!(self, Self::Draining { .. } | Self::Trying { .. })
    }
}

impl Keeper {
    pub(super) fn upgrade_core(&mut self, binary: &Binary, step: Step) -> Progress {
        let step = match step {
            Step::Core(step) => step,
            Step::Reading(reading) => return self.read_configuration(binary, reading),
            _ => {
                let since = Instant::now();
                return running(CoreStep::Asking { since });
            }
        };
        if self.stop_at.is_some() {
            self.thaw_core();
            return Progress::Denied("vmgmtd was stopped meanwhile".into());
        }
        match step {
            CoreStep::Asking { since } => {
                // One of a version before says nothing.
                let serves = self.core.as_ref().is_some_and(|core| core.ready.is_some());
                if serves && !self.upgrades.tidied && since.elapsed() < TIDY_DEADLINE {
                    return running(CoreStep::Asking { since });
                }
                self.freeze_core(binary)
            }
            CoreStep::Freezing { since } => self.copy_state(binary, since),
            CoreStep::Checking { checker, since } => self.check_core(checker, since),
            CoreStep::Draining { begun } => self.drain_core(binary, begun),
            CoreStep::Trying { hub, begun, since } => self.try_core(binary, hub, begun, since),
            CoreStep::Going(going) => self.await_service(going),
            CoreStep::Returning { reason, begun, since } => match &self.core {
                Some(core) if core.ready.is_some() => Progress::RolledBack(reason, begun.elapsed()),
                // It is started again and again all the same; but an upgrade to a third program may be what helps.
                _ if since.elapsed() > RETURN_DEADLINE => {
                    let (limit, end) = (RETURN_DEADLINE.as_secs(), &self.core_end);
                    let text = format!(
                        "{reason}; and the old program does not serve after {limit} s (the last core: {end}): see the log, or upgrade to another"
                    );
                    Progress::RolledBack(text, begun.elapsed())
                }
                _ => running(CoreStep::Returning { reason, begun, since }),
            },
        }
    }

    pub(super) fn freeze_core(&mut self, binary: &Binary) -> Progress {
        let since = Instant::now();
        if let Some(core) = &self.core {
            core.child.freeze(true);
        }
        self.copy_state(binary, since)
    }

    fn thaw_core(&self) {
        if let Some(core) = &self.core {
            core.child.freeze(false);
        }
    }

    /// Copies the state while its writer stands still (or is dead), and has the new program look at the copies.
    fn copy_state(&mut self, binary: &Binary, since: Instant) -> Progress {
        if self.core.as_ref().is_some_and(|core| !core.child.is_frozen()) {
            if since.elapsed() < FREEZE_DEADLINE {
                return running(CoreStep::Freezing { since });
            }
            self.thaw_core();
            let text = "the old core did not stand still, so its state could not be copied: it waits for a disk; try again";
            return Progress::Denied(text.into());
        }
        let states = std::iter::once(self.hub_state.as_fd());
        let states = states.chain(self.session_states.values().map(AsFd::as_fd));
        let copies = state_memory::sealed_copies(states);
        self.thaw_core();
        let started = copies
            .map_err(Into::into)
            .and_then(|copies| self.start_check(binary, copies));
        match started {
            Ok(checker) => running(CoreStep::Checking {
                checker: Box::new(checker),
                since: Instant::now(),
            }),
            Err(error) => Progress::Denied(format!("the new program cannot be asked: {error:#}")),
        }
    }

    fn start_check(&self, binary: &Binary, copies: OwnedFd) -> anyhow::Result<Child<KeeperToCore>> {
        let mut checker = Child::start(binary, "core", true, &self.arguments)?;
        watch(&self.poll, &checker.pidfd)?;
        watch(&self.poll, &checker.channel)?;
        let sessions = self.session_states.iter();
        let sessions = sessions.map(|(session, fd)| Ok((*session, state_memory::bytes(fd)?)));
        let question = KeeperToCore::Check {
            config: Box::new(self.next_core_config().clone()),
            channel: *spoken().start(),
            channel_newest: *spoken().end(),
            hub_bytes: state_memory::bytes(&self.hub_state)?,
            sessions: sessions.collect::<anyhow::Result<_>>()?,
        };
        checker.queue(question, vec![copies]);
        Ok(checker)
    }

    fn check_core(&mut self, mut checker: Box<Child<KeeperToCore>>, since: Instant) -> Progress {
        checker.flush();
        // Looked at before its words, so that its last ones are not missed.
        let exit = checker.ended();
        let received = checker.receive();
        let late = since.elapsed() > CHECK_DEADLINE;
        if matches!(received, Ok(Some(_))) || late {
            self.dismiss(*checker);
        } else if exit.is_none() {
            return running(CoreStep::Checking { checker, since });
        }
        if let Ok(Some(packet)) = received {
            return match packet.header {
                CoreToKeeper::Checked => self.begin_drain(),
                CoreToKeeper::Refused { reason } => {
                    Progress::Denied(format!("the new program refuses: {reason}"))
                }
                _ => Progress::Denied("the new program talks nonsense".into()),
            };
        }
        if let Some(exit) = exit {
            return Progress::Denied(format!(
                "the new program ended without a word when it was asked ({}): is it a vmgmtd?",
                exit.text
            ));
        }
        Progress::Denied(format!(
            "the new program did not answer within {} s",
            CHECK_DEADLINE.as_secs()
        ))
    }

    /// Ends a child that was only asked something, and waits for it some time later.
    pub(super) fn dismiss(&mut self, mut child: Child<KeeperToCore>) {
        child.kill(None);
        self.dismissed.push(child);
    }

    fn begin_drain(&mut self) -> Progress {
        let deadline_ms = self.drain_deadline_ms;
        self.tell_core(KeeperToCore::Drain { deadline_ms }, Vec::new());
        if let Some(core) = &mut self.core {
            core.standing = Standing::Leaving;
        }
        running(CoreStep::Draining {
            begun: Instant::now(),
        })
    }

    fn drain_core(&mut self, binary: &Binary, begun: Instant) -> Progress {
        if let Some(core) = &mut self.core {
            if begun.elapsed() > Duration::from_millis(self.drain_deadline_ms) + DRAIN_GRACE {
                // What it leaves is what any death leaves.
                core.child.kill(None);
            }
            return running(CoreStep::Draining { begun });
        }
        self.exchange_settings();
        let tried = state_memory::duplicate("vmgmt-hub", &self.hub_state)
            .map_err(Into::into)
            .and_then(|hub| self.start_core(Some((binary, &hub))).map(|()| hub));
        match tried {
            Ok(hub) => running(CoreStep::Trying {
                hub,
                begun,
                since: Instant::now(),
            }),
            Err(error) => self.go_back(format!("the new program cannot be started: {error:#}"), begun),
        }
    }

    /// The old program is to be in service again, with the old configuration.
    fn go_back(&mut self, reason: String, begun: Instant) -> Progress {
        self.exchange_settings();
        let since = Instant::now();
        running(CoreStep::Returning { reason, begun, since })
    }

    fn try_core(&mut self, binary: &Binary, hub: OwnedFd, begun: Instant, since: Instant) -> Progress {
        let Some(core) = &mut self.core else {
            let reason = format!("the new program failed on trial: {}", self.core_end);
            return self.go_back(reason, begun);
        };
        if core.standing == Standing::Able {
            core.child.queue(KeeperToCore::Go, Vec::new());
            let old = (
                std::mem::replace(&mut self.core_binary, binary.clone()),
                std::mem::replace(&mut self.hub_state, hub),
            );
            let (deaths, since) = (self.restarts.total(), Instant::now());
            return running(CoreStep::Going(Going {
                old,
                deaths,
                begun,
                since,
            }));
        }
        core.end_if_late(since);
        running(CoreStep::Trying { hub, begun, since })
    }

    /// Until the new core says that it serves, all that it has is the old one's.
    fn await_service(&mut self, going: Going) -> Progress {
        match &mut self.core {
            Some(core) if core.ready.is_some() => Progress::Done(going.begun.elapsed()),
            Some(core) => {
                core.end_if_late(going.since);
                running(CoreStep::Going(going))
            }
            // One that served, and died at once, is a core like any other.
            None if self.restarts.total() > going.deaths => Progress::Done(going.begun.elapsed()),
            None => {
                (self.core_binary, self.hub_state) = going.old;
                let reason = format!("the new program ended before it served: {}", self.core_end);
                self.go_back(reason, going.begun)
            }
        }
    }
}

impl CoreLife {
    /// Kills a new program that has not done in time what it is to do.
    fn end_if_late(&mut self, since: Instant) {
        let limit = TRIAL_DEADLINE;
        if since.elapsed() > limit {
            let text = || format!("it was not able to take over within {} s", limit.as_secs());
            self.refusal.get_or_insert_with(text);
            self.child.kill(None);
        }
    }
}

const fn running(step: CoreStep) -> Progress {
    Progress::Running(Step::Core(step))
}
