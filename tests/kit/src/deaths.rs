//! Cores that die at odd times while something is done.

use crate::process::Daemon;
use anyhow::{Result, anyhow};
use std::time::Duration;

/// After so many deaths lives are longer by once the time given.
const DEATHS_UNTIL_LONGER: u64 = 20;

/// Kills the core, again and again, until `work` is done; what that said, and how many cores died. Between two deaths lies a time of up to
/// `apart` (or more, after many of them) that `seed` gives, from the new core's start on.
///
/// # Errors
/// What went wrong with the work, or a core that does not come.
pub fn while_cores_die<T: Send>(
    daemon: &Daemon,
    seed: u64,
    apart: Duration,
    patience: Duration,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<(T, u32)> {
    std::thread::scope(|scope| {
        let work = scope.spawn(work);
        let (mut deaths, mut state) = (0, seed | 1);
        while !work.is_finished() {
            // Not a time that is waited for, but one at which nothing in particular happens.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let apart_us = u64::try_from(apart.as_micros()).unwrap_or(u64::MAX).max(1);
            // Where cores start so slowly that none lives long enough for the work, lives become longer: it comes to its end on any machine.
            let apart_us = apart_us.saturating_mul(1 + u64::from(deaths) / DEATHS_UNTIL_LONGER);
            std::thread::sleep(Duration::from_micros(state % apart_us));
            let old = daemon.kill_role("core")?;
            daemon.wait_for_new("core", old, patience)?;
            deaths += 1;
        }
        let done = work.join().map_err(|_| anyhow!("the guest panicked"))?;
        Ok((done?, deaths))
    })
}
