//! CORE, pieces: a buffer of a guest, looked up once and held while bytes move, on the loop's thread or on a worker's.
//!
//! In: files, private buffers, other pieces. Out: bytes moved, at most [`PIECE_BYTES_MAX`] a call, or which side failed. Knows no
//! ring and no submission.
//!
//! Pieces are a *lease*: the address space under them stays until they are dropped. What is behind it may be taken away while
//! they are held (an unmap waits only so long): then every call answers [`BulkError::Revoked`], also one that ended before it could
//! know, and what it moved means nothing. The one who holds them looks the buffer up again, or gives up.

use super::limits::PIECE_BYTES_MAX;
use super::object::Extent;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use vmgmt_device::Direction;
use vmgmt_mem::{CopyFault, Fault, GuestSlice, SLICES_MAX, copy_guest, read_file, write_file};

/// `f_type` of tmpfs and ramfs (linux/magic.h): files that never wait for a disk.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// A side of a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Source,
    Target,
}

/// Why bytes could not be moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BulkError {
    /// The file is not in memory: read the range into scratch on a worker, then call again or copy the scratch.
    #[error("the file has to be waited for")]
    WouldWait,
    /// The file's system cannot say whether it would wait: read into scratch on a worker, then copy the scratch.
    #[error("the file cannot be read without a possible wait")]
    NoNowait,
    /// The file's own error.
    #[error("file: {0}")]
    File(Errno),
    /// Guest memory of that side is gone; for a file operation Source or Target as the guest's side is.
    #[error("guest memory at {iova:#x} is gone")]
    Guest {
        side: Side,
        /// First guest address of the part that failed.
        iova: u64,
    },
    /// A part of the range is not shared: use `SessionMemory::read_pieces` and `write_pieces`.
    #[error("a part of the buffer is reached by messages only")]
    ByMessage,
    /// The memory was, or is to be, taken away: look the buffer up again.
    #[error("the guest took the buffer's memory away")]
    Revoked,
    /// Outside the pieces, or against the direction they were looked up for: our own mistake.
    #[error("the range lies outside the pieces, or is used in the other direction")]
    Misuse,
}

/// A part of a buffer that lies in one map.
#[derive(Clone, Debug)]
pub struct Part {
    /// Where it begins within the pieces, in bytes.
    pub at: u64,
    pub iova: u64,
    pub bytes: usize,
    /// Number of its map.
    pub number: u64,
    /// Extent and offset; `None`: by message.
    pub place: Option<(Arc<Extent>, usize)>,
}

/// What the session keeps of pieces that somebody holds.
#[derive(Debug)]
pub struct Lease {
    pub parts: Vec<Part>,
    direction: Direction,
    cancelled: AtomicBool,
    revoked: AtomicBool,
}

impl Lease {
    /// From now on every call answers Revoked.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// All of its memory was taken away: what its holder still does concerns no guest.
    pub fn set_revoked(&self) {
        self.revoked.store(true, Ordering::SeqCst);
    }

    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::SeqCst)
    }
}

/// A guest's buffer, held. A clone is the same lease.
#[derive(Clone, Debug)]
pub struct Pieces {
    lease: Arc<Lease>,
    bytes: u64,
}

impl Pieces {
    pub(super) fn new(parts: Vec<Part>, direction: Direction) -> Self {
        let bytes = parts.last().map_or(0, |part| part.at + part.bytes as u64);
        Self {
            lease: Arc::new(Lease {
                parts,
                direction,
                cancelled: AtomicBool::new(false),
                revoked: AtomicBool::new(false),
            }),
            bytes,
        }
    }

    /// Pieces without memory, for tests of what only orders them.
    #[cfg(test)]
    pub fn empty_for_test() -> Self {
        Self::new(Vec::new(), Direction::FromGuest)
    }

    pub(super) const fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// Bytes in all.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether some part is reached by messages only.
    #[must_use]
    pub fn needs_messages(&self) -> bool {
        self.lease.parts.iter().any(|part| part.place.is_none())
    }

