//! What the device is and what it can: information, interrupts, reset, features.

use crate::support::*;
use vmgmt_wire::*;

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
