//! Guest memory in this process, for tests and benchmarks: flat, with a map table, sharable with the "guest" (another handle, perhaps
//! another thread), and with a mode in which everything goes by messages, as memory that is not shared does.
//!
//! Guest address = offset in the memory; the map table says which of it the device may reach.

use crate::{Direction, GuestMemory, MemoryError};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The memory itself, as its guest sees it. A clone is the same memory. Accesses outside read zeros and write nothing.
#[derive(Clone, Debug)]
pub struct FlatGuest {
    words: Arc<[AtomicU64]>,
}

impl FlatGuest {
    /// `bytes` bytes of zero.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self {
            words: (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    fn word(&self, address: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(address / 8).ok()?)
    }

    pub fn read(&self, address: u64, into: &mut [u8]) {
        let mut address = address;
        let mut rest = into;
        if address.is_multiple_of(8) {
            let whole = rest.len() & !7;
            let (words, tail) = rest.split_at_mut(whole);
            for (word, at) in words.chunks_exact_mut(8).zip((address..).step_by(8)) {
                word.copy_from_slice(&self.load_u64(at).to_le_bytes());
            }
            rest = tail;
            address = address.wrapping_add(whole as u64);
        }
        while !rest.is_empty() {
            let word = self.load_u64(address & !7).to_le_bytes();
            let within = (address & 7) as usize;
            let bytes = (8 - within).min(rest.len());
            let (piece, more) = rest.split_at_mut(bytes);
            piece.copy_from_slice(&word[within..within + bytes]);
            rest = more;
            address = address.wrapping_add(bytes as u64);
        }
    }

    pub fn write(&self, address: u64, from: &[u8]) {
        let mut address = address;
        let mut rest = from;
        if address.is_multiple_of(8) {
            let (words, tail) = rest.as_chunks::<8>();
            for (word, at) in words.iter().zip((address..).step_by(8)) {
                self.store_u64(at, u64::from_le_bytes(*word));
            }
            address = address.wrapping_add(8 * words.len() as u64);
            rest = tail;
        }
        while !rest.is_empty() {
            let within = (address & 7) as usize;
            let bytes = (8 - within).min(rest.len());
            let (piece, more) = rest.split_at(bytes);
            if let Some(word) = self.word(address) {
                let mut value = [0; 8];
                value[within..within + bytes].copy_from_slice(piece);
                if bytes == 8 {
                    word.store(u64::from_le_bytes(value), Ordering::Release);
                } else {
                    let mut mask = [0; 8];
                    mask[within..within + bytes].fill(0xff);
                    replace(word, u64::from_le_bytes(mask), u64::from_le_bytes(value));
                }
            }
            rest = more;
            address = address.wrapping_add(bytes as u64);
        }
    }

    #[must_use]
    pub fn load_u64(&self, address: u64) -> u64 {
        self.word(address).map_or(0, |word| word.load(Ordering::Acquire))
    }

    #[must_use]
    pub fn load_u32(&self, address: u64) -> u32 {
        (self.load_u64(address & !7) >> (8 * (address & 4))) as u32
    }

    pub fn store_u64(&self, address: u64, value: u64) {
        if let Some(word) = self.word(address) {
            word.store(value, Ordering::Release);
        }
    }

    pub fn store_u32(&self, address: u64, value: u32) {
        let shift = 8 * (address & 4);
        if let Some(word) = self.word(address) {
            replace(word, u64::from(u32::MAX) << shift, u64::from(value) << shift);
        }
    }
}

/// Replaces the bits of `mask`, and leaves the others to whoever writes them.
fn replace(word: &AtomicU64, mask: u64, value: u64) {
    let mut before = word.load(Ordering::Relaxed);
    while let Err(now) = word.compare_exchange_weak(
        before,
        before & !mask | value & mask,
        Ordering::AcqRel,
        Ordering::Relaxed,
    ) {
        before = now;
    }
}

/// A DMA region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlatRegion {
    pub iova: u64,
    pub bytes: u64,
    pub readable: bool,
    pub writable: bool,
    /// Number of the map; 0: it has none.
    pub number: u64,
}

