//! The port window as a channel: one submission at a time, no DMA, no interrupt.
//!
//! Comes in: requests whose data is at most 4 KiB each way. Goes out: their completions. Every byte is a port access (about
//! 60 µs), so this is for machines without a kernel driver, for firmware, and for finding out why a ring does not work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmgmt_abi::port::{self, INPUT_BYTES_MAX, OUTPUT_BYTES_MAX, PORT_MAGIC};
use vmgmt_abi::registers::DeviceState;
use vmgmt_abi::ring::{COMPLETION_BYTES, flag};
use vmgmt_abi::{ABI_VERSION, Completion, Mode, Status, Submission};
use zerocopy::{FromBytes, IntoBytes};

use crate::backing::pci::DeviceLock;
use crate::backing::{Backing, Width};
use crate::channel::{Channel, Finished, Request, Tag};
use crate::device::{pause, settle};
use crate::error::{DriverError, Result};
use crate::limits::{ABSENT_ATTEMPTS, ABSENT_PAUSE, PORT_PAUSE_FIRST, PORT_PAUSE_LAST};
use crate::memory::{Buffer, DmaMemory};

struct UnderWay {
    tag: Tag,
    request: Request,
    done: Option<Finished>,
}

/// The port window, claimed by this program.
pub struct PortChannel {
    backing: Arc<dyn Backing>,
    cancel: Option<Arc<std::os::fd::OwnedFd>>,
    mode: Mode,
    claim: u32,
    /// Nobody else can be alive who claimed the window.
    alone: bool,
    epoch: u32,
    counter: u32,
    under_way: Option<UnderWay>,
}

impl std::fmt::Debug for PortChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortChannel")
            .field("mode", &self.mode)
            .field("claim", &self.claim)
            .finish_non_exhaustive()
    }
}

impl PortChannel {
    /// Claims the window and puts it into a mode. `cancel` ends all waits while it is readable.
    ///
    /// # Errors
    /// No vmgmt device, another holder, or another version of the contract.
    pub fn open(
        backing: &Arc<dyn Backing>,
        mode: Mode,
        cancel: Option<Arc<std::os::fd::OwnedFd>>,
    ) -> Result<Self> {
        Self::open_as(backing, mode, cancel, false)
    }

