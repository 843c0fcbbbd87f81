//! Message DMA: pending and retried, in order, bounded, and what becomes of it at fences, failures and silence.

use super::fixture::{BOTH, PAGE, Ram, Session};
use crate::core::memory::limits::{MESSAGE_WAIT_NS, QUEUED_BYTES_MAX, READ_IDLE_NS};
use crate::core::memory::{DmaRequest, SessionMemory};
use crate::messages::{CoreToFront, MESSAGE_DMA_BYTES_MAX, MESSAGE_DMA_OUTSTANDING_MAX};
use vmgmt_device::page::control;
use vmgmt_device::{Direction, GuestMemory, MemoryError};

const RAM: u64 = 1 << 20;
/// Where shared memory begins in [`mixed`].
const SHARED: u64 = 0x1000_0000;

fn unshared() -> (Session, Ram) {
    let mut session = Session::new();
    session.map(0, 0, RAM, 0, 0, BOTH);
    (session, Ram::Private((0..RAM).map(|n| (n / 3) as u8).collect()))
}

/// (number, address, bytes, whether it is a write)
fn shape(request: &DmaRequest) -> (u64, u64, usize, bool) {
    match request.message {
        CoreToFront::DmaRead {
            request, iova, bytes, ..
        } => (request, iova, bytes as usize, false),
        CoreToFront::DmaWrite {
            request: number,
            iova,
            ..
        } => (number, iova, request.payload.len(), true),
        CoreToFront::Freeze { .. } => panic!("memory asks for no freeze"),
    }
}

fn answer(session: &mut Session, request: &DmaRequest, error: u32, data: &[u8]) {
    session
        .memory
        .handle_dma_answer(session.now, shape(request).0, error, data.to_vec());
}

#[test]
fn a_long_read_goes_in_bounded_pieces_a_few_at_a_time() {
    let (mut session, mut ram) = unshared();
    let mut read = vec![0; 500_000];
    assert_eq!(
        session.turn(|memory| memory.read(0x101, &mut read)),
        Err(MemoryError::Pending)
    );
    let first = session.requests();
    assert_eq!(first.len(), MESSAGE_DMA_OUTSTANDING_MAX);
    assert_eq!(
        shape(&first[1]),
        (
            2,
            0x101 + u64::from(MESSAGE_DMA_BYTES_MAX),
            MESSAGE_DMA_BYTES_MAX as usize,
            false
        )
    );
    assert!(session.memory.core().busy(), "messages are DMA under way");
    assert_eq!(
        session.turn(|memory| memory.read(0x101, &mut read)),
        Err(MemoryError::Pending)
    );
    assert!(
        session.requests().is_empty(),
        "asked for once, and no more than that outstanding"
    );
    first.iter().for_each(|request| session.serve(request, &mut ram));
    let (done, _) = session.until_done(&mut ram, |memory| memory.read(0x101, &mut read));
    assert_eq!(done, Ok(()));
    assert!(read == ram.read(0x101, 500_000));
    assert!(session.requests().is_empty());
    session.memory.poll_fences(session.now);
    assert!(!session.memory.core().busy());
}

#[test]
fn each_load_is_asked_for_anew_once_it_was_answered() {
    let (mut session, mut ram) = unshared();
    for value in [5u32, 6, 7] {
        ram.write(64, &value.to_le_bytes());
        assert_eq!(
            session.until_done(&mut ram, |memory| memory.load_u32(64)),
            (Ok(value), 2)
        );
    }
}