    /// Whether the memory was, or is to be, taken away: stop as soon as possible and drop the pieces.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.lease.cancelled.load(Ordering::SeqCst)
    }

    /// Reads up to `bytes` bytes of `file` from `offset` on into the pieces at `at`, without ever waiting for a disk. Gives
    /// the bytes read; fewer than asked for is usual, 0 is the file's end.
    ///
    /// # Errors
    /// See [`BulkError`].
    pub fn read_file(
        &self,
        at: u64,
        bytes: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize, BulkError> {
        Self::read_file_into(&[(self, at, bytes)], file, offset)
    }

    /// As [`Pieces::read_file`], for ranges that follow one another in the file, each (pieces, from which byte, how many), by one call.
    ///
    /// # Errors
    /// See [`BulkError`]; which of several ranges it was the kernel does not say.
    pub fn read_file_into(
        ranges: &[(&Self, u64, usize)],
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize, BulkError> {
        let slices = Self::slices_of(ranges, Direction::IntoGuest)?;
        let read = match read_file(file, offset, &slices, false) {
            Err(Errno::OPNOTSUPP) if never_waits(file) => read_file(file, offset, &slices, true),
            read => read,
        };
        for (pieces, ..) in ranges {
            pieces.still_ours()?;
        }
        read.map_err(|errno| match (errno, ranges.first()) {
            (Errno::AGAIN, _) => BulkError::WouldWait,
            (Errno::OPNOTSUPP, _) => BulkError::NoNowait,
            (Errno::FAULT, Some((pieces, at, _))) => pieces.gone(Side::Target, *at),
            (errno, _) => BulkError::File(errno),
        })
    }

    /// Writes up to `bytes` bytes of the pieces from `at` on into `file` at `offset`. May wait for a disk: on workers only.
    /// Gives the bytes written, which may be fewer than asked for.
    ///
    /// # Errors
    /// See [`BulkError`]. After Revoked the file may hold zeros there.
    pub fn write_file(
        &self,
        at: u64,
        bytes: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize, BulkError> {
        Self::write_file_of(&[(self, at, bytes)], file, offset)
    }

    /// As [`Pieces::write_file`], for ranges that follow one another in the file, each (pieces, from which byte, how many), by one call.
    ///
    /// # Errors
    /// See [`BulkError`]; which of several ranges it was the kernel does not say.
    pub fn write_file_of(
        ranges: &[(&Self, u64, usize)],
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize, BulkError> {
        let slices = Self::slices_of(ranges, Direction::FromGuest)?;
        let written = write_file(file, offset, &slices);
        for (pieces, ..) in ranges {
            pieces.still_ours()?;
        }
        written.map_err(|errno| match (errno, ranges.first()) {
            // Memory of the pages type that files cannot be written from is as good as gone for this call.
            (Errno::FAULT, Some((pieces, at, _))) => pieces.gone(Side::Source, *at),
            (errno, _) => BulkError::File(errno),
        })
    }

    /// Copies out of the pieces from `at` on.
    ///
    /// # Errors
    /// See [`BulkError`]; nothing of `into` means anything then.
    pub fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<(), BulkError> {
        let mut rest = into;
        self.each(
            at,
            rest.len(),
            Direction::FromGuest,
            |part, extent, offset, bytes| {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(bytes);
                rest = later;
                extent
                    .mapping
                    .read(offset, now)
                    .map_err(|fault| guest_fault(fault, Side::Source, part.iova))
            },
        )
    }

    /// Copies into the pieces from `at` on.
    ///
    /// # Errors
    /// See [`BulkError`]; some of it may have been written.
    pub fn write_bytes(&self, at: u64, from: &[u8]) -> Result<(), BulkError> {
        let mut rest = from;
        self.each(
            at,
            from.len(),
            Direction::IntoGuest,
            |part, extent, offset, bytes| {
                let (now, later) = rest.split_at(bytes);
                rest = later;
                extent
                    .mapping
                    .write(offset, now)
                    .map_err(|fault| guest_fault(fault, Side::Target, part.iova))
            },
        )
    }

    /// Copies `bytes` bytes (at most [`PIECE_BYTES_MAX`]) from another guest's, or the same guest's, pieces: one memory copy.
    ///
    /// # Errors
    /// See [`BulkError`]; some of it may have been copied. Revoked when either side was: ask each with [`Pieces::is_revoked`].
    pub fn copy_from(&self, at: u64, source: &Self, source_at: u64, bytes: usize) -> Result<(), BulkError> {
        let targets = self.slices(at, bytes, Direction::IntoGuest)?;
        let sources = source.slices(source_at, bytes, Direction::FromGuest)?;
        let copied = copy_slices(&targets, &sources).map_err(|(side, done)| match side {
            Side::Source => source.gone(side, source_at + done),
            Side::Target => self.gone(side, at + done),
        });
        self.still_ours()?;
        source.still_ours()?;
        copied
    }

    /// The guest's segments of a range: (address, bytes), for access by message.
    pub(super) fn segments(&self, at: u64, bytes: usize) -> Option<Vec<(u64, u64)>> {
        let mut segments = Vec::new();
        self.walk(at, bytes, |part, skip, bytes| {
            segments.push((part.iova + skip as u64, bytes as u64));
            Ok(())
        })
        .ok()?;
        Some(segments)
    }

    /// Ranges as slices for one system call, neighbours joined.
    fn slices_of<'a>(
        ranges: &[(&'a Self, u64, usize)],
        direction: Direction,
    ) -> Result<Vec<GuestSlice<'a>>, BulkError> {
        let mut slices = Vec::new();
        for (pieces, at, bytes) in ranges {
            for slice in pieces.slices(*at, *bytes, direction)? {
                push_joined(&mut slices, slice);
            }
        }
        Ok(slices)
    }

    /// A range as slices for one system call, neighbours joined.
    fn slices(&self, at: u64, bytes: usize, direction: Direction) -> Result<Vec<GuestSlice<'_>>, BulkError> {
        let bytes = bytes.min(PIECE_BYTES_MAX);
        let mut slices: Vec<GuestSlice<'_>> = Vec::new();
        self.each(at, bytes, direction, |_, extent, offset, bytes| {
            let slice = extent
                .mapping
                .slice(offset, bytes)
                .map_err(|_| BulkError::Misuse)?;
            push_joined(&mut slices, slice);
            Ok(())
        })?;
        Ok(slices)
    }

    /// Calls `done` with each mapped part of the range.
    fn each<'a>(
        &'a self,
        at: u64,
        bytes: usize,
        direction: Direction,
        mut done: impl FnMut(&'a Part, &'a Extent, usize, usize) -> Result<(), BulkError>,
    ) -> Result<(), BulkError> {
        if direction != self.lease.direction {
            return Err(BulkError::Misuse);
        }
        self.still_ours()?;
        let moved = self.walk(at, bytes, |part, skip, bytes| {
            let (extent, offset) = part.place.as_ref().ok_or(BulkError::ByMessage)?;
            done(part, extent, offset + skip, bytes)
        });
        self.still_ours()?;
        moved
    }

    /// Calls `part` with each part of the range, the bytes to skip in it and the bytes to take.
    fn walk<'a>(
        &'a self,
        at: u64,
        bytes: usize,
        mut visit: impl FnMut(&'a Part, usize, usize) -> Result<(), BulkError>,
    ) -> Result<(), BulkError> {
        let end = at
            .checked_add(bytes as u64)
            .filter(|end| *end <= self.bytes)
            .ok_or(BulkError::Misuse)?;
        let first = self
            .lease
            .parts
            .partition_point(|part| part.at + part.bytes as u64 <= at);
        for part in self
            .lease
            .parts
            .iter()
            .skip(first)
            .take_while(|part| part.at < end)
        {
            let skip = at.saturating_sub(part.at) as usize;
            let take = (end - part.at).min(part.bytes as u64) as usize - skip;
            visit(part, skip, take)?;
        }
        Ok(())
    }

    /// What was moved counts only if the memory is still the guest's.
    fn still_ours(&self) -> Result<(), BulkError> {
        // What was moved before must not be seen to happen after this look.
        fence(Ordering::SeqCst);
        if self.is_revoked() {
            Err(BulkError::Revoked)
        } else {
            Ok(())
        }
    }

    fn gone(&self, side: Side, at: u64) -> BulkError {
        let part = self.lease.parts.iter().rev().find(|part| part.at <= at);
        BulkError::Guest {
            side,
            iova: part.map_or(0, |part| part.iova + (at - part.at)),
        }
    }
}

/// Adds a slice, to the last one where it follows it.
fn push_joined<'a>(slices: &mut Vec<GuestSlice<'a>>, slice: GuestSlice<'a>) {
    match slices
        .last_mut()
        .and_then(|last| last.joined(&slice).map(|joined| (last, joined)))
    {
        Some((last, joined)) => *last = joined,
        None => slices.push(slice),
    }
}