    /// The same for who holds the device's lock: the claim of a program that was killed is given back in its name.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_locked(
        backing: &Arc<dyn Backing>,
        mode: Mode,
        cancel: Option<Arc<std::os::fd::OwnedFd>>,
        _lock: &DeviceLock,
    ) -> Result<Self> {
        Self::open_as(backing, mode, cancel, true)
    }

    fn open_as(
        backing: &Arc<dyn Backing>,
        mode: Mode,
        cancel: Option<Arc<std::os::fd::OwnedFd>>,
        alone: bool,
    ) -> Result<Self> {
        let mut channel = Self {
            backing: Arc::clone(backing),
            cancel,
            mode,
            claim: std::process::id(),
            alone,
            epoch: 0,
            counter: 0,
            under_way: None,
        };
        channel.start()?;
        Ok(channel)
    }

    fn read(&self, offset: u32) -> Result<u32> {
        self.backing.port_read(offset, Width::Four)
    }

    fn write(&self, offset: u32, value: u32) -> Result<()> {
        self.backing.port_write(offset, Width::Four, value)
    }

    fn start(&mut self) -> Result<()> {
        let mut magic = self.read(port::MAGIC)?;
        for _ in 1..ABSENT_ATTEMPTS {
            if magic != u32::MAX {
                break;
            }
            std::thread::sleep(ABSENT_PAUSE);
            magic = self.read(port::MAGIC)?;
        }
        match magic {
            PORT_MAGIC => {}
            u32::MAX => return Err(DriverError::DeviceAbsent),
            found => return Err(DriverError::DeviceMagic { found }),
        }
        let version = self.read(port::ABI_VERSION)?;
        if version >> 16 != ABI_VERSION >> 16 {
            return Err(DriverError::DeviceVersion { found: version });
        }
        if DeviceState(self.read(port::DEVICE_STATE)?) == DeviceState::QUARANTINED {
            return Err(DriverError::DeviceQuarantined);
        }
        let before = self.read(port::CLAIM)?;
        if self.alone && before != 0 && before != self.claim {
            // Its holder had the lock and has it no more: it is dead. Its number gives the window back, and ends what it had under way.
            self.write(port::CLAIM, before)?;
        }
        if before != self.claim {
            self.write(port::CLAIM, self.claim)?;
        }
        let holder = self.read(port::CLAIM)?;
        if holder != self.claim {
            return Err(DriverError::InUse {
                device: "(port window)".into(),
                holder: holder.to_string(),
            });
        }
        self.abort()?;
        self.write(port::MODE, self.mode.0)?;
        if self.read(port::MODE)? != self.mode.0 {
            return Err(DriverError::RingRefused(Status::NOT_SUPPORTED));
        }
        self.epoch = self.read(port::EPOCH)?;
        Ok(())
    }

    /// Empties both FIFOs and waits until nothing is under way.
    fn abort(&self) -> Result<()> {
        self.write(port::ABORT, 1)?;
        settle("emptying the port window", || {
            Ok((self.read(port::STATUS)? & port::STATUS_BUSY == 0).then_some(()))
        })?;
        self.write(
            port::STATUS,
            port::STATUS_UNDERFLOW | port::STATUS_OVERFLOW | port::STATUS_ERROR,
        )
    }

    fn push(&self, bytes: &[u8]) -> Result<()> {
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            self.write(port::DATA, u32::from_le_bytes(*word))?;
        }
        rest.iter()
            .try_for_each(|byte| self.backing.port_write(port::DATA, Width::One, u32::from(*byte)))
    }

    fn pull(&self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        for _ in 0..length / 4 {
            bytes.extend_from_slice(&self.read(port::DATA)?.to_le_bytes());
        }
        for _ in 0..length % 4 {
            bytes.push(self.backing.port_read(port::DATA, Width::One)? as u8);
        }
        Ok(bytes)
    }

    fn hand_over(&self, tag: Tag, request: &Request) -> Result<()> {
        let input_bytes = match &request.span {
            Some(span) if request.data_is_input => span.length,
            Some(_) => request.meta_bytes,
            None => 0,
        };
        if input_bytes > INPUT_BYTES_MAX || request.output_bytes() > OUTPUT_BYTES_MAX {
            return Err(DriverError::BadArgument(format!(
                "the port window takes {INPUT_BYTES_MAX} bytes and gives {OUTPUT_BYTES_MAX} in one submission"
            )));
        }
        let submission = Submission {
            tag: tag.0,
            opcode: request.opcode.0,
            flags: request.flags & !flag::LIST,
            handle: request.handle,
            offset: request.offset,
            buffer: 0,
            length: request.span.as_ref().map_or(0, |span| span.length as u64),
            list_entries: 0,
            meta_bytes: request.meta_bytes as u32,
            deadline_ns: request.deadline_ns(),
            argument: request.argument,
        };
        self.push(submission.as_bytes())?;
        if let Some(span) = &request.span {
            self.push(&span.memory.to_vec(span.start, input_bytes)?)?;
        }
        self.write(port::COMMIT, 1)?;
        let status = self.read(port::STATUS)?;
        if status & (port::STATUS_ERROR | port::STATUS_OVERFLOW) != 0 {
            self.check_epoch()?;
            self.abort()?;
            return Err(DriverError::contract(format!(
                "the port window refused a submission (status {status:#x})"
            )));
        }
        Ok(())
    }

    fn check_epoch(&self) -> Result<()> {
        match (self.read(port::EPOCH)?, self.read(port::CLAIM)?) {
            (u32::MAX, u32::MAX) => Err(DriverError::DeviceAbsent),
            (epoch, claim) if epoch == self.epoch && claim == self.claim => Ok(()),
            _ => Err(DriverError::DeviceReplaced),
        }
    }

    /// Takes completion and output when they are there.
    fn look(&mut self) -> Result<bool> {
        let Some(under_way) = &self.under_way else {
            return Ok(false);
        };
        if under_way.done.is_some() {
            return Ok(true);
        }
        let status = self.read(port::STATUS)?;
        if status == u32::MAX {
            return Err(DriverError::DeviceAbsent);
        }
        if status & port::STATUS_DONE == 0 {
            if status & port::STATUS_BUSY == 0 {
                self.check_epoch()?;
                return Err(DriverError::DeviceReplaced);
            }
            return Ok(false);
        }
        let readable = self.read(port::READABLE)? as usize;
        let output_bytes = readable.saturating_sub(COMPLETION_BYTES);
        let room = under_way.request.output_bytes();
        if readable < COMPLETION_BYTES || output_bytes > room {
            self.abort()?;
            return Err(DriverError::contract(format!(
                "the port window gives {output_bytes} bytes where there is room for {room}"
            )));
        }
        let bytes = self.pull(COMPLETION_BYTES)?;
        let completion = Completion::read_from_bytes(&bytes)
            .map_err(|_| DriverError::contract("a completion of another length"))?;
        let output = self.pull(output_bytes)?;
        if completion.tag != under_way.tag.0 {
            let tag = completion.tag;
            return Err(DriverError::contract(format!(
                "a completion with tag {tag:#x}, which is not in flight"
            )));
        }
        if let Some(under_way) = &mut self.under_way {
            if let Some(span) = &under_way.request.span {
                span.memory
                    .write(span.start + under_way.request.meta_bytes, &output)?;
            }
            under_way.done = Some(Finished::new(
                under_way.tag,
                under_way.request.clone(),
                &completion,
            ));
        }
        Ok(true)
    }
}

