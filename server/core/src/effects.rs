//! OFFICE: effects under way and effects that wait their turn.
//!
//! In: an effect with the note of what to do when it ends. Out: effects to give to the shell, VMs taking turns; the note, when its outcome comes.
//! It never knows what an effect is for.
//!
//! A killed core may be *undead*: a worker of it sleeps in a disk, and the call that it is in will still come to its end, at any time. What
//! that may be the first attempt of waits here until it is gone ([`Effects::add_after_burial`]), and only for the VMs whose work it may be.

use crate::effect::{BufferRange, Effect, EffectId};
use crate::limits::{EFFECTS_RUNNING_MAX, EFFECTS_RUNNING_PER_VM_MAX, EFFECTS_RUNNING_PER_VM_MIN};
use crate::modes::namely::NameOperation;
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vmgmt_device::rings::Token;

/// What to do when an effect ends. Tokens and handles in here may be gone by then.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Continuation {
    /// Nothing waits for it.
    Nothing,
    /// A CLOSE.
    Plain {
        token: Token,
    },
    /// A name operation's file or directory is known.
    Identified {
        token: Token,
        operation: Box<NameOperation>,
    },
    /// A name operation ended. `again`: an earlier core life may have done it.
    Named {
        token: Token,
        #[serde(default)]
        again: bool,
    },
    /// A file or put of an earlier core life is open again, or cannot be.
    Reopened {
        handle: u64,
    },
    Stat {
        token: Token,
    },
    List {
        token: Token,
        bytes_max: u64,
    },
    /// SHARES: the entries, which only lack what is left, and the flags and cursor of the answer.
    Shares {
        token: Token,
        entries: Vec<(String, bool)>,
        next: u64,
    },
    Open {
        token: Token,
        handle: u64,
        vm: u64,
        open: Box<crate::modes::file::Opening>,
    },
    /// An operation on an open file that ends its submission: READ, WRITE, TRUNCATE, FSYNC, CHECKSUM.
    File {
        token: Token,
        handle: u64,
    },
    PutOpen {
        token: Token,
        handle: u64,
        put: Box<crate::modes::puts::PutOpening>,
    },
    /// As `File`, on a put.
    Put {
        token: Token,
        handle: u64,
        write: Option<(u64, u64)>,
    },
    /// A step of COMMIT.
    Commit {
        handle: u64,
        token: Token,
    },
    /// The slot of a put is closed; its temporary name is free again, and who waits for that gets this status.
    PutGone {
        key: (String, String),
        answer: Option<(Token, u16)>,
    },
    /// The body of a message.
    Fetch {
        token: Token,
    },
    /// A piece of a stream.
    Piece {
        stream: u64,
    },
    /// The checksum of a host file that is pushed.
    PushChecksum {
        stream: u64,
    },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Running {
    pub vm: u64,
    /// Counted against the limits: it may sleep on a disk.
    pub slow: bool,
    pub then: Continuation,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Queued {
    pub id: EffectId,
    pub effect: Effect,
    pub then: Continuation,
}

/// Effects under way, and queues of those that wait.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Effects {
    next_id: u64,
    running: BTreeMap<EffectId, Running>,
    queues: BTreeMap<u64, VecDeque<Queued>>,
    /// VMs with a queue, the next one first.
    turns: VecDeque<u64>,
    /// Derived: slow ones running, in all and for each VM.
    slow: u32,
    slow_of: BTreeMap<u64, u32>,
    /// VMs for which an undead core's worker may still do something.
    undead: BTreeSet<u64>,
    /// What waits until it is gone, with its VM, in order.
    held: Vec<(u64, Queued)>,
}

/// As saved.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedEffects {
    next_id: u64,
    running: Vec<(EffectId, Running)>,
    queues: Vec<(u64, Vec<Queued>)>,
    turns: Vec<u64>,
    /// Of no use to another core life, which is told anew.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    undead: BTreeSet<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    held: Vec<(u64, Queued)>,
}

impl Effects {
    /// Effects of a core life that begins while workers of a killed one may still do something for these VMs.
    #[must_use]
    pub fn beside(undead: BTreeSet<u64>) -> Self {
        Self {
            undead,
            ..Self::default()
        }
    }

    /// Whether an undead core's worker may still do something for this VM.
    #[must_use]
    pub fn is_haunted(&self, vm: u64) -> bool {
        self.undead.contains(&vm)
    }

