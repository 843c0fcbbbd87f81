//! The guest's driver against a hostile device: registers answer anything, rings and buffers hold anything. The driver gives errors, never a
//! panic, never a wait without end, and touches nothing but its own memory (which its checked accesses ensure: they fail instead).

use crate::edits::edge;
use arbitrary::{Result, Unstructured};
use std::cell::OnceCell;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmgmt_abi::registers::{self, DeviceState, RING_STRIDE, RINGS};
use vmgmt_abi::ring::{COMPLETION_BYTES, event_offset, phase};
use vmgmt_driver::backing::memfd::MemfdMemory;
use vmgmt_driver::backing::{Backing, InterruptKind, Interrupts, Width};
use vmgmt_driver::{
    Channel, Client, Device, DmaMemory, DriverError, Mode, Opcode, PortChannel, Request, Ring, RingOptions,
};

const BASE: u64 = 1 << 32;
const BYTES: usize = 1 << 20;
/// Register reads that are answered; then the device is gone, so that no wait goes on by the clock.
const READS_MAX: u32 = 100;

struct State {
    /// What registers answer beside the truth.
    lies: Vec<u8>,
    reads: u32,
    registers: std::collections::BTreeMap<u32, u32>,
    completed: u32,
}

struct Hostile {
    memory: Arc<MemfdMemory>,
    guest: DmaMemory,
    interrupt: Arc<OwnedFd>,
    state: Mutex<State>,
}

fn gone() -> DriverError {
    DriverError::DeviceAbsent
}

impl Hostile {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device answers a doorbell with what it likes, where the ring is.
    fn complete(&self, state: &mut State, ring: u32) {
        let block = RINGS + ring * RING_STRIDE;
        let word = |state: &State, register: u32| {
            u64::from(state.registers.get(&(block + register)).copied().unwrap_or(0))
        };
        let low = |state: &State, register: u32| word(state, register) | word(state, register + 4) << 32;
        let entries = (word(state, registers::RING_COMPLETION_ENTRIES) as u32).max(1);
        let completions = low(state, registers::RING_COMPLETIONS_LOW).wrapping_sub(BASE);
        let events = low(state, registers::RING_EVENTS_LOW).wrapping_sub(BASE);
        let submissions = low(state, registers::RING_SUBMISSIONS_LOW).wrapping_sub(BASE);
        let mut lie = || state.lies.pop().unwrap_or(0);
        let mode = lie();
        for _ in 0..mode % 4 {
            let at = state.completed;
            state.completed = at.wrapping_add(1);
            let place = completions.wrapping_add(u64::from(at % entries) * COMPLETION_BYTES as u64) as usize;
            // The tag of the submission in the same place, mostly.
            let slot = submissions.wrapping_add(u64::from(at % 64) * 64) as usize;
            let mut pop = || state.lies.pop().unwrap_or(0);
            let tag = match pop() {
                0..=199 => self.guest.load32(slot).unwrap_or(0),
                lie => u32::from(lie),
            };
            let mut bytes: [u8; 24] = std::array::from_fn(|_| 0);
            for byte in bytes.iter_mut().take(usize::from(pop()) % 25) {
                *byte = pop();
            }
            let status = if pop() < 200 { 0 } else { u64::from(pop()) };
            let flags = u64::from(phase(at, entries)) | u64::from(pop() & 0xfe);
            let _ = self.guest.write(place, &bytes);
            let _ = self
                .guest
                .store64(place + 24, u64::from(tag) | status << 32 | flags << 48);
            // Its data area, or whatever is there.
            if pop() > 128 {
                let noise: Vec<u8> = (0..64).map(|_| pop()).collect();
                let buffer = self.guest.load64(slot + 32).unwrap_or(0).wrapping_sub(BASE) as usize;
                let _ = self.guest.write(buffer, &noise);
            }
        }
        let head = match mode >> 6 {
            0 => u32::from(mode),
            _ => state
                .registers
                .get(&(registers::DOORBELLS + 4 * ring))
                .copied()
                .unwrap_or(0),
        };
        let _ = self
            .guest
            .store32((events + event_offset::SUBMISSION_HEAD) as usize, head);
        let _ = rustix::io::write(&self.interrupt, &1u64.to_ne_bytes());
    }
}

