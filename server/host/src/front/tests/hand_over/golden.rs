//! The saved state of each version that this one must read, as it was written then.

use super::stage::Stage;
use crate::channel::Channel;
use crate::front::server::Front;
use vmgmt_testkit::client::access_body;

/// A front with all kinds of things in it, the same in each run but for the times.
fn scene() -> Stage {
    let mut stage = Stage::new();
    for peer in [stage.connect(), stage.connect()] {
        stage.admit(peer);
        stage.negotiate(peer);
        stage.request(peer, 10, &access_body(7, 4, 2, &[6, 0]));
    }
    stage.core_begins();
    stage.connect();
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let map = |iova: u64| {
        [
            words(&[32, 3, 0, 0]),
            [iova, 0x1000]
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        ]
        .concat()
    };
    stage.begin(0, 2, &map(0), &[0], true, usize::MAX);
    stage.begin(
        0,
        8,
        &words(&[20, 4 | 0x20, 1, 0, 3]),
        &[0, 1, 2],
        false,
        usize::MAX,
    );
    stage.begin(1, 8, &words(&[20, 4 | 0x20, 0, 0, 1]), &[6], false, usize::MAX);
    stage.begin(1, 8, &words(&[20, 4 | 0x10, 0, 0, 1]), &[7], false, usize::MAX);
    for write in [false, true, false, true, true] {
        stage.core_asks(1, write);
    }
    stage.with_page(0, |page, _| page.set_busy(true));
    stage.request(0, 13, &[]);
    stage.begin(1, 2, &map(0x3000), &[2], true, 19);
    stage
}

#[test]
fn a_state_of_version_1_is_taken_over() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/golden/front_state_v1.cbor"
    );
    let stage = scene();
    let (bytes, fds) = stage.front.as_ref().unwrap().save().unwrap();
    if std::env::var_os("VMGMT_BLESS").is_some() {
        std::fs::write(path, &bytes).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    let copies = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    let (_keeper, theirs) = Channel::pair().unwrap();
    let mut front = Front::new(theirs).unwrap();
    front.restore(&golden, copies).unwrap();
    let session = |peer| front.sessions.get(front.numbers[&Stage::session(peer)]).unwrap();
    assert_eq!(front.sessions.len(), 3);
    assert!(session(0).waits_for_core());
    assert_eq!(
        (session(1).dma.under_way.len(), session(1).dma.waiting.len()),
        (4, 1)
    );
    assert_eq!(session(1).connection.save().descriptors().len(), 1);
    // This version writes what it read.
    assert!(front.save().unwrap().0 == golden);
}