    /// VMs of which that is so.
    pub fn haunted(&self) -> impl Iterator<Item = u64> + '_ {
        self.undead.iter().copied()
    }

    /// As [`Effects::add`], for what an earlier core life may have begun: it waits until nothing of that can happen any more.
    pub fn add_after_burial(
        &mut self,
        vm: u64,
        effect: Effect,
        then: Continuation,
    ) -> (EffectId, Option<Effect>) {
        if !self.is_haunted(vm) {
            return self.add(vm, effect, then);
        }
        let id = EffectId(self.next_id);
        self.next_id += 1;
        self.held.push((vm, Queued { id, effect, then }));
        (id, None)
    }

    /// The undead are gone: what waited for that has its turn ([`Effects::next`] gives it).
    pub fn bury(&mut self) {
        self.undead.clear();
        for (vm, queued) in std::mem::take(&mut self.held) {
            self.enqueue(vm, queued);
        }
    }

    fn enqueue(&mut self, vm: u64, queued: Queued) {
        let queue = self.queues.entry(vm).or_insert_with(|| {
            self.turns.push_back(vm);
            VecDeque::new()
        });
        queue.push_back(queued);
    }

    /// Takes an effect of a VM in. Returns its id, and whether the shell is to have it now (else [`Effects::next`] gives it later).
    pub fn add(&mut self, vm: u64, effect: Effect, then: Continuation) -> (EffectId, Option<Effect>) {
        let id = EffectId(self.next_id);
        self.next_id += 1;
        let slow = !matches!(effect, Effect::Copy { .. } | Effect::Fetch { .. });
        if slow && (!self.may_run(vm) || self.queues.contains_key(&vm)) {
            self.enqueue(vm, Queued { id, effect, then });
            return (id, None);
        }
        self.start(id, vm, slow, then);
        (id, Some(effect))
    }

    /// A VM may have as many as there are places left, so that they never are all taken by a few, and some in any case.
    fn may_run(&self, vm: u64) -> bool {
        let left = EFFECTS_RUNNING_MAX.saturating_sub(self.slow);
        let most = left.clamp(EFFECTS_RUNNING_PER_VM_MIN, EFFECTS_RUNNING_PER_VM_MAX);
        self.slow_of.get(&vm).copied().unwrap_or(0) < most
    }

    fn start(&mut self, id: EffectId, vm: u64, slow: bool, then: Continuation) {
        if slow {
            self.slow += 1;
            *self.slow_of.entry(vm).or_insert(0) += 1;
        }
        self.running.insert(id, Running { vm, slow, then });
    }

    /// The next queued effect that may run, VMs taking turns.
    pub fn next(&mut self) -> Option<(EffectId, Effect)> {
        for _ in 0..self.turns.len() {
            let vm = self.turns.pop_front()?;
            if !self.may_run(vm) {
                self.turns.push_back(vm);
                continue;
            }
            let queue = self.queues.get_mut(&vm)?;
            let queued = queue.pop_front();
            if queue.is_empty() {
                self.queues.remove(&vm);
            } else {
                self.turns.push_back(vm);
            }
            if let Some(Queued { id, effect, then }) = queued {
                self.start(id, vm, true, then);
                return Some((id, effect));
            }
        }
        None
    }

    /// An effect ended: what to do now. `None`: no such effect.
    pub fn finish(&mut self, id: EffectId) -> Option<Continuation> {
        let Running { vm, slow, then } = self.running.remove(&id)?;
        if slow {
            self.slow -= 1;
            if let Some(count) = self.slow_of.get_mut(&vm) {
                *count -= 1;
                if *count == 0 {
                    self.slow_of.remove(&vm);
                }
            }
        }
        Some(then)
    }

    /// Takes a queued effect back: what would have been done. `None`: it is running (or gone), or tidies up and must run.
    pub fn withdraw(&mut self, vm: u64, id: EffectId) -> Option<Continuation> {
        if let Some(place) = self.held.iter().position(|(_, queued)| queued.id == id) {
            return Some(self.held.remove(place).1.then);
        }
        let queue = self.queues.get_mut(&vm)?;
        let place = queue.iter().position(|queued| queued.id == id)?;
        if matches!(
            queue.get(place)?.effect,
            Effect::Close { .. } | Effect::Discard { .. }
        ) {
            return None;
        }
        let then = queue.remove(place).map(|queued| queued.then);
        if queue.is_empty() {
            self.queues.remove(&vm);
            self.turns.retain(|turn| *turn != vm);
        }
        then
    }

    /// Effects under way and waiting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.running.len() + self.queues.values().map(VecDeque::len).sum::<usize>() + self.held.len()
    }

    /// Those that the shell has and has not answered.
    pub fn vm_of(&self, id: EffectId) -> Option<u64> {
        self.running.get(&id).map(|running| running.vm)
    }

    pub fn running(&self) -> impl Iterator<Item = EffectId> {
        self.running.keys().copied()
    }

    /// What is to be done when each ends.
    pub fn continuations(&self) -> impl Iterator<Item = &Continuation> {
        let held = self.held.iter().map(|(_, queued)| queued);
        let queued = self
            .queues
            .values()
            .flatten()
            .chain(held)
            .map(|queued| &queued.then);
        self.running.values().map(|running| &running.then).chain(queued)
    }

    #[must_use]
    pub fn save(&self) -> SavedEffects {
        let Self {
            next_id,
            running,
            queues,
            turns,
            slow: _,
            slow_of: _,
            undead,
            held,
        } = self;
        SavedEffects {
            next_id: *next_id,
            running: running
                .iter()
                .map(|(id, running)| (*id, running.clone()))
                .collect(),
            queues: queues
                .iter()
                .map(|(vm, queue)| (*vm, queue.iter().cloned().collect()))
                .collect(),
            turns: turns.iter().copied().collect(),
            undead: undead.clone(),
            held: held.clone(),
        }
    }

    /// # Errors
    /// What is wrong with the saved state.
    pub fn restore(saved: SavedEffects) -> Result<Self, &'static str> {
        let SavedEffects {
            next_id,
            running,
            queues,
            turns,
            undead,
            held,
        } = saved;
        if held
            .iter()
            .any(|(vm, queued)| !undead.contains(vm) || queued.id.0 >= next_id)
        {
            return Err("an effect waits for the end of a core that is none of its VM's");
        }
        let mut effects = Self {
            next_id,
            undead,
            held,
            ..Self::default()
        };
        for (id, entry) in running {
            if id.0 >= next_id || effects.running.contains_key(&id) {
                return Err("an effect has a number that is not its own");
            }
            effects.start(id, entry.vm, entry.slow, entry.then);
        }
        for (vm, queue) in queues {
            if queue.is_empty() || effects.queues.insert(vm, queue.into()).is_some() || !turns.contains(&vm) {
                return Err("a queue of effects is empty, twice there or has no turn");
            }
        }
        if turns.len() != effects.queues.len() {
            return Err("a turn of effects has no queue");
        }
        effects.turns = turns.into();
        Ok(effects)
    }
}