/// The device's way to a [`FlatGuest`].
#[derive(Debug)]
pub struct FlatMemory {
    guest: FlatGuest,
    regions: Vec<FlatRegion>,
    by_messages: bool,
    quiet: bool,
    /// Reads asked for by message; `None`: not answered yet.
    asked: BTreeMap<(u64, usize), Option<Vec<u8>>>,
    queued: VecDeque<(u64, Vec<u8>)>,
    /// Writes by message to these addresses (buffers) are refused by the VM's process.
    refusing: Range<u64>,
    refused: Vec<u64>,
    /// Writes by message that were given up.
    given_up: Vec<u64>,
    /// Accesses so far, of any kind.
    accesses: u64,
}

impl FlatMemory {
    /// All of `guest` mapped, readable and writable, shared.
    #[must_use]
    pub fn new(guest: &FlatGuest) -> Self {
        Self {
            guest: guest.clone(),
            regions: vec![FlatRegion {
                iova: 0,
                bytes: guest.len_bytes(),
                readable: true,
                writable: true,
                number: 0,
            }],
            by_messages: false,
            quiet: false,
            asked: BTreeMap::new(),
            queued: VecDeque::new(),
            refusing: 0..0,
            refused: Vec::new(),
            given_up: Vec::new(),
            accesses: 0,
        }
    }

    pub fn set_regions(&mut self, regions: Vec<FlatRegion>) {
        self.regions = regions;
    }

    /// From now on everything goes by messages (or not any more).
    pub fn set_by_messages(&mut self, by_messages: bool) {
        self.by_messages = by_messages;
    }

    /// The VM's process refuses writes to these addresses, where a guest has buffers.
    pub fn set_refusing(&mut self, refusing: Range<u64>) {
        self.refusing = refusing;
    }

    /// No DMA (bus mastering is off), or again.
    pub fn set_quiet(&mut self, quiet: bool) {
        self.quiet = quiet;
    }

    /// The VM's process answers: reads that were asked for have their bytes, queued writes are done. False: there was nothing to do.
    pub fn deliver(&mut self) -> bool {
        let mut done = !self.queued.is_empty();
        for (address, bytes) in self.queued.drain(..) {
            if self.refusing.contains(&address) {
                self.refused.push(address);
            } else {
                self.guest.write(address, &bytes);
            }
        }
        for ((address, length), answer) in &mut self.asked {
            if answer.is_none() {
                done = true;
                let mut bytes = vec![0; *length];
                self.guest.read(*address, &mut bytes);
                *answer = Some(bytes);
            }
        }
        done
    }

    /// As [`FlatMemory::deliver`], of so many writes only, in their order.
    pub fn deliver_writes(&mut self, count: usize) {
        for (address, bytes) in self.queued.drain(..count.min(self.queued.len())) {
            self.guest.write(address, &bytes);
        }
    }

    /// The device was reset, or its process ended: writes that wait are void.
    pub fn give_up(&mut self) {
        self.given_up
            .extend(self.queued.drain(..).map(|(address, _)| address));
    }

    #[must_use]
    pub fn accesses(&self) -> u64 {
        self.accesses
    }

    fn look_up(&mut self, iova: u64, bytes: u64, direction: Direction) -> Result<(), MemoryError> {
        self.accesses += 1;
        if self.quiet {
            return Err(MemoryError::Quiet);
        }
        let region = self.regions.iter().find(|region| {
            iova.checked_sub(region.iova)
                .is_some_and(|offset| offset.checked_add(bytes).is_some_and(|end| end <= region.bytes))
        });
        match region {
            None => Err(MemoryError::Unmapped { iova }),
            Some(region) => {
                let allowed = match direction {
                    Direction::FromGuest => region.readable,
                    Direction::IntoGuest => region.writable,
                };
                allowed.then_some(()).ok_or(MemoryError::Denied { iova })
            }
        }
    }

    fn put(&mut self, iova: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.look_up(iova, bytes.len() as u64, Direction::IntoGuest)?;
        if self.by_messages {
            self.queued.push_back((iova, bytes.to_vec()));
        } else {
            self.guest.write(iova, bytes);
        }
        Ok(())
    }
}

