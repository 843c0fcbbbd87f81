//! One test per command: exact, too small, too large, wrong argsz, wrong flags, wrong descriptors.

mod support;
use support::*;
use vmgmt_wire::*;

const READ_WRITE: u32 = 3;

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

#[test]
fn device_get_info() {
    let mut c = ready();
    let got = request(&mut c, 4, 0, &words(&[16, 0, 0, 0]), &[]);
    assert_eq!(got.command, Command::DeviceGetInfo);
    c.reply(&got.handle, &answer(&got)).unwrap();
    assert_eq!(drain(&mut c), message(7, 4, 1, &words(&[16, 3, 9, 5])));
    assert_eq!(
        request(&mut c, 4, 0, &words(&[u32::MAX, 0, 0, 0]), &[]).command,
        Command::DeviceGetInfo
    );
    for length in [0, 15, 17] {
        refused(&mut c, 4, &vec![0xff; length], &[], Errno::EINVAL);
    }
    for body in [
        [15, 0, 0, 0],
        [0, 0, 0, 0],
        [16, 1, 0, 0],
        [16, 0, 1, 0],
        [16, 0, 0, 1],
    ] {
        refused(&mut c, 4, &words(&body), &[], Errno::EINVAL);
    }
    refused(&mut c, 4, &words(&[16, 0, 0, 0]), &[3, 4], Errno::EINVAL);
}

#[test]
fn device_get_region_info() {
    let mut c = ready();
    let got = request(&mut c, 5, 0, &region_info_body(32, 7), &[]);
    assert_eq!(got.command, Command::DeviceGetRegionInfo { region: 7 });
    let info = RegionInfo {
        flags: 3,
        region: 7,
        bytes: 4096,
        ..RegionInfo::default()
    };
    c.reply(&got.handle, &Reply::RegionInfo(info)).unwrap();
    let mut body = words(&[32, 3, 7, 0]);
    body.extend(4096u64.to_le_bytes());
    body.extend(0u64.to_le_bytes());
    assert_eq!(drain(&mut c), message(7, 5, 1, &body));
    for length in [0, 31, 33] {
        refused(&mut c, 5, &vec![0xff; length], &[], Errno::EINVAL);
    }
    refused(&mut c, 5, &region_info_body(31, 0), &[], Errno::EINVAL);
    for field in [4, 12, 16, 24] {
        let mut body = region_info_body(32, 0);
        body[field] = 1;
        assert_eq!(refused(&mut c, 5, &body, &[], Errno::EINVAL), Refusal::Reserved);
    }
}

#[test]
fn region_info_with_capabilities_obeys_argsz() {
    let mut c = ready();
    let info = RegionInfo {
        flags: 7,
        region: 0,
        bytes: 0x4000,
        file_offset: 0x1000,
        sparse_areas: vec![SparseArea {
            offset: 0x1000,
            bytes: 0x2000,
        }],
        descriptor: Some(FdSlot(99)),
    };
    let got = request(&mut c, 5, 0, &region_info_body(63, 0), &[]);
    c.reply(&got.handle, &Reply::RegionInfo(info.clone())).unwrap();
    assert!(
        c.pending_output().unwrap().descriptors.is_empty(),
        "no descriptor with a reply that is cut"
    );
    let reply = drain(&mut c);
    assert_eq!(
        (reply.len(), &reply[16..20], &reply[28..32]),
        (48, &words(&[64])[..], &words(&[32])[..])
    );
    let got = request(&mut c, 5, 0, &region_info_body(64, 0), &[]);
    c.reply(&got.handle, &Reply::RegionInfo(info)).unwrap();
    assert_eq!(c.pending_output().unwrap().descriptors, [FdSlot(99)]);
    c.advance_output(1);
    assert!(
        c.pending_output().unwrap().descriptors.is_empty(),
        "descriptors go with the first byte only"
    );
    let rest = drain(&mut c);
    let mut body = words(&[64, 15, 0, 32]);
    body.extend(0x4000u64.to_le_bytes());
    body.extend(0x1000u64.to_le_bytes());
    body.extend([1, 0, 1, 0, 0, 0, 0, 0]);
    body.extend(words(&[1, 0]));
    body.extend(0x1000u64.to_le_bytes());
    body.extend(0x2000u64.to_le_bytes());
    assert_eq!(rest, message(7, 5, 1, &body)[1..]);
}