#[test]
fn writes_are_seen_in_order_and_a_publishing_word_only_after_what_it_publishes() {
    let (mut session, mut ram) = unshared();
    session
        .turn(|memory| {
            memory.write(0x1000, &[1; 100_000])?;
            memory.store_u64(0x20, 0xfeed)?;
            memory.write(0x8_0000, b"next")?;
            memory.store_u32(0x28, 1)?;
            assert_eq!(memory.load_u32(0x30), Err(MemoryError::Pending));
            assert_eq!(memory.settled(), Err(MemoryError::Pending));
            Ok(())
        })
        .unwrap();
    let payload = session.requests();
    assert_eq!(
        payload.iter().map(|request| shape(request).1).collect::<Vec<_>>(),
        [0x1000, 0x1000 + 60 * 1024]
    );
    session.serve(&payload[0], &mut ram);
    assert!(
        session.requests().is_empty(),
        "the word waits for all of its payload"
    );
    session.serve(&payload[1], &mut ram);
    let mut rest = Vec::new();
    loop {
        let requests = session.requests();
        if requests.is_empty() {
            break;
        }
        rest.extend(
            requests
                .iter()
                .map(|request| (shape(request).1, shape(request).3)),
        );
        requests
            .iter()
            .for_each(|request| session.serve(request, &mut ram));
    }
    assert_eq!(
        rest,
        [(0x20, true), (0x8_0000, true), (0x28, true), (0x30, false)]
    );
    assert_eq!(session.turn(SessionMemory::settled), Ok(()));
    assert_eq!(
        (ram.read(0x20, 2), ram.read(0x8_0000, 4)),
        (vec![0xed, 0xfe], b"next".to_vec())
    );
}

#[test]
fn a_failed_write_is_told_once_and_nothing_after_it_is_seen() {
    let (mut session, mut ram) = unshared();
    session
        .turn(|memory| {
            memory.write(0x1000, b"payload")?;
            memory.store_u64(0x20, 0xfeed)
        })
        .unwrap();
    let payload = session.requests();
    answer(&mut session, &payload[0], 14, &[]);
    assert!(session.requests().is_empty());
    session
        .turn(|memory| memory.write(0x30, b"dropped, too"))
        .unwrap();
    assert_eq!(
        session.turn(SessionMemory::settled),
        Err(MemoryError::Gone { iova: 0x1000 })
    );
    assert_eq!(session.turn(SessionMemory::settled), Ok(()));
    session.turn(|memory| memory.write(0x40, b"new")).unwrap();
    let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
    assert_eq!((settled, ram.read(0x40, 3)), (Ok(()), b"new".to_vec()));
    assert_ne!(ram.read(0x20, 2), [0xed, 0xfe]);
}

#[test]
fn a_refused_buffer_is_the_matter_of_who_asks_for_it() {
    let (mut session, mut ram) = unshared();
    session
        .turn(|memory| {
            memory.write_buffer(0x1000, b"refused")?;
            memory.write_buffer(0x2000, b"taken")?;
            memory.store_u64(0x20, 0xfeed)
        })
        .unwrap();
    let buffers = session.requests();
    answer(&mut session, &buffers[0], 14, &[]);
    session.serve(&buffers[1], &mut ram);
    let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
    assert_eq!(settled, Ok(()));
    assert_eq!(
        (ram.read(0x2000, 5), ram.read(0x20, 2)),
        (b"taken".to_vec(), vec![0xed, 0xfe])
    );
    assert!(!session.memory.take_refused(0x2000, 5));
    assert!(session.memory.take_refused(0x1004, 1));
    assert!(!session.memory.take_refused(0x1000, 7), "told once");
    // What nobody asked about does not fail the next one there.
    session
        .turn(|memory| memory.write_buffer(0x1000, b"again"))
        .unwrap();
    let again = session.requests();
    answer(&mut session, &again[0], 14, &[]);
    session
        .turn(|memory| memory.write_buffer(0x1000, b"third"))
        .unwrap();
    let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
    assert_eq!((settled, session.memory.take_refused(0x1000, 5)), (Ok(()), false));
    assert_eq!(ram.read(0x1000, 5), b"third");
    // Bulk goes into a buffer as well.
    let target = session
        .turn(|memory| memory.resolve(&[(0x1000, 5)], Direction::IntoGuest))
        .unwrap();
    session
        .turn(|memory| memory.write_pieces(&target, 0, b"moved"))
        .unwrap();
    let moved = session.requests();
    answer(&mut session, &moved[0], 14, &[]);
    assert_eq!(session.turn(SessionMemory::settled), Ok(()));
    assert!(session.memory.take_refused(0x1000, 5));
}

