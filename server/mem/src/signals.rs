//! MEM, signals: adding one to an eventfd that somebody else holds too, without ever waiting for them.
//!
//! In: descriptors. Out: a signal, or whether there could be one. Knows no interrupt.
//!
//! `write` on an eventfd waits where its counter is full, unless the open file says O_NONBLOCK; both are in the hands of whoever shares
//! it, at any time, and the kernel has no other write for it (RWF_NOWAIT is refused, measured on Linux 6.18). But the kernel signals
//! eventfds itself when a request of asynchronous I/O is done, and never waits then: a full counter stays full. So a signal
//! is a read of no bytes from an empty memory object of our own, which is done before `io_submit` returns.

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use std::cell::Cell;

/// Requests that the kernel keeps room for; it keeps the outcome of each until it is asked.
const REQUESTS_MAX: u32 = 64;

/// IOCB_CMD_PREAD and IOCB_FLAG_RESFD (linux/aio_abi.h).
const READ: u16 = 0;
const SIGNAL_EVENTFD: u32 = 1;

/// struct iocb (linux/aio_abi.h), on a machine of little-endian words.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    operation: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

const _: () = assert!(size_of::<Request>() == 64 && cfg!(target_endian = "little"));

/// struct io_event.
#[repr(C)]
#[derive(Clone, Copy)]
struct Outcome {
    _words: [u64; 4],
}

/// A way to signal eventfds that never blocks.
#[derive(Debug)]
pub struct Signals {
    context: libc::c_ulong,
    /// What is read of.
    nothing: OwnedFd,
    /// Outcomes that the kernel keeps at most.
    kept: Cell<u32>,
}

impl Signals {
    /// Makes ready.
    ///
    /// # Errors
    /// NOSYS: a kernel without asynchronous I/O. AGAIN: the host's `fs.aio-max-nr` is used up. Else the system's.
    pub fn new() -> Result<Self, Errno> {
        let nothing = memfd_create("vmgmt nothing", MemfdFlags::CLOEXEC)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word, which lives until the call returns.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, REQUESTS_MAX, &raw mut context) };
        checked(result)?;
        Ok(Self {
            context,
            nothing,
            kept: Cell::new(0),
        })
    }

    /// Adds one to the counter of an eventfd, and wakes whoever waits for it. A full counter stays full, as good as a signal.
    ///
    /// # Errors
    /// INVAL: it is no eventfd. AGAIN: the kernel has no memory.
    pub fn signal(&self, eventfd: impl AsFd) -> Result<(), Errno> {
        if self.kept.get() >= REQUESTS_MAX {
            self.forget_outcomes();
        }
        self.submit(eventfd, 0, 0)?;
        self.kept.set(self.kept.get() + 1);
        Ok(())
    }

    /// Whether a descriptor is an eventfd; nothing is signalled, and nothing of the file's own is asked.
    pub fn is_eventfd(&self, fd: impl AsFd) -> bool {
        // The kernel looks first at the descriptor that is to be signalled, then at the buffer, which is none here.
        self.submit(fd, u64::MAX, 1) == Err(Errno::FAULT)
    }

    fn submit(&self, eventfd: impl AsFd, buffer: u64, bytes: u64) -> Result<(), Errno> {
        let mut request = Request {
            operation: READ,
            file: self.nothing.as_raw_fd().unsigned_abs(),
            buffer,
            bytes,
            flags: SIGNAL_EVENTFD,
            eventfd: eventfd.as_fd().as_raw_fd().unsigned_abs(),
            ..Request::default()
        };
        let requests = [&raw mut request];
        // SAFETY: one pointer to one whole request, both live until the call returns; the kernel is done with them then. It reads no bytes
        // into the buffer: there are none in that file.
        let result = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, requests.as_ptr()) };
        checked(result)
    }

    fn forget_outcomes(&self) {
        let mut outcomes = [Outcome { _words: [0; 4] }; REQUESTS_MAX as usize];
        let no_time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: room for as many outcomes as are asked for, and a whole time of zero (do not wait); both live until the call returns.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0,
                REQUESTS_MAX,
                outcomes.as_mut_ptr(),
                &raw const no_time,
            );
        }
        self.kept.set(0);
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: our own context, which nobody uses any more; nothing is under way in it.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn checked(result: libc::c_long) -> Result<(), Errno> {
    if result >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn count(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn each_signal_counts_one_and_a_full_counter_does_not_wait() {
        let signals = Signals::new().unwrap();
        // Made to block: where a signal waited, this test would never end.
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        let rounds = 10 * u64::from(REQUESTS_MAX) + 1;
        for _ in 0..rounds {
            signals.signal(&fd).unwrap();
        }
        assert_eq!(count(&fd), rounds);
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..rounds {
            signals.signal(&fd).unwrap();
        }
        assert_eq!(count(&fd), u64::MAX);
    }

    #[test]
    fn only_an_eventfd_is_one() {
        let signals = Signals::new().unwrap();
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        for _ in 0..3 * REQUESTS_MAX {
            assert!(signals.is_eventfd(&fd));
        }
        assert_eq!(rustix::io::read(&fd, &mut [0; 8]), Err(Errno::AGAIN), "no signal");
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        for other in [reader, writer, epoll, memory] {
            assert!(!signals.is_eventfd(&other));
            assert_eq!(signals.signal(&other), Err(Errno::INVAL));
        }
        signals.signal(&fd).unwrap();
        assert_eq!(count(&fd), 1);
    }
}