#[test]
fn device_get_region_io_fds() {
    let mut c = ready();
    let got = request(&mut c, 6, 0, &words(&[16, 0, 2, 0]), &[]);
    assert_eq!(got.command, Command::DeviceGetRegionIoFds { region: 2 });
    c.reply(&got.handle, &answer(&got)).unwrap();
    assert_eq!(drain(&mut c), message(7, 6, 1, &words(&[16, 0, 2, 0])));
    for body in [
        words(&[16, 0, 2]),
        words(&[16, 0, 2, 0, 0]),
        words(&[15, 0, 2, 0]),
        words(&[16, 1, 2, 0]),
    ] {
        refused(&mut c, 6, &body, &[], Errno::EINVAL);
    }
    refused(&mut c, 6, &words(&[16, 0, 2, 1]), &[], Errno::EINVAL);
}

#[test]
fn device_get_irq_info() {
    let mut c = ready();
    let got = request(&mut c, 7, 0, &words(&[16, 0, 1, 0]), &[]);
    assert_eq!(got.command, Command::DeviceGetIrqInfo { index: 1 });
    c.reply(&got.handle, &answer(&got)).unwrap();
    assert_eq!(drain(&mut c), message(7, 7, 1, &words(&[16, 1, 1, 16])));
    for body in [
        words(&[16, 0, 1]),
        words(&[16, 0, 1, 0, 0]),
        words(&[15, 0, 1, 0]),
        words(&[16, 1, 1, 0]),
    ] {
        refused(&mut c, 7, &body, &[], Errno::EINVAL);
    }
    refused(&mut c, 7, &words(&[16, 0, 1, 1]), &[], Errno::EINVAL);
}

#[test]
fn device_set_irqs() {
    let mut c = ready();
    let mut take = |flags: u32, start: u32, count: u32, data: &[u8], fds: &[u32]| {
        let mut body = words(&[20 + data.len() as u32, flags, 1, start, count]);
        body.extend(data);
        let Command::DeviceSetIrqs(set) = request(&mut c, 8, 0, &body, fds).command else {
            panic!()
        };
        assert_eq!(set.index, 1);
        set.operation
    };
    let trigger = IrqAction::Trigger;
    assert_eq!(take(0x21, 0, 0, &[], &[]), IrqOperation::DisableAll);
    let eventfds = vec![FdSlot(8), FdSlot(9)];
    assert_eq!(
        take(0x24, 3, 2, &[], &[8, 9]),
        IrqOperation::Assign {
            action: trigger,
            start: 3,
            eventfds
        }
    );
    assert_eq!(
        take(0x24, 3, 2, &[], &[]),
        IrqOperation::Deassign {
            action: trigger,
            start: 3,
            count: 2
        }
    );
    assert_eq!(
        take(0x11, 0, 2048, &[], &[]),
        IrqOperation::Act {
            action: IrqAction::Unmask,
            start: 0,
            count: 2048
        }
    );
    assert_eq!(
        take(0x0a, 1, 3, &[0, 1, 7], &[]),
        IrqOperation::ActWhere {
            action: IrqAction::Mask,
            start: 1,
            selected: vec![false, true, true]
        }
    );
}

