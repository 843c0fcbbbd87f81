//! The same story with and without hand-overs, compared.

use super::stage::{Stage, map_body};
use crate::messages::KeeperToFront;
use proptest::prelude::*;
use vmgmt_testkit::client::access_body;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn unmap_body(iova: u64) -> Vec<u8> {
    let mut body = words(&[24, 0]);
    body.extend_from_slice(&iova.to_le_bytes());
    body.extend_from_slice(&0x1000u64.to_le_bytes());
    body
}

/// What may happen; a message of a client is cut somewhere, and its rest comes later.
#[derive(Debug, Clone)]
enum Act {
    Connect,
    Admit(usize),
    Refuse(usize),
    Negotiate(usize),
    Read {
        peer: usize,
        region: u32,
        offset: u64,
        cut: usize,
    },
    Write {
        peer: usize,
        offset: u64,
        value: u32,
        cut: usize,
    },
    Port {
        peer: usize,
        offset: u64,
        value: u32,
    },
    Master {
        peer: usize,
        on: bool,
    },
    Map {
        peer: usize,
        page: u64,
        memory: Option<usize>,
        cut: usize,
    },
    Unmap {
        peer: usize,
        page: u64,
        cut: usize,
    },
    Vectors {
        peer: usize,
        first: usize,
        count: usize,
        cut: usize,
    },
    Line {
        peer: usize,
        unmask: bool,
        cut: usize,
    },
    Reset {
        peer: usize,
    },
    Reads {
        peer: usize,
        reads: bool,
    },
    Answer {
        peer: usize,
    },
    Leave(usize),
    Core,
    CoreTakes(bool),
    Busy {
        peer: usize,
        busy: bool,
    },
    Fenced(usize),
    Raise {
        peer: usize,
        vector: usize,
    },
    Ask {
        peer: usize,
        write: bool,
    },
}

fn act() -> impl Strategy<Value = Act> {
    let peer = 0..2usize;
    let cut = prop_oneof![1..60usize, Just(usize::MAX)];
    let offset = prop_oneof![
        Just(0u64),
        Just(0x18),
        Just(0x20),
        Just(0x50),
        Just(0x54),
        Just(0x58),
        Just(0x400),
        Just(0x430),
        Just(0x434),
        Just(0x2000)
    ];
    prop_oneof![
        1 => Just(Act::Connect),
        2 => peer.clone().prop_map(Act::Admit),
        1 => peer.clone().prop_map(Act::Refuse),
        2 => peer.clone().prop_map(Act::Negotiate),
        4 => (peer.clone(), prop_oneof![Just(0u32), Just(2), Just(7)], offset.clone(), cut.clone())
            .prop_map(|(peer, region, offset, cut)| Act::Read { peer, region, offset: if region == 2 { offset & 63 } else { offset }, cut }),
        4 => (peer.clone(), offset, prop_oneof![Just(1u32), Just(3), any::<u32>()], cut.clone())
            .prop_map(|(peer, offset, value, cut)| Act::Write { peer, offset, value, cut }),
        2 => (peer.clone(), (0..16u64).prop_map(|n| n * 4), prop_oneof![Just(1u32), any::<u32>()])
            .prop_map(|(peer, offset, value)| Act::Port { peer, offset, value }),
        2 => (peer.clone(), any::<bool>()).prop_map(|(peer, on)| Act::Master { peer, on }),
        4 => (peer.clone(), 0..4u64, proptest::option::weighted(0.8, 0..3usize), cut.clone())
            .prop_map(|(peer, page, memory, cut)| Act::Map { peer, page, memory, cut }),
        3 => (peer.clone(), 0..4u64, cut.clone()).prop_map(|(peer, page, cut)| Act::Unmap { peer, page, cut }),
        2 => (peer.clone(), 0..4usize, 1..4usize, cut.clone())
            .prop_map(|(peer, first, count, cut)| Act::Vectors { peer, first, count, cut }),
        2 => (peer.clone(), any::<bool>(), cut).prop_map(|(peer, unmask, cut)| Act::Line { peer, unmask, cut }),
        1 => peer.clone().prop_map(|peer| Act::Reset { peer }),
        1 => (peer.clone(), any::<bool>()).prop_map(|(peer, reads)| Act::Reads { peer, reads }),
        3 => peer.clone().prop_map(|peer| Act::Answer { peer }),
        1 => peer.clone().prop_map(Act::Leave),
        1 => Just(Act::Core),
        1 => any::<bool>().prop_map(Act::CoreTakes),
        3 => (peer.clone(), any::<bool>()).prop_map(|(peer, busy)| Act::Busy { peer, busy }),
        2 => peer.clone().prop_map(Act::Fenced),
        2 => (peer.clone(), 0..4usize).prop_map(|(peer, vector)| Act::Raise { peer, vector }),
        4 => (peer, any::<bool>()).prop_map(|(peer, write)| Act::Ask { peer, write }),
    ]
}

