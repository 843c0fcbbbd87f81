//! Fences, leases, and memory that is taken away under a transfer.

use super::fixture::{BOTH, PAGE, Session, object, peek, poke};
use crate::core::memory::limits::LEASE_WAIT_NS;
use crate::core::memory::{BulkError, Pieces};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmgmt_device::page::{RingSetup, control};
use vmgmt_device::{Direction, GuestMemory, MemoryError};

fn into_guest(session: &mut Session, iova: u64, bytes: u64) -> Pieces {
    session
        .turn(|memory| memory.resolve(&[(iova, bytes)], Direction::IntoGuest))
        .unwrap()
}

#[test]
fn an_idle_session_passes_a_fence_at_once_and_busy_is_only_set_in_between() {
    let (mut session, _fd) = Session::with_ram(16 * PAGE, true);
    assert!(!session.memory.core().busy());
    session.memory.begin_dma(session.now);
    assert!(session.memory.core().busy());
    let fence = session.unmap(0);
    assert_eq!(session.memory.core().fenced(), fence - 1);
    // Within the turn the map that was there may be used: the front sees `busy` and waits.
    assert_eq!(session.memory.load_u32(0), Ok(0));
    session.memory.end_dma(session.now);
    assert_eq!(
        (session.memory.core().fenced(), session.memory.core().busy()),
        (fence, false)
    );
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Unmapped { iova: 0 })
    );
    assert!(!session.memory.poll_fences(session.now), "nothing moved");
    assert_eq!(session.memory.poll_timeout(), None);
}

#[test]
fn a_fence_waits_for_the_leases_that_it_concerns_and_for_no_others() {
    let mut session = Session::new();
    let fd = object("ram", 64 * PAGE, true);
    session.lend(1, &fd);
    session.map(0, 0, 16 * PAGE, 1, 0, BOTH);
    session.map(1, 0x100_0000, 16 * PAGE, 1, 16 * PAGE, BOTH);
    session.prove(&fd, 0, 0);
    let stays = into_guest(&mut session, 0, PAGE);
    let fence = session.unmap(1);
    assert!(session.memory.poll_fences(session.now));
    assert_eq!(session.memory.core().fenced(), fence, "an unrelated lease");
    assert!(session.memory.core().busy(), "a lease is DMA under way");
    session.map(1, 0x100_0000, 16 * PAGE, 1, 16 * PAGE, BOTH);
    let concerned = into_guest(&mut session, 0x100_0000, PAGE);
    let clone = concerned.clone();
    let fence = session.unmap(1);
    assert!(!session.memory.poll_fences(session.now));
    assert!(session.memory.is_fence_waiting());
    assert_eq!(
        (concerned.is_revoked(), stays.is_revoked()),
        (true, false),
        "asked to stop"
    );
    assert_eq!(concerned.write_bytes(0, &[1]), Err(BulkError::Revoked));
    assert_eq!(stays.write_bytes(0, &[1]), Ok(()));
    drop(concerned);
    assert!(
        !session.memory.poll_fences(session.now),
        "a clone is the same lease"
    );
    drop(clone);
    assert!(session.memory.poll_fences(session.now));
    assert_eq!(session.memory.core().fenced(), fence);
    drop(stays);
    session.memory.poll_fences(session.now);
    assert!(!session.memory.core().busy());
    assert_eq!(session.memory.counters().revoked, 0);
}

#[test]
fn a_reset_a_ring_and_the_end_of_bus_mastering_concern_all_leases() {
    let (mut session, _fd) = Session::with_ram(16 * PAGE, true);
    let causes: [fn(&Session); 4] = [
        |session| session.front.set_generation(session.front.generation() + 1),
        |session| {
            session.front.set_ring(3, &RingSetup::default());
        },
        |session| session.front.set_control(control::BUS_MASTER | control::FROZEN),
        |session| session.front.set_control(0),
    ];
    for (n, cause) in causes.iter().enumerate() {
        session.front.set_control(control::BUS_MASTER);
        session.front.move_fence();
        let lease = into_guest(&mut session, 0, PAGE);
        session.memory.poll_fences(session.now);
        assert!(!lease.is_revoked(), "{n}");
        cause(&session);
        let fence = session.front.move_fence();
        session.memory.poll_fences(session.now);
        assert!(lease.is_revoked(), "{n}");
        assert!(session.memory.core().fenced() < fence, "{n}");
        drop(lease);
        assert!(session.memory.poll_fences(session.now), "{n}");
        assert_eq!(session.memory.core().fenced(), fence, "{n}");
    }
}

/// Ends the endless transfer, also when the test fails.
struct StopWhenLeft<'a>(&'a AtomicBool);

