//! Seccomp: the filter of system calls, made of [`rules`](super::rules).
//!
//! In: a role. Out: a program for the kernel, applied to all threads at once. What a call that has no rule meets:
//! * In the core it ends the process (SIGSYS). A core that calls what it never needs is taken over or has a mistake; it may die at any time,
//!   unseen, the keeper's log names the signal, and the session that was being handled is noted as the culprit. The exception is
//!   what the C library tries by itself ([`rules::REFUSED`]): that is refused.
//! * In the front it is refused (EPERM) and the process goes on. Its death would end all devices: a library's harmless surprise must not
//!   do that. Who has taken the front over gains nothing by the difference: the call is not made in either case.

use super::Role;
use super::rules::{self, Only, Rule};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};
use std::collections::BTreeMap;

/// A filter for this process.
#[derive(Debug)]
pub(super) struct Filter {
    /// Refuses, and lets everything else through. The kernel asks both and takes the stricter answer.
    refuses: Option<BpfProgram>,
    rules: BpfProgram,
}

impl Filter {
    /// Compiles a role's rules for the calling process.
    pub(super) fn of(role: Role) -> anyhow::Result<Self> {
        let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for rule in rules::of(role) {
            let ways = calls.entry(rule.call).or_default();
            for conditions in ways_of(rule)? {
                // No condition: an empty list means "always" to the compiler.
                if !conditions.is_empty() {
                    ways.push(SeccompRule::new(conditions)?);
                }
            }
        }
        let refused = match role {
            // There everything is refused.
            Role::Front => &[],
            Role::Core => rules::REFUSED,
        };
        // The stricter filter must not end the process for them.
        calls.extend(refused.iter().map(|call| (*call, Vec::new())));
        let otherwise = match role {
            Role::Front => SeccompAction::Errno(libc::EPERM.unsigned_abs()),
            Role::Core => SeccompAction::KillProcess,
        };
        let target = std::env::consts::ARCH.try_into()?;
        let rules = SeccompFilter::new(calls, otherwise, SeccompAction::Allow, target)?.try_into()?;
        let refuses = (!refused.is_empty())
            .then(|| {
                let calls = refused.iter().map(|call| (*call, Vec::new())).collect();
                let answer = SeccompAction::Errno(libc::EACCES.unsigned_abs());
                SeccompFilter::new(calls, SeccompAction::Allow, answer, target)?.try_into()
            })
            .transpose()?;
        Ok(Self { refuses, rules })
    }

    /// From here on, for all threads.
    pub(super) fn apply(&self) -> anyhow::Result<()> {
        // The other one first: after the rules no filter can be added.
        if let Some(refuses) = &self.refuses {
            apply_filter_all_threads(refuses)?;
        }
        Ok(apply_filter_all_threads(&self.rules)?)
    }
}

/// The alternatives of a rule, each a list of conditions that must all hold.
fn ways_of(rule: &Rule) -> anyhow::Result<Vec<Vec<SeccompCondition>>> {
    let mut ways = vec![Vec::new()];
    for only in rule.only {
        let choices = match *only {
            Only::OneOf(argument, values) => {
                let equal = |value: &u64| condition(argument, SeccompCmpOp::Eq, *value);
                values.iter().map(equal).collect::<anyhow::Result<Vec<_>>>()?
            }
            Only::Without(argument, bits) => vec![condition(argument, SeccompCmpOp::MaskedEq(bits), 0)?],
            Only::OwnProcess(argument) => {
                vec![condition(
                    argument,
                    SeccompCmpOp::Eq,
                    u64::from(std::process::id()),
                )?]
            }
        };
        ways = ways
            .iter()
            .flat_map(|way: &Vec<SeccompCondition>| {
                choices
                    .iter()
                    .map(move |choice| way.iter().cloned().chain([choice.clone()]).collect())
            })
            .collect();
    }
    Ok(ways)
}

/// All arguments that are looked at are numbers of 32 bits, or addresses of which only "none" is allowed.
fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> anyhow::Result<SeccompCondition> {
    let length = if operator == SeccompCmpOp::Eq && value == 0 {
        SeccompCmpArgLen::Qword
    } else {
        SeccompCmpArgLen::Dword
    };
    Ok(SeccompCondition::new(argument, length, operator, value)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_rules_of_both_roles_compile_and_none_is_there_twice() {
        for role in [Role::Front, Role::Core] {
            let filter = Filter::of(role).unwrap();
            // The kernel takes 4096 instructions.
            assert!(
                !filter.rules.is_empty() && filter.rules.len() < 1000,
                "{}",
                filter.rules.len()
            );
            let calls: BTreeSet<i64> = rules::of(role).map(|rule| rule.call).collect();
            assert_eq!(
                calls.len(),
                rules::of(role).count(),
                "a second rule would weaken the first"
            );
            assert!(rules::of(role).all(|rule| !rule.why.is_empty()));
        }
    }

    #[test]
    fn what_must_never_be_allowed_is_not() {
        let never = [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_creat,
            libc::SYS_chmod,
            libc::SYS_fchmod,
            libc::SYS_fchmodat,
            libc::SYS_mknodat,
            libc::SYS_linkat,
            libc::SYS_symlinkat,
            libc::SYS_setuid,
            libc::SYS_prctl,
            libc::SYS_seccomp,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_ioctl,
            libc::SYS_pidfd_getfd,
            libc::SYS_userfaultfd,
            libc::SYS_memfd_secret,
            libc::SYS_shmat,
            libc::SYS_chroot,
            libc::SYS_open_by_handle_at,
        ];
        for role in [Role::Front, Role::Core] {
            assert!(
                rules::of(role).all(|rule| !never.contains(&rule.call)),
                "{role:?}"
            );
        }
        let files = [
            libc::SYS_openat2,
            libc::SYS_renameat2,
            libc::SYS_unlinkat,
            libc::SYS_mkdirat,
            libc::SYS_getdents64,
        ];
        assert!(rules::of(Role::Front).all(|rule| !files.contains(&rule.call)));
    }
}
