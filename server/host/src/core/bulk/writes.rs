//! Writes into one file: ranges of guests' buffers, in the order they were asked for, neighbours by one call.
//!
//! In: ranges with their place in the file. Out: what became of each. Runs on workers. Must never know a submission.
//!
//! A call costs the kernel as much as some ten thousand bytes, and file systems make larger pages for longer calls (ext4: 64 KiB a call
//! is a quarter slower than 256 KiB). So a worker that comes to a file takes what follows the first range as well, but leaves half of what
//! waits for its next turn: it is written while the guest learns of the first half. One job writes all that waits, turn by turn: one for
//! each range would be looked through, again and again, for one that may run (an eighth of a worker's time with pieces of 64 KiB).

use crate::core::memory::{BulkError, JOINED_BYTES_MAX, Pieces};
use crate::store::{Done, Finished, OpenFile, Turn, status_of};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmgmt_abi::Status;
use vmgmt_core::effect::{EffectId, FailedAt, Outcome};

/// Where the bytes of a range are.
#[derive(Debug)]
pub(super) enum Source {
    /// In a guest's buffer, from this byte on.
    Guest(Pieces, u64),
    /// Here: they came by messages or through the port window.
    Here(Vec<u8>),
}

/// Bytes that are to be written.
#[derive(Debug)]
pub(super) struct Range {
    pub effect: EffectId,
    /// Where in the file.
    pub position: u64,
    pub bytes: usize,
    pub source: Source,
    /// The crc32 of what the file then holds is wanted.
    pub checksum: bool,
}

/// The writes of one file that no worker has begun.
#[derive(Debug)]
pub(super) struct Writes {
    file: Arc<OpenFile>,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Range>,
    /// There is a job that writes them.
    has_job: bool,
}

impl Writes {
    pub fn new(file: Arc<OpenFile>) -> Self {
        Self {
            file,
            queue: Mutex::default(),
        }
    }

    pub const fn file(&self) -> &Arc<OpenFile> {
        &self.file
    }

    /// Queues a range. True: a job is due that calls [`Writes::run`] until nothing is left.
    pub fn push(&self, range: Range) -> bool {
        let mut queue = self.lock();
        queue.waiting.push_back(range);
        !std::mem::replace(&mut queue.has_job, true)
    }

    /// Takes back what no worker has begun of an effect; false: one has it, and will tell.
    pub fn take_back(&self, effect: EffectId) -> bool {
        let mut queue = self.lock();
        let place = queue.waiting.iter().position(|range| range.effect == effect);
        place.and_then(|place| queue.waiting.remove(place)).is_some()
    }

    /// Writes the next range, and with it what follows. One worker at a time.
    pub fn run(&self) -> Turn<Finished> {
        let ranges = take_joined(&mut self.lock().waiting);
        let written = match ranges.as_slice() {
            [] | [_] => None,
            several => self.write_joined(several),
        };
        // Whatever was wrong with one of them: each by itself, from its beginning, tells which.
        let results = written.unwrap_or_else(|| {
            let alone = |range: &Range| Finished {
                effect: range.effect,
                done: self.write_alone(range),
            };
            ranges.iter().map(alone).collect()
        });
        // Their buffers are let go before anybody hears that they are written.
        drop(ranges);
        let mut queue = self.lock();
        let left = queue.waiting.len();
        queue.has_job = left > 0;
        Turn { results, left }
    }

    fn write_joined(&self, ranges: &[Range]) -> Option<Vec<Finished>> {
        let (first, last) = (ranges.first()?, ranges.last()?);
        let parts: Vec<_> = ranges
            .iter()
            .filter_map(|range| match &range.source {
                Source::Guest(pieces, at) => Some((pieces, *at, range.bytes)),
                Source::Here(_) => None,
            })
            .collect();
        let bytes: usize = parts.iter().map(|(.., bytes)| bytes).sum();
        let write = || Pieces::write_file_of(&parts, self.file.fd(), first.position);
        let written = self.file.resize(last.end(), write).ok()?.ok()?;
        (written == bytes && parts.len() == ranges.len()).then(|| {
            let stored = |range: &Range| Finished {
                effect: range.effect,
                done: self.stored(range),
            };
            ranges.iter().map(stored).collect()
        })
    }

    fn write_alone(&self, range: &Range) -> Done {
        let write = || self.write_pieces(range);
        match self.file.resize(range.end(), write) {
            Ok(Ok(())) => self.stored(range),
            Ok(Err(done)) => done,
            Err(outcome) => Done::Outcome(outcome),
        }
    }

