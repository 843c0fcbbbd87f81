//! Fences: when is no DMA left that began before?
//!
//! In: core pages of the lives that were given this session's maps, and the front page's fence counter. Out: which fences have
//! passed, and the replies that waited for them, in order. Must never know: why a fence was moved.
//!
//! The scheme (survival.md, "Front and core"): the core sets `busy` before DMA, makes a SeqCst fence, reads table and fence again. The
//! front changes the table, moves the fence, makes a SeqCst fence, reads `busy`: 0 means that no DMA is under way that did not see the change.

use crate::page::{CorePage, Words};
use crate::tick::Tick;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use vmgmt_abi::registers::RingState;
use vmgmt_wire::{DmaUnmap, RegionAccess, Reply, ReplyHandle};

/// A core life that was given the session's maps and is not known to be dead for guest memory.
#[derive(Clone, Debug)]
pub struct AttachedCore<W: Words> {
    pub life: u64,
    pub page: CorePage<W>,
    /// The highest fence known to have passed in this life.
    pub passed: u64,
}

/// The lives, oldest first; the last one is in service.
#[derive(Clone, Debug)]
pub struct Cores<W: Words> {
    attached: Vec<AttachedCore<W>>,
}

impl<W: Words> Cores<W> {
    pub const fn new(attached: Vec<AttachedCore<W>>) -> Self {
        Self { attached }
    }

    /// A new life takes over.
    pub fn attach(&mut self, core: AttachedCore<W>) {
        self.detach(core.life);
        self.attached.push(core);
    }

    /// This life is dead for guest memory.
    pub fn detach(&mut self, life: u64) {
        self.attached.retain(|core| core.life != life);
    }

    pub fn all(&self) -> &[AttachedCore<W>] {
        &self.attached
    }

    /// The page of the life in service.
    pub fn page(&self) -> Option<&CorePage<W>> {
        self.attached.last().map(|core| &core.page)
    }

    /// Looks at all lives; `current` is the front page's fence, whose change (and the change that it fences) was stored before.
    /// Gives the highest fence that has passed in all of them.
    pub fn observe(&mut self, current: u64) -> u64 {
        fence(Ordering::SeqCst);
        for core in &mut self.attached {
            let passed = if core.page.busy() {
                core.page.fenced().min(current)
            } else {
                current
            };
            core.passed = core.passed.max(passed);
        }
        self.attached
            .iter()
            .map(|core| core.passed)
            .min()
            .unwrap_or(current)
    }
}

impl<W: Words> Cores<W> {
    /// Whether ring `n`, closed under `epoch`, has nothing on its way any more. A fence passes while messages to the client wait: their answers
    /// come only when it waits for none of ours. Nobody waits for a ring to be closed, it is asked about; so a core says it when they are done.
    pub fn have_closed(&self, n: usize, epoch: u32) -> bool {
        self.attached.iter().all(|core| {
            let answer = core.page.open_answer(n);
            !core.page.busy() || (answer.epoch, answer.state) == (epoch, RingState::CLOSED)
        })
    }
}

/// The replies that may wait for a fence.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum HeldReply {
    Done,
    DmaUnmap(DmaUnmap),
    RegionWrite(RegionAccess),
    RegionWriteMulti(u64),
}

impl From<HeldReply> for Reply {
    fn from(held: HeldReply) -> Self {
        match held {
            HeldReply::Done => Self::Done,
            HeldReply::DmaUnmap(unmap) => Self::DmaUnmap(unmap),
            HeldReply::RegionWrite(access) => Self::RegionWrite(access),
            HeldReply::RegionWriteMulti(count) => Self::RegionWriteMulti { count },
        }
    }
}

/// A reply that waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Held {
    pub handle: ReplyHandle,
    pub reply: HeldReply,
    /// The fence it waits for.
    pub fence: u64,
    /// When its request came.
    pub arrival: Tick,
}

/// Replies in the order of their requests, which is also that of their fences.
pub type HeldReplies = VecDeque<Held>;
