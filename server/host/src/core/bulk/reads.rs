//! Reads of one file that follow one another, by one call: with pieces of 64 KiB a call of its own for each costs a tenth of the copy.
//!
//! In: reads whose turn it is. Out: which of them go together, and bytes in their buffers. Must never know an outcome.

use super::task::Task;
use crate::core::memory::{JOINED_BYTES_MAX, Pieces};
use crate::store::OpenFile;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use vmgmt_core::effect::EffectId;

/// What a read asks of its file next, where it can go straight from the page cache into guest memory.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub session: u64,
    pub file: &'a Arc<OpenFile>,
    pub position: u64,
    pub pieces: &'a Pieces,
    /// From which byte of the pieces, and how many.
    pub at: u64,
    pub bytes: usize,
}

impl Wanted<'_> {
    /// Whether `next` is read from where this ends, for the same session.
    fn is_joined_by(&self, next: &Self) -> bool {
        self.session == next.session
            && Arc::ptr_eq(self.file, next.file)
            && self.position.checked_add(self.bytes as u64) == Some(next.position)
    }
}

/// Reads what `first` wants and what those want whose turn is next, as far as one call is good for it; gives the bytes of each. Nothing: it
/// has no followers, or something is wrong with one of them: each by itself tells which.
pub(super) fn read_joined(
    first: EffectId,
    ready: &VecDeque<EffectId>,
    tasks: &BTreeMap<EffectId, Task>,
) -> Option<Vec<(EffectId, usize)>> {
    let wanted = |id: &EffectId| tasks.get(id)?.wanted();
    let begin = wanted(&first)?;
    let mut group = vec![(first, begin)];
    let mut all = begin.bytes;
    for id in ready {
        let (Some(next), Some((_, last))) = (wanted(id), group.last()) else {
            break;
        };
        if !last.is_joined_by(&next) || all + next.bytes > JOINED_BYTES_MAX {
            break;
        }
        all += next.bytes;
        group.push((*id, next));
    }
    if group.len() < 2 {
        return None;
    }
    let ranges: Vec<_> = group
        .iter()
        .map(|(_, one)| (one.pieces, one.at, one.bytes))
        .collect();

    let mut read = Pieces::read_file_into(&ranges, begin.file.fd(), begin.position)
        .ok()
        .filter(|read| *read > 0)?;
    let share = |(id, one): &(EffectId, Wanted<'_>)| {
        let bytes = read.min(one.bytes);
        read -= bytes;
        (*id, bytes)
    };
    Some(group.iter().map(share).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bulk::task::{End, Place, Step, Work};
    use crate::core::memory::tests::fixture::{PAGE, Session, object, peek, poke};
    use crate::store::Store;
    use rustix::fs::ftruncate;
    use vmgmt_core::effect::{BufferRange, Outcome};
    use vmgmt_device::Direction;
    use vmgmt_device::rings::{Channel, Token};

    const PAGES: u64 = 6;

    /// A session with memory, and a file of pages of 1, 2, ...
    struct Bench {
        session: Session,
        ram: rustix::fd::OwnedFd,
        store: Store,
        files: Vec<Arc<OpenFile>>,
        tasks: BTreeMap<EffectId, Task>,
        ready: VecDeque<EffectId>,
    }

    impl Bench {
        fn new() -> Self {
            let (session, ram) = Session::with_ram(64 * PAGE, false);
            let mut store = Store::new(&[], Vec::new(), 2, 0).unwrap();
            let files = (0..2)
                .map(|_| {
                    let fd = object("file", PAGES * PAGE, false);
                    (0..PAGES).for_each(|n| poke(&fd, n * PAGE, &page(n)));
                    let slot = store.adopt(fd);
                    store.file(slot).unwrap()
                })
                .collect();
            Self {
                session,
                ram,
                store,
                files,
                tasks: BTreeMap::new(),
                ready: VecDeque::new(),
            }
        }

        /// One more read: `bytes` at `offset` of a file into memory at `iova`.
        fn read(&mut self, file: usize, offset: u64, iova: u64, bytes: u64) -> EffectId {
            let id = EffectId(self.tasks.len() as u64);
            let pieces = self
                .session
                .turn(|memory| memory.resolve(&[(iova, bytes)], Direction::IntoGuest));
            let token = Token {
                session: 1,
                channel: Channel::Ring(0),
                index: id.0 as u32,
                generation: 0,
            };
            let range = BufferRange {
                token,
                offset: 0,
                bytes,
            };
            let into = End {
                range,
                place: Place::Guest(pieces.unwrap()),
            };
            let file = Arc::clone(&self.files[file]);
            let work = Work::Read {
                file,
                offset,
                into,
                warm_tries: 0,
            };
            self.tasks.insert(id, Task::new(1, bytes, work));
            self.ready.push_back(id);
            id
        }

        /// The first read's turn: bytes of each, in order.
        fn turn(&mut self) -> Option<Vec<usize>> {
            let first = self.ready.pop_front().unwrap();
            let joined = read_joined(first, &self.ready, &self.tasks)?;
            let in_order = (first.0..).zip(&joined).all(|(n, (id, _))| id.0 == n);
            assert!(in_order, "{joined:?}");
            Some(joined.into_iter().map(|(_, bytes)| bytes).collect())
        }
    }

    fn page(n: u64) -> Vec<u8> {
        vec![n as u8 + 1; PAGE as usize]
    }

    #[test]
    fn neighbours_are_read_by_one_call_each_into_its_own_buffer() {
        let mut bench = Bench::new();
        // Last page first in memory, so that the call has a slice for each.
        for n in 0..PAGES {
            bench.read(0, n * PAGE, (PAGES - n) * PAGE, PAGE);
        }
        assert_eq!(bench.turn().unwrap(), [PAGE as usize; PAGES as usize]);
        for n in 0..PAGES {
            assert!(
                peek(&bench.ram, (PAGES - n) * PAGE, PAGE as usize) == page(n),
                "{n}"
            );
        }
        let last = bench.tasks.get_mut(&EffectId(PAGES - 1)).unwrap();
        assert!(matches!(
            last.moved(PAGE as usize),
            Step::Finished(Outcome::Bytes(PAGE))
        ));
        assert!(bench.store.is_idle());
    }

    #[test]
    fn where_the_file_ends_those_behind_it_get_nothing_by_this_call() {
        let mut bench = Bench::new();
        for n in 0..4 {
            bench.read(0, (PAGES - 2 + n) * PAGE + 100, n * PAGE, PAGE);
        }
        assert_eq!(bench.turn().unwrap(), [PAGE as usize, PAGE as usize - 100, 0, 0]);
    }

    #[test]
    fn a_gap_another_file_large_pieces_and_what_needs_a_step_of_its_own_end_a_group() {
        let ends = |second: &dyn Fn(&mut Bench) -> EffectId| {
            let mut bench = Bench::new();
            bench.read(0, 0, 0, PAGE);
            second(&mut bench);
            bench.read(0, 2 * PAGE, 2 * PAGE, PAGE);
            bench.turn().map(|bytes| bytes.len())
        };
        assert_eq!(ends(&|bench| bench.read(0, PAGE, PAGE, PAGE)), Some(3));
        assert_eq!(ends(&|bench| bench.read(0, PAGE + 1, PAGE, PAGE - 1)), None);
        assert_eq!(ends(&|bench| bench.read(1, PAGE, PAGE, PAGE)), None);
        assert_eq!(ends(&|bench| bench.read(0, PAGE, 0, 63 * PAGE)), Some(2));
        assert_eq!(ends(&|bench| bench.read(0, PAGE, 0, 64 * PAGE)), None);
        type Change = fn(&mut Task);
        let changes: [Change; 4] = [
            |task| task.void = true,
            |task| task.revoked = true,
            |task| task.scratch = vec![1],
            |task| match &mut task.work {
                Work::Read { warm_tries, .. } => *warm_tries = 1,
                _ => unreachable!("all are reads"),
            },
        ];
        for change in changes {
            let of_its_own = |bench: &mut Bench| {
                let id = bench.read(0, PAGE, PAGE, PAGE);
                change(bench.tasks.get_mut(&id).unwrap());
                id
            };
            assert_eq!(ends(&of_its_own), None);
        }
    }

    #[test]
    fn a_group_with_memory_that_is_gone_or_taken_back_tells_nothing_of_the_others() {
        let mut bench = Bench::new();
        bench.read(0, 0, 40 * PAGE, PAGE);
        bench.read(0, PAGE, PAGE, PAGE);
        ftruncate(&bench.ram, 32 * PAGE).unwrap();
        assert_eq!(bench.turn(), None);
        let mut bench = Bench::new();
        bench.read(0, 0, 0, PAGE);
        bench.session.memory.cancel_leases();
        bench.read(0, PAGE, PAGE, PAGE);
        assert_eq!(bench.turn(), None);
    }
}