#[test]
fn a_failed_read_is_told_and_leaves_nothing_old_behind() {
    let (mut session, mut ram) = unshared();
    let mut read = vec![0; 100_000];
    assert_eq!(
        session.turn(|memory| memory.read(0, &mut read)),
        Err(MemoryError::Pending)
    );
    let requests = session.requests();
    session.serve(&requests[0], &mut ram);
    answer(&mut session, &requests[1], 14, &[]);
    let gone = Err(MemoryError::Gone { iova: 60 * 1024 });
    assert_eq!(session.turn(|memory| memory.read(0, &mut read)), gone);
    ram.write(0, b"changed meanwhile");
    let (done, _) = session.until_done(&mut ram, |memory| memory.read(0, &mut read));
    assert_eq!((done, &read[..17]), (Ok(()), &b"changed meanwhile"[..]));
    // An answer that is too short is none.
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending)
    );
    let requests = session.requests();
    answer(&mut session, &requests[0], 0, &[1, 2, 3]);
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Gone { iova: 0 })
    );
}

#[test]
fn a_reader_who_gave_up_leaves_no_old_answer_to_the_next() {
    let (mut session, mut ram) = unshared();
    ram.write(0, &1u32.to_le_bytes());
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending)
    );
    let old = session.requests();
    session.memory.forget_reads();
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending)
    );
    session.serve(&old[0], &mut ram);
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending),
        "that was the old one's"
    );
    ram.write(0, &2u32.to_le_bytes());
    assert_eq!(session.until_done(&mut ram, |memory| memory.load_u32(0)).0, Ok(2));
    // Without a word from anybody it is forgotten after a while.
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending)
    );
    let old = session.requests();
    session.serve(&old[0], &mut ram);
    session.now = session.now.after_ns(READ_IDLE_NS);
    ram.write(0, &3u32.to_le_bytes());
    assert_eq!(session.until_done(&mut ram, |memory| memory.load_u32(0)).0, Ok(3));
}

#[test]
fn who_waits_for_a_read_finds_its_answer_however_late_it_comes() {
    let (mut session, mut ram) = unshared();
    ram.write(0, &1u32.to_le_bytes());
    let pending = Err(MemoryError::Pending);
    assert_eq!(session.turn(|memory| memory.load_u32(0)), pending);
    let asked = session.requests();
    // Others of the session go on meanwhile, and whoever waits does not ask again.
    session.now = session.now.after_ns(3 * READ_IDLE_NS);
    session.turn(|_| Ok(())).unwrap();
    session.now = session.now.after_ns(3 * READ_IDLE_NS);
    session.serve(&asked[0], &mut ram);
    assert_eq!(session.turn(|memory| memory.load_u32(0)), Ok(1));
    // Also that there is none.
    assert_eq!(session.turn(|memory| memory.load_u32(0)), pending);
    session.requests();
    session.now = session.now.after_ns(MESSAGE_WAIT_NS);
    session.memory.handle_timeout(session.now);
    let gone = Err(MemoryError::Gone { iova: 0 });
    assert_eq!(session.turn(|memory| memory.load_u32(0)), gone);
}

#[test]
fn silence_is_an_error_in_the_end_and_a_late_answer_finds_nobody() {
    let (mut session, _ram) = unshared();
    session.turn(|memory| memory.write(0x1000, b"lost")).unwrap();
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending)
    );
    let requests = session.requests();
    assert_eq!(requests.len(), 2);
    let until = session.memory.poll_timeout().unwrap();
    assert_eq!(until, session.now.after_ns(MESSAGE_WAIT_NS));
    session.now = until;
    session.memory.handle_timeout(until);
    assert_eq!(
        session.turn(SessionMemory::settled),
        Err(MemoryError::Gone { iova: 0x1000 })
    );
    answer(&mut session, &requests[1], 0, &[0; 4]);
    assert_eq!(session.memory.counters().late_answers, 1);
    assert_eq!(session.memory.poll_timeout(), None);
}

