//! Worker threads for what can sleep on a disk.
//!
//! In: jobs, each with an owner (a VM) and a share. Out: their results, in any order, and a wake-up of the loop. Jobs of
//! one owner start in order, but for those whose share is full; a job that has more to do goes to its owner's end; owners take turns; one share may hold at most
//! half the workers, so that one hung disk does not take them all.
//!
//! Nobody is woken in vain: a worker only for a job that may run now, the loop only when it has taken what there was before, and, where
//! it has promised to look soon by itself, only when there are as many results as things left to do. On a host with few processors each
//! such wake-up takes time from the one that works.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};

type Work<R> = Box<dyn FnMut() -> Turn<R> + Send>;
type Blame = Box<dyn Fn(usize, u64) + Send + Sync>;

/// What a turn of a job gave.
#[derive(Debug)]
pub struct Turn<R> {
    pub results: Vec<R>,
    /// Results that it will give yet; where there are any it gets another turn.
    pub left: usize,
}

struct Job<R> {
    share: usize,
    work: Work<R>,
}

struct Queues<R> {
    waiting: BTreeMap<u64, VecDeque<Job<R>>>,
    /// Owner that was served last: the next one in order goes on.
    last_owner: u64,
    running_of_share: BTreeMap<usize, usize>,
    finished: Vec<R>,
    /// The loop was woken for what is finished.
    told: bool,
    /// The loop has promised to look soon.
    looks_soon: bool,
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
        let mut work = Some(work);
        self.submit_in_turns(owner, share, move || Turn {
            results: work.take().map_or_else(Vec::new, |work| work()),
            left: 0,
        });
    }

    /// As [`Pool::submit`], for what is done in several turns, so that others come in between.
    pub fn submit_in_turns(&self, owner: u64, share: usize, work: impl FnMut() -> Turn<R> + Send + 'static) {
        let job = Job {
            share,
            work: Box::new(work),
        };
        let mut queues = lock(&self.shared.queues);
        queues.waiting.entry(owner).or_default().push_back(job);
        let call = queues.call(self.shared.per_share_max);
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

    /// Before the loop sleeps: whether it is to look within about a millisecond whatever comes, so that results may wait for others. False:
    /// there are some that nobody will wake it for, it must not sleep.
    pub fn promise(&self, looks_soon: bool) -> bool {
        let mut queues = lock(&self.shared.queues);
        queues.looks_soon = looks_soon;
        looks_soon || queues.told || queues.finished.is_empty()
    }

    /// Results so far.
    pub fn take_finished(&self) -> Vec<R> {
        if lock(&self.shared.queues).told {
            // Cleared before: what comes after this look wakes anew.
            let mut drained = [0u8; 8];
            let _ = rustix::io::read(&self.shared.wake, &mut drained);
        }
        let mut queues = lock(&self.shared.queues);
        queues.told = false;
        std::mem::take(&mut queues.finished)
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
            finished: Vec::new(),
            told: false,
            looks_soon: false,
            idle: 0,
            called: 0,
            stop: false,
        }
    }

    fn may_run(&self, job: &Job<R>, per_share_max: usize) -> bool {
        self.running_of_share
            .get(&job.share)
            .is_none_or(|running| *running < per_share_max)
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
        self.last_owner = owner;
        Some((owner, job))
    }

    /// Whether one more worker is to be woken: there is a job that may run, and somebody who sleeps.
    fn call(&mut self, per_share_max: usize) -> bool {
        let call = self.idle > self.called && self.find(per_share_max).is_some();
        self.called += usize::from(call);
        call
    }

    /// A job has had a turn, and goes to its owner's end where it has more to do. True: the loop is to be woken.
    fn end(&mut self, owner: u64, job: Job<R>, turn: Turn<R>) -> bool {
        if let Some(running) = self.running_of_share.get_mut(&job.share) {
            *running = running.saturating_sub(1);
        }
        if turn.left > 0 {
            self.waiting.entry(owner).or_default().push_back(job);
        }
        self.finished.extend(turn.results);
        let may_wait = self.looks_soon && self.finished.len() < turn.left;
        let wake = !self.finished.is_empty() && !self.told && !may_wait;
        self.told |= wake;
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
            .is_some_and(|(owner, job, turn)| queues.end(owner, job, turn));
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
            Some((owner, mut job)) => {
                blame(owner);
                let turn = (job.work)();
                blame(0);
                ended = Some((owner, job, turn));
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
    fn a_job_that_has_more_to_do_lets_others_of_its_owner_go_before() {
        let pool = Pool::new(2).unwrap();
        let (release, held) = mpsc::channel::<()>();
        let mut turns = 0;
        pool.submit_in_turns(1, 0, move || {
            let _ = held.recv();
            turns += 1;
            Turn {
                results: vec![turns],
                left: 3 - turns,
            }
        });
        pool.submit(1, 0, || vec![100]);
        release.send(()).unwrap();
        assert_eq!(wait_finished(&pool, 2), [1, 100]);
        drop(release);
        assert_eq!(wait_finished(&pool, 2), [2, 3]);
        assert!(pool.is_idle());
    }

    #[test]
    fn results_wait_for_others_only_while_the_loop_has_promised_to_look() {
        let mut queues = Queues::new();
        let end = |queues: &mut Queues<u8>, results: usize, left: usize| {
            let job = Job {
                share: 0,
                work: Box::new(|| unreachable!("never begun")),
            };
            let results = vec![0; results];
            queues.end(1, job, Turn { results, left })
        };
        assert!(end(&mut queues, 1, 7), "nothing was promised");
        assert!(!end(&mut queues, 1, 0), "told already");
        let taken = |queues: &mut Queues<u8>| {
            queues.told = false;
            std::mem::take(&mut queues.finished).len()
        };
        assert_eq!(taken(&mut queues), 2);
        queues.looks_soon = true;
        assert!(!end(&mut queues, 1, 7) && !end(&mut queues, 2, 5));
        assert!(end(&mut queues, 1, 4), "as many as are left");
        assert_eq!(taken(&mut queues), 4);
        assert!(end(&mut queues, 1, 0), "nobody else would");
        assert!(!end(&mut queues, 0, 0), "no result, nothing to tell");
        assert_eq!(taken(&mut queues), 1);
    }

    #[test]
    fn a_loop_that_does_not_promise_to_look_must_not_sleep_over_results_that_it_was_not_told_of() {
        let pool = Pool::new(2).unwrap();
        assert!(pool.promise(true));
        let (release, held) = mpsc::channel::<()>();
        let (reached, second) = mpsc::channel::<()>();
        let mut first = true;
        pool.submit_in_turns(1, 0, move || {
            if !std::mem::take(&mut first) {
                // The first turn's result lies there now.
                let _ = reached.send(());
                let _ = held.recv();
                return Turn {
                    results: vec![2, 3],
                    left: 0,
                };
            }
            Turn {
                results: vec![1],
                left: 2,
            }
        });
        second.recv().unwrap();
        assert!(pool.promise(true), "it will look");
        assert!(!pool.promise(false), "it would not");
        assert_eq!(pool.take_finished(), [1]);
        assert!(pool.promise(false));
        drop(release);
        assert_eq!(wait_finished(&pool, 2), [2, 3]);
    }

    #[test]
    fn owners_take_turns() {
        let mut queues = Queues::new();
        for (owner, name) in [(1, 'a'), (1, 'b'), (1, 'c'), (2, 'd'), (3, 'e')] {
            queues.waiting.entry(owner).or_default().push_back(Job {
                share: 0,
                work: Box::new(move || Turn {
                    results: vec![name],
                    left: 0,
                }),
            });
        }
        let order: String = std::iter::from_fn(|| queues.next(99))
            .flat_map(|(_, mut job)| (job.work)().results)
            .collect();
        assert_eq!(order, "adebc");
    }

    #[test]
    fn a_worker_is_called_only_for_what_may_run_and_the_loop_once_for_what_it_has_not_taken() {
        const SHARE_MAX: usize = 2;
        let mut queues = Queues::new();
        queues.idle = 4;
        let put = |queues: &mut Queues<u8>| {
            queues.waiting.entry(1).or_default().push_back(Job {
                share: 0,
                work: Box::new(|| unreachable!("never begun")),
            });
            queues.call(SHARE_MAX)
        };
        let come = |queues: &mut Queues<u8>| {
            queues.called -= 1;
            queues.idle -= 1;
            queues.next(SHARE_MAX).unwrap()
        };
        let turn = |results| Turn { results, left: 0 };
        assert!(!queues.call(SHARE_MAX), "nothing to do");
        assert!(put(&mut queues));
        let (owner, first) = come(&mut queues);
        assert!(put(&mut queues));
        let (_, second) = come(&mut queues);
        assert!(!put(&mut queues) && !put(&mut queues), "its share is full");
        assert_eq!((queues.idle, queues.called), (2, 0));
        assert!(
            !queues.end(owner, first, turn(Vec::new())),
            "no result, nothing to tell"
        );
        assert!(queues.end(owner, second, turn(vec![1])));
        assert!(
            queues.call(SHARE_MAX) && queues.call(SHARE_MAX) && !queues.call(SHARE_MAX),
            "all are called"
        );
        let (_, third) = come(&mut queues);
        assert!(!queues.end(owner, third, turn(vec![2, 3])));
        assert_eq!(queues.finished, [1, 2, 3]);
    }

    #[test]
    fn every_job_of_many_runs_although_nobody_is_woken_in_vain() {
        const JOBS: usize = 3000;
        let pool = Pool::new(4).unwrap();
        for round in 0..3 {
            for job in 0..JOBS {
                let mut results = vec![job; job % 3];
                pool.submit_in_turns((job % 5) as u64, job % 2, move || Turn {
                    results: results.pop().into_iter().collect(),
                    left: results.len(),
                });
                // Sleeping or not, as a loop might be.
                pool.promise(job % 2 == 0);
            }
            let count = (0..JOBS).map(|job| job % 3).sum();
            let mut all = wait_finished(&pool, count);
            all.sort_unstable();
            let expected: Vec<usize> = (0..JOBS).flat_map(|job| vec![job; job % 3]).collect();
            assert_eq!(all, expected, "round {round}");
        }
    }
}