impl Drop for StopWhenLeft<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn after_the_deadline_the_memory_is_taken_from_a_transfer_that_does_not_end() {
    let (mut session, fd) = Session::with_ram(64 * PAGE, true);
    let lease = into_guest(&mut session, 16 * PAGE, 16 * PAGE);
    let (stop, rounds) = (&AtomicBool::new(false), &AtomicU64::new(0));
    std::thread::scope(|scope| {
        // A copy that never looks whether it should stop: as a read from a dead disk, deep in the kernel.
        let (extent, offset) = lease.lease().parts[0].place.clone().unwrap();
        scope.spawn(move || {
            let _held = lease;
            while !stop.load(Ordering::Relaxed) {
                extent.mapping.write(offset, &[0xee; 16 * PAGE as usize]).unwrap();
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _stop = StopWhenLeft(stop);
        let until_rounds = |more: u64| {
            let goal = rounds.load(Ordering::Relaxed) + more;
            while rounds.load(Ordering::Relaxed) < goal {
                std::thread::yield_now();
            }
        };
        until_rounds(3);
        assert_eq!(
            peek(&fd, 16 * PAGE, 1),
            [0xee],
            "it does write into the VM's memory"
        );

        let fence = session.unmap(0);
        assert!(!session.memory.poll_fences(session.now));
        let until = session.memory.poll_timeout().unwrap();
        assert_eq!(until, session.now.after_ns(LEASE_WAIT_NS));
        // A second unmap meanwhile does not begin the time anew.
        session.map(1, 0x100_0000, PAGE, 1, 0, BOTH);
        let fence = session.unmap(1).max(fence);
        session.now = session.now.after_ns(LEASE_WAIT_NS - 1);
        assert!(!session.memory.handle_timeout(session.now));
        assert_eq!(session.memory.poll_timeout(), Some(until));
        session.now = until;
        assert!(session.memory.handle_timeout(session.now));
        assert_eq!(session.memory.core().fenced(), fence);
        assert_eq!(session.memory.counters().revoked, 1);

        // A transfer without memory holds nothing up any more.
        assert!(!session.memory.core().busy());
        session.map(1, 0x100_0000, PAGE, 1, 0, BOTH);
        let fence = session.unmap(1);
        assert!(session.memory.poll_fences(session.now));
        assert_eq!(session.memory.core().fenced(), fence);

        // The guest has its pages back, and others get memory: neither sees the transfer any more, which still runs.
        poke(&fd, 16 * PAGE, &[0; 16 * PAGE as usize]);
        session.map(0, 0, 64 * PAGE, 1, 0, BOTH);
        let (mut other, other_fd) = Session::with_ram(64 * PAGE, true);
        other
            .turn(|memory| memory.write(0, &[0x11; 64 * PAGE as usize]))
            .unwrap();
        session.turn(|memory| memory.store_u32(16 * PAGE, 5)).unwrap();
        until_rounds(100);
        assert_eq!(peek(&fd, 16 * PAGE, 8), [5, 0, 0, 0, 0, 0, 0, 0]);
        assert!(
            peek(&fd, 17 * PAGE, 15 * PAGE as usize)
                .iter()
                .all(|byte| *byte == 0)
        );
        assert!(
            peek(&other_fd, 0, 64 * PAGE as usize)
                .iter()
                .all(|byte| *byte == 0x11)
        );
        assert_eq!(
            session.memory.leases(),
            1,
            "its address space stays until it lets go"
        );
        assert_eq!(
            session.memory.counters().mapped_bytes,
            128 * PAGE,
            "and is charged"
        );
    });
    assert_eq!(session.memory.leases(), 0);
    assert_eq!(session.memory.counters().mapped_bytes, 64 * PAGE);
}

#[test]
fn another_map_of_the_same_memory_goes_on_in_a_fresh_mapping() {
    let mut session = Session::new();
    let fd = object("ram", 64 * PAGE, true);
    session.lend(1, &fd);
    session.map(0, 0, 64 * PAGE, 1, 0, BOTH);
    session.map(1, 0x100_0000, 64 * PAGE, 1, 0, BOTH);
    session.prove(&fd, 0, 0);
    let stuck = into_guest(&mut session, 8 * PAGE, 8 * PAGE);
    let same_pages = into_guest(&mut session, 0x100_0000 + 10 * PAGE, PAGE);
    let other_pages = into_guest(&mut session, 0x100_0000 + 32 * PAGE, PAGE);
    session.unmap(0);
    session.memory.poll_fences(session.now);
    assert!(!same_pages.is_revoked());
    session.now = session.now.after_ns(LEASE_WAIT_NS);
    assert!(session.memory.handle_timeout(session.now));
    assert_eq!((same_pages.is_revoked(), other_pages.is_revoked()), (true, false));
    other_pages.write_bytes(0, b"goes on").unwrap();
    assert_eq!(peek(&fd, 32 * PAGE, 7), b"goes on");
    let again = into_guest(&mut session, 0x100_0000 + 10 * PAGE, PAGE);
    again.write_bytes(0, b"repeated").unwrap();
    session
        .turn(|memory| memory.write(0x100_0000 + 11 * PAGE, b"and small ones"))
        .unwrap();
    assert_eq!(
        (peek(&fd, 10 * PAGE, 8), peek(&fd, 11 * PAGE, 14)),
        (b"repeated".to_vec(), b"and small ones".to_vec())
    );
    drop(stuck);
}

#[test]
fn an_object_that_goes_stays_mapped_while_it_is_held() {
    let (mut session, _fd) = Session::with_ram(16 * PAGE, true);
    let lease = into_guest(&mut session, 0, PAGE);
    session.front.set_map(0, None);
    session.memory.object_gone(1);
    assert_eq!(lease.write_bytes(0, &[1]), Ok(()), "not fenced yet");
    assert_eq!(session.memory.counters().mapped_bytes, 16 * PAGE);
    session.front.move_fence();
    session.memory.poll_fences(session.now);
    assert_eq!(lease.write_bytes(0, &[1]), Err(BulkError::Revoked));
    drop(lease);
    assert!(session.memory.poll_fences(session.now));
    assert_eq!(session.memory.counters().mapped_bytes, 0);
}
