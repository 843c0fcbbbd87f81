//! The front page of a session: what the front says about it. Written by the front alone.
//!
//! | words | meaning |
//! |---|---|
//! | 0..3 | layout, session, vm (constant) |
//! | 3 life | which core life owns the core page; a new one voids all old core words |
//! | 4 gen | +1 per reset register, FLR, DEVICE_RESET |
//! | 5 control | [`control`] bits, a level |
//! | 6 fence | +1 per unmap, bus master off, ring off, reset, freeze, gone |
//! | 7 events | changes of map table and descriptors so far |
//! | 8 interrupts | kind in bits 0..8, enabled vectors in bits 8..16 |
//! | 9 features acknowledged by the driver | |
//! | 10, 11 host page | address; sequence (moves when it is latched) |
//! | 12 vectors | changes of interrupt descriptors so far |
//! | 13 taken | port sequence whose result the front has copied out |
//! | 64 + 16 n | ring n: sequence (odd while written) = epoch, bases, sizes, mode and vector, nonce, enabled, doorbell |
//! | 384 + v | acknowledged value of vector v |
//! | 512.. | port submission: sequence, bytes and mode; then its bytes |
//! | 1280.. | log of changed map slots, a ring of [`CHANGED_LOG`] |
//! | 4096 + 8 n | map slot n: number (0: free), iova, bytes, object, offset, rights |

use super::{LAYOUT, Words, is_readable};
use serde::{Deserialize, Serialize};

/// Bits of the control word.
pub mod control {
    /// COMMAND bit 2: DMA is allowed.
    pub const BUS_MASTER: u64 = 1 << 0;
    /// COMMAND bit 10: INTx is not to be asserted.
    pub const INTX_DISABLE: u64 = 1 << 1;
    /// The operator froze the session: no DMA, no fetching.
    pub const FROZEN: u64 = 1 << 2;
    /// The session is quarantined: its device has failed.
    pub const QUARANTINED: u64 = 1 << 3;
    /// The session has ended; only its memory is still to be let go.
    pub const GONE: u64 = 1 << 4;
}

/// Bits of a map's rights word.
pub mod rights {
    /// The device may read it.
    pub const READ: u64 = 1 << 0;
    /// The device may write it.
    pub const WRITE: u64 = 1 << 1;
}

const SESSION: usize = 1;
const VM: usize = 2;
const LIFE: usize = 3;
const GEN: usize = 4;
const CONTROL: usize = 5;
const FENCE: usize = 6;
const EVENTS: usize = 7;
const INTERRUPTS: usize = 8;
const FEATURES: usize = 9;
const HOST_PAGE: usize = 10;
const HOST_PAGE_SEQUENCE: usize = 11;
const VECTORS: usize = 12;
const TAKEN: usize = 13;
const RINGS: usize = 64;
const RING_WORDS: usize = 16;
const RING_DOORBELL: usize = 8;
const ACKS: usize = 384;
const PORT: usize = 512;
const PORT_BYTES: usize = PORT + 4;
const PORT_BYTES_MAX: usize = 64 + vmgmt_abi::port::INPUT_BYTES_MAX;
const CHANGED: usize = 1280;
/// Entries of the log of changed map slots: a reader that lags further behind reads the whole table.
const CHANGED_LOG: u64 = 2048;
const MAPS: usize = 4096;
const MAP_WORDS: usize = 8;

const _: () = assert!(RINGS + RING_WORDS * vmgmt_abi::registers::RINGS_MAX <= ACKS);
const _: () = assert!(ACKS + vmgmt_abi::registers::VECTORS_MAX <= PORT);
const _: () = assert!(PORT_BYTES + PORT_BYTES_MAX / 8 <= CHANGED);
const _: () = assert!(CHANGED + CHANGED_LOG as usize <= MAPS);

/// How interrupts go to the guest now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Interrupts {
    /// None is set up.
    None,
    /// INTx, signalled by the front.
    Intx,
    /// MSI or MSI-X with this many vectors that have an eventfd, signalled by the core.
    Message {
        /// Vectors 0..count are enabled.
        vectors: u8,
    },
}

/// A ring as the guest set it up, latched when it was enabled. Not validated: the core does that.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RingSetup {
    /// Moves each time the ring is enabled or closed; even in a record that was read whole.
    pub epoch: u32,
    pub enabled: bool,
    pub submissions: u64,
    pub completions: u64,
    pub events: u64,
    pub submission_entries: u32,
    pub completion_entries: u32,
    pub mode: u32,
    pub vector: u32,
    pub nonce: u64,
}

