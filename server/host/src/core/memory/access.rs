//! CORE, access: the trait through which the rooms reach guest memory, and the look-up of buffers for bulk.
//!
//! In: guest addresses, untrusted. Out: copies, words, [`Pieces`], or why not. The short way is a remembered look-up and a few
//! instructions; the long way walks the map table, and asks by message where memory is not proven to be shared.

use super::limits::HITS;
use super::message_dma::{Asked, Write};
use super::object::{Extent, Proof};
use super::pieces::Part;
use super::table::Backing;
use super::{Hit, Pieces, SessionMemory};
use crate::messages::MESSAGE_DMA_BYTES_MAX;
use std::sync::Arc;
use std::sync::atomic::fence;
use vmgmt_device::page::rights;
use vmgmt_device::{Direction, GuestMemory, MemoryError};
use vmgmt_mem::{Fault, order};

/// A range within one map.
#[derive(Debug)]
struct Span {
    iova: u64,
    bytes: u64,
    number: u64,
    /// Extent and offset where it may be reached through the mapping.
    place: Option<(Arc<Extent>, usize)>,
}

/// What is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WriteKind {
    /// Part of a ring.
    Ring,
    /// A word that publishes.
    Word,
    /// A submission's buffer.
    Buffer,
}

/// Where the bytes at an address are.
enum Place {
    Mapped(Arc<Extent>, usize),
    Message,
    /// Its object has not come yet.
    Awaited,
}

