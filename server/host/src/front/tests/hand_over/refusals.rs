//! What is not taken over, and that nothing is lost by it.

use super::stage::Stage;
use crate::channel::Channel;
use crate::front::server::Front;
use crate::front::tests::bench::Bench;
use crate::messages::{FrontToKeeper, KeeperToFront};
use crate::sandbox::{self, Role, SandboxConfig};
use ciborium::Value;
use rustix::fd::{AsFd, OwnedFd};
use vmgmt_abi::registers as abi;

/// The state of a front with two clients, as two CBOR values, and copies of its descriptors.
fn packed(stage: &Stage) -> (Value, Value, Vec<OwnedFd>) {
    let (bytes, fds) = stage.front.as_ref().unwrap().save().unwrap();
    let mut rest = &bytes[..];
    let head = ciborium::from_reader(&mut rest).unwrap();
    let body = ciborium::from_reader(&mut rest).unwrap();
    assert!(rest.is_empty());
    let fds = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    (head, body, fds)
}

fn restore(head: &Value, body: &Value, fds: Vec<OwnedFd>) -> Result<(), String> {
    let mut bytes = Vec::new();
    ciborium::into_writer(head, &mut bytes).unwrap();
    ciborium::into_writer(body, &mut bytes).unwrap();
    let (_keeper, theirs) = Channel::pair().unwrap();
    let mut front = Front::new(theirs).unwrap();
    front.restore(&bytes, fds).map_err(|refusal| refusal.to_string())
}

/// The value at a path of map keys and list places.
fn at<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Value {
    let Some((first, rest)) = path.split_first() else {
        return value;
    };
    let next = match value {
        Value::Map(entries) => entries
            .iter_mut()
            .find(|(key, _)| key.as_text() == Some(first))
            .map(|(_, value)| value),
        Value::Array(items) => items.get_mut(first.parse::<usize>().unwrap()),
        other => panic!("{first} in {other:?}"),
    };
    at(next.unwrap_or_else(|| panic!("no {first}")), rest)
}

fn two_clients() -> Stage {
    let mut stage = Stage::new();
    stage.core_begins();
    for peer in [stage.connect(), stage.connect()] {
        stage.admit(peer);
        stage.negotiate(peer);
    }
    stage
}

#[test]
fn a_state_that_is_wrong_anywhere_is_refused_whole() {
    let stage = two_clients();
    let (head, body, fds) = packed(&stage);
    let copies = || fds.iter().map(|fd| fd.try_clone().unwrap()).collect::<Vec<_>>();
    restore(&head, &body, copies()).unwrap();
    let cases: [(&[&str], Value, &str); 10] = [
        (&["next_session"], 1000.into(), "number is to come"),
        (&["sessions", "1", "number"], 1000.into(), "used twice"),
        (
            &["sessions", "1", "slot"],
            0.into(),
            "slot is out of range or used twice",
        ),
        (&["sessions", "1", "slot"], 4096.into(), "slot is out of range"),
        (&["sessions", "0", "socket"], 4000.into(), "descriptor 4000"),
        (&["sessions", "1", "device"], Value::Null, "without a device"),
        (
            &["sessions", "1", "device", "front_page_writable"],
            0.into(),
            "front page",
        ),
        (
            &["sessions", "1", "device", "function", "settings", "session"],
            5.into(),
            "another session",
        ),
        (
            &["sessions", "1", "connection", "next_sequence"],
            Value::Text("x".into()),
            "cannot be read",
        ),
        (&["core", "pages"], Value::Array(vec![]), "cannot be read"),
    ];
    for (path, value, expected) in cases {
        let mut wrong = body.clone();
        *at(&mut wrong, path) = value;
        let refusal = restore(&head, &wrong, copies()).unwrap_err();
        assert!(refusal.contains(expected), "{path:?}: {refusal}");
    }
    for (key, value, expected) in [
        ("version", Value::from(2), "version 2; this program reads 1 to 1"),
        (
            "needs",
            Value::Array(vec![Value::Text("time travel".into())]),
            "\"time travel\"",
        ),
        ("descriptors", Value::from(3), "another number of descriptors"),
    ] {
        let mut wrong = head.clone();
        *at(&mut wrong, &[key]) = value;
        let refusal = restore(&wrong, &body, copies()).unwrap_err();
        assert!(refusal.contains(expected), "{refusal}");
    }
    // What a later version adds and does not need is skipped.
    let mut later = body;
    if let Value::Map(entries) = &mut later {
        entries.push((Value::Text("added later".into()), Value::from(1)));
    }
    restore(&head, &later, copies()).unwrap();
}

