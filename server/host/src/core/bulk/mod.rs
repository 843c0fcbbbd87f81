//! Bulk work: bytes between files and guests' buffers, and from buffer to buffer, piece by piece, nobody held up by another's.
//!
//! In: effects that name buffers; results of workers. Out: one outcome each. Must never know what a transfer is for.
//!
//! A piece is at most [`PIECE_BYTES_MAX`]; after each, the next one's turn comes. Reads go straight from the page cache into guest
//! memory on the loop (never waiting for a disk); a range that is not cached is read on a worker first. Writes go straight from
//! guest memory into the file, on a worker, under a lease. Several that follow one another in a file go by one call. Memory that is not shared goes through scratch and messages.

mod reads;
mod task;
mod writes;

use crate::core::memory::PIECE_BYTES_MAX;
use crate::core::sessions::Sessions;
use crate::store::{Done, OpenFile, Store};
use reads::read_joined;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Weak};
use task::{End, Step, Task, Work};
use vmgmt_core::effect::{BufferRange, EffectId, FailedAt, Outcome};
use vmgmt_device::Direction;
use vmgmt_device::rings::{Channel, Token};
use writes::Writes;

/// Bytes moved in one turn over all work, so that rings are looked at again within about a millisecond.
const TURN_BYTES_MAX: usize = 4 * PIECE_BYTES_MAX;

/// All bulk work of this core life.
#[derive(Debug, Default)]
pub struct Bulk {
    tasks: BTreeMap<EffectId, Task>,
    ready: VecDeque<EffectId>,
    waiting_for_memory: Vec<EffectId>,
    /// They hold nothing, and go on when their VM is thawed.
    frozen: Vec<EffectId>,
    /// What waits to be written, by file.
    writes: BTreeMap<usize, Weak<Writes>>,
}

