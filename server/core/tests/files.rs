//! File mode: names, handles and puts, with the failures of each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod house;

use house::{Ask, House, config, failed};
use vmgmt_abi::file::{DirectoryEntry, FileStat, SIZE_UNKNOWN, ShareEntry, existing, open, put};
use vmgmt_abi::ring::{completion_flag, flag};
use vmgmt_abi::{Budget, Opcode, Status};
use vmgmt_core::{Effect, Input};
use vmgmt_device::rings::Channel;
use zerocopy::FromBytes;

const A: u64 = 11;
const B: u64 = 12;

fn put_ask(path: &str) -> Ask {
    Ask::new(Opcode::PUT).meta(path).offset(SIZE_UNKNOWN)
}

fn write(handle: u64, offset: u64, data: &[u8]) -> Ask {
    Ask::new(Opcode::WRITE).handle(handle).offset(offset).data(data)
}

fn commit(handle: u64, bytes: u64) -> Ask {
    Ask::new(Opcode::COMMIT).handle(handle).offset(bytes).room(128)
}

fn checked(handle: u64, contents: &[u8]) -> Ask {
    commit(handle, contents.len() as u64)
        .argument(u64::from(crc32fast::hash(contents)))
        .flags(flag::CHECK)
}

fn no_leftovers(house: &House) {
    assert!(
        house.files.keys().all(|(_, path)| !path.contains(".vmgmt-put-")),
        "{:?}",
        house.files.keys()
    );
    assert_eq!(
        (
            house.slots_open(),
            house.hub.effects_open(),
            house.hub.submissions_open()
        ),
        (0, 0, 0)
    );
}

#[test]
fn a_put_appears_only_complete_under_the_name_it_got() {
    let mut house = House::new();
    let handle = house.ok(A, put_ask("rw/dir/file"));
    house.ok(A, write(handle, 6, b"world"));
    house.ok(A, write(handle, 0, b"hello "));
    assert!(house.file("rw", "dir/file").is_none());
    let done = house.ask(A, checked(handle, b"hello world"));
    let (answer, name) = house.answer(done);
    assert_eq!((answer.status, name.as_slice()), (0, b"rw/dir/file".as_slice()));
    assert_eq!(house.file("rw", "dir/file").unwrap(), b"hello world");
    house.fails(A, commit(handle, 11), Status::STALE);
    no_leftovers(&house);
}

#[test]
fn a_wrong_checksum_leaves_no_file() {
    let mut house = House::new();
    let handle = house.ok(A, put_ask("rw/f"));
    house.ok(A, write(handle, 0, b"hello"));
    house.fails(
        A,
        commit(handle, 5).argument(1).flags(flag::CHECK),
        Status::INTEGRITY,
    );
    assert!(house.files.is_empty());
    house.fails(A, write(handle, 0, b"x"), Status::STALE);
    no_leftovers(&house);
}

#[test]
fn holes_rewrites_and_cut_ends_are_read_back_for_the_checksum() {
    let mut house = House::new();
    // A hole in the middle, one at the end.
    let handle = house.ok(A, put_ask("rw/sparse"));
    house.ok(A, write(handle, 4, b"data"));
    house.ok(A, checked(handle, b"\0\0\0\0data\0\0"));
    // Written twice, then cut.
    let handle = house.ok(A, put_ask("rw/cut"));
    house.ok(A, write(handle, 0, b"0123456789"));
    house.ok(A, write(handle, 3, b"xyz"));
    house.ok(A, checked(handle, b"012xyz67"));
    assert_eq!(house.file("rw", "cut").unwrap(), b"012xyz67");
    // Many holes: the whole file is read back once.
    let handle = house.ok(A, put_ask("rw/many"));
    let mut contents = Vec::new();
    for index in 0..40_u8 {
        house.ok(A, write(handle, contents.len() as u64, &[index]));
        contents.extend([index, 0]);
    }
    house.ok(A, checked(handle, &contents));
    let handle = house.ok(A, put_ask("rw/empty"));
    house.ok(A, checked(handle, b""));
    no_leftovers(&house);
}

