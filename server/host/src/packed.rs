//! State on its way to another process or program: a head, the state as CBOR, and descriptors that the state names by number.
//!
//! In: a saved state and descriptors; or bytes and descriptors of this or another version. Out: the other of both. Must never know: what is
//! in the state.
//!
//! A field that a later version adds is skipped by an older reader, unless the head says that it is needed; a field that is missing is an
//! error, unless it has a default.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::rc::Rc;

/// Why a state cannot be packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("the state has version {found}; this program reads {} to {}", .read.start(), .read.end())]
    Version { found: u32, read: RangeInclusive<u32> },
    #[error("the state needs {0:?}, which this program does not have")]
    Feature(String),
    #[error("the state cannot be read: {0}")]
    Unreadable(String),
    #[error("descriptor {0} is missing, named twice or not named")]
    Descriptor(u32),
    #[error("the state contradicts itself: {0}")]
    Contradiction(&'static str),
    #[error("{0}")]
    Other(String),
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Self::Other(error.to_string())
    }
}

impl From<rustix::io::Errno> for Refusal {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Other(errno.to_string())
    }
}

impl From<&'static str> for Refusal {
    fn from(what: &'static str) -> Self {
        Self::Contradiction(what)
    }
}

/// Read before all else, so that what cannot be read is refused with its reason.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    version: u32,
    /// Features in use that not every reader of this version has.
    needs: Vec<String>,
    descriptors: u32,
}

/// Writes a state that names these descriptors.
///
/// # Errors
/// It has no form in CBOR.
pub fn write(version: u32, saved: &impl Serialize, descriptors: usize) -> Result<Vec<u8>, Refusal> {
    let head = Head {
        version,
        needs: Vec::new(),
        descriptors: descriptors as u32,
    };
    let mut bytes = Vec::new();
    ciborium::into_writer(&head, &mut bytes)
        .and_then(|()| ciborium::into_writer(saved, &mut bytes))
        .map_err(|error| Refusal::Other(error.to_string()))?;
    Ok(bytes)
}

/// Reads the head, refuses what this program cannot take, and reads the state. `descriptors`: how many came.
///
/// # Errors
/// Another version, a feature that is not known, or bytes that are no such state.
pub fn read<T: DeserializeOwned>(
    mut bytes: &[u8],
    versions: RangeInclusive<u32>,
    descriptors: usize,
) -> Result<T, Refusal> {
    let unreadable = |error: ciborium::de::Error<std::io::Error>| Refusal::Unreadable(error.to_string());
    let head: Head = ciborium::from_reader(&mut bytes).map_err(unreadable)?;
    if !versions.contains(&head.version) {
        return Err(Refusal::Version {
            found: head.version,
            read: versions,
        });
    }
    // This version has none.
    if let Some(feature) = head.needs.into_iter().next() {
        return Err(Refusal::Feature(feature));
    }
    if descriptors != head.descriptors as usize {
        return Err("another number of descriptors came than was sent".into());
    }
    let saved = ciborium::from_reader(&mut bytes).map_err(unreadable)?;
    if bytes.is_empty() {
        Ok(saved)
    } else {
        Err("there is something behind its end".into())
    }
}

/// Stands for a descriptor in a saved state: its place in the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Carried(u32);

/// The list of who packs: each descriptor once, however many name it.
#[derive(Debug, Default)]
pub struct Packer<'a> {
    pub fds: Vec<BorrowedFd<'a>>,
    numbers: BTreeMap<RawFd, Carried>,
}

impl<'a> Packer<'a> {
    pub fn carry(&mut self, fd: &'a impl AsFd) -> Carried {
        let fd = fd.as_fd();
        let next = Carried(self.fds.len() as u32);
        let number = *self.numbers.entry(fd.as_raw_fd()).or_insert(next);
        if number == next {
            self.fds.push(fd);
        }
        number
    }
}

/// The list of who unpacks: all of it must be taken.
#[derive(Debug)]
pub struct Unpacker {
    /// `None`: taken by the one who has it alone. The flag: somebody named it.
    fds: Vec<(Option<Rc<OwnedFd>>, bool)>,
}

impl Unpacker {
    #[must_use]
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        let fds = fds.into_iter().map(|fd| (Some(Rc::new(fd)), false));
        Self { fds: fds.collect() }
    }

    /// A descriptor that several may name.
    ///
    /// # Errors
    /// There is none, or somebody has it alone.
    pub fn shared(&mut self, number: Carried) -> Result<Rc<OwnedFd>, Refusal> {
        let missing = Refusal::Descriptor(number.0);
        let Some((fd, named)) = self.fds.get_mut(number.0 as usize) else {
            return Err(missing);
        };
        *named = true;
        fd.clone().ok_or(missing)
    }

    /// A descriptor that one alone names.
    ///
    /// # Errors
    /// There is none, or another has it.
    pub fn alone(&mut self, number: Carried) -> Result<OwnedFd, Refusal> {
        drop(self.shared(number)?);
        let fd = self.fds.get_mut(number.0 as usize).and_then(|(fd, _)| fd.take());
        fd.and_then(Rc::into_inner).ok_or(Refusal::Descriptor(number.0))
    }

    /// Whether each of these is there, and there is no other: then each can be taken once.
    ///
    /// # Errors
    /// One is missing, named twice or not named.
    pub fn expect_each(&self, named: &[Carried]) -> Result<(), Refusal> {
        let mut numbers: Vec<u32> = named.iter().map(|number| number.0).collect();
        numbers.sort_unstable();
        let wrong = numbers.iter().zip(0..).find(|(number, place)| *number != place);
        match wrong {
            Some((number, _)) => Err(Refusal::Descriptor(*number)),
            None if numbers.len() != self.fds.len() => Err(Refusal::Descriptor(numbers.len() as u32)),
            None => Ok(()),
        }
    }

    /// Whether all were named.
    ///
    /// # Errors
    /// One was not.
    pub fn finish(self) -> Result<(), Refusal> {
        match self.fds.iter().position(|(_, named)| !named) {
            Some(number) => Err(Refusal::Descriptor(number as u32)),
            None => Ok(()),
        }
    }
}