fn play(stage: &mut Stage, act: &Act) {
    let known = stage.peers.len();
    match *act {
        Act::Connect if known < 2 => drop(stage.connect()),
        Act::Admit(peer) if peer < known => stage.admit(peer),
        Act::Refuse(peer) if peer < known && !stage.peers[peer].admitted => {
            let message = KeeperToFront::Refused {
                session: Stage::session(peer),
                reason: "the test says so".into(),
            };
            stage.tell(&message, &[]);
        }
        Act::Negotiate(peer) if peer < known => stage.negotiate(peer),
        Act::Read {
            peer,
            region,
            offset,
            cut,
        } if peer < known => {
            stage.begin(peer, 9, &access_body(region, offset, 4, &[]), &[], false, cut);
        }
        Act::Write {
            peer,
            offset,
            value,
            cut,
        } if peer < known => {
            stage.begin(
                peer,
                10,
                &access_body(0, offset, 4, &value.to_le_bytes()),
                &[],
                false,
                cut,
            );
        }
        Act::Port { peer, offset, value } if peer < known => {
            stage.request(peer, 10, &access_body(2, offset, 4, &value.to_le_bytes()));
        }
        Act::Master { peer, on } if peer < known => {
            let command = [if on { 6 } else { 2 }, 0];
            stage.request(peer, 10, &access_body(7, 4, 2, &command));
        }
        Act::Map {
            peer,
            page,
            memory,
            cut,
        } if peer < known => {
            let fds: Vec<usize> = memory.into_iter().collect();
            stage.begin(peer, 2, &map_body(page << 12), &fds, true, cut);
        }
        Act::Unmap { peer, page, cut } if peer < known => {
            stage.begin(peer, 3, &unmap_body(page << 12), &[], false, cut);
        }
        Act::Vectors {
            peer,
            first,
            count,
            cut,
        } if peer < known => {
            let fds: Vec<usize> = (first..first + count).collect();
            let body = words(&[20, 4 | 0x20, 1, first as u32, count as u32]);
            stage.begin(peer, 8, &body, &fds, false, cut);
        }
        Act::Line { peer, unmask, cut } if peer < known => {
            let (action, fd) = if unmask { (0x10, 7) } else { (0x20, 6) };
            stage.begin(peer, 8, &words(&[20, 4 | action, 0, 0, 1]), &[fd], false, cut);
        }
        Act::Reset { peer } if peer < known => stage.request(peer, 13, &[]),
        Act::Reads { peer, reads } if peer < known => {
            stage.peers[peer].reads = reads;
            stage.settle();
        }
        Act::Answer { peer } if peer < known => stage.answer_dma(peer),
        Act::Leave(peer) if peer < known => {
            let _ = stage.peers[peer].socket.shutdown(std::net::Shutdown::Both);
            stage.settle();
        }
        Act::Core => stage.core_begins(),
        Act::CoreTakes(takes) => {
            if let Some(life) = &mut stage.life {
                life.takes = takes;
                stage.settle();
            }
        }
        Act::Busy { peer, busy } if peer < known => stage.with_page(peer, |page, _| page.set_busy(busy)),
        Act::Fenced(peer) if peer < known => stage.with_page(peer, |page, fence| page.set_fenced(fence)),
        Act::Raise { peer, vector } if peer < known => {
            stage.with_page(peer, |page, _| page.set_raise(vector, page.raise(vector) + 1));
        }
        Act::Ask { peer, write } if peer < known => stage.core_asks(peer, write),
        _ => {}
    }
}

/// Plays the acts; after each, a hand-over where `hand_over` says so.
fn run(acts: &[Act], hand_over: impl Fn(usize) -> bool) -> (String, usize) {
    let mut stage = Stage::new();
    for peer in [stage.connect(), stage.connect()] {
        stage.admit(peer);
        stage.negotiate(peer);
    }
    stage.core_begins();
    for (step, act) in acts.iter().enumerate() {
        play(&mut stage, act);
        if hand_over(step) {
            stage.hand_over();
        }
    }
    (stage.seen(), stage.hand_overs)
}

