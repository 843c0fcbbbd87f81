//! The configuration's section `[sandbox]`: accounts by name or number in, numbers out.

use super::file::{SandboxSection, Section};
use super::{Flags, Mistake, Mistakes};
use crate::sandbox::{Account, Known, SandboxConfig, default_account, parse_account};

/// Checks the section, and finds the accounts that it does not name.
pub(super) fn check(
    section: &Section<SandboxSection>,
    flags: &Flags,
    mistakes: &mut Mistakes,
) -> SandboxConfig {
    let enabled = flags.sandbox.or(section.value.enabled).unwrap_or(true);
    let known = Known::of_this_host();
    let is_root = rustix::process::geteuid().is_root();
    let mut account = |key: &str, name: Option<&String>, taken: Option<Account>| -> Option<Account> {
        let Some(name) = name else {
            return is_root.then(|| default_account(&known, key.trim_end_matches("-user"), taken));
        };
        if !is_root {
            let what = format!("{name:?}: vmgmtd does not run as root and cannot change to another user");
            mistakes.push(section.place(key), what, "leave it out, or start vmgmtd as root");
            return None;
        }
        parse_account(&known, name)
            .map_err(|what| mistakes.push(section.place(key), what, "name a system user, a UID or UID:GID"))
            .ok()
    };
    let front = account("front-user", section.value.front_user.as_ref(), None);
    let core = account("core-user", section.value.core_user.as_ref(), front);
    if let (Some(front), Some(core)) = (front, core)
        && front.uid == core.uid
    {
        let what = format!("front and core would both be user {}", front.uid);
        mistakes.push(section.place("core-user"), what, "give each a user of its own");
    }
    SandboxConfig { enabled, front, core }
}

/// What an operator should know who turned it off.
pub(super) fn warning(config: &SandboxConfig, section: &Section<SandboxSection>) -> Option<Mistake> {
    (!config.enabled).then(|| Mistake {
        place: if section.value.enabled == Some(false) {
            section.place("enabled")
        } else {
            "--sandbox off".into()
        },
        what: "front and core are not sandboxed: a mistake in them that a guest can use has all rights of vmgmtd".into(),
        remedy: "turn it on again when you have found what it was in the way of".into(),
    })
}
