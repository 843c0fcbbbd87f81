//! Bulk: files, private buffers and other VMs' memory, with whichever side fails named.

use super::fixture::{BOTH, PAGE, Ram, Session, object, peek, poke};
use crate::core::memory::{BulkError, Pieces, Side};
use rustix::fd::AsFd;
use rustix::fs::ftruncate;
use std::os::unix::fs::FileExt;
use vmgmt_device::{Direction, GuestMemory, MemoryError};

fn pieces(session: &mut Session, segments: &[(u64, u64)], direction: Direction) -> Pieces {
    session
        .turn(|memory| memory.resolve(segments, direction))
        .unwrap()
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|n| (n as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

#[test]
fn files_are_read_into_guest_memory_and_written_from_it() {
    let data = pattern(300_000);
    // A file system on a disk (where tests are built), and tmpfs, which cannot say whether it would wait.
    let on_disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let in_memory = std::fs::File::from(object("file", 0, false));
    for (file, sealed) in [
        (&on_disk, true),
        (&on_disk, false),
        (&in_memory, true),
        (&in_memory, false),
    ] {
        file.set_len(0).unwrap();
        file.write_all_at(&data, 0).unwrap();
        let (mut session, fd) = Session::with_ram(1 << 20, sealed);
        let segments = [
            (0x10_001, 100_000),
            (0x80_000, 200_000),
            (0x8_000, 0),
            (0x9_000, 4096),
        ];
        let target = pieces(&mut session, &segments, Direction::IntoGuest);
        assert_eq!((target.bytes(), target.needs_messages()), (304_096, false));
        let mut at = 0;
        while at < data.len() {
            match target.read_file(at as u64, 304_096 - at, file.as_fd(), at as u64) {
                Ok(0) => panic!("the end came too early"),
                Ok(read) => at += read,
                // What a worker does then.
                Err(BulkError::WouldWait | BulkError::NoNowait) => {
                    let mut scratch = vec![0; data.len() - at];
                    file.read_exact_at(&mut scratch, at as u64).unwrap();
                    target.write_bytes(at as u64, &scratch).unwrap();
                    at = data.len();
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(
            target.read_file(300_000, 4096, file.as_fd(), 300_000),
            Ok(0),
            "the file's end"
        );
        assert!(
            peek(&fd, 0x10_001, 100_000) == data[..100_000]
                && peek(&fd, 0x80_000, 200_000) == data[100_000..]
        );

        let source = pieces(&mut session, &segments, Direction::FromGuest);
        file.set_len(0).unwrap();
        let mut at = 0;
        while at < 304_096 {
            at += source
                .write_file(at as u64, 304_096 - at, file.as_fd(), at as u64 + 5)
                .unwrap();
        }
        let mut written = vec![0; 300_000];
        file.read_exact_at(&mut written, 5).unwrap();
        assert!(written == data);
        assert_eq!(file.metadata().unwrap().len(), 304_101);
    }
}

#[test]
fn the_files_own_error_is_told_from_the_guests() {
    let (mut session, fd) = Session::with_ram(64 * PAGE, false);
    let target = pieces(&mut session, &[(16 * PAGE, 32 * PAGE)], Direction::IntoGuest);
    let source = pieces(&mut session, &[(16 * PAGE, 32 * PAGE)], Direction::FromGuest);
    let file = std::fs::File::from(object("file", 1 << 20, false));
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let only_written = std::fs::OpenOptions::new().write(true).open(&link).unwrap();
    let only_read = std::fs::File::open(&link).unwrap();
    assert!(matches!(
        target.read_file(0, 4096, only_written.as_fd(), 0),
        Err(BulkError::File(_))
    ));
    assert!(matches!(
        source.write_file(0, 4096, only_read.as_fd(), 0),
        Err(BulkError::File(_))
    ));
    assert_eq!(target.read_file(0, 4096, file.as_fd(), 0), Ok(4096));
    ftruncate(&fd, 17 * PAGE).unwrap();
    let gone = |side, iova| Err(BulkError::Guest { side, iova });
    assert_eq!(
        target.read_file(PAGE, 4096, file.as_fd(), 0),
        gone(Side::Target, 17 * PAGE)
    );
    assert_eq!(
        source.write_file(PAGE, 4096, file.as_fd(), 0),
        gone(Side::Source, 17 * PAGE)
    );
    assert!(matches!(
        source.read_bytes(PAGE, &mut [0; 10]),
        Err(BulkError::Guest {
            side: Side::Source,
            ..
        })
    ));
    assert!(matches!(
        target.write_bytes(PAGE, &[0; 10]),
        Err(BulkError::Guest {
            side: Side::Target,
            ..
        })
    ));
    assert_eq!(
        source.read_bytes(0, &mut [0; 4096]),
        Ok(()),
        "the rest is still there"
    );
}

#[test]
fn one_vms_memory_is_copied_to_anothers_and_the_failing_side_is_named() {
    for (source_sealed, target_sealed) in [(true, true), (true, false), (false, true), (false, false)] {
        let (mut from, from_fd) = Session::with_ram(1 << 20, source_sealed);
        let (mut to, to_fd) = Session::with_ram(1 << 20, target_sealed);
        let data = pattern(200_000);
        poke(&from_fd, 0x123, &data[..70_000]);
        poke(&from_fd, 0x40_000, &data[70_000..]);
        let source = pieces(
            &mut from,
            &[(0x123, 70_000), (0x40_000, 130_000)],
            Direction::FromGuest,
        );
        let target = pieces(
            &mut to,
            &[(0x1_000, 1), (0x2_000, 150_001), (0x50_000, 60_000)],
            Direction::IntoGuest,
        );
        target.copy_from(11, &source, 0, 200_000).unwrap();
        let whole = [
            peek(&to_fd, 0x1_000, 1),
            peek(&to_fd, 0x2_000, 150_001),
            peek(&to_fd, 0x50_000, 60_000),
        ]
        .concat();
        assert!(whole[..11].iter().all(|byte| *byte == 0) && whole[11..200_011] == data);
        if !source_sealed {
            ftruncate(&from_fd, 0x42_000).unwrap();
            let failed = target.copy_from(0, &source, 0, 200_000);
            assert!(
                matches!(failed, Err(BulkError::Guest { side: Side::Source, iova }) if iova >= 0x40_000),
                "{failed:?}"
            );
            ftruncate(&from_fd, 1 << 20).unwrap();
        }
        if !target_sealed {
            ftruncate(&to_fd, 0x51_000).unwrap();
            let failed = target.copy_from(0, &source, 0, 200_000);
            assert!(
                matches!(failed, Err(BulkError::Guest { side: Side::Target, iova }) if iova >= 0x50_000),
                "{failed:?}"
            );
        }
    }
}

#[test]
fn our_own_mistakes_are_told() {
    let (mut session, _fd) = Session::with_ram(1 << 20, true);
    let target = pieces(&mut session, &[(0, 100)], Direction::IntoGuest);
    assert_eq!(target.read_bytes(0, &mut [0; 1]), Err(BulkError::Misuse));
    assert_eq!(target.write_bytes(90, &[0; 11]), Err(BulkError::Misuse));
    assert_eq!(target.write_bytes(u64::MAX, &[0; 11]), Err(BulkError::Misuse));
    assert_eq!(target.copy_from(0, &target, 0, 1), Err(BulkError::Misuse));
    assert_eq!(target.write_bytes(90, &[0; 10]), Ok(()));
    assert_eq!(target.write_bytes(100, &[]), Ok(()));
}

#[test]
fn buffers_reached_by_messages_are_read_and_written_with_the_rest() {
    let (mut session, fd) = Session::with_ram(64 * PAGE, true);
    // The second half of the buffer lies in memory without a descriptor.
    session.map(1, 64 * PAGE, 64 * PAGE, 0, 0, BOTH);
    let mut ram = Ram::Private(pattern(128 * PAGE as usize));
    poke(&fd, 0, &ram.read(0, 64 * PAGE as usize));
    let segments = [(60 * PAGE + 1, 60 * PAGE), (PAGE, 100)];
    let source = pieces(&mut session, &segments, Direction::FromGuest);
    assert!(source.needs_messages());
    assert_eq!(
        source.read_bytes(0, &mut vec![0; 20_000]),
        Err(BulkError::ByMessage)
    );
    assert_eq!(
        source.read_bytes(60 * PAGE, &mut [0; 100]),
        Ok(()),
        "this part is mapped"
    );
    let mut read = vec![0; source.bytes() as usize];
    let (done, _) = session.until_done(&mut ram, |memory| memory.read_pieces(&source, 0, &mut read));
    assert_eq!(done, Ok(()));
    assert!(read == [ram.read(60 * PAGE + 1, 60 * PAGE as usize), ram.read(PAGE, 100)].concat());
    let mut too_much = [0; 200];
    let beyond = session.turn(|memory| memory.read_pieces(&source, 60 * PAGE, &mut too_much));
    assert!(matches!(beyond, Err(MemoryError::Gone { .. })));

    let target = pieces(&mut session, &segments, Direction::IntoGuest);
    let reply: Vec<u8> = read.iter().map(|byte| !byte).collect();
    session
        .turn(|memory| memory.write_pieces(&target, 0, &reply))
        .unwrap();
    let (settled, _) = session.until_done(&mut ram, GuestMemory::settled);
    assert_eq!(settled, Ok(()));
    let mapped = 4 * PAGE as usize - 1;
    assert!(peek(&fd, 60 * PAGE + 1, mapped) == reply[..mapped]);
    assert!(ram.read(64 * PAGE, 56 * PAGE as usize + 1) == reply[mapped..60 * PAGE as usize]);
    assert!(peek(&fd, PAGE, 100) == reply[60 * PAGE as usize..]);
}