    fn write_pieces(&self, range: &Range) -> Result<(), Done> {
        let mut at = 0;
        while at < range.bytes {
            let position = range.position + at as u64;
            let written = match &range.source {
                Source::Guest(pieces, skip) => {
                    pieces.write_file(skip + at as u64, range.bytes - at, self.file.fd(), position)
                }
                Source::Here(data) => {
                    rustix::io::pwrite(self.file.fd(), data.get(at..).unwrap_or_default(), position)
                        .map_err(BulkError::File)
                }
            };
            match written {
                Ok(0) => return Err(Done::Outcome(Outcome::failed(Status::NO_SPACE, FailedAt::File))),
                Ok(written) => at += written,
                Err(BulkError::File(Errno::INTR)) => {}
                Err(BulkError::Revoked) => return Err(Done::Revoked),
                Err(BulkError::File(errno)) => {
                    return Err(Done::Outcome(Outcome::failed(status_of(errno), FailedAt::File)));
                }
                Err(_) => {
                    return Err(Done::Outcome(Outcome::failed(
                        Status::BAD_ADDRESS,
                        FailedAt::From,
                    )));
                }
            }
        }
        Ok(())
    }

    /// What became of a range that is written.
    fn stored(&self, range: &Range) -> Done {
        let bytes = range.bytes as u64;
        // Over what the file holds, not over guest memory, which may have changed since: end to end.
        match range.checksum.then(|| self.file.checksum(range.position, bytes)) {
            None => Done::Stored { bytes, crc32: None },
            Some(Ok((_, crc32))) => Done::Stored {
                bytes,
                crc32: Some(crc32),
            },
            Some(Err(errno)) => Done::Outcome(Outcome::failed(status_of(errno), FailedAt::File)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that could panic is done under it.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Range {
    /// First byte behind it. (That the file can be so long was checked when it was queued.)
    const fn end(&self) -> u64 {
        self.position.saturating_add(self.bytes as u64)
    }

    fn is_joined_by(&self, next: &Self) -> bool {
        let both_guests = matches!(
            (&self.source, &next.source),
            (Source::Guest(..), Source::Guest(..))
        );
        both_guests && self.end() == next.position
    }
}

/// The next range and its followers: at most half of what waits, and no more than one call is good for.
fn take_joined(waiting: &mut VecDeque<Range>) -> Vec<Range> {
    let most = waiting.len().div_ceil(2);
    let mut taken: Vec<Range> = waiting.pop_front().into_iter().collect();
    let mut bytes: usize = taken.iter().map(|range| range.bytes).sum();
    while taken.len() < most
        && let (Some(last), Some(next)) = (taken.last(), waiting.front())
        && last.is_joined_by(next)
        && bytes + next.bytes <= JOINED_BYTES_MAX
    {
        bytes += next.bytes;
        taken.extend(waiting.pop_front());
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::memory::tests::fixture::{PAGE, Session, object, poke};
    use crate::store::Store;
    use rustix::fs::ftruncate;
    use std::os::unix::fs::FileExt;
    use vmgmt_device::Direction;

    fn here(effect: u64, position: u64, bytes: usize) -> Range {
        Range {
            effect: EffectId(effect),
            position,
            bytes,
            source: Source::Here(vec![7; bytes]),
            checksum: false,
        }
    }

    fn guest(effect: u64, position: u64, bytes: usize) -> Range {
        Range {
            source: Source::Guest(Pieces::empty_for_test(), 0),
            ..here(effect, position, bytes)
        }
    }

    fn taken(waiting: &mut VecDeque<Range>) -> Vec<u64> {
        take_joined(waiting).iter().map(|range| range.effect.0).collect()
    }

    #[test]
    fn neighbours_go_together_in_order_and_half_of_them_stays() {
        const PIECE: usize = 64 << 10;
        let mut waiting: VecDeque<Range> = (0..9).map(|n| guest(n, n * PIECE as u64, PIECE)).collect();
        assert_eq!(
            taken(&mut waiting),
            [0, 1, 2, 3],
            "no more than one call is good for"
        );
        assert_eq!(taken(&mut waiting), [4, 5, 6]);
        assert_eq!(taken(&mut waiting), [7]);
        assert_eq!(taken(&mut waiting), [8]);
        assert!(taken(&mut waiting).is_empty());
    }

    #[test]
    fn a_gap_another_direction_other_memory_and_large_ranges_end_a_run() {
        let run = |second: Range| {
            let mut waiting = VecDeque::from([guest(1, 100, 50), second, here(8, 0, 1), here(9, 0, 1)]);
            taken(&mut waiting).len()
        };
        assert_eq!(run(guest(2, 150, 50)), 2);
        assert_eq!(run(guest(2, 151, 50)), 1);
        assert_eq!(run(guest(2, 50, 50)), 1);
        assert_eq!(run(here(2, 150, 50)), 1);
        assert_eq!(run(guest(2, 150, JOINED_BYTES_MAX)), 1);
    }

    fn pieces(session: &mut Session, iova: u64) -> Pieces {
        session
            .turn(|memory| memory.resolve(&[(iova, PAGE)], Direction::FromGuest))
            .unwrap()
    }

    /// A file with its writes, and a look into it.
    fn writes() -> (Writes, std::fs::File) {
        let file = std::fs::File::from(object("file", 0, false));
        let mut store = Store::new(&[], Vec::new(), 2, 0).unwrap();
        let slot = store.adopt(file.try_clone().unwrap().into());
        (Writes::new(store.file(slot).unwrap()), file)
    }

    /// Pushes pages that follow one another in the file, and as many that join nobody, so that the first may go together.
    fn push_pages(writes: &Writes, sources: &[Pieces]) {
        for (n, pieces) in sources.iter().enumerate() {
            writes.push(Range {
                effect: EffectId(n as u64),
                position: n as u64 * PAGE,
                bytes: PAGE as usize,
                source: Source::Guest(pieces.clone(), 0),
                checksum: true,
            });
        }
        for n in 0..sources.len() as u64 {
            writes.push(here(100 + n, 1 << 20, 1));
        }
    }

    fn stored(finished: &Finished) -> Option<u32> {
        match finished.done {
            Done::Stored {
                bytes: PAGE,
                crc32: Some(crc32),
            } => Some(crc32),
            _ => None,
        }
    }

    #[test]
    fn what_one_range_lacks_is_told_of_that_range_and_the_others_are_written() {
        let (mut session, fd) = Session::with_ram(64 * PAGE, false);
        let page = |n: u8| vec![n + 1; PAGE as usize];
        for n in 0..3 {
            poke(&fd, u64::from(n) * PAGE, &page(n));
        }
        let sources = [0, 1, 40, 2].map(|n| pieces(&mut session, n * PAGE));
        let (writes, file) = writes();
        push_pages(&writes, &sources);
        ftruncate(&fd, 32 * PAGE).unwrap();
        let finished = writes.run().results;
        let told: Vec<_> = finished.iter().map(|one| (one.effect.0, stored(one))).collect();
        let sum = |n| Some(crc32fast::hash(&page(n)));
        assert_eq!(told, [(0, sum(0)), (1, sum(1)), (2, None), (3, sum(2))]);
        assert!(
            matches!(&finished[2].done, Done::Outcome(Outcome::Failed { status, .. }) if *status == Status::BAD_ADDRESS.0),
            "{:?}",
            finished[2].done
        );
        for (n, expected) in [(0, 0), (1, 1), (3, 2)] {
            let mut found = page(99);
            file.read_exact_at(&mut found, n * PAGE).unwrap();
            assert!(found == page(expected), "page {n}");
        }
    }

    #[test]
    fn memory_that_was_taken_back_revokes_its_range_alone() {
        let (mut session, fd) = Session::with_ram(64 * PAGE, true);
        poke(&fd, PAGE, &vec![7; PAGE as usize]);
        let taken = pieces(&mut session, 0);
        session.memory.cancel_leases();
        let (writes, file) = writes();
        let kept = pieces(&mut session, PAGE);
        push_pages(&writes, &[kept.clone(), taken, kept]);
        let finished = writes.run().results;
        assert_eq!(finished.len(), 3);
        assert!(stored(&finished[0]).is_some() && stored(&finished[2]).is_some());
        assert!(
            matches!(finished[1].done, Done::Revoked),
            "{:?}",
            finished[1].done
        );
        let mut found = vec![0; PAGE as usize];
        file.read_exact_at(&mut found, 2 * PAGE).unwrap();
        assert!(found == vec![7; PAGE as usize]);
    }

    #[test]
    fn ranges_that_go_together_are_in_the_file_once_and_each_has_its_own_checksum() {
        let (mut session, fd) = Session::with_ram(64 * PAGE, true);
        let data: Vec<u8> = (0..8 * PAGE).map(|n| (n / 511) as u8).collect();
        poke(&fd, 0, &data);
        // From the last page to the first, so that the call has as many slices.
        let sources: Vec<_> = (0..8).rev().map(|n| pieces(&mut session, n * PAGE)).collect();
        let (writes, file) = writes();
        push_pages(&writes, &sources);
        let finished = writes.run().results;
        assert_eq!(finished.len(), 8, "one call for all");
        assert!((0..8).all(|n| finished[n].effect.0 == n as u64), "in order");
        for (n, (one, expected)) in finished.iter().zip(data.chunks(PAGE as usize).rev()).enumerate() {
            let mut found = vec![0; PAGE as usize];
            file.read_exact_at(&mut found, n as u64 * PAGE).unwrap();
            assert!(
                found == expected && stored(one) == Some(crc32fast::hash(expected)),
                "page {n}"
            );
        }
        assert_eq!(file.metadata().unwrap().len(), 8 * PAGE);
    }
}
