//! A channel that one program uses: calls that wait for their answer, and submissions that are awaited later.
//!
//! Comes in: requests. Goes out: answers by tag, in whatever order the device gives them. The typed operations of
//! `operations/` and the transfers are written on top of this.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use vmgmt_abi::{Mode, Opcode};

use crate::channel::{Channel, Finished, Request, Tag};
use crate::error::{DriverError, Result};
use crate::memory::Buffer;

/// One user of a channel.
pub struct Client {
    channel: Box<dyn Channel>,
    /// Answers that came while another was awaited.
    stash: BTreeMap<Tag, Finished>,
    /// Submissions whose answer nobody wants any more.
    abandoned: BTreeSet<Tag>,
    /// Buffers that can be used again.
    spare: Vec<Buffer>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("mode", &self.mode())
            .field("stash", &self.stash.len())
            .finish_non_exhaustive()
    }
}

/// Opcodes that can be repeated without anyone noticing.
const fn repeatable(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::NOOP
            | Opcode::ECHO
            | Opcode::IDENTITY
            | Opcode::SHARES
            | Opcode::LIST
            | Opcode::STAT
            | Opcode::PEERS
    )
}

impl Client {
    /// Uses a ring or the port window.
    #[must_use]
    pub fn new(channel: impl Channel + 'static) -> Self {
        Self {
            channel: Box::new(channel),
            stash: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            spare: Vec::new(),
        }
    }

    /// The channel's mode.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.channel.mode()
    }

    /// Most bytes of data of one submission.
    #[must_use]
    pub fn data_bytes_max(&self) -> usize {
        self.channel.data_bytes_max()
    }

    /// Most submissions in flight.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.channel.depth()
    }

    /// The channel itself.
    pub fn channel(&mut self) -> &mut dyn Channel {
        &mut *self.channel
    }

    /// Memory for buffers of the program's own.
    ///
    /// # Errors
    /// There is none.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        self.channel.allocate(bytes)
    }

    /// Waits until a descriptor of the program's own is readable, or somebody cancels.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn wait_readable(&self, descriptor: std::os::fd::BorrowedFd<'_>) -> Result<()> {
        self.channel.wait_readable(descriptor)
    }

    /// A buffer of at least `bytes` bytes from the spare ones; give it back with [`Self::give_back`].
    pub(crate) fn borrow(&mut self, bytes: usize) -> Result<Buffer> {
        let fitting = self.spare.iter().position(|buffer| buffer.len() >= bytes);
        fitting.map_or_else(
            || self.channel.allocate(bytes),
            |index| Ok(self.spare.swap_remove(index)),
        )
    }

    /// Keeps a buffer for the next use. One that a submission in flight still names is let go.
    pub(crate) fn give_back(&mut self, buffer: Buffer) {
        if Buffer::strong_count(&buffer) == 1 && self.spare.len() < 16 {
            self.spare.push(buffer);
        }
    }

    /// Submits; waits for a free slot where there is none.
    ///
    /// # Errors
    /// As [`Channel::submit`] and [`Channel::wait`].
    pub fn start(&mut self, request: Request) -> Result<Tag> {
        loop {
            match self.channel.submit(request.clone()) {
                Err(DriverError::Full(_)) => {
                    self.collect(None)?;
                }
                other => return other,
            }
        }
    }

    /// Waits for completions and stashes them; false when the deadline passed first.
    fn collect(&mut self, deadline: Option<Instant>) -> Result<bool> {
        if !self.channel.wait(deadline)? {
            return Ok(false);
        }
        while let Some(finished) = self.channel.reap()? {
            if !self.abandoned.remove(&finished.tag) {
                self.stash.insert(finished.tag, finished);
            }
        }
        Ok(true)
    }

    /// The answer of one submission; nothing when the deadline passed first.
    ///
    /// # Errors
    /// As [`Channel::wait`] and [`Channel::reap`].
    pub fn finish(&mut self, tag: Tag, deadline: Option<Instant>) -> Result<Option<Finished>> {
        loop {
            if let Some(finished) = self.stash.remove(&tag) {
                return Ok(Some(finished));
            }
            if !self.collect(deadline)? {
                return Ok(None);
            }
        }
    }

    /// The answer of one submission, however long it takes. A refusal is an error.
    ///
    /// # Errors
    /// As [`Self::finish`], and `Refused`.
    pub fn await_ok(&mut self, tag: Tag) -> Result<Finished> {
        self.finish(tag, None)?.ok_or(DriverError::TimedOut)?.ok()
    }

    /// Submits and waits for the answer. Where the device was replaced meanwhile, questions that change nothing are asked once more.
    ///
    /// # Errors
    /// As [`Self::await_ok`].
    pub fn call(&mut self, request: Request) -> Result<Finished> {
        // A message with an idempotency key is delivered once, however often it is sent.
        let keyed = request.opcode == Opcode::SEND && request.argument != 0;
        let again = (keyed || repeatable(request.opcode)).then(|| request.clone());
        let first = self.start(request).and_then(|tag| self.await_ok(tag));
        match (first, again) {
            (Err(error), Some(again)) if error.is_recoverable() => {
                self.reopen()?;
                let tag = self.start(again)?;
                self.await_ok(tag)
            }
            (first, _) => first,
        }
    }

    /// Gives a submission up: cancels it and waits for its completion for at most `patience`.
    ///
    /// # Errors
    /// The channel is dead.
    pub fn cancel(&mut self, tag: Tag, patience: Duration) -> Result<Option<Finished>> {
        if let Some(finished) = self.stash.remove(&tag) {
            return Ok(Some(finished));
        }
        self.channel.cancel(tag)?;
        self.finish(tag, Some(Instant::now() + patience))
    }

    /// Lets answers that nobody waits for go by.
    pub(crate) fn abandon(&mut self, tags: impl IntoIterator<Item = Tag>) {
        for tag in tags {
            if self.stash.remove(&tag).is_none() {
                self.abandoned.insert(tag);
            }
        }
    }

    /// Opens the channel anew after the device was reset or replaced. Whatever was in flight is lost.
    ///
    /// # Errors
    /// The device does not come back.
    pub fn reopen(&mut self) -> Result<()> {
        self.reopen_keeping().map(drop)
    }

    /// The same; gives the answers that had come and were not asked for yet.
    pub(crate) fn reopen_keeping(&mut self) -> Result<BTreeMap<Tag, Finished>> {
        let mut late = std::mem::take(&mut self.stash);
        let abandoned = std::mem::take(&mut self.abandoned);
        self.channel.reopen()?;
        late.extend(
            self.channel
                .late()
                .into_iter()
                .filter(|finished| !abandoned.contains(&finished.tag))
                .map(|finished| (finished.tag, finished)),
        );
        Ok(late)
    }
}
