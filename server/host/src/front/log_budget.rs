//! A rate for log lines: a guest's mistakes must not fill the host's disk.
//!
//! In: the time. Out: whether a line may be written, and how many were not. Must never know: what it says.

use super::limits::{LOG_LINE_NS, LOG_LINES_MAX};
use vmgmt_device::Tick;

/// Lines that may be written now, and when that was counted.
#[derive(Debug)]
pub struct LogBudget {
    pub(super) lines: u32,
    pub(super) counted: Tick,
    pub(super) suppressed: u64,
}

impl LogBudget {
    pub const fn new(now: Tick) -> Self {
        Self {
            lines: LOG_LINES_MAX,
            counted: now,
            suppressed: 0,
        }
    }

    /// `Some`: write the line, and say that so many were left out before it.
    pub fn take(&mut self, now: Tick) -> Option<u64> {
        let earned = now.since_ns(self.counted) / LOG_LINE_NS;
        if earned > 0 {
            self.lines = u32::try_from(earned)
                .unwrap_or(u32::MAX)
                .saturating_add(self.lines)
                .min(LOG_LINES_MAX);
            self.counted = now;
        }
        if self.lines == 0 {
            self.suppressed += 1;
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_earned_by_time_and_what_is_left_out_is_counted() {
        let mut budget = LogBudget::new(Tick(0));
        let written = (0..100).filter(|_| budget.take(Tick(1)).is_some()).count();
        assert_eq!(written, LOG_LINES_MAX as usize);
        assert_eq!(
            budget.take(Tick(LOG_LINE_NS)),
            Some(100 - u64::from(LOG_LINES_MAX))
        );
        assert_eq!(budget.take(Tick(LOG_LINE_NS)), None);
    }
}
