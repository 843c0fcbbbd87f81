//! What is to be done when the configuration was read anew: pure.
//!
//! In: what runs, and the new configuration, checked. Out: the difference, as it can be carried out and as a person reads it; or what cannot
//! change while vmgmtd runs, by name and with what to do. Never reads a file.

use super::{Config, CoreConfig, Identity, ListenerConfig, ServerConfig, ShareConfig, VmConfig};
use std::collections::BTreeSet;

/// What runs.
#[derive(Debug)]
pub struct Present<'a> {
    pub server: &'a ServerConfig,
    pub core: &'a CoreConfig,
    /// Sockets, and whether they are of the configuration (and were not added at run time).
    pub listeners: Vec<(&'a ListenerConfig, bool)>,
    /// VMs, each with the number of its socket.
    pub vms: Vec<(&'a VmConfig, u32)>,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Change {
    pub server: ServerConfig,
    pub core: CoreConfig,
    /// VMs that exist and have other rights or budgets, by their numbers.
    pub vms: Vec<VmConfig>,
    /// Sockets of the configuration that exist already, with their numbers.
    pub kept: Vec<ListenerConfig>,
    pub added: Vec<(ListenerConfig, Option<VmConfig>)>,
    /// Sockets that are not in the configuration any more, and their VMs with them.
    pub removed: Vec<u32>,
    /// For people; empty: nothing has changed.
    pub lines: Vec<String>,
}

impl Change {
    /// Finds the difference.
    ///
    /// # Errors
    /// What cannot change while vmgmtd runs, a line for each.
    pub fn between(present: &Present<'_>, new: Config) -> Result<Self, Vec<String>> {
        let Config {
            server,
            core,
            listeners,
            warnings: _,
        } = new;
        let mut refusals = fixed(present, &server, &core);
        let mut change = Self {
            lines: core_lines(present, &server, &core),
            server,
            core,
            vms: Vec::new(),
            kept: Vec::new(),
            added: Vec::new(),
            removed: Vec::new(),
        };
        for (listener, vm) in listeners {
            if let Err(refusal) = change.place(present, listener, vm) {
                refusals.push(refusal);
            }
        }
        change.take_leave(present);
        change.rule_the_others(present);
        if refusals.is_empty() {
            Ok(change)
        } else {
            Err(refusals)
        }
    }

    /// Finds the place of a socket of the new configuration.
    fn place(
        &mut self,
        present: &Present<'_>,
        mut listener: ListenerConfig,
        vm: Option<VmConfig>,
    ) -> Result<(), String> {
        let path = listener.path.display().to_string();
        let at_path = present
            .listeners
            .iter()
            .find(|(old, _)| old.path == listener.path);
        let named = vm.as_ref().and_then(|vm| {
            let same = |(old, _): &&(&VmConfig, u32)| old.name == vm.name && !old.transient;
            present.vms.iter().find(same)
        });
        let what = vm
            .as_ref()
            .map_or_else(|| format!("socket {path}"), |vm| format!("VM {}", vm.name));
        let once_more = "or start vmgmtd anew (all devices end)";
        match (vm, named, at_path) {
            (Some(mut vm), Some((old_vm, number)), Some((old, _))) if old.listener == *number => {
                listener.listener = *number;
                listener.identity = Identity::Vm { vm: old_vm.vm };
                vm.vm = old_vm.vm;
                let mut keys = vm_keys(old_vm, &vm);
                keys.extend(listener_keys(old, &listener));
                self.tell(&what, &keys);
                if *old_vm != &vm {
                    self.vms.push(vm);
                }
                self.kept.push(listener);
            }
            (Some(_), Some((_, number)), _) => {
                let old = present.listeners.iter().find(|(old, _)| old.listener == *number);
                return Err(match old {
                    Some((old, _)) => format!(
                        "{what}: its socket is {} and cannot become {path}: take the VM out in one reload and put it back in the next (its \
                         device and mailbox end), {once_more}",
                        old.path.display()
                    ),
                    None => format!("{what}: it is just being removed: try again in a moment"),
                });
            }
            (None, _, Some((old, _))) if matches!(old.identity, Identity::Anonymous(_)) => {
                listener.listener = old.listener;
                let mut keys = listener_keys(old, &listener);
                if let (Identity::Anonymous(before), Identity::Anonymous(template)) =
                    (&old.identity, &listener.identity)
                {
                    keys.extend(vm_keys(before, template));
                    let its = present.vms.iter().filter(|(_, number)| *number == old.listener);
                    let its = its.map(|(vm, _)| template.rights_for(vm));
                    self.vms.extend(its);
                }
                self.tell(&what, &keys);
                self.kept.push(listener);
            }
            (_, _, Some((old, _))) => {
                let owner = present.vms.iter().find(|(_, number)| *number == old.listener);
                let owner = owner.filter(|(vm, _)| !vm.transient);
                let owner = owner.map_or("any number of VMs".into(), |(vm, _)| format!("VM {}", vm.name));
                return Err(format!(
                    "{what}: its socket {path} is that of {owner} now: take that out in one reload and put this in in the next (devices that are \
                     connected there end), {once_more}"
                ));
            }
            (vm, _, None) => {
                self.lines.push(format!("{what}: added"));
                self.added.push((listener, vm));
            }
        }
        Ok(())
    }

    fn tell(&mut self, what: &str, keys: &[&str]) {
        if !keys.is_empty() {
            self.lines.push(format!("{what}: {}", keys.join(", ")));
        }
    }

    /// What was of the configuration and is not any more.
    fn take_leave(&mut self, present: &Present<'_>) {
        let kept: BTreeSet<u32> = self.kept.iter().map(|listener| listener.listener).collect();
        for (old, configured) in &present.listeners {
            if *configured && !kept.contains(&old.listener) {
                let vm = present
                    .vms
                    .iter()
                    .find(|(vm, number)| *number == old.listener && !vm.transient);
                self.lines.push(match vm {
                    Some((vm, _)) => format!("VM {}: removed", vm.name),
                    None => format!("socket {}: removed", old.path.display()),
                });
                self.removed.push(old.listener);
            }
        }
    }

    /// VMs that were added at run time stay, without shares that are gone; and the core knows their sockets.
    fn rule_the_others(&mut self, present: &Present<'_>) {
        let of_configuration: BTreeSet<u32> = self.kept.iter().map(|listener| listener.listener).collect();
        for (old, configured) in &present.listeners {
            if *configured || of_configuration.contains(&old.listener) {
                continue;
            }
            for (vm, _) in present.vms.iter().filter(|(_, number)| *number == old.listener) {
                self.core.sockets.push((Some(vm.name.clone()), old.path.clone()));
                let mut left = (*vm).clone();
                let shares = &self.core.shares;
                left.shares
                    .retain(|grant| shares.iter().any(|share| share.name == grant.share));
                if left != **vm {
                    self.lines
                        .push(format!("VM {} (added at run time): shares", vm.name));
                    self.vms.push(left);
                }
            }
        }
    }
}

/// What cannot change while vmgmtd runs.
fn fixed(present: &Present<'_>, server: &ServerConfig, core: &CoreConfig) -> Vec<String> {
    let (old, old_core) = (present.server, present.core);
    let keys = [
        ("[server] control", old.control != server.control),
        ("[server] control-mode", old.control_mode != server.control_mode),
        (
            "[server] control-group",
            old.control_group != server.control_group,
        ),
        ("[server] log", old.log != server.log),
        (
            "[sandbox] enabled",
            old_core.sandbox.enabled != core.sandbox.enabled,
        ),
        (
            "[sandbox] front-user",
            old_core.sandbox.front != core.sandbox.front,
        ),
    ];
    let changed = keys.into_iter().filter(|(_, differs)| *differs);
    let line = |(key, _)| {
        format!("{key} cannot change while vmgmtd runs: put it back, or start vmgmtd anew (all devices end)")
    };
    changed.map(line).collect()
}

fn core_lines(present: &Present<'_>, server: &ServerConfig, core: &CoreConfig) -> Vec<String> {
    let (old, old_server) = (present.core, present.server);
    let keys = [
        (
            "[server] drain-deadline-ms",
            old_server.drain_deadline_ms != server.drain_deadline_ms,
        ),
        ("[server] poll-us", old.poll_ns != core.poll_ns),
        ("[server] workers", old.workers != core.workers),
        ("[sandbox] core-user", old.sandbox.core != core.sandbox.core),
        ("[device], for VMs added at run time", old.device != core.device),
        (
            "[limits], for VMs added at run time",
            old.vm_limits != core.vm_limits,
        ),
    ];
    let mut lines: Vec<String> = keys
        .iter()
        .filter(|(_, differs)| *differs)
        .map(|(key, _)| (*key).into())
        .collect();
    for share in &core.shares {
        let before = old.shares.iter().find(|before| before.name == share.name);
        match before.map(|before| share_keys(before, share)) {
            None => lines.push(format!("share {}: added", share.name)),
            Some(keys) if keys.is_empty() => {}
            Some(keys) => lines.push(format!("share {}: {}", share.name, keys.join(", "))),
        }
    }
    let gone = old
        .shares
        .iter()
        .filter(|before| !core.shares.iter().any(|share| share.name == before.name));
    lines.extend(gone.map(|share| format!("share {}: removed", share.name)));
    lines
}

fn share_keys(old: &ShareConfig, new: &ShareConfig) -> Vec<&'static str> {
    named([
        ("path", old.path != new.path),
        ("bytes-max", old.bytes_max != new.bytes_max),
        ("files-max", old.files_max != new.files_max),
    ])
}