#[test]
fn what_the_front_drops_at_a_fence_is_asked_again_in_order() {
    let (mut session, mut ram) = unshared();
    session
        .turn(|memory| {
            memory.write(0x1000, b"one")?;
            memory.write(0x1001, b"two")?;
            memory.write(0x1002, b"three")
        })
        .unwrap();
    let requests = session.requests();
    session.front.move_fence();
    session.memory.poll_fences(session.now);
    session.serve(&requests[0], &mut ram);
    answer(&mut session, &requests[1], 11, &[]);
    answer(&mut session, &requests[2], 11, &[]);
    let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
    assert_eq!((settled, ram.read(0x1000, 7)), (Ok(()), b"otthree".to_vec()));
}

#[test]
fn what_was_given_out_behind_a_fence_is_not_asked_again_when_the_front_says_what_it_dropped_there() {
    let (mut session, mut ram) = unshared();
    session.turn(|memory| memory.write(0x1000, b"dropped")).unwrap();
    let before = session.requests();
    session.front.move_fence();
    session.memory.poll_fences(session.now);
    session.turn(|memory| memory.write(0x2000, b"goes")).unwrap();
    let behind = session.requests();
    answer(&mut session, &before[0], libc::EAGAIN as u32, &[]);
    let again: Vec<_> = session.requests();
    let places: Vec<u64> = again.iter().map(|request| shape(request).1).collect();
    assert_eq!(places, [0x1000], "the other is with the client");
    again
        .iter()
        .chain(&behind)
        .for_each(|request| session.serve(request, &mut ram));
    assert_eq!(session.turn(SessionMemory::settled), Ok(()));
    assert_eq!(
        (ram.read(0x1000, 7), ram.read(0x2000, 4)),
        (b"dropped".to_vec(), b"goes".to_vec())
    );
}

#[test]
fn at_a_reset_all_is_void_and_after_an_unmap_what_lay_there() {
    let (mut session, mut ram) = unshared();
    session.map(1, 0x100_0000, PAGE, 0, 0, BOTH);
    session
        .turn(|memory| {
            memory.write(0x1000, b"stays")?;
            memory.write(0x100_0000, b"goes")?;
            memory.write(0x2000, b"after it")
        })
        .unwrap();
    session.unmap(1);
    assert!(
        session.requests().is_empty(),
        "a fence was moved: nothing goes out before it was looked at"
    );
    session.memory.poll_fences(session.now);
    let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
    assert_eq!(settled, Err(MemoryError::Gone { iova: 0x100_0000 }));
    assert_eq!(ram.read(0x1000, 5), b"stays");
    assert_ne!(ram.read(0x2000, 5), b"after");

    session.turn(|memory| memory.write(0x3000, b"never")).unwrap();
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending)
    );
    session.front.set_generation(1);
    session.front.move_fence();
    assert!(session.memory.poll_fences(session.now));
    assert!(session.requests().is_empty() && !session.memory.core().busy());
    assert_eq!(session.turn(SessionMemory::settled), Ok(()));
}

#[test]
fn the_operator_is_told_once_that_memory_comes_without_descriptors() {
    let (mut session, mut ram) = unshared();
    for _ in 0..2 {
        ram.write(0x80, &7u64.to_le_bytes());
        let (proof, _) = session.until_done(&mut ram, |memory| memory.prove(0x80, 7));
        assert_eq!(proof, Ok(false));
    }
    let notice = session.memory.poll_notice().unwrap().0;
    assert!(
        notice.contains("without descriptors") && notice.contains("share=on"),
        "{notice}"
    );
    assert!(session.memory.poll_notice().is_none());
}

#[test]
fn frozen_or_without_bus_mastering_means_held_back() {
    for held_back in [control::BUS_MASTER | control::FROZEN, 0] {
        let (mut session, mut ram) = unshared();
        session.turn(|memory| memory.write(0x1000, b"later")).unwrap();
        session.front.set_control(held_back);
        session.front.move_fence();
        assert!(session.memory.poll_fences(session.now));
        assert!(session.requests().is_empty());
        session.front.set_control(control::BUS_MASTER);
        session.front.move_fence();
        let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
        assert_eq!((settled, ram.read(0x1000, 5)), (Ok(()), b"later".to_vec()));
    }
}