impl GuestMemory for SessionMemory {
    #[inline]
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        if let Some((extent, offset)) = self.hit(iova, into.len(), rights::READ) {
            return extent
                .mapping
                .read(offset, into)
                .map_err(|fault| gone(fault, iova));
        }
        self.read_segments(&[(iova, into.len() as u64)], into)
    }

    #[inline]
    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        if self.messages.is_idle()
            && let Some((extent, offset)) = self.hit(iova, from.len(), rights::WRITE)
        {
            return extent
                .mapping
                .write(offset, from)
                .map_err(|fault| gone(fault, iova));
        }
        self.write_slow(iova, from, WriteKind::Ring)
    }

    #[inline]
    fn write_buffer(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        if self.messages.is_idle() && self.hit(iova, from.len(), rights::WRITE).is_some() {
            return self.write(iova, from);
        }
        self.write_slow(iova, from, WriteKind::Buffer)
    }

    fn take_refused(&mut self, iova: u64, bytes: u64) -> bool {
        self.messages.take_refused(iova, bytes)
    }

    #[inline]
    fn forget_reads(&mut self) {
        self.messages.forget_reads();
    }

    fn forget_reads_of(&mut self, iova: u64, bytes: u64) {
        self.messages.forget_reads_of(iova, bytes);
    }

    fn drop_writes(&mut self, iova: u64, bytes: u64) {
        self.messages.drop_writes(iova, bytes);
    }

    fn arrived(&mut self, iova: u64, bytes: u64) -> Result<bool, MemoryError> {
        self.messages.arrived(iova, bytes).ok_or(MemoryError::Pending)
    }

    fn forget_given_up(&mut self) {
        self.messages.forget_given_up();
    }

    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError> {
        if let Some((extent, offset)) = self.hit(iova, 4, rights::READ) {
            return extent.mapping.load_u32(offset).map_err(|fault| gone(fault, iova));
        }
        let mut bytes = [0; 4];
        self.read_segments(&[(iova, 4)], &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    #[inline]
    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError> {
        if self.messages.is_idle()
            && let Some((extent, offset)) = self.hit(iova, 4, rights::WRITE)
        {
            return extent
                .mapping
                .store_u32(offset, value)
                .map_err(|fault| gone(fault, iova));
        }
        self.write_slow(iova, &value.to_le_bytes(), WriteKind::Word)
    }

    #[inline]
    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError> {
        if self.messages.is_idle()
            && let Some((extent, offset)) = self.hit(iova, 8, rights::WRITE)
        {
            return extent
                .mapping
                .store_u64(offset, value)
                .map_err(|fault| gone(fault, iova));
        }
        self.write_slow(iova, &value.to_le_bytes(), WriteKind::Word)
    }

    #[inline]
    fn fence(&mut self) {
        fence(order::FENCE);
    }

    fn settled(&mut self) -> Result<(), MemoryError> {
        self.store_late();
        match self.messages.settled() {
            Ok(true) => Ok(()),
            Ok(false) => Err(MemoryError::Pending),
            Err(iova) => Err(MemoryError::Gone { iova }),
        }
    }

    fn check(&mut self, iova: u64, bytes: u64, direction: Direction) -> Result<(), MemoryError> {
        self.quiet()?;
        let right = right(direction);
        self.walk(iova, bytes, right, |_, _, _| Ok(()))
    }

    fn newest_map(&self) -> u64 {
        self.table.newest()
    }

    fn newest_map_of(&mut self, iova: u64, bytes: u64) -> u64 {
        self.table.newest_of(iova, bytes)
    }

    fn is_shared(&mut self, iova: u64) -> bool {
        matches!(self.place(iova), Some((_, Place::Mapped(..))))
    }

    fn prove(&mut self, iova: u64, nonce: u64) -> Result<bool, MemoryError> {
        self.check(iova, 8, Direction::FromGuest)?;
        let Some(object) = self.table.find(iova).map(|map| map.record.object) else {
            return Err(MemoryError::Unmapped { iova });
        };
        // A nonce of zero would be found in any fresh memory.
        if nonce != 0 {
            match self.mapped(iova) {
                Some(Place::Awaited) => return Err(MemoryError::Pending),
                Some(Place::Mapped(extent, offset)) => {
                    let mut bytes = [0; 8];
                    // Across the end of a map nothing is proven.
                    let one_map = self.lies_in_one_map(iova, 8);
                    if one_map
                        && extent.mapping.read(offset, &mut bytes).is_ok()
                        && u64::from_le_bytes(bytes) == nonce
                    {
                        self.messages.forget(iova, 8);
                        self.set_proof(object, Proof::Shared);
                        return Ok(true);
                    }
                }
                _ => {}
            }
        }
        self.set_proof(object, Proof::Unproven);
        let mut bytes = [0; 8];
        self.read_segments(&[(iova, 8)], &mut bytes)?;
        if u64::from_le_bytes(bytes) != nonce {
            return Err(MemoryError::Gone { iova });
        }
        if self.objects.contains(object) {
            self.set_proof(object, Proof::Private);
            self.notice(format!(
                "session {}: the memory at guest address {iova:#x} (object {object}) is not shared with us: all of it is \
                 reached by messages, slowly. Start QEMU with share=on on its memory backend",
                self.session
            ));
        } else if object == 0 && !self.told_no_descriptor {
            self.told_no_descriptor = true;
            self.notice(format!(
                "session {}: the VM's memory comes without descriptors: all of it is reached by messages, slowly. Start \
                 QEMU with `-object memory-backend-memfd,id=m,size=...,share=on -machine ...,memory-backend=m`",
                self.session
            ));
        }
        Ok(false)
    }
}

impl SessionMemory {
    /// Looks a buffer up, to be held while bytes move: one lease for all of it. Segments are (guest address, bytes).
    ///
    /// Within a turn only. Its holders may keep it across turns and on other threads, but not for long.
    ///
    /// # Errors
    /// As [`GuestMemory::check`]; Pending when an object has not come yet (see [`SessionMemory::wants_turn`]).
    pub fn resolve(&mut self, segments: &[(u64, u64)], direction: Direction) -> Result<Pieces, MemoryError> {
        self.quiet()?;
        let mut parts = Vec::with_capacity(segments.len());
        let mut at = 0u64;
        for span in self.spans(segments, right(direction), true)? {
            parts.push(Part {
                at,
                iova: span.iova,
                bytes: usize::try_from(span.bytes).map_err(|_| MemoryError::Unmapped { iova: span.iova })?,
                number: span.number,
                place: span.place,
            });
            at = at
                .checked_add(span.bytes)
                .ok_or(MemoryError::Unmapped { iova: span.iova })?;
        }
        let pieces = Pieces::new(parts, direction);
        self.leases.retain(|lease| lease.strong_count() > 0);
        self.leases.push(Arc::downgrade(pieces.lease()));
        Ok(pieces)
    }

    /// Copies out of pieces, also those that are reached by messages: Pending until all has come; call again with the same arguments.
    ///
    /// # Errors
    /// As [`GuestMemory::read`]; Gone also when the pieces were revoked or are too short.
    pub fn read_pieces(&mut self, pieces: &Pieces, at: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let segments = Self::held_segments(pieces, at, into.len())?;
        self.read_segments(&segments, into)
    }

    /// Copies into pieces, also those that are reached by messages: queued in order, visible when [`GuestMemory::settled`] says so.
    /// Keep within [`SessionMemory::write_room`].
    ///
    /// # Errors
    /// As [`GuestMemory::write`]; Gone also when the pieces were revoked or are too short.
    pub fn write_pieces(&mut self, pieces: &Pieces, at: u64, from: &[u8]) -> Result<(), MemoryError> {
        let mut rest = from;
        for (iova, bytes) in Self::held_segments(pieces, at, from.len())? {
            let (now, later) = rest.split_at(rest.len().min(bytes as usize));
            rest = later;
            self.write_buffer(iova, now)?;
        }
        Ok(())
    }

    fn held_segments(pieces: &Pieces, at: u64, bytes: usize) -> Result<Vec<(u64, u64)>, MemoryError> {
        pieces
            .segments(at, bytes)
            .filter(|_| !pieces.is_revoked())
            .ok_or(MemoryError::Gone { iova: 0 })
    }

    /// The short way: a remembered look-up that covers the range.
    #[inline]
    fn hit(&self, iova: u64, bytes: usize, right: u64) -> Option<(&Extent, usize)> {
        if !self.open {
            return None;
        }
        let hit = self.hits.get(slot(iova))?.as_ref()?;
        let skip = iova.wrapping_sub(hit.first);
        let fits = skip < hit.bytes && bytes as u64 <= hit.bytes - skip && hit.rights & right != 0;
        fits.then(|| (&*hit.extent, hit.offset + skip as usize))
    }

    fn quiet(&self) -> Result<(), MemoryError> {
        if self.open {
            Ok(())
        } else {
            Err(MemoryError::Quiet)
        }
    }

    /// Reads segments whole: through mappings, and by message what must be, all or Pending.
    fn read_segments(&mut self, segments: &[(u64, u64)], into: &mut [u8]) -> Result<(), MemoryError> {
        self.quiet()?;
        let spans = self.spans(segments, rights::READ, true)?;
        let messages: Vec<_> = spans
            .iter()
            .filter(|span| span.place.is_none())
            .flat_map(Span::messages)
            .collect();
        let mut pending = false;
        let mut failed = None;
        for (iova, bytes, number) in &messages {
            match self.messages.ask(*iova, *bytes, *number) {
                Asked::Ready => {}
                Asked::Pending => pending = true,
                Asked::Failed => failed = failed.or(Some(*iova)),
            }
        }
        if let Some(iova) = failed {
            // The rest must not be found, old, by a later reader.
            messages
                .iter()
                .for_each(|(iova, bytes, _)| self.messages.forget(*iova, *bytes));
            return Err(MemoryError::Gone { iova });
        }
        if pending {
            return Err(MemoryError::Pending);
        }
        let mut rest = into;
        for span in &spans {
            let (now, later) = rest.split_at_mut(span.bytes as usize);
            rest = later;
            match &span.place {
                Some((extent, offset)) => {
                    extent
                        .mapping
                        .read(*offset, now)
                        .map_err(|fault| gone(fault, span.iova))?;
                }
                None => {
                    for ((iova, bytes, _), chunk) in span
                        .messages()
                        .zip(now.chunks_mut(MESSAGE_DMA_BYTES_MAX as usize))
                    {
                        let data = self
                            .messages
                            .take(iova, bytes)
                            .ok_or(MemoryError::Gone { iova })?;
                        chunk.copy_from_slice(data.get(..chunk.len()).ok_or(MemoryError::Gone { iova })?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the long way: by message what must be, and after such a write the rest behind it.
    fn write_slow(&mut self, iova: u64, from: &[u8], kind: WriteKind) -> Result<(), MemoryError> {
        self.quiet()?;
        // An object that has not come yet is no reason to wait: a message does the same.
        let spans = self.spans(&[(iova, from.len() as u64)], rights::WRITE, false)?;
        let mut rest = from;
        for span in spans {
            let (now, later) = rest.split_at(span.bytes as usize);
            rest = later;
            match &span.place {
                Some((extent, offset)) if !self.messages.has_writes() => {
                    store(extent, *offset, now).map_err(|fault| gone(fault, span.iova))?;
                }
                place => {
                    let local = place.is_some();
                    let chunk_bytes = if local {
                        now.len().max(1)
                    } else {
                        MESSAGE_DMA_BYTES_MAX as usize
                    };
                    let mut at = span.iova;
                    for chunk in now.chunks(chunk_bytes) {
                        let write = Write {
                            iova: at,
                            data: chunk.to_vec(),
                            number: span.number,
                            barrier: kind == WriteKind::Word,
                            local,
                            buffer: kind == WriteKind::Buffer,
                        };
                        if !self.messages.write(write) {
                            return Err(MemoryError::Gone { iova: at });
                        }
                        at += chunk.len() as u64;
                    }
                }
            }
        }
        Ok(())
    }

    /// A queued write to shared memory, done now.
    pub(super) fn write_through(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        let mut rest = from;
        for span in self.spans(&[(iova, from.len() as u64)], rights::WRITE, false)? {
            let (now, later) = rest.split_at(span.bytes as usize);
            rest = later;
            let (extent, offset) = span.place.as_ref().ok_or(MemoryError::Gone { iova })?;
            store(extent, *offset, now).map_err(|fault| gone(fault, span.iova))?;
        }
        Ok(())
    }

    /// The ranges of segments, cut at maps. With `wait` an object that has not come yet is Pending, else it is by message.
    fn spans(&mut self, segments: &[(u64, u64)], right: u64, wait: bool) -> Result<Vec<Span>, MemoryError> {
        let mut spans = Vec::with_capacity(segments.len());
        for (iova, bytes) in segments {
            self.walk(*iova, *bytes, right, |memory, iova, bytes| {
                let Some((number, place)) = memory.place(iova) else {
                    return Err(MemoryError::Unmapped { iova });
                };
                let place = match place {
                    Place::Mapped(extent, offset) => Some((extent, offset)),
                    Place::Awaited if wait => return Err(MemoryError::Pending),
                    Place::Awaited | Place::Message => None,
                };
                spans.push(Span {
                    iova,
                    bytes,
                    number,
                    place,
                });
                Ok(())
            })?;
        }
        Ok(spans)
    }

    /// Calls `visit` with each part of a range that lies in one map, after the map's rights were checked.
    fn walk(
        &mut self,
        iova: u64,
        bytes: u64,
        right: u64,
        mut visit: impl FnMut(&mut Self, u64, u64) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let (mut iova, mut left) = (iova, bytes);
        while left > 0 {
            let mut found = self.table.find(iova).map(|map| map.record);
            // The guest may have mapped it after this turn began, and before it submitted what names it.
            if found.is_none() && self.table.refresh(&self.front) {
                self.hits = std::array::from_fn(|_| None);
                found = self.table.find(iova).map(|map| map.record);
            }
            let record = found.ok_or(MemoryError::Unmapped { iova })?;
            if record.rights & self.objects.rights(record.object) & right == 0 {
                return Err(MemoryError::Denied { iova });
            }
            let part = left.min(record.bytes - (iova - record.iova));
            visit(self, iova, part)?;
            left -= part;
            // A map may end at the very last address: only what is left needs the next one.
            if left > 0 {
                iova = iova
                    .checked_add(part)
                    .ok_or(MemoryError::Unmapped { iova: u64::MAX })?;
            }
        }
        Ok(())
    }

    /// Number of the map at `iova`, and where its bytes are to be reached.
    fn place(&mut self, iova: u64) -> Option<(u64, Place)> {
        let record = self.table.find(iova)?.record;
        let place = match self.mapped(iova)? {
            Place::Mapped(..) if self.objects.proof(record.object) != Proof::Shared => Place::Message,
            Place::Mapped(extent, offset) => {
                let start = offset - (iova - record.iova) as usize;
                if let Some(hit) = self.hits.get_mut(slot(iova)) {
                    *hit = Some(Hit {
                        first: record.iova,
                        bytes: record.bytes,
                        rights: record.rights & self.objects.rights(record.object),
                        extent: extent.clone(),
                        offset: start,
                    });
                }
                Place::Mapped(extent, offset)
            }
            place => place,
        };
        Some((record.number, place))
    }

    /// Where the bytes at `iova` are mapped, proven or not.
    fn mapped(&mut self, iova: u64) -> Option<Place> {
        let map = self.table.find(iova)?;
        let record = map.record;
        let skip = (iova - record.iova) as usize;
        match &map.backing {
            Backing::Mapped(extent, offset) => return Some(Place::Mapped(extent.clone(), offset + skip)),
            Backing::Messages => return Some(Place::Message),
            Backing::Unknown if record.object == 0 => {
                map.backing = Backing::Messages;
                return Some(Place::Message);
            }
            Backing::Unknown => {}
        }
        let (backing, place) = match self.objects.extent(&record) {
            Some(Ok((extent, offset))) => (
                Backing::Mapped(extent.clone(), offset),
                Place::Mapped(extent, offset + skip),
            ),
            Some(Err(error)) => {
                self.notice(format!(
                    "session {}: {} bytes at guest address {:#x} are reached by messages: {error}",
                    self.session, record.bytes, record.iova
                ));
                (Backing::Messages, Place::Message)
            }
            None if self.drained < self.table.seen() => {
                self.wants_drain = true;
                return Some(Place::Awaited);
            }
            None => (Backing::Messages, Place::Message),
        };
        self.table.find(iova)?.backing = backing;
        Some(place)
    }

    /// Whether a range lies in one map.
    fn lies_in_one_map(&mut self, iova: u64, bytes: u64) -> bool {
        self.table
            .find(iova)
            .is_some_and(|map| bytes <= map.record.bytes - (iova - map.record.iova))
    }

    fn set_proof(&mut self, object: u64, proof: Proof) {
        if self.objects.proof(object) != proof {
            self.objects.set_proof(object, proof);
            self.hits = std::array::from_fn(|_| None);
        }
    }
}

impl Span {
    /// The requests by message that a range takes: (guest address, bytes, map number).
    fn messages(&self) -> impl Iterator<Item = (u64, u32, u64)> + use<> {
        let (iova, bytes, number) = (self.iova, self.bytes, self.number);
        let step = u64::from(MESSAGE_DMA_BYTES_MAX);
        (0..bytes.div_ceil(step)).map(move |n| (iova + n * step, (bytes - n * step).min(step) as u32, number))
    }
}

/// A write as the room meant it: words as one store.
fn store(extent: &Extent, offset: usize, from: &[u8]) -> Result<(), Fault> {
    if let Ok(word) = <[u8; 4]>::try_from(from) {
        return extent.mapping.store_u32(offset, u32::from_le_bytes(word));
    }
    if let Ok(word) = <[u8; 8]>::try_from(from) {
        return extent.mapping.store_u64(offset, u64::from_le_bytes(word));
    }
    extent.mapping.write(offset, from)
}

const fn right(direction: Direction) -> u64 {
    match direction {
        Direction::FromGuest => rights::READ,
        Direction::IntoGuest => rights::WRITE,
    }
}

fn gone(_: Fault, iova: u64) -> MemoryError {
    MemoryError::Gone { iova }
}

#[inline]
const fn slot(iova: u64) -> usize {
    (iova >> 12) as usize & (HITS - 1)
}
