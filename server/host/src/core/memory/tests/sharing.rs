//! What is shared, what only seems so, what is taken back by its owner, and who may reach it.

use super::fixture::{BOTH, NONCE, PAGE, Ram, Session, object, peek, poke};
use crate::core::memory::MemoryLimits;
use rustix::fd::AsFd;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use vmgmt_device::page::{MapRecord, control, rights};
use vmgmt_device::{Direction, GuestMemory, MemoryError};

/// A guest behind an IOMMU maps a buffer and submits at once: both may come while the core is in the middle of a turn.
#[test]
fn what_was_mapped_after_the_turn_began_is_found() {
    let (mut session, fd) = Session::with_ram(1 << 20, true);
    let front = session.front.clone();
    poke(&fd, 0x5000, b"late");
    let read = session.turn(|memory| {
        assert_eq!(
            memory.check(0x8_0000_0000, 4, Direction::FromGuest),
            Err(MemoryError::Unmapped { iova: 0x8_0000_0000 })
        );
        let record = MapRecord {
            number: 77,
            iova: 0x8_0000_0000,
            bytes: PAGE,
            object: 1,
            offset: 0x5000,
            rights: BOTH,
        };
        front.set_map(9, Some(&record));
        let mut into = [0; 4];
        memory.read(0x8_0000_0000, &mut into)?;
        Ok(into)
    });
    assert_eq!(read, Ok(*b"late"));
}

#[test]
fn what_is_written_is_the_vms_memory_sealed_or_not() {
    for sealed in [true, false] {
        let (mut session, fd) = Session::with_ram(1 << 20, sealed);
        session
            .turn(|memory| {
                assert!(memory.is_shared(0x123));
                memory.write(0xffd, b"across a page")?;
                memory.store_u32(0x2000, 0x0403_0201)?;
                memory.store_u64(0x2008, 0x0807_0605_0403_0201)?;
                memory.fence();
                memory.settled()
            })
            .unwrap();
        assert_eq!(peek(&fd, 0xffd, 13), b"across a page");
        assert_eq!(
            peek(&fd, 0x2000, 16),
            [1, 2, 3, 4, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
        );
        let long: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
        poke(&fd, 0x3001, &long);
        let mut read = vec![0; long.len()];
        session
            .turn(|memory| {
                assert_eq!(memory.load_u32(0x2000)?, 0x0403_0201);
                memory.read(0x3001, &mut read)
            })
            .unwrap();
        assert!(read == long, "sealed: {sealed}");
        assert!(session.requests().is_empty(), "nothing goes by message");
    }
}

#[test]
fn rights_are_never_above_the_maps_and_the_descriptors() {
    let mut session = Session::new();
    let fd = object("ram", 16 * PAGE, true);
    poke(&fd, 0, &NONCE.to_le_bytes());
    session.lend(1, &fd);
    let read_only = rustix::fs::open(
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)),
        rustix::fs::OFlags::RDONLY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    session.memory.object(2, read_only, true);
    session.memory.drained();
    session.map(0, 0, PAGE, 1, 0, rights::READ);
    session.map(1, 0x1000, PAGE, 1, 0, rights::WRITE);
    session.map(2, 0x2000, PAGE, 2, 0, BOTH);
    session.map(3, u64::MAX - 0xfff, PAGE, 1, 0, BOTH);
    session.map(4, u64::MAX - 0x100, PAGE, 1, 0, BOTH);
    session
        .turn(|memory| {
            assert_eq!(memory.prove(0, NONCE), Ok(true));
            assert_eq!(memory.prove(0x2000, NONCE), Ok(true));
            let mut bytes = [0; 4];
            assert_eq!(memory.write(0, &bytes), Err(MemoryError::Denied { iova: 0 }));
            assert_eq!(memory.store_u32(0, 1), Err(MemoryError::Denied { iova: 0 }));
            assert_eq!(
                memory.read(0x1000, &mut bytes),
                Err(MemoryError::Denied { iova: 0x1000 })
            );
            assert_eq!(memory.load_u32(0x1000), Err(MemoryError::Denied { iova: 0x1000 }));
            assert_eq!(memory.write(0x1800, &bytes), Ok(()));
            assert_eq!(memory.load_u32(0x2000), Ok(NONCE as u32));
            assert_eq!(
                memory.store_u64(0x2000, 1),
                Err(MemoryError::Denied { iova: 0x2000 })
            );
            let resolved = memory.resolve(&[(0x2000, 8)], Direction::IntoGuest);
            assert_eq!(resolved.map(|_| ()), Err(MemoryError::Denied { iova: 0x2000 }));
            // The end of what is mapped, and of all addresses.
            assert_eq!(
                memory.check(0xffe, 4, Direction::FromGuest),
                Err(MemoryError::Denied { iova: 0x1000 })
            );
            assert_eq!(
                memory.check(0x2ffe, 4, Direction::FromGuest),
                Err(MemoryError::Unmapped { iova: 0x3000 })
            );
            assert_eq!(
                memory.check(0x2ffe, u64::MAX, Direction::FromGuest),
                Err(MemoryError::Unmapped { iova: 0x3000 })
            );
            assert_eq!(memory.read(u64::MAX - 3, &mut bytes), Ok(()));
            assert_eq!(memory.load_u32(u64::MAX - 3), Ok(0));
            assert_eq!(
                memory.check(u64::MAX - 3, 5, Direction::FromGuest),
                Err(MemoryError::Unmapped { iova: u64::MAX })
            );
            assert_eq!(memory.check(u64::MAX, 0, Direction::FromGuest), Ok(()));
            Ok(())
        })
        .unwrap();
    assert_eq!(peek(&fd, 0, 8), NONCE.to_le_bytes(), "nothing was written there");
}