impl GuestMemory for FlatMemory {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.look_up(iova, into.len() as u64, Direction::FromGuest)?;
        if !self.by_messages {
            self.guest.read(iova, into);
            return Ok(());
        }
        let key = (iova, into.len());
        match self.asked.remove(&key) {
            Some(Some(bytes)) => {
                into.copy_from_slice(&bytes);
                Ok(())
            }
            _ => {
                self.asked.insert(key, None);
                Err(MemoryError::Pending)
            }
        }
    }

    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.put(iova, from)
    }

    fn take_refused(&mut self, iova: u64, bytes: u64) -> bool {
        let before = self.refused.len();
        self.refused.retain(|at| !(iova..iova + bytes).contains(at));
        self.refused.len() != before
    }

    fn forget_reads(&mut self) {
        self.asked.clear();
    }

    fn forget_reads_of(&mut self, iova: u64, bytes: u64) {
        let end = iova.saturating_add(bytes);
        let elsewhere = |at: u64, length: usize| at >= end || at.saturating_add(length as u64) <= iova;
        self.asked
            .retain(|(at, length), answer| answer.is_none() || elsewhere(*at, *length));
    }

    fn drop_writes(&mut self, iova: u64, bytes: u64) {
        let end = iova.saturating_add(bytes);
        let given_up = &mut self.given_up;
        self.queued.retain(|(at, data)| {
            let stays = *at >= end || at + data.len() as u64 <= iova;
            if !stays {
                given_up.push(*at);
            }
            stays
        });
    }

    fn arrived(&mut self, iova: u64, bytes: u64) -> Result<bool, MemoryError> {
        let range = iova..iova + bytes;
        if self.queued.iter().any(|(at, _)| range.contains(at)) {
            return Err(MemoryError::Pending);
        }
        Ok(!self.given_up.iter().any(|at| range.contains(at)))
    }

    fn forget_given_up(&mut self) {
        self.given_up.clear();
    }

    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError> {
        if self.by_messages {
            let mut bytes = [0; 4];
            self.read(iova, &mut bytes)?;
            return Ok(u32::from_le_bytes(bytes));
        }
        self.look_up(iova, 4, Direction::FromGuest)?;
        Ok(self.guest.load_u32(iova))
    }

    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError> {
        if self.by_messages {
            return self.put(iova, &value.to_le_bytes());
        }
        self.look_up(iova, 4, Direction::IntoGuest)?;
        self.guest.store_u32(iova, value);
        Ok(())
    }

    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError> {
        if self.by_messages {
            return self.put(iova, &value.to_le_bytes());
        }
        self.look_up(iova, 8, Direction::IntoGuest)?;
        self.guest.store_u64(iova, value);
        Ok(())
    }

    fn fence(&mut self) {
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    fn settled(&mut self) -> Result<(), MemoryError> {
        if self.quiet {
            return Err(MemoryError::Quiet);
        }
        self.queued.is_empty().then_some(()).ok_or(MemoryError::Pending)
    }

    fn check(&mut self, iova: u64, bytes: u64, direction: Direction) -> Result<(), MemoryError> {
        self.look_up(iova, bytes, direction)
    }

    fn newest_map(&self) -> u64 {
        self.regions.iter().map(|region| region.number).max().unwrap_or(0)
    }

    fn newest_map_of(&mut self, iova: u64, bytes: u64) -> u64 {
        let meets = |region: &&FlatRegion| {
            region.iova < iova.saturating_add(bytes) && iova < region.iova + region.bytes
        };
        let numbers = self.regions.iter().filter(meets).map(|region| region.number);
        numbers.max().unwrap_or(0)
    }

    fn is_shared(&mut self, _iova: u64) -> bool {
        !self.by_messages
    }

    fn prove(&mut self, iova: u64, nonce: u64) -> Result<bool, MemoryError> {
        let mut there = [0; 8];
        self.read(iova, &mut there)?;
        if u64::from_le_bytes(there) != nonce {
            return Err(MemoryError::Gone { iova });
        }
        Ok(!self.by_messages)
    }
}