#[test]
fn an_unchecked_put_pays_for_no_checksum_but_gets_one_that_commit_says_all_the_same() {
    for (crc32, status) in [
        (None, Status::OK),
        (Some(0), Status::OK),
        (Some(1), Status::INTEGRITY),
    ] {
        let mut house = House::new();
        let handle = house.ok(A, put_ask("rw/f").argument(put::UNCHECKED));
        house.manual = true;
        house.ask(A, write(handle, 2, b"cdef"));
        house.ask(A, write(handle, 0, b"ab"));
        let unasked = |effect: &Effect| matches!(effect, Effect::Write { checksum: false, .. });
        assert!(
            house.pending.iter().all(|(_, effect)| unasked(effect)),
            "{:?}",
            house.pending
        );
        house.settle();
        let commit = match crc32 {
            Some(change) => commit(handle, 6)
                .flags(flag::CHECK)
                .argument(u64::from(crc32fast::hash(b"abcdef") ^ change)),
            None => commit(handle, 6),
        };
        let done = house.ask(A, commit);
        let read_back = house
            .pending
            .iter()
            .any(|(_, effect)| matches!(effect, Effect::Checksum { .. }));
        assert_eq!(read_back, crc32.is_some());
        house.settle();
        assert_eq!(house.status(done), status);
        assert_eq!(house.file("rw", "f").is_some(), status == Status::OK);
        no_leftovers(&house);
    }
}

#[test]
fn a_commit_waits_for_the_writes_before_it() {
    let mut house = House::new();
    let handle = house.ok(A, put_ask("rw/f"));
    house.manual = true;
    let first = house.ask(A, write(handle, 0, b"ab"));
    let second = house.ask(A, write(handle, 2, b"cd"));
    let done = house.ask(A, checked(handle, b"abcd"));
    let busy = house.ask(A, write(handle, 4, b"e"));
    assert_eq!(house.status(busy), Status::BUSY);
    while house.step(1) {}
    for token in [first, second, done] {
        assert_eq!(house.status(token), Status::OK);
    }
    assert_eq!(house.file("rw", "f").unwrap(), b"abcd");
}

#[test]
fn an_existing_target_is_refused_replaced_or_renamed() {
    let mut house = House::new();
    house.files.insert(("rw".into(), "f".into()), b"old".to_vec());
    let handle = house.ok(A, put_ask("rw/f"));
    house.fails(A, commit(handle, 0), Status::EXISTS);
    house.ok(A, Ask::new(Opcode::CLOSE).handle(handle));
    let handle = house.ok(A, put_ask("rw/f").argument(existing::RENAME));
    let done = house.ask(A, commit(handle, 0));
    assert_eq!(house.answer(done).1, b"rw/f.1");
    let handle = house.ok(A, put_ask("rw/f").argument(existing::REPLACE));
    house.ok(A, commit(handle, 2));
    assert_eq!(house.file("rw", "f").unwrap(), b"\0\0");
    no_leftovers(&house);
}

#[test]
fn a_broken_put_is_resumed_and_the_prefix_can_be_checked() {
    let mut house = House::new();
    let resumable = || put_ask("rw/f").argument(put::RESUME);
    let handle = house.ok(A, resumable());
    house.ok(A, write(handle, 0, b"half"));
    house.fails(A, resumable(), Status::BUSY);
    house.close_session(A);
    assert_eq!(house.slots_open(), 0);
    house.input(Input::SessionOpened { session: 21, vm: 1 });
    let opened = house.ask(21, resumable());
    let answer = house.answer(opened).0;
    assert_eq!(answer.extra, 4, "bytes that are there");
    let handle = answer.result;
    let looked = house.ask(21, Ask::new(Opcode::CHECKSUM).handle(handle).argument(4));
    assert_eq!(house.answer(looked).0.extra, u64::from(crc32fast::hash(b"half")));
    house.ok(21, write(handle, 4, b"done"));
    house.ok(21, checked(handle, b"halfdone"));
    assert_eq!(house.file("rw", "f").unwrap(), b"halfdone");
    // Another VM's put of the same path is its own.
    let handle = house.ok(B, put_ask("rw/f").argument(existing::REPLACE));
    house.ok(B, Ask::new(Opcode::CLOSE).handle(handle));
    no_leftovers(&house);
}

#[test]
fn an_abandoned_put_is_discarded_even_with_writes_under_way() {
    let mut house = House::new();
    let handle = house.ok(A, put_ask("rw/f"));
    house.manual = true;
    house.ask(A, write(handle, 0, b"x"));
    house.ask(A, put_ask("rw/g"));
    house.close_session(A);
    house.settle();
    assert!(house.files.is_empty());
    no_leftovers(&house);
}