/// One DMA map.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapRecord {
    /// Never used again in this session; not 0.
    pub number: u64,
    pub iova: u64,
    pub bytes: u64,
    /// The memory object (an interned descriptor of this session), 0: none, reached by messages.
    pub object: u64,
    /// Offset in the object, in bytes.
    pub offset: u64,
    /// [`rights`] bits.
    pub rights: u64,
}

/// A submission through the port window.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSubmission {
    /// Generation of the session in the upper half, a sequence number in the lower; never 0.
    pub sequence: u64,
    pub mode: u32,
    /// The submission (64 bytes) and its input.
    pub bytes: Vec<u8>,
}

/// Which map slots changed since a reader last looked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ChangedMaps {
    /// Only these.
    Slots(Vec<usize>),
    /// Too many: the whole table is to be read.
    All,
}

/// View of a front page. The writer's verbs are for the front alone: the core's mapping is read-only.
#[derive(Clone, Debug)]
pub struct FrontPage<W: Words> {
    words: W,
}

impl<W: Words> FrontPage<W> {
    /// Words of a page with room for `maps_max` maps.
    #[must_use]
    pub const fn words_needed(maps_max: usize) -> usize {
        MAPS + MAP_WORDS * maps_max
    }

    /// A view of words that are a front page (readers check [`FrontPage::is_valid`]).
    pub const fn new(words: W) -> Self {
        Self { words }
    }

    /// Writes the constant words of a fresh page.
    pub fn init(&self, session: u64, vm: u64) {
        self.words.store(SESSION, session);
        self.words.store(VM, vm);
        self.words.store(0, LAYOUT);
    }

