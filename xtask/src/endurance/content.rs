//! The endurance runs' printing press: letters and files whose every byte follows from what they are called.
//!
//! In: who writes to whom and the number; a seed and a length. Out: bytes, and whether bytes are the ones that were meant. It must never
//! know how they travel: a letter is one line of plain ASCII, so that it fits a ring, a command line and JSON alike.

use anyhow::{Context, Result, ensure};

/// Longest payload of an ordinary letter in bytes.
const PAYLOAD_BYTES_MAX: u64 = 400;
/// Every so many letters one is long: several pages, a list of buffers.
const LONG_EVERY: u64 = 61;
const LONG_BYTES: u64 = 40_000;
/// Letters in base 32 of what a payload consists of.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// Bytes that no shift, no hole and no repetition leaves the same.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(length + 8);
    while data.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(length);
    data
}

/// A number that belongs to these words and no others (FNV-1a).
pub fn mix(words: &[&str], number: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    for word in words {
        word.bytes().for_each(&mut eat);
        eat(0);
    }
    number.to_le_bytes().into_iter().for_each(&mut eat);
    hash ^ (hash >> 29)
}

/// The letter `sequence` (from 1) of `source` to `target`. `short`: it goes through a command line.
pub fn letter(source: &str, target: &str, sequence: u64, short: bool) -> String {
    let seed = mix(&[source, target], sequence);
    let length = match sequence.is_multiple_of(LONG_EVERY) && !short {
        true => LONG_BYTES,
        false => seed % PAYLOAD_BYTES_MAX,
    };
    let payload: String = bytes(seed, usize::try_from(length).unwrap_or(0))
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(byte % 32)]))
        .collect();
    format!("{source}>{target} {sequence} {} {payload}.", u8::from(short))
}

/// What a letter says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Letter {
    pub source: String,
    pub target: String,
    pub sequence: u64,
}

/// Reads a letter; an error if one byte of it is not as it was written.
pub fn read_letter(body: &[u8]) -> Result<Letter> {
    let text = std::str::from_utf8(body).context("not text")?;
    let mut words = text.splitn(4, ' ');
    let (source, target) = words
        .next()
        .and_then(|word| word.split_once('>'))
        .context("no address")?;
    let sequence: u64 = words
        .next()
        .and_then(|word| word.parse().ok())
        .context("no number")?;
    let short = words.next() == Some("1");
    ensure!(
        letter(source, target, sequence, short) == text,
        "letter {sequence} of {source} to {target} is damaged: {} bytes",
        body.len()
    );
    Ok(Letter {
        source: source.into(),
        target: target.into(),
        sequence,
    })
}

/// A file: its name says what its bytes must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paper {
    pub name: String,
    pub seed: u64,
    pub length: usize,
}

impl Paper {
    pub fn new(kind: &str, number: u64, seed: u64, length: usize) -> Self {
        Self {
            name: format!("{kind}.{number}.{seed:016x}.{length}"),
            seed,
            length,
        }
    }

    /// From a name that somebody offers or asks for.
    pub fn from_name(name: &str) -> Result<Self> {
        let mut words = name.rsplit('.');
        let length = words
            .next()
            .and_then(|word| word.parse().ok())
            .context("no length")?;
        let seed = words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
        Ok(Self {
            name: name.into(),
            seed: seed.context("no seed")?,
            length,
        })
    }

    pub fn bytes(&self) -> Vec<u8> {
        bytes(self.seed, self.length)
    }

    /// An error that says where `found` differs.
    pub fn check(&self, found: &[u8]) -> Result<()> {
        let meant = self.bytes();
        if meant == found {
            return Ok(());
        }
        let place = meant.iter().zip(found).position(|(meant, found)| meant != found);
        anyhow::bail!(
            "{}: {} bytes instead of {}, first difference at {place:?}; crc32 {:08x} instead of {:08x}",
            self.name,
            found.len(),
            meant.len(),
            crc32fast::hash(found),
            crc32fast::hash(&meant)
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a failing step fails the test
mod tests {
    use super::*;

    #[test]
    fn a_letter_says_what_it_is_and_no_other_does() {
        for sequence in [1, 2, 60, 61] {
            for short in [false, true] {
                let text = letter("vm1", "host", sequence, short);
                let letter = read_letter(text.as_bytes()).unwrap();
                assert_eq!(
                    (&*letter.source, &*letter.target, letter.sequence),
                    ("vm1", "host", sequence)
                );
                assert!(read_letter(&text.as_bytes()[..text.len() - 1]).is_err());
                assert!(read_letter(text.replacen("vm1", "vm2", 1).as_bytes()).is_err());
            }
        }
        assert!(letter("a", "b", 61, false).len() > 40_000 && letter("a", "b", 61, true).len() < 500);
    }

    #[test]
    fn a_paper_is_known_by_its_name() {
        let paper = Paper::new("put", 7, 99, 10_000);
        assert_eq!(Paper::from_name(&paper.name).unwrap(), paper);
        let mut bytes = paper.bytes();
        paper.check(&bytes).unwrap();
        bytes[77] ^= 1;
        assert!(paper.check(&bytes).unwrap_err().to_string().contains("Some(77)"));
    }
}
