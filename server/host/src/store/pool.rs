//! Worker threads for what can sleep on a disk.
//!
//! In: jobs, each with an owner (a VM) and a share. Out: their results, in any order, and a wake-up of the loop. Jobs of
//! one owner start in order, but for those that must wait for another; owners take turns; one share may hold at most half the workers, so that one hung disk does
//! not take them all.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};

type Work<R> = Box<dyn FnOnce() -> R + Send>;
type Blame = Box<dyn Fn(usize, u64) + Send + Sync>;

struct Job<R> {
    share: usize,
    /// Jobs with the same key run one after the other.
    key: Option<usize>,
    work: Work<R>,
}

struct Queues<R> {
    waiting: BTreeMap<u64, VecDeque<Job<R>>>,
    /// Owner that was served last: the next one in order goes on.
    last_owner: u64,
    running_of_share: BTreeMap<usize, usize>,
    running_keys: BTreeSet<usize>,
    finished: VecDeque<R>,
    stop: bool,
}

struct Shared<R> {
    queues: Mutex<Queues<R>>,
    work_there: Condvar,
    wake: OwnedFd,
    per_share_max: usize,
    blame: OnceLock<Blame>,
}

/// Ends the process when a job panics: its thread would be gone and its effect would never end.
struct PanicEndsAll;

impl Drop for PanicEndsAll {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// The pool. Dropping it lets the running jobs end in the background (a job in disk sleep cannot be stopped) and starts no other.
pub struct Pool<R: Send + 'static> {
    shared: Arc<Shared<R>>,
}

impl<R: Send + 'static> Pool<R> {
    /// Starts `workers` threads (at least 2); they all run when it returns, so that a filter of system calls may be put on.
    ///
    /// # Errors
    /// The system's, for want of descriptors or threads.
    pub fn new(workers: usize) -> std::io::Result<Self> {
        let workers = workers.max(2);
        let shared = Arc::new(Shared {
            queues: Mutex::new(Queues {
                waiting: BTreeMap::new(),
                last_owner: 0,
                running_of_share: BTreeMap::new(),
                running_keys: BTreeSet::new(),
                finished: VecDeque::new(),
                stop: false,
            }),
            work_there: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            per_share_max: workers / 2,
            blame: OnceLock::new(),
        });
        let (runs, running) = mpsc::channel();
        for number in 0..workers {
            let (shared, runs) = (Arc::clone(&shared), runs.clone());
            // Never joined: a worker in disk sleep would hold up the end of the process.
            std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || {
                    // Nobody listens where another thread could not be started.
                    let _ = runs.send(());
                    drop(runs);
                    work(&shared, number);
                })?;
        }
        drop(runs);
        // One for each, then the channel is closed.
        running.iter().for_each(drop);
        Ok(Self { shared })
    }

    /// Readable when results are there; [`Pool::take_finished`] clears it.
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Queues a job of `owner` on `share` (any number that tells disks apart).
    pub fn submit(&self, owner: u64, share: usize, work: impl FnOnce() -> R + Send + 'static) {
        self.submit_keyed(owner, share, None, work);
    }

    /// As [`Pool::submit`]; jobs with the same key run one after the other, in order.
    pub fn submit_keyed(
        &self,
        owner: u64,
        share: usize,
        key: Option<usize>,
        work: impl FnOnce() -> R + Send + 'static,
    ) {
        lock(&self.shared.queues)
            .waiting
            .entry(owner)
            .or_default()
            .push_back(Job {
                share,
                key,
                work: Box::new(work),
            });
        self.shared.work_there.notify_one();
    }

    /// Each worker calls this with its number and the owner of a job before it, and with 0 after it.
    pub fn set_blame(&self, blame: impl Fn(usize, u64) + Send + Sync + 'static) {
        // Set twice, the first stays: it is told the same.
        let _ = self.shared.blame.set(Box::new(blame));
    }

    /// Whether no job waits or runs and no result is left.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let queues = lock(&self.shared.queues);
        queues.waiting.values().all(VecDeque::is_empty)
            && queues.running_of_share.values().all(|running| *running == 0)
            && queues.finished.is_empty()
    }

    /// Results so far.
    pub fn take_finished(&self) -> VecDeque<R> {
        let mut drained = [0u8; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut drained);
        std::mem::take(&mut lock(&self.shared.queues).finished)
    }
}

impl<R: Send + 'static> Drop for Pool<R> {
    fn drop(&mut self) {
        lock(&self.shared.queues).stop = true;
        self.shared.work_there.notify_all();
    }
}

