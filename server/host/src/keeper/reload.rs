//! The configuration is read anew and carried out, by a fresh core on the way of an upgrade.
//!
//! In: the operator's wish, the reader's answer, the end of the core's upgrade. Out: other rights, shares, sockets, VMs; or all as it was. Must
//! never know what a key of the configuration means: `config::Change` does.
//!
//! 1. A child reads and checks the file and opens the shares (`reader.rs`): the keeper waits for no disk. 2. What cannot change is refused, and new
//!    sockets are bound: nothing has changed yet. 3. The core's upgrade, to the same program: the one on trial is given the new configuration,
//!    shares and rights ([`Keeper::exchange_settings`]); if it fails, the old ones are exchanged back. 4. When it serves, sockets and VMs
//!    come and go ([`Keeper::settle`]).

use super::binary::Binary;
use super::child::Child;
use super::limits::READ_DEADLINE;
use super::sockets::{Socket, listen_on, set_access};
use super::upgrade::{Progress, Step, now_ns};
use super::{Keeper, watch};
use crate::config::{Change, Config, CoreConfig, Identity, ListenerConfig, Present, ServerConfig, VmConfig};
use crate::control::protocol::Part;
use crate::messages::{KeeperToCore, KeeperToFront};
use crate::reader::Answer;
use crate::sandbox::Shares;
use rustix::fd::OwnedFd;
use std::time::Instant;

/// The reader is at work.
pub(super) struct Reading {
    reader: Box<Child<KeeperToCore>>,
    since: Instant,
}

/// A configuration that is to be in force. While it is on trial, the first three are those of before.
pub(super) struct Reload {
    core: CoreConfig,
    shares: Shares,
    vms: Vec<VmConfig>,
    server: ServerConfig,
    kept: Vec<ListenerConfig>,
    added: Vec<(ListenerConfig, Option<VmConfig>, Socket)>,
    removed: Vec<u32>,
}

impl Keeper {
    /// Begins a reload: gives its number (it is an upgrade of the core), or why not.
    pub(super) fn begin_reload(&mut self) -> Result<u64, String> {
        self.may_begin()?;
        let Some((source, _)) = &self.origin else {
            let text = "an earlier version, which was started with it, did not tell where the configuration is: start vmgmtd anew (all devices end)";
            return Err(text.into());
        };
        let started = (|| {
            let reader = Child::start(&Binary::own()?, "reader", false, &self.arguments)?;
            watch(&self.poll, &reader.pidfd)?;
            watch(&self.poll, &reader.channel)?;
            reader.channel.send(source, &[], &[])?;
            anyhow::Ok(Box::new(reader))
        })();
        let reader = started.map_err(|error| format!("{error:#}"))?;
        let name = source.name();
        let number = self
            .upgrades
            .begin(self.core_binary.path(), &[Part::Core], now_ns());
        self.upgrades.is_reload(&name, Vec::new());
        self.upgrades.begin_part();
        tracing::info!("reload {number} of {name}");
        let since = Instant::now();
        self.upgrading = Some((self.core_binary.clone(), Step::Reading(Reading { reader, since })));
        self.tell_report();
        Ok(number)
    }

    /// Waits for the reader; then goes on as any upgrade of the core.
    pub(super) fn read_configuration(&mut self, binary: &Binary, mut reading: Reading) -> Progress {
        // Looked at before its words, so that its last ones are not missed.
        let exit = reading.reader.ended();
        let answer = reading.reader.receive::<Answer>();
        let late = reading.since.elapsed() > READ_DEADLINE || self.stop_at.is_some();
        if !late && exit.is_none() && !matches!(answer, Ok(Some(_))) {
            return Progress::Running(Step::Reading(reading));
        }
        self.dismiss(*reading.reader);
        let prepared = match (answer, exit) {
            (Ok(Some(packet)), _) => match packet.header {
                Answer::Good(config) => self.prepare(*config, packet.fds),
                Answer::Bad(text) => Err(text),
            },
            (_, Some(exit)) => Err(format!(
                "the configuration could not be read: its reader ended by {}",
                exit.text
            )),
            (_, None) => Err(format!(
                "the configuration and its shares could not be read within {} s: does the disk of a share hang?",
                READ_DEADLINE.as_secs()
            )),
        };
        match prepared {
            Ok(()) => self.freeze_core(binary),
            Err(text) => Progress::Denied(text),
        }
    }

