//! The keeper's own upgrade: it becomes another program, with the same process number and the same children.
//!
//! In: a program; or, as that program, standard input. Out: the keeper going on. Must never know: what is in the state.
//!
//! 1. Rehearsal: the new program is started as a child, with copies of all descriptors and of the state, and does everything that it will
//!    do in our place, but serve (`--resume --check`). Whatever it dies of, it dies there. 2. The state and all descriptors are put into a
//!    socket, whose other end becomes standard input, and the new program is executed: it inherits nothing else, so nobody adopts a
//!    descriptor by number. 3. What still fails there, by an error or a panic, before the new keeper is in charge: the old program, which
//!    comes along, is executed with a second such socket, which comes along untouched. (A process that is killed or aborts after the
//!    rehearsal went well is beyond help: it is the keeper.)
//!
//! Signals stay blocked from before the execution until they are caught again.
#![allow(unsafe_code)] // execv and the signal mask, which no safe crate here offers

use super::binary::Binary;
use super::child::Child;
use super::limits::CHECK_DEADLINE;
use super::saved::Packed;
use super::upgrade::{Progress, Step};
use super::{Keeper, Signals, watch};
use crate::channel::{Channel, ChannelError, PACKET_FDS_MAX};
use crate::control::protocol::UpgradeState;
use crate::fault;
use crate::messages::KeeperToCore;
use crate::packed::Refusal;
use anyhow::Context;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

/// The new program rehearses.
pub(super) struct Check {
    /// Its channel is the other end of its standard input.
    process: Child<KeeperToCore>,
    said: File,
    since: Instant,
}

/// What it says when all went well.
const ABLE: &str = "able";

impl Keeper {
    /// One step of the keeper's upgrade; where all goes well it does not return.
    pub(super) fn upgrade_keeper(&mut self, binary: &Binary, step: Step) -> Progress {
        let mut check = match step {
            Step::Keeper(check) => check,
            _ => match self.start_rehearsal(binary) {
                Ok(check) => return Progress::Running(Step::Keeper(check)),
                Err(error) => return Progress::Denied(format!("{error:#}")),
            },
        };
        let exit = match check.process.ended() {
            Some(exit) => exit,
            None if check.since.elapsed() <= CHECK_DEADLINE => {
                return Progress::Running(Step::Keeper(check));
            }
            None => {
                // It may sleep in the kernel: nobody waits for its end.
                check.process.kill(None);
                self.dismissed.push(check.process);
                return Progress::Denied(format!(
                    "the new program was not able to go on within {} s",
                    CHECK_DEADLINE.as_secs()
                ));
            }
        };
        let able = matches!(check.process.receive::<String>(), Ok(Some(word)) if word.header == ABLE);
        if exit.orderly && able {
            return Progress::Denied(format!("{:#}", self.become_another(binary)));
        }
        let mut said = String::new();
        // What it said is all there is to tell.
        let _ = check
            .said
            .rewind()
            .and_then(|()| check.said.read_to_string(&mut said));
        let said: String = said.trim().chars().take(500).collect();
        Progress::Denied(if exit.orderly {
            format!("the new program ended without a word when it was asked: is it a vmgmtd? {said}")
        } else {
            format!("the new program could not go on ({}): {said}", exit.text)
        })
    }

    fn start_rehearsal(&self, binary: &Binary) -> anyhow::Result<Check> {
        let (channel, stdin) = fill(&self.save()?, Binary::own()?.file.as_fd(), None)?;
        let said = File::from(memfd_create("vmgmt-said", MemfdFlags::CLOEXEC)?);
        let flags = Flags {
            log: &self.arguments,
            since: now()?,
            check: true,
            failed: None,
        };
        let process = binary
            .command()
            .args(flags.words())
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::null())
            .stderr(Stdio::from(said.try_clone()?))
            .env_remove("NOTIFY_SOCKET")
            .spawn()
            .context("the new program does not start")?;
        let process = Child::of(&process, channel)?;
        // Where it is late, nothing else tells of its end.
        watch(&self.poll, &process.pidfd)?;
        Ok(Check {
            process,
            said,
            since: Instant::now(),
        })
    }

    /// Returns only where it did not work; then nothing has changed.
    fn become_another(&mut self, binary: &Binary) -> anyhow::Error {
        let tried = (|| {
            let packed = self.save()?;
            let own = Binary::own()?;
            let (_, spare) = fill(&packed, own.file.as_fd(), None)?;
            let (_, stdin) = fill(&packed, own.file.as_fd(), Some(spare.as_fd()))?;
            let flags = Flags {
                log: &self.arguments,
                since: now()?,
                check: false,
                failed: None,
            };
            (self.flush_log)();
            set_signals_blocked(true);
            // One that came meanwhile has been noted by now, or waits for the new program.
            anyhow::ensure!(!self.signals.stop_is_asked(), "vmgmtd is stopping");
            execute(binary, stdin, &flags)
        })();
        set_signals_blocked(false);
        match tried {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }
}