/// Part of a submission's data area, within the largest offset.
///
/// # Errors
/// [`Refusal::Field`] where `offset + bytes` is no file offset.
pub fn range_in_file(offset: u64, bytes: u64) -> Result<(), Refusal> {
    match offset.checked_add(bytes) {
        Some(end) if end <= crate::limits::FILE_OFFSET_MAX => Ok(()),
        _ => Err(Refusal::Field),
    }
}

/// The whole data area of a submission.
#[must_use]
pub const fn whole(token: Token, bytes: u64) -> BufferRange {
    BufferRange {
        token,
        offset: 0,
        bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effect::FileSlot;

    /// Asks for an effect that may sleep on a disk; whether it runs at once.
    fn ask(effects: &mut Effects, vm: u64) -> bool {
        let sync = Effect::Sync { slot: FileSlot::NONE };
        effects.add(vm, sync, Continuation::Nothing).1.is_some()
    }

    fn running_of(effects: &Effects, vm: u64) -> usize {
        effects
            .running
            .values()
            .filter(|running| running.vm == vm)
            .count()
    }

    #[test]
    fn those_that_hang_or_are_frozen_never_stop_the_others() {
        for hung in [1, 3, 4, 50, 500] {
            let mut effects = Effects::default();
            for vm in 1..=hung {
                for _ in 0..100 {
                    ask(&mut effects, vm);
                }
            }
            assert_eq!(effects.next(), None);
            let other = hung + 1;
            let at_once = (0..100).filter(|_| ask(&mut effects, other)).count();
            assert!(
                at_once >= EFFECTS_RUNNING_PER_VM_MIN as usize,
                "{hung} hang: {at_once}"
            );
            // And its queue goes on as its own end, though nothing of the others does.
            for _ in at_once..100 {
                let id = effects.running.iter().find(|(_, running)| running.vm == other);
                let id = *id.expect("one of its own runs").0;
                assert_eq!(effects.finish(id), Some(Continuation::Nothing));
                assert!(effects.next().is_some(), "{hung} hang");
            }
            assert!(!effects.queues.contains_key(&other));
        }
    }

    #[test]
    fn one_alone_has_its_full_share_and_a_few_leave_places() {
        let mut effects = Effects::default();
        for vm in 1..=4 {
            for _ in 0..100 {
                ask(&mut effects, vm);
            }
        }
        assert_eq!(running_of(&effects, 1), EFFECTS_RUNNING_PER_VM_MAX as usize);
        assert!(effects.slow < EFFECTS_RUNNING_MAX);
    }
}