fn lock<R>(queues: &Mutex<Queues<R>>) -> MutexGuard<'_, Queues<R>> {
    // No job runs under the lock, so a poisoned one only says that a worker died elsewhere.
    queues.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<R> Queues<R> {
    /// The next job: owners in turn, from the one behind the last; first job of each whose share is not full.
    fn next(&mut self, per_share_max: usize) -> Option<(u64, Job<R>)> {
        let owners: Vec<u64> = self
            .waiting
            .range(self.last_owner.saturating_add(1)..)
            .chain(self.waiting.range(..=self.last_owner))
            .map(|(owner, _)| *owner)
            .collect();
        for owner in owners {
            let Some(queue) = self.waiting.get_mut(&owner) else {
                continue;
            };
            let may_run = |job: &Job<R>| {
                self.running_of_share
                    .get(&job.share)
                    .is_none_or(|running| *running < per_share_max)
                    && job.key.is_none_or(|key| !self.running_keys.contains(&key))
            };
            let Some(job) = queue
                .iter()
                .position(may_run)
                .and_then(|position| queue.remove(position))
            else {
                continue;
            };
            *self.running_of_share.entry(job.share).or_default() += 1;
            self.running_keys.extend(job.key);
            if queue.is_empty() {
                self.waiting.remove(&owner);
            }
            self.last_owner = owner;
            return Some((owner, job));
        }
        None
    }
}

fn work<R>(shared: &Shared<R>, number: usize) {
    let _end = PanicEndsAll;
    let blame = |owner| {
        if let Some(blame) = shared.blame.get() {
            blame(number, owner);
        }
    };
    let mut queues = lock(&shared.queues);
    loop {
        if queues.stop {
            return;
        }
        let Some((owner, job)) = queues.next(shared.per_share_max) else {
            queues = shared
                .work_there
                .wait(queues)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(queues);
        let (share, key) = (job.share, job.key);
        blame(owner);
        let result = (job.work)();
        blame(0);
        queues = lock(&shared.queues);
        if let Some(running) = queues.running_of_share.get_mut(&share) {
            *running = running.saturating_sub(1);
        }
        if let Some(key) = key {
            queues.running_keys.remove(&key);
        }
        queues.finished.push_back(result);
        let _ = rustix::io::write(&shared.wake, &1u64.to_ne_bytes());
        // A place on this share is free again, for a job that another worker passed over.
        shared.work_there.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_finished<R: Send>(pool: &Pool<R>, count: usize) -> Vec<R> {
        let mut all = Vec::new();
        while all.len() < count {
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                pool.wake_fd(),
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).unwrap();
            all.extend(pool.take_finished());
        }
        all
    }

    #[test]
    fn a_hung_share_leaves_workers_for_the_others() {
        let pool = Pool::new(4).unwrap();
        let (release, hung) = mpsc::channel::<()>();
        let hung = Arc::new(Mutex::new(hung));
        for _ in 0..8 {
            let hung = Arc::clone(&hung);
            pool.submit(1, 0, move || {
                let _ = hung.lock().unwrap().recv();
                "hung"
            });
        }
        for _ in 0..8 {
            pool.submit(2, 1, || "quick");
        }
        assert_eq!(wait_finished(&pool, 8), vec!["quick"; 8]);
        drop(release);
        assert_eq!(wait_finished(&pool, 8), vec!["hung"; 8]);
    }

    #[test]
    fn jobs_with_one_key_run_one_after_the_other_and_hold_up_no_others() {
        let pool = Pool::new(4).unwrap();
        let (release, hung) = mpsc::channel::<()>();
        pool.submit_keyed(1, 0, Some(7), move || {
            let _ = hung.recv();
            "first"
        });
        pool.submit_keyed(1, 0, Some(7), || "second");
        pool.submit_keyed(1, 0, Some(8), || "other");
        assert_eq!(wait_finished(&pool, 1), ["other"]);
        drop(release);
        assert_eq!(wait_finished(&pool, 2), ["first", "second"]);
    }

    #[test]
    fn owners_take_turns() {
        let mut queues = Queues {
            waiting: BTreeMap::new(),
            last_owner: 0,
            running_of_share: BTreeMap::new(),
            running_keys: BTreeSet::new(),
            finished: VecDeque::new(),
            stop: false,
        };
        for (owner, name) in [(1, 'a'), (1, 'b'), (1, 'c'), (2, 'd'), (3, 'e')] {
            queues.waiting.entry(owner).or_default().push_back(Job {
                share: 0,
                key: None,
                work: Box::new(move || name),
            });
        }
        let order: String = std::iter::from_fn(|| queues.next(99))
            .map(|(_, job)| (job.work)())
            .collect();
        assert_eq!(order, "adebc");
    }
}
