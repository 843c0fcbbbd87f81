//! The core page of a session: what one core life says about it. Written by that core alone; the front looks at no older one.
//!
//! | words | meaning |
//! |---|---|
//! | 0..3 | layout, session, life (constant) |
//! | 3 fenced | no DMA begun before this fence goes on |
//! | 4 busy | DMA in flight (1) or not (0) |
//! | 5, 6 state | generation << 32 \| state; cause |
//! | 64 + n | ring n: epoch << 32 \| ring state << 16 \| status |
//! | 128 + v | raise: interrupts due on vector v so far |
//! | 192.. | port result: sequence, bytes, then a completion and its output |

use super::{LAYOUT, Words, is_readable};
use vmgmt_abi::registers::{DeviceState, RINGS_MAX, RingState, VECTORS_MAX};
use vmgmt_abi::{Status, port, ring};

const SESSION: usize = 1;
const LIFE: usize = 2;
const FENCED: usize = 3;
const BUSY: usize = 4;
const STATE: usize = 5;
const CAUSE: usize = 6;
const OPEN: usize = 64;
const RAISE: usize = 128;
const PORT: usize = 192;
const PORT_BYTES: usize = PORT + 2;
const PORT_BYTES_MAX: usize = ring::COMPLETION_BYTES + port::OUTPUT_BYTES_MAX;

const _: () = assert!(OPEN + RINGS_MAX <= RAISE && RAISE + VECTORS_MAX <= PORT);

/// The core's answer to a ring that was enabled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenAnswer {
    /// Epoch of the set-up that is answered; an answer to another epoch is void.
    pub epoch: u32,
    pub state: RingState,
    pub status: Status,
}

/// View of a core page. The writer's verbs are for the core alone.
#[derive(Clone, Debug)]
pub struct CorePage<W: Words> {
    words: W,
}

impl<W: Words> CorePage<W> {
    /// Words of a page.
    pub const WORDS: usize = PORT_BYTES + PORT_BYTES_MAX.div_ceil(8);

    pub const fn new(words: W) -> Self {
        Self { words }
    }

    /// Writes the constant words (the front does so, before it hands the page over).
    pub fn init(&self, session: u64, life: u64) {
        self.words.store(SESSION, session);
        self.words.store(LIFE, life);
        self.words.store(0, LAYOUT);
    }
    #[must_use]
    pub fn is_valid(&self) -> bool {
        is_readable(self.words.load(0)) && self.words.len() >= Self::WORDS
    }
    #[must_use]
    pub fn session(&self) -> u64 {
        self.words.load(SESSION)
    }
    #[must_use]
    pub fn life(&self) -> u64 {
        self.words.load(LIFE)
    }
    #[must_use]
    pub fn fenced(&self) -> u64 {
        self.words.load(FENCED)
    }
    pub fn set_fenced(&self, fence: u64) {
        self.words.store(FENCED, fence);
    }
    #[must_use]
    pub fn busy(&self) -> bool {
        self.words.load(BUSY) != 0
    }
    pub fn set_busy(&self, busy: bool) {
        self.words.store(BUSY, u64::from(busy));
    }
    /// The state that the core gave the device in `generation`; `None` when it has said nothing in that generation.
    #[must_use]
    pub fn state(&self, generation: u64) -> Option<(DeviceState, Status)> {
        let word = self.words.load(STATE);
        (word >> 32 == generation & 0xffff_ffff && word & 0xffff_ffff != 0)
            .then(|| (DeviceState(word as u32), Status(self.words.load(CAUSE) as u16)))
    }
    pub fn set_state(&self, generation: u64, state: DeviceState, cause: Status) {
        self.words.store(CAUSE, u64::from(cause.0));
        self.words.store(STATE, (generation << 32) | u64::from(state.0));
    }
    #[must_use]
    pub fn open_answer(&self, n: usize) -> OpenAnswer {
        let word = if n < RINGS_MAX {
            self.words.load(OPEN + n)
        } else {
            0
        };
        OpenAnswer {
            epoch: (word >> 32) as u32,
            state: RingState((word >> 16) as u32 & 0xffff),
            status: Status(word as u16),
        }
    }
    pub fn set_open_answer(&self, n: usize, answer: OpenAnswer) {
        if n < RINGS_MAX {
            let word = (u64::from(answer.epoch) << 32)
                | (u64::from(answer.state.0 & 0xffff) << 16)
                | u64::from(answer.status.0);
            self.words.store(OPEN + n, word);
        }
    }
    /// Interrupts due on `vector` so far; pending while it differs from the front page's ack.
    #[must_use]
    pub fn raise(&self, vector: usize) -> u64 {
        if vector < VECTORS_MAX {
            self.words.load(RAISE + vector)
        } else {
            0
        }
    }
    pub fn set_raise(&self, vector: usize, value: u64) {
        if vector < VECTORS_MAX {
            self.words.store(RAISE + vector, value);
        }
    }
    /// Sequence of the port submission that is done (0: none).
    #[must_use]
    pub fn port_done(&self) -> u64 {
        self.words.load(PORT)
    }
    /// The result of port submission `sequence`: a completion and its output; `None` when it is not there.
    #[must_use]
    pub fn port_result(&self, sequence: u64) -> Option<Vec<u8>> {
        if sequence == 0 || self.words.load(PORT) != sequence {
            return None;
        }
        let bytes = (self.words.load(PORT + 1) as usize).min(PORT_BYTES_MAX);
        let mut data = vec![0; bytes];
        self.words.read_bytes(PORT_BYTES, &mut data);
        (self.words.load(PORT) == sequence).then_some(data)
    }
    pub fn set_port_result(&self, sequence: u64, result: &[u8]) {
        let result = result.get(..PORT_BYTES_MAX).unwrap_or(result);
        self.words.store(PORT, 0);
        self.words.write_bytes(PORT_BYTES, result);
        self.words.store(PORT + 1, result.len() as u64);
        self.words.store(PORT, sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PlainWords;

    #[test]
    fn what_is_written_is_read() {
        let page = CorePage::new(PlainWords::new(CorePage::<PlainWords>::WORDS));
        page.init(7, 2);
        assert!(page.is_valid());
        assert_eq!(page.state(1), None);
        page.set_state(1, DeviceState::FAILED, Status::BAD_ADDRESS);
        assert_eq!(
            (page.state(1), page.state(2)),
            (Some((DeviceState::FAILED, Status::BAD_ADDRESS)), None)
        );
        let answer = OpenAnswer {
            epoch: 8,
            state: RingState::REFUSED,
            status: Status::WRONG_MODE,
        };
        page.set_open_answer(3, answer);
        assert_eq!(page.open_answer(3), answer);
        page.set_port_result(9, &[1, 2, 3]);
        assert_eq!(
            (page.port_result(9), page.port_result(8)),
            (Some(vec![1, 2, 3]), None)
        );
    }
}