#[test]
fn device_set_irqs_refused() {
    let mut c = ready();
    let body = |argsz: u32, flags: u32, start: u32, count: u32| words(&[argsz, flags, 1, start, count]);
    refused(&mut c, 8, &words(&[20, 0x21, 1, 0]), &[], Errno::EINVAL);
    refused(&mut c, 8, &[], &[3], Errno::EINVAL);
    refused(&mut c, 8, &body(19, 0x21, 0, 0), &[], Errno::EINVAL);
    // No data kind, two, no action, two, an unknown bit.
    for flags in [0x20, 0x23, 0x27, 0x01, 0x31, 0x61, 0] {
        assert_eq!(
            refused(&mut c, 8, &body(20, flags, 0, 1), &[], Errno::EINVAL),
            Refusal::Flags(flags)
        );
    }
    for (start, count) in [(2048, 1), (0, 2049), (u32::MAX, 1), (1, 0), (1, u32::MAX)] {
        let refusal = refused(&mut c, 8, &body(20, 0x21, start, count), &[], Errno::EINVAL);
        assert_eq!(refusal, Refusal::IrqRange { start, count });
    }
    // Nothing to mask, no eventfd for nothing.
    refused(&mut c, 8, &body(20, 0x09, 0, 0), &[], Errno::EINVAL);
    refused(&mut c, 8, &body(20, 0x24, 0, 0), &[], Errno::EINVAL);
    // Booleans too few, too many; bytes where there are none.
    let mut few = body(21, 0x22, 0, 2);
    few.push(1);
    refused(&mut c, 8, &few, &[], Errno::EINVAL);
    few.extend([1, 1]);
    refused(&mut c, 8, &few, &[], Errno::EINVAL);
    refused(&mut c, 8, &words(&[24, 0x21, 1, 0, 1, 0]), &[], Errno::EINVAL);
    refused(&mut c, 8, &words(&[24, 0x24, 1, 0, 1, 0]), &[], Errno::EINVAL);
    // Descriptors too few, too many, not wanted.
    refused(&mut c, 8, &body(20, 0x24, 0, 2), &[1], Errno::EINVAL);
    refused(&mut c, 8, &body(20, 0x24, 0, 1), &[1, 2], Errno::EINVAL);
    refused(&mut c, 8, &body(20, 0x21, 0, 1), &[1], Errno::EINVAL);
    refused(&mut c, 8, &body(20, 0x21, 0, 0), &[1], Errno::EINVAL);
    // More than max_msg_fds.
    let many: Vec<u32> = (0..17).collect();
    refused(&mut c, 8, &body(20, 0x24, 0, 17), &many, Errno::EINVAL);
}

#[test]
fn device_set_irqs_whose_eventfds_were_lost_is_no_deassignment() {
    let mut c = ready();
    c.handle_read(&message(1, 8, 0, &words(&[20, 0x24, 1, 0, 1])), Vec::new(), true);
    let refusal = Refusal::DescriptorsLost;
    assert_eq!(c.poll_event(), Some(Event::Refused { command: 8, refusal }));
    assert_eq!(drain(&mut c)[8..16], words(&[0x21, Errno::EMFILE.0])[..]);
}

#[test]
fn region_read() {
    let mut c = ready();
    let got = request(&mut c, 9, 0, &region_body(0, 0x40, 4, &[]), &[]);
    let access = RegionAccess::new(0, 0x40, 4).unwrap();
    assert_eq!(got.command, Command::RegionRead(access));
    let short = Reply::RegionRead {
        access,
        data: vec![1, 2, 3],
    };
    assert_eq!(c.reply(&got.handle, &short), Err(ReplyRefused::Mismatch));
    c.reply(
        &got.handle,
        &Reply::RegionRead {
            access,
            data: vec![1, 2, 3, 4],
        },
    )
    .unwrap();
    assert_eq!(
        drain(&mut c),
        message(7, 9, 1, &region_body(0, 0x40, 4, &[1, 2, 3, 4]))
    );
    let most = 1 << 20;
    let got = request(&mut c, 9, 0, &region_body(0, 0, most, &[]), &[]);
    c.reply(&got.handle, &answer(&got)).unwrap();
    assert_eq!(drain(&mut c).len(), 16 + 16 + most as usize);
    for length in [0, 15, 17] {
        refused(&mut c, 9, &vec![1; length], &[], Errno::EINVAL);
    }
    for (offset, bytes) in [
        (0, 0),
        (0, most + 1),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 3, 8),
    ] {
        let refusal = refused(&mut c, 9, &region_body(0, offset, bytes, &[]), &[], Errno::EINVAL);
        assert_eq!(refusal, Refusal::Access { offset, bytes });
    }
}

