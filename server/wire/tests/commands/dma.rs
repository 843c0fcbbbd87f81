//! DMA_MAP and DMA_UNMAP.

use crate::READ_WRITE;
use crate::support::*;
use vmgmt_wire::*;

#[test]
fn dma_map() {
    let mut c = ready();
    let body = dma_map_body(READ_WRITE, 0x10_0000, 0x4000, 0x2000);
    let Command::DmaMap(map) = request(&mut c, 2, 0, &body, &[40]).command else {
        panic!()
    };
    assert_eq!(
        (map.range.start(), map.range.bytes(), map.range.last()),
        (0x4000, 0x2000, 0x5fff)
    );
    assert_eq!((map.descriptor, map.file_offset), (Some(FdSlot(40)), 0x10_0000));
    assert!(map.readable && map.writable && !map.descriptor_lost);
    let Command::DmaMap(map) = request(&mut c, 2, 0, &dma_map_body(1, 0, 0, 4096), &[]).command else {
        panic!()
    };
    assert!(map.readable && !map.writable && map.descriptor.is_none());
    // A range may end with the address space.
    let end = dma_map_body(2, 0, u64::MAX - 4095, 4096);
    let Command::DmaMap(map) = request(&mut c, 2, 0, &end, &[]).command else {
        panic!()
    };
    assert_eq!(map.range.last(), u64::MAX);

    for length in [0, 31, 33] {
        refused(&mut c, 2, &vec![0; length], &[1], Errno::EINVAL);
    }
    let mut argsz = body.clone();
    argsz[0] = 31;
    assert_eq!(
        refused(&mut c, 2, &argsz, &[1], Errno::EINVAL),
        Refusal::Argsz {
            actual: 31,
            needed: 32
        }
    );
    for flags in [0, 4, 7, 1 << 31] {
        let body = dma_map_body(flags, 0, 0, 4096);
        assert_eq!(
            refused(&mut c, 2, &body, &[1], Errno::EINVAL),
            Refusal::Flags(flags)
        );
    }
    for (iova, bytes) in [(0, 0), (u64::MAX, 2), (2, u64::MAX)] {
        let body = dma_map_body(3, 0, iova, bytes);
        assert_eq!(
            refused(&mut c, 2, &body, &[], Errno::EINVAL),
            Refusal::DmaRange { iova, bytes }
        );
    }
    for offset in [u64::MAX, i64::MAX as u64, i64::MAX as u64 - 4095] {
        let body = dma_map_body(3, offset, 0, 4096);
        assert_eq!(
            refused(&mut c, 2, &body, &[5], Errno::EINVAL),
            Refusal::FileOffset(offset)
        );
    }
    let refusal = refused(&mut c, 2, &body, &[5, 6], Errno::EINVAL);
    assert_eq!(
        refusal,
        Refusal::Descriptors {
            actual: 2,
            expected: 1
        }
    );
}

#[test]
fn dma_map_whose_descriptor_was_lost_is_a_map_by_messages() {
    let mut c = ready();
    c.handle_read(&message(1, 2, 0, &dma_map_body(3, 0, 0, 4096)), Vec::new(), true);
    let Some(Event::Request(Request {
        command: Command::DmaMap(map),
        ..
    })) = c.poll_event()
    else {
        panic!()
    };
    assert!(map.descriptor_lost && map.descriptor.is_none());
}

#[test]
fn dma_unmap() {
    let mut c = ready();
    let got = request(&mut c, 3, 0, &dma_unmap_body(0, 0x1000, 0x3000), &[]);
    let range = IovaRange::new(0x1000, 0x3000).unwrap();
    assert_eq!(got.command, Command::DmaUnmap(DmaUnmap::Range(range)));
    c.reply(&got.handle, &Reply::DmaUnmap(DmaUnmap::Range(range)))
        .unwrap();
    assert_eq!(
        drain(&mut c),
        message(7, 3, 1, &dma_unmap_body(0, 0x1000, 0x3000))
    );
    let got = request(&mut c, 3, 0, &dma_unmap_body(2, 0, 0), &[]);
    assert_eq!(got.command, Command::DmaUnmap(DmaUnmap::All));
    c.reply(&got.handle, &Reply::DmaUnmap(DmaUnmap::All)).unwrap();
    assert_eq!(drain(&mut c), message(7, 3, 1, &dma_unmap_body(2, 0, 0)));

    for length in [0, 23, 25] {
        refused(&mut c, 3, &vec![0; length], &[], Errno::EINVAL);
    }
    let mut argsz = dma_unmap_body(0, 0, 4096);
    argsz[0] = 23;
    refused(&mut c, 3, &argsz, &[], Errno::EINVAL);
    assert_eq!(
        refused(&mut c, 3, &dma_unmap_body(1, 0, 4096), &[], Errno::EINVAL),
        Refusal::Flags(1)
    );
    assert_eq!(
        refused(&mut c, 3, &dma_unmap_body(2, 0, 4096), &[], Errno::EINVAL),
        Refusal::Reserved
    );
    refused(&mut c, 3, &dma_unmap_body(0, 0, 0), &[], Errno::EINVAL);
    refused(&mut c, 3, &dma_unmap_body(0, u64::MAX, 2), &[], Errno::EINVAL);
    refused(&mut c, 3, &dma_unmap_body(0, 0, 4096), &[9], Errno::EINVAL);
}