#[test]
fn what_is_dropped_goes_neither_now_nor_after_a_fence() {
    let (mut session, mut ram) = unshared();
    session
        .turn(|memory| memory.write(0x1000, b"out, not wanted"))
        .unwrap();
    session.turn(|memory| memory.write(0x3000, b"out")).unwrap();
    let requests = session.requests();
    assert_eq!(requests.len(), 2);
    session
        .turn(|memory| {
            memory.write(0x1100, b"waits, not wanted")?;
            memory.write(0x2000, b"waits")?;
            memory.drop_writes(0x1000, 0x1000);
            Ok::<_, MemoryError>(())
        })
        .unwrap();
    answer(&mut session, &requests[0], 11, &[]);
    let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
    assert_eq!(settled, Ok(()));
    assert_eq!(
        (ram.read(0x3000, 3), ram.read(0x2000, 5)),
        (b"out".to_vec(), b"waits".to_vec())
    );
    assert_ne!(ram.read(0x1000, 3), b"out");
    assert_ne!(ram.read(0x1100, 5), b"waits");
    assert_eq!(session.memory.write_room(), QUEUED_BYTES_MAX);
}

#[test]
fn the_queue_is_bounded() {
    let (mut session, _ram) = unshared();
    let chunk = vec![0; RAM as usize];
    let refused = session.turn(|memory| {
        for _ in 0..QUEUED_BYTES_MAX / chunk.len() {
            memory.write(0, &chunk)?;
        }
        assert_eq!(memory.write_room(), 0);
        memory.write(7, b"x")
    });
    assert_eq!(refused, Err(MemoryError::Gone { iova: 7 }));
}

#[test]
fn stores_to_shared_memory_wait_behind_writes_by_message() {
    let (mut session, fd) = Session::with_ram(RAM, true);
    session.unmap(0);
    session.map(0, SHARED, RAM, 1, 0, BOTH);
    session.map(1, 0, RAM, 0, 0, BOTH);
    let mut ram = Ram::Private(vec![0; RAM as usize]);
    session
        .turn(|memory| {
            memory.store_u32(SHARED, 1)?;
            memory.write(0x1000, b"payload by message")?;
            memory.store_u64(SHARED + 8, 2)?;
            memory.store_u32(SHARED + 16, 3)
        })
        .unwrap();
    let seen = |offset| super::fixture::peek(&fd, offset, 1)[0];
    assert_eq!((seen(0), seen(8), seen(16)), (1, 0, 0));
    assert!(!session.memory.wants_turn(), "the answers wake it");
    let requests = session.requests();
    requests
        .iter()
        .for_each(|request| session.serve(request, &mut ram));
    assert_eq!(seen(8), 0, "no store outside a turn");
    assert_eq!(session.turn(SessionMemory::settled), Ok(()));
    assert_eq!((seen(8), seen(16)), (2, 3));
    assert!(session.memory.wants_turn() && !session.memory.wants_turn());
}

#[test]
fn a_store_behind_a_read_that_nobody_wants_any_more_has_its_turn() {
    let (mut session, fd) = Session::with_ram(RAM, true);
    session.unmap(0);
    session.map(0, SHARED, RAM, 1, 0, BOTH);
    session.map(1, 0, RAM, 0, 0, BOTH);
    let mut ram = Ram::Private(vec![0; RAM as usize]);
    // The read goes out, is dropped at a fence and waits to be asked for again; the store waits behind it.
    session.turn(|memory| memory.write(0x1000, b"message")).unwrap();
    let wait = |memory: &mut SessionMemory| {
        let asked = memory.read(0x2000, &mut [0; 15]);
        assert_eq!(asked, Err(MemoryError::Pending));
        memory.store_u64(SHARED + 8, 2)
    };
    session.turn(wait).unwrap();
    let requests = session.requests();
    assert_eq!(requests.len(), 2);
    session.serve(&requests[0], &mut ram);
    answer(&mut session, &requests[1], libc::EAGAIN as u32, &[]);
    assert!(!session.memory.wants_turn(), "the read goes first");
    let forget = |memory: &mut SessionMemory| {
        memory.forget_reads();
        Ok(())
    };
    session.turn(forget).unwrap();
    assert!(session.requests().is_empty());
    assert!(session.memory.wants_turn(), "no answer comes that would wake");
    session.turn(forget).unwrap();
    assert_eq!(super::fixture::peek(&fd, 8, 1)[0], 2);
    assert!(session.memory.wants_turn(), "it was done late");
    assert!(!session.memory.wants_turn());
}

