//! The hub's state as earlier versions wrote it is read by the code of today; what a later version wrote is refused by name.
//!
//! `UPDATE_GOLDEN=1 cargo test -p vmgmt-host --test state_versions` writes `tests/golden/hub-state-v1-as-2-writes-it.bin` anew: once for each version,
//! and never again once a release has that version. (Version 1 was written by a program of before.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod version_1;

use std::path::PathBuf;
use vmgmt_abi::{Mode, Opcode};
use vmgmt_core::interface::{ControlReply, ControlRequest, Input, Output};
use vmgmt_core::policy::{VmConfig, VmLimits};
use vmgmt_core::{Change, Hub, Record, Saved, Settled, feature};
use vmgmt_device::Tick;
use vmgmt_device::page::{PlainWords, Words};
use vmgmt_device::rings::{Answer, Channel, Fetched, Token};
use vmgmt_host::core::journal::Journal;

/// Words of the golden state: enough for its snapshots.
const WORDS: usize = 8 + 2 * 1020;

/// Version 2 before it wrote version 1 where nothing newer is in use.
const SECOND: &str = "hub-state-v2.bin";
const NEWEST: &str = "hub-state-v1-as-2-writes-it.bin";

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(name)
}

fn words_of_golden(name: &str) -> PlainWords {
    let bytes = std::fs::read(golden(name))
        .unwrap_or_else(|error| panic!("{name}: {error}; UPDATE_GOLDEN=1 makes it"));
    words_of(&bytes)
}

fn vm(vm: u64, name: &str) -> VmConfig {
    VmConfig {
        vm,
        name: name.into(),
        shares: vec![],
        reach: vec![],
        send_to_all: false,
        limits: VmLimits::default(),
        transient: false,
    }
}

fn ask(hub: &mut Hub, request: ControlRequest) -> (Vec<Output>, Option<ControlReply>) {
    hub.handle(
        Tick(5),
        Input::Control {
            client: 1,
            id: 1,
            request,
        },
    );
    let outputs: Vec<_> = std::iter::from_fn(|| hub.poll_output()).collect();
    let reply = outputs.iter().find_map(|output| match output {
        Output::Control { reply, .. } => Some(reply.clone()),
        _ => None,
    });
    (outputs, reply)
}

/// A message of the second VM to the first, as its ring gives it to the hub.
fn from_db(text: &str) -> Input {
    Input::Submission(Box::new(Fetched {
        token: Token {
            session: 7,
            channel: Channel::Ring(3),
            index: 2,
            generation: 5,
        },
        mode: Mode::CHAT,
        opcode: Opcode::SEND,
        flags: 0,
        tag: 11,
        handle: 1,
        offset: 0,
        argument: 0,
        deadline: Tick::NEVER,
        meta: vec![],
        data_bytes: text.len() as u64,
        data: Some(text.into()),
        again: false,
    }))
}

/// Two VMs in a snapshot, and messages of the host for one of them: the first in the snapshot, the second in a record. Then records of
/// what the last inputs do.
fn write(last: impl IntoIterator<Item = Input>) -> Vec<u8> {
    let words = PlainWords::new(WORDS);
    let mut journal = Journal::open(words.clone()).unwrap();
    let mut hub = Hub::new(1);
    hub.handle(
        Tick(1),
        Input::WallClock {
            now_ns: 1_700_000_000_000_000_000,
        },
    );
    hub.handle(Tick(1), Input::Vm(vm(1, "web")));
    hub.handle(Tick(1), Input::Vm(vm(2, "db")));
    let send = |text: &str| ControlRequest::Send {
        key: 0,
        target: "web".into(),
        message: text.into(),
    };
    ask(&mut hub, send("in the snapshot"));
    journal.snapshot(&hub.snapshot().to_bytes()).unwrap();
    let mut outputs = ask(&mut hub, send("in a record")).0;
    for input in last {
        hub.handle(Tick(6), input);
        outputs.extend(std::iter::from_fn(|| hub.poll_output()));
    }
    for output in outputs {
        if let Output::Journal(record) = output {
            let mut bytes = Vec::new();
            record.write(&mut bytes);
            journal.append(&bytes).unwrap();
        }
    }
    let mut bytes = vec![0; WORDS * 8];
    words.read_bytes(0, &mut bytes);
    bytes
}

