//! A child: front or core, a program in a role. In: messages for it. Out: its messages, and how it died.
//!
//! It gets its channel as standard input, so nothing here adopts a descriptor by number; all others are close-on-exec.

use super::binary::Binary;
use crate::channel::{Channel, ChannelError, Packet};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::os::unix::process::CommandExt;
use std::process::Stdio;

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exit {
    /// For the log: "signal 11 (SIGSEGV)", "exit code 101".
    pub(super) text: String,
    /// It was its own doing, not a kill from outside.
    pub(super) by_itself: bool,
    pub(super) orderly: bool,
}

/// A child that takes messages of type `T`.
#[derive(Debug)]
pub(super) struct Child<T> {
    pub(super) pid: u32,
    /// Readable when it is dead.
    pub(super) pidfd: OwnedFd,
    pub(super) channel: Channel,
    pub(super) waiting: VecDeque<(T, Vec<OwnedFd>)>,
    /// Messages that are held back, while it is not known who is to get them.
    pub(super) held: Option<VecDeque<(T, Vec<OwnedFd>)>>,
    /// SIGKILL was sent to it.
    pub(super) killed: bool,
    /// Why, where it is its own fault.
    pub(super) fault: Option<Cow<'static, str>>,
    /// It is dead, and was waited for.
    pub(super) exit: Option<Exit>,
}

impl<T: Serialize> Child<T> {
    /// Starts a program in `role`, with these arguments more. `check`: it is only to look whether it could take that role over.
    pub(super) fn start(
        binary: &Binary,
        role: &str,
        check: bool,
        arguments: &[String],
    ) -> anyhow::Result<Self> {
        let name = if check { "-check" } else { "" };
        let (channel, theirs) = Channel::pair()?;
        let process = binary
            .command()
            .arg0(format!("vmgmtd-{role}{name}"))
            .args(["--role", role, "--parent", &std::process::id().to_string()])
            .args(check.then_some("--check"))
            .args(arguments)
            .stdin(Stdio::from(theirs.into_fd()))
            // Ctrl-C at a terminal is for the keeper, which ends its children in order.
            .process_group(0)
            .env_remove("NOTIFY_SOCKET")
            .spawn()
            .map_err(|error| anyhow::anyhow!("the {role} does not start: {error}"))?;
        Self::of(&process, channel)
    }

    /// A process that was started with the other end of this channel.
    pub(super) fn of(process: &std::process::Child, channel: Channel) -> anyhow::Result<Self> {
        let pidfd = pidfd_open(Pid::from_child(process), PidfdFlags::empty())?;
        Ok(Self {
            pid: process.id(),
            pidfd,
            channel,
            waiting: VecDeque::new(),
            held: None,
            killed: false,
            fault: None,
            exit: None,
        })
    }

    pub(super) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Keeps a message with its descriptors for [`Child::flush`].
    pub(super) fn queue(&mut self, message: T, fds: Vec<OwnedFd>) {
        let queue = self.held.as_mut().unwrap_or(&mut self.waiting);
        queue.push_back((message, fds));
    }

    /// What is queued from now on is held back.
    pub(super) fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Tells it this, and then what was held back.
    pub(super) fn go_on(&mut self, message: T) {
        self.waiting.push_back((message, Vec::new()));
        self.waiting.extend(self.held.take().into_iter().flatten());
    }

    /// Is to be told what was held back for another.
    pub(super) fn take_held(&mut self, other: &mut Self) {
        self.held = other.held.take();
    }

    /// Whether messages wait.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends what waits, as far as the channel takes it. A closed channel takes all: its process is as good as dead.
    pub(super) fn flush(&mut self) {
        while let Some((message, fds)) = self.waiting.front() {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match self.channel.send(message, &[], &fds) {
                // TOOMANYREFS: too many descriptors are on their way; they arrive.
                Err(ChannelError::Full | ChannelError::Io(Errno::TOOMANYREFS)) => return,
                Err(error) => tracing::debug!("a message to process {} is lost: {error}", self.pid()),
                Ok(()) => {}
            }
            self.waiting.pop_front();
        }
    }