fn vm_keys(old: &VmConfig, new: &VmConfig) -> Vec<&'static str> {
    named([
        ("shares", old.shares != new.shares),
        ("reach", old.reach != new.reach),
        ("send-to-all", old.send_to_all != new.send_to_all),
        ("limits", old.limits != new.limits),
    ])
}

fn listener_keys(old: &ListenerConfig, new: &ListenerConfig) -> Vec<&'static str> {
    named([
        ("mode", old.mode != new.mode),
        ("group", old.group != new.group),
        (
            "device (for those that connect from now on)",
            old.device != new.device,
        ),
    ])
}

fn named<const N: usize>(keys: [(&'static str, bool); N]) -> Vec<&'static str> {
    let changed = keys.into_iter().filter(|(_, differs)| *differs);
    changed.map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Flags, load};
    use super::*;

    const VM: &str = "[[vm]]\nname = \"web\"\nsocket = \"/r/web.sock\"\n";

    fn config(text: &str) -> Config {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("c.toml");
        std::fs::write(&file, text).unwrap();
        let flags = Flags {
            control: Some("/r/control.sock".into()),
            ..Flags::default()
        };
        load(Some(&file), &flags).unwrap()
    }

    /// What comes of `new` where `old` runs, with a VM that was added at run time: lines, or refusals.
    fn change(old: &str, new: &str) -> Result<Change, String> {
        let old = config(old);
        let mut listeners = Vec::new();
        let mut vms = Vec::new();
        for (number, (mut listener, vm)) in (1..).zip(old.listeners) {
            listener.listener = number;
            if let Some(mut vm) = vm {
                vm.vm = u64::from(number);
                listener.identity = Identity::Vm { vm: vm.vm };
                vms.push((vm, number));
            }
            listeners.push((listener, true));
        }
        let mut late = config(VM).listeners.remove(0);
        late.0.listener = 90;
        late.0.path = "/r/late.sock".into();
        let mut vm = late.1.unwrap();
        (vm.vm, vm.name) = (90, "late".into());
        vm.shares = vec![super::super::ShareGrant {
            share: "tmp".into(),
            access: super::super::Access::ReadOnly,
        }];
        vms.push((vm, 90));
        listeners.push((late.0, false));
        // One that is just being removed: its socket is gone.
        let mut gone = vms[0].0.clone();
        gone.name = "gone".into();
        vms.push((gone, 91));
        let present = Present {
            server: &old.server,
            core: &old.core,
            listeners: listeners.iter().map(|(listener, of)| (listener, *of)).collect(),
            vms: vms.iter().map(|(vm, number)| (vm, *number)).collect(),
        };
        Change::between(&present, config(new)).map_err(|refusals| refusals.join("\n"))
    }

    #[test]
    fn what_is_the_same_stays_and_what_was_added_at_run_time_stays_or_becomes_the_configurations() {
        let share = "[[share]]\nname = \"tmp\"\npath = \"/tmp\"\n";
        let same = change(&format!("{share}{VM}"), &format!("{share}{VM}")).unwrap();
        assert!(same.lines.is_empty() && same.removed.is_empty() && same.vms.is_empty());
        assert_eq!(same.kept[0].listener, 1);
        assert_eq!(same.core.sockets.len(), 2, "late is still known");
        // A share that is gone is nobody's any more.
        let gone = change(&format!("{share}{VM}"), VM).unwrap();
        assert_eq!(
            gone.lines,
            ["share tmp: removed", "VM late (added at run time): shares"]
        );
        assert!(
            gone.vms
                .iter()
                .all(|vm| vm.name == "late" && vm.shares.is_empty())
        );
        // It is in the file now.
        let late = "[[vm]]\nname = \"late\"\nsocket = \"/r/late.sock\"\nsend-to-all = true\n";
        let taken = change(VM, &format!("{VM}{late}")).unwrap();
        assert_eq!(taken.lines, ["VM late: shares, send-to-all"]);
        assert_eq!((taken.kept[1].listener, taken.vms[0].vm), (90, 90));
    }

    #[test]
    fn what_would_take_a_device_away_unasked_is_refused() {
        let refusal = |new: &str| change(VM, new).map(|change| change.lines).unwrap_err();
        let vm = |name: &str, socket: &str| {
            format!("{VM}[[vm]]\nname = \"{name}\"\nsocket = \"/r/{socket}.sock\"\n")
        };
        assert!(
            refusal(&vm("late", "other")).contains("VM late: its socket is /r/late.sock and cannot become")
        );
        assert!(refusal(&vm("new", "late")).contains("is that of VM late now"));
        assert!(refusal(&vm("gone", "gone")).contains("VM gone: it is just being removed"));
        assert!(refusal("[[socket]]\npath = \"/r/web.sock\"\n").contains("is that of VM web now"));
        assert!(refusal(&VM.replace("web.sock", "w.sock")).contains("take the VM out in one reload"));
        let both = refusal(&format!(
            "[server]\nlog = \"debug\"\ncontrol-mode = \"0660\"\n{VM}"
        ));
        assert_eq!(both.lines().count(), 2, "{both}");
        let shared = change(
            "[[socket]]\npath = \"/r/s.sock\"\n",
            "[[vm]]\nname = \"a\"\nsocket = \"/r/s.sock\"\n",
        );
        assert!(
            shared
                .map(|change| change.lines)
                .unwrap_err()
                .contains("that of any number of VMs")
        );
    }
}