impl Bulk {
    /// Whether there is something to do now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether there is nothing that has not ended, but for what waits for a thaw (a drain need not wait for that).
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.tasks.len() <= self.frozen.len()
    }

    /// Whether workers have work of ours and nothing else is to be done.
    #[must_use]
    pub fn is_on_workers(&self) -> bool {
        self.ready.is_empty() && self.tasks.len() > self.waiting_for_memory.len() + self.frozen.len()
    }

    /// The rings of a session (a bit each) from which a worker writes into a file just now.
    #[must_use]
    pub fn rings_that_write(&self, session: u64) -> u32 {
        self.tasks
            .values()
            .filter(|task| matches!(task.work, Work::Write { .. }) && !task.void)
            .flat_map(|task| task.work.tokens())
            .filter(|token| token.session == session)
            .fold(0, |rings, token| match token.channel {
                Channel::Ring(n) => rings | 1 << n,
                Channel::Port => rings,
            })
    }

    /// Whether an effect is bulk work that has not ended.
    #[must_use]
    pub fn has(&self, id: EffectId) -> bool {
        self.tasks.contains_key(&id)
    }

    /// Sessions whose buffers the next step may touch.
    #[must_use]
    pub fn sessions(&self) -> BTreeSet<u64> {
        self.ready
            .iter()
            .filter_map(|id| self.tasks.get(id))
            .flat_map(|task| task.work.tokens())
            .map(|token| token.session)
            .collect()
    }

    /// Memory copy from buffer to buffer.
    ///
    /// # Errors
    /// The outcome at once, when a buffer is not there.
    pub fn copy(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        from: BufferRange,
        into: BufferRange,
    ) -> Result<(), Outcome> {
        let bytes = from.bytes.min(into.bytes);
        let owner = sessions.vm_of(from.token.session);
        let from = End::new(sessions, from, Direction::FromGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::From))?;
        let into = End::new(sessions, into, Direction::IntoGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::Into))?;
        self.begin(id, owner, bytes, Work::Copy { from, into });
        Ok(())
    }

    /// A buffer into private memory.
    ///
    /// # Errors
    /// As [`Bulk::copy`].
    pub fn fetch(&mut self, sessions: &mut Sessions, id: EffectId, from: BufferRange) -> Result<(), Outcome> {
        let owner = sessions.vm_of(from.token.session);
        let bytes = from.bytes;
        let from = End::new(sessions, from, Direction::FromGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::From))?;
        self.begin(
            id,
            owner,
            bytes,
            Work::Fetch {
                from,
                data: Vec::new(),
            },
        );
        Ok(())
    }

    /// File into a buffer.
    ///
    /// # Errors
    /// As [`Bulk::copy`].
    pub fn read(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        file: Arc<OpenFile>,
        offset: u64,
        into: BufferRange,
    ) -> Result<(), Outcome> {
        let owner = sessions.vm_of(into.token.session);
        let bytes = into.bytes;
        let into = End::new(sessions, into, Direction::IntoGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::Into))?;
        self.begin(
            id,
            owner,
            bytes,
            Work::Read {
                file,
                offset,
                into,
                warm_tries: 0,
            },
        );
        Ok(())
    }

    /// Buffer into a file.
    ///
    /// # Errors
    /// As [`Bulk::copy`].
    pub fn write(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        file: Arc<OpenFile>,
        offset: u64,
        from: BufferRange,
        checksum: bool,
    ) -> Result<(), Outcome> {
        let owner = sessions.vm_of(from.token.session);
        let bytes = from.bytes;
        let from = End::new(sessions, from, Direction::FromGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::From))?;
        let crc32 = checksum.then(crc32fast::Hasher::new);
        let writes = self.writes_of(file);
        self.begin(
            id,
            owner,
            bytes,
            Work::Write {
                writes,
                offset,
                from,
                crc32,
            },
        );
        Ok(())
    }

    /// The submission is void: its work ends as soon as no worker has it. Its outcome still comes.
    pub fn void(&mut self, token: Token) {
        for (id, task) in &mut self.tasks {
            if task.work.tokens().contains(&token) && !task.void {
                task.void(*id);
                self.ready.push_back(*id);
            }
        }
    }

    /// A channel of a session was closed, or (`None`) the session was reset or has ended: all its submissions are void.
    pub fn void_channel(&mut self, session: u64, channel: Option<Channel>) {
        let is_void =
            |token: Token| token.session == session && channel.is_none_or(|channel| token.channel == channel);
        for (id, task) in &mut self.tasks {
            if !task.void && task.work.tokens().into_iter().any(is_void) {
                task.void(*id);
                self.ready.push_back(*id);
            }
        }
    }

    /// An answer by message came: those who wait try again.
    pub fn handle_memory(&mut self) {
        self.ready.extend(self.waiting_for_memory.drain(..));
    }

    /// A session was touched: who waits for its thaw, or for its messages, tries again. Where a map was taken away, what was asked for in it has
    /// failed, and no answer will say so; where it is frozen, who waits for its messages lets go of it.
    pub fn look_again(&mut self, session: u64) {
        let concerned = |id: &mut EffectId, tasks: &BTreeMap<EffectId, Task>| {
            let task = tasks.get(id);
            task.is_none_or(|task| task.work.tokens().iter().any(|token| token.session == session))
        };
        let tasks = &self.tasks;
        self.ready
            .extend(self.frozen.extract_if(.., |id| concerned(id, tasks)));
        self.ready
            .extend(self.waiting_for_memory.extract_if(.., |id| concerned(id, tasks)));
    }

    /// A worker is back. `None`: there is no such work, or it goes on.
    pub fn handle_worker(&mut self, id: EffectId, done: Done) -> Option<Outcome> {
        let task = self.tasks.get_mut(&id)?;
        task.on_worker = false;
        match done {
            Done::Outcome(outcome) => {
                self.tasks.remove(&id);
                return Some(outcome);
            }
            Done::Stored { bytes, crc32 } => {
                task.scratch.clear();
                task.done += bytes;
                if let (Work::Write { crc32: Some(sum), .. }, Some(crc32)) = (&mut task.work, crc32) {
                    sum.combine(&crc32fast::Hasher::new_with_initial_len(crc32, bytes));
                }
            }
            Done::Scratch(data) => {
                if data.is_empty() {
                    // The file ends here.
                    task.bytes = task.done;
                }
                task.scratch = data;
            }
            Done::Revoked => task.revoked = true,
            Done::Warm | Done::Opened { .. } => {}
        }
        self.ready.push_back(id);
        None
    }

    /// Does at most one turn's worth of work; ended effects go to `finished`.
    /// `blame`: is told whose buffers are touched next.
    pub fn step(
        &mut self,
        sessions: &mut Sessions,
        store: &Store,
        finished: &mut Vec<(EffectId, Outcome)>,
        blame: &mut dyn FnMut(u64, u64),
    ) {
        let mut budget = TURN_BYTES_MAX;
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(task) = self.tasks.get(&id) else {
                continue;
            };
            let mut touched = task.work.tokens().into_iter().map(|token| token.session);
            let session = touched.next().unwrap_or(0);
            blame(session, touched.next().unwrap_or(0));
            let joined = match sessions.is_frozen(session) {
                true => None,
                false => read_joined(id, &self.ready, &self.tasks),
            };
            if let Some(joined) = joined {
                // The first has been taken from there already.
                self.ready.drain(..joined.len() - 1);
                for (id, bytes) in joined {
                    if let Some(task) = self.tasks.get_mut(&id) {
                        let step = task.moved(bytes);
                        self.ended(id, step, &mut budget, finished);
                    }
                }
            } else if let Some(task) = self.tasks.get_mut(&id) {
                let step = task.step(id, sessions, store);
                self.ended(id, step, &mut budget, finished);
            }
            if budget == 0 {
                break;
            }
        }
    }

    /// A step of a task has ended: where it goes now.
    fn ended(
        &mut self,
        id: EffectId,
        step: Step,
        budget: &mut usize,
        finished: &mut Vec<(EffectId, Outcome)>,
    ) {
        match step {
            Step::Moved(bytes) => {
                self.ready.push_back(id);
                *budget = budget.saturating_sub(bytes);
            }
            Step::Finished(outcome) => {
                let done = self.tasks.remove(&id).map_or(0, |task| task.done as usize);
                *budget = budget.saturating_sub(PIECE_BYTES_MAX.min(done));
                finished.push((id, outcome));
            }
            Step::OnWorker => {}
            Step::OnMemory => self.waiting_for_memory.push(id),
            Step::Frozen => self.frozen.push(id),
        }
    }

    /// The queue of a file; it is there as long as somebody writes.
    fn writes_of(&mut self, file: Arc<OpenFile>) -> Arc<Writes> {
        // A queue that is alive holds its file, so that no other has its address.
        let address = Arc::as_ptr(&file) as usize;
        if let Some(writes) = self.writes.get(&address).and_then(Weak::upgrade) {
            return writes;
        }
        self.writes.retain(|_, writes| writes.strong_count() > 0);
        let writes = Arc::new(Writes::new(file));
        self.writes.insert(address, Arc::downgrade(&writes));
        writes
    }

    fn begin(&mut self, id: EffectId, owner: u64, bytes: u64, work: Work) {
        self.tasks.insert(id, Task::new(owner, bytes, work));
        self.ready.push_back(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Finished;

    /// A map was taken away, and the reads in it that had not gone out have failed: no answer comes that would say so.
    #[test]
    fn a_touch_lets_those_try_again_who_wait_for_an_answer() {
        let mut bulk = Bulk {
            waiting_for_memory: vec![EffectId(1)],
            frozen: vec![EffectId(2)],
            ..Bulk::default()
        };
        bulk.look_again(7);
        assert_eq!(bulk.ready, [EffectId(2), EffectId(1)]);
        assert!(bulk.waiting_for_memory.is_empty() && bulk.frozen.is_empty());
    }

    /// Two writes into one file, of which a worker has begun the first.
    #[test]
    fn a_void_write_ends_when_nothing_of_it_can_be_written_any_more() {
        let token = |index| Token {
            session: 1,
            channel: Channel::Ring(0),
            index,
            generation: 0,
        };
        let disk = tempfile::tempfile().unwrap();
        let mut store = Store::new(&[], Vec::new(), 2, 0).unwrap();
        let slot = store.adopt(disk.try_clone().unwrap().into());
        let mut bulk = Bulk::default();
        let writes = bulk.writes_of(store.file(slot).unwrap());
        for index in 0..2u8 {
            let (token, bytes) = (token(u32::from(index)), 4);
            let range = BufferRange {
                token,
                offset: 0,
                bytes,
            };
            let work = Work::Write {
                writes: Arc::clone(&writes),
                offset: u64::from(index) * bytes,
                from: End {
                    range,
                    place: task::Place::Port,
                },
                crc32: None,
            };
            let id = EffectId(index.into());
            bulk.begin(id, 1, bytes, work);
            bulk.tasks.get_mut(&id).unwrap().on_worker = true;
            writes.push(writes::Range {
                effect: id,
                position: u64::from(index) * bytes,
                bytes: bytes as usize,
                source: writes::Source::Here(vec![index; bytes as usize]),
                checksum: false,
            });
        }
        bulk.ready.clear();
        let turn = writes.run();
        assert_eq!(turn.left, 1);
        bulk.void_channel(1, Some(Channel::Ring(0)));
        // The second is nowhere any more; the first is with its worker until that says so.
        let ends = |bulk: &mut Bulk| {
            let (mut sessions, mut finished) = (Sessions::default(), Vec::new());
            bulk.step(&mut sessions, &store, &mut finished, &mut |_, _| {});
            finished.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
        };
        assert_eq!(ends(&mut bulk), [EffectId(1)]);
        assert!(writes.run().results.is_empty());
        for Finished { effect, done } in turn.results {
            assert_eq!(bulk.handle_worker(effect, done), None);
        }
        assert_eq!(ends(&mut bulk), [EffectId(0)]);
        assert_eq!(std::os::unix::fs::MetadataExt::size(&disk.metadata().unwrap()), 4);
    }
}