/// What version 2 has in a fixed form is in it too.
fn write_newest() -> Vec<u8> {
    let session = Input::SessionOpened { session: 7, vm: 2 };
    write([session, from_db("in a record of fixed form")])
}

fn words_of(bytes: &[u8]) -> PlainWords {
    let words = PlainWords::new(bytes.len() / 8);
    words.write_bytes(0, bytes);
    words
}

fn read(words: PlainWords) -> Hub {
    let recovered = Journal::open(words).unwrap().recover().unwrap();
    let saved = Saved::from_bytes(&recovered.snapshot.unwrap()).unwrap();
    assert!(!recovered.records.is_empty());
    let records = recovered.records.iter();
    let records = records.map(|record| Record::read(record).unwrap());
    Hub::replay(2, Some(saved), records).unwrap()
}

/// The fields of a saved structure.
type Fields = Vec<(ciborium::Value, ciborium::Value)>;

#[test]
fn what_each_version_wrote_is_read() {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(golden(NEWEST), write_newest()).unwrap();
    }
    for (name, messages) in [("hub-state-v1.bin", 2), (SECOND, 3), (NEWEST, 3)] {
        let mut hub = read(words_of_golden(name));
        let Some(ControlReply::Vms(vms)) = ask(&mut hub, ControlRequest::Vms).1 else {
            panic!("{name}: no answer")
        };
        let found: Vec<_> = vms
            .iter()
            .map(|vm| (vm.vm, vm.name.as_str(), vm.mailbox_messages))
            .collect();
        assert_eq!(found, [(1, "web", messages), (2, "db", 0)], "{name}");
    }
}

#[test]
fn what_is_written_today_is_what_version_1_wrote_in_effect() {
    let then = read(words_of_golden("hub-state-v1.bin"));
    assert_eq!(then.surviving(), read(words_of(&write([]))).surviving());
}

/// Byte for byte: a change of the form is seen here, and asks for a new version.
#[test]
fn what_is_written_today_is_what_it_was() {
    let mut bytes = vec![0; WORDS * 8];
    words_of_golden(NEWEST).read_bytes(0, &mut bytes);
    assert!(
        bytes == write_newest(),
        "the state is written in another form than {NEWEST} has: is it read by the program of before?"
    );
}

/// Mailboxes' messages, as version 1 finds them in a memory.
fn seen_by_version_1(words: PlainWords) -> Result<(Vec<Vec<u8>>, usize), String> {
    let recovered = Journal::open(words).unwrap().recover().unwrap();
    let saved = version_1::snapshot(&recovered.snapshot.unwrap())?;
    let accounts = saved.ledger.accounts.iter();
    let mut bodies: Vec<_> = accounts
        .flat_map(|account| {
            account
                .mailbox
                .held
                .iter()
                .map(|(_, held)| held.message.body.clone())
        })
        .collect();
    for record in &recovered.records {
        if let version_1::Record::Accepted { message, .. } = version_1::record(record)? {
            bodies.push(message.body);
        }
    }
    Ok((bodies, saved.ledger.origins.len()))
}

