//! A ring pair in this program's memory.
//!
//! Comes in: requests. Goes out: completions, each matched to its submission by a tag that the device cannot make up.
//! Never trusted: anything read back from memory the device can write. Indexes are kept in private and only checked against it.
//! Protocol and fences: `vmgmt_abi::ring`.

mod lanes;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmgmt_abi::registers::{self as registers, DeviceState, RING_STRIDE, RINGS, RingState};
use vmgmt_abi::ring::{LIST_ENTRY_BYTES, flag};
use vmgmt_abi::{Mode, Opcode, Status, Submission, feature};
use zerocopy::IntoBytes;

use self::lanes::{Lanes, Pending, nonce};
use crate::backing::Backing;
use crate::channel::{Channel, Counters, Finished, Request, Span, Tag};
use crate::device::{Device, Woken, expect_magic, read_patiently, settle};
use crate::error::{DriverError, Result};
use crate::limits::{
    COMPLETION_ENTRIES_DEFAULT, OPEN_ATTEMPTS, PAGE_BYTES, SETTLE_TIMEOUT, SPIN_DEFAULT, SPINS_PER_CLOCK,
    SUBMISSION_ENTRIES_DEFAULT,
};
use crate::list::{cover, cut};
use crate::memory::{Buffer, DmaMemory};
use crate::order;

/// How a ring is opened.
#[derive(Clone, Copy, Debug)]
pub struct RingOptions {
    pub mode: Mode,
    /// Powers of two; made smaller where memory is scattered or the device allows less.
    pub submission_entries: u32,
    pub completion_entries: u32,
    /// Interrupt vector. Rings that share one must be waited for by one thread.
    pub vector: u32,
    /// How long `wait` looks at the ring before it sleeps.
    pub spin: Duration,
}

impl RingOptions {
    /// The usual sizes.
    #[must_use]
    pub const fn new(mode: Mode) -> Self {
        Self {
            mode,
            submission_entries: SUBMISSION_ENTRIES_DEFAULT,
            completion_entries: COMPLETION_ENTRIES_DEFAULT,
            vector: 0,
            spin: SPIN_DEFAULT,
        }
    }
}

