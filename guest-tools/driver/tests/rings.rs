//! The driver against a device in this process: honest, slow, replaced and hostile. Nothing here sleeps to synchronise.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fake;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fake::{Fake, Mischief};
use vmgmt_driver::abi::chat::MessageHeader;
use vmgmt_driver::abi::ring::completion_flag;
use vmgmt_driver::backing::{COMMAND_MASTER, COMMAND_MEMORY};
use vmgmt_driver::channel::Request;
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_driver::transfer::Descriptor;
use vmgmt_driver::{
    Channel, Client, Device, DriverError, Mode, Opcode, Ring, RingOptions, Status, TransferOptions,
};
use zerocopy::IntoBytes;

fn open(fake: &Arc<Fake>, mode: Mode, spin: Duration) -> (Arc<Device>, Client) {
    let device = Device::open(Arc::clone(fake) as Arc<dyn vmgmt_driver::backing::Backing>).unwrap();
    let ring = Ring::open(
        &device,
        RingOptions {
            spin,
            ..RingOptions::new(mode)
        },
    )
    .unwrap();
    (device, Client::new(ring))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|index| (index.wrapping_mul(0x9e37_79b9) >> 11) as u8)
        .collect()
}

#[test]
fn a_failed_device_is_reset_and_a_late_one_asked_again() {
    let fake = Fake::new(false);
    fake.state().absent_reads = 3;
    let (device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
    assert_eq!(fake.state().resets, 1);
    client.noop().unwrap();
    assert_eq!(client.identity().unwrap().name, "fake");
    drop((client, device));
    assert_eq!(fake.state().resets, 2, "a device that is given up is left blank");
    fake.state().absent_reads = u32::MAX;
    let error = Device::open(Arc::clone(&fake) as Arc<dyn vmgmt_driver::backing::Backing>).unwrap_err();
    assert!(matches!(error, DriverError::DeviceAbsent), "{error}");
}

#[test]
fn no_wake_up_is_lost_in_either_direction() {
    for (suppression, shared) in [(true, true), (false, true), (true, false)] {
        let fake = Fake::new(false);
        fake.state().suppression = suppression;
        fake.state().shared = shared;
        let (_device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
        assert_eq!(client.channel().is_shared(), shared);
        for _ in 0..3000 {
            client.noop().unwrap();
        }
        let counters = client.channel().counters();
        // What a lost wake-up left lying is found by looking; one look may fall between an answer and its interrupt.
        assert!(counters.unannounced <= 1, "{counters:?}");
        if !(suppression && shared) {
            assert_eq!(counters.doorbells, counters.submissions);
        }
    }
}

#[test]
fn a_full_ring_goes_round_many_times() {
    for mischief in [Mischief::None, Mischief::Reversed] {
        let fake = Fake::new(true);
        let (_device, mut client) = open(&fake, Mode::COMMON, Duration::from_micros(20));
        fake.state().mischief = mischief;
        let tags: Vec<_> = (0..2000)
            .map(|_| client.start(Request::new(Opcode::NOOP)).unwrap())
            .collect();
        for tag in tags {
            client.await_ok(tag).unwrap();
        }
        assert_eq!(client.channel().in_flight(), 0);
    }
}

#[test]
fn echoes_cross_scattered_pages() {
    let fake = Fake::new(true);
    let (_device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
    let buffer = client.allocate(32 * 1024).unwrap();
    assert_eq!(buffer.pieces().len(), 8);
    for bytes in [1, 63, 1000, 4096] {
        for start in [0, 1, 4093, 5000] {
            let sent = pattern(bytes);
            buffer.write(start, &sent).unwrap();
            assert_eq!(client.echo_in_place(&buffer, start, bytes).unwrap(), bytes);
            assert_eq!(buffer.to_vec(start, bytes).unwrap(), sent);
            assert_eq!(buffer.to_vec(start + bytes, bytes).unwrap(), sent);
        }
    }
}

#[test]
fn files_go_to_memory_and_back() {
    for scattered in [false, true] {
        let fake = Fake::new(scattered);
        let content = pattern(5 * (1 << 20) + 4321);
        fake.state().files.insert("share/in".into(), content.clone());
        let (_device, mut client) = open(&fake, Mode::FILE, Duration::from_micros(50));
        let options = TransferOptions {
            chunk_bytes: 1 << 20,
            chunks_in_flight: 3,
            check: true,
        };
        let (memory, done) = client.get_to_memory("share/in", &options).unwrap();
        assert_eq!(done.checksum, Some(crc32fast::hash(&content)));
        assert!(memory.to_vec(0, content.len()).unwrap() == content);
        client
            .put_from_memory("share/out", &memory, content.len(), 0, &options)
            .unwrap();
        assert!(fake.state().files["share/out"] == content);
        let absent = client.get_to_memory("share/none", &options).unwrap_err();
        assert_eq!(absent.status(), Some(Status::NO_SUCH_NAME));
    }
}

#[test]
fn files_stream_through_descriptors_in_order() {
    let fake = Fake::new(true);
    let (_device, mut client) = open(&fake, Mode::FILE, Duration::from_micros(50));
    let content = pattern(1_000_003);
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
    let options = TransferOptions {
        chunk_bytes: 10_000,
        chunks_in_flight: 7,
        check: true,
    };
    let put = client.put("share/a", content.len() as u64, 0).unwrap();
    let mut source = Descriptor::new(file.as_fd(), "source");
    let mut seen = 0;
    let done = client
        .write_all(put.handle, None, &mut source, &options, &mut |bytes| seen = bytes)
        .unwrap();
    assert_eq!((done.bytes, seen), (1_000_003, 1_000_003));
    client
        .commit(put.handle, done.bytes, done.checksum, false)
        .unwrap();
    let wrong = client.commit(put.handle, done.bytes, Some(1), false).unwrap_err();
    assert_eq!(wrong.status(), Some(Status::INTEGRITY));

    let back = tempfile::tempfile().unwrap();
    let opened = client.open_for_reading("share/a").unwrap();
    let mut sink = Descriptor::new(back.as_fd(), "sink");
    fake.state().mischief = Mischief::Reversed;
    let done = client
        .get(opened.handle, 0, opened.size, &mut sink, &options, &mut |_| {})
        .unwrap();
    client.verify(opened.handle, "share/a", done).unwrap();
    let mut read = vec![0; content.len()];
    std::os::unix::fs::FileExt::read_exact_at(&back, &mut read, 0).unwrap();
    assert!(read == content);
    fake.state().files.get_mut("share/a").unwrap()[77] ^= 1;
    let error = client.verify(opened.handle, "share/a", done).unwrap_err();
    assert!(matches!(error, DriverError::Integrity { .. }), "{error}");
}

#[test]
fn a_hostile_device_ends_as_an_error_that_says_so() {
    let expected = [
        (Mischief::WrongTag, "not in flight"),
        (Mischief::Twice, "not in flight"),
        (Mischief::HugeResult, "where there is room for"),
        (Mischief::HeadJump, "submission head"),
        (Mischief::UnknownStatus, "30583"),
    ];
    for (mischief, text) in expected {
        let fake = Fake::new(false);
        let (_device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
        fake.state().mischief = mischief;
        // The first wrong answer may be noticed with the next submission.
        let error = (0..4)
            .find_map(|_| client.echo(b"hello").err())
            .expect("nothing was noticed");
        assert!(error.to_string().contains(text), "{mischief:?}: {error}");
        if mischief == Mischief::WrongTag || mischief == Mischief::Twice {
            let given_up = client.start(Request::new(Opcode::NOOP)).unwrap_err();
            assert!(matches!(given_up, DriverError::DeviceReplaced), "{given_up}");
            fake.state().mischief = Mischief::None;
            client.reopen().unwrap();
            client.noop().unwrap();
        }
    }
    for mischief in [Mischief::Noise, Mischief::EndlessListing, Mischief::HugeResult] {
        let fake = Fake::new(false);
        let (_device, mut client) = open(&fake, Mode::FILE, Duration::ZERO);
        fake.state().mischief = mischief;
        let error = client.list("share").unwrap_err();
        assert!(
            matches!(error, DriverError::DeviceContract(_) | DriverError::Refused(_)),
            "{mischief:?}: {error}"
        );
    }
}

#[test]
fn a_replaced_device_is_set_up_again() {
    let fake = Fake::new(false);
    fake.state().files.insert("share/a".into(), pattern(100));
    let (device, mut client) = open(&fake, Mode::FILE, Duration::ZERO);
    let file = client.open_for_reading("share/a").unwrap();
    let session = device.facts().session;
    fake.replace();
    assert!(matches!(device.check_health(), Err(DriverError::DeviceReplaced)));
    client.reopen().unwrap();
    assert_ne!(device.facts().session, session);
    client.noop().unwrap();
    let buffer = client.allocate(4096).unwrap();
    let stale = client.read_at(file.handle, 0, &buffer, 0, 100).unwrap_err();
    assert_eq!(stale.status(), Some(Status::STALE));
    assert!(stale.is_recoverable());
}

#[test]
fn a_question_that_changes_nothing_is_asked_again_after_a_restore() {
    let fake = Fake::new(false);
    let (_device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
    fake.replace();
    // No answer comes; the sleeper finds out by itself after a health interval, and asks the new device.
    assert_eq!(client.identity().unwrap().number, 42);
}

#[test]
fn a_restore_is_noticed_though_a_neighbours_interrupts_keep_coming() {
    let fake = Fake::new(false);
    let (_device, mut client) = open(&fake, Mode::CHAT, Duration::ZERO);
    client.post_receives(&mut Receiver::default(), 1).unwrap();
    fake.replace();
    let waited = std::thread::scope(|scope| {
        scope.spawn(|| fake.is_noisy());
        let deadline = Instant::now() + Duration::from_secs(60);
        let waited = client.channel().wait(Some(deadline));
        fake.falls_silent();
        waited
    });
    assert!(matches!(waited, Err(DriverError::DeviceReplaced)), "{waited:?}");
}

#[test]
fn a_restore_between_the_device_and_its_ring_is_nothing() {
    let fake = Fake::new(false);
    let device = Device::open(Arc::clone(&fake) as Arc<dyn vmgmt_driver::backing::Backing>).unwrap();
    // The ring's enable falls into a device that is being reset for a restore.
    fake.replace_at_enable();
    let mut client = Client::new(Ring::open(&device, RingOptions::new(Mode::COMMON)).unwrap());
    client.noop().unwrap();
}

#[test]
fn bus_mastering_that_somebody_turned_off_is_turned_on_again() {
    let fake = Fake::new(false);
    let (_device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
    fake.state().command &= !COMMAND_MASTER;
    // Nothing was reset: the question is not asked again, its answer only comes later.
    let tag = client.start(Request::new(Opcode::NOOP)).unwrap();
    assert_eq!(client.await_ok(tag).unwrap().status, Status::OK);
    assert_eq!(fake.state().command & COMMAND_MASTER, COMMAND_MASTER);
}

#[test]
fn a_doorbell_that_got_lost_is_rung_again() {
    let fake = Fake::new(false);
    let (_device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
    fake.state().deaf_doorbells = 1;
    client.start(Request::new(Opcode::NOOP)).unwrap();
    assert_eq!(fake.state().deaf_doorbells, 0, "nobody rang");
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(client.channel().wait(Some(deadline)).unwrap());
    assert_eq!(client.channel().counters().doorbells_again, 1);
}

#[test]
fn a_frozen_device_is_waited_for() {
    let fake = Fake::new(false);
    let device = Device::open(Arc::clone(&fake) as Arc<dyn vmgmt_driver::backing::Backing>).unwrap();
    fake.state().frozen = true;
    let (said, notices) = std::sync::mpsc::channel();
    device.set_notice(move |text| said.send(text.to_owned()).unwrap());
    std::thread::scope(|scope| {
        let opened = scope.spawn(|| Ring::open(&device, RingOptions::new(Mode::COMMON)));
        let notice = notices.recv_timeout(Duration::from_secs(60));
        fake.thaw();
        Client::new(opened.join().unwrap().unwrap()).noop().unwrap();
        assert!(notice.unwrap().contains("frozen"));
    });
}

#[test]
fn who_waits_for_a_frozen_device_can_be_interrupted() {
    let fake = Fake::new(false);
    let device = Device::open(Arc::clone(&fake) as Arc<dyn vmgmt_driver::backing::Backing>).unwrap();
    fake.state().frozen = true;
    let (read, write) = std::io::pipe().unwrap();
    device.set_cancel(Some(Arc::new(read.into())));
    drop(write);
    let error = Ring::open(&device, RingOptions::new(Mode::COMMON)).unwrap_err();
    assert!(matches!(error, DriverError::Interrupted), "{error}");
}

#[test]
fn a_ring_whose_registers_are_not_decoded_is_not_taken_for_closed() {
    for undecoded in [0, u32::MAX] {
        let fake = Fake::new(false);
        let (_device, client) = open(&fake, Mode::COMMON, Duration::ZERO);
        fake.state().undecoded = undecoded;
        // As a reset of the function through sysfs leaves it for a moment, but that the bus is still the device's.
        fake.state().command &= !COMMAND_MEMORY;
        drop(client);
        assert_eq!(fake.open_rings(), 0, "undecoded registers read {undecoded:#x}");
    }
}

#[test]
fn a_device_that_cannot_be_asked_loses_the_bus_before_memory_goes_back() {
    for undecoded in [0, u32::MAX] {
        let fake = Fake::new(false);
        let before = fake.shared.memory.free_pages();
        let (device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
        let other = Ring::open(&device, RingOptions::new(Mode::COMMON)).unwrap();
        fake.state().undecoded = undecoded;
        fake.state().deaf = true;
        drop(other);
        assert_eq!(fake.state().command & COMMAND_MASTER, 0);
        fake.state().deaf = false;
        // The ring that was given up is open for the device still: the bus does not come back before a reset has closed it.
        assert!(matches!(device.check_health(), Err(DriverError::DeviceReplaced)));
        assert_eq!(fake.state().command & COMMAND_MASTER, 0);
        let resets = fake.state().resets;
        let error = client.start(Request::new(Opcode::NOOP)).unwrap_err();
        assert!(error.is_recoverable(), "{error}");
        client.reopen().unwrap();
        assert_eq!(fake.state().resets, resets + 1);
        client.noop().unwrap();
        drop(client);
        assert_eq!(fake.shared.memory.free_pages(), before);
        fake.state().deaf = true;
        drop(device);
        assert_eq!(fake.state().command & COMMAND_MASTER, 0);
    }
}

#[test]
fn memory_stays_with_a_device_that_nothing_reaches() {
    let fake = Fake::new(false);
    let (device, client) = open(&fake, Mode::COMMON, Duration::ZERO);
    let during = fake.shared.memory.free_pages();
    fake.state().deaf = true;
    fake.state().unplugged = true;
    drop(client);
    drop(device);
    assert_eq!(fake.shared.memory.free_pages(), during);
}

#[test]
fn a_message_that_was_delivered_before_a_reset_is_not_lost_with_it() {
    let fake = Fake::new(false);
    let (_device, mut client) = open(&fake, Mode::CHAT, Duration::ZERO);
    let mut receiver = Receiver::default();
    client.post_receives(&mut receiver, 4).unwrap();
    client.noop().unwrap();
    let deliver = |text: &[u8]| {
        let head = MessageHeader {
            sequence: 1,
            source: 3,
            message_bytes: text.len() as u64,
            accepted_ns: 1,
            source_name_bytes: 2,
            flags: 0,
        };
        let bytes = [head.as_bytes(), b"vm", text].concat();
        fake.answer_receive(&bytes, text.len() as u64, 0);
    };
    // One that was taken off the ring and not asked for, two that nobody looked at.
    deliver(b"first");
    client.noop().unwrap();
    deliver(b"second");
    deliver(b"third");
    fake.replace();
    let late = client.reopen_receiving(&mut receiver).unwrap();
    let texts: Vec<&[u8]> = late.iter().map(|message| &*message.bytes).collect();
    assert_eq!(texts, [&b"first"[..], b"second", b"third"]);
    assert_eq!(receiver.posted(), 0);
    client.noop().unwrap();
}

#[test]
fn only_a_message_with_a_key_is_sent_again_after_a_restore() {
    let fake = Fake::new(false);
    let (_device, mut client) = open(&fake, Mode::CHAT, Duration::ZERO);
    fake.replace();
    let unkeyed = client.send("other", b"once", 0);
    assert!(matches!(unkeyed, Err(DriverError::DeviceReplaced)), "{unkeyed:?}");
    client.reopen().unwrap();
    fake.replace();
    // What the new device answers does not matter: it was asked.
    let keyed = client.send("other", b"once", 7);
    assert!(!matches!(keyed, Err(DriverError::DeviceReplaced)), "{keyed:?}");
}

#[test]
fn receives_are_posted_cancelled_and_put_together() {
    let fake = Fake::new(false);
    let (device, mut client) = open(&fake, Mode::CHAT, Duration::ZERO);
    let mut receiver = Receiver::default();
    client.post_receives(&mut receiver, 4).unwrap();
    let none = client
        .receive(&mut receiver, Some(Instant::now() + Duration::from_millis(20)))
        .unwrap();
    assert_eq!(none, None);
    // Taken in order: when this is answered, the device has those before.
    client.noop().unwrap();
    assert_eq!(fake.receives(), 4);
    let head = |flags| MessageHeader {
        sequence: 9,
        source: 3,
        message_bytes: 8,
        accepted_ns: 1,
        source_name_bytes: 2,
        flags,
    };
    let mut first = head(0).as_bytes().to_vec();
    first.extend(b"vmabcd");
    let mut second = head(vmgmt_driver::abi::chat::message_flag::CONTINUED)
        .as_bytes()
        .to_vec();
    second.extend(b"efgh");
    fake.answer_receive(&first, 4, completion_flag::MORE);
    fake.answer_receive(&second, 0, 0);
    let message = client.receive(&mut receiver, None).unwrap().unwrap();
    assert_eq!(
        (message.source_name.as_str(), message.bytes.as_slice()),
        ("vm", &b"abcdefgh"[..])
    );
    assert_eq!(client.withdraw_receives(&mut receiver).unwrap(), []);
    assert_eq!(fake.receives(), 0);

    // Pieces that do not belong together, and a head that lies.
    client.post_receives(&mut receiver, 2).unwrap();
    client.noop().unwrap();
    fake.answer_receive(&second, 0, 0);
    assert!(matches!(
        client.receive(&mut receiver, None),
        Err(DriverError::DeviceContract(_))
    ));
    let lie = MessageHeader {
        source_name_bytes: u32::MAX,
        ..head(0)
    };
    fake.answer_receive(lie.as_bytes(), 0, 0);
    assert!(matches!(
        client.receive(&mut receiver, None),
        Err(DriverError::DeviceContract(_))
    ));

    // Ctrl-C ends a wait, and what was posted goes with the ring.
    client.post_receives(&mut receiver, 1).unwrap();
    let (read, write) = std::io::pipe().unwrap();
    device.set_cancel(Some(Arc::new(read.into())));
    drop(write);
    assert!(matches!(
        client.receive(&mut receiver, None),
        Err(DriverError::Interrupted)
    ));
    drop(client);
    assert_eq!(fake.receives(), 0);
}

#[test]
fn memory_is_given_back() {
    let fake = Fake::new(true);
    let before = fake.shared.memory.free_pages();
    {
        let (_device, mut client) = open(&fake, Mode::FILE, Duration::ZERO);
        fake.state().files.insert("share/a".into(), pattern(3 << 20));
        client
            .get_to_memory("share/a", &TransferOptions::default())
            .unwrap();
        let mut receiver = Receiver::default();
        client.post_receives(&mut receiver, 5).unwrap();
    }
    assert_eq!(fake.shared.memory.free_pages(), before);
}

#[test]
fn what_a_list_cannot_hold_is_refused_with_advice() {
    let fake = Fake::new(true);
    let (_device, mut client) = open(&fake, Mode::COMMON, Duration::ZERO);
    let buffer = client.allocate(2 << 20).unwrap();
    let error = client
        .start(Request::new(Opcode::NOOP).output(&buffer, 0, 2 << 20, 0))
        .unwrap_err();
    assert!(error.to_string().contains("huge pages"), "{error}");
}

#[test]
fn rings_run_out_and_come_back() {
    let fake = Fake::new(false);
    let device = Device::open(Arc::clone(&fake) as Arc<dyn vmgmt_driver::backing::Backing>).unwrap();
    let open = || Ring::open(&device, RingOptions::new(Mode::COMMON));
    let four: Vec<Ring> = (0..4).map(|_| open().unwrap()).collect();
    assert!(open().is_err());
    drop(four);
    assert_eq!(open().unwrap().in_flight(), 0);
}
