//! A core that starts runs ahead of what else wants its processors, until it serves: all VMs wait for it.
//!
//! In: the privileges that vmgmtd was started with. Out: a first thread with a higher priority, for a time that has an end. Must never know
//! what is done in that time.
//!
//! Most of what a core needs to take 64 busy sessions over is a wait for a processor: the guests have them, and those that are
//! served first want them more than those that are not served yet (docs/performance.md).

use crate::sandbox::has_ordinary_threads;
use rustix::process::{getpriority_process, setpriority_process};
use std::time::{Duration, Instant};

/// The nice value until then: nine times the share of an ordinary thread (sched(7)).
const NICE: i32 = -10;
/// It ends after this, although there is more to take over: the guests' own work has waited long enough.
const AHEAD_MAX: Duration = Duration::from_millis(300);

/// The calling thread runs ahead.
#[derive(Debug)]
pub struct Ahead {
    until: Instant,
}

impl Ahead {
    /// The calling thread, the only one of its process, runs ahead from now on; those that it starts do not. `None`: it may not, or was
    /// given a priority or a policy by who started vmgmtd, and that stays.
    #[must_use]
    pub fn begin() -> Option<Self> {
        if getpriority_process(None) != Ok(0) || !has_ordinary_threads() {
            return None;
        }
        setpriority_process(None, NICE).ok()?;
        let until = Instant::now() + AHEAD_MAX;
        Some(Self { until })
    }

    /// The core was on trial, which its keeper bounds and where it has slept for the most part, and takes over now. (The privilege is gone:
    /// what it gave back before, it would not get again.)
    pub(super) fn begin_anew(&mut self) {
        self.until = Instant::now() + AHEAD_MAX;
    }

    /// Whether it is over: this core `serves` all there was to serve, or it has taken too long. Asked between any two steps of what it does.
    pub(super) fn is_over(&self, serves: bool) -> bool {
        serves || self.until <= Instant::now()
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // Less needs no privilege.
        let _ = setpriority_process(None, 0);
    }
}
