//! GARDEN, the trace: what was done, in a hash of all and the words of the last.

use crate::limits::ACTIONS_KEPT;
use std::collections::VecDeque;
use vmgmt_device::Tick;

/// The trace of one run.
#[derive(Debug)]
pub struct Trace {
    hash: u64,
    last: VecDeque<String>,
    /// Everything goes to standard error at once.
    pub aloud: bool,
}

impl Default for Trace {
    fn default() -> Self {
        Self {
            hash: 0xcbf2_9ce4_8422_2325,
            last: VecDeque::new(),
            aloud: false,
        }
    }
}

impl Trace {
    /// Something was done.
    pub fn add(&mut self, now: Tick, text: String) {
        for byte in now.0.to_le_bytes().iter().chain(text.as_bytes()) {
            // FNV-1a: the same on every machine and version.
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
        let line = format!("{:>12} ns  {text}", now.0);
        if self.aloud {
            eprintln!("{line}");
        }
        if self.last.len() == ACTIONS_KEPT {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }
    /// Of all that was done.
    #[must_use]
    pub const fn hash(&self) -> u64 {
        self.hash
    }
    /// The last actions.
    #[must_use]
    pub fn last(&self) -> Vec<String> {
        self.last.iter().cloned().collect()
    }
}