/// A ring pair, open in one mode.
pub struct Ring {
    device: Arc<Device>,
    options: RingOptions,
    lanes: Option<Lanes>,
    /// Memory is proven shared and events are agreed: doorbells may be spared.
    suppression: bool,
    shared: bool,
    spare_lists: Vec<DmaMemory>,
    /// Completions of submissions that the ring made itself (CANCEL) are swallowed.
    own: Vec<Tag>,
    counters: Counters,
    /// The last look at the device's health that this ring knows of.
    looked_at: Instant,
    /// Completions that were published before the ring was opened anew.
    late: Vec<Finished>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("mode", &self.options.mode)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Opens a free ring of the device and proves whether its memory is shared.
    ///
    /// # Errors
    /// No ring is free, the device refuses, or it does not settle.
    pub fn open(device: &Arc<Device>, options: RingOptions) -> Result<Self> {
        let mut ring = Self {
            device: Arc::clone(device),
            options,
            lanes: None,
            suppression: false,
            shared: false,
            spare_lists: Vec::new(),
            own: Vec::new(),
            counters: Counters::default(),
            looked_at: device.healthy_at(),
            late: Vec::new(),
        };
        for _ in 1..OPEN_ATTEMPTS {
            match ring.start() {
                // Restored between the device's opening and this: nobody could know. Later the caller is told, who knows what was in flight.
                Err(DriverError::DeviceReplaced) => {
                    ring.close();
                    device.recover()?;
                }
                started => return started.map(|()| ring),
            }
        }
        ring.start().map(|()| ring)
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn start(&mut self) -> Result<()> {
        let (index, set_up) = self.device.take_ring()?;
        let opened = Lanes::open(&self.device, &self.options, index, set_up);
        match opened {
            Ok(lanes) => self.lanes = Some(lanes),
            Err(error) => {
                self.device.return_ring(index, set_up);
                return Err(error);
            }
        }
        self.suppression = false;
        self.shared = self.prove()?;
        self.suppression =
            self.shared && self.device.facts().features_agreed & feature::EVENT_SUPPRESSION != 0;
        Ok(())
    }

    /// Asks the host whether it sees what we write.
    fn prove(&mut self) -> Result<bool> {
        let memory = self.allocate(8)?;
        let nonce = nonce();
        memory.store64(0, nonce)?;
        let tag = self.submit(
            Request::new(Opcode::PROVE)
                .argument(nonce)
                .input(&memory, 0, 8, 0),
        )?;
        let mut deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut noticed = false;
        loop {
            while let Some(finished) = self.reap()? {
                if finished.tag == tag {
                    return match finished.status {
                        Status::OK => Ok(finished.result == 1),
                        Status::NOT_SUPPORTED => Ok(false),
                        status => Err(DriverError::RingRefused(status)),
                    };
                }
            }
            if !self.wait(Some(deadline))? {
                // A freeze that began just now lasts as long as the host's operator wants.
                self.device.check_health()?;
                if !std::mem::replace(&mut noticed, true) {
                    self.device.notice_waiting();
                }
                deadline = Instant::now() + SETTLE_TIMEOUT;
            }
        }
    }

    fn lanes(&mut self) -> Result<&mut Lanes> {
        let device = &self.device;
        self.lanes
            .as_mut()
            .filter(|lanes| device.is_current(lanes.set_up))
            .ok_or(DriverError::DeviceReplaced)
    }

    /// Gives the ring up after a broken contract, so that nothing more is believed.
    fn broken(&mut self, error: DriverError) -> DriverError {
        self.close();
        error
    }

    /// A list in device memory; gives its address too.
    fn list(&mut self, entries: &[vmgmt_abi::ListEntry]) -> Result<(u64, DmaMemory)> {
        let bytes = entries.len() * LIST_ENTRY_BYTES;
        let entries_max = self.device.facts().list_entries_max as usize;
        let spare = self.spare_lists.iter().position(|memory| memory.len() >= bytes);
        let memory = match spare {
            Some(index) => self.spare_lists.swap_remove(index),
            None => self.device.backing().allocate(bytes.max(PAGE_BYTES))?,
        };
        let piece = memory.pieces().first().copied().unwrap_or(crate::memory::Piece {
            address: 0,
            length: 0,
        });
        let room = (piece.length as usize / LIST_ENTRY_BYTES).min(entries_max);
        if entries.len() > room {
            return Err(DriverError::TooScattered {
                entries: entries.len(),
                entries_max: room,
            });
        }
        memory.write(0, entries.as_bytes())?;
        Ok((piece.address, memory))
    }

    /// Turns a request into the 64 bytes, with its list where it needs one.
    fn encode(&mut self, request: &Request) -> Result<(Submission, Option<DmaMemory>)> {
        request.check()?;
        let mut submission = Submission {
            tag: 0,
            opcode: request.opcode.0,
            flags: request.flags & !flag::LIST,
            handle: request.handle,
            offset: request.offset,
            buffer: 0,
            length: 0,
            list_entries: 0,
            meta_bytes: request.meta_bytes as u32,
            deadline_ns: request.deadline_ns(),
            argument: request.argument,
        };
        let Some(Span {
            memory,
            start,
            length,
        }) = &request.span
        else {
            return Ok((submission, None));
        };
        if *length as u64 > u64::from(self.device.facts().transfer_bytes_max) {
            return Err(DriverError::BadArgument(format!(
                "{length} bytes are too many for one submission"
            )));
        }
        submission.length = *length as u64;
        let mut entries = cover(memory.pieces(), *start, *length)?;
        if request.piece_bytes_max > 0 {
            entries = cut(&entries, request.piece_bytes_max);
        }
        match entries.as_slice() {
            [] => Ok((submission, None)),
            [one] => {
                submission.buffer = one.address;
                Ok((submission, None))
            }
            several => {
                let (address, memory) = self.list(several)?;
                submission.flags |= flag::LIST;
                submission.buffer = address;
                submission.list_entries = several.len() as u32;
                Ok((submission, Some(memory)))
            }
        }
    }

    fn submit_inner(&mut self, request: Request) -> Result<Tag> {
        let depth = self.depth();
        if !self.lanes()?.has_room()? {
            return Err(DriverError::Full(depth));
        }
        let (mut submission, list) = self.encode(&request)?;
        let suppression = self.suppression;
        let lanes = self.lanes()?;
        let tag = lanes
            .pending
            .insert(Pending { request, list })
            .map_err(|_| DriverError::Full(depth))?;
        submission.tag = tag.0;
        let old = lanes.tail;
        order::write_submission(&lanes.submissions, lanes.submission_entries, old, &submission)?;
        lanes.tail = old.wrapping_add(1);
        let due = order::publish(&lanes.events, old, lanes.tail)?;
        if !suppression || due {
            self.ring_doorbell()?;
        }
        self.counters.submissions += 1;
        Ok(tag)
    }

    fn ring_doorbell(&mut self) -> Result<()> {
        let lanes = self.lanes()?;
        let (register, tail) = (registers::DOORBELLS + 4 * lanes.index, lanes.tail);
        self.device.backing().write32(register, tail)?;
        self.counters.doorbells += 1;
        Ok(())
    }

    /// After a sleep: if the device was looked at meanwhile and is well, but has not taken what lies there since the look before, the doorbell is
    /// rung again. Nothing else would ever wake either side.
    fn ring_again_if_unheard(&mut self) -> Result<()> {
        let looked_at = self.device.healthy_at();
        if looked_at > self.looked_at {
            self.looked_at = looked_at;
            if self.lanes()?.is_unheard()? {
                self.ring_doorbell()?;
                self.counters.doorbells_again += 1;
            }
        }
        Ok(())
    }

    /// Takes the next completion, own ones included.
    fn reap_inner(&mut self) -> Result<Option<Finished>> {
        let lanes = self.lanes()?;
        let Some(completion) = lanes.take_completion()? else {
            return Ok(None);
        };
        let tag = Tag(completion.tag);
        let Some(Pending { request, list }) = lanes.pending.remove(tag) else {
            let error = DriverError::contract(format!(
                "a completion with tag {:#x}, which is not in flight",
                completion.tag
            ));
            return Err(self.broken(error));
        };
        self.spare_lists.extend(list);
        Ok(Some(Finished::new(tag, request, &completion)))
    }

    /// Closes the ring and waits until no DMA of it is under way. Memory the device may still reach is not given back.
    fn close(&mut self) {
        self.close_after(|_| {});
    }

    /// The same, with a last look at a ring that nobody writes to any more.
    fn close_after(&mut self, last_look: impl FnOnce(&mut Lanes)) {
        let Some(mut lanes) = self.lanes.take() else {
            return;
        };
        let backing = &**self.device.backing();
        let closed = if self.device.is_current(lanes.set_up) {
            close_ring(backing, lanes.index).or_else(|_| {
                // Somebody reset the function, perhaps: its registers are out of reach, not the device.
                backing.restore_function()?;
                close_ring(backing, lanes.index)
            })
        } else {
            // The device was reset since: the reset's end was awaited. Or the bus was taken from it.
            Ok(())
        };
        let over = closed
            .or_else(|_| self.device.reset())
            .or_else(|_| self.device.stop());
        if over.is_ok() {
            last_look(&mut lanes);
            self.device.return_ring(lanes.index, lanes.set_up);
            self.spare_lists.clear();
        } else {
            lanes.leak();
            self.spare_lists.drain(..).for_each(DmaMemory::leak);
        }
    }
}

impl Channel for Ring {
    fn mode(&self) -> Mode {
        self.options.mode
    }

