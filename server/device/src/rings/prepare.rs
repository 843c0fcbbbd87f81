//! A submission between its 64 bytes and the hub: buffer list, meta and small data are copied into private memory, each once.
//!
//! In: a submission of good form. Out: [`Preparing`] with everything fetched, or the status that it ends with. Every step can be called
//! again after a pending access: nothing before the access changed.

use super::interface::Segment;
use super::limits::{LIST_PIECE_ENTRIES, PREFETCH_BYTES_MAX};
use super::ring::{Segments, Stop};
use super::shape::{Shape, Who};
use crate::{GuestMemory, MemoryError};
use vmgmt_abi::ring::{LIST_ENTRY_BYTES, flag};
use vmgmt_abi::{ListEntry, Status, Submission};
use zerocopy::FromBytes;

/// Private copies of what a submission points to, as far as they are fetched.
#[derive(Debug)]
pub(super) struct Preparing {
    pub submission: Submission,
    pub shape: Shape,
    pub meta: Vec<u8>,
    pub data: Option<Vec<u8>>,
    /// The whole buffer, then (when done) the data area.
    pub segments: Segments,
    /// Answer of PROVE.
    pub proof: bool,
    list: Vec<Segment>,
    list_bytes: u64,
    copied_bytes: usize,
    step: Step,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Nothing was asked for yet.
    Start,
    Buffer,
    Meta,
    Data,
    Prove,
    Done,
}

/// Why preparing stopped or ended badly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Failure {
    Stop(Stop),
    /// The guest's mistake, for its completion.
    Status(Status),
}

/// What a failed access to a buffer means.
impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Pending => Self::Stop(Stop::Wait),
            MemoryError::Quiet => Self::Stop(Stop::Quiet),
            MemoryError::Unmapped { .. } | MemoryError::Denied { .. } | MemoryError::Gone { .. } => {
                Self::Status(Status::BAD_ADDRESS)
            }
        }
    }
}

impl Preparing {
    pub fn new(submission: Submission, shape: Shape) -> Self {
        let data_bytes = submission.length.saturating_sub(u64::from(submission.meta_bytes));
        let data = (shape.prefetch && data_bytes <= PREFETCH_BYTES_MAX).then(|| vec![0; data_bytes as usize]);
        Self {
            submission,
            shape,
            meta: vec![0; submission.meta_bytes as usize],
            data,
            segments: Segments::None,
            proof: false,
            list: Vec::new(),
            list_bytes: 0,
            copied_bytes: 0,
            step: Step::Start,
        }
    }

    /// All of guest memory that the submission names, as far as it is known: its list, if it has one, and its buffer.
    pub fn named(&self) -> impl Iterator<Item = (u64, u64)> {
        let Submission {
            flags,
            buffer,
            length,
            list_entries,
            ..
        } = self.submission;
        let named = match flags & flag::LIST {
            0 => (buffer, length),
            _ => (buffer, u64::from(list_entries) * LIST_ENTRY_BYTES as u64),
        };
        let segments = self.segments.as_slice().iter();
        segments
            .map(|segment| (segment.iova, segment.bytes))
            .chain([named])
    }

    /// Bytes of the data area.
    pub fn data_bytes(&self) -> u64 {
        self.submission
            .length
            .saturating_sub(u64::from(self.submission.meta_bytes))
    }

    /// Goes on until all is fetched.
    pub fn advance<M: GuestMemory>(&mut self, memory: &mut M) -> Result<(), Failure> {
        loop {
            match self.step {
                Step::Start => {
                    self.forget_others_reads(memory);
                    self.step = Step::Buffer;
                }
                Step::Buffer => {
                    self.read_buffer(memory)?;
                    if self.submission.flags & flag::LIST != 0 {
                        self.forget_others_reads(memory);
                    }
                    self.step = Step::Meta;
                }
                Step::Meta => {
                    gather(
                        memory,
                        self.segments.as_slice(),
                        0,
                        &mut self.meta,
                        &mut self.copied_bytes,
                    )?;
                    self.copied_bytes = 0;
                    self.step = Step::Data;
                }
                Step::Data => {
                    if let Some(data) = &mut self.data {
                        let offset = self.meta.len() as u64;
                        gather(
                            memory,
                            self.segments.as_slice(),
                            offset,
                            data,
                            &mut self.copied_bytes,
                        )?;
                    }
                    self.cut_meta();
                    self.step = Step::Prove;
                }
                Step::Prove => {
                    if self.shape.who == Who::Prove {
                        let Submission { buffer, argument, .. } = self.submission;
                        self.proof = match memory.prove(buffer, argument) {
                            Err(MemoryError::Gone { .. }) => {
                                return Err(Failure::Status(Status::INTEGRITY));
                            }
                            other => other?,
                        };
                    }
                    self.step = Step::Done;
                }
                Step::Done => return Ok(()),
            }
        }
    }

