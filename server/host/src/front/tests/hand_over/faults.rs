//! A fault of ours in one session: that one ends, all others go on, and its VM can come again.

use super::stage::Stage;
use crate::front::session::Session;

fn two_clients() -> Stage {
    let mut stage = Stage::new();
    stage.core_begins();
    for peer in [stage.connect(), stage.connect()] {
        stage.admit(peer);
        stage.negotiate(peer);
    }
    stage
}

/// A panic in the middle of something that is done with a client's session.
fn panics(stage: &mut Stage, peer: usize, act: impl FnOnce(&mut Session)) {
    let front = stage.front.as_mut().unwrap();
    let slot = front.numbers[&Stage::session(peer)];
    front.serve(slot, |session, _| {
        act(session);
        panic!("asked for");
    });
    stage.settle();
}

fn times(stage: &Stage, what: &str) -> usize {
    stage.story.iter().filter(|line| line.starts_with(what)).count()
}

fn has_seen_the_end(stage: &Stage, peer: usize) -> bool {
    stage.peers[peer].came.ends_with(b"closed")
}

/// Nothing of a session is left, and the other one is served.
fn one_is_left(stage: &mut Stage) {
    let front = stage.front.as_ref().unwrap();
    assert_eq!((front.sessions.len(), front.numbers.len()), (1, 1));
    assert!(front.deadlines.is_empty() && front.waiting.is_empty() && front.ready.is_empty());
    let before = stage.peers[1].came.len();
    stage.request(1, 4, &[0; 16]);
    assert!(stage.peers[1].came.len() > before && !has_seen_the_end(stage, 1));
}

#[test]
fn a_session_that_panics_ends_in_order() {
    let mut stage = two_clients();
    panics(&mut stage, 0, |_| {});
    assert!(has_seen_the_end(&stage, 0));
    for told in [
        "core: SessionGone { session: 1000 }",
        "keeper: SessionGone { session: 1000, fault: Contained }",
    ] {
        assert_eq!(times(&stage, told), 1, "{told}: {:#?}", stage.story);
    }
    assert_eq!(times(&stage, "keeper: CoreStuck"), 0);
    one_is_left(&mut stage);
    // One that is not admitted yet has no device.
    let third = stage.connect();
    panics(&mut stage, third, |_| {});
    assert!(has_seen_the_end(&stage, third));
    // Its place is kept until the keeper has answered.
    stage.admit(third);
    assert_eq!(
        times(&stage, "keeper: SessionGone { session: 1002, fault: Contained }"),
        1
    );
    one_is_left(&mut stage);
}

#[test]
fn a_session_whose_end_panics_is_gone_with_the_core_that_knows_it() {
    // As in the middle of `end`; by a front that gives the core up at once, or by an earlier one that never did.
    for earlier in [false, true] {
        let mut stage = two_clients();
        panics(&mut stage, 0, |session| session.socket = None);
        assert!(has_seen_the_end(&stage, 0));
        let stuck = "keeper: CoreStuck { life: 1, innocent: true }";
        assert_eq!(times(&stage, stuck), 1, "{:#?}", stage.story);
        if earlier {
            let core = stage.front.as_mut().unwrap().core.as_mut().unwrap();
            (core.told_stuck, core.outbox.broken) = (false, false);
            stage.story.clear();
        }
        stage.hand_over();
        assert_eq!(times(&stage, stuck), 1, "{:#?}", stage.story);
        assert_eq!(
            times(&stage, "keeper: SessionGone"),
            0,
            "its memory is the core's until that is dead"
        );
        stage.core_begins();
        assert_eq!(
            times(&stage, "keeper: SessionGone { session: 1000, fault: Lost }"),
            1
        );
        assert_eq!(
            times(&stage, "core: Session { session: 1001"),
            1 + usize::from(!earlier)
        );
        one_is_left(&mut stage);
    }
}

#[test]
fn without_a_core_a_lost_session_is_gone_at_once() {
    let mut stage = Stage::new();
    for peer in [stage.connect(), stage.connect()] {
        stage.admit(peer);
        stage.negotiate(peer);
    }
    panics(&mut stage, 0, |session| session.socket = None);
    assert_eq!(
        times(&stage, "keeper: SessionGone { session: 1000, fault: Lost }"),
        1
    );
    one_is_left(&mut stage);
}