impl Backing for Hostile {
    fn name(&self) -> &'static str {
        "hostile"
    }
    fn has_registers(&self) -> bool {
        true
    }
    fn has_dma(&self) -> bool {
        true
    }
    fn read32(&self, offset: u32) -> vmgmt_driver::Result<u32> {
        let mut state = self.lock();
        state.reads += 1;
        if state.reads > READS_MAX {
            return Err(gone());
        }
        let lie = state.lies.pop().unwrap_or(0);
        if lie >= 248 {
            let bytes: [u8; 4] = std::array::from_fn(|_| state.lies.pop().unwrap_or(0));
            return Ok(u32::from_le_bytes(bytes));
        }
        let honest = match offset {
            registers::MAGIC => vmgmt_abi::MAGIC,
            registers::ABI_VERSION => vmgmt_abi::ABI_VERSION,
            registers::STATE => DeviceState::BLANK.0,
            registers::RING_COUNT => 4,
            registers::RING_ENTRIES_MAX => 64,
            registers::VECTORS => 4,
            registers::TRANSFER_BYTES_MAX => 1 << 20,
            registers::LIST_ENTRIES_MAX => 256,
            registers::FEATURES_LOW => 0x103,
            RINGS..
                if offset < registers::DOORBELLS
                    && (offset - RINGS) % RING_STRIDE == registers::RING_STATUS =>
            {
                let enabled = state
                    .registers
                    .get(&(offset - registers::RING_STATUS + registers::RING_ENABLE));
                if enabled == Some(&1) {
                    registers::RingState::OPEN.0
                } else {
                    registers::RingState::CLOSED.0
                }
            }
            _ => state.registers.get(&offset).copied().unwrap_or(0),
        };
        Ok(honest)
    }
    fn write32(&self, offset: u32, value: u32) -> vmgmt_driver::Result<()> {
        let mut state = self.lock();
        state.registers.insert(offset, value);
        if let Some(ring) = offset.checked_sub(registers::DOORBELLS).map(|bytes| bytes / 4)
            && ring < 16
        {
            self.complete(&mut state, ring);
        }
        Ok(())
    }
    fn port_read(&self, _: u32, width: Width) -> vmgmt_driver::Result<u32> {
        let mut state = self.lock();
        state.reads += 1;
        if state.reads > READS_MAX || state.lies.is_empty() {
            return Err(gone());
        }
        let bytes: [u8; 4] = std::array::from_fn(|n| {
            if n < width.bytes() {
                state.lies.pop().unwrap_or(0)
            } else {
                0
            }
        });
        Ok(u32::from_le_bytes(bytes))
    }
    fn port_write(&self, _: u32, _: Width, _: u32) -> vmgmt_driver::Result<()> {
        Ok(())
    }
    fn allocate(&self, bytes: usize) -> vmgmt_driver::Result<DmaMemory> {
        self.memory.allocate(bytes)
    }
    fn set_up_interrupts(&self, _: u32) -> vmgmt_driver::Result<Interrupts> {
        Ok(Interrupts {
            kind: InterruptKind::Msi,
            vectors: 4,
        })
    }
    fn interrupt_descriptor(&self, _: u32) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.interrupt))
    }
    fn take_interrupt(&self, _: u32) -> vmgmt_driver::Result<()> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.interrupt, &mut count);
        // A device that was asked too often is gone: this ends every wait.
        let mut state = self.lock();
        state.reads += 1;
        let _ = rustix::io::write(&self.interrupt, &1u64.to_ne_bytes());
        if state.reads > READS_MAX {
            Err(gone())
        } else {
            Ok(())
        }
    }
    fn config_read(&self, _: u32, _: Width) -> vmgmt_driver::Result<u32> {
        Ok(self.lock().lies.pop().unwrap_or(0).into())
    }
    fn config_write(&self, _: u32, _: Width, _: u32) -> vmgmt_driver::Result<()> {
        Ok(())
    }
}

thread_local! {
    static MEMORY: OnceCell<Arc<MemfdMemory>> = const { OnceCell::new() };
}

