//! A ring that the guest enabled: its set-up is validated, its memory proven, then it is open.
//!
//! In: the set-up as the front latched it, of which nothing is believed. Out: an open ring, or the status it is refused with.

use super::interface::Modes;
use super::limits::ENTRIES_MIN;
use super::ring::{Desk, Ring, Stage, Stop};
use crate::page::{RingSetup, Words};
use crate::{Direction, GuestMemory, MemoryError};
use vmgmt_abi::Status;
use vmgmt_abi::registers::ENTRIES_MAX;
use vmgmt_abi::ring::{COMPLETION_BYTES, RING_EVENTS_BYTES, SUBMISSION_BYTES, event_offset};

/// Why a ring is not open (yet).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NotOpen {
    Stop(Stop),
    Refused(Status),
}

/// What a failed access means before the ring is open: the guest named memory that is not there.
impl From<MemoryError> for NotOpen {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Pending => Self::Stop(Stop::Wait),
            MemoryError::Quiet => Self::Stop(Stop::Quiet),
            MemoryError::Unmapped { .. } | MemoryError::Denied { .. } => Self::Refused(Status::BAD_ADDRESS),
            MemoryError::Gone { .. } => Self::Refused(Status::INTEGRITY),
        }
    }
}

/// Opens `ring`; called again after a Stop.
pub(super) fn open<W: Words, M: GuestMemory>(
    desk: &mut Desk<W>,
    ring: &mut Ring,
    n: usize,
    memory: &mut M,
) -> Result<(), NotOpen> {
    let Stage::Opening { adopt } = ring.stage else {
        return Ok(());
    };
    let setup = ring.setup;
    let [submissions, completions, events] =
        validate(&setup, desk.settings.modes).map_err(NotOpen::Refused)?;
    for (iova, bytes, direction) in [
        (setup.submissions, submissions, Direction::FromGuest),
        (setup.completions, completions, Direction::FromGuest),
        (setup.completions, completions, Direction::IntoGuest),
        (setup.events, events, Direction::FromGuest),
        (setup.events, events, Direction::IntoGuest),
    ] {
        memory.check(iova, bytes, direction)?;
        if adopt && desk.is_remapped(memory, iova, bytes) {
            return Err(NotOpen::Refused(Status::BAD_ADDRESS));
        }
    }
    // A ring may span maps of which not all are proven: both ends of each area are asked about.
    let proven = memory.prove(ring.nonce_address(), setup.nonce)?;
    ring.shared = proven
        && [
            setup.submissions,
            setup.submissions + (submissions - 1),
            setup.completions,
            setup.completions + (completions - 1),
            setup.events,
            setup.events + (events - 1),
        ]
        .into_iter()
        .all(|iova| memory.is_shared(iova));
    if !adopt {
        memory.store_u32(ring.event_address(event_offset::SUBMISSION_HEAD), 0)?;
        memory.store_u32(ring.event_address(event_offset::SUBMISSION_EVENT), 0)?;
        desk.table.open_ring(n, setup.epoch);
    }
    ring.stage = Stage::Open;
    Ok(())
}

/// Bytes of submissions, completions and event words of a set-up that can be one.
fn validate(setup: &RingSetup, modes: Modes) -> Result<[u64; 3], Status> {
    match modes.judge(vmgmt_abi::Mode(setup.mode)) {
        Status::OK => {}
        status => return Err(status),
    }
    let entries_are_good =
        |entries: u32| entries.is_power_of_two() && (ENTRIES_MIN..=ENTRIES_MAX).contains(&entries);
    if !entries_are_good(setup.submission_entries) || !entries_are_good(setup.completion_entries) {
        return Err(Status::BAD_ARGUMENT);
    }
    let areas = [
        (
            setup.submissions,
            u64::from(setup.submission_entries) * SUBMISSION_BYTES as u64,
        ),
        (
            setup.completions,
            u64::from(setup.completion_entries) * COMPLETION_BYTES as u64,
        ),
        (setup.events, RING_EVENTS_BYTES as u64),
    ];
    for (base, bytes) in areas {
        if base % 64 != 0 || base.checked_add(bytes).is_none() {
            return Err(Status::BAD_ARGUMENT);
        }
    }
    Ok(areas.map(|(_, bytes)| bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_ups_are_validated() {
        let good = RingSetup {
            epoch: 2,
            enabled: true,
            submissions: 0x1000,
            completions: 0x2000,
            events: 0x3000,
            submission_entries: 2,
            completion_entries: 1024,
            mode: 0,
            vector: 99,
            nonce: 1,
        };
        let judge = |setup: RingSetup| validate(&setup, Modes::default()).err();
        assert_eq!(judge(good), None);
        let bad = Some(Status::BAD_ARGUMENT);
        assert_eq!(
            judge(RingSetup {
                submission_entries: 1,
                ..good
            }),
            bad
        );
        assert_eq!(
            judge(RingSetup {
                submission_entries: 0,
                ..good
            }),
            bad
        );
        assert_eq!(
            judge(RingSetup {
                completion_entries: 2048,
                ..good
            }),
            bad
        );
        assert_eq!(
            judge(RingSetup {
                completion_entries: 3,
                ..good
            }),
            bad
        );
        assert_eq!(
            judge(RingSetup {
                submissions: 0x1020,
                ..good
            }),
            bad
        );
        assert_eq!(
            judge(RingSetup {
                completions: u64::MAX - 63,
                ..good
            }),
            bad
        );
        assert_eq!(
            judge(RingSetup {
                events: u64::MAX - 63,
                ..good
            }),
            bad
        );
        assert_eq!(judge(RingSetup { mode: 5, ..good }), bad);
        assert_eq!(judge(RingSetup { mode: 3, ..good }), Some(Status::NOT_SUPPORTED));
        assert_eq!(judge(RingSetup { mode: 4, ..good }), Some(Status::NOT_SUPPORTED));
    }
}
