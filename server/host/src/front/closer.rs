//! Closing what came from clients: in threads of its own, since a close can wait for whoever shares the descriptor.
//!
//! In: descriptors of clients, by listener. Out: nothing. Must never know: a session, a message.
//!
//! A socket that lingers waits for its peer, a file of a user's own file system for its server, for ever if they like. Memory and eventfds never
//! do, and are closed wherever they are dropped. Everything else is a stranger: a reference to it is kept here until it is the last, and
//! then a thread closes it. At most one thread is with each listener's strangers, so that one client's cost one thread at most; what waits
//! behind is counted ([`Closer::is_behind`]), so that a client cannot have the front's descriptors pile up. A thread that hangs
//! harms nobody: it ends with the process.

use super::descriptors::is_memory;
use super::limits::{CLOSER_STACK_BYTES, CLOSERS, CLOSES_WAITING_MAX};
use rustix::fd::OwnedFd;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use vmgmt_mem::Signals;

/// Strangers on their way out, and the threads that close them.
#[derive(Debug)]
pub struct Closer {
    shared: Arc<Shared>,
    /// Strangers that somebody may still use, with their listeners.
    strangers: Vec<(u32, Rc<OwnedFd>)>,
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
            strangers: Vec::new(),
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

    /// A descriptor came from a client of this listener.
    pub fn received(&mut self, listener: u32, fd: OwnedFd, signals: &Signals) -> Rc<OwnedFd> {
        let fd = Rc::new(fd);
        self.watch(listener, &fd, signals);
        fd
    }

    /// Sees to it that the last user of a client's descriptor does not close it, where that could wait.
    pub fn watch(&mut self, listener: u32, fd: &Rc<OwnedFd>, signals: &Signals) {
        if !is_memory(fd) && !signals.is_eventfd(fd) {
            self.strangers.push((listener, fd.clone()));
        }
    }

    /// Strangers that are held.
    pub fn strangers(&self) -> usize {
        self.strangers.len()
    }

    /// Has those closed that nobody uses any more.
    pub fn sweep(&mut self) {
        let mut index = 0;
        while let Some((_, fd)) = self.strangers.get(index) {
            if Rc::strong_count(fd) > 1 {
                index += 1;
                continue;
            }
            let (listener, fd) = self.strangers.swap_remove(index);
            if let Some(fd) = Rc::into_inner(fd) {
                self.close(listener, fd);
            }
        }
    }

    /// Has a descriptor closed, soon.
    pub fn close(&self, listener: u32, fd: OwnedFd) {
        let mut queues = self.shared.lock();
        queues.waiting.entry(listener).or_default().push_back(fd);
        drop(queues);
        self.shared.more.notify_one();
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
    fn a_stranger_is_closed_after_its_last_user_has_gone() {
        let (signals, mut closer) = (Signals::new().unwrap(), Closer::new().unwrap());
        let (reader, writer) = pipe().unwrap();
        let kept = closer.received(1, writer, &signals);
        closer.sweep();
        assert_eq!((closer.strangers(), is_closed(&reader)), (1, false));
        drop(kept);
        closer.sweep();
        assert_eq!(closer.strangers(), 0);
        while !is_closed(&reader) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn memory_and_eventfds_are_no_strangers() {
        let (signals, mut closer) = (Signals::new().unwrap(), Closer::new().unwrap());
        let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        closer.received(1, memory, &signals);
        closer.received(1, event, &signals);
        assert_eq!(closer.strangers(), 0);
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
            strangers: Vec::new(),
        };
        for _ in 0..CLOSES_WAITING_MAX {
            assert!(!closer.is_behind(7));
            closer.close(7, pipe().unwrap().0);
        }
        assert!(closer.is_behind(7) && !closer.is_behind(8));
    }
}
