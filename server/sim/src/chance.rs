//! GARDEN, chance: one stream of random numbers per seed, and how often what happens in it (drawn anew for each seed: swarm testing).
//!
//! In: a seed. Out: the same numbers for ever.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Random numbers.
#[derive(Clone, Debug)]
pub struct Chance(ChaCha8Rng);

impl Chance {
    /// The stream of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }
    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0.next_u64()
    }
    /// A number below `below` (0 for 0).
    pub fn below(&mut self, below: u64) -> u64 {
        self.0.next_u64() % below.max(1)
    }
    /// A number from `first` to `last`.
    pub fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }
    /// True `permille` times of 1000.
    pub fn permille(&mut self, permille: u32) -> bool {
        self.below(1000) < u64::from(permille)
    }
    /// One of them.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len() as u64) as usize)
    }
    /// The index of a weight, as often as it weighs.
    pub fn weighted(&mut self, weights: &[u32]) -> usize {
        let all: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        let mut at = self.below(all);
        for (index, weight) in weights.iter().enumerate() {
            if at < u64::from(*weight) {
                return index;
            }
            at -= u64::from(*weight);
        }
        0
    }
    /// Base weights, each kept, made rarer, made four times as frequent, or (one in eight) left out.
    pub fn swarm(&mut self, base: &[u32]) -> Vec<u32> {
        let swarm = |(chance, base): (u64, &u32)| match chance {
            0 => 0,
            1 | 2 => base.div_ceil(4),
            3 => base * 4,
            _ => *base,
        };
        base.iter().map(|base| (self.below(8), base)).map(swarm).collect()
    }
}
