//! Worker threads for what can sleep on a disk.
//!
//! In: jobs, each with an owner (a VM) and a share. Out: their results, in any order, and a wake-up of the loop. Jobs of
//! one owner start in order, but for those that must wait for another; owners take turns; one share may hold at most half the workers, so that one hung disk does
//! not take them all.
//!
//! Nobody is woken in vain: a worker only for a job that may run now, the loop only when it has taken what there was before. On a host
//! with few processors each such wake-up takes time from the one that works.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};

type Work<R> = Box<dyn FnOnce() -> Vec<R> + Send>;
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
    finished: Vec<R>,
    /// Workers that wait for a job, and those of them that were called and have not come yet.
    idle: usize,
    called: usize,
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
            queues: Mutex::new(Queues::new()),
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

    /// Queues a job of `owner` on `share` (any number that tells disks apart). A job may have several results, or none.
    pub fn submit(&self, owner: u64, share: usize, work: impl FnOnce() -> Vec<R> + Send + 'static) {
        self.submit_keyed(owner, share, None, work);
    }

    /// As [`Pool::submit`]; jobs with the same key run one after the other, in order.
    pub fn submit_keyed(
        &self,
        owner: u64,
        share: usize,
        key: Option<usize>,
        work: impl FnOnce() -> Vec<R> + Send + 'static,
    ) {
        let mut queues = lock(&self.shared.queues);
        let queue = queues.waiting.entry(owner).or_default();
        // Behind one with its key it has to wait: whoever ends that one looks for it.
        let follows = key.is_some() && queue.iter().any(|job| job.key == key);
        queue.push_back(Job {
            share,
            key,
            work: Box::new(work),
        });
        let call = !follows && queues.call(self.shared.per_share_max);
        drop(queues);
        if call {
            self.shared.work_there.notify_one();
        }
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
    pub fn take_finished(&self) -> Vec<R> {
        // Cleared before: what comes after this look wakes anew.
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
    const fn new() -> Self {
        Self {
            waiting: BTreeMap::new(),
            last_owner: 0,
            running_of_share: BTreeMap::new(),
            running_keys: BTreeSet::new(),
            finished: Vec::new(),
            idle: 0,
            called: 0,
            stop: false,
        }
    }

    fn may_run(&self, job: &Job<R>, per_share_max: usize) -> bool {
        self.running_of_share
            .get(&job.share)
            .is_none_or(|running| *running < per_share_max)
            && job.key.is_none_or(|key| !self.running_keys.contains(&key))
    }

    /// Where the next job is: owners in turn, from the one behind the last; first job of each whose share is not full.
    fn find(&self, per_share_max: usize) -> Option<(u64, usize)> {
        self.waiting
            .range(self.last_owner.saturating_add(1)..)
            .chain(self.waiting.range(..=self.last_owner))
            .find_map(|(owner, queue)| {
                let position = queue.iter().position(|job| self.may_run(job, per_share_max))?;
                Some((*owner, position))
            })
    }

    /// Takes the next job.
    fn next(&mut self, per_share_max: usize) -> Option<(u64, Job<R>)> {
        let (owner, position) = self.find(per_share_max)?;
        let queue = self.waiting.get_mut(&owner)?;
        let job = queue.remove(position)?;
        if queue.is_empty() {
            self.waiting.remove(&owner);
        }
        *self.running_of_share.entry(job.share).or_default() += 1;
        self.running_keys.extend(job.key);
        self.last_owner = owner;
        Some((owner, job))
    }

    /// Whether one more worker is to be woken: there is a job that may run, and somebody who sleeps.
    fn call(&mut self, per_share_max: usize) -> bool {
        let call = self.idle > self.called && self.find(per_share_max).is_some();
        self.called += usize::from(call);
        call
    }

    /// A job of this share, with this key, has ended. True: the loop is to be woken, it has taken what there was before.
    fn end(&mut self, share: usize, key: Option<usize>, results: Vec<R>) -> bool {
        if let Some(running) = self.running_of_share.get_mut(&share) {
            *running = running.saturating_sub(1);
        }
        if let Some(key) = key {
            self.running_keys.remove(&key);
        }
        let wake = self.finished.is_empty() && !results.is_empty();
        self.finished.extend(results);
        wake
    }
}

fn work<R>(shared: &Shared<R>, number: usize) {
    let _end = PanicEndsAll;
    let blame = |owner| {
        if let Some(blame) = shared.blame.get() {
            blame(number, owner);
        }
    };
    let mut ended = None;
    loop {
        let mut queues = lock(&shared.queues);
        let wake = ended
            .take()
            .is_some_and(|(share, key, results)| queues.end(share, key, results));
        let next = if queues.stop {
            None
        } else {
            queues.next(shared.per_share_max)
        };
        // Also for what may run since a job has ended, or was passed over.
        let call = next.is_some() && queues.call(shared.per_share_max);
        drop(queues);
        if wake {
            let _ = rustix::io::write(&shared.wake, &1u64.to_ne_bytes());
        }
        if call {
            shared.work_there.notify_one();
        }
        match next {
            Some((owner, job)) => {
                blame(owner);
                let results = (job.work)();
                blame(0);
                ended = Some((job.share, job.key, results));
            }
            None if rest(shared) => {}
            None => return,
        }
    }
}

/// Sleeps until there may be a job; false: there will be none any more.
fn rest<R>(shared: &Shared<R>) -> bool {
    let mut queues = lock(&shared.queues);
    // One may have come since this worker looked, which counted it as busy.
    if !queues.stop && queues.find(shared.per_share_max).is_none() {
        queues.idle += 1;
        while queues.called == 0 && !queues.stop {
            queues = shared
                .work_there
                .wait(queues)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queues.called = queues.called.saturating_sub(1);
        queues.idle -= 1;
    }
    !queues.stop
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
                vec!["hung"]
            });
        }
        for _ in 0..8 {
            pool.submit(2, 1, || vec!["quick"]);
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
            vec!["first"]
        });
        pool.submit_keyed(1, 0, Some(7), || vec!["second"]);
        pool.submit_keyed(1, 0, Some(8), || vec!["other"]);
        assert_eq!(wait_finished(&pool, 1), ["other"]);
        drop(release);
        assert_eq!(wait_finished(&pool, 2), ["first", "second"]);
    }

    #[test]
    fn owners_take_turns() {
        let mut queues = Queues::new();
        for (owner, name) in [(1, 'a'), (1, 'b'), (1, 'c'), (2, 'd'), (3, 'e')] {
            queues.waiting.entry(owner).or_default().push_back(Job {
                share: 0,
                key: None,
                work: Box::new(move || vec![name]),
            });
        }
        let order: String = std::iter::from_fn(|| queues.next(99))
            .flat_map(|(_, job)| (job.work)())
            .collect();
        assert_eq!(order, "adebc");
    }

    #[test]
    fn a_worker_is_called_only_for_what_may_run_and_the_loop_once_for_what_it_has_not_taken() {
        const SHARE_MAX: usize = 2;
        let mut queues = Queues::new();
        queues.idle = 3;
        let put = |queues: &mut Queues<u8>, key| {
            queues.waiting.entry(1).or_default().push_back(Job {
                share: 0,
                key,
                work: Box::new(Vec::new),
            });
            queues.call(SHARE_MAX)
        };
        assert!(!queues.call(SHARE_MAX), "nothing to do");
        assert!(put(&mut queues, Some(7)));
        queues.called -= 1;
        queues.idle -= 1;
        assert!(queues.next(SHARE_MAX).is_some());
        assert!(!put(&mut queues, Some(7)), "its key is taken");
        assert!(put(&mut queues, Some(8)));
        assert!(queues.next(SHARE_MAX).is_some());
        assert!(!put(&mut queues, None), "its share is full");
        assert_eq!((queues.idle, queues.called), (2, 1));
        // The end of the first makes room for two of which one is called for here, the other by whoever takes it.
        assert!(!queues.end(0, Some(7), Vec::new()), "no result, nothing to tell");
        assert!(queues.end(0, None, vec![1]) && !queues.end(0, None, vec![2, 3]));
        assert!(
            queues.call(SHARE_MAX) && !queues.call(SHARE_MAX),
            "all are called"
        );
        assert_eq!(queues.finished, [1, 2, 3]);
    }

    #[test]
    fn every_job_of_many_runs_although_nobody_is_woken_in_vain() {
        const JOBS: usize = 3000;
        let pool = Pool::new(4).unwrap();
        for round in 0..3 {
            for job in 0..JOBS {
                let key = (job % 3 == 0).then_some(job % 7);
                pool.submit_keyed((job % 5) as u64, job % 2, key, move || vec![job; job % 3]);
            }
            let count = (0..JOBS).map(|job| job % 3).sum();
            let mut all = wait_finished(&pool, count);
            all.sort_unstable();
            let expected: Vec<usize> = (0..JOBS).flat_map(|job| vec![job; job % 3]).collect();
            assert_eq!(all, expected, "round {round}");
        }
    }
}
