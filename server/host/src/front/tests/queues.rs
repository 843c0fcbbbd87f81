//! What waits between front, core and keeper: who waits for it goes on, and nobody makes it grow without bound.

use super::hand_over::stage::{Stage, map_body};
use crate::channel::ChannelError;
use crate::front::limits::{CORE_QUEUE_MAX, NEWCOMERS_MAX};
use crate::front::server::Front;
use crate::front::server::has_room;
use crate::messages::{CoreToFront, KeeperToFront};
use vmgmt_testkit::client::access_body;

fn front(stage: &Stage) -> &Front {
    stage.front.as_ref().unwrap()
}

/// SET_IRQS of four vectors of MSI: the core is told of it each time.
fn vectors_body() -> Vec<u8> {
    let words = [20u32, 4 | 0x20, 1, 0, 4];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A request that is answered by an error at once.
const fn nobody_is_asked() -> CoreToFront {
    CoreToFront::DmaRead {
        session: 7,
        request: 1,
        fence: 0,
        iova: 0,
        bytes: 4,
    }
}

fn is_stalled(stage: &Stage, peer: usize) -> bool {
    let slot = front(stage).numbers[&Stage::session(peer)];
    front(stage).sessions[slot].stalled_map.is_some()
}

/// Two clients, and a core that takes nothing any more; what the first told it has filled its channel, and more waits.
fn full_channel() -> Stage {
    let mut stage = Stage::new();
    for peer in [stage.connect(), stage.connect()] {
        stage.admit(peer);
        stage.negotiate(peer);
        stage.request(peer, 10, &access_body(7, 4, 2, &[6, 0]));
    }
    stage.core_begins();
    stage.life.as_mut().unwrap().takes = false;
    while front(&stage).core.as_ref().unwrap().outbox.len() < 10 {
        stage.begin(0, 8, &vectors_body(), &[0, 1, 2, 3], false, usize::MAX);
    }
    stage
}

#[test]
fn a_map_that_waits_for_the_channel_goes_on_whoever_sends_what_waits() {
    let mut stage = full_channel();
    stage.begin(0, 2, &map_body(0x2000), &[2], true, usize::MAX);
    assert!(is_stalled(&stage, 0));
    while stage.take_one() {}
    // Somebody else's answer goes first, and takes all that waits along.
    let message = nobody_is_asked();
    stage
        .life
        .as_ref()
        .unwrap()
        .channel
        .send(&message, b"", &[])
        .unwrap();
    stage.settle();
    assert!(front(&stage).core.as_ref().unwrap().outbox.is_empty());
    assert!(!is_stalled(&stage, 0), "it is never asked again");
}

#[test]
fn a_map_waits_for_its_own_object_alone() {
    let mut stage = full_channel();
    stage.begin(0, 2, &map_body(0x2000), &[2], true, usize::MAX);
    let before = front(&stage).core.as_ref().unwrap().outbox.len();
    // The other client says more than the core takes, all the time.
    for _ in 0..2 * before {
        stage.begin(1, 8, &vectors_body(), &[0, 1, 2, 3], false, usize::MAX);
    }
    assert!(is_stalled(&stage, 0));
    let mut taken = 0;
    while is_stalled(&stage, 0) {
        assert!(taken < 2_000, "it waits until there is nothing to send");
        taken += usize::from(stage.take_one());
        stage.begin(1, 8, &vectors_body(), &[0, 1, 2, 3], false, usize::MAX);
    }
    assert!(!front(&stage).core.as_ref().unwrap().outbox.is_empty());
}

#[test]
fn a_core_that_asks_on_and_takes_no_answers_is_not_listened_to() {
    let mut stage = full_channel();
    let message = nobody_is_asked();
    let mut sent = 0;
    let mut refused = 0;
    // Until its own channel is full, and stays so.
    while refused < 100 {
        assert!(
            sent < 2 * CORE_QUEUE_MAX,
            "the front takes and answers without end"
        );
        match stage.life.as_ref().unwrap().channel.send(&message, b"", &[]) {
            Ok(()) => (sent, refused) = (sent + 1, 0),
            Err(ChannelError::Full) => {
                refused += 1;
                stage.settle();
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(front(&stage).core.as_ref().unwrap().outbox.len(), CORE_QUEUE_MAX);
    // All of it is answered when it takes what waits.
    let told = stage.story.len();
    stage.life.as_mut().unwrap().takes = true;
    let answers = |stage: &Stage| {
        let said = stage.story[told..].iter();
        said.filter(|line| line.contains("DmaAnswer")).count()
    };
    let begun = std::time::Instant::now();
    while answers(&stage) < sent {
        assert!(begun.elapsed().as_secs() < 60, "{} of {sent}", answers(&stage));
        stage.settle();
    }
}

/// Those of whom the keeper was asked.
fn asked(stage: &Stage) -> usize {
    let said = stage.story.iter();
    said.filter(|line| line.starts_with("keeper: admit")).count()
}

#[test]
fn newcomers_of_one_socket_wait_in_it_when_they_are_many_and_others_come_in() {
    let mut stage = Stage::new();
    for _ in 0..NEWCOMERS_MAX + 3 {
        stage.connect();
    }
    assert_eq!(asked(&stage), NEWCOMERS_MAX);
    let _other = stage.connect_to_another();
    assert_eq!(asked(&stage), NEWCOMERS_MAX + 1);
    // One that leaves unasked keeps its place until the keeper has answered: as much is under way as there are places.
    let _ = stage.peers[0].socket.shutdown(std::net::Shutdown::Both);
    for _ in 0..10 {
        stage.settle();
    }
    assert_eq!(front(&stage).sessions.len(), NEWCOMERS_MAX + 1);
    assert!(!stage.story.iter().any(|line| line.contains("SessionGone")));
    stage.admit(0);
    assert!(stage.story.iter().any(|line| line.contains("SessionGone")));
    // Who has negotiated is none any more, nor is who was refused and has left.
    stage.admit(1);
    stage.negotiate(1);
    let message = KeeperToFront::Refused {
        session: Stage::session(2),
        reason: "no".into(),
    };
    stage.tell(&message, &[]);
    let _ = stage.peers[2].socket.shutdown(std::net::Shutdown::Both);
    let begun = std::time::Instant::now();
    while asked(&stage) < NEWCOMERS_MAX + 4 {
        assert!(begun.elapsed().as_secs() < 60, "{} were asked for", asked(&stage));
        stage.settle();
    }
}

#[test]
fn no_socket_takes_the_last_places() {
    let all = crate::front::limits::SESSIONS_MAX;
    let alone = (0..=all).find(|held| !has_room(*held, *held)).unwrap();
    assert_eq!(alone, all / 4 * 3);
    // However many another one has: who has few finds room, to the last place.
    assert!(has_room(0, alone) && has_room(1, all - 1) && !has_room(0, all));
}
