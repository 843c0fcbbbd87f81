//! The register of VMs and sessions: who is who, and who may come in.
//!
//! In: admissions and ends of sessions. Out: decisions. Knows no channel; the shell tells front and core.

mod saved;

pub(super) use saved::SavedVms;

use crate::config::limits::ANONYMOUS_PREFIX;
use crate::config::{Identity, ListenerConfig, VmConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open, test_kill_process};
use std::collections::{BTreeMap, BTreeSet};

/// A VM that exists.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) config: VmConfig,
    pub(super) listener: u32,
    /// The QEMU of a VM of a shared socket.
    process: Option<Process>,
    pub(super) sessions: BTreeSet<u64>,
    /// Its removal was asked for: (life of the core that asked, request); no session is admitted any more.
    pub(super) removal: Option<(u64, u64)>,
}

/// A process, for as long as it lives: numbers are used again.
#[derive(Debug)]
struct Process {
    pid: i32,
    handle: OwnedFd,
}

impl Process {
    fn lives(&self) -> bool {
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)) == Ok(0)
    }
}

#[derive(Debug, Clone, Copy)]
struct Holder {
    vm: u64,
    pid: i32,
    uid: u32,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Vms {
    vms: BTreeMap<u64, Vm>,
    sessions: BTreeMap<u64, Holder>,
    last_vm: u64,
    last_anonymous: u64,
}

/// Somebody who wants in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guest {
    pub(super) session: u64,
    pub(super) pid: i32,
    pub(super) uid: u32,
}

/// Whether it may.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// As a device of this VM; `new`: the VM begins to exist with it.
    Admitted { vm: u64, new: bool },
    /// Not, for this reason.
    Refused(String),
}

impl Vms {
    /// A number that no VM has had.
    pub(super) const fn next_number(&mut self) -> u64 {
        self.last_vm += 1;
        self.last_vm
    }