impl Channel for PortChannel {
    fn mode(&self) -> Mode {
        self.mode
    }

    fn data_bytes_max(&self) -> usize {
        INPUT_BYTES_MAX.min(OUTPUT_BYTES_MAX)
    }

    fn depth(&self) -> usize {
        1
    }

    fn in_flight(&self) -> usize {
        usize::from(self.under_way.is_some())
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        DmaMemory::ordinary(bytes).map(Arc::new)
    }

    fn submit(&mut self, request: Request) -> Result<Tag> {
        request.check()?;
        if self.under_way.is_some() {
            return Err(DriverError::Full(1));
        }
        self.counter = self.counter.wrapping_add(1);
        let tag = Tag(self.counter);
        self.hand_over(tag, &request)?;
        self.under_way = Some(UnderWay {
            tag,
            request,
            done: None,
        });
        Ok(tag)
    }

    fn reap(&mut self) -> Result<Option<Finished>> {
        if !self.look()? {
            return Ok(None);
        }
        Ok(self.under_way.take().and_then(|under_way| under_way.done))
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<bool> {
        let mut length: Duration = PORT_PAUSE_FIRST;
        loop {
            if self.look()? {
                return Ok(true);
            }
            let now = Instant::now();
            let left = deadline.map_or(length, |deadline| {
                deadline.saturating_duration_since(now).min(length)
            });
            if left.is_zero() {
                return Ok(false);
            }
            pause(left, self.cancel.as_deref())?;
            length = (length * 2).min(PORT_PAUSE_LAST);
        }
    }

    fn cancel(&mut self, tag: Tag) -> Result<()> {
        // The window has no second submission for a CANCEL: it is emptied, and the completion made here.
        if let Some(under_way) = self
            .under_way
            .as_mut()
            .filter(|under_way| under_way.tag == tag && under_way.done.is_none())
        {
            let completion = Completion {
                tag: tag.0,
                status: Status::CANCELLED.0,
                ..Default::default()
            };
            under_way.done = Some(Finished::new(tag, under_way.request.clone(), &completion));
            self.abort()?;
        }
        Ok(())
    }

    fn reopen(&mut self) -> Result<()> {
        self.under_way = None;
        self.backing.restore_function()?;
        self.start()
    }

    fn wait_readable(&self, descriptor: std::os::fd::BorrowedFd<'_>) -> Result<()> {
        crate::ring::wait_readable(descriptor, self.cancel.as_deref())
    }
}

impl Drop for PortChannel {
    fn drop(&mut self) {
        // A device that is gone cannot be tidied; the next holder empties the FIFOs in any case.
        let _gone = self.abort();
        let _gone = self.write(port::CLAIM, self.claim);
    }
}
