//! Sockets, VMs and sessions of the running daemon: what the register ([`Vms`](super::vms::Vms)) decides is carried out here.
//! In: admissions, the operators' wishes. Out: messages to front and core, memory for their pages and state.

use super::Keeper;
use super::limits::SESSION_STATE_BYTES;
use super::sockets::{Socket, listen_on};
use super::vms::{Admission, Guest, Vm};
use crate::config::{Identity, ListenerConfig, VmConfig};
use crate::messages::{KeeperToCore, KeeperToFront, Notice, SessionFault};
use crate::state_memory;
use crate::words::{MappedWords, create_page};
use anyhow::bail;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use vmgmt_device::page::FrontPage;

impl Keeper {
    pub(super) fn admit(&mut self, listener: u32, guest: Guest) {
        let Guest { session, .. } = guest;
        let Some((config, _)) = self.listeners.get(&listener) else {
            let reason = "this socket was removed by the operator".into();
            return self
                .front
                .queue(KeeperToFront::Refused { session, reason }, Vec::new());
        };
        let admission = self.vms.admit(guest, config);
        let maps_max = config.device.maps_max as usize;
        let admitted = match admission {
            Admission::Refused(reason) => Err(reason),
            Admission::Admitted { vm, new } => self.admitted(session, vm, new, maps_max).map_err(|errno| {
                self.session_gone(session, SessionFault::None);
                format!("the host daemon has no memory or descriptors for another device: {errno}")
            }),
        };
        match admitted {
            Ok((vm, name, fds)) => self
                .front
                .queue(KeeperToFront::Admitted { session, vm, name }, fds),
            Err(reason) => {
                tracing::warn!("process {} (uid {}) is refused: {reason}", guest.pid, guest.uid);
                self.front
                    .queue(KeeperToFront::Refused { session, reason }, Vec::new());
            }
        }
    }

    /// What goes with an admission; a VM that is new is told to the core first.
    fn admitted(
        &mut self,
        session: u64,
        vm: u64,
        new: bool,
        maps_max: usize,
    ) -> Result<(u64, String, Vec<OwnedFd>), Errno> {
        let page = create_page("vmgmt-front", FrontPage::<MappedWords>::words_needed(maps_max))?;
        let session_state = state_memory::create("vmgmt-session", SESSION_STATE_BYTES)?;
        let kept = rustix::io::fcntl_dupfd_cloexec(&session_state, 3)?;
        self.session_states.insert(session, kept);
        let entry = self.vms.get(vm).ok_or(Errno::NOENT)?;
        let config = entry.config.clone();
        let name = config.name.clone();
        if new {
            self.tell_core(KeeperToCore::Vm(config), Vec::new());
        }
        Ok((vm, name, vec![page.0, page.1, session_state]))
    }

    pub(super) fn session_gone(&mut self, session: u64, fault: SessionFault) {
        if let Some(notice) = Notice::of_front(self.vms.holding(session), fault) {
            self.notice(notice);
        }
        self.restarts.session_gone(session);
        self.session_states.remove(&session);
        if let Some(vm) = self.vms.session_gone(session) {
            self.vm_gone(vm);
        }
    }

    /// The device of this session fails, so that its input kills no more cores; its neighbours do not see it.
    pub(super) fn quarantine(&mut self, session: u64) {
        let vm = self.vms.holding(session).unwrap_or("?");
        self.notice(Notice::of_quarantine(vm, session));
        let quarantined = true;
        self.front
            .queue(KeeperToFront::Quarantine { session, quarantined }, Vec::new());
    }

    /// Lets a VM's quarantined devices work again.
    pub(super) fn release(&mut self, name: &str) -> Result<(), String> {
        let vm = self.vms.named(name).ok_or_else(|| format!("no VM {name:?}"))?;
        let sessions = vm.sessions.clone();
        let released = self.restarts.release(&sessions);
        if released.is_empty() {
            return Err(format!("no device of VM {name:?} is quarantined"));
        }
        for session in released {
            self.notice(format!("session {session} of VM {name:?} is released"));
            let quarantined = false;
            self.front
                .queue(KeeperToFront::Quarantine { session, quarantined }, Vec::new());
        }
        Ok(())
    }

    pub(super) fn vm_gone(&mut self, vm: Vm) {
        self.tell_core(KeeperToCore::VmGone { vm: vm.config.vm }, Vec::new());
        if let Some((life, request)) = vm.removal
            && self.core.as_ref().is_some_and(|core| core.life == life)
        {
            self.tell_core(KeeperToCore::Done { request, error: None }, Vec::new());
        }
    }

    pub(super) fn add_vm(&mut self, vm: VmConfig, listener: ListenerConfig) -> anyhow::Result<()> {
        if self.reload.is_some() {
            bail!("a new configuration is just being put in force: try again in a moment");
        }
        if self.vms.named(&vm.name).is_some() {
            bail!("there is a VM {:?} already", vm.name);
        }
        let socket = listen_on(&listener.path, listener.mode, listener.group.as_deref())?;
        let named = (Some(vm.name.clone()), listener.path.clone());
        self.add_listener(listener, Some(vm), socket)?;
        // For the cores to come; the one that asked knows it.
        self.core_config.sockets.push(named);
        Ok(())
    }

    /// Gives a socket and its VM their numbers and makes them known: the VM to the core, then the socket to the front. The socket's number.
    pub(super) fn add_listener(
        &mut self,
        mut listener: ListenerConfig,
        vm: Option<VmConfig>,
        socket: Socket,
    ) -> anyhow::Result<u32> {
        self.last_listener += 1;
        listener.listener = self.last_listener;
        let fd = socket.fd.try_clone()?;
        if let Some(mut vm) = vm {
            vm.vm = self.vms.next_number();
            listener.identity = Identity::Vm { vm: vm.vm };
            self.vms.insert(vm.clone(), listener.listener);
            self.tell_core(KeeperToCore::Vm(vm), Vec::new());
        }
        self.front
            .queue(KeeperToFront::Listen(listener.clone()), vec![fd]);
        self.listeners.insert(listener.listener, (listener, socket));
        Ok(self.last_listener)
    }

    /// Takes a VM out of service; it is gone, and the answer given, when its last session has ended.
    pub(super) fn remove_vm(&mut self, request: u64, name: &str) {
        let life = self.last_life;
        let Some(vm) = self.vms.named(name).filter(|vm| vm.removal.is_none()) else {
            let error = Some(format!("no VM {name:?}"));
            return self.tell_core(KeeperToCore::Done { request, error }, Vec::new());
        };
        vm.removal = Some((life, request));
        let (number, listener, shared) = (vm.config.vm, vm.listener, vm.config.transient);
        if shared {
            self.front
                .queue(KeeperToFront::CloseVm { vm: number }, Vec::new());
        } else {
            self.take_away(listener);
        }
        if let Some(vm) = self.vms.remove(number) {
            self.vm_gone(vm);
        }
    }

    /// Takes a socket away; who came in by it goes.
    pub(super) fn take_away(&mut self, listener: u32) {
        if self.listeners.remove(&listener).is_some() {
            self.front.queue(KeeperToFront::Unlisten { listener }, Vec::new());
        }
    }
}
