//! What comes into the core: packets of the keeper and of the front, operators' requests, results of workers.
//!
//! In: descriptors that are ready. Out: inputs for the rooms. The keeper's packets go before the front's: a session names a VM.

use super::slices::Slice;
use super::*;
use crate::control::protocol::{Part, PartReport, UpgradeState};
use crate::messages::BURIED;
use vmgmt_device::page::control;

impl EventLoop {
    /// `untold`: there may be results of which the workers have not told.
    pub(super) fn handle_events(&mut self, events: &Events, untold: bool) -> anyhow::Result<()> {
        let mut store = untold;
        for event in events {
            match event.token() {
                WAKE => self.wake.drain(),
                STORE => store = true,
                // The keeper's channel is emptied before the front's, whatever order they come in: a session names a VM.
                KEEPER | FRONT => {}
                token => {
                    self.operators.handle_ready(token);
                }
            }
        }
        self.take_in_everything()?;
        if store {
            self.take_finished();
        }
        // An operator who asked sooner would be told of a state in which the keeper's words are missing.
        if self.ready {
            self.take_operators();
        }
        Ok(())
    }

    /// Keeper first, then front.
    pub(super) fn take_in_everything(&mut self) -> anyhow::Result<()> {
        // All of it, however much: the front says nothing of a session before the keeper has said all that this core needs to know of it.
        loop {
            match self.keeper.receive::<KeeperToCore>() {
                Ok(Some(packet)) => self.handle_keeper(packet)?,
                Ok(None) => break,
                Err(ChannelError::Closed) => {
                    self.stopping = true;
                    break;
                }
                Err(error) => return Err(error).context("the keeper's channel"),
            }
        }
        self.send_to_front()?;
        let slice = Slice::begin(now());
        self.more_comes = true;
        for _ in 0..PACKETS_MAX {
            let packet = match self.held.pop_front() {
                Some(packet) => Ok(Some(packet)),
                None => self.front.receive::<FrontToCore>(),
            };
            match packet {
                Ok(Some(packet)) => self.handle_front(packet),
                Ok(None) => {
                    self.more_comes = false;
                    for (_, session) in self.sessions.iter_mut() {
                        session.memory.drained();
                    }
                    break;
                }
                Err(ChannelError::Closed) => {
                    self.stopping = true;
                    break;
                }
                Err(error) => return Err(error).context("the front's channel"),
            }
            if slice.is_over(now()) {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn handle_keeper(&mut self, packet: Packet<KeeperToCore>) -> anyhow::Result<()> {
        match packet.header {
            KeeperToCore::Start { .. } => bail!("the keeper said Start twice"),
            KeeperToCore::Check { .. } => bail!("the keeper asks a core that serves whether it could"),
            KeeperToCore::Go => {}
            KeeperToCore::Drain { deadline_ms } => {
                self.draining = Some(now().after_ns(deadline_ms.saturating_mul(1_000_000)));
            }
            KeeperToCore::Vm(vm) => {
                self.vms.insert(vm.vm, vm.clone());
                self.hub.handle(now(), interface::Input::Vm(vm));
            }
            KeeperToCore::VmGone { vm } => {
                if let Some(vm) = self.vms.remove(&vm) {
                    self.faults.remove(&vm.name);
                }
                self.thaw_unknown();
                self.hub.handle(now(), interface::Input::VmGone { vm });
            }
            KeeperToCore::Done { request: BURIED, .. } => {
                for vm in self.hub.haunted() {
                    self.log(
                        Some(vm),
                        "the worker that slept in a disk is gone: what waited for it goes on".into(),
                    );
                }
                self.hub.handle(now(), interface::Input::Buried);
            }
            KeeperToCore::Done { request, error } => {
                let added = self.adding.remove(&request).filter(|_| error.is_none());
                self.config.sockets.extend(added);
                self.operators.handle_keeper(request, error);
            }
            KeeperToCore::Upgrading { request, number } => self.operators.handle_upgrading(request, number),
            KeeperToCore::Upgrade(report) => {
                let its_turn =
                    |part: &PartReport| part.part == Part::Core && part.state == UpgradeState::Running;
                let asked = report.parts.iter().any(its_turn);
                self.upgrade = Some(report);
                if asked && self.ready && self.draining.is_none() {
                    self.tidy_up()?;
                    self.tell_keeper(&CoreToKeeper::Able { life: self.life })?;
                }
            }
            KeeperToCore::Notice(Notice {
                text,
                fault_of,
                time_ns,
            }) => {
                if let Some(vm) = fault_of {
                    let text = text.clone();
                    self.faults.insert(vm, LastFault { time_ns, text });
                }
                // The keeper has logged it when it happened; a new core is told of all that there was.
                let time_ns = if time_ns == 0 { wall_clock_ns() } else { time_ns };
                self.keep_line(time_ns, None, text);
            }
            KeeperToCore::Stop => self.stopping = true,
        }
        Ok(())
    }

    pub(super) fn handle_front(&mut self, packet: Packet<FrontToCore>) {
        let Packet { header, payload, fds } = packet;
        self.wake.blame(session_of(&header));
        self.take_front(header, payload, fds);
        self.wake.blame(0);
    }

    fn take_front(&mut self, header: FrontToCore, payload: Vec<u8>, fds: Vec<OwnedFd>) {
        match header {
            FrontToCore::Session { session, slot, vm } => {
                #[cfg(debug_assertions)]
                crate::sandbox::probe::front_page(&fds);
                let limits = self.memory_limits();
                match Session::attach(session, slot as usize, vm, fds, limits) {
                    Ok(attached) => {
                        let quarantined = attached.front.control() & control::QUARANTINED != 0;
                        self.sessions.insert(session, attached);
                        fault::nth("adopt", self.sessions.count());
                        self.hub
                            .handle(now(), interface::Input::SessionOpened { session, vm });
                        if quarantined {
                            self.hub.handle(now(), interface::Input::SessionReset { session });
                        }
                    }
                    Err(error) => self.log(
                        Some(vm),
                        format!("session {session} cannot be taken over: {error}"),
                    ),
                }
            }
            FrontToCore::Object {
                session,
                object,
                writable,
            } => {
                if let (Some(memory), Some(fd)) = (self.sessions.memory(session), fds.into_iter().next()) {
                    memory.object(object, fd, writable);
                }
                self.look_again(session);
            }
            FrontToCore::ObjectGone { session, object } => {
                if let Some(memory) = self.sessions.memory(session) {
                    memory.object_gone(object);
                }
            }
            FrontToCore::Vectors { session, present } => {
                if let Some(session) = self.sessions.get_mut(session) {
                    session.set_vectors(present, fds);
                    session.look = true;
                    self.scan = true;
                }
            }
            FrontToCore::SessionGone { session } => self.end_session(session),
            FrontToCore::Sandboxed(front) => {
                self.sandbox.retain(|role| role.role != front.role);
                self.sandbox.insert(0, *front);
            }
            FrontToCore::Adopted => self.finish_adoption(),
            FrontToCore::DmaAnswer {
                session,
                request,
                error,
            } => {
                if let Some(memory) = self.sessions.memory(session) {
                    memory.handle_dma_answer(now(), request, error, payload);
                }
                self.bulk.handle_memory();
                self.look_again(session);
            }
            FrontToCore::Frozen {
                vm,
                until,
                request,
                kept,
            } => self.frozen(vm, until, request, kept),
        }
    }

    /// All sessions that are still there have been told. What the hub still expects to hear of others' completions it will not hear.
    fn finish_adoption(&mut self) {
        self.adopted = true;
        self.thaw_unknown();
        self.hub.handle(now(), interface::Input::Adopted);
        for vm in self.hub.haunted() {
            let text = "a worker of the core that was killed sleeps in a disk: puts that were under way, files open for writing and pulls wait until it is gone";
            self.log(Some(vm), text.to_owned());
        }
    }

    pub(super) fn look_again(&mut self, session: u64) {
        if let Some(session) = self.sessions.get_mut(session) {
            session.look = true;
            self.scan = true;
        }
    }

    pub(super) fn end_session(&mut self, number: u64) {
        let Some(session) = self.sessions.get_mut(number) else {
            return;
        };
        session.ended = true;
        self.watched.insert(number);
        session.memory.cancel_leases();
        // What the guest got, it got: the hub is to know before it hears of the end.
        let now = now();
        session.handle(now, Input::End);
        self.bulk.void_channel(number, None);
        self.route(number, now);
        self.hub
            .handle(now, interface::Input::SessionClosed { session: number });
    }

    pub(super) fn memory_limits(&self) -> MemoryLimits {
        let device = DeviceConfig::default();
        MemoryLimits {
            mapped_bytes_max: device.mapped_bytes_max,
            objects_max: device.objects_max as usize,
        }
    }

    pub(super) fn take_finished(&mut self) {
        let now = now();
        for finished in self.store.take_finished() {
            let effect = finished.effect;
            self.wake.blame_vm(self.hub.owner_of(effect));
            let outcome = match finished.done {
                Done::Opened { file, stat, identity } => Some(Outcome::Opened {
                    slot: self.store.insert(Arc::new(*file)),
                    stat,
                    identity,
                }),
                done if self.bulk.has(effect) => self.bulk.handle_worker(effect, done),
                Done::Outcome(outcome) => Some(outcome),
                Done::Warm | Done::Scratch(_) | Done::Stored { .. } | Done::Revoked => None,
            };
            if let Some(outcome) = outcome {
                self.hub
                    .handle(now, interface::Input::Outcome { effect, outcome });
            }
        }
        self.wake.blame_vm(0);
    }

    pub(super) fn take_operators(&mut self) {
        let now = now();
        loop {
            let books = Books {
                config: &self.config,
                vms: &self.vms,
                lines: &self.lines,
                sandbox: &self.sandbox,
                faults: &self.faults,
                life: self.life,
                started: self.started,
                sessions: &self.sessions,
                upgrade: self.upgrade.as_deref(),
                frozen: self.freezes.levels(),
                now,
            };
            let ask = self.operators.poll(&books);
            // Before the end of a connection: what it got is not to be given to another.
            self.tell_written();
            let Some(ask) = ask else {
                break;
            };
            match ask {
                Ask::Hub { client, id, request } => self
                    .hub
                    .handle(now, interface::Input::Control { client, id, request }),
                Ask::Transfer {
                    client,
                    id,
                    fd,
                    transfer,
                } => {
                    let file = self.store.adopt(fd);
                    let request = match transfer {
                        Transfer::Push {
                            target,
                            size,
                            name,
                            wait_ns,
                            key,
                        } => ControlRequest::Push {
                            target,
                            file,
                            size,
                            name,
                            wait_ns,
                            key,
                        },
                        Transfer::Pull {
                            source,
                            path,
                            wait_ns,
                            key,
                        } => ControlRequest::Pull {
                            source,
                            path,
                            file,
                            wait_ns,
                            key,
                        },
                    };
                    self.hub
                        .handle(now, interface::Input::Control { client, id, request });
                }
                Ask::AddVm {
                    request,
                    vm,
                    listener,
                } => {
                    self.adding
                        .insert(request, (Some(vm.name.clone()), listener.path.clone()));
                    let message = CoreToKeeper::AddVm {
                        request,
                        vm,
                        listener,
                    };
                    self.ask_keeper(request, &message);
                }
                Ask::RemoveVm { request, name } => {
                    self.ask_keeper(request, &CoreToKeeper::RemoveVm { request, name })
                }
                Ask::Upgrade { request, upgrade } => {
                    self.ask_keeper(request, &CoreToKeeper::Upgrade { request, upgrade });
                }
                Ask::Reload { request } if self.reloads => {
                    self.ask_keeper(request, &CoreToKeeper::Reload { request });
                }
                Ask::Reload { request } => {
                    let text = "the keeper is of an earlier version and cannot reload: vmgmtctl upgrade --part keeper";
                    self.operators.handle_keeper(request, Some(text.to_owned()));
                }
                Ask::Release { request, vm } => {
                    self.ask_keeper(request, &CoreToKeeper::Release { request, vm })
                }
                Ask::Freeze {
                    client,
                    id,
                    name,
                    timeout_ns,
                } => self.freeze(client, id, &name, timeout_ns, now),
                Ask::Thaw { client, id, name } => self.thaw(client, id, &name),
                Ask::Closed { client } => {
                    self.end_freezes(client);
                    self.hub.handle(now, interface::Input::ControlClosed { client });
                }
            }
        }
        self.operators.tell_followers(&self.lines);
    }

    /// Asks the keeper for an operator; what it does not take is answered here.
    fn ask_keeper(&mut self, request: u64, message: &CoreToKeeper) {
        if let Err(error) = self.tell_keeper(message) {
            self.operators.handle_keeper(request, Some(error.to_string()));
        }
    }
}

/// The session that a packet of the front is about, 0: none.
const fn session_of(header: &FrontToCore) -> u64 {
    match header {
        FrontToCore::Session { session, .. }
        | FrontToCore::Object { session, .. }
        | FrontToCore::ObjectGone { session, .. }
        | FrontToCore::Vectors { session, .. }
        | FrontToCore::SessionGone { session }
        | FrontToCore::DmaAnswer { session, .. } => *session,
        FrontToCore::Adopted | FrontToCore::Frozen { .. } | FrontToCore::Sandboxed(_) => 0,
    }
}
