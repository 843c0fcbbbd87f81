//! The accounts of front and core: what the configuration names, or numbers that nobody else uses.
//!
//! In: text of the configuration, /etc/passwd, /etc/group. Out: numbers. Changes nothing.

use serde::{Deserialize, Serialize};
use std::path::Path;

/// User and group that a role runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
}

impl std::fmt::Display for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

impl std::str::FromStr for Account {
    type Err = String;

    /// As it is displayed: `UID:GID`.
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text
            .split_once(':')
            .and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
        let (uid, gid) = numbers.ok_or_else(|| format!("{text:?} is no UID:GID"))?;
        Ok(Self { uid, gid })
    }
}

/// What the configuration says of the sandbox, resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxConfig {
    pub enabled: bool,
    /// `None`: vmgmtd does not run as root and cannot change users.
    pub front: Option<Account>,
    pub core: Option<Account>,
}

/// The range in which systemd looks for its DynamicUser numbers (systemd.exec(5)): distributions give them to nobody.
const FIRST: u32 = 61_184;
const LAST: u32 = 65_519;

/// Who has which number on this host.
#[derive(Debug, Default)]
pub(crate) struct Known {
    passwd: String,
    group: String,
    /// Numbers that systemd has given to services now, one file each.
    dynamic: Option<std::path::PathBuf>,
}

impl Known {
    pub(crate) fn of_this_host() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            passwd: read("/etc/passwd"),
            group: read("/etc/group"),
            dynamic: Some("/run/systemd/dynamic-uid".into()),
        }
    }

    /// The account of that name.
    fn account(&self, name: &str) -> Option<Account> {
        self.passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let found = fields.next() == Some(name);
            let (uid, gid) = (fields.nth(1)?, fields.next()?);
            found.then_some(Account {
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
            })
        })
    }

    fn has_user(&self, number: u32) -> bool {
        has_number(&self.passwd, number)
            || has_number(&self.group, number)
            || self
                .dynamic
                .as_deref()
                .is_some_and(|directory| is_there(directory, number))
    }

    /// The group of a user number, if that user is known.
    fn group_of(&self, uid: u32) -> Option<u32> {
        self.passwd.lines().find_map(|line| {
            let mut fields = line.split(':').skip(2);
            let found = fields.next()?.parse() == Ok(uid);
            found.then(|| fields.next()?.parse().ok()).flatten()
        })
    }
}

fn is_there(directory: &Path, number: u32) -> bool {
    directory.join(number.to_string()).exists()
}

/// Whether the third field of any line is this number: users in /etc/passwd, groups in /etc/group.
fn has_number(text: &str, number: u32) -> bool {
    text.lines()
        .any(|line| line.split(':').nth(2).and_then(|field| field.parse().ok()) == Some(number))
}

/// The account of a role that the configuration does not name: the system user `vmgmt-ROLE`, or else the first unused number from
/// one on that is derived from that name, so that it is the same after each start. `taken`: the other role's.
pub(crate) fn default_account(known: &Known, role: &str, taken: Option<Account>) -> Account {
    let name = format!("vmgmt-{role}");
    if let Some(account) = known.account(&name) {
        return account;
    }
    let count = LAST - FIRST + 1;
    let begin = crc32fast::hash(name.as_bytes()) % count;
    let free = |number: &u32| !known.has_user(*number) && taken.is_none_or(|other| other.uid != *number);
    let number = (0..count).map(|step| FIRST + (begin + step) % count).find(free);
    // All 4336 in use: then the derived one, which is still nobody's login.
    let number = number.unwrap_or(FIRST + begin);
    Account {
        uid: number,
        gid: number,
    }
}

/// Reads `NAME`, `UID` or `UID:GID`.
pub(crate) fn parse_account(known: &Known, text: &str) -> Result<Account, String> {
    let account = if text.contains(':') {
        text.parse()?
    } else if let Ok(uid) = text.parse() {
        Account {
            uid,
            gid: known.group_of(uid).unwrap_or(uid),
        }
    } else {
        known
            .account(text)
            .ok_or_else(|| format!("no user {text:?} on this host"))?
    };
    if account.uid == 0 || account.gid == 0 {
        return Err(format!("{text:?} is root, who is in no sandbox"));
    }
    if account.uid == u32::MAX || account.gid == u32::MAX {
        return Err(format!("{text:?} is no account"));
    }
    Ok(account)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(passwd: &str) -> Known {
        Known {
            passwd: passwd.into(),
            group: "kvm:x:104:\n".into(),
            dynamic: None,
        }
    }

    #[test]
    fn without_an_account_of_its_own_a_role_gets_a_number_that_nobody_has() {
        let nobody = known("root:x:0:0::/root:/bin/sh\n");
        let front = default_account(&nobody, "front", None);
        let core = default_account(&nobody, "core", Some(front));
        assert_eq!(
            front,
            default_account(&nobody, "front", None),
            "the same after each start"
        );
        assert!(
            front.uid != core.uid
                && (FIRST..=LAST).contains(&front.uid)
                && (FIRST..=LAST).contains(&core.uid)
        );
        let taken = known(&format!("other:x:{}:5::/:/bin/sh\n", front.uid));
        assert_ne!(default_account(&taken, "front", None), front);
        assert_ne!(default_account(&nobody, "front", Some(front)), front);
        let own = known("vmgmt-front:x:991:990::/:/bin/false\n");
        assert_eq!(
            default_account(&own, "front", None),
            Account { uid: 991, gid: 990 }
        );
    }

    #[test]
    fn accounts_are_named_or_numbered_and_root_is_refused() {
        let known = known("root:x:0:0::/:\nqemu:x:107:108::/:\n");
        let account = |uid, gid| Ok(Account { uid, gid });
        assert_eq!(parse_account(&known, "qemu"), account(107, 108));
        assert_eq!(parse_account(&known, "107"), account(107, 108));
        assert_eq!(parse_account(&known, "5000"), account(5000, 5000));
        assert_eq!(parse_account(&known, "5000:7"), account(5000, 7));
        for wrong in ["root", "0", "5:0", "nobody-here", "a:b", "", "4294967295"] {
            assert!(parse_account(&known, wrong).is_err(), "{wrong}");
        }
    }
}