/// What the program is told beside its standard input.
struct Flags<'a> {
    log: &'a [String],
    /// When the old program stopped.
    since: Duration,
    /// It is only to rehearse.
    check: bool,
    /// Why another one could not go on.
    failed: Option<&'a str>,
}

impl Flags<'_> {
    fn words(&self) -> Vec<String> {
        let mut words = vec!["--resume".into(), self.since.as_nanos().to_string()];
        words.extend(self.check.then(|| "--check".into()));
        let failed = self.failed.iter();
        words.extend(failed.flat_map(|reason| ["--failed".into(), (*reason).to_owned()]));
        words.extend(self.log.iter().cloned());
        words
    }
}

enum Never {}

/// Starts the log; gives what waits until it is written.
pub type StartLog<'a> = &'a dyn Fn() -> anyhow::Result<Box<dyn Fn()>>;

/// Goes on as the keeper that another program was. Where that does not work the other program goes on.
///
/// # Errors
/// Not even that works.
pub(super) fn resume(
    arguments: &[String],
    since_ns: u64,
    failed: Option<&str>,
    log: StartLog<'_>,
) -> anyhow::Result<Keeper> {
    let mut handed = Handed::receive()?;
    let tried = catch_unwind(AssertUnwindSafe(|| {
        fault::fails("resume")?;
        handed.restore(log)
    }));
    let reason = match tried {
        Ok(Ok(mut keeper)) => {
            set_signals_blocked(false);
            let stall = now()?.saturating_sub(Duration::from_nanos(since_ns));
            match failed {
                None => keeper.end_part(UpgradeState::Done, String::new(), stall),
                Some(reason) => keeper.end_part(UpgradeState::RolledBack, reason.to_owned(), stall),
            };
            return Ok(keeper);
        }
        Ok(Err(error)) => format!("the new program could not go on: {error:#}"),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
            format!("the new program panicked: {}", said.unwrap_or("?"))
        }
    };
    let Handed { old, spare, .. } = handed;
    let (None, Some(spare)) = (failed, spare) else {
        anyhow::bail!("neither program can go on: {reason}");
    };
    let flags = Flags {
        log: arguments,
        since: Duration::from_nanos(since_ns),
        check: false,
        failed: Some(&reason),
    };
    match execute(&Binary::held(old), spare, &flags)? {}
}

/// Does all that [`resume`] does, but to be in charge; says so, and leaves everything as it was.
///
/// # Errors
/// Why this program could not go on.
pub fn rehearse(log: StartLog<'_>) -> anyhow::Result<()> {
    let mut handed = Handed::receive()?;
    fault::at("rehearse");
    // Everything in it is another's: nothing may end with this process.
    std::mem::forget(handed.restore(log)?);
    Ok(handed.channel.send(&ABLE, &[], &[])?)
}

/// What [`fill`] put into standard input.
struct Handed {
    channel: Channel,
    /// Descriptors that are still to be taken out.
    count: usize,
    state: OwnedFd,
    /// The program that wrote it.
    old: OwnedFd,
    /// Another standard input for that program.
    spare: Option<OwnedFd>,
}