#[test]
fn region_write() {
    let mut c = ready();
    let got = request(&mut c, 10, 0, &region_body(2, 8, 2, &[0xab, 0xcd]), &[]);
    let Command::RegionWrite(write) = &got.command else {
        panic!()
    };
    assert_eq!(
        (write.access(), write.data()),
        (RegionAccess::new(2, 8, 2).unwrap(), &[0xab, 0xcd][..])
    );
    c.reply(&got.handle, &answer(&got)).unwrap();
    assert_eq!(drain(&mut c), message(7, 10, 1, &region_body(2, 8, 2, &[])));
    let most = vec![7; 1 << 20];
    let got = request(&mut c, 10, 0, &region_body(0, 0, 1 << 20, &most), &[]);
    assert!(matches!(&got.command, Command::RegionWrite(write) if write.data() == most));
    for body in [
        region_body(0, 0, 4, &[1; 3]),
        region_body(0, 0, 4, &[1; 5]),
        region_body(0, 0, 0, &[]),
    ] {
        refused(&mut c, 10, &body, &[], Errno::EINVAL);
    }
    refused(&mut c, 10, &[0; 15], &[], Errno::EINVAL);
    refused(&mut c, 10, &region_body(0, u64::MAX, 1, &[1]), &[], Errno::EINVAL);
}

#[test]
fn posted_write_gets_no_reply_not_even_an_error() {
    let mut c = ready();
    let got = request(&mut c, 10, NO_REPLY, &region_body(0, 0, 4, &[1; 4]), &[]);
    assert!(got.handle.no_reply);
    assert_eq!(c.replies_owed(), 0);
    assert_eq!(c.reply(&got.handle, &answer(&got)), Err(ReplyRefused::NotWanted));
    assert_eq!(
        c.reply(&got.handle, &Reply::Error(Errno::EIO)),
        Err(ReplyRefused::NotWanted)
    );
    c.handle_read(
        &message(8, 10, NO_REPLY, &region_body(0, 0, 4, &[1; 3])),
        Vec::new(),
        false,
    );
    assert!(matches!(c.poll_event(), Some(Event::Refused { command: 10, .. })));
    assert!(c.pending_output().is_none());
}

#[test]
fn region_write_multi() {
    let mut c = ready();
    let body = multi_body(&[(0, 0x10, 4), (0, 0x20, 8), (2, 1, 1)]);
    let got = request(&mut c, 15, 0, &body, &[]);
    let Command::RegionWriteMulti(writes) = &got.command else {
        panic!()
    };
    let seen: Vec<_> = writes
        .iter()
        .map(|write| (write.access().offset(), write.data().to_vec()))
        .collect();
    assert_eq!(seen, [(0x10, vec![1; 4]), (0x20, vec![2; 8]), (1, vec![3; 1])]);
    c.reply(&got.handle, &answer(&got)).unwrap();
    assert_eq!(drain(&mut c), message(7, 15, 1, &3u64.to_le_bytes()));
    // QEMU's longest.
    let most = multi_body(&vec![(0, 0, 4); 200]);
    assert!(
        matches!(request(&mut c, 15, NO_REPLY, &most, &[]).command, Command::RegionWriteMulti(w) if w.len() == 200)
    );
    refused(&mut c, 15, &[0; 7], &[], Errno::EINVAL);
    assert_eq!(
        refused(&mut c, 15, &0u64.to_le_bytes(), &[], Errno::EINVAL),
        Refusal::WriteCount(0)
    );
    for count in [4097, u64::MAX, u64::MAX / 24 + 1] {
        assert_eq!(
            refused(&mut c, 15, &count.to_le_bytes(), &[], Errno::EINVAL),
            Refusal::WriteCount(count)
        );
    }
    refused(&mut c, 15, &body[..body.len() - 1], &[], Errno::EINVAL);
    refused(&mut c, 15, &[body.clone(), vec![0]].concat(), &[], Errno::EINVAL);
    refused(
        &mut c,
        15,
        &multi_body(&[(0, 0, 4), (0, 0, 9)]),
        &[],
        Errno::EINVAL,
    );
    refused(&mut c, 15, &multi_body(&[(0, 0, 0)]), &[], Errno::EINVAL);
    refused(&mut c, 15, &multi_body(&[(0, u64::MAX, 4)]), &[], Errno::EINVAL);
}

