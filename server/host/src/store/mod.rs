//! CELLAR, store: the host's files, for the effects that the hub asks for.
//!
//! In: effects without guest memory (names, opening, checksums), which all run on workers because each may sleep on a disk.
//! Out: their outcomes; and open files, for the loop's reads and writes between files and guest memory. Must never know:
//! guests' addresses, sessions, what a submission is.

mod charge;
mod contents;
mod errno;
mod names;
mod pool;
mod quota;
mod resolve;
mod sweep;
mod walk;

pub use contents::{OpenFile, Piecewise};
pub use errno::status_of;
pub use pool::Turn;

use crate::config::ShareConfig;
use pool::Pool;
use quota::{Count, Quota};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, unlinkat};
use rustix::io::Errno;
use rustix::path::Arg;
use slab::Slab;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use sweep::Sweep;
use vmgmt_abi::{Budget, Status};
use vmgmt_core::effect::{Effect, EffectId, FailedAt, FileSlot, Identity, Outcome, StatRecord};

/// A granted directory, open.
#[derive(Debug)]
pub struct Share {
    index: usize,
    /// When this core life opened it, wall time: what is older is of another life.
    began_ns: i64,
    root: OwnedFd,
    quota: Arc<Quota>,
    /// Permission bits that new files and directories do not get unless they are asked for: vmgmtd's umask.
    masked: u32,
    /// It was said that a sweep could not look everywhere.
    told_missed: AtomicBool,
}

/// Why the store could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "share \"{name}\": cannot open the directory {path}: {errno}; make it, or correct its path in the configuration"
    )]
    Share {
        name: String,
        path: String,
        errno: Errno,
    },
    #[error("cannot start the workers: {0}")]
    Workers(#[from] std::io::Error),
}

/// What a job on a worker gave.
#[derive(Debug)]
pub enum Done {
    /// The effect has ended.
    Outcome(Outcome),
    /// It has, and a file is open.
    Opened {
        file: Box<OpenFile>,
        stat: StatRecord,
        identity: Identity,
    },
    /// The range that a read wanted is in the page cache now: try again.
    Warm,
    /// The range itself, from a file system whose page cache cannot be asked.
    Scratch(Vec<u8>),
    /// A piece was written; with its crc32, as the file holds it, if that was asked for.
    Stored { bytes: u64, crc32: Option<u32> },
    /// The guest took the memory away meanwhile: what was moved means nothing.
    Revoked,
}

/// A job of an effect, ended.
#[derive(Debug)]
pub struct Finished {
    pub effect: EffectId,
    pub done: Done,
}

/// Open files and workers.
pub struct Store {
    shares: BTreeMap<String, Arc<Share>>,
    files: Slab<(u32, Arc<OpenFile>)>,
    generation: u32,
    pool: Pool<Finished>,
    /// Slots that close when their file has got its name.
    committing: BTreeMap<EffectId, FileSlot>,
}

