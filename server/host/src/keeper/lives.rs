//! The core's lives: start, death, restart. In: processes and their ends. Out: messages to the front, notices.

use super::binary::Binary;
use super::child::{Child, KILLED};
use super::limits::{END_DEADLINE, FIRST_DEATHS_MAX, START_AGAIN, START_DEADLINE, UNREAD_DEADLINE};
use super::restart::Death;
use super::upgrade::Step;
use super::{Keeper, watch};
use crate::channel::Channel;
use crate::messages::{BURIED, KeeperToCore, KeeperToFront, spoken};
use crate::words::{MappedWords, create_page};
use anyhow::bail;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use vmgmt_device::page::{LifePage, TouchedPage};

/// One life of the core.
pub(super) struct CoreLife {
    pub(super) life: u64,
    pub(super) child: Child<KeeperToCore>,
    pub(super) page: LifePage<MappedWords>,
    /// Its descriptor, for a keeper that takes over.
    pub(super) page_fd: OwnedFd,
    pub(super) started: Instant,
    /// In service since.
    pub(super) ready: Option<Instant>,
    /// It has closed its channel or was killed, then.
    pub(super) dying: Option<Instant>,
    /// Messages wait for it, and it has taken none since then.
    pub(super) unread: Option<Instant>,
    pub(super) standing: Standing,
    /// Why it says that it cannot be the core.
    pub(super) refusal: Option<String>,
}

/// What a life of the core is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The core.
    Usual,
    /// It is being tried in an upgrade.
    Trial,
    /// And could take over.
    Able,
    /// Another is to take over.
    Leaving,
}

impl CoreLife {
    /// Sends what waits. One in service that takes none of it is killed: the front is told nothing while something waits.
    pub(super) fn flush(&mut self) {
        let before = self.child.waiting.len();
        self.child.flush();
        let left = self.child.waiting.len();
        if left == 0 || left < before || self.ready.is_none() || self.standing != Standing::Usual {
            self.unread = None;
            return;
        }
        let waited = self.unread.get_or_insert_with(Instant::now).elapsed();
        if waited >= 2 * UNREAD_DEADLINE {
            // This process did not look in time itself: both were stopped.
            self.unread = None;
        } else if waited >= UNREAD_DEADLINE && self.dying.is_none() {
            let fault = "killed: it took none of the keeper's messages";
            self.child.kill((!self.child.is_frozen()).then_some(fault));
            self.dying = Some(Instant::now());
        }
    }
}

