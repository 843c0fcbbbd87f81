//! Register accesses, answered and posted.

use crate::support::*;
use vmgmt_wire::*;

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