impl Store {
    /// Takes the shares' directories over, one for each share, and starts the workers. `umask`: permission bits that new files do not get.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn new(
        shares: &[ShareConfig],
        roots: Vec<OwnedFd>,
        workers: usize,
        umask: u32,
    ) -> Result<Self, StoreError> {
        let pool = Pool::new(workers)?;
        let mut open = BTreeMap::new();
        for (index, (config, root)) in shares.iter().zip(roots).enumerate() {
            let share = Arc::new(Share {
                index: index + 1,
                began_ns: wall_ns(),
                root,
                quota: Arc::new(Quota::new(config.bytes_max, config.files_max)),
                masked: umask,
                told_missed: AtomicBool::new(false),
            });
            if share.quota.is_limited() {
                let mut count = Count::new(Arc::clone(&share));
                pool.submit_in_turns(0, share.index, move || Turn {
                    left: usize::from(!count.turn()),
                    results: Vec::new(),
                });
            }
            open.insert(config.name.clone(), share);
        }
        Ok(Self {
            shares: open,
            files: Slab::new(),
            generation: 0,
            pool,
            committing: BTreeMap::new(),
        })
    }

    /// See [`Pool::set_blame`].
    pub fn set_blame(&self, blame: impl Fn(usize, u64) + Send + Sync + 'static) {
        self.pool.set_blame(blame);
    }

    /// Whether the workers have nothing to do and nothing to tell.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.pool.is_idle()
    }

    /// Readable when [`Store::take_finished`] has something.
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.pool.wake_fd()
    }

    /// Bytes that may still be put into a share; `None`: no such share.
    #[must_use]
    pub fn bytes_left(&self, share: &str) -> Option<u64> {
        self.shares.get(share).map(|share| share.quota.bytes_left())
    }

    /// An open file.
    #[must_use]
    pub fn file(&self, slot: FileSlot) -> Option<Arc<OpenFile>> {
        let (generation, file) = self.files.get(slot.index as usize)?;
        (*generation == slot.generation).then(|| Arc::clone(file))
    }

    /// Takes over a file that the operator opened.
    pub fn adopt(&mut self, fd: OwnedFd) -> FileSlot {
        // They have a turn of their own: no share has number 0. And nothing limits them.
        let file = OpenFile::new(fd, 0, None);
        self.insert(Arc::new(file))
    }

    /// Takes over a file that a job has opened.
    pub fn insert(&mut self, file: Arc<OpenFile>) -> FileSlot {
        self.generation = self.generation.wrapping_add(1);
        let index = self.files.insert((self.generation, file));
        FileSlot {
            index: index as u32,
            generation: self.generation,
        }
    }

    /// Lets a file go. It is closed on a worker: a close may sleep.
    pub fn close(&mut self, owner: u64, slot: FileSlot) {
        if self.file(slot).is_some() {
            let (_, file) = self.files.remove(slot.index as usize);
            let share = file.share_index();
            self.pool.submit(owner, share, move || {
                drop(file);
                Vec::new()
            });
        }
    }

    /// A job with an open file: reading ahead, or between the file and guest memory under a lease.
    pub fn submit_work(
        &self,
        owner: u64,
        effect: EffectId,
        file: &OpenFile,
        work: impl FnOnce() -> Done + Send + 'static,
    ) {
        self.pool.submit(owner, file.share_index(), move || {
            let done = work();
            vec![Finished { effect, done }]
        });
    }

    /// A job that writes to an open file, for several effects, in turns. One for each file at a time is enough: the kernel lets in only one
    /// writer, and others would spin for it, on processors that the VMs could use.
    pub fn submit_write(
        &self,
        owner: u64,
        file: &OpenFile,
        work: impl FnMut() -> Turn<Finished> + Send + 'static,
    ) {
        self.pool.submit_in_turns(owner, file.share_index(), work);
    }

    /// See [`Pool::promise`].
    pub fn promise(&self, looks_soon: bool) -> bool {
        self.pool.promise(looks_soon)
    }

    /// Starts an effect that needs no guest memory. Its end comes out of [`Store::take_finished`].
    ///
    /// # Errors
    /// The outcome at once, where it needs no disk to be known: a share or slot that is not there, or an effect that is not the store's.
    pub fn submit(&mut self, owner: u64, id: EffectId, effect: Effect) -> Result<(), Outcome> {
        let stale = || Outcome::failed(Status::STALE, FailedAt::File);
        match effect {
            Effect::Close { slot } => {
                self.close(owner, slot);
                Err(Outcome::Done)
            }
            Effect::Checksum { slot, .. } | Effect::Truncate { slot, .. } | Effect::Sync { slot } => {
                let file = self.file(slot).ok_or_else(stale)?;
                let share = file.share_index();
                self.pool.submit(owner, share, move || {
                    let done = Done::Outcome(contents::run(&file, &effect));
                    vec![Finished { effect: id, done }]
                });
                Ok(())
            }
            Effect::Commit { slot, ref share, .. } => {
                let file = self.file(slot).ok_or_else(stale)?;
                let share = self.share(share)?;
                let work = move || {
                    let done = names::run(&share, Some(&file), &effect);
                    vec![Finished { effect: id, done }]
                };
                self.pool.submit(owner, self.shares_index(slot), work);
                self.committing.insert(id, slot);
                Ok(())
            }
            Effect::BytesLeft { shares } => {
                // No quota of a share that is gone: what asks next is refused anyway.
                let left = |share: &String| self.bytes_left(share).unwrap_or(u64::MAX);
                let done = Done::Outcome(Outcome::BytesLeft(shares.iter().map(left).collect()));
                self.pool
                    .submit(owner, 0, move || vec![Finished { effect: id, done }]);
                Ok(())
            }
            Effect::Discard { slot, ref share, .. } => {
                let share = self.share(share)?;
                self.close(owner, slot);
                self.pool.submit(owner, share.index, move || {
                    let done = names::run(&share, None, &effect);
                    vec![Finished { effect: id, done }]
                });
                Ok(())
            }
            Effect::Open { ref share, .. }
            | Effect::Reopen { ref share, .. }
            | Effect::CreateTemporary { ref share, .. }
            | Effect::Identify { ref share, .. }
            | Effect::PrepareDirectory { ref share, .. }
            | Effect::Stat { ref share, .. }
            | Effect::List { ref share, .. }
            | Effect::MakeDirectory { ref share, .. }
            | Effect::Remove { ref share, .. }
            | Effect::Rename { ref share, .. } => {
                let share = self.share(share)?;
                self.pool.submit(owner, share.index, move || {
                    crate::fault::on_any("worker", &effect);
                    let done = names::run(&share, None, &effect);
                    vec![Finished { effect: id, done }]
                });
                Ok(())
            }
            Effect::Sweep {
                ref share,
                older_than_seconds,
                ref keep,
                adoption,
            } => {
                let share = self.share(share)?;
                let (index, keep) = (share.index, keep.clone());
                let mut sweep = None;
                self.pool.submit_in_turns(owner, index, move || {
                    let begin = || {
                        crate::fault::on_any("worker", &effect);
                        Sweep::new(Arc::clone(&share), older_than_seconds, keep.clone(), adoption)
                    };
                    let outcome = sweep.get_or_insert_with(begin).turn();
                    Turn {
                        left: usize::from(outcome.is_none()),
                        results: outcome
                            .map(|outcome| Finished {
                                effect: id,
                                done: Done::Outcome(outcome),
                            })
                            .into_iter()
                            .collect(),
                    }
                });
                Ok(())
            }
            Effect::Copy { .. } | Effect::Fetch { .. } | Effect::Read { .. } | Effect::Write { .. } => {
                Err(Outcome::failed(Status::NOT_SUPPORTED, FailedAt::File))
            }
        }
    }

    /// Jobs that have ended.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        let finished = self.pool.take_finished();
        for Finished { effect, done } in &finished {
            if let Some(slot) = self.committing.remove(effect)
                && matches!(
                    done,
                    Done::Outcome(Outcome::Committed { .. } | Outcome::NotDurable { .. })
                )
            {
                self.close(0, slot);
            }
        }
        finished
    }

    fn shares_index(&self, slot: FileSlot) -> usize {
        self.file(slot).map_or(0, |file| file.share_index())
    }

    fn share(&self, name: &str) -> Result<Arc<Share>, Outcome> {
        self.shares
            .get(name)
            .map(Arc::clone)
            .ok_or(Outcome::failed(Status::NO_SUCH_NAME, FailedAt::File))
    }
}