impl Keeper {
    /// Is the core dead, or dead for guest memory, or late?
    pub(super) fn look_at_core(&mut self) -> anyhow::Result<()> {
        let Some(core) = &mut self.core else { return Ok(()) };
        let now = Instant::now();
        if core.ready.is_none() && now.duration_since(core.started) > START_DEADLINE {
            core.child.kill(Some("killed: it was not ready in time"));
            core.dying.get_or_insert(now);
        }
        // Who closes the channel is about to end, and is let, so that how it did is known.
        let late = core
            .dying
            .is_some_and(|since| now.duration_since(since) > END_DEADLINE);
        if late || self.stop_at.is_some_and(|at| now >= at) {
            core.child.kill(None);
        }
        let exit = core.child.ended();
        if exit.is_none() && !core.child.is_dead_for_memory() {
            return Ok(());
        }
        // The last words of one that was to take over: did it?
        let (tried, mut more) = (core.standing == Standing::Able, true);
        while tried && more {
            more = self.take_from_core();
        }
        let Some(core) = self.core.take() else {
            return Ok(());
        };
        self.front
            .queue(KeeperToFront::CoreDead { life: core.life }, Vec::new());
        let (text, by_itself) = match &exit {
            Some(exit) => (exit.text.as_str(), exit.by_itself),
            None => (core.child.fault().unwrap_or(KILLED), core.child.fault().is_some()),
        };
        if exit.is_none() {
            tracing::warn!(
                "process {} sleeps in the kernel; it can touch no guest memory any more",
                core.child.pid()
            );
        }
        if self.stop_at.is_some() {
            if !exit.as_ref().is_some_and(|exit| exit.orderly) {
                tracing::warn!("the core ended by {text} instead of in order");
            }
            return Ok(());
        }
        if core.standing != Standing::Usual {
            // Its end is part of an upgrade, which says in its report what that means.
            tracing::info!("core life {} ended: {text}", core.life);
            self.core_end = core.refusal.unwrap_or_else(|| text.to_owned());
            self.restart_at = now;
            if exit.is_none() {
                self.lay_out(core.child, &core.page);
            }
            return Ok(());
        }
        self.core_end = text.to_owned();
        let served = core
            .ready
            .map_or(Duration::ZERO, |ready| now.duration_since(ready));
        let mut suspects: BTreeSet<u64> = core.page.blamed_sessions().collect();
        for vm in core.page.blamed_vms() {
            suspects.extend(self.vms.get(vm).into_iter().flat_map(|vm| &vm.sessions));
        }
        suspects.retain(|session| self.vms.holding(*session).is_some());
        let blamed = if suspects.is_empty() {
            String::new()
        } else {
            format!(", while it handled sessions {suspects:?}")
        };
        let death = Death {
            at: now.duration_since(self.begin),
            served,
            by_itself,
            suspects,
        };
        let (wait, quarantined) = self.restarts.died(death);
        self.notice(format!(
            "core life {} died: {text}{blamed}; it had served {} s; the next starts in {} ms",
            core.life,
            served.as_secs(),
            wait.as_millis()
        ));
        for session in quarantined {
            self.quarantine(session);
        }
        if !self.announced && self.restarts.in_a_row() >= FIRST_DEATHS_MAX {
            bail!(
                "the core does not start ({text}): see the lines above; `vmgmtd --check` checks the configuration"
            );
        }
        self.restart_at = now + wait;
        if exit.is_none() {
            self.lay_out(core.child, &core.page);
        }
        Ok(())
    }

    /// A killed core sleeps in the kernel: what its workers were in the middle of may still happen to files.
    fn lay_out(&mut self, child: Child<KeeperToCore>, page: &LifePage<MappedWords>) {
        self.undead_vms.extend(page.blamed_vms());
        self.undead.push(child);
    }

    /// When the last is gone, files are only the core's.
    pub(super) fn bury_undead(&mut self) {
        self.dismissed.retain_mut(|child| child.ended().is_none());
        self.undead.retain_mut(|child| child.ended().is_none());
        if self.undead.is_empty() && !std::mem::take(&mut self.undead_vms).is_empty() {
            let (request, error) = (BURIED, None);
            self.tell_core(KeeperToCore::Done { request, error }, Vec::new());
        }
    }

    pub(super) fn restart_core(&mut self) -> anyhow::Result<()> {
        let held = matches!(&self.upgrading, Some((_, Step::Core(step))) if step.holds_core());
        if held || self.stop_at.is_some() || self.core.is_some() || Instant::now() < self.restart_at {
            return Ok(());
        }
        match self.start_core(None) {
            Err(error) if self.announced => {
                self.notice(format!("a core cannot be started now: {error:#}"));
                self.restart_at = Instant::now() + START_AGAIN;
                Ok(())
            }
            other => other,
        }
    }

