//! ATTIC: what a new core life makes of what the one before left: the rooms are furnished again from the ledger.
//!
//! In: the last snapshot and the records since. Out: a hub whose handles are being opened again; the submissions in flight come again by the rings.

use crate::deadlines::Timer;
use crate::effect::{Effect, FileSlot};
use crate::effects::{Continuation, Effects};
use crate::hub::Hub;
use crate::journal::Record;
use crate::kept::{KeptFile, KeptPut};
use crate::ledger::Ledger;
use crate::modes::file::OpenFile;
use crate::modes::puts::Put;
use crate::state::{RestoreError, Saved};
use std::collections::BTreeSet;
use vmgmt_device::rings::Token;

impl Hub {
    /// A hub after a crash: what the last snapshot (if any) says that survives, and the records since. Sessions are to be told anew, and then
    /// `Input::Adopted`. `life`: as in [`Hub::new`].
    ///
    /// # Errors
    /// What is wrong with the snapshot.
    pub fn replay(
        life: u64,
        snapshot: Option<Saved>,
        records: impl IntoIterator<Item = Record>,
    ) -> Result<Self, RestoreError> {
        Self::replay_beside(life, BTreeSet::new(), snapshot, records)
    }

    /// As [`Hub::replay`], while workers of killed cores sleep in a disk and may still do something for these VMs: what they may have begun
    /// is done again only after `Input::Buried`.
    ///
    /// # Errors
    /// As [`Hub::replay`].
    pub fn replay_beside(
        life: u64,
        undead: BTreeSet<u64>,
        snapshot: Option<Saved>,
        records: impl IntoIterator<Item = Record>,
    ) -> Result<Self, RestoreError> {
        let mut hub = Self::new(life);
        hub.office.adopting = true;
        hub.office.effects = Effects::beside(undead);
        if let Some(saved) = snapshot {
            hub.office.next_handle = hub.office.next_handle.max(saved.next_handle);
            hub.office.ledger = Ledger::restore(saved.ledger)?;
            (hub.office.now, hub.office.wall) = (saved.now, saved.wall);
        }
        for record in records {
            hub.office.ledger.apply(&record);
        }
        let limits: Vec<_> = hub
            .office
            .ledger
            .vms
            .iter()
            .map(|(vm, account)| (vm, account.config.limits.clone()))
            .collect();
        for (vm, limits) in limits {
            hub.office.set_limits(vm, limits);
        }
        if !hub.office.vms.is_empty() {
            let at = hub.office.now.after_ns(crate::limits::SWEEP_INTERVAL_NS);
            hub.office.timers.arm(at, Timer::Sweep);
        }
        hub.office.refresh_reach();
        for vm in hub.office.vms.keys().collect::<Vec<_>>() {
            crate::modes::delivery::arm_expiry(&mut hub.office, vm);
        }
        hub.office.awaited = hub.office.ledger.sessions_with_messages();
        hub.office.inherited = hub.office.ledger.delivering.keys().copied().collect();
        hub.transfers.furnish(&mut hub.office);
        hub.open_again();
        Ok(hub)
    }

    /// Has the files of all handles opened again; until then what is asked of them waits.
    fn open_again(&mut self) {
        let kept = &self.office.ledger.kept;
        let files: Vec<(u64, KeptFile)> = kept
            .files
            .iter()
            .map(|(handle, file)| (*handle, file.clone()))
            .collect();
        let puts: Vec<(u64, KeptPut)> = kept
            .puts
            .iter()
            .map(|(handle, put)| (*handle, put.clone()))
            .collect();
        for (handle, kept) in files {
            let KeptFile {
                session,
                vm,
                share,
                path,
                read,
                write,
                identity,
            } = kept;
            let file = OpenFile {
                session: Some(session),
                vm,
                slot: FileSlot::NONE,
                share: share.clone(),
                path: path.clone(),
                read,
                write,
                busy: 1,
                closing: None,
                stale: false,
            };
            self.files.open.insert(handle, file);
            let effect = Effect::Reopen {
                share,
                path,
                put: None,
                read,
                write,
                identity,
            };
            self.reopen(vm, handle, effect);
        }
        for (handle, kept) in puts {
            let KeptPut {
                session,
                what,
                identity,
                ..
            } = kept;
            let effect = Effect::Reopen {
                share: what.share.clone(),
                path: what.temporary.clone(),
                put: Some((what.path.clone(), what.existing)),
                read: true,
                write: true,
                identity,
            };
            let vm = what.vm;
            self.files.puts.live.insert(what.key(), handle);
            let put = Put {
                what,
                session: Some(session),
                slot: FileSlot::NONE,
                busy: 1,
                commit: None,
                closing: None,
                stale: false,
            };
            self.files.puts.puts.insert(handle, put);
            self.reopen(vm, handle, effect);
        }
    }

    fn reopen(&mut self, vm: u64, handle: u64, effect: Effect) {
        if let Some(entry) = self.office.vm_mut(vm) {
            entry.open_files += 1;
        }
        self.files.reopening.insert(handle, Default::default());
        let then = Continuation::Reopened { handle };
        // A file that is only read is nobody's to spoil.
        if matches!(effect, Effect::Reopen { write: false, .. }) {
            self.office.effect(vm, effect, then);
        } else {
            self.office.effect_again(vm, effect, then);
        }
    }

    /// Completions of which the core before did not know whether they were published: after [`Hub::replay`] the shell looks into the
    /// guests' rings and tells each (`Input::Published`), or gives the submission again; those of sessions that are closed need nothing.
    #[must_use]
    pub fn unresolved(&self) -> Vec<Token> {
        let ledger = &self.office.ledger;
        let delivering = ledger.delivering.keys();
        let settled = ledger.kept.settled.keys();
        let presenting = self.transfers.presenting.keys();
        delivering.chain(settled).chain(presenting).copied().collect()
    }

    /// Sessions that something of an earlier core life belongs to.
    pub(crate) fn remembered(&self) -> BTreeSet<u64> {
        let ledger = &self.office.ledger;
        let mut sessions = ledger.kept.sessions(None);
        sessions.extend(ledger.delivering.keys().map(|token| token.session));
        sessions.extend(ledger.sessions_bound());
        let published = ledger
            .vms
            .values()
            .filter_map(|account| account.presence.as_ref());
        sessions.extend(published.map(|presence| presence.session));
        sessions
    }
}