    /// Whether the layout is the one of this version.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        is_readable(self.words.load(0)) && self.words.len() > MAPS
    }

    /// Map slots that the page has room for.
    #[must_use]
    pub fn maps_max(&self) -> usize {
        self.words.len().saturating_sub(MAPS) / MAP_WORDS
    }

    #[must_use]
    pub fn session(&self) -> u64 {
        self.words.load(SESSION)
    }
    #[must_use]
    pub fn vm(&self) -> u64 {
        self.words.load(VM)
    }
    #[must_use]
    pub fn life(&self) -> u64 {
        self.words.load(LIFE)
    }
    pub fn set_life(&self, life: u64) {
        self.words.store(LIFE, life);
    }
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.words.load(GEN)
    }
    pub fn set_generation(&self, generation: u64) {
        self.words.store(GEN, generation);
    }
    /// [`control`] bits.
    #[must_use]
    pub fn control(&self) -> u64 {
        self.words.load(CONTROL)
    }
    pub fn set_control(&self, bits: u64) {
        self.words.store(CONTROL, bits);
    }
    #[must_use]
    pub fn fence(&self) -> u64 {
        self.words.load(FENCE)
    }
    /// Moves the fence counter and gives its new value.
    pub fn move_fence(&self) -> u64 {
        let fence = self.words.load(FENCE).wrapping_add(1);
        self.words.store(FENCE, fence);
        fence
    }
    /// Changes of map table so far (also the position in the log of changed slots).
    #[must_use]
    pub fn events(&self) -> u64 {
        self.words.load(EVENTS)
    }
    #[must_use]
    pub fn interrupts(&self) -> Interrupts {
        let word = self.words.load(INTERRUPTS);
        match word & 0xff {
            1 => Interrupts::Intx,
            2 => Interrupts::Message {
                vectors: ((word >> 8) & 0xff).min(vmgmt_abi::registers::VECTORS_MAX as u64) as u8,
            },
            _ => Interrupts::None,
        }
    }
    pub fn set_interrupts(&self, interrupts: Interrupts) {
        let word = match interrupts {
            Interrupts::None => 0,
            Interrupts::Intx => 1,
            Interrupts::Message { vectors } => 2 | (u64::from(vectors) << 8),
        };
        self.words.store(INTERRUPTS, word);
    }
    /// Changes of interrupt descriptors so far.
    #[must_use]
    pub fn vectors_changed(&self) -> u64 {
        self.words.load(VECTORS)
    }
    pub fn move_vectors_changed(&self) {
        self.words
            .store(VECTORS, self.words.load(VECTORS).wrapping_add(1));
    }
    #[must_use]
    pub fn features(&self) -> u64 {
        self.words.load(FEATURES)
    }
    pub fn set_features(&self, bits: u64) {
        self.words.store(FEATURES, bits);
    }
    /// Guest address of the host's page (0: none) and its sequence.
    #[must_use]
    pub fn host_page(&self) -> (u64, u64) {
        (self.words.load(HOST_PAGE), self.words.load(HOST_PAGE_SEQUENCE))
    }
    pub fn set_host_page(&self, iova: u64) {
        self.words.store(HOST_PAGE, iova);
        self.words.store(
            HOST_PAGE_SEQUENCE,
            self.words.load(HOST_PAGE_SEQUENCE).wrapping_add(1),
        );
    }

    /// Reads ring `n`'s set-up whole; `None` while it is being written (the front will touch the session again).
    #[must_use]
    pub fn ring(&self, n: usize) -> Option<RingSetup> {
        let base = ring_base(n)?;
        let before = self.words.load(base);
        if before & 1 == 1 {
            return None;
        }
        let sizes = self.words.load(base + 4);
        let kind = self.words.load(base + 5);
        let setup = RingSetup {
            epoch: before as u32,
            enabled: self.words.load(base + 7) == 1,
            submissions: self.words.load(base + 1),
            completions: self.words.load(base + 2),
            events: self.words.load(base + 3),
            submission_entries: sizes as u32,
            completion_entries: (sizes >> 32) as u32,
            mode: kind as u32,
            vector: (kind >> 32) as u32,
            nonce: self.words.load(base + 6),
        };
        (self.words.load(base) == before).then_some(setup)
    }

    /// Publishes ring `n`'s set-up under a new epoch (the field of `setup` is not looked at) and gives that epoch.
    pub fn set_ring(&self, n: usize, setup: &RingSetup) -> u32 {
        let Some(base) = ring_base(n) else { return 0 };
        let sequence = self.words.load(base);
        self.words.store(base, sequence | 1);
        self.words.store(base + 1, setup.submissions);
        self.words.store(base + 2, setup.completions);
        self.words.store(base + 3, setup.events);
        self.words.store(
            base + 4,
            u64::from(setup.submission_entries) | (u64::from(setup.completion_entries) << 32),
        );
        self.words
            .store(base + 5, u64::from(setup.mode) | (u64::from(setup.vector) << 32));
        self.words.store(base + 6, setup.nonce);
        self.words.store(base + 7, u64::from(setup.enabled));
        let next = u64::from(((sequence & !1) as u32).wrapping_add(2));
        self.words.store(base, next);
        next as u32
    }

    /// Doorbell word of ring `n`: count in the upper half, last value in the lower.
    #[must_use]
    pub fn doorbell(&self, n: usize) -> u64 {
        ring_base(n).map_or(0, |base| self.words.load(base + RING_DOORBELL))
    }
    /// The guest rang ring `n`'s doorbell.
    pub fn ring_doorbell(&self, n: usize, value: u32) {
        if let Some(base) = ring_base(n) {
            let count = (self.words.load(base + RING_DOORBELL) >> 32).wrapping_add(1);
            self.words
                .store(base + RING_DOORBELL, (count << 32) | u64::from(value));
        }
    }

    /// The `raise` value that is acknowledged for vector `v`.
    #[must_use]
    pub fn ack(&self, vector: usize) -> u64 {
        if vector < vmgmt_abi::registers::VECTORS_MAX {
            self.words.load(ACKS + vector)
        } else {
            0
        }
    }
    pub fn set_ack(&self, vector: usize, raise: u64) {
        if vector < vmgmt_abi::registers::VECTORS_MAX {
            self.words.store(ACKS + vector, raise);
        }
    }

    /// Sequence of the last port submission (0: none yet), without its bytes.
    #[must_use]
    pub fn port_sequence(&self) -> u64 {
        self.words.load(PORT)
    }
    /// The last port submission, read whole; `None` when there is none or it is being written.
    #[must_use]
    pub fn port_submission(&self) -> Option<PortSubmission> {
        let sequence = self.words.load(PORT);
        if sequence == 0 {
            return None;
        }
        let bytes = (self.words.load(PORT + 1) as usize).min(PORT_BYTES_MAX);
        let mode = self.words.load(PORT + 2) as u32;
        let mut data = vec![0; bytes];
        self.words.read_bytes(PORT_BYTES, &mut data);
        (self.words.load(PORT) == sequence).then_some(PortSubmission {
            sequence,
            mode,
            bytes: data,
        })
    }
    /// Publishes a port submission (or with no bytes: withdraws the one before, which is cancelled).
    pub fn submit_port(&self, submission: &PortSubmission) {
        self.words.store(PORT, 0);
        let bytes = submission
            .bytes
            .get(..PORT_BYTES_MAX)
            .unwrap_or(&submission.bytes);
        self.words.write_bytes(PORT_BYTES, bytes);
        self.words.store(PORT + 1, bytes.len() as u64);
        self.words.store(PORT + 2, u64::from(submission.mode));
        self.words.store(PORT, submission.sequence);
    }
    /// Port sequence whose result the front has copied out: delivered, for any core.
    #[must_use]
    pub fn port_taken(&self) -> u64 {
        self.words.load(TAKEN)
    }
    pub fn set_port_taken(&self, sequence: u64) {
        self.words.store(TAKEN, sequence);
    }

    /// Reads map slot `slot`; `None` when it is free or being written.
    #[must_use]
    pub fn map(&self, slot: usize) -> Option<MapRecord> {
        if slot >= self.maps_max() {
            return None;
        }
        let base = MAPS + MAP_WORDS * slot;
        let number = self.words.load(base);
        if number == 0 {
            return None;
        }
        let record = MapRecord {
            number,
            iova: self.words.load(base + 1),
            bytes: self.words.load(base + 2),
            object: self.words.load(base + 3),
            offset: self.words.load(base + 4),
            rights: self.words.load(base + 5),
        };
        (self.words.load(base) == number).then_some(record)
    }

    /// Fills or (with `None`) frees map slot `slot`, logs the change and moves `events`.
    pub fn set_map(&self, slot: usize, record: Option<&MapRecord>) {
        if slot >= self.maps_max() {
            return;
        }
        let base = MAPS + MAP_WORDS * slot;
        self.words.store(base, 0);
        if let Some(record) = record {
            self.words.store(base + 1, record.iova);
            self.words.store(base + 2, record.bytes);
            self.words.store(base + 3, record.object);
            self.words.store(base + 4, record.offset);
            self.words.store(base + 5, record.rights);
            self.words.store(base, record.number);
        }
        let events = self.words.load(EVENTS);
        self.words
            .store(CHANGED + (events % CHANGED_LOG) as usize, slot as u64);
        self.words.store(EVENTS, events.wrapping_add(1));
    }

    /// Slots that changed since `seen` (an earlier value of [`FrontPage::events`]), and the value up to which they are given.
    #[must_use]
    pub fn changed_maps(&self, seen: u64) -> (ChangedMaps, u64) {
        let now = self.words.load(EVENTS);
        // A margin, because the writer goes on while we read.
        if now.wrapping_sub(seen) > CHANGED_LOG / 2 {
            return (ChangedMaps::All, now);
        }
        let slots = (seen..now)
            .map(|event| self.words.load(CHANGED + (event % CHANGED_LOG) as usize) as usize)
            .collect();
        if self.words.load(EVENTS).wrapping_sub(seen) > CHANGED_LOG {
            return (ChangedMaps::All, now);
        }
        (ChangedMaps::Slots(slots), now)
    }
}