impl Share {
    /// An open file of it.
    fn opened(&self, fd: OwnedFd) -> Result<OpenFile, Errno> {
        let inode = self.quota.opened(fd.as_fd())?;
        Ok(OpenFile::new(fd, self.index, inode))
    }

    /// Takes the name of something that is no directory away.
    fn unlink(&self, directory: BorrowedFd<'_>, name: impl Arg + Copy) -> Result<(), Errno> {
        let unlink = || unlinkat(directory, name, AtFlags::empty());
        let Some(_names) = self.quota.lock_names() else {
            return unlink();
        };
        self.quota.lose_name(directory, name, None, unlink)
    }

    /// The mode of a new file or directory whose permissions nobody asked for.
    const fn mode(&self, permissions: u32) -> Mode {
        Mode::from_raw_mode(permissions & !self.masked)
    }

    fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// Wall time, by the clock that file systems stamp with.
fn wall_ns() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    time.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec)
}

/// The outcome of a refused system call.
fn refused(errno: Errno) -> Outcome {
    Outcome::failed(status_of(errno), FailedAt::File)
}

/// The outcome of an exceeded quota.
fn over_quota(exceeded: quota::Exceeded) -> Outcome {
    let budget = match exceeded {
        quota::Exceeded::Bytes => Budget::SHARE_BYTES,
        quota::Exceeded::Files => Budget::SHARE_FILES,
    };
    Outcome::Failed {
        status: Status::OVER_BUDGET.0,
        budget: budget.0,
        at: FailedAt::File,
    }
}

#[cfg(test)]
mod tests;