#[test]
fn device_reset() {
    let mut c = ready();
    let got = request(&mut c, 13, 0, &[], &[]);
    assert_eq!(got.command, Command::DeviceReset);
    c.reply(&got.handle, &Reply::Done).unwrap();
    assert_eq!(drain(&mut c), message(7, 13, 1, &[]));
    refused(&mut c, 13, &[0], &[], Errno::EINVAL);
    refused(&mut c, 13, &[], &[1], Errno::EINVAL);
}

#[test]
fn device_feature() {
    let mut c = ready();
    let mut take = |flags: u32, data: &[u8]| {
        let body = [words(&[8 + data.len() as u32, flags]), data.to_vec()].concat();
        let Command::DeviceFeature(feature) = request(&mut c, 16, 0, &body, &[]).command else {
            panic!()
        };
        (feature.feature, feature.operation, feature.data)
    };
    assert_eq!(take(0x1_0001, &[]), (1, FeatureOperation::Get, vec![]));
    assert_eq!(take(0x2_0002, &[9, 9]), (2, FeatureOperation::Set, vec![9, 9]));
    assert_eq!(
        take(0x6_0002, &[]),
        (
            2,
            FeatureOperation::Probe {
                get: false,
                set: true
            },
            vec![]
        )
    );
    let got = request(&mut c, 16, 0, &words(&[16, 0x1_0001]), &[]);
    let reply = Reply::DeviceFeature(DeviceFeatureReply {
        flags: 0x1_0001,
        data: vec![5; 8],
    });
    drain(&mut c);
    c.reply(&got.handle, &reply).unwrap();
    let body = [words(&[16, 0x1_0001]), vec![5; 8]].concat();
    assert_eq!(drain(&mut c), message(7, 16, 1, &body));
    let got = request(&mut c, 16, 0, &words(&[15, 0x1_0001]), &[]);
    c.reply(&got.handle, &reply).unwrap();
    assert_eq!(
        drain(&mut c),
        message(7, 16, 1, &words(&[16, 0x1_0001])),
        "argsz too small: only the head"
    );
    refused(&mut c, 16, &[0; 7], &[], Errno::EINVAL);
    refused(&mut c, 16, &words(&[7, 0x1_0001]), &[], Errno::EINVAL);
    for flags in [0, 1, 0x3_0001, 0x8_0000, 0x9_0001] {
        assert_eq!(
            refused(&mut c, 16, &words(&[8, flags]), &[], Errno::EINVAL),
            Refusal::Flags(flags)
        );
    }
}

#[test]
fn commands_a_server_does_not_take() {
    let mut c = ready();
    for command in [0, 11, 12, 14, 17, 18, 19, u16::MAX] {
        let refusal = refused(&mut c, command, &[1, 2, 3], &[4, 5], Errno::EOPNOTSUPP);
        assert_eq!(refusal, Refusal::Command(command));
    }
}

