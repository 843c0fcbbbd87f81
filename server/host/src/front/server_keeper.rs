//! The front's loop, towards the keeper: listeners, admissions, core lives, the end.
//!
//! In: [`KeeperToFront`]. Out: [`FrontToKeeper`]; calls of sessions. Must never know: what a client asks.

use super::limits;
use super::server::{Front, LISTENERS, Listener};
use super::session::{Admission, Device};
use crate::channel::{ChannelError, Packet};
use crate::config::{DeviceConfig, ListenerConfig};
use crate::messages::{FrontToKeeper, KeeperToFront};
use crate::words::MappedWords;
use anyhow::{Context, bail};
use mio::{Interest, Token};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::net::{Shutdown, shutdown};
use std::collections::BTreeMap;
use std::rc::Rc;
use vmgmt_device::registers::{Function, Input, Settings};

impl Front {
    pub(super) fn keeper_packets(&mut self) -> anyhow::Result<()> {
        if !self.keeper_ready {
            return Ok(());
        }
        for _ in 0..limits::PACKETS_PER_TURN_MAX {
            match self.keeper.channel().receive::<KeeperToFront>() {
                Ok(Some(packet)) => {
                    self.keeper_packet(packet)?;
                    if self.left {
                        return Ok(());
                    }
                }
                Ok(None) => {
                    self.keeper_ready = false;
                    return Ok(());
                }
                Err(ChannelError::Malformed(error)) => {
                    tracing::error!(%error, "a packet of the keeper is left out")
                }
                Err(error) => bail!("the keeper is gone: {error}"),
            }
        }
        Ok(())
    }

    fn keeper_packet(&mut self, packet: Packet<KeeperToFront>) -> anyhow::Result<()> {
        let Packet { header, fds, .. } = packet;
        match header {
            KeeperToFront::Listen(config) => self.listen(config, fds),
            KeeperToFront::Unlisten { listener } => {
                if let Some(gone) = self.listeners.remove(&listener) {
                    self.deregister(gone.socket.as_raw_fd());
                    // Nobody connects any more; it is closed soon.
                    let _ = shutdown(&gone.socket, Shutdown::Both);
                }
                self.end_all("its socket is taken away", |session| session.listener == listener);
            }
            KeeperToFront::Admitted { session, vm, name } => self.admitted(session, vm, name, fds),
            KeeperToFront::Refused { session, reason } => {
                if let Some(slot) = self.numbers.get(&session).copied() {
                    self.serve(slot, |session, _| session.refuse(&reason));
                    self.enqueue(slot);
                }
            }
            KeeperToFront::Core { life } => {
                if let Err(error) = self.core_begins(life, fds) {
                    tracing::error!(%error, life, "a core life cannot be taken into service");
                    let innocent = false;
                    self.tell_keeper(FrontToKeeper::CoreStuck { life, innocent });
                }
            }
            KeeperToFront::CoreDead { life } => self.core_dead(life),
            KeeperToFront::CloseVm { vm } => {
                self.end_all("the operator closed it", |session| session.vm == vm)
            }
            KeeperToFront::Quarantine { session, quarantined } => {
                if let Some(slot) = self.numbers.get(&session).copied() {
                    self.serve(slot, |session, outside| {
                        session.input(outside, Input::Quarantine(quarantined));
                    });
                }
            }
            KeeperToFront::Stop => {
                self.stopping = Some(self.now);
                self.listeners.clear();
                self.end_all("the daemon ends", |_| true);
                for slot in self.slots() {
                    // An answer about it is not waited for any more.
                    self.serve(slot, |session, _| {
                        session.done |= session.admission == Admission::Asked
                    });
                }
            }
            KeeperToFront::HandOver => self.hand_over(fds)?,
            KeeperToFront::TakeOver => self.take_over(fds)?,
            // The end of a hand-over that is over already.
            KeeperToFront::Resume | KeeperToFront::Serve | KeeperToFront::Leave => {}
        }
        Ok(())
    }

    pub(super) fn tell_keeper(&mut self, message: FrontToKeeper) {
        self.keeper.send(message, Vec::new(), Vec::new());
    }

    fn listen(&mut self, config: ListenerConfig, fds: Vec<OwnedFd>) {
        let number = config.listener;
        let Some(socket) = fds.into_iter().next().map(|fd| self.closer.watch(number, fd)) else {
            if let Some(listener) = self.listeners.get_mut(&number) {
                listener.device = config.device;
            }
            return;
        };
        if let Some(before) = self.listeners.remove(&number) {
            self.deregister(before.socket.as_raw_fd());
        }
        // Whoever made it may have left it blocking; an accept must never wait.
        let flags = rustix::fs::fcntl_getfl(&socket).map(|flags| flags | rustix::fs::OFlags::NONBLOCK);
        let set = flags.and_then(|flags| rustix::fs::fcntl_setfl(&socket, flags));
        let token = Token(LISTENERS + number as usize);
        if let Err(error) = set
            .map_err(Into::into)
            .and_then(|()| self.register(socket.as_raw_fd(), token, Interest::READABLE))
        {
            tracing::error!(%error, path = %config.path.display(), "cannot listen");
            return;
        }
        self.listeners.insert(
            number,
            Listener {
                socket,
                device: config.device,
                ready: true,
            },
        );
    }

    fn admitted(&mut self, number: u64, vm: u64, name: String, fds: Vec<OwnedFd>) {
        let Some(slot) = self.numbers.get(&number).copied() else {
            return;
        };
        let listener = self
            .sessions
            .get(slot)
            .and_then(|session| self.listeners.get(&session.listener));
        let config = listener.map(|listener| listener.device.clone());
        let frozen = self.frozen.until(vm).is_some();
        self.serve(slot, |session, outside| {
            match new_device(config, number, vm, fds) {
                Ok(mut device) => {
                    if frozen {
                        device.function.handle(outside.now, Input::Freeze(true));
                    }
                    session.admit(outside, vm, name, device);
                }
                Err(error) => session.refuse(&format!("{error:#}")),
            }
        });
        self.enqueue(slot);
    }
}

fn new_device(
    device: Option<DeviceConfig>,
    session: u64,
    vm: u64,
    fds: Vec<OwnedFd>,
) -> anyhow::Result<Device> {
    let Ok([writable, front_page, state]) = <[OwnedFd; 3]>::try_from(fds) else {
        bail!("it was admitted without its three descriptors");
    };
    let device = device.context("its listener is gone")?;
    let settings = Settings {
        session,
        vm,
        pci_vendor: device.pci_vendor,
        pci_device: device.pci_device,
        msix: device.msix,
        vectors: device.vectors,
        rings: device.rings,
        maps_max: device.maps_max,
        mapped_bytes_max: device.mapped_bytes_max,
        objects_max: device.objects_max,
        features: limits::FEATURES,
    };
    let words = MappedWords::writable(&writable).context("its front page")?;
    Ok(Device {
        function: Function::new(settings, words)?,
        front_page_writable: Rc::new(writable),
        core_pages: BTreeMap::new(),
        front_page: Rc::new(front_page),
        state: Rc::new(state),
    })
}
