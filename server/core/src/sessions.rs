//! OFFICE: who comes and goes: VMs, sessions, channels; and what is swept up behind them.
//!
//! In: the shell's word that somebody is there, or not any more. Out: the end of everything that was theirs.

use crate::deadlines::Timer;
use crate::effect::Effect;
use crate::effects::Continuation;
use crate::hub::Hub;
use crate::interface::Output;
use crate::journal::Record;
use crate::limits::{SWEEP_AGE_SECONDS, SWEEP_INTERVAL_NS};
use crate::modes::delivery;
use crate::office::Session;
use crate::policy::{Access, VmConfig};
use std::collections::BTreeSet;
use vmgmt_abi::chat::{ALL_NAME, HOST_NAME, PEER_ALL};
use vmgmt_device::rings::{Channel, Token};

impl Hub {
    pub(crate) fn vm(&mut self, config: VmConfig) {
        let vm = config.vm;
        if vm >= PEER_ALL || vm == 0 || config.name == HOST_NAME || config.name == ALL_NAME {
            let text = format!(
                "VM {vm} has a reserved number or name ({HOST_NAME}, {ALL_NAME}): give it another one"
            );
            self.office.outputs.push_back(Output::Log { vm, text });
            return;
        }
        let limits = config.limits.clone();
        self.office.record(Record::Vm(Box::new(config)));
        if self.office.vms.is_empty() {
            self.office
                .timers
                .arm(self.office.now.after_ns(SWEEP_INTERVAL_NS), Timer::Sweep);
        }
        self.office.set_limits(vm, limits);
        self.office.refresh_reach();
    }

    pub(crate) fn vm_gone(&mut self, vm: u64) {
        let mut sessions = self
            .office
            .vms
            .get(&vm)
            .map(|entry| entry.sessions.clone())
            .unwrap_or_default();
        sessions.extend(self.office.ledger.kept.sessions(Some(vm)));
        for session in sessions {
            self.session_emptied(session);
            self.office.sessions.remove(&session);
        }
        self.transfers.vm_gone(&mut self.office, vm);
        if self.office.ledger.vms.contains_key(&vm) {
            self.office.record(Record::VmGone { vm });
        }
        if let Some(at) = self.office.vms.remove(&vm).and_then(|entry| entry.expiry) {
            self.office.timers.disarm(at, Timer::Expiry { vm });
        }
        if self.office.vms.is_empty() {
            self.office.timers.disarm_sweep();
        }
        self.office.refresh_reach();
    }

    pub(crate) fn session_opened(&mut self, session: u64, vm: u64) {
        if self.office.sessions.contains_key(&session) {
            self.session_closed(session);
        }
        let Some(entry) = self.office.vm_mut(vm) else {
            let text = format!(
                "session {session} of a VM that is not known: its submissions are answered NOT_READY"
            );
            self.office.outputs.push_back(Output::Log { vm, text });
            return;
        };
        entry.sessions.insert(session);
        // What became of its messages is told by its rings, before they fetch anything new.
        self.office.awaited.remove(&(vm, session));
        // Those of an earlier core life, if there was one.
        let handles = self.handles_of(session).into_iter().collect();
        self.office.sessions.insert(session, Session { vm, handles });
    }

    /// Handles of a session, as the rooms have them.
    fn handles_of(&self, session: u64) -> Vec<u64> {
        let kept = &self.office.ledger.kept;
        let files = kept.files.iter().filter(|(_, file)| file.session == session);
        let puts = kept.puts.iter().filter(|(_, put)| put.session == session);
        let ends = kept.ends().filter(|end| end.session == session);
        let files = files
            .map(|(handle, _)| *handle)
            .chain(puts.map(|(handle, _)| *handle));
        files.chain(ends.map(|end| end.handle)).collect()
    }

    pub(crate) fn session_closed(&mut self, session: u64) {
        self.session_emptied(session);
        let Some(Session { vm, handles: _ }) = self.office.sessions.remove(&session) else {
            return;
        };
        let Some(entry) = self.office.vm_mut(vm) else {
            return;
        };
        entry.sessions.remove(&session);
        if !entry.sessions.is_empty() {
            return;
        }
        let account = self.office.ledger.vms.get(&vm);
        if account.is_some_and(|account| account.config.transient) {
            self.vm_gone(vm);
        } else if !self.office.adopting {
            self.transfers.vm_absent(&mut self.office, vm);
        }
    }