#[test]
fn of_what_a_reset_makes_void_an_answer_still_says_whether_it_is_there() {
    let (mut session, mut ram) = unshared();
    session
        .turn(|memory| {
            memory.write(0x1000, b"done")?;
            memory.write(0x1100, b"dropped")?;
            memory.write(0x1200, b"refused")?;
            memory.store_u64(0x1300, 1)
        })
        .unwrap();
    let arrived = |session: &mut Session, iova| session.turn(|memory| memory.arrived(iova, 8));
    let requests = session.requests();
    assert_eq!(requests.len(), 3, "the word waits for what it publishes");
    session.front.set_generation(1);
    session.front.move_fence();
    session.memory.poll_fences(session.now);
    assert!(!session.memory.core().busy(), "nobody waits for these answers");
    assert_eq!(arrived(&mut session, 0x1000), Err(MemoryError::Pending));
    assert_eq!(arrived(&mut session, 0x1300), Ok(false));
    session.serve(&requests[0], &mut ram);
    answer(&mut session, &requests[1], 11, &[]);
    answer(&mut session, &requests[2], 14, &[]);
    let places = [0x1000, 0x1100, 0x1200].map(|iova| arrived(&mut session, iova));
    assert_eq!(places, [Ok(true), Ok(false), Ok(false)]);
    assert_eq!(
        (
            session.memory.counters().late_answers,
            session.memory.poll_timeout()
        ),
        (0, None)
    );

    // What is written there anew is another matter; and so is what was asked about.
    session.turn(|memory| memory.write(0x1100, b"again")).unwrap();
    let (settled, _) = session.until_done(&mut ram, SessionMemory::settled);
    assert_eq!((settled, arrived(&mut session, 0x1100)), (Ok(()), Ok(true)));
    session.memory.forget_given_up();
    assert_eq!(arrived(&mut session, 0x1200), Ok(true));
}

#[test]
fn what_is_read_of_a_range_is_forgotten_when_that_is_anothers_unless_it_is_yet_to_be_read() {
    let (mut session, mut ram) = unshared();
    let chunk = u64::from(MESSAGE_DMA_BYTES_MAX);
    let length = (MESSAGE_DMA_OUTSTANDING_MAX + 2) * MESSAGE_DMA_BYTES_MAX as usize;
    let mut body = vec![0; length];
    let pending = Err(MemoryError::Pending);
    assert_eq!(session.turn(|memory| memory.read(0, &mut body)), pending);
    let out = session.requests();
    assert_eq!(out.len(), MESSAGE_DMA_OUTSTANDING_MAX);
    // One is answered, the last two are dropped at a fence: those are to go out once more.
    session.serve(&out[0], &mut ram);
    for dropped in &out[2..] {
        answer(&mut session, dropped, libc::EAGAIN as u32, &[]);
    }
    ram.write(0, &vec![7; length]);
    session
        .turn(|memory| {
            memory.forget_reads_of(0, length as u64);
            Ok(())
        })
        .unwrap();
    session.serve(&out[1], &mut ram);
    let read = |request: &DmaRequest| shape(request).1 / chunk;
    let mut again: Vec<_> = session.requests();
    again.sort_by_key(read);
    assert_eq!(
        again.iter().map(read).collect::<Vec<_>>(),
        [2, 3, 4, 5],
        "somebody may wait for them alone"
    );
    again.iter().for_each(|request| session.serve(request, &mut ram));
    assert_eq!(session.turn(|memory| memory.read(0, &mut body)), pending);
    let missing = session.requests();
    assert_eq!(missing.iter().map(read).collect::<Vec<_>>(), [0, 1]);
    missing
        .iter()
        .for_each(|request| session.serve(request, &mut ram));
    assert_eq!(session.turn(|memory| memory.read(0, &mut body)), Ok(()));
    assert!(body == vec![7; length]);
}