    /// Its next message; an error: it has closed its channel or talks nonsense.
    pub(super) fn receive<M: DeserializeOwned>(&self) -> Result<Option<Packet<M>>, ChannelError> {
        self.channel.receive()
    }

    /// Kills it. `fault`: it is its own (it stood still), and how the log puts it.
    pub(super) fn kill(&mut self, fault: Option<&'static str>) {
        self.killed = true;
        self.fault = self.fault.take().or(fault.map(Cow::Borrowed));
        // It can only be dead already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Why it was killed, where it is its own fault.
    pub(super) fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// How it ended; `None` while it lives.
    pub(super) fn ended(&mut self) -> Option<Exit> {
        if self.exit.is_none() {
            self.exit = self.wait();
        }
        self.exit.clone()
    }

    /// Waits for it by its pidfd, as a program that was executed in the place of its parent can do too.
    fn wait(&self) -> Option<Exit> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(status) => status?,
            Err(error) => {
                return Some(Exit {
                    text: format!("unknown: {error}"),
                    by_itself: false,
                    orderly: false,
                });
            }
        };
        // Our kill decides nothing where the process had begun to end before.
        let ours = status.terminating_signal() == Some(libc::SIGKILL);
        if let Some(fault) = self.fault().filter(|_| ours) {
            return Some(Exit {
                text: fault.to_owned(),
                by_itself: true,
                orderly: false,
            });
        }
        Some(match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => Exit {
                text: "exit code 0".into(),
                by_itself: false,
                orderly: true,
            },
            (Some(code), _) => Exit {
                text: format!("exit code {code}"),
                by_itself: true,
                orderly: false,
            },
            (None, signal) => {
                let signal = signal.unwrap_or_default();
                let name = FAULTS
                    .iter()
                    .find(|(number, _)| *number == signal)
                    .map(|(_, name)| *name);
                let text = format!("signal {signal} ({})", name.unwrap_or("from outside"));
                Exit {
                    text,
                    by_itself: name.is_some(),
                    orderly: false,
                }
            }
        })
    }

    /// Has it stand still, or go on.
    pub(super) fn freeze(&self, frozen: bool) {
        // It can only be dead.
        let _ = pidfd_send_signal(&self.pidfd, if frozen { Signal::STOP } else { Signal::CONT });
    }

    /// Whether its main thread stands still.
    pub(super) fn is_frozen(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// Whether it is on its way out already.
    pub(super) fn is_ending(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        // State is the first field behind the name, flags the seventh (proc_pid_stat(5)).
        let mut fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
        let state = fields.next().unwrap_or_default();
        let flags: u64 = fields
            .nth(5)
            .and_then(|flags| flags.parse().ok())
            .unwrap_or_default();
        matches!(state, "" | "Z" | "X") || flags & PF_EXITING != 0
    }

    /// Whether it can touch no guest memory any more although it is not gone: it was killed, and all its threads sleep in the kernel or
    /// are dead (survival.md, "When a core is dead").
    pub(super) fn is_dead_for_memory(&self) -> bool {
        if !self.killed {
            return false;
        }
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.pid())) else {
            return false; // what cannot be seen is not dead; the pidfd will tell
        };
        threads.flatten().all(|thread| {
            // A thread that is gone between listing and reading is dead.
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            matches!(state, None | Some('D' | 'Z' | 'X'))
        })
    }
}

impl<T> Drop for Child<T> {
    /// However the keeper ends, it leaves no child behind.
    fn drop(&mut self) {
        // It can only be dead already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

/// How one ends that was killed, and not for a fault of its own, whether it could be waited for or not.
pub(super) const KILLED: &str = "signal 9 (from outside)";

/// Linux's flag of a task that is ending.
const PF_EXITING: u64 = 0x4;

/// Signals that a process brings on itself.
const FAULTS: [(i32, &str); 6] = [
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGABRT, "SIGABRT"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGILL, "SIGILL"),
    (libc::SIGFPE, "SIGFPE"),
    (libc::SIGSYS, "SIGSYS"),
];