#[test]
fn the_program_of_version_1_reads_what_is_written_while_nothing_newer_is_in_use() {
    let messages =
        ["in the snapshot", "in a record", "in a record of fixed form"].map(|text| text.as_bytes().to_vec());
    let own = seen_by_version_1(words_of_golden("hub-state-v1.bin")).unwrap();
    assert_eq!(
        own,
        (messages[..2].to_vec(), 0),
        "the reader is the one of version 1"
    );
    assert_eq!(seen_by_version_1(words_of(&write([]))).unwrap(), own);
    assert_eq!(
        seen_by_version_1(words_of_golden(NEWEST)).unwrap(),
        (messages.to_vec(), 0)
    );
    // A send whose answer is not known to be published, in a snapshot.
    let hub = read(words_of_golden(NEWEST));
    let saved = version_1::snapshot(&hub.snapshot().to_bytes()).unwrap();
    let [(_, origin)] = &saved.ledger.origins[..] else {
        panic!("{:?}", saved.ledger.origins)
    };
    assert_eq!(origin.tag, 11);
    // Read again by this version it is what it was.
    let again = Saved::from_bytes(&hub.snapshot().to_bytes()).unwrap();
    assert_eq!(
        Hub::replay(3, Some(again), []).unwrap().surviving(),
        hub.surviving()
    );
}

/// As a record says it.
fn kept(change: Change, settled: Option<Settled>) -> Record {
    Record::Kept {
        settled: settled.into_iter().collect(),
        change,
    }
}

#[test]
fn the_program_of_version_1_refuses_what_is_newer_by_its_name() {
    let token = Token {
        session: 7,
        channel: Channel::Ring(3),
        index: 1,
        generation: 5,
    };
    let settled = Settled {
        token,
        tag: 3,
        answer: Answer::ok(0),
        payload: vec![],
        send: false,
    };
    let record = kept(Change::None, Some(settled));
    let mut bytes = Vec::new();
    record.write(&mut bytes);
    assert!(version_1::record(&bytes).unwrap_err().contains("Kept"));
    assert_eq!(record.feature(), Some(feature::SETTLED_ANSWERS));
    assert_eq!(
        kept(Change::Closed { handle: 1 }, None).feature(),
        Some(feature::OPEN_FILES)
    );
    let snapshot = |records: Vec<Record>| Hub::replay(1, None, records).unwrap().snapshot();
    let refusal = |saved: &Saved| version_1::snapshot(&saved.to_bytes()).unwrap_err();
    let used = snapshot(vec![record.clone()]);
    assert_eq!(
        refusal(&used),
        "the saved state of the hub uses \"settled-answers\", which this program does not know: upgrade to one that does"
    );
    assert!(
        Saved::from_bytes(&used.to_bytes())
            .unwrap()
            .features()
            .eq(["settled-answers"])
    );
    // In use no more: the guest has its answer.
    let published = Record::Published {
        token,
        published: true,
    };
    let mut unused = snapshot(vec![record, published]);
    assert!(version_1::snapshot(&unused.to_bytes()).is_ok());
    // About to be used by the records that follow it.
    unused.name([feature::PUTS]);
    assert!(refusal(&unused).contains("\"puts\""));
    assert!(Saved::from_bytes(&unused.to_bytes()).is_ok());
}

#[test]
fn a_later_version_and_an_unknown_feature_are_refused_by_name() {
    let change = |change: &dyn Fn(&mut Fields)| {
        let bytes = Hub::new(1).save().to_bytes();
        let mut value: ciborium::Value = ciborium::from_reader(bytes.as_slice()).unwrap();
        change(value.as_map_mut().unwrap());
        let mut bytes = Vec::new();
        ciborium::into_writer(&value, &mut bytes).unwrap();
        Saved::from_bytes(&bytes)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let set = |key: &'static str, value: ciborium::Value| {
        change(&|map| {
            let found = map.iter_mut().find(|(name, _)| name.as_text() == Some(key));
            found.unwrap().1 = value.clone();
        })
    };
    assert_eq!(change(&|_| ()), Ok(()));
    assert!(
        set("version", 3.into())
            .unwrap_err()
            .contains("has version 3, this program reads versions 1 and 2")
    );
    let features = ciborium::Value::Array(vec!["threads".into()]);
    assert!(
        set("features", features)
            .unwrap_err()
            .contains("uses \"threads\"")
    );
    // The memory's own layout.
    let words = PlainWords::new(WORDS);
    words.store(0, 0x564d_474d_0000_0099);
    let error = Journal::open(words).unwrap_err().to_string();
    assert!(error.contains("0x564d474d00000099"), "{error}");
}