fn guest_fault(fault: Fault, side: Side, iova: u64) -> BulkError {
    match fault {
        Fault::Gone => BulkError::Guest { side, iova },
        Fault::Refused => BulkError::Misuse,
    }
}

/// Copies slice by slice where both lists are cut differently. The error: the side that failed, and the bytes done before.
fn copy_slices(targets: &[GuestSlice<'_>], sources: &[GuestSlice<'_>]) -> Result<(), (Side, u64)> {
    let (mut targets, mut sources) = (targets.iter().copied(), sources.iter().copied());
    let (mut target, mut source) = (targets.next(), sources.next());
    let mut done = 0;
    while let (Some(to), Some(from)) = (target, source) {
        let bytes = to.bytes().min(from.bytes());
        copy_guest(&to, &from).map_err(|fault| match fault {
            CopyFault::Source(_) => (Side::Source, done),
            CopyFault::Target(_) => (Side::Target, done),
        })?;
        done += bytes as u64;
        target = to.after(bytes).or_else(|| targets.next());
        source = from.after(bytes).or_else(|| sources.next());
    }
    Ok(())
}

fn never_waits(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|system| matches!(system.f_type, TMPFS_MAGIC | RAMFS_MAGIC))
}

const _: () = assert!(SLICES_MAX * 4096 >= PIECE_BYTES_MAX);