#[test]
fn bad_headers_that_keep_step() {
    let mut c = ready();
    for flags in [2, 0xf, 0x20, 0x40, 1 << 31] {
        let refusal = refused_raw(&mut c, message(7, 13, flags, &[]), &[], Errno::EINVAL);
        assert!(
            matches!(refusal, Refusal::MessageType(_) | Refusal::HeaderReserved),
            "{refusal}"
        );
    }
    let mut with_error = message(7, 13, 0, &[]);
    with_error[12] = 1;
    assert_eq!(
        refused_raw(&mut c, with_error, &[], Errno::EINVAL),
        Refusal::HeaderReserved
    );
}

#[test]
fn bad_headers_that_lose_step_end_the_connection() {
    for (claimed, ready_first) in [
        (0u32, true),
        (15, true),
        (16 + 32 + (1 << 20) + 1, true),
        (u32::MAX, true),
        (20_000, false),
    ] {
        let mut c = if ready_first { ready() } else { Connection::new() };
        let mut bytes = message(9, 13, 0, &[]);
        bytes[4..8].copy_from_slice(&claimed.to_le_bytes());
        c.handle_read(&bytes, vec![FdSlot(3)], false);
        let mut events: Vec<Event> = std::iter::from_fn(|| c.poll_event()).collect();
        events.sort_by_key(|event| matches!(event, Event::Failed(_)));
        let [Event::CloseDescriptor(FdSlot(3)), Event::Failed(error)] = &events[..] else {
            panic!("{events:?}")
        };
        assert!(
            matches!(error, FatalError::TooShort { .. } | FatalError::TooLong { .. }),
            "{error}"
        );
        assert!(c.should_close() && !c.wants_read());
        c.handle_read(&message(1, 13, 0, &[]), vec![FdSlot(4)], false);
        assert_eq!(c.poll_event(), Some(Event::CloseDescriptor(FdSlot(4))));
        assert_eq!(c.poll_event(), None, "told once");
    }
}

#[test]
fn a_request_is_answered_once() {
    let mut c = ready();
    let got = request(&mut c, 13, 0, &[], &[]);
    let region = Reply::RegionIoFds { region: 0 };
    assert_eq!(c.reply(&got.handle, &region), Err(ReplyRefused::Mismatch));
    assert_eq!(c.replies_owed(), 1);
    c.reply(&got.handle, &Reply::Done).unwrap();
    assert_eq!(c.reply(&got.handle, &Reply::Done), Err(ReplyRefused::NotOwed));
    assert_eq!(
        c.reply(&got.handle, &Reply::Error(Errno::EIO)),
        Err(ReplyRefused::NotOwed)
    );
    assert_eq!(drain(&mut c), message(7, 13, 1, &[]));
    let late = request(&mut c, 13, 0, &[], &[]);
    assert!(c.forget_reply(&late.handle) && !c.forget_reply(&late.handle));
    assert_eq!(c.reply(&late.handle, &Reply::Done), Err(ReplyRefused::NotOwed));
    assert!(c.pending_output().is_none());
}

#[test]
fn a_client_that_does_not_read_waits_by_itself() {
    let mut c = ready();
    let read = message(1, 9, 0, &region_body(0, 0, 1 << 20, &[]));
    c.handle_read(&read.repeat(10), Vec::new(), false);
    let mut taken = 0;
    while let Some(Event::Request(request)) = c.poll_event() {
        taken += 1;
        c.reply(&request.handle, &answer(&request)).unwrap();
    }
    assert!(taken < 10 && !c.wants_read(), "{taken} answered");
    drain(&mut c);
    while let Some(Event::Request(request)) = c.poll_event() {
        taken += 1;
        c.reply(&request.handle, &answer(&request)).unwrap();
        drain(&mut c);
    }
    assert_eq!(taken, 10);
    assert!(c.wants_read());
}
