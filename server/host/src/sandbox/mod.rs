//! SANDBOX: what front and core may do to the system, and how they give up the rest.
//!
//! In: a role, its account, the descriptors of the shares. Out: a process without capabilities, under another user, with an empty root
//! directory, landlock and seccomp; and a report of what of this the system allowed. Must never know: a guest, a message, a register.
//!
//! Two steps, because threads must be there before the filter that forbids to make any:
//! 1. [`enter`], while the process has one thread: root directory, user, capabilities, landlock. A front does this first of all, a core
//!    when it has read the keeper's Start.
//! 2. [`Entered::seal`], when all threads run and before the first byte of a peer: seccomp, for all threads at once.
//!
//! What each role may call, and why, is in [`rules`]; where files may be reached, in [`landlock`].

mod account;
mod calls;
mod landlock;
#[cfg(debug_assertions)]
pub mod probe;
mod root;
pub mod rules;
mod seccomp;
mod shares;
mod users;

pub use account::{Account, SandboxConfig};
pub(crate) use account::{Known, default_account, parse_account};
pub(crate) use calls::{has_ordinary_threads, peer_of};
pub use shares::{Shares, hold_namespace, open_directory};

use anyhow::Context;
use rustix::fd::BorrowedFd;
use rustix::process::{getegid, geteuid};
use rustix::time::{ClockId, clock_gettime};
use vmgmt_ctl::protocol::SandboxedRole;

/// Who goes into a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Front,
    Core,
}

impl Role {
    /// As it stands in the process's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Front => "front",
            Self::Core => "core",
        }
    }
}

/// A directory that the core works in.
#[derive(Debug, Clone, Copy)]
pub struct ShareRoot<'a> {
    pub name: &'a str,
    pub fd: BorrowedFd<'a>,
}

/// After the first step.
#[derive(Debug)]
#[must_use = "the sandbox is open until it is sealed"]
pub struct Entered {
    role: Role,
    report: SandboxedRole,
    filter: Option<seccomp::Filter>,
}

/// First step. `parent`: the keeper, at whose death this process is to die. The process must have one thread.
///
/// # Errors
/// It is to run as another user and cannot. What the system does not offer otherwise is in the report.
pub fn enter(
    role: Role,
    config: &SandboxConfig,
    parent: u32,
    shares: &[ShareRoot<'_>],
) -> anyhow::Result<Entered> {
    let mut report = SandboxedRole {
        role: role.name().into(),
        process: std::process::id(),
        ..SandboxedRole::default()
    };
    crate::fault::read();
    if !config.enabled {
        report.notes.push("the sandbox is off by configuration".into());
        users::describe(&mut report);
        return Ok(Entered {
            role,
            report,
            filter: None,
        });
    }
    print_panics_without_files();
    // The system-call library finds the clock's code and the size of pages when it is asked for the first time, and may read a file for that.
    let _ = clock_gettime(ClockId::Boottime);
    let _ = rustix::param::page_size();
    let account = match role {
        Role::Front => config.front,
        Role::Core => config.core,
    };
    if let Some(account) = account {
        if let Err(errno) = root::enter_empty() {
            let note = format!("the root directory is the host's, not an empty one: {errno}");
            report.notes.push(note);
        }
        users::become_account(account, parent, &mut report.notes)
            .with_context(|| format!("the {} cannot run as user {account}", role.name()))?;
    } else {
        let note = "it runs as the user that started vmgmtd: only root can give it one of its own";
        report.notes.push(note.into());
    }
    users::give_up_privileges(&mut report.notes)?;
    users::describe(&mut report);
    for share in shares {
        report.notes.extend(shares::lacking_access(share));
    }
    match landlock::restrict(shares) {
        Ok(abi) => report.landlock = abi,
        Err(reason) => report.notes.push(format!("no landlock: {reason}")),
    }
    let filter = seccomp::Filter::of(role).context("the filter of system calls")?;
    Ok(Entered {
        role,
        report,
        filter: Some(filter),
    })
}

impl Entered {
    /// Second step: from here on no thread of this process can do more than [`rules`] say. Gives the report.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn seal(self) -> anyhow::Result<SandboxedRole> {
        let Self {
            role,
            mut report,
            filter,
        } = self;
        if let Some(filter) = filter {
            filter.apply().with_context(|| {
                format!(
                    "seccomp for the {}: a kernel without it? `--sandbox off` goes without",
                    role.name()
                )
            })?;
            report.seccomp = true;
        }
        tracing::info!(
            "sandbox: user {}, capabilities {:#x}, landlock ABI {}, seccomp {}",
            report.user,
            report.capabilities,
            report.landlock,
            if report.seccomp { "on" } else { "off" }
        );
        for note in &report.notes {
            tracing::warn!("sandbox: {note}");
        }
        #[cfg(debug_assertions)]
        probe::run(role);
        Ok(report)
    }
}

/// The standard library reads the program's file for a backtrace, which nobody in here may open. So a panic says what and where.
fn print_panics_without_files() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let text = panic.payload_as_str().unwrap_or("no text");
        let place = panic
            .location()
            .map_or_else(String::new, |place| format!(" at {place}"));
        // By one write, so that no other process's line comes between its pieces.
        let message = format!("thread '{name}' panicked{place}:\n{text}\n");
        let _unheard = std::io::Write::write_all(&mut std::io::stderr(), message.as_bytes());
    }));
}

/// User and group of this process, for people.
fn own_account() -> Account {
    Account {
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
    }
}
