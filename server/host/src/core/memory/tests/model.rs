//! Random maps, unmaps, fences and accesses, against a model that knows which byte of which object an address is.

use super::fixture::{Ram, Session, object, peek};
use crate::core::memory::Pieces;
use crate::core::memory::limits::LEASE_WAIT_NS;
use proptest::prelude::*;
use std::collections::BTreeMap;
use vmgmt_device::page::rights;
use vmgmt_device::{Direction, GuestMemory, MemoryError};

const OBJECT: u64 = 1 << 16;
const SLOTS: usize = 6;
/// Addresses are below this; maps begin and end at any byte.
const SPACE: u64 = 1 << 16;

#[derive(Debug, Clone)]
enum Step {
    Map {
        slot: usize,
        iova: u64,
        bytes: u64,
        object: u64,
        offset: u64,
        rights: u64,
    },
    Unmap {
        slot: usize,
    },
    Read {
        iova: u64,
        bytes: usize,
    },
    Write {
        iova: u64,
        bytes: usize,
        value: u8,
    },
    Load {
        iova: u64,
    },
    Store {
        iova: u64,
        value: u64,
    },
    Hold {
        iova: u64,
        bytes: usize,
    },
    WriteHeld {
        value: u8,
    },
    LetGo,
    Wait,
    Check {
        iova: u64,
        bytes: u64,
        into: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..SPACE;
    prop_oneof![
        4 => (0..SLOTS, 0..SPACE, 1..SPACE / 4, 1..3u64, 0..OBJECT * 3 / 4, 1..4u64)
            .prop_map(|(slot, iova, bytes, object, offset, rights)| Step::Map { slot, iova, bytes, object, offset, rights }),
        2 => (0..SLOTS).prop_map(|slot| Step::Unmap { slot }),
        4 => (at.clone(), 0..9000usize).prop_map(|(iova, bytes)| Step::Read { iova, bytes }),
        4 => (at.clone(), 0..9000usize, any::<u8>()).prop_map(|(iova, bytes, value)| Step::Write { iova, bytes, value }),
        3 => at.clone().prop_map(|iova| Step::Load { iova: iova & !3 }),
        3 => (at.clone(), any::<u64>()).prop_map(|(iova, value)| Step::Store { iova: iova & !7, value }),
        2 => (at.clone(), 1..9000usize).prop_map(|(iova, bytes)| Step::Hold { iova, bytes }),
        2 => any::<u8>().prop_map(|value| Step::WriteHeld { value }),
        1 => Just(Step::LetGo),
        1 => Just(Step::Wait),
        2 => (at, 0..9000u64, any::<bool>()).prop_map(|(iova, bytes, into)| Step::Check { iova, bytes, into }),
    ]
}

#[derive(Clone, Copy)]
struct Map {
    iova: u64,
    bytes: u64,
    object: u64,
    offset: u64,
    rights: u64,
    number: u64,
}

#[derive(Default)]
struct Model {
    maps: BTreeMap<usize, Map>,
    objects: BTreeMap<u64, Vec<u8>>,
}

/// Pieces, and what they cover.
type Held = (Pieces, Vec<(u64, usize, u64)>);

impl Model {
    fn overlaps(&self, iova: u64, bytes: u64) -> bool {
        self.maps
            .values()
            .any(|map| map.iova < iova + bytes && iova < map.iova + map.bytes)
    }
    /// Object and position of each byte, or the first address without one.
    fn bytes(&self, iova: u64, bytes: u64, right: u64) -> Result<Vec<(u64, usize, u64)>, MemoryError> {
        (iova..iova + bytes)
            .map(|iova| {
                let map = self
                    .maps
                    .values()
                    .find(|map| map.iova <= iova && iova < map.iova + map.bytes);
                let map = map.ok_or(MemoryError::Unmapped { iova })?;
                if map.rights & right == 0 {
                    return Err(MemoryError::Denied { iova });
                }
                Ok((map.object, (map.offset + iova - map.iova) as usize, map.number))
            })
            .collect()
    }
    fn write(&mut self, places: &[(u64, usize, u64)], data: &[u8]) {
        for ((object, position, _), byte) in places.iter().zip(data) {
            self.objects.get_mut(object).unwrap()[*position] = *byte;
        }
    }
    fn read(&self, places: &[(u64, usize, u64)]) -> Vec<u8> {
        places
            .iter()
            .map(|(object, position, _)| self.objects[object][*position])
            .collect()
    }
}

fn run(steps: Vec<Step>, sealed: bool) {
    let mut session = Session::new();
    let mut model = Model::default();
    let mut fds = BTreeMap::new();
    for number in 1..3u64 {
        let fd = object("ram", OBJECT, sealed);
        session.lend(number, &fd);
        session.map(0, 0, 4096, number, 0, rights::READ);
        session.prove(&fd, 0, 0);
        session.unmap(0);
        model.objects.insert(number, vec![0; OBJECT as usize]);
        fds.insert(number, fd);
    }
    let mut held: Option<Held> = None;
    for step in steps {
        match step {
            Step::Map {
                slot,
                iova,
                bytes,
                object,
                offset,
                rights,
            } => {
                let bytes = bytes.min(OBJECT - offset);
                if model.maps.contains_key(&slot) || model.overlaps(iova, bytes) {
                    continue;
                }
                let number = session.map(slot, iova, bytes, object, offset, rights);
                model.maps.insert(
                    slot,
                    Map {
                        iova,
                        bytes,
                        object,
                        offset,
                        rights,
                        number,
                    },
                );
            }
            Step::Unmap { slot } => {
                if model.maps.remove(&slot).is_some() {
                    let fence = session.unmap(slot);
                    session.memory.poll_fences(session.now);
                    if held.is_none() {
                        assert_eq!(session.memory.core().fenced(), fence);
                    }
                }
            }
            Step::Read { iova, bytes } => {
                let mut data = vec![0; bytes];
                let done = session.turn(|memory| memory.read(iova, &mut data)).map(|()| data);
                let expected = model
                    .bytes(iova, bytes as u64, rights::READ)
                    .map(|places| model.read(&places));
                assert_eq!(done, expected);
            }
            Step::Write { iova, bytes, value } => {
                let data: Vec<u8> = (0..bytes).map(|n| value.wrapping_add(n as u8)).collect();
                let places = model.bytes(iova, bytes as u64, rights::WRITE);
                let done = session.turn(|memory| memory.write(iova, &data));
                assert_eq!(done, places.as_ref().map(|_| ()).map_err(|error| *error));
                model.write(&places.unwrap_or_default(), &data);
            }
            Step::Load { iova } => {
                let expected = model
                    .bytes(iova, 4, rights::READ)
                    .map(|places| model.read(&places));
                let done = session.turn(|memory| memory.load_u32(iova));
                assert_eq!(done.map(|word| word.to_le_bytes().to_vec()), expected);
            }
            Step::Store { iova, value } => {
                let places = model.bytes(iova, 8, rights::WRITE);
                let done = session.turn(|memory| memory.store_u64(iova, value));
                assert_eq!(done, places.as_ref().map(|_| ()).map_err(|error| *error));
                model.write(&places.unwrap_or_default(), &value.to_le_bytes());
            }
            Step::Hold { iova, bytes } => {
                let places = model.bytes(iova, bytes as u64, rights::WRITE);
                let done =
                    session.turn(|memory| memory.resolve(&[(iova, bytes as u64)], Direction::IntoGuest));
                assert_eq!(
                    done.as_ref().map(|_| ()).map_err(|error| *error),
                    places.as_ref().map(|_| ()).map_err(|error| *error)
                );
                if let (Ok(pieces), Ok(places)) = (done, places) {
                    held = Some((pieces, places));
                }
            }
            Step::WriteHeld { value } => {
                let Some((pieces, places)) = &held else { continue };
                let data = vec![value; places.len()];
                let alive = places
                    .iter()
                    .all(|(_, _, number)| model.maps.values().any(|map| map.number == *number));
                match pieces.write_bytes(0, &data) {
                    Ok(()) => {
                        assert!(alive, "a lease of a map that is gone still writes");
                        model.write(places, &data);
                    }
                    // Cancelled leases may outlive the map's number only.
                    Err(error) => assert!(!alive, "{error}"),
                }
            }
            Step::LetGo => held = None,
            Step::Wait => {
                session.now = session.now.after_ns(LEASE_WAIT_NS);
                session.memory.handle_timeout(session.now);
                assert_eq!(session.memory.core().fenced(), session.front.fence());
            }
            Step::Check { iova, bytes, into } => {
                let (right, direction) = if into {
                    (rights::WRITE, Direction::IntoGuest)
                } else {
                    (rights::READ, Direction::FromGuest)
                };
                let done = session.turn(|memory| memory.check(iova, bytes, direction));
                assert_eq!(done, model.bytes(iova, bytes, right).map(|_| ()));
            }
        }
    }
    for (number, fd) in &fds {
        assert!(
            peek(fd, 0, OBJECT as usize) == model.objects[number],
            "object {number} is as the model says"
        );
    }
    assert!(session.requests().is_empty(), "nothing went by message");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_is_where_the_model_says(steps in prop::collection::vec(step(), 1..120), sealed: bool) {
        run(steps, sealed);
    }

    /// The same accesses by mapping and by message see and leave the same bytes.
    #[test]
    fn messages_and_mappings_agree(
        accesses in prop::collection::vec((0..OBJECT - 4096, 0..2000usize, any::<u8>()), 1..20),
    ) {
        let (mut mapped, fd) = Session::with_ram(OBJECT, true);
        let mut by_message = Session::new();
        by_message.map(0, 0, OBJECT, 0, 0, 3);
        let mut ram = Ram::Private(vec![0; OBJECT as usize]);
        for (iova, bytes, value) in accesses {
            let data = vec![value; bytes];
            mapped.turn(|memory| memory.write(iova, &data)).unwrap();
            by_message.turn(|memory| memory.write(iova, &data)).unwrap();
            let (mut one, mut other) = (vec![0; bytes + 99], vec![0; bytes + 99]);
            mapped.turn(|memory| memory.read(iova, &mut one)).unwrap();
            by_message.until_done(&mut ram, |memory| memory.read(iova, &mut other)).0.unwrap();
            prop_assert_eq!(one, other);
        }
        by_message.until_done(&mut ram, GuestMemory::settled).0.unwrap();
        prop_assert!(peek(&fd, 0, OBJECT as usize) == ram.read(0, OBJECT as usize));
    }
}