/// The first line in which two stories differ.
fn difference(one: &str, other: &str) -> Option<String> {
    let lines = one.lines().zip(other.lines());
    let differing = lines.into_iter().find(|(one, other)| one != other);
    let short = |line: &str| line.chars().take(2000).collect::<String>();
    match differing {
        Some((one, other)) => Some(format!("without: {}\nwith:    {}", short(one), short(other))),
        None => (one.len() != other.len()).then(|| "one is longer".into()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn nobody_can_tell(acts in proptest::collection::vec(act(), 1..60), seed in any::<u64>()) {
        let (plain, _) = run(&acts, |_| false);
        let (each, hand_overs) = run(&acts, |_| true);
        prop_assert_eq!(hand_overs, acts.len());
        prop_assert_eq!(difference(&plain, &each), None);
        let (some, _) = run(&acts, |step| seed >> (step % 64) & 1 == 1);
        prop_assert_eq!(difference(&plain, &some), None);
    }
}

/// Everything at once that can be half done: see the assertions.
fn everything_half_done(stage: &mut Stage) {
    for peer in [stage.connect(), stage.connect()] {
        stage.admit(peer);
        stage.negotiate(peer);
        stage.request(peer, 10, &access_body(7, 4, 2, &[6, 0]));
    }
    stage.core_begins();
    // A third is still asked for; a fourth was refused and has not said anything.
    stage.connect();
    let refused = stage.connect();
    let message = KeeperToFront::Refused {
        session: Stage::session(refused),
        reason: "no".into(),
    };
    stage.tell(&message, &[]);
    // INTx with its mask; a ring half set up; maps.
    stage.begin(1, 8, &words(&[20, 4 | 0x20, 0, 0, 1]), &[6], false, usize::MAX);
    stage.begin(1, 8, &words(&[20, 4 | 0x10, 0, 0, 1]), &[7], false, usize::MAX);
    stage.request(1, 10, &access_body(0, 0x54, 4, &1u32.to_le_bytes()));
    stage.with_page(1, |page, _| page.set_raise(0, 1));
    stage.begin(0, 2, &map_body(0), &[0], true, usize::MAX);
    stage.begin(1, 2, &map_body(0x1000), &[1], true, usize::MAX);
    // Four DMA messages outstanding, and as many that wait for them.
    for _ in 0..8 {
        stage.core_asks(1, true);
    }
    // An unmap that is owed.
    stage.with_page(0, |page, _| page.set_busy(true));
    stage.request(0, 3, &unmap_body(0));
    // Vectors until the core's channel is full, and a map that waits behind them.
    stage.life.as_mut().unwrap().takes = false;
    for round in 0..400 {
        let body = words(&[20, 4 | 0x20, 1, 0, 4]);
        let fds = if round % 2 == 0 {
            [0, 1, 2, 3]
        } else {
            [2, 3, 4, 5]
        };
        stage.begin(0, 8, &body, &fds, false, usize::MAX);
    }
    stage.begin(0, 2, &map_body(0x2000), &[2], true, usize::MAX);
    // Answers that the client does not read, more than its socket holds.
    stage.peers[1].reads = false;
    for _ in 0..4 {
        for _ in 0..32 {
            stage.request(1, 9, &access_body(7, 0, 4096, &[]));
        }
    }
    // A message half sent, with its descriptor.
    stage.begin(1, 2, &map_body(0x3000), &[2], true, 19);
}

fn the_rest(stage: &mut Stage) {
    stage.with_page(0, |page, fence| page.set_fenced(fence));
    stage.life.as_mut().unwrap().takes = true;
    stage.settle();
    stage.peers[1].reads = true;
    stage.settle();
    stage.finish(1);
    for _ in 0..8 {
        stage.answer_dma(1);
    }
    stage.admit(2);
    stage.negotiate(2);
    stage.negotiate(3);
    stage.request(1, 10, &access_body(0, 0x58, 4, &1u32.to_le_bytes()));
    rustix::io::write(&stage.eventfds[7], &1u64.to_ne_bytes()).unwrap();
    stage.settle();
    stage.core_begins();
    stage.connect();
}

#[test]
fn what_is_half_done_is_done_by_the_next_front() {
    let mut stages = [Stage::new(), Stage::new()];
    for (number, stage) in stages.iter_mut().enumerate() {
        everything_half_done(stage);
        let front = stage.front.as_ref().unwrap();
        let slot = |peer| front.sessions.get(front.numbers[&Stage::session(peer)]).unwrap();
        assert!(slot(0).stalled_map.is_some(), "a map waits for the core");
        assert!(slot(0).waits_for_core(), "an unmap is owed");
        assert!(!front.core.as_ref().unwrap().outbox.is_empty());
        assert!(
            slot(1).connection.output_bytes() > 100_000,
            "answers wait for the client"
        );
        assert!(
            slot(1).connection.save().descriptors().len() == 1,
            "a descriptor waits for its message"
        );
        assert!(slot(1).dma.under_way.len() == 4 && slot(1).dma.waiting.len() == 4);
        assert_eq!(front.unmask.len(), 1);
        for _ in 0..3 * number {
            stage.hand_over();
        }
        the_rest(stage);
        for _ in 0..number {
            stage.hand_over();
        }
    }
    let [plain, handed_over] = &mut stages;
    let plain = plain.seen();
    assert_eq!(difference(&plain, &handed_over.seen()), None);
    for expected in ["core: Adopted", "ram 2", "DmaAnswer", "eventfd 6: 1"] {
        assert!(plain.contains(expected), "{expected}: {plain}");
    }
}