    /// Its list and its buffer may have been another submission's that was given up while it was read: what was on its way for that one is
    /// older than this submission. (In one call, so that a long list is no work: who reads what lies between asks again.)
    fn forget_others_reads<M: GuestMemory>(&self, memory: &mut M) {
        let (mut start, mut end) = (u64::MAX, 0);
        for (iova, bytes) in self.named() {
            let bytes = match self.shape.who {
                Who::Prove => size_of::<u64>() as u64,
                _ => bytes,
            };
            start = start.min(iova);
            end = end.max(iova.saturating_add(bytes));
        }
        memory.forget_reads_of(start, end.saturating_sub(start));
    }

    fn read_buffer<M: GuestMemory>(&mut self, memory: &mut M) -> Result<(), Failure> {
        let Submission {
            flags,
            buffer,
            length,
            list_entries,
            ..
        } = self.submission;
        if flags & flag::LIST == 0 {
            if length > 0 {
                self.segments = Segments::One([Segment {
                    iova: buffer,
                    bytes: length,
                }]);
            }
            return Ok(());
        }
        let mut piece = [0; LIST_PIECE_ENTRIES as usize * LIST_ENTRY_BYTES];
        loop {
            let read = self.list.len() as u32;
            let count = list_entries.saturating_sub(read).min(LIST_PIECE_ENTRIES) as usize;
            if count == 0 {
                break;
            }
            let Some(piece) = piece.get_mut(..count * LIST_ENTRY_BYTES) else {
                return Err(Failure::Status(Status::BAD_ARGUMENT));
            };
            memory.read(
                buffer.wrapping_add(u64::from(read) * LIST_ENTRY_BYTES as u64),
                piece,
            )?;
            for entry in piece.chunks_exact(LIST_ENTRY_BYTES) {
                let entry = ListEntry::read_from_bytes(entry).unwrap_or_default();
                self.take_entry(entry)?;
            }
        }
        if self.list_bytes != length {
            return Err(Failure::Status(Status::BAD_ARGUMENT));
        }
        self.segments = Segments::Many(std::mem::take(&mut self.list));
        Ok(())
    }

    fn take_entry(&mut self, entry: ListEntry) -> Result<(), Failure> {
        let sum = self.list_bytes.checked_add(entry.length);
        match sum {
            Some(sum)
                if entry.length > 0
                    && entry.address.checked_add(entry.length).is_some()
                    && sum <= self.submission.length =>
            {
                self.list_bytes = sum;
                self.list.push(Segment {
                    iova: entry.address,
                    bytes: entry.length,
                });
                Ok(())
            }
            _ => Err(Failure::Status(Status::BAD_ARGUMENT)),
        }
    }

    /// Leaves the data area in `segments`.
    fn cut_meta(&mut self) {
        let mut cut = self.meta.len() as u64;
        let shorten = |segment: &mut Segment, cut: &mut u64| {
            let bytes = segment.bytes.min(*cut);
            segment.iova = segment.iova.wrapping_add(bytes);
            segment.bytes -= bytes;
            *cut -= bytes;
        };
        match &mut self.segments {
            Segments::None => {}
            Segments::One([one]) => {
                shorten(one, &mut cut);
                if one.bytes == 0 {
                    self.segments = Segments::None;
                }
            }
            Segments::Many(many) => {
                if cut > 0 {
                    many.iter_mut().for_each(|segment| shorten(segment, &mut cut));
                    many.retain(|segment| segment.bytes > 0);
                }
            }
        }
    }
}

/// Copies `into.len()` bytes out of a buffer, from `offset` on; `done` bytes of them are there already, and more at each return.
fn gather<M: GuestMemory>(
    memory: &mut M,
    segments: &[Segment],
    offset: u64,
    into: &mut [u8],
    done: &mut usize,
) -> Result<(), MemoryError> {
    let mut start = 0u64;
    for segment in segments {
        let want = offset.saturating_add(*done as u64);
        let rest = into.get_mut(*done..).unwrap_or_default();
        if rest.is_empty() {
            break;
        }
        let end = start.saturating_add(segment.bytes);
        if want < end {
            let within = want.saturating_sub(start);
            let bytes = (segment.bytes - within).min(rest.len() as u64) as usize;
            let (piece, _) = rest.split_at_mut(bytes);
            memory.read(segment.iova.wrapping_add(within), piece)?;
            *done += bytes;
        }
        start = end;
    }
    Ok(())
}

/// Copies `from` to the start of a buffer; what does not fit is the caller's to refuse.
pub(super) fn scatter<M: GuestMemory>(
    memory: &mut M,
    segments: &[Segment],
    mut from: &[u8],
) -> Result<(), MemoryError> {
    for segment in segments {
        if from.is_empty() {
            break;
        }
        let bytes = segment.bytes.min(from.len() as u64) as usize;
        let (piece, rest) = from.split_at(bytes);
        memory.write_buffer(segment.iova, piece)?;
        from = rest;
    }
    Ok(())
}
