//! HOST: room for descriptors, made while a process has one thread.
//!
//! In: nothing. Out: a table of descriptors that need not grow. Must never know what the descriptors are.
//!
//! The kernel makes a process's table longer by copying it, and where the process has several threads it waits first until no processor looks
//! at the old one any more: 8 to 14 ms, measured, each time that the number of descriptors passes 64, 256, 512, … In a core that takes sessions over all of
//! them would wait for that, in a front all VMs.

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};

/// Descriptors for which there is room: those of 1,500 sessions in the front, which has about ten for each, and more than that in the core. It
/// takes 8 bytes of the kernel's memory for each; whoever needs more waits as described.
const DESCRIPTORS: u64 = 16_384;

/// Makes it. Call it before the process has another thread.
pub fn make() {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS);
    let Ok(last) = i32::try_from(limit.min(DESCRIPTORS).saturating_sub(1)) else {
        return;
    };
    // Whoever has that descriptor has a table up to there, and it keeps its length. Without it everything works as well, but later.
    drop(fcntl_dupfd_cloexec(std::io::stdin(), last));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The length of this process's table, as the kernel tells it.
    fn length() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        line.unwrap().trim().parse().unwrap()
    }

    #[test]
    fn the_table_is_as_long_as_is_promised_or_allowed() {
        make();
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS);
        assert!(length() >= limit.min(DESCRIPTORS), "{} descriptors", length());
    }
}