#[test]
fn without_bus_mastering_or_in_no_turn_nothing_is_reached() {
    let (mut session, _fd) = Session::with_ram(PAGE, true);
    assert_eq!(session.memory.load_u32(0), Err(MemoryError::Quiet), "no turn");
    for bits in [
        0,
        control::BUS_MASTER | control::FROZEN,
        control::BUS_MASTER | control::GONE,
    ] {
        session.front.set_control(bits);
        session.front.move_fence();
        assert!(!session.memory.begin_dma(session.now));
        assert_eq!(session.memory.load_u32(0), Err(MemoryError::Quiet));
        assert_eq!(session.memory.store_u32(0, 1), Err(MemoryError::Quiet));
        assert_eq!(
            session.memory.check(0, 1, Direction::FromGuest),
            Err(MemoryError::Quiet)
        );
        assert_eq!(session.memory.prove(0, NONCE), Err(MemoryError::Quiet));
        assert!(session.memory.resolve(&[(0, 1)], Direction::FromGuest).is_err());
        session.memory.end_dma(session.now);
        assert_eq!(session.memory.core().fenced(), session.front.fence());
        assert!(!session.memory.core().busy());
    }
    session.front.set_control(control::BUS_MASTER);
    session.front.move_fence();
    assert_eq!(session.turn(|memory| memory.load_u32(0)), Ok(0));
}