const fn ring_base(n: usize) -> Option<usize> {
    if n < vmgmt_abi::registers::RINGS_MAX {
        Some(RINGS + RING_WORDS * n)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PlainWords;

    fn page() -> FrontPage<PlainWords> {
        let page = FrontPage::new(PlainWords::new(FrontPage::<PlainWords>::words_needed(64)));
        page.init(7, 3);
        page
    }

    #[test]
    fn what_is_written_is_read() {
        let page = page();
        assert!(page.is_valid());
        assert_eq!((page.session(), page.vm(), page.maps_max()), (7, 3, 64));
        let setup = RingSetup {
            enabled: true,
            submissions: 1,
            completions: 2,
            events: 3,
            submission_entries: 4,
            completion_entries: 5,
            mode: 6,
            vector: 7,
            nonce: 8,
            epoch: 0,
        };
        let epoch = page.set_ring(2, &setup);
        assert_eq!(page.ring(2), Some(RingSetup { epoch, ..setup }));
        assert_ne!(page.set_ring(2, &setup), epoch);
        page.ring_doorbell(2, 9);
        page.ring_doorbell(2, 11);
        assert_eq!(page.doorbell(2), (2 << 32) | 11);
        let port = PortSubmission {
            sequence: 5,
            mode: 1,
            bytes: vec![3; 71],
        };
        page.submit_port(&port);
        assert_eq!(page.port_submission(), Some(port));
        assert_eq!(page.ring(vmgmt_abi::registers::RINGS_MAX), None);
    }

    #[test]
    fn changed_maps_are_logged_until_there_are_too_many() {
        let page = page();
        let record = MapRecord {
            number: 1,
            iova: 0x1000,
            bytes: 0x1000,
            object: 1,
            offset: 0,
            rights: 3,
        };
        page.set_map(5, Some(&record));
        page.set_map(6, Some(&MapRecord { number: 2, ..record }));
        page.set_map(5, None);
        assert_eq!(page.changed_maps(0), (ChangedMaps::Slots(vec![5, 6, 5]), 3));
        assert_eq!(page.changed_maps(3), (ChangedMaps::Slots(vec![]), 3));
        assert_eq!((page.map(5), page.map(6).map(|map| map.number)), (None, Some(2)));
        for _ in 0..CHANGED_LOG {
            page.set_map(1, None);
        }
        assert_eq!(page.changed_maps(3).0, ChangedMaps::All);
        page.set_map(64, Some(&record));
        assert_eq!(page.map(64), None);
    }
}
