//! The keeper's own upgrade: it becomes another program, with the same process number and the same children.
//!
//! In: a program; or, as that program, standard input. Out: the keeper going on. Must never know: what is in the state.
//!
//! A copy of the state is given to the new program first, to see whether it can read it. Then the state and all descriptors are put into a
//! socket, whose other end becomes standard input, and the new program is executed: it inherits nothing else, so nobody adopts a descriptor
//! by number. Who cannot go on there puts all into such a socket again and executes the old program, which comes along.
//! Signals stay blocked from before the execution until they are caught again.
#![allow(unsafe_code)] // execv and the signal mask, which no safe crate here offers

use super::binary::Binary;
use super::limits::CHECK_DEADLINE;
use super::upgrade::{Progress, Step};
use super::{Keeper, Signals};
use crate::channel::{Channel, PACKET_FDS_MAX};
use crate::control::protocol::UpgradeState;
use crate::packed::Refusal;
use anyhow::Context;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// The new program reads a copy of the state.
pub(super) struct Check {
    process: Child,
    said: File,
    since: Instant,
}

impl Keeper {
    /// One step of the keeper's upgrade; where all goes well it does not return.
    pub(super) fn upgrade_keeper(&mut self, binary: &Binary, step: Step) -> Progress {
        let mut check = match step {
            Step::Keeper(check) => check,
            _ => match self.start_state_check(binary) {
                Ok(check) => return Progress::Running(Step::Keeper(check)),
                Err(error) => return Progress::Denied(format!("{error:#}")),
            },
        };
        match check.process.try_wait() {
            Ok(Some(status)) if status.success() => {
                let error = self.become_another(binary);
                Progress::Denied(format!("{error:#}"))
            }
            Ok(None) if check.since.elapsed() <= CHECK_DEADLINE => Progress::Running(Step::Keeper(check)),
            Ok(None) => {
                let killed = check.process.kill().and_then(|()| check.process.wait());
                tracing::debug!("the late check: {killed:?}");
                Progress::Denied(format!(
                    "the new program did not read the state within {} s",
                    CHECK_DEADLINE.as_secs()
                ))
            }
            Ok(Some(status)) => {
                let mut said = String::new();
                // What it said is all there is to tell.
                let _ = check
                    .said
                    .rewind()
                    .and_then(|()| check.said.read_to_string(&mut said));
                let said: String = said.trim().chars().take(500).collect();
                Progress::Denied(format!("the new program refuses the state ({status}): {said}"))
            }
            Err(error) => Progress::Denied(error.to_string()),
        }
    }

    fn start_state_check(&self, binary: &Binary) -> anyhow::Result<Check> {
        let (bytes, _) = self.save()?;
        let said = File::from(memfd_create("vmgmt-said", MemfdFlags::CLOEXEC)?);
        let process = binary
            .command()
            .arg("--check-state")
            .stdin(Stdio::from(memory(&bytes)?))
            .stdout(Stdio::null())
            .stderr(Stdio::from(said.try_clone()?))
            .env_remove("NOTIFY_SOCKET")
            .spawn()
            .context("the new program does not start")?;
        Ok(Check {
            process,
            said,
            since: Instant::now(),
        })
    }

    /// Returns only where it did not work; then nothing has changed.
    fn become_another(&mut self, binary: &Binary) -> anyhow::Error {
        let tried = (|| {
            let (bytes, fds) = self.save()?;
            let own = Binary::own()?;
            let channel = fill(&bytes, own.file.as_fd(), &fds)?;
            let flags = Flags {
                log: &self.arguments,
                since: now()?,
                failed: None,
            };
            (self.flush_log)();
            set_signals_blocked(true);
            // One that came meanwhile has been noted by now, or waits for the new program.
            anyhow::ensure!(!self.signals.stop_is_asked(), "vmgmtd is stopping");
            execute(binary, channel, &flags)
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
    /// Why another one could not go on.
    failed: Option<&'a str>,
}

enum Never {}

/// Goes on as the keeper that another program was. Where that does not work the other program goes on.
///
/// # Errors
/// Not even that works.
pub(super) fn resume(
    arguments: &[String],
    since_ns: u64,
    failed: Option<&str>,
    flush_log: Box<dyn Fn()>,
) -> anyhow::Result<Keeper> {
    // Started by descriptor, it would be shown by that one's number.
    rustix::thread::set_name(c"vmgmtd")?;
    let channel = Channel::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    let (bytes, old, fds) = empty(&channel)?;
    let copies = fds.iter().map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>();
    let restored = copies.map_err(Into::into).and_then(|copies| {
        let signals = Signals::catch()?;
        Keeper::restore(&bytes, copies, signals, flush_log)
    });
    let mut keeper = match (restored, failed) {
        (Ok(keeper), _) => keeper,
        (Err(error), Some(_)) => return Err(error.context("neither program can go on")),
        (Err(error), None) => {
            let reason = format!("{error:#}");
            tracing::error!("this program cannot go on, the one before does: {reason}");
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let channel = fill(&bytes, old.as_fd(), &borrowed)?;
            let flags = Flags {
                log: arguments,
                since: Duration::from_nanos(since_ns),
                failed: Some(&reason),
            };
            match execute(&Binary::held(old), channel, &flags)? {}
        }
    };
    set_signals_blocked(false);
    let stall = now()?.saturating_sub(Duration::from_nanos(since_ns));
    match failed {
        None => keeper.end_part(UpgradeState::Done, String::new(), stall),
        Some(reason) => keeper.end_part(UpgradeState::RolledBack, reason.to_owned(), stall),
    };
    Ok(keeper)
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

/// A socket that holds all: the state, the program that wrote it, and the descriptors; what is to be read from it.
fn fill(bytes: &[u8], program: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]) -> anyhow::Result<OwnedFd> {
    let (writer, reader) = Channel::pair()?;
    let state = memory(bytes)?;
    writer.send(&fds.len(), &[], &[state.as_fd(), program])?;
    for fds in fds.chunks(PACKET_FDS_MAX) {
        writer
            .send(&fds.len(), &[], fds)
            .context("too many descriptors at once")?;
    }
    Ok(reader.into_fd())
}

/// What [`fill`] put in.
fn empty(channel: &Channel) -> anyhow::Result<(Vec<u8>, OwnedFd, Vec<OwnedFd>)> {
    let first = channel
        .receive::<usize>()?
        .context("standard input holds nothing")?;
    let Ok([state, program]) = <[OwnedFd; 2]>::try_from(first.fds) else {
        anyhow::bail!("standard input holds no state");
    };
    let mut bytes = Vec::new();
    File::from(state).read_to_end(&mut bytes)?;
    let mut fds = Vec::new();
    while fds.len() < first.header {
        fds.extend(
            channel
                .receive::<usize>()?
                .context("descriptors are missing")?
                .fds,
        );
    }
    Ok((bytes, program, fds))
}

/// Becomes another program, with this standard input.
fn execute(binary: &Binary, channel: OwnedFd, flags: &Flags<'_>) -> anyhow::Result<Never> {
    let command = binary.command();
    let mut words = vec![
        "vmgmtd".into(),
        "--resume".into(),
        flags.since.as_nanos().to_string(),
    ];
    words.extend(
        flags
            .failed
            .iter()
            .flat_map(|reason| ["--failed".into(), (*reason).to_owned()]),
    );
    words.extend(flags.log.iter().cloned());
    let words = words
        .into_iter()
        .map(CString::new)
        .collect::<Result<Vec<_>, _>>()?;
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
