//! Closing what came from clients: in threads of its own, since a close can wait for whoever shares the descriptor.
//!
//! In: descriptors of clients, by listener. Out: nothing. Must never know: a session, a message.
//!
//! A socket that lingers waits for its peer, a file of a user's own file system for its server, for ever if they like; a listener closes what
//! was sent to it and not taken. An eventfd waits for whoever waits with epoll for it and for a page of such a file; the last of a large
//! memory object frees all its pages. So the last user of a client's descriptor gives it to a thread ([`SharedFd`]), whatever it is; what
//! is known not to be the last of its memory alone is closed in place ([`SharedFd::close_here`]). At most one thread is with each
//! listener's, so that one client's cost one thread at most; what waits behind is counted ([`Closer::is_behind`]), so that a client cannot
//! have the front's descriptors pile up. A thread that hangs harms nobody: it ends with the process.

use super::limits::{CLOSER_STACK_BYTES, CLOSERS, CLOSES_WAITING_MAX};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Stands for what came from no client that is known; listeners are counted from 1.
pub const NO_LISTENER: u32 = 0;

/// The threads that close.
#[derive(Debug)]
pub struct Closer {
    shared: Arc<Shared>,
}

/// A descriptor that several may use. Where it came from a client the last of them has a thread close it; one of our own is closed in place.
#[derive(Clone, Debug)]
pub struct SharedFd {
    /// There is one until this is dropped.
    fd: Option<Rc<OwnedFd>>,
    closer: Option<(u32, Arc<Shared>)>,
}

#[derive(Debug, Default)]
struct Shared {
    queues: Mutex<Queues>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Queues {
    /// By listener; never empty.
    waiting: BTreeMap<u32, VecDeque<OwnedFd>>,
    /// A thread is with one of this listener's.
    closing: BTreeSet<u32>,
    ended: bool,
}

impl Closer {
    /// Starts the threads, and waits until they run: before the sandbox is sealed, which lets none be made nor begin.
    ///
    /// # Errors
    /// The system has no room for a thread.
    pub fn new() -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let closer = Self {
            shared: shared.clone(),
        };
        let (began, all_began) = std::sync::mpsc::channel::<()>();
        for _ in 0..CLOSERS {
            let (shared, began) = (shared.clone(), began.clone());
            std::thread::Builder::new()
                .name("closer".into())
                .stack_size(CLOSER_STACK_BYTES)
                .spawn(move || {
                    // Its heap is made now as well: the C library looks at the machine's files then.
                    drop(std::hint::black_box(vec![0_u8; 64]));
                    drop(began);
                    shared.close_all();
                })?;
        }
        drop(began);
        // Nobody says anything: it ends when the last has begun.
        let _ = all_began.recv();
        Ok(closer)
    }

    /// A descriptor came from a client of this listener, or is one of its own.
    pub fn watch(&self, listener: u32, fd: impl Into<Rc<OwnedFd>>) -> SharedFd {
        SharedFd {
            fd: Some(fd.into()),
            closer: Some((listener, self.shared.clone())),
        }
    }

    /// Has a descriptor closed, soon.
    pub fn close(&self, listener: u32, fd: OwnedFd) {
        drop(self.watch(listener, fd));
    }

    /// So many of this listener's wait to be closed that it may bring no more.
    pub fn is_behind(&self, listener: u32) -> bool {
        let queues = self.shared.lock();
        let waiting = queues.waiting.get(&listener);
        waiting.is_some_and(|waiting| waiting.len() >= CLOSES_WAITING_MAX)
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.more.notify_all();
    }
}

impl SharedFd {
    /// Closes it here and now, if nobody else uses it: where that cannot wait.
    pub fn close_here(mut self) {
        self.closer = None;
    }
}

impl From<Rc<OwnedFd>> for SharedFd {
    /// One of our own.
    fn from(fd: Rc<OwnedFd>) -> Self {
        Self {
            fd: Some(fd),
            closer: None,
        }
    }
}

impl AsFd for SharedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // (The other is no file that is open.)
        self.fd.as_ref().map_or(rustix::fs::CWD, |fd| fd.as_fd())
    }
}