    /// Everything of a session goes: submissions, handles, presence, deliveries under way. Its device may stay (a reset), and so does what others
    /// hold ready for its VM: mail and offers.
    pub(crate) fn session_emptied(&mut self, session: u64) {
        let first = Token {
            session,
            channel: Channel::Ring(0),
            index: 0,
            generation: 0,
        };
        let last = Token {
            session,
            channel: Channel::Port,
            index: u32::MAX,
            generation: u32::MAX,
        };
        self.void_all(first, last);
        let of = |token: Token| token.session == session;
        self.transfers.void_before(&mut self.office, of);
        let found = self.office.sessions.get_mut(&session);
        let found = found.map(|entry| (entry.vm, std::mem::take(&mut entry.handles)));
        // After a crash a session may be gone that this life never saw: then only what survived of it is put right.
        let vm = found
            .as_ref()
            .map(|(vm, _)| *vm)
            .or_else(|| self.office.ledger.vm_published_by(session));
        let handles: Vec<u64> = match found {
            Some((_, handles)) => handles.into_iter().collect(),
            None => self.handles_of(session),
        };
        for handle in handles {
            if self.transfers.ends.contains_key(&handle) {
                self.transfers.close(&mut self.office, handle);
            } else {
                self.files.release(&mut self.office, handle);
            }
        }
        delivery::session_gone(&mut self.office, session, vm.unwrap_or(0));
        self.transfers.session_gone(&mut self.office, session);
    }

    pub(crate) fn channel_closed(&mut self, session: u64, channel: Channel) {
        let first = Token {
            session,
            channel,
            index: 0,
            generation: 0,
        };
        self.void_all(
            first,
            Token {
                index: u32::MAX,
                generation: u32::MAX,
                ..first
            },
        );
        let of = |token: Token| (token.session, token.channel) == (session, channel);
        self.transfers.void_before(&mut self.office, of);
        let Some(vm) = self.office.vm_of(first) else {
            return;
        };
        delivery::channel_gone(&mut self.office, session, vm, channel);
        let presented: Vec<Token> = self.transfers.presenting.keys().copied().collect();
        for token in presented
            .into_iter()
            .filter(|token| (token.session, token.channel) == (session, channel))
        {
            self.transfers.published(&mut self.office, token, false);
        }
    }

    /// A new core life has heard of all sessions that are still there: those of others end, and what nobody owns any more is removed.
    pub(crate) fn adopted(&mut self) {
        for session in self.remembered() {
            if !self.office.sessions.contains_key(&session) {
                self.session_closed(session);
            }
        }
        self.office.adopting = false;
        for vm in self.office.absent_vms() {
            self.transfers.vm_absent(&mut self.office, vm);
        }
        // Their messages are back in the mailboxes, for who has asked meanwhile.
        self.office.awaited.clear();
        for vm in self.office.vms.keys().collect::<Vec<_>>() {
            delivery::dispatch(&mut self.office, vm, false);
        }
        self.transfers.await_operators(&mut self.office);
        self.sweep_shares(true);
    }

    /// Removes what broken puts left, in every share that some VM may write, and what waits for the host too long.
    pub(crate) fn sweep(&mut self) {
        self.sweep_shares(false);
        delivery::expire_host(&mut self.office);
        self.office
            .timers
            .arm(self.office.now.after_ns(SWEEP_INTERVAL_NS), Timer::Sweep);
    }

    fn sweep_shares(&mut self, adoption: bool) {
        let accounts = self
            .office
            .ledger
            .vms
            .values()
            .flat_map(|account| &account.config.shares);
        let writable = accounts.filter(|grant| grant.access == Access::ReadWrite);
        let shares: BTreeSet<String> = writable.map(|grant| grant.share.clone()).collect();
        for share in shares {
            let keep = self.office.ledger.kept.temporaries(&share);
            let effect = Effect::Sweep {
                share,
                older_than_seconds: SWEEP_AGE_SECONDS,
                keep,
                adoption,
            };
            self.office.effect(0, effect, Continuation::Nothing);
        }
    }
}