#[test]
fn memory_that_its_owner_shrinks_answers_gone_and_raises_no_signal() {
    let (mut session, fd) = Session::with_ram(64 * PAGE, false);
    session.turn(|memory| memory.store_u32(40 * PAGE, 7)).unwrap();
    ftruncate(&fd, 32 * PAGE).unwrap();
    let gone = 40 * PAGE;
    session
        .turn(|memory| {
            assert_eq!(memory.load_u32(gone), Err(MemoryError::Gone { iova: gone }));
            assert_eq!(memory.store_u32(gone, 1), Err(MemoryError::Gone { iova: gone }));
            assert_eq!(memory.store_u64(gone, 1), Err(MemoryError::Gone { iova: gone }));
            assert_eq!(
                memory.read(gone, &mut [0; 9000]),
                Err(MemoryError::Gone { iova: gone })
            );
            assert_eq!(
                memory.write(31 * PAGE, &[1; 9000]),
                Err(MemoryError::Gone { iova: 31 * PAGE })
            );
            memory.store_u32(PAGE, 3)?;
            assert_eq!(memory.load_u32(PAGE), Ok(3));
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_map_beyond_the_object_goes_by_message_and_is_told() {
    let mut session = Session::new();
    let fd = object("ram", 4 * PAGE, true);
    session.lend(1, &fd);
    session.map(0, 0, 8 * PAGE, 1, 0, BOTH);
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Pending)
    );
    assert_eq!(session.requests().len(), 1);
    let notice = session.memory.poll_notice().unwrap().0;
    assert!(notice.contains("16384 bytes, 32768 are needed"), "{notice}");
}

#[test]
fn holes_that_are_punched_read_as_zeros() {
    let (mut session, fd) = Session::with_ram(16 * PAGE, true);
    session
        .turn(|memory| memory.write(0, &[7; 16 * PAGE as usize]))
        .unwrap();
    fallocate(
        &fd,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        PAGE,
        14 * PAGE,
    )
    .unwrap();
    let mut read = vec![1; 16 * PAGE as usize];
    session.turn(|memory| memory.read(0, &mut read)).unwrap();
    assert!(read[..PAGE as usize].iter().all(|byte| *byte == 7));
    assert!(
        read[PAGE as usize..15 * PAGE as usize]
            .iter()
            .all(|byte| *byte == 0)
    );
}

/// Reserves huge pages for the time of a test, where this process may.
struct HugePages(u64);

impl HugePages {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";

    fn pool() -> Option<u64> {
        std::fs::read_to_string(Self::POOL).ok()?.trim().parse().ok()
    }

    fn reserve(pages: u64) -> Result<Self, String> {
        let before = Self::pool().ok_or("this kernel has no huge pages")?;
        std::fs::write(Self::POOL, (before + pages).to_string())
            .map_err(|error| format!("{}: {error}", Self::POOL))?;
        let reserved = Self(before);
        if Self::pool() < Some(before + pages) {
            return Err("the kernel found no contiguous memory for huge pages".into());
        }
        Ok(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::POOL, self.0.to_string());
    }
}

#[test]
fn huge_pages_are_reached_and_survive_a_punch_with_an_empty_pool() {
    const HUGE: u64 = 2 << 20;
    let pages = match HugePages::reserve(4) {
        Ok(pages) => pages,
        Err(reason) => {
            vmgmt_testkit::skipped(format_args!("no huge pages can be reserved here: {reason}"));
            return;
        }
    };
    let fd = memfd_create(
        "huge",
        MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::ALLOW_SEALING,
    )
    .unwrap();
    ftruncate(&fd, 4 * HUGE).unwrap();
    rustix::fs::fcntl_add_seals(&fd, rustix::fs::SealFlags::SHRINK).unwrap();
    let mut session = Session::new();
    session.lend(1, &fd);
    // As QEMU sends it: not at a huge page.
    session.map(0, 0x10_0000, 3 * HUGE, 1, 0x10_0000, BOTH);
    let vm = vmgmt_mem::GuestMapping::map(&fd, 0, 4 * HUGE as usize, true).unwrap();
    assert!(!vm.is_direct(), "huge pages can be punched, sealed or not");
    vm.store_u64(0x10_0000, NONCE).unwrap();
    session
        .turn(|memory| {
            assert_eq!(memory.prove(0x10_0000, NONCE), Ok(true));
            memory.write(HUGE - 3, b"across")?;
            memory.store_u32(HUGE + 64, 9)
        })
        .unwrap();
    let mut read = [0; 6];
    vm.read(HUGE as usize - 3, &mut read).unwrap();
    assert_eq!((&read, vm.load_u32(HUGE as usize + 64)), (b"across", Ok(9)));
    // The pool is emptied and a page punched: an instruction would die of SIGBUS now.
    drop(vm);
    drop(pages);
    fallocate(
        &fd,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        HUGE,
        HUGE,
    )
    .unwrap();
    let loaded = session.turn(|memory| memory.load_u32(HUGE + 64));
    if HugePages::pool() == Some(0) {
        assert_eq!(loaded, Err(MemoryError::Gone { iova: HUGE + 64 }));
    } else {
        assert_eq!(loaded, Ok(0));
    }
}

#[test]
fn memory_that_only_seems_shared_is_found_by_the_nonce_and_reached_by_messages() {
    let mut session = Session::new();
    // The descriptor shows the file; the VM has a private copy of it, as QEMU has with share=off.
    let fd = object("not shared", 16 * PAGE, true);
    session.lend(1, &fd);
    session.map(0, 0, 16 * PAGE, 1, 0, BOTH);
    let mut ram = Ram::Private(vec![0; 16 * PAGE as usize]);
    ram.write(0x80, &NONCE.to_le_bytes());
    ram.write(0x100, b"private!");
    let (proof, turns) = session.until_done(&mut ram, |memory| memory.prove(0x80, NONCE));
    assert_eq!((proof, turns), (Ok(false), 2));
    assert!(session.memory.poll_notice().unwrap().0.contains("share=on"));
    assert!(!session.memory.is_shared(0x80));
    let mut bytes = [0; 8];
    let (read, _) = session.until_done(&mut ram, |memory| memory.read(0x100, &mut bytes));
    assert_eq!((read, &bytes), (Ok(()), b"private!"));
    session.turn(|memory| memory.write(0x200, b"answer")).unwrap();
    let (settled, _) = session.until_done(&mut ram, GuestMemory::settled);
    assert_eq!((settled, ram.read(0x200, 6)), (Ok(()), b"answer".to_vec()));
    assert_eq!(
        peek(&fd, 0x200, 6),
        [0; 6],
        "what is not the VM's memory is left alone"
    );
    // A VM that answers with something else has no memory there at all.
    let (proof, _) = session.until_done(&mut ram, |memory| memory.prove(0x100, NONCE));
    assert_eq!(proof, Err(MemoryError::Gone { iova: 0x100 }));
}

#[test]
fn a_nonce_of_zero_proves_nothing() {
    let mut session = Session::new();
    session.lend(1, &object("fresh", PAGE, true));
    session.map(0, 0, PAGE, 1, 0, BOTH);
    let mut ram = Ram::Private(vec![0; PAGE as usize]);
    let (proof, _) = session.until_done(&mut ram, |memory| memory.prove(0, 0));
    assert_eq!(proof, Ok(false));
}

#[test]
fn before_the_proof_loads_go_by_message_and_are_right() {
    let mut session = Session::new();
    let fd = object("ram", PAGE, true);
    poke(&fd, 0x10, &77u32.to_le_bytes());
    session.lend(1, &fd);
    session.map(0, 0, PAGE, 1, 0, BOTH);
    let mut ram = Ram::Shared(rustix::io::dup(&fd).unwrap());
    assert_eq!(
        session.until_done(&mut ram, |memory| memory.load_u32(0x10)),
        (Ok(77), 2)
    );
    session.prove(&fd, 0, 0);
    assert_eq!(
        session.until_done(&mut ram, |memory| memory.load_u32(0x10)),
        (Ok(77), 1)
    );
}

#[test]
fn an_object_that_comes_later_is_waited_for_by_draining() {
    let mut session = Session::new();
    let fd = object("ram", PAGE, true);
    poke(&fd, 0, &NONCE.to_le_bytes());
    session.map(0, 0, PAGE, 1, 0, BOTH);
    assert_eq!(
        session.turn(|memory| memory.prove(0, NONCE)),
        Err(MemoryError::Pending)
    );
    assert!(session.memory.wants_turn() && session.requests().is_empty());
    session.lend(1, &fd);
    assert!(!session.memory.wants_turn());
    assert_eq!(session.turn(|memory| memory.prove(0, NONCE)), Ok(true));
    // One that never comes is reached by messages; should it come all the same, it is used.
    session.map(1, 0x1000, PAGE, 2, 0, BOTH);
    assert_eq!(
        session.turn(|memory| memory.load_u32(0x1000)),
        Err(MemoryError::Pending)
    );
    session.memory.drained();
    assert_eq!(
        session.turn(|memory| memory.load_u32(0x1000)),
        Err(MemoryError::Pending)
    );
    assert!(!session.memory.wants_turn());
    assert_eq!(session.requests().len(), 1);
    session.lend(2, &fd);
    assert_eq!(session.turn(|memory| memory.prove(0x1000, NONCE)), Ok(true));
}

#[test]
fn twenty_five_thousand_small_maps_take_one_mapping() {
    const MAPS: u64 = 25_000;
    let limits = MemoryLimits {
        mapped_bytes_max: 1 << 40,
        objects_max: 4,
    };
    let mut session = Session::with(limits, MAPS as usize + 1);
    let fd = object("vmgmt-test-25000-maps", MAPS * PAGE, true);
    session.lend(1, &fd);
    // The guest's order is not the memory's.
    for n in 0..MAPS {
        session.map(n as usize, n * 2 * PAGE, PAGE, 1, (n * 7919 % MAPS) * PAGE, BOTH);
    }
    poke(&fd, 0, &NONCE.to_le_bytes());
    session.turn(|memory| memory.prove(0, NONCE)).unwrap();
    poke(&fd, 0, &[0; 8]);
    session
        .turn(|memory| {
            for n in 0..MAPS {
                memory.store_u32(n * 2 * PAGE, n as u32)?;
            }
            assert_eq!(memory.load_u32(PAGE), Err(MemoryError::Unmapped { iova: PAGE }));
            Ok(())
        })
        .unwrap();
    for n in 0..MAPS {
        assert_eq!(peek(&fd, (n * 7919 % MAPS) * PAGE, 4), (n as u32).to_le_bytes());
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert_eq!(
        maps.lines()
            .filter(|line| line.contains("vmgmt-test-25000-maps"))
            .count(),
        1
    );
    assert_eq!(session.memory.counters().mapped_bytes, MAPS * PAGE);
    for n in 0..MAPS {
        session.unmap(n as usize);
    }
    assert!(session.memory.poll_fences(session.now));
    assert_eq!(session.memory.core().fenced(), MAPS);
    assert_eq!(
        session.turn(|memory| memory.load_u32(0)),
        Err(MemoryError::Unmapped { iova: 0 })
    );
    session.memory.object_gone(1);
    assert_eq!(session.memory.counters().mapped_bytes, 0);
}

#[test]
fn what_exceeds_the_budget_goes_by_message_and_is_told() {
    let limits = MemoryLimits {
        mapped_bytes_max: 8 * PAGE,
        objects_max: 1,
    };
    let mut session = Session::with(limits, 64);
    let fd = object("large", 1 << 30, true);
    poke(&fd, 0, &NONCE.to_le_bytes());
    poke(&fd, 64 * PAGE, &NONCE.to_le_bytes());
    session.lend(1, &fd);
    session.map(0, 0, 8 * PAGE, 1, 0, BOTH);
    session.map(1, 64 * PAGE, PAGE, 1, 64 * PAGE, BOTH);
    assert_eq!(session.turn(|memory| memory.prove(0, NONCE)), Ok(true));
    assert_eq!(
        session.memory.counters().mapped_bytes,
        8 * PAGE,
        "only what is named"
    );
    let mut ram = Ram::Shared(rustix::io::dup(&fd).unwrap());
    let (loaded, turns) = session.until_done(&mut ram, |memory| memory.load_u32(64 * PAGE));
    assert_eq!((loaded, turns), (Ok(NONCE as u32), 2));
    assert!(
        session
            .memory
            .poll_notice()
            .unwrap()
            .0
            .contains("mapped_bytes_max of 32768")
    );
    session
        .memory
        .object(2, rustix::io::dup(fd.as_fd()).unwrap(), true);
    assert!(session.memory.poll_notice().unwrap().0.contains("objects_max"));
}
