//! The signals that the keeper catches. In: SIGTERM, SIGINT, SIGUSR2, SIGHUP. Out: what they ask for, and a descriptor that wakes the loop. Never acts.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The signals that the keeper catches.
pub(super) struct Signals {
    /// Readable when one came; which one, the others say.
    pub(super) came: UnixStream,
    pub(super) stop_asked: Arc<AtomicBool>,
    pub(super) upgrade_asked: Arc<AtomicBool>,
    pub(super) reload_asked: Arc<AtomicBool>,
}

impl Signals {
    pub(super) const ALL: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR2, libc::SIGHUP];

    /// Catches them from now on.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn catch() -> std::io::Result<Self> {
        let (came, wake) = UnixStream::pair()?;
        came.set_nonblocking(true)?;
        let signals = Self {
            came,
            stop_asked: Arc::default(),
            upgrade_asked: Arc::default(),
            reload_asked: Arc::default(),
        };
        for signal in Self::ALL {
            let asked = match signal {
                libc::SIGUSR2 => &signals.upgrade_asked,
                libc::SIGHUP => &signals.reload_asked,
                _ => &signals.stop_asked,
            };
            signal_hook::flag::register(signal, Arc::clone(asked))?;
            signal_hook::low_level::pipe::register(signal, wake.try_clone()?)?;
        }
        Ok(signals)
    }

    /// Whether one that is still to be taken asks for the end.
    pub(super) fn stop_is_asked(&self) -> bool {
        self.stop_asked.load(Ordering::Relaxed)
    }

    /// What was asked for since the last time.
    pub(super) fn take(&self) -> Asked {
        let mut buffer = [0; 64];
        while matches!((&self.came).read(&mut buffer), Ok(1..)) {}
        Asked {
            stop: self.stop_asked.swap(false, Ordering::Relaxed),
            upgrade: self.upgrade_asked.swap(false, Ordering::Relaxed),
            reload: self.reload_asked.swap(false, Ordering::Relaxed),
        }
    }
}

/// What signals ask for.
pub(super) struct Asked {
    pub(super) stop: bool,
    pub(super) upgrade: bool,
    pub(super) reload: bool,
}