impl Handed {
    fn receive() -> anyhow::Result<Self> {
        let channel = Channel::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?);
        let first = channel
            .receive::<usize>()?
            .context("standard input holds nothing")?;
        let mut fds = first.fds.into_iter();
        let (Some(state), Some(old)) = (fds.next(), fds.next()) else {
            anyhow::bail!("standard input holds no state");
        };
        Ok(Self {
            channel,
            count: first.header,
            state,
            old,
            spare: fds.next(),
        })
    }

    /// All of the way to a keeper in charge that can fail.
    fn restore(&mut self, log: StartLog<'_>) -> anyhow::Result<Keeper> {
        // Started by descriptor, it would be shown by that one's number.
        rustix::thread::set_name(c"vmgmtd")?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        let flush_log = log()?;
        let mut bytes = Vec::new();
        File::from(self.state.try_clone()?).read_to_end(&mut bytes)?;
        let mut fds = Vec::new();
        while fds.len() < self.count {
            let packet = self.channel.receive::<usize>()?;
            fds.extend(packet.context("descriptors are missing")?.fds);
        }
        let mut shares = Vec::new();
        loop {
            match self.channel.receive::<usize>() {
                Ok(Some(packet)) => shares.extend(packet.fds),
                Ok(None) | Err(ChannelError::Closed) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Keeper::restore(&bytes, fds, shares, Signals::catch()?, flush_log)
    }
}

/// Sealed memory with these bytes in it, read from its beginning.
fn memory(bytes: &[u8]) -> anyhow::Result<OwnedFd> {
    let mut file = File::from(memfd_create(
        "vmgmt-keeper",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?);
    file.write_all(bytes)?;
    file.rewind()?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// A socket that holds all: the state, the program that wrote it, another such socket for that one, and the descriptors, those that the
/// state names by number first. The end to talk to the reader by, and the end that is to be read.
fn fill(
    packed: &Packed<'_>,
    program: BorrowedFd<'_>,
    spare: Option<BorrowedFd<'_>>,
) -> anyhow::Result<(Channel, OwnedFd)> {
    let Packed { bytes, fds, shares } = packed;
    let (writer, reader) = Channel::pair()?;
    let state = memory(bytes)?;
    let first: Vec<_> = [state.as_fd(), program].into_iter().chain(spare).collect();
    writer.send(&fds.len(), &[], &first)?;
    for fds in fds.chunks(PACKET_FDS_MAX).chain(shares.chunks(PACKET_FDS_MAX)) {
        writer
            .send(&fds.len(), &[], fds)
            .context("too many descriptors at once")?;
    }
    Ok((writer, reader.into_fd()))
}

/// Becomes another program, with this standard input.
fn execute(binary: &Binary, channel: OwnedFd, flags: &Flags<'_>) -> anyhow::Result<Never> {
    let command = binary.command();
    let words = ["vmgmtd".to_owned()].into_iter().chain(flags.words());
    let words = words.map(CString::new).collect::<Result<Vec<_>, _>>()?;
    let program = CString::new(command.get_program().as_encoded_bytes())?;
    let mut list: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    list.push(std::ptr::null());
    rustix::stdio::dup2_stdin(&channel)?;
    // SAFETY: both are pointers to strings that end with NUL and outlive the call, the list ends with a null pointer. All other
    // descriptors are close-on-exec.
    unsafe { libc::execv(program.as_ptr(), list.as_ptr()) };
    let error = std::io::Error::last_os_error();
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Err(error).with_context(|| format!("{} does not run", binary.path().display()))
}

/// Blocks the signals that the keeper catches, or lets them through.
fn set_signals_blocked(blocked: bool) {
    let how = if blocked {
        libc::SIG_BLOCK
    } else {
        libc::SIG_UNBLOCK
    };
    // SAFETY: the set is initialized by sigemptyset before it is used, and the calls touch nothing else.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in Signals::ALL {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(how, &set, std::ptr::null_mut());
    }
}

/// A time that means the same in both programs.
fn now() -> Result<Duration, Refusal> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_err(|error| Refusal::Other(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::saved_tests::scene;
    use super::*;

    #[test]
    #[allow(clippy::zombie_processes, reason = "the keeper waits for it")]
    fn a_rehearsal_that_does_not_end_is_not_waited_for() {
        let mut keeper = scene();
        let (channel, _theirs) = Channel::pair().unwrap();
        let process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let check = Check {
            process: Child::of(&process, channel).unwrap(),
            said: tempfile::tempfile().unwrap(),
            since: Instant::now().checked_sub(2 * CHECK_DEADLINE).unwrap(),
        };
        let binary = Binary::own().unwrap();
        let Progress::Denied(reason) = keeper.upgrade_keeper(&binary, Step::Keeper(check)) else {
            panic!("it goes on");
        };
        assert!(reason.contains("was not able"), "{reason}");
        assert_eq!(keeper.dismissed.len(), 1, "it is buried when it has ended");
        assert!(keeper.dismissed[0].killed);
        let begun = Instant::now();
        while !keeper.dismissed.is_empty() {
            assert!(begun.elapsed().as_secs() < 60, "it lives");
            keeper.bury_undead();
        }
    }
}
