//! One client, the inner side: what its function says, and what the core is told of it.
//!
//! In: outputs of the function. Out: replies for the connection, signals, packets and touches for the core. Must never know: the
//! client's bytes, another session.

use super::closer::SharedFd;
use super::core_link::CoreLink;
use super::message_dma::Answer;
use super::session::{Outside, Session};
use crate::messages::FrontToCore;
use crate::words::{MappedWords, create_writable_page};
use std::rc::Rc;
use vmgmt_device::Tick;
use vmgmt_device::page::CorePage;
use vmgmt_device::registers::{Input, Output};
use vmgmt_wire::{FdSlot, Reply};

impl Session {
    /// Tells the core life in service of this session, once.
    pub fn tell_core(&mut self, outside: &mut Outside<'_>) {
        let Some(core) = outside.core.as_deref_mut() else {
            return;
        };
        if self.device.is_none() || self.socket.is_none() || self.told_life == Some(core.life) {
            return;
        }
        if let Err(error) = self.try_tell_core(outside.now, core) {
            tracing::error!(session = self.number, client = %self.name, %error, "no page for the core: the session is closed");
            self.end(outside, "no memory for its page");
            return;
        }
        self.after_function(outside);
    }

    fn try_tell_core(&mut self, now: Tick, core: &mut CoreLink) -> anyhow::Result<()> {
        let Some(device) = &mut self.device else {
            return Ok(());
        };
        let core_page = create_writable_page("vmgmt core page", CorePage::<MappedWords>::WORDS)?;
        let page = MappedWords::writable(&core_page)?;
        device.function.handle(
            now,
            Input::CoreBegins {
                life: core.life,
                page,
            },
        );
        let core_page = Rc::new(core_page);
        device.core_pages.insert(core.life, core_page.clone());
        self.told_life = Some(core.life);
        self.kicked = core.kicked(self.slot);
        let (session, vm) = (self.number, self.vm);
        let slot = u32::try_from(self.slot)?;
        let fds = [&device.front_page, &core_page, &device.state].map(|fd| fd.clone().into());
        core.outbox
            .send(FrontToCore::Session { session, slot, vm }, Vec::new(), fds.into());
        for (number, object) in self.objects.iter() {
            let message = FrontToCore::Object {
                session,
                object: number,
                writable: object.writable,
            };
            core.outbox.send(message, Vec::new(), vec![object.fd.clone()]);
        }
        let (present, eventfds) = device.function.vectors();
        if present != 0 {
            let fds = eventfds
                .iter()
                .filter_map(|slot| self.descriptors.get(*slot).cloned())
                .collect();
            core.outbox
                .send(FrontToCore::Vectors { session, present }, Vec::new(), fds);
        }
        Ok(())
    }

    /// Hands an input to the function and does what it says.
    pub fn input(&mut self, outside: &mut Outside<'_>, input: Input<MappedWords>) {
        let Some(device) = &mut self.device else { return };
        let fence = device.function.fence();
        device
            .function
            .set_messages_out(self.connection.dma_outstanding() > 0);
        device.function.handle(outside.now, input);
        if device.function.fence() != fence {
            let answers = self.dma.fence(&mut self.connection);
            self.tell_answers(outside, answers);
        }
        self.after_function(outside);
    }

    pub(super) fn after_function(&mut self, outside: &mut Outside<'_>) {
        while let Some(output) = self
            .device
            .as_mut()
            .and_then(|device| device.function.poll_output())
        {
            self.output(outside, output);
        }
        self.flush(outside);
    }

    fn output(&mut self, outside: &mut Outside<'_>, output: Output) {
        match output {
            Output::Reply { handle, reply } => {
                if let Reply::Error(errno) = &reply {
                    self.complain(
                        outside.now,
                        &format!("command {} answered with {errno}", handle.command),
                    );
                }
                self.send_reply(&handle, &reply);
            }
            Output::GiveUp { handle } => {
                self.connection.forget_reply(&handle);
                self.complain(
                    outside.now,
                    "the core did not end its DMA in time: no reply is sent",
                );
            }
            Output::Touched => {
                if let Some(core) = outside.core.as_deref_mut() {
                    core.touch(outside.now, self.slot);
                }
            }
            Output::Signal(slot) => self.signal(outside, slot),
            Output::Close(slot) => {
                self.descriptors.remove(slot);
            }
            Output::Vectors { present, eventfds } => {
                let fds: Vec<_> = eventfds
                    .iter()
                    .filter_map(|slot| self.descriptors.get(*slot).cloned())
                    .collect();
                self.tell(
                    outside,
                    FrontToCore::Vectors {
                        session: self.number,
                        present,
                    },
                    fds,
                );
            }
            Output::WatchUnmask(slot) => {
                self.watch_unmask = Some(slot.and_then(|slot| self.descriptors.get(slot).cloned()));
            }
            Output::ObjectGone(object) => {
                self.objects.remove(object);
                self.tell(
                    outside,
                    FrontToCore::ObjectGone {
                        session: self.number,
                        object,
                    },
                    Vec::new(),
                );
            }
            Output::Gone => {
                self.descriptors.clear();
                self.done = true;
            }
        }
    }

    fn signal(&mut self, outside: &Outside<'_>, slot: FdSlot) {
        let Some(fd) = self.descriptors.get(slot) else {
            return;
        };
        // Not written: the client, whose it is too, can make that wait at any time.
        if let Err(error) = outside.signals.signal(fd) {
            self.complain(outside.now, &format!("an interrupt is lost: {error}"));
        }
    }

    /// A packet for the core, if it knows this session.
    fn tell(&self, outside: &mut Outside<'_>, message: FrontToCore, fds: Vec<SharedFd>) {
        let told = self.told_life;
        if let Some(core) = outside.core.as_deref_mut().filter(|core| told == Some(core.life)) {
            core.outbox.send(message, Vec::new(), fds);
        }
    }

    pub(super) fn tell_answers(&self, outside: &mut Outside<'_>, answers: Vec<Answer>) {
        let Some(core) = outside.core.as_deref_mut() else {
            return;
        };
        for answer in answers.into_iter().filter(|answer| answer.life == core.life) {
            let Answer {
                request, data, error, ..
            } = answer;
            let message = FrontToCore::DmaAnswer {
                session: self.number,
                request,
                error: error.0,
            };
            core.outbox.send(message, data, Vec::new());
        }
    }

    /// Sends an object to the core that knows this session. True: it waits in the queue.
    pub(super) fn send_object(&self, outside: &mut Outside<'_>, object: u64, fd: SharedFd) -> bool {
        let Some(core) = outside.core.as_deref_mut() else {
            return false;
        };
        if self.told_life != Some(core.life) {
            return false;
        }
        let writable = self
            .objects
            .iter()
            .any(|(number, known)| number == object && known.writable);
        core.outbox.send(
            FrontToCore::Object {
                session: self.number,
                object,
                writable,
            },
            Vec::new(),
            vec![fd],
        );
        !core.outbox.is_empty()
    }
}