    /// All that can be wrong with a configuration that is good by itself.
    fn prepare(&mut self, config: Config, shares: Vec<OwnedFd>) -> Result<(), String> {
        let Some((source, server)) = &self.origin else {
            return Err("where the configuration is is not known".into());
        };
        let listeners = self.listeners.values().map(|(listener, _)| listener);
        let present = Present {
            server,
            core: &self.core_config,
            listeners: listeners
                .map(|listener| (listener, self.configured.contains(&listener.listener)))
                .collect(),
            vms: self.vms.iter().map(|vm| (&vm.config, vm.listener)).collect(),
        };
        let Change {
            server,
            core,
            vms,
            kept,
            added,
            removed,
            lines,
        } = Change::between(&present, config).map_err(|refusals| refusals.join("\n"))?;
        let bound = added.into_iter().map(|(listener, vm)| {
            let socket = listen_on(&listener.path, listener.mode, listener.group.as_deref());
            socket.map(|socket| (listener, vm, socket))
        });
        let added = bound
            .collect::<Result<_, _>>()
            .map_err(|mistake| mistake.to_string())?;
        let name = source.name();
        self.upgrades.is_reload(&name, lines);
        let paths = core.shares.iter().map(|share| share.path.clone());
        self.reload = Some(Reload {
            shares: Shares::of_opened(paths.zip(shares)),
            core,
            vms,
            server,
            kept,
            added,
            removed,
        });
        self.tell_report();
        Ok(())
    }

    /// What the core on trial is to be given.
    pub(super) fn next_core_config(&self) -> &CoreConfig {
        self.reload
            .as_ref()
            .map_or(&self.core_config, |reload| &reload.core)
    }

    /// Puts the new configuration in the old one's place for the cores that start from now on, or the old one back.
    pub(super) fn exchange_settings(&mut self) {
        if let Some(reload) = &mut self.reload {
            std::mem::swap(&mut self.core_config, &mut reload.core);
            std::mem::swap(&mut self.shares, &mut reload.shares);
            reload.vms.iter_mut().for_each(|vm| self.vms.exchange(vm));
        }
    }

    /// The core serves with the new configuration: all else follows.
    pub(super) fn settle(&mut self, reload: Reload) {
        self.drain_deadline_ms = reload.server.drain_deadline_ms;
        if let Some((_, server)) = &mut self.origin {
            *server = reload.server;
        }
        for number in reload.removed {
            self.configured.remove(&number);
            self.take_away(number);
            // (Those of a shared socket end with their sessions.)
            if let Some(vm) = self.vms.leave(number) {
                self.vm_gone(vm);
            }
        }
        for listener in reload.kept {
            self.configured.insert(listener.listener);
            self.keep(listener);
        }
        for (listener, vm, socket) in reload.added {
            let path = listener.path.clone();
            match self.add_listener(listener, vm, socket) {
                Ok(number) => {
                    self.configured.insert(number);
                }
                Err(error) => self.notice(format!("socket {} cannot be served: {error:#}", path.display())),
            }
        }
    }

    /// A socket stays, as the new configuration has it.
    fn keep(&mut self, listener: ListenerConfig) {
        let number = listener.listener;
        let Some((old, _)) = self.listeners.get_mut(&number) else {
            return; // it was removed at run time meanwhile
        };
        let old = std::mem::replace(old, listener.clone());
        if (old.mode, &old.group) != (listener.mode, &listener.group)
            && let Err(mistake) = set_access(&listener.path, listener.mode, listener.group.as_deref())
        {
            self.notice(mistake.to_string());
        }
        // One that came in by a shared socket while the core was on trial has the rights of before.
        if let Identity::Anonymous(template) = &listener.identity {
            let its = self.vms.iter().filter(|vm| vm.listener == number);
            let its: Vec<_> = its.map(|vm| template.rights_for(&vm.config)).collect();
            for mut config in its {
                self.tell_core(KeeperToCore::Vm(config.clone()), Vec::new());
                self.vms.exchange(&mut config);
            }
        }
        self.front.queue(KeeperToFront::Listen(listener), Vec::new());
    }
}