    pub(super) fn insert(&mut self, config: VmConfig, listener: u32) {
        let vm = Vm {
            config,
            listener,
            process: None,
            sessions: BTreeSet::new(),
            removal: None,
        };
        self.vms.insert(vm.config.vm, vm);
    }
    pub(super) fn get(&self, vm: u64) -> Option<&Vm> {
        self.vms.get(&vm)
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = &Vm> {
        self.vms.values()
    }
    /// Gives a VM other rights; the old ones are given back by that.
    pub(super) fn exchange(&mut self, config: &mut VmConfig) {
        if let Some(vm) = self.vms.get_mut(&config.vm) {
            std::mem::swap(&mut vm.config, config);
        }
    }
    pub(super) fn named(&mut self, name: &str) -> Option<&mut Vm> {
        self.vms.values_mut().find(|vm| vm.config.name == name)
    }
    pub(super) fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// The name of the VM of a session.
    pub(super) fn holding(&self, session: u64) -> Option<&str> {
        let Holder { vm, .. } = self.sessions.get(&session)?;
        self.vms.get(vm).map(|vm| vm.config.name.as_str())
    }

    /// Decides on somebody who came in by `listener`.
    pub(super) fn admit(&mut self, guest: Guest, listener: &ListenerConfig) -> Admission {
        if self.sessions.contains_key(&guest.session) {
            return Admission::Refused(format!("session {} is used twice", guest.session));
        }
        let (vm, new) = match &listener.identity {
            Identity::Vm { vm } => (*vm, false),
            Identity::Anonymous(template) => match self.vm_of_process(guest.pid, listener.listener) {
                Some(vm) => (vm, false),
                None => (self.new_anonymous(template, guest.pid, listener.listener), true),
            },
        };
        let Some(entry) = self.vms.get_mut(&vm).filter(|entry| entry.removal.is_none()) else {
            return Admission::Refused("this VM was removed by the operator".into());
        };
        let devices_max = listener.device.devices_max;
        // A process that has ended uses no device, though the kernel may close its connection a moment later: QEMU can start again at once.
        let holders = entry
            .sessions
            .iter()
            .filter_map(|session| self.sessions.get(session));
        let mut holders = holders.filter(|holder| is_there(holder.pid));
        if let Some(Holder { pid, uid, .. }) = holders.nth((devices_max as usize).saturating_sub(1)) {
            return Admission::Refused(format!(
                "VM {:?} is connected already by process {pid} (uid {uid}); its devices-max is {devices_max}",
                entry.config.name
            ));
        }
        // Whoever has a child connect and end would have as many as it likes.
        if entry.sessions.len() >= 2 * devices_max as usize {
            return Admission::Refused(format!(
                "VM {:?} has {} connections of processes that have ended: they are not closed yet",
                entry.config.name,
                entry.sessions.len()
            ));
        }
        entry.sessions.insert(guest.session);
        self.sessions.insert(
            guest.session,
            Holder {
                vm,
                pid: guest.pid,
                uid: guest.uid,
            },
        );
        Admission::Admitted { vm, new }
    }

    /// Notes the end of a session; gives its VM if that has ended with it.
    pub(super) fn session_gone(&mut self, session: u64) -> Option<Vm> {
        let Holder { vm, .. } = self.sessions.remove(&session)?;
        let entry = self.vms.get_mut(&vm)?;
        entry.sessions.remove(&session);
        let ended = entry.sessions.is_empty() && (entry.config.transient || entry.removal.is_some());
        if ended { self.vms.remove(&vm) } else { None }
    }

    /// The VM of an own socket is removed, and nobody waits for that (no life of a core has number 0); gives it if that is its end already.
    pub(super) fn leave(&mut self, listener: u32) -> Option<Vm> {
        let mut own = self.vms.values_mut().filter(|vm| !vm.config.transient);
        let vm = own.find(|vm| vm.listener == listener)?;
        vm.removal = Some((0, 0));
        let number = vm.config.vm;
        self.remove(number)
    }

    /// Takes a VM without sessions out.
    pub(super) fn remove(&mut self, vm: u64) -> Option<Vm> {
        self.vms
            .get(&vm)
            .is_some_and(|vm| vm.sessions.is_empty())
            .then(|| self.vms.remove(&vm))
            .flatten()
    }

    /// The VM of that QEMU process on a shared socket, if it is still the same process.
    fn vm_of_process(&self, pid: i32, listener: u32) -> Option<u64> {
        let of_process = |vm: &&Vm| {
            vm.listener == listener
                && vm.removal.is_none()
                && vm
                    .process
                    .as_ref()
                    .is_some_and(|process| process.pid == pid && process.lives())
        };
        self.vms.values().find(of_process).map(|vm| vm.config.vm)
    }

    fn new_anonymous(&mut self, template: &VmConfig, pid: i32, listener: u32) -> u64 {
        // A peer that cannot be seen (another pid namespace, or dead already) gets a VM for this connection alone.
        let handle = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        self.last_anonymous += 1;
        let vm = self.next_number();
        let name = format!("{ANONYMOUS_PREFIX}{}", self.last_anonymous);
        self.insert(
            VmConfig {
                vm,
                name,
                ..template.clone()
            },
            listener,
        );
        if let (Some(entry), Some(handle)) = (self.vms.get_mut(&vm), handle) {
            entry.process = Some(Process { pid, handle });
        }
        vm
    }
}

/// Whether a process has not ended, as far as can be known (one of another PID namespace has no number here).
pub(super) fn is_there(pid: i32) -> bool {
    Pid::from_raw(pid).is_none_or(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DeviceConfig, VmLimits};

    fn vm_config(vm: u64, name: &str, transient: bool) -> VmConfig {
        let limits = VmLimits::default();
        VmConfig {
            vm,
            name: name.into(),
            shares: vec![],
            reach: vec![],
            send_to_all: false,
            limits,
            transient,
        }
    }
    fn listener(listener: u32, identity: Identity, devices_max: u32) -> ListenerConfig {
        let device = DeviceConfig {
            devices_max,
            ..DeviceConfig::default()
        };
        ListenerConfig {
            listener,
            path: "/x".into(),
            mode: 0,
            group: None,
            identity,
            device,
        }
    }
    fn refusal(admission: Admission) -> String {
        match admission {
            Admission::Refused(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_socket_is_an_identity_and_a_second_device_is_refused_naming_the_holder() {
        let mut vms = Vms::default();
        let vm = vms.next_number();
        vms.insert(vm_config(vm, "web", false), 1);
        let socket = listener(1, Identity::Vm { vm }, 2);
        let own = std::process::id() as i32;
        let guest = |session| Guest {
            session,
            pid: own,
            uid: 107,
        };
        for session in [10, 11] {
            assert_eq!(
                vms.admit(guest(session), &socket),
                Admission::Admitted { vm, new: false }
            );
        }
        let reason = refusal(vms.admit(guest(12), &socket));
        assert_eq!(
            reason,
            format!("VM \"web\" is connected already by process {own} (uid 107); its devices-max is 2")
        );
        assert!(refusal(vms.admit(guest(11), &socket)).contains("used twice"));
        // A refused one leaves nothing behind, and the VM outlives its sessions.
        assert!(vms.session_gone(12).is_none() && vms.session_gone(10).is_none());
        assert_eq!(
            vms.admit(guest(13), &socket),
            Admission::Admitted { vm, new: false }
        );
        assert!(vms.remove(vm).is_none(), "not while it is connected");
        vms.named("web").unwrap().removal = Some((1, 5));
        assert!(refusal(vms.admit(guest(14), &socket)).contains("removed"));
        assert!(vms.session_gone(11).is_none());
        assert_eq!(vms.session_gone(13).unwrap().removal, Some((1, 5)));
        assert_eq!((vms.iter().count(), vms.session_count()), (0, 0));
    }

    #[test]
    fn who_has_ended_holds_no_device_though_its_connection_is_not_closed_yet() {
        let mut vms = Vms::default();
        let vm = vms.next_number();
        vms.insert(vm_config(vm, "web", false), 1);
        let socket = listener(1, Identity::Vm { vm }, 1);
        let mut first = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let guest = |session, pid: u32| Guest {
            session,
            pid: pid as i32,
            uid: 107,
        };
        let admitted = Admission::Admitted { vm, new: false };
        assert_eq!(vms.admit(guest(1, first.id()), &socket), admitted);
        let next = std::process::id();
        assert!(refusal(vms.admit(guest(2, next), &socket)).contains(&first.id().to_string()));
        first.kill().unwrap();
        first.wait().unwrap();
        assert_eq!(vms.admit(guest(3, next), &socket), admitted);
        assert!(refusal(vms.admit(guest(4, next), &socket)).contains(&next.to_string()));
        // The end of the first, when it comes, is its own alone.
        assert!(vms.session_gone(1).is_none());
        assert!(refusal(vms.admit(guest(5, next), &socket)).contains("connected already"));
    }

    #[test]
    fn connections_of_processes_that_have_ended_are_not_let_in_without_end() {
        let mut vms = Vms::default();
        let vm = vms.next_number();
        vms.insert(vm_config(vm, "web", false), 1);
        let socket = listener(1, Identity::Vm { vm }, 2);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let guest = |session| Guest {
            session,
            pid: child.id() as i32,
            uid: 107,
        };
        for session in 1..=4 {
            assert_eq!(
                vms.admit(guest(session), &socket),
                Admission::Admitted { vm, new: false }
            );
        }
        assert_eq!(
            refusal(vms.admit(guest(5), &socket)),
            "VM \"web\" has 4 connections of processes that have ended: they are not closed yet"
        );
        assert!(vms.session_gone(2).is_none());
        assert_eq!(
            vms.admit(guest(6), &socket),
            Admission::Admitted { vm, new: false }
        );
    }

    #[test]
    fn on_a_shared_socket_each_process_is_a_vm_until_its_last_session_ends() {
        let mut vms = Vms::default();
        let socket = listener(3, Identity::Anonymous(Box::new(vm_config(0, "", true))), 2);
        let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let (own, its) = (std::process::id() as i32, other.id() as i32);
        let guest = |session, pid| Guest { session, pid, uid: 0 };
        assert_eq!(
            vms.admit(guest(1, own), &socket),
            Admission::Admitted { vm: 1, new: true }
        );
        assert_eq!(
            vms.admit(guest(2, its), &socket),
            Admission::Admitted { vm: 2, new: true }
        );
        assert_eq!(
            vms.admit(guest(3, its), &socket),
            Admission::Admitted { vm: 2, new: false }
        );
        assert!(refusal(vms.admit(guest(4, its), &socket)).contains("anon-2"));
        // The number of a dead process says nothing about who comes with it next.
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(
            vms.admit(guest(5, its), &socket),
            Admission::Admitted { vm: 3, new: true }
        );
        assert!(vms.session_gone(2).is_none());
        assert_eq!(vms.session_gone(3).unwrap().config.name, "anon-2");
        assert!(vms.named("anon-1").is_some() && vms.named("anon-3").is_some());
        // Without a visible process each connection stands alone.
        assert_eq!(
            vms.admit(guest(6, 0), &socket),
            Admission::Admitted { vm: 4, new: true }
        );
        assert_eq!(
            vms.admit(guest(7, 0), &socket),
            Admission::Admitted { vm: 5, new: true }
        );
        assert_eq!((vms.holding(6), vms.holding(99)), (Some("anon-4"), None));
    }
}
