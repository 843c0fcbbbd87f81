//! Time as the rooms see it: nanoseconds of the host's CLOCK_BOOTTIME, handed in by the shell. Survives a handoff.

use serde::{Deserialize, Serialize};

/// A point in time, in nanoseconds since the host's boot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash, Serialize, Deserialize)]
pub struct Tick(pub u64);

impl Tick {
    /// A time that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// This time and `nanoseconds` more; saturates at [`Tick::NEVER`].
    #[must_use]
    pub const fn after_ns(self, nanoseconds: u64) -> Self {
        Self(self.0.saturating_add(nanoseconds))
    }

    /// Nanoseconds from `earlier` to this; 0 when it is not earlier.
    #[must_use]
    pub const fn since_ns(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
