//! The register in its saved form, for a keeper that takes over.
//!
//! In: a register; or its saved form. Out: the other of both, with each field named, so that none can be forgotten.

use super::{Holder, Process, Vm, Vms};
use crate::config::VmConfig;
use crate::packed::{Carried, Packer, Refusal};
use rustix::fd::OwnedFd;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The register in a form that can be saved.
#[derive(Serialize, Deserialize)]
pub(in crate::keeper) struct SavedVms {
    vms: Vec<SavedVm>,
    /// Session, VM, process and user.
    holders: Vec<(u64, u64, i32, u32)>,
    last_vm: u64,
    last_anonymous: u64,
}

#[derive(Serialize, Deserialize)]
struct SavedVm {
    config: VmConfig,
    listener: u32,
    process: Option<(i32, Carried)>,
    sessions: BTreeSet<u64>,
    removal: Option<(u64, u64)>,
}

impl SavedVms {
    /// The descriptors that it names.
    pub(in crate::keeper) fn named(&self) -> impl Iterator<Item = Carried> {
        let processes = self.vms.iter().filter_map(|vm| vm.process.as_ref());
        processes.map(|(_, handle)| *handle)
    }
}

#[cfg(test)]
impl SavedVms {
    /// Sets the numbers of all processes.
    pub(in crate::keeper) fn set_processes(&mut self, number: i32) {
        let processes = self.vms.iter_mut().filter_map(|vm| vm.process.as_mut());
        processes.for_each(|(pid, _)| *pid = number);
        self.holders.iter_mut().for_each(|holder| holder.2 = number);
    }
}

impl Vms {
    pub(in crate::keeper) fn save<'a>(&'a self, packer: &mut Packer<'a>) -> SavedVms {
        let Self {
            vms,
            sessions,
            last_vm,
            last_anonymous,
        } = self;
        let vms = vms.values().map(|vm| {
            let Vm {
                config,
                listener,
                process,
                sessions,
                removal,
            } = vm;
            SavedVm {
                config: config.clone(),
                listener: *listener,
                process: process
                    .as_ref()
                    .map(|process| (process.pid, packer.carry(&process.handle))),
                sessions: sessions.clone(),
                removal: *removal,
            }
        });
        SavedVms {
            vms: vms.collect(),
            holders: sessions
                .iter()
                .map(|(session, Holder { vm, pid, uid })| (*session, *vm, *pid, *uid))
                .collect(),
            last_vm: *last_vm,
            last_anonymous: *last_anonymous,
        }
    }

    pub(in crate::keeper) fn restore(
        saved: SavedVms,
        take: &mut impl FnMut(Carried) -> Result<OwnedFd, Refusal>,
    ) -> Result<Self, Refusal> {
        let mut vms = BTreeMap::new();
        for vm in saved.vms {
            let SavedVm {
                config,
                listener,
                process,
                sessions,
                removal,
            } = vm;
            let process = match process {
                Some((pid, handle)) => Some(Process {
                    pid,
                    handle: take(handle)?,
                }),
                None => None,
            };
            let vm = Vm {
                config,
                listener,
                process,
                sessions,
                removal,
            };
            vms.insert(vm.config.vm, vm);
        }
        let holders = saved.holders.into_iter();
        Ok(Self {
            vms,
            sessions: holders
                .map(|(session, vm, pid, uid)| (session, Holder { vm, pid, uid }))
                .collect(),
            last_vm: saved.last_vm,
            last_anonymous: saved.last_anonymous,
        })
    }
}
