//! OFFICE: rates as virtual time, and the log's own rate limit.
//!
//! In: (now, cost). Out: how long to wait, or a refusal. It never knows what the cost is for.
//!
//! A rate limit delays before it refuses: who overruns by a burst waits up to `RATE_DELAY_NS_MAX` in its own queue (first in, first out, and
//! released in order of time over all VMs, so no VM waits behind another's overrun); who overruns for good gets OVER_BUDGET.

use crate::limits::{LOG_INTERVAL_NS, NS_PER_SECOND, RATE_BURST_NS, RATE_DELAY_NS_MAX};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmgmt_device::Tick;

/// A token bucket, kept as the time at which it would be full again (so it saves as one number and never needs refilling).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Bucket {
    full_at: Tick,
}

impl Bucket {
    /// When something of `cost` units may go at `rate` units per second, or `None` when that is further away than a delay may be. `u64::MAX`: no limit.
    /// Does not charge.
    #[must_use]
    pub fn release(self, now: Tick, cost: u64, rate: u64) -> Option<Tick> {
        if rate == u64::MAX {
            return Some(now);
        }
        if rate == 0 {
            return None;
        }
        // A cost larger than the whole bucket goes when the bucket is full, and then is paid off: else it could never go.
        let spent_ns = self.full_at.since_ns(now);
        let room_ns = RATE_BURST_NS.saturating_sub(cost_ns(cost, rate).min(RATE_BURST_NS));
        let delay_ns = spent_ns.saturating_sub(room_ns);
        (delay_ns <= RATE_DELAY_NS_MAX).then(|| now.after_ns(delay_ns))
    }

    /// Charges it.
    pub fn charge(&mut self, now: Tick, cost: u64, rate: u64) {
        if rate != u64::MAX {
            self.full_at = self.full_at.max(now).after_ns(cost_ns(cost, rate));
        }
    }
}

fn cost_ns(cost: u64, rate: u64) -> u64 {
    let ns = u128::from(cost) * u128::from(NS_PER_SECOND) / u128::from(rate.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// When each refusal of one VM was last logged, and how often it was not.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LogLimiter {
    last: BTreeMap<Refusal, (Tick, u64)>,
}

impl LogLimiter {
    /// Whether to log now; then how many were left out since the last line.
    pub fn allow(&mut self, now: Tick, refusal: Refusal) -> Option<u64> {
        match self.last.get_mut(&refusal) {
            Some((last, left_out)) if now.since_ns(*last) < LOG_INTERVAL_NS => {
                *left_out = left_out.saturating_add(1);
                None
            }
            Some(entry) => {
                let left_out = entry.1;
                *entry = (now, 0);
                Some(left_out)
            }
            None => {
                self.last.insert(refusal, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_then_waits_then_is_refused() {
        let mut bucket = Bucket::default();
        let now = Tick(5 * NS_PER_SECOND);
        let mut at_once = 0;
        let mut delayed = 0;
        loop {
            match bucket.release(now, 1, 10) {
                Some(at) if at == now => at_once += 1,
                Some(at) => {
                    assert!(at.since_ns(now) <= RATE_DELAY_NS_MAX);
                    delayed += 1;
                }
                None => break,
            }
            bucket.charge(now, 1, 10);
        }
        assert_eq!((at_once, delayed), (10, 10));
        // A second later there is room for ten more.
        assert!(bucket.release(now.after_ns(NS_PER_SECOND), 1, 10).is_some());
    }

    #[test]
    fn a_cost_above_the_bucket_goes_when_the_bucket_is_full() {
        let mut bucket = Bucket::default();
        assert_eq!(bucket.release(Tick(7), 1 << 30, 1000), Some(Tick(7)));
        bucket.charge(Tick(7), 1 << 30, 1000);
        assert_eq!(bucket.release(Tick(8), 1, 1000), None);
        assert_eq!(bucket.release(Tick(8), u64::MAX, u64::MAX), Some(Tick(8)));
        assert_eq!(Bucket::default().release(Tick(8), 1, 0), None);
    }

    #[test]
    fn a_log_line_comes_once_in_a_second_with_what_was_left_out() {
        let mut limiter = LogLimiter::default();
        assert_eq!(limiter.allow(Tick(0), Refusal::Field), Some(0));
        assert_eq!(limiter.allow(Tick(1), Refusal::Field), None);
        assert_eq!(limiter.allow(Tick(1), Refusal::Path), Some(0));
        assert_eq!(limiter.allow(Tick(LOG_INTERVAL_NS), Refusal::Field), Some(1));
    }
}