#[test]
fn handles_read_write_truncate_sync_and_close() {
    let mut house = House::new();
    let bits = open::READ | open::WRITE | open::CREATE;
    let handle = house.ok(A, Ask::new(Opcode::OPEN).meta("rw/f").argument(bits));
    assert_eq!(house.ok(A, write(handle, 0, b"0123456789")), 10);
    let read = house.ask(A, Ask::new(Opcode::READ).handle(handle).offset(8).room(8));
    assert_eq!(house.answer(read).0.result, 2, "fewer only at the end");
    assert_eq!(&house.buffers[&read][..2], b"89");
    house.ok(A, Ask::new(Opcode::TRUNCATE).handle(handle).offset(5));
    house.ok(A, Ask::new(Opcode::FSYNC).handle(handle));
    let looked = house.ask(A, Ask::new(Opcode::CHECKSUM).handle(handle).argument(100));
    let answer = house.answer(looked).0;
    assert_eq!(
        (answer.result, answer.extra),
        (5, u64::from(crc32fast::hash(b"01234")))
    );
    house.fails(
        A,
        Ask::new(Opcode::READ).handle(handle).offset(u64::MAX).room(8),
        Status::BAD_ARGUMENT,
    );
    house.fails(B, Ask::new(Opcode::READ).handle(handle).room(8), Status::STALE);
    house.ok(A, Ask::new(Opcode::CLOSE).handle(handle));
    house.fails(A, Ask::new(Opcode::READ).handle(handle).room(8), Status::STALE);
    house.fails(A, Ask::new(Opcode::CLOSE).handle(handle), Status::STALE);
    no_leftovers(&house);
}

#[test]
fn rights_of_handles_and_shares_hold() {
    let mut house = House::new();
    house.files.insert(("ro".into(), "f".into()), b"x".to_vec());
    let handle = house.ok(A, Ask::new(Opcode::OPEN).meta("ro/f").argument(open::READ));
    house.fails(A, write(handle, 0, b"y"), Status::DENIED);
    house.fails(A, Ask::new(Opcode::TRUNCATE).handle(handle), Status::DENIED);
    house.fails(
        A,
        Ask::new(Opcode::OPEN).meta("ro/f").argument(open::WRITE),
        Status::READ_ONLY,
    );
    house.fails(A, put_ask("ro/g"), Status::READ_ONLY);
    for opcode in [Opcode::REMOVE, Opcode::MAKE_DIRECTORY] {
        house.fails(A, Ask::new(opcode).meta("ro/f"), Status::READ_ONLY);
        house.fails(A, Ask::new(opcode).meta("secret/f"), Status::NO_SUCH_NAME);
        house.fails(A, Ask::new(opcode).meta("rw"), Status::BAD_ARGUMENT);
        house.fails(A, Ask::new(opcode).meta("rw/../etc"), Status::BAD_ARGUMENT);
    }
    house.fails(
        A,
        Ask::new(Opcode::OPEN).meta("rw/f").argument(0),
        Status::BAD_ARGUMENT,
    );
    house.fails(
        A,
        Ask::new(Opcode::OPEN)
            .meta("rw/f")
            .argument(open::READ | open::CREATE),
        Status::BAD_ARGUMENT,
    );
    house.fails(
        A,
        Ask::new(Opcode::OPEN).meta("rw/f").argument(1 << 30),
        Status::BAD_ARGUMENT,
    );
    house.fails(A, put_ask("rw/f").argument(3), Status::BAD_ARGUMENT);
    house.fails(A, put_ask("rw/f").handle(1), Status::BAD_ARGUMENT);
    house.fails(A, put_ask("rw/.vmgmt-put-1-0"), Status::BAD_ARGUMENT);
    assert!(
        house
            .logs
            .iter()
            .any(|(_, text)| text.contains("granted read-only"))
    );
}