    fn data_bytes_max(&self) -> usize {
        self.device.facts().transfer_bytes_max as usize
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn is_shared(&self) -> bool {
        self.shared
    }

    fn depth(&self) -> usize {
        // One entry is kept for a CANCEL.
        self.lanes
            .as_ref()
            .map_or(1, |lanes| lanes.pending.capacity().saturating_sub(1).max(1))
    }

    fn in_flight(&self) -> usize {
        self.lanes.as_ref().map_or(0, |lanes| lanes.pending.len())
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        self.device.backing().allocate(bytes).map(Arc::new)
    }

    fn submit(&mut self, request: Request) -> Result<Tag> {
        let depth = self.depth();
        if self.in_flight() >= depth {
            return Err(DriverError::Full(depth));
        }
        self.submit_inner(request)
    }

    fn reap(&mut self) -> Result<Option<Finished>> {
        while let Some(finished) = self.reap_inner()? {
            match self.own.iter().position(|tag| *tag == finished.tag) {
                Some(index) => drop(self.own.swap_remove(index)),
                None => return Ok(Some(finished)),
            }
        }
        Ok(None)
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<bool> {
        let spin_until = Instant::now() + self.options.spin;
        let vector = self.options.vector;
        loop {
            let lanes = self.lanes()?;
            while Instant::now() < spin_until {
                for _ in 0..SPINS_PER_CLOCK {
                    if lanes.has_completion()? {
                        return Ok(true);
                    }
                    std::hint::spin_loop();
                }
            }
            // Arm, full fence, look again, and only then sleep (`vmgmt_abi::ring`).
            order::arm(&lanes.events, lanes.completion_head)?;
            if lanes.has_completion()? {
                return Ok(true);
            }
            self.device.before_sleep(vector)?;
            if self.lanes()?.has_completion()? {
                return Ok(true);
            }
            self.counters.sleeps += 1;
            let woken = self.device.sleep(vector, deadline)?;
            self.ring_again_if_unheard()?;
            self.counters.interrupts += u64::from(woken == Woken::Interrupt);
            if self.lanes()?.has_completion()? {
                let interrupts = self.device.backing().interrupt_descriptor(vector).is_some();
                self.counters.unannounced += u64::from(woken == Woken::Looked && interrupts);
                return Ok(true);
            }
            if woken == Woken::TimedOut {
                return Ok(false);
            }
        }
    }

    fn cancel(&mut self, tag: Tag) -> Result<()> {
        let own = self.submit_inner(Request::new(Opcode::CANCEL).argument(tag.0.into()))?;
        self.own.push(own);
        Ok(())
    }

    fn reopen(&mut self) -> Result<()> {
        // First: a register that is not decoded would say that the ring is closed while the device still writes to it.
        self.device.backing().restore_function()?;
        let mut late = Vec::new();
        self.close_after(|lanes| {
            while let Ok(Some(completion)) = lanes.take_completion() {
                let tag = Tag(completion.tag);
                // One that nobody waits for is not believed, nor what follows it.
                let Some(Pending { request, .. }) = lanes.pending.remove(tag) else {
                    break;
                };
                late.push(Finished::new(tag, request, &completion));
            }
        });
        late.retain(|finished| !self.own.contains(&finished.tag));
        self.late = late;
        self.own.clear();
        if self.device.check_health().is_err() {
            self.device.recover()?;
        }
        self.start()
    }

    fn late(&mut self) -> Vec<Finished> {
        std::mem::take(&mut self.late)
    }

    fn wait_readable(&self, descriptor: std::os::fd::BorrowedFd<'_>) -> Result<()> {
        wait_readable(descriptor, self.device.cancel_descriptor().as_deref())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.close();
    }
}

/// Closes a ring and waits until that is over.
fn close_ring(backing: &dyn Backing, index: u32) -> Result<()> {
    let block = RINGS + index * RING_STRIDE;
    backing.write32(block + registers::RING_ENABLE, 0)?;
    settle("closing a ring", || {
        let status = read_patiently(backing, block + registers::RING_STATUS)?;
        if RingState(status & 0xff) != RingState::CLOSED {
            return Ok(None);
        }
        // A reset closes all rings at once, and is over when no access of before is under way any more.
        let state = DeviceState(read_patiently(backing, registers::STATE)?);
        expect_magic(backing)?;
        Ok((state != DeviceState::RESETTING).then_some(()))
    })
}

/// Waits until a descriptor of the program's own is readable. Without a cancel descriptor nobody needs to be waited for: reading waits.
///
/// # Errors
/// `Interrupted` when the cancel descriptor is readable.
pub fn wait_readable(
    descriptor: std::os::fd::BorrowedFd<'_>,
    cancel: Option<&std::os::fd::OwnedFd>,
) -> Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let Some(cancel) = cancel else { return Ok(()) };
    loop {
        let mut polled = [
            PollFd::new(cancel, PollFlags::IN),
            PollFd::from_borrowed_fd(descriptor, PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) if polled.first().is_some_and(|first| !first.revents().is_empty()) => {
                return Err(DriverError::Interrupted);
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(DriverError::system("waiting for input", error)),
        }
    }
}