    /// Starts a core; on trial: this program on this state of the hub.
    pub(super) fn start_core(&mut self, trial: Option<(&Binary, &OwnedFd)>) -> anyhow::Result<()> {
        let (binary, hub_state) = trial.unwrap_or((&self.core_binary, &self.hub_state));
        self.last_life += 1;
        let life = self.last_life;
        let (to_core, to_front) = Channel::pair()?;
        let (touched, touched_ro) = create_page("vmgmt-touched", TouchedPage::<MappedWords>::WORDS)?;
        let (page, page_ro) = create_page("vmgmt-life", LifePage::<MappedWords>::WORDS)?;
        TouchedPage::new(MappedWords::writable(&touched)?).init();
        LifePage::new(MappedWords::writable(&page)?).init();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (wake_core, wake_front) = (event()?, event()?);
        let mut fds = vec![
            to_front.into_fd(),
            touched_ro,
            page,
            wake_core.try_clone()?,
            wake_front.try_clone()?,
            hub_state.try_clone()?,
            self.control.fd.try_clone()?,
        ];
        fds.extend(
            self.shares
                .open(&self.core_config.shares, &self.core_config.sandbox)?,
        );
        let mut child = Child::start(binary, "core", false, &self.arguments)?;
        watch(&self.poll, &child.pidfd)?;
        watch(&self.poll, &child.channel)?;
        child.queue(
            KeeperToCore::Start {
                life,
                config: Box::new(self.core_config.clone()),
                channel: *spoken().start(),
                channel_newest: *spoken().end(),
                trial: trial.is_some(),
                undead: self.undead_vms.clone(),
                reloads: true,
            },
            fds,
        );
        for vm in self.vms.iter() {
            child.queue(KeeperToCore::Vm(vm.config.clone()), Vec::new());
        }
        if let Some(report) = self.upgrades.report().cloned() {
            child.queue(KeeperToCore::Upgrade(Box::new(report)), Vec::new());
        }
        for notice in &self.notices {
            child.queue(KeeperToCore::Notice(notice.clone()), Vec::new());
        }
        tracing::info!("core life {life} is process {}", child.pid());
        let page = LifePage::new(MappedWords::read_only(&page_ro)?);
        let fds = vec![
            to_core.into_fd(),
            touched,
            page_ro.try_clone()?,
            wake_core,
            wake_front,
        ];
        self.front.queue(KeeperToFront::Core { life }, fds);
        self.core = Some(CoreLife {
            life,
            child,
            page,
            page_fd: page_ro,
            started: Instant::now(),
            ready: None,
            dying: None,
            unread: None,
            standing: if trial.is_some() {
                Standing::Trial
            } else {
                Standing::Usual
            },
            refusal: None,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::UNREAD_MAX;
    use super::super::saved_tests::scene;
    use super::*;
    use crate::messages::CoreToKeeper;

    #[test]
    fn a_core_that_takes_nothing_of_what_waits_is_killed_and_not_listened_to() {
        let mut keeper = scene();
        let (ours, theirs) = Channel::pair().unwrap();
        let core = keeper.core.as_mut().unwrap();
        core.dying = None;
        core.child.channel = ours;
        while core.child.waiting.len() < UNREAD_MAX {
            core.child.queue(KeeperToCore::Go, Vec::new());
            core.flush();
        }
        let since = |ago: Duration| Instant::now().checked_sub(ago);
        // It asks on: nothing of it is taken.
        let asked = CoreToKeeper::Release {
            request: 1,
            vm: "?".into(),
        };
        theirs.send(&asked, &[], &[]).unwrap();
        assert!(!keeper.take_from_core());
        let core = keeper.core.as_mut().unwrap();
        assert_eq!(core.child.waiting.len(), UNREAD_MAX);
        // As long as it takes something now and then, it lives; and when this process stood still itself.
        core.unread = since(UNREAD_DEADLINE);
        while theirs.receive::<KeeperToCore>().unwrap().is_some() {}
        core.flush();
        assert!(!core.child.killed && core.unread.is_none());
        core.flush();
        core.unread = since(3 * UNREAD_DEADLINE);
        core.flush();
        assert!(!core.child.killed);
        core.flush();
        core.unread = since(UNREAD_DEADLINE);
        core.flush();
        assert!(core.child.killed && core.dying.is_some());
        assert!(
            core.child
                .fault()
                .unwrap()
                .contains("none of the keeper's messages")
        );
    }
}