#[test]
fn names_are_made_renamed_removed_and_looked_at() {
    let mut house = House::new();
    house.files.insert(("rw".into(), "f".into()), b"12345".to_vec());
    let looked = house.ask(A, Ask::new(Opcode::STAT).meta("rw/f").room(32));
    assert_eq!(
        FileStat::read_from_bytes(&house.answer(looked).1).unwrap().size,
        5
    );
    house.fails(A, Ask::new(Opcode::STAT).meta("rw/f").room(31), Status::TOO_LARGE);
    house.ok(A, Ask::new(Opcode::RENAME).meta("rw/f\0rw/g"));
    house.fails(
        A,
        Ask::new(Opcode::RENAME).meta("rw/f\0rw/h"),
        Status::NO_SUCH_NAME,
    );
    house.fails(A, Ask::new(Opcode::RENAME).meta("rw/f\0ro/g"), Status::READ_ONLY);
    house.fails(A, Ask::new(Opcode::RENAME).meta("rw/f"), Status::BAD_ARGUMENT);
    house.ok(A, Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d"));
    house.fails(A, Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d"), Status::EXISTS);
    house.ok(A, Ask::new(Opcode::REMOVE).meta("rw/g"));
    house.fails(
        A,
        Ask::new(Opcode::STAT).meta("rw/g").room(32),
        Status::NO_SUCH_NAME,
    );
}

#[test]
fn what_a_life_before_may_have_done_is_not_called_a_failure() {
    let mut house = House::new();
    // Without an intent in the journal nothing was done: these are new.
    house.fails(
        A,
        Ask::new(Opcode::REMOVE).meta("rw/x").again(),
        Status::NO_SUCH_NAME,
    );
    house.ok(A, Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d").again());
    house.fails(
        A,
        Ask::new(Opcode::MAKE_DIRECTORY).meta("rw/d").again(),
        Status::EXISTS,
    );
    house.fails(A, commit(5, 0).again(), Status::OUTCOME_UNKNOWN);
    house.fails(A, write(5, 0, b"x").again(), Status::STALE);
    house.ok(A, Ask::new(Opcode::CLOSE).handle(5).again());
}

#[test]
fn a_commit_that_comes_again_and_meets_a_broken_disk_may_have_given_the_name() {
    for (again, status, answered) in [
        (true, Status::IO_ERROR, Status::OUTCOME_UNKNOWN),
        (true, Status::EXISTS, Status::EXISTS),
        (false, Status::IO_ERROR, Status::IO_ERROR),
    ] {
        let mut house = House::new();
        let put = Ask::new(Opcode::PUT).meta("rw/p").offset(4);
        let handle = house.ok(A, put);
        house.ok(A, write(handle, 0, b"data"));
        house.manual = true;
        let ask = commit(handle, 4);
        let token = house.ask(A, if again { ask.again() } else { ask });
        let (effect, what) = house.pending.pop().unwrap();
        assert!(matches!(what, Effect::Commit { again: told, .. } if told == again));
        let outcome = failed(status);
        house.input(Input::Outcome { effect, outcome });
        assert_eq!(house.status(token), answered);
    }
}

#[test]
fn listings_go_on_at_their_cursor() {
    let mut house = House::new();
    for name in ["one", "three", "two"] {
        house.files.insert(("rw".into(), name.into()), Vec::new());
    }
    let (mut cursor, mut names) = (0, Vec::new());
    loop {
        let listed = house.ask(A, Ask::new(Opcode::LIST).meta("rw").offset(cursor).room(50));
        let (answer, payload) = house.answer(listed).clone();
        let (entry, name) = DirectoryEntry::read_from_prefix(&payload).unwrap();
        names.push(String::from_utf8(name[..entry.name_bytes as usize].to_vec()).unwrap());
        assert_eq!((answer.result, payload.len()), (48, 48));
        cursor = answer.extra;
        if answer.flags & completion_flag::MORE == 0 {
            break;
        }
    }
    assert_eq!(names, ["one", "three", "two"]);
    house.fails(A, Ask::new(Opcode::LIST).meta("rw").room(40), Status::TOO_LARGE);
    let shares = house.ask(A, Ask::new(Opcode::SHARES).room(24));
    let (answer, payload) = house.answer(shares).clone();
    assert_eq!((answer.extra, answer.flags), (1, completion_flag::MORE));
    assert_eq!(ShareEntry::read_from_prefix(&payload).unwrap().0.writable, 1);
    let shares = house.ask(A, Ask::new(Opcode::SHARES).offset(1).room(24));
    assert_eq!(
        ShareEntry::read_from_prefix(&house.answer(shares).1)
            .unwrap()
            .0
            .writable,
        0
    );
}

#[test]
fn budgets_are_named() {
    let mut poor = config(1, "a");
    poor.limits.open_files_max = 1;
    poor.limits.bytes_in_flight_max = 100;
    poor.limits.submissions_in_flight_max = 3;
    let mut house = House::with(vec![poor]);
    let handle = house.ok(A, put_ask("rw/f"));
    let budget = |house: &mut House, ask: Ask| {
        let token = house.ask(A, ask);
        assert_eq!(house.status(token), Status::OVER_BUDGET);
        Budget(house.answer(token).0.detail)
    };
    assert_eq!(budget(&mut house, put_ask("rw/g")), Budget::OPEN_FILES);
    assert_eq!(
        budget(&mut house, write(handle, 0, &[0; 101])),
        Budget::BYTES_IN_FLIGHT
    );
    house.manual = true;
    for _ in 0..3 {
        house.ask(A, Ask::new(Opcode::FSYNC).handle(handle));
    }
    assert_eq!(
        budget(&mut house, Ask::new(Opcode::FSYNC).handle(handle)),
        Budget::SUBMISSIONS_IN_FLIGHT
    );
    house.settle();
    house.manual = false;
    house.ok(A, Ask::new(Opcode::CLOSE).handle(handle));
    house.ok(A, put_ask("rw/g"));
}

#[test]
fn a_rate_delays_then_refuses_and_the_log_is_not_flooded() {
    let mut slow = config(1, "a");
    slow.limits.submissions_per_second_max = 10;
    let mut house = House::with(vec![slow]);
    let tokens: Vec<_> = (0..40)
        .map(|_| house.ask(A, Ask::new(Opcode::SHARES).room(100)))
        .collect();
    let answered = |house: &House, status: Status| {
        tokens
            .iter()
            .filter(|token| {
                house
                    .answers
                    .get(token)
                    .is_some_and(|answer| answer.0.status == status.0)
            })
            .count()
    };
    assert_eq!(
        (
            answered(&house, Status::OK),
            answered(&house, Status::OVER_BUDGET)
        ),
        (10, 20)
    );
    assert_eq!(house.logs.len(), 1, "{:?}", house.logs);
    house.pass_ns(500_000_000);
    assert_eq!(answered(&house, Status::OK), 15);
    house.input(Input::Cancel(tokens[19]));
    assert_eq!(house.status(tokens[19]), Status::CANCELLED);
    house.pass_ns(500_000_000);
    assert_eq!(answered(&house, Status::OK), 19);
    assert!(house.hub.poll_timeout().is_some_and(|at| at > house.now));
}

#[test]
fn a_read_ends_only_when_its_buffer_is_quiet_others_at_once() {
    let mut house = House::new();
    house.files.insert(("rw".into(), "f".into()), b"x".to_vec());
    let handle = house.ok(
        A,
        Ask::new(Opcode::OPEN)
            .meta("rw/f")
            .argument(open::READ | open::WRITE),
    );
    house.manual = true;
    let read = house.ask(A, Ask::new(Opcode::READ).handle(handle).room(8).deadline_ns(100));
    let written = house.ask(A, write(handle, 0, b"y").deadline_ns(100));
    house.pass_ns(100);
    assert_eq!(house.status(written), Status::TIMED_OUT);
    assert!(!house.answers.contains_key(&read));
    let (effect, _) = house.pending.remove(0);
    house.input(Input::Outcome {
        effect,
        outcome: failed(Status::IO_ERROR),
    });
    assert_eq!(house.status(read), Status::TIMED_OUT);
    house.settle();
    house.manual = false;
    house.ok(A, Ask::new(Opcode::CLOSE).handle(handle));
    no_leftovers(&house);
}

#[test]
fn an_open_that_nobody_waits_for_is_closed_again() {
    let mut house = House::new();
    house.files.insert(("rw".into(), "f".into()), Vec::new());
    house.manual = true;
    let opened = house.ask(A, Ask::new(Opcode::OPEN).meta("rw/f").argument(open::READ));
    let put = house.ask(A, put_ask("rw/g"));
    house.input(Input::Cancel(opened));
    house.input(Input::Cancel(put));
    assert_eq!(
        (house.status(opened), house.status(put)),
        (Status::CANCELLED, Status::CANCELLED)
    );
    house.settle();
    assert_eq!(house.hub.vm_statuses()[0].open_files, 0);
    no_leftovers(&house);
}

#[test]
fn vms_take_turns_when_the_disk_is_busy() {
    let mut house = House::new();
    house.repack = false;
    house.manual = true;
    let stat = || Ask::new(Opcode::STAT).meta("rw/f").room(32);
    for _ in 0..200 {
        house.ask(A, stat());
    }
    assert_eq!(house.pending.len(), 32, "one VM has its share of the pool");
    let other = house.ask(B, stat());
    assert_eq!(house.pending.len(), 33);
    let last = house.pending.len() - 1;
    house.step(last);
    assert!(
        house.answers.contains_key(&other),
        "another VM does not wait behind it"
    );
    house.settle();
    no_leftovers(&house);
}

#[test]
fn the_port_window_gives_the_same_in_small() {
    let mut house = House::new();
    let port = Channel::Port;
    let token = house.ask_on(A, port, put_ask("rw/f"));
    let handle = house.answer(token).0.result;
    let token = house.ask_on(A, port, write(handle, 0, b"by port"));
    assert_eq!(house.answer(token).0.result, 7);
    let token = house.ask_on(A, port, checked(handle, b"by port"));
    assert_eq!(house.status(token), Status::OK);
    house.manual = true;
    let opened = house.ask_on(A, port, Ask::new(Opcode::OPEN).meta("rw/f").argument(open::READ));
    house.settle();
    let handle = house.answer(opened).0.result;
    house.ask_on(A, port, Ask::new(Opcode::READ).handle(handle).room(10_000));
    let Effect::Read { into, .. } = &house.pending[0].1 else {
        panic!("{:?}", house.pending)
    };
    assert_eq!(into.bytes, 4096, "no more than the window holds");
}

#[test]
fn broken_puts_are_swept_now_and_then() {
    let mut house = House::new();
    house
        .files
        .insert(("rw".into(), ".vmgmt-put-1-0".into()), Vec::new());
    let at = house.hub.poll_timeout().unwrap();
    house.pass_ns(at.since_ns(house.now));
    no_leftovers(&house);
    assert!(house.hub.poll_timeout().is_some());
}

#[test]
fn modes_without_work_and_unknown_operations_are_answered_cleanly() {
    let mut house = House::new();
    for opcode in [0x0300, 0x0401, 0x01ff, 0x010f, 0x02ff, 0x0042, 0xff00] {
        house.fails(A, Ask::new(Opcode(opcode)), Status::NOT_SUPPORTED);
    }
    let token = house.ask(A, Ask::new(Opcode::IDENTITY).room(10));
    let (answer, name) = house.answer(token);
    assert_eq!(
        (answer.result, answer.extra, name.as_slice()),
        (1, 1, b"a".as_slice())
    );
    let token = house.ask(99, Ask::new(Opcode::IDENTITY));
    assert_eq!(house.status(token), Status::NOT_READY);
}

#[test]
fn what_ended_does_not_gather_behind_a_handle_that_a_hung_disk_keeps_closed() {
    let mut house = House::new();
    let handle = house.ok(A, Ask::new(Opcode::OPEN).meta("rw/f").argument(0b111));
    house.manual = true;
    house.crash();
    // Its file is being opened again, and the disk does not answer.
    let saved = |house: &House| house.hub.save().to_bytes().len();
    let mut before = 0;
    for round in 0..50 {
        let read = Ask::new(Opcode::READ)
            .handle(handle)
            .meta("x".repeat(2000))
            .room(8);
        let cancelled = house.ask(A, read.clone());
        house.cancel(cancelled);
        assert_eq!(house.status(cancelled), Status::CANCELLED);
        let late = house.ask(A, read.clone().deadline_ns(1));
        house.pass_ns(2);
        assert_eq!(house.status(late), Status::TIMED_OUT);
        let void = house.ask(A, read);
        house.open.remove(&void);
        house.input(Input::Void(void));
        if round == 0 {
            before = saved(&house);
        }
    }
    assert!(
        saved(&house) < before + 200,
        "{} bytes, then {}",
        before,
        saved(&house)
    );
    // Who waits in earnest is served when the disk is.
    let read = house.ask(A, Ask::new(Opcode::READ).handle(handle).room(8));
    house.settle();
    assert_eq!(house.status(read), Status::OK);
}