pub fn run(bytes: &[u8]) {
    let (steps, lies) = bytes.split_at(bytes.len() / 3);
    let mut u = Unstructured::new(steps);
    // Memory that a driver could not give back stays its own: a fresh one then.
    let memory = MEMORY
        .with(|memory| Arc::clone(memory.get_or_init(|| MemfdMemory::new(BYTES, BASE, false).unwrap())));
    let memory = if memory.free_pages() < BYTES / 4096 {
        MemfdMemory::new(BYTES, BASE, true).unwrap()
    } else {
        memory
    };
    let guest = DmaMemory::map_file(memory.descriptor(), 0, BYTES, BASE).unwrap();
    let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
    let hostile = Arc::new(Hostile {
        memory,
        guest,
        interrupt: Arc::new(rustix::event::eventfd(0, flags).unwrap()),
        state: Mutex::new(State {
            lies: lies.to_vec(),
            reads: 0,
            registers: std::collections::BTreeMap::new(),
            completed: 0,
        }),
    });
    let _ = drive(&mut u, &hostile);
}

impl Hostile {
    /// Tells the truth from now on, so that what is still open is closed and its memory given back.
    fn repent(&self) {
        let mut state = self.lock();
        state.lies.clear();
        state.reads = 0;
    }
}

/// Repents before what was declared earlier is dropped.
struct Repents<'a>(&'a Hostile);

impl Drop for Repents<'_> {
    fn drop(&mut self) {
        self.0.repent();
    }
}

fn drive(u: &mut Unstructured<'_>, hostile: &Arc<Hostile>) -> Result<()> {
    let backing: Arc<dyn Backing> = Arc::clone(hostile) as _;
    let mode = if u.arbitrary()? { Mode::FILE } else { Mode::CHAT };
    if u.ratio(1, 4)? {
        let Ok(channel) = PortChannel::open(&backing, mode, None) else {
            return Ok(());
        };
        return channel_steps(u, channel, hostile);
    }
    let Ok(device) = Device::open(backing) else {
        return Ok(());
    };
    let mut options = RingOptions::new(mode);
    options.spin = Duration::ZERO;
    options.submission_entries = 1 << u.int_in_range(0..=6u8)?;
    options.completion_entries = 1 << u.int_in_range(0..=7u8)?;
    let Ok(ring) = Ring::open(&device, options) else {
        return Ok(());
    };
    channel_steps(u, ring, hostile)
}

fn channel_steps(
    u: &mut Unstructured<'_>,
    mut channel: impl Channel + 'static,
    hostile: &Hostile,
) -> Result<()> {
    let Ok(buffer) = channel.allocate(8192) else {
        return Ok(());
    };
    let steps = ring_steps(u, &mut channel, &buffer);
    let mut client = Client::new(channel);
    let _repents = Repents(hostile);
    steps?;
    match u.int_in_range(0..=3u8)? {
        0 => drop(client.shares()),
        1 => drop(client.stat("pub/file")),
        2 => drop(client.list("pub")),
        _ => drop(client.peers()),
    }
    Ok(())
}

fn ring_steps(
    u: &mut Unstructured<'_>,
    channel: &mut impl Channel,
    buffer: &vmgmt_driver::Buffer,
) -> Result<()> {
    for _ in 0..u.int_in_range(0..=10u8)? {
        match u.int_in_range(0..=4u8)? {
            0 | 1 => {
                let (start, length) = (u.int_in_range(0..=9000)?, u.int_in_range(0..=9000)?);
                let meta = u.int_in_range(0..=64)?;
                let request = Request::new(Opcode(*u.choose(&[0u16, 1, 0x102, 0x105, 0x202, 0x203])?))
                    .argument(edge(u)?);
                let request = if u.arbitrary()? {
                    request.output(buffer, start, length, meta)
                } else {
                    request.input(buffer, start, length, meta)
                };
                if let Ok(tag) = channel.submit(request)
                    && u.ratio(1, 6)?
                {
                    let _ = channel.cancel(tag);
                }
            }
            2 => {
                let _ = channel.wait(Some(Instant::now()));
            }
            3 => drop(channel.reopen()),
            _ => {
                for _ in 0..200 {
                    let Ok(Some(finished)) = channel.reap() else { break };
                    let _ = (finished.status, finished.result);
                }
            }
        }
    }
    Ok(())
}