impl AsRawFd for SharedFd {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for SharedFd {
    fn drop(&mut self) {
        let last = self.fd.take().and_then(Rc::into_inner);
        if let (Some(fd), Some((listener, shared))) = (last, &self.closer) {
            let mut queues = shared.lock();
            queues.waiting.entry(*listener).or_default().push_back(fd);
            drop(queues);
            shared.more.notify_one();
        }
    }
}

impl Shared {
    /// Held for a few instructions only, so the loop may wait for it. (Nothing panics with it; if so, what is in it is still good.)
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_all(&self) {
        let mut queues = self.lock();
        loop {
            if let Some((listener, fd)) = queues.next() {
                drop(queues);
                drop(fd);
                queues = self.lock();
                queues.closing.remove(&listener);
            } else if queues.ended {
                return;
            } else {
                queues = self.more.wait(queues).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Queues {
    /// The next to be closed, of a listener that no thread is with.
    fn next(&mut self) -> Option<(u32, OwnedFd)> {
        let closing = &self.closing;
        let (listener, waiting) = self
            .waiting
            .iter_mut()
            .find(|(listener, _)| !closing.contains(listener))?;
        let (listener, fd) = (*listener, waiting.pop_front());
        if waiting.is_empty() {
            self.waiting.remove(&listener);
        }
        let fd = fd?;
        self.closing.insert(listener);
        Some((listener, fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{OFlags, fcntl_setfl};
    use rustix::io::Errno;
    use rustix::pipe::pipe;

    /// Whether the other end of a pipe is closed.
    fn is_closed(reader: &OwnedFd) -> bool {
        fcntl_setfl(reader, OFlags::NONBLOCK).unwrap();
        match rustix::io::read(reader, &mut [0]) {
            Ok(0) => true,
            Err(Errno::AGAIN) => false,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_thread_closes_what_its_last_user_drops() {
        let closer = Closer::new().unwrap();
        let (reader, writer) = pipe().unwrap();
        let one = closer.watch(1, writer);
        let other = one.clone();
        drop(one);
        assert!(!is_closed(&reader));
        drop(other);
        while !is_closed(&reader) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn memory_and_eventfds_of_clients_are_for_the_threads_too_and_what_is_ours_is_not() {
        // Nobody takes what waits.
        let shared = Arc::<Shared>::default();
        let closer = Closer {
            shared: shared.clone(),
        };
        let waiting = || shared.lock().waiting.values().map(VecDeque::len).sum::<usize>();
        let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        drop(closer.watch(1, memory));
        drop(closer.watch(1, event));
        assert_eq!(waiting(), 2);
        let (reader, writer) = pipe().unwrap();
        drop(SharedFd::from(Rc::new(writer)));
        assert!(is_closed(&reader));
        let (reader, writer) = pipe().unwrap();
        closer.watch(1, writer).close_here();
        assert!(is_closed(&reader));
        assert_eq!(waiting(), 2);
    }

    #[test]
    fn one_thread_is_with_a_listener_and_what_waits_behind_is_counted() {
        let mut queues = Queues::default();
        let fill = |queues: &mut Queues| {
            for listener in [7, 7, 8] {
                let fd = pipe().unwrap().0;
                queues.waiting.entry(listener).or_default().push_back(fd);
            }
        };
        fill(&mut queues);
        let listener = |queues: &mut Queues| queues.next().map(|(listener, _)| listener);
        assert_eq!(listener(&mut queues), Some(7));
        assert_eq!(listener(&mut queues), Some(8));
        assert_eq!(
            listener(&mut queues),
            None,
            "a thread is with the other of the first"
        );
        queues.closing.remove(&7);
        assert_eq!(listener(&mut queues), Some(7));
        assert!(queues.waiting.is_empty());
        // Nobody takes what is behind one that hangs.
        let closer = Closer {
            shared: Arc::default(),
        };
        for _ in 0..CLOSES_WAITING_MAX {
            assert!(!closer.is_behind(7));
            closer.close(7, pipe().unwrap().0);
        }
        assert!(closer.is_behind(7) && !closer.is_behind(8));
    }
}
