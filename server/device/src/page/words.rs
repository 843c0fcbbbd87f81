//! Shared words behind a trait: the shell maps them, tests use plain memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Of [`Words::fence`], by name, so that a model checker runs with it.
pub const FENCE: Ordering = Ordering::SeqCst;

/// An array of shared 64-bit words. Indexes out of range read 0 and are not written: layouts are constants of ours, and
/// a page that a peer made too small must not bring the process down.
pub trait Words: Clone {
    /// Number of words.
    fn len(&self) -> usize;
    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Loads with acquire order.
    fn load(&self, index: usize) -> u64;
    /// Stores with release order.
    fn store(&self, index: usize, value: u64);
    /// A sequentially consistent fence between what was stored before and what is loaded after.
    fn fence(&self) {
        fence(FENCE);
    }
    /// Copies bytes out, from the start of word `index` on; the shorter of both ends it. Not atomic as a whole.
    fn read_bytes(&self, index: usize, into: &mut [u8]) {
        for (offset, chunk) in into.chunks_mut(8).enumerate() {
            let word = self.load(index + offset).to_le_bytes();
            let bytes = chunk.len();
            chunk.copy_from_slice(&word[..bytes]);
        }
    }
    /// Copies bytes in, from the start of word `index` on; a last part of a word is filled up with zeros.
    fn write_bytes(&self, index: usize, from: &[u8]) {
        for (offset, chunk) in from.chunks(8).enumerate() {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store(index + offset, u64::from_le_bytes(word));
        }
    }
}

/// Words in the memory of one process, for tests and the simulator.
#[derive(Clone, Debug)]
pub struct PlainWords(Arc<[AtomicU64]>);

impl PlainWords {
    /// `count` words of zero.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Words for PlainWords {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn load(&self, index: usize) -> u64 {
        self.0.get(index).map_or(0, |word| word.load(Ordering::Acquire))
    }
    fn store(&self, index: usize, value: u64) {
        if let Some(word) = self.0.get(index) {
            word.store(value, Ordering::Release);
        }
    }
}