#[test]
fn no_cut_or_flipped_byte_leads_to_a_panic() {
    let stage = two_clients();
    let (bytes, fds) = stage.front.as_ref().unwrap().save().unwrap();
    for place in 0..bytes.len() {
        // The long runs of zeros in configuration space say nothing new.
        if place > 600 && place % 17 != 0 {
            continue;
        }
        let copies = || {
            fds.iter()
                .map(|fd| fd.try_clone_to_owned().unwrap())
                .collect::<Vec<_>>()
        };
        let mut wrong = bytes.clone();
        wrong[place] ^= 0x15;
        let (_keeper, theirs) = Channel::pair().unwrap();
        let mut front = Front::new(theirs).unwrap();
        let _ = front.restore(&wrong, copies());
        let (_keeper, theirs) = Channel::pair().unwrap();
        let mut front = Front::new(theirs).unwrap();
        assert!(front.restore(&bytes[..place], copies()).is_err());
    }
}

/// A keeper's channel to a second front, which runs in a thread.
fn second() -> (Channel, std::thread::JoinHandle<anyhow::Result<()>>) {
    let (keeper, theirs) = Channel::pair().unwrap();
    let off = SandboxConfig {
        enabled: false,
        front: None,
        core: None,
    };
    let entered = sandbox::enter(Role::Front, &off, 0, &[]).unwrap();
    let thread = std::thread::spawn(move || crate::front::run(theirs.into_fd(), entered));
    (keeper, thread)
}

#[test]
fn between_two_threads_by_the_keepers_words() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let core = bench.core(1);
    let told = core.session();
    core.adopted();
    // The first try: the new one dies at once. The second: it takes over.
    for lives in [false, true] {
        let (mut keeper, thread) = second();
        assert!(matches!(
            super::super::bench::receive(&keeper).header,
            FrontToKeeper::Ready
        ));
        let (one, other) = Channel::pair().unwrap();
        if lives {
            keeper
                .send(&KeeperToFront::TakeOver, b"", &[one.as_fd()])
                .unwrap();
        }
        drop(one);
        bench
            .keeper
            .send(&KeeperToFront::HandOver, b"", &[other.as_fd()])
            .unwrap();
        drop(other);
        // Nobody answers now.
        let read = client
            .start(9, &vmgmt_testkit::client::access_body(0, 0, 4, &[]), &[])
            .unwrap();
        if lives {
            let said = super::super::bench::receive(&keeper).header;
            assert!(
                matches!(said, FrontToKeeper::CanServe { sessions: 1, .. }),
                "{said:?}"
            );
            bench.tell(&KeeperToFront::Leave);
            bench.thread.take().unwrap().join().unwrap().unwrap();
            keeper.send(&KeeperToFront::Serve, b"", &[]).unwrap();
            std::mem::swap(&mut bench.keeper, &mut keeper);
            bench.thread = Some(thread);
        } else {
            assert!(matches!(bench.next(), FrontToKeeper::CannotHandOver { .. }));
            drop(keeper);
            let _ = thread.join();
            bench.tell(&KeeperToFront::Resume);
        }
        assert!(matches!(bench.next(), FrontToKeeper::Serves { .. }));
        assert_eq!(
            client.finish(read).unwrap().body[16..],
            vmgmt_abi::MAGIC.to_le_bytes()
        );
        assert_eq!(
            client.read_u32(0, u64::from(abi::CORE_LIFE_LOW)).unwrap(),
            1,
            "the core is the same"
        );
        // Kicks and doorbells go on, asleep or not.
        let seen = core.touched.total();
        client
            .region_write_posted(0, u64::from(abi::DOORBELLS), &7u32.to_le_bytes())
            .unwrap();
        while told.front.doorbell(0) as u32 != 7 {
            core.sleep(seen);
        }
        client
            .region_write(0, u64::from(abi::DOORBELLS), &0u32.to_le_bytes())
            .unwrap();
    }
    bench.stop();
}
