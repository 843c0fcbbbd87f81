//! One device, opened: identity checked, features agreed, state BLANK, interrupts on.
//!
//! Comes in: a backing. Goes out: facts about the device, free ring numbers, sleeps that end with an interrupt, a
//! cancellation, or the news that the device is another one. Never: what a ring carries.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vmgmt_abi::registers::{self, DeviceState, RINGS_MAX};
use vmgmt_abi::ring::LIST_ENTRIES_MAX;
use vmgmt_abi::{ABI_VERSION, MAGIC, Status, feature};

use crate::backing::{Backing, InterruptKind, Interrupts};
use crate::error::{DriverError, Result};
use crate::limits::{
    ABSENT_ATTEMPTS, ABSENT_PAUSE, HEALTH_INTERVAL, SET_UP_ATTEMPTS, SET_UP_PAUSE, SETTLE_PAUSE_FIRST,
    SETTLE_PAUSE_LAST, SETTLE_TIMEOUT,
};

/// Features that this driver uses where they are offered.
const FEATURES_WANTED: u64 = feature::EVENT_SUPPRESSION
    | feature::MODE_FILE
    | feature::MODE_CHAT
    | feature::MODE_STATISTICS
    | feature::MODE_CALCULATION;

/// A healthy device that opens no ring.
const WAITING: &str = "the device is there but does no work yet: the VM is frozen on the host (vmgmtctl thaw), or the host's software is being replaced. Waiting";

/// What the device said of itself, bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    pub abi_version: u32,
    pub features: u64,
    /// Features that both sides use.
    pub features_agreed: u64,
    pub ring_count: u32,
    pub ring_entries_max: u32,
    pub vectors: u32,
    pub transfer_bytes_max: u32,
    pub list_entries_max: u32,
    /// Never used again by this host daemon.
    pub session: u64,
    /// Moves at each reset.
    pub generation: u32,
    /// Which life of the management core answers.
    pub core_life: u64,
}

/// How a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The device interrupted: look at the ring.
    Interrupt,
    /// Nothing happened for a while, and the device is still there (or it has no interrupt): look at the ring.
    Looked,
    /// The time is over.
    TimedOut,
}

struct State {
    facts: DeviceFacts,
    interrupts: Interrupts,
    rings_taken: u32,
    /// Moves when the device was set up anew: rings from before are void.
    set_up: u64,
    /// The bus was taken from it: only a set-up, which begins with a reset, gives it back.
    stopped: bool,
    /// When the device was last known to be the same one.
    healthy_at: Instant,
}

/// What a text for the user is given to.
type Notice = Box<dyn Fn(&str) + Send>;

/// A device that this program drives.
pub struct Device {
    backing: Arc<dyn Backing>,
    cancel: Mutex<Option<Arc<OwnedFd>>>,
    notice: Mutex<Option<Notice>>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("backing", &self.backing.name())
            .field("facts", &self.facts())
            .finish()
    }
}

impl Device {
    /// Opens a device: identity, state BLANK (by a reset where it is not), features, interrupts.
    ///
    /// # Errors
    /// No vmgmt device, another version of the contract, quarantined, or it does not settle.
    pub fn open(backing: Arc<dyn Backing>) -> Result<Arc<Self>> {
        let (facts, interrupts) = set_up_patiently(&*backing)?;
        let state = Mutex::new(State {
            facts,
            interrupts,
            rings_taken: 0,
            set_up: 0,
            stopped: false,
            healthy_at: Instant::now(),
        });
        Ok(Arc::new(Self {
            backing,
            cancel: Mutex::new(None),
            notice: Mutex::new(None),
            state,
        }))
    }

    /// Lets a descriptor end all sleeps with `Interrupted` while it is readable (Ctrl-C).
    pub fn set_cancel(&self, descriptor: Option<Arc<OwnedFd>>) {
        *self.cancel.lock().unwrap_or_else(PoisonError::into_inner) = descriptor;
    }

    /// The descriptor that ends sleeps.
    #[must_use]
    pub fn cancel_descriptor(&self) -> Option<Arc<OwnedFd>> {
        self.cancel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets somebody know, in words for the user, what is being waited for when that takes long.
    pub fn set_notice(&self, notice: impl Fn(&str) + Send + 'static) {
        *self.notice.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(notice));
    }

    /// Says that a ring is waited for.
    pub(crate) fn notice_waiting(&self) {
        if let Some(notice) = &*self.notice.lock().unwrap_or_else(PoisonError::into_inner) {
            notice(WAITING);
        }
    }

    /// How the device is reached.
    #[must_use]
    pub fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    /// What it said of itself when it was last set up.
    #[must_use]
    pub fn facts(&self) -> DeviceFacts {
        self.lock().facts
    }

    /// Interrupts granted.
    #[must_use]
    pub fn interrupts(&self) -> Interrupts {
        self.lock().interrupts
    }

    /// The device's state register.
    ///
    /// # Errors
    /// It does not answer.
    pub fn device_state(&self) -> Result<DeviceState> {
        read_patiently(&*self.backing, registers::STATE).map(DeviceState)
    }

    /// Sets everything up again after the device was reset or replaced. All rings from before are void (their memory
    /// stays theirs until they are dropped).
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn recover(&self) -> Result<()> {
        self.backing.restore_function()?;
        let (facts, interrupts) = set_up_patiently(&*self.backing)?;
        let mut state = self.lock();
        state.facts = facts;
        state.interrupts = interrupts;
        state.rings_taken = 0;
        state.set_up += 1;
        state.stopped = false;
        state.healthy_at = Instant::now();
        Ok(())
    }

    /// Resets the device and waits until no DMA is under way.
    ///
    /// # Errors
    /// It does not settle.
    pub fn reset(&self) -> Result<()> {
        reset(&*self.backing)
    }

    /// Takes the bus from a device that can neither be asked to close a ring nor be reset: no DMA of it is under way after that, and none begins
    /// until [`Self::recover`]. All rings are void.
    ///
    /// # Errors
    /// Its configuration space does not answer either.
    pub(crate) fn stop(&self) -> Result<()> {
        let mut state = self.lock();
        self.backing.end_mastering()?;
        state.set_up += 1;
        state.rings_taken = 0;
        state.stopped = true;
        Ok(())
    }

    /// Looks whether this is still the device that was set up, and gives it back what somebody else took from COMMAND: with bus mastering off it
    /// would only wait.
    ///
    /// # Errors
    /// `DeviceReplaced`, `DeviceFailed`, `DeviceAbsent`, … as the registers say.
    pub fn check_health(&self) -> Result<()> {
        let facts = self.facts();
        let backing = &*self.backing;
        if backing.read32(registers::MAGIC)? != MAGIC {
            // BARs that a reset or a restore cleared read as something else, or as nothing.
            backing.restore_function()?;
            read_patiently(backing, registers::MAGIC)?;
            return Err(DriverError::DeviceReplaced);
        }
        if backing.read64(registers::SESSION_LOW)? != facts.session
            || backing.read32(registers::GENERATION)? != facts.generation
        {
            return Err(DriverError::DeviceReplaced);
        }
        match DeviceState(backing.read32(registers::STATE)?) {
            // Not before: of a device that is being reset an access of before may be under way, and comes to nothing without bus mastering.
            DeviceState::BLANK | DeviceState::ACTIVE => {
                let state = self.lock();
                if state.stopped {
                    return Err(DriverError::DeviceReplaced);
                }
                backing.keep_function()
            }
            DeviceState::RESETTING => Err(DriverError::DeviceReplaced),
            DeviceState::FAILED => Err(DriverError::DeviceFailed(fail_cause(backing)?)),
            DeviceState::QUARANTINED => Err(DriverError::DeviceQuarantined),
            other => Err(DriverError::contract(format!("unknown device state {}", other.0))),
        }
    }

    /// Prepares for a sleep: takes what is pending and lets the next interrupt come. The caller looks at its ring after.
    pub(crate) fn before_sleep(&self, vector: u32) -> Result<()> {
        let interrupts = self.interrupts();
        if interrupts.kind == InterruptKind::IntX {
            // The order of docs/abi.md, "Interrupts": acknowledge, enable again, look at the rings, sleep.
            self.backing.write32(registers::INTERRUPT_ACK, u32::MAX)?;
            // The write is posted: only a read makes sure that it has arrived. Else it could acknowledge a completion that is
            // published after the caller has looked at its ring, and nobody would wake the sleeper.
            self.backing.read32(registers::INTERRUPT_PENDING)?;
        }
        self.backing.take_interrupt(vector)
    }

    /// Sleeps until `vector` interrupts, the deadline passes or somebody cancels.
    pub(crate) fn sleep(&self, vector: u32, deadline: Option<Instant>) -> Result<Woken> {
        let started = Instant::now();
        // Counted over all sleeps: a line that others' interrupts share, or short looks without an interrupt, must not put it off.
        let mut health = self.lock().healthy_at + HEALTH_INTERVAL;
        if started >= health {
            self.check_health()?;
            self.lock().healthy_at = started;
            health = started + HEALTH_INTERVAL;
        }
        let descriptor = self.backing.interrupt_descriptor(vector);
        // Without an interrupt there is nothing but looking: as rarely as a register settles.
        let until = if descriptor.is_none() {
            started + SETTLE_PAUSE_LAST
        } else {
            health
        };
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        let cancel = self.cancel_descriptor();
        loop {
            let now = Instant::now();
            let left = until.saturating_duration_since(now);
            let timeout = rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut polled = Vec::with_capacity(2);
            polled.extend(cancel.as_deref().map(|cancel| PollFd::new(cancel, PollFlags::IN)));
            polled.extend(
                descriptor
                    .as_deref()
                    .map(|descriptor| PollFd::new(descriptor, PollFlags::IN)),
            );
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => break,
                Ok(_) => {
                    let cancelled =
                        cancel.is_some() && polled.first().is_some_and(|first| !first.revents().is_empty());
                    return if cancelled {
                        Err(DriverError::Interrupted)
                    } else {
                        Ok(Woken::Interrupt)
                    };
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(DriverError::system("waiting for an interrupt", error)),
            }
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(Woken::TimedOut);
        }
        let now = Instant::now();
        if now >= health {
            self.check_health()?;
            self.lock().healthy_at = now;
        }
        Ok(Woken::Looked)
    }

    /// When the device was last known to be the same one.
    pub(crate) fn healthy_at(&self) -> Instant {
        self.lock().healthy_at
    }

    /// Takes a free ring number.
    pub(crate) fn take_ring(&self) -> Result<(u32, u64)> {
        let mut state = self.lock();
        let count = state.facts.ring_count;
        let free = (0..count).find(|index| state.rings_taken & (1 << index) == 0);
        let index = free
            .ok_or_else(|| DriverError::BadArgument(format!("all {count} rings of the device are open")))?;
        state.rings_taken |= 1 << index;
        Ok((index, state.set_up))
    }

    /// Gives a ring number back; false when the device was set up anew since it was taken.
    pub(crate) fn return_ring(&self, index: u32, set_up: u64) {
        let mut state = self.lock();
        if state.set_up == set_up {
            state.rings_taken &= !(1 << index);
        }
    }

    /// Whether a ring of that set-up is still of this one.
    pub(crate) fn is_current(&self, set_up: u64) -> bool {
        self.lock().set_up == set_up
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // The rings are closed already; a reset leaves the next program a blank device. One that cannot be reset must not go on with DMA:
        // memory that was kept from it goes back to the system with this program. If the bus cannot be taken from it either, it is gone.
        let _gone = reset(&*self.backing).or_else(|_| self.backing.end_mastering());
    }
}

/// Polls until `settled` says something, for at most [`SETTLE_TIMEOUT`].
pub(crate) fn settle<T>(what: &'static str, mut settled: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    let mut pause = SETTLE_PAUSE_FIRST;
    loop {
        if let Some(value) = settled()? {
            return Ok(value);
        }
        if started.elapsed() > SETTLE_TIMEOUT {
            return Err(DriverError::DeviceTimeout {
                what,
                waited: SETTLE_TIMEOUT,
            });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(SETTLE_PAUSE_LAST);
    }
}

/// Reads a register; all ones is no answer, so it is asked again a few times.
pub(crate) fn read_patiently(backing: &dyn Backing, offset: u32) -> Result<u32> {
    for attempt in 0..ABSENT_ATTEMPTS {
        let value = backing.read32(offset)?;
        if value != u32::MAX {
            return Ok(value);
        }
        if attempt + 1 < ABSENT_ATTEMPTS {
            std::thread::sleep(ABSENT_PAUSE);
        }
    }
    Err(DriverError::DeviceAbsent)
}

/// Whether what was read just now came from the device: registers that are not decoded read as ones, or as zeros, which are states too.
pub(crate) fn expect_magic(backing: &dyn Backing) -> Result<()> {
    match read_patiently(backing, registers::MAGIC)? {
        MAGIC => Ok(()),
        found => Err(DriverError::DeviceMagic { found }),
    }
}

fn fail_cause(backing: &dyn Backing) -> Result<Status> {
    Ok(Status(backing.read32(registers::FAIL_CAUSE)? as u16))
}

fn reset(backing: &dyn Backing) -> Result<()> {
    backing.write32(registers::CONTROL, registers::CONTROL_RESET)?;
    settle("resetting the device", || {
        match DeviceState(read_patiently(backing, registers::STATE)?) {
            DeviceState::BLANK => expect_magic(backing).map(Some),
            DeviceState::QUARANTINED => Err(DriverError::DeviceQuarantined),
            _ => Ok(None),
        }
    })
}

fn limit(what: &'static str, value: u32, most: u32) -> Result<u32> {
    if value == 0 || value > most {
        return Err(DriverError::DeviceLimit {
            what,
            value: value.into(),
        });
    }
    Ok(value)
}

/// Sets up; again, where what was read makes no sense: a VM that is restored, or whose function is reset, at this moment has no base addresses.
fn set_up_patiently(backing: &dyn Backing) -> Result<(DeviceFacts, Interrupts)> {
    for _ in 1..SET_UP_ATTEMPTS {
        match set_up(backing) {
            Err(
                DriverError::DeviceMagic { .. }
                | DriverError::DeviceAbsent
                | DriverError::DeviceVersion { .. }
                | DriverError::DeviceLimit { .. }
                | DriverError::DeviceTimeout { .. },
            ) => {
                std::thread::sleep(SET_UP_PAUSE);
                backing.restore_function()?;
            }
            other => return other,
        }
    }
    set_up(backing)
}

fn set_up(backing: &dyn Backing) -> Result<(DeviceFacts, Interrupts)> {
    if !backing.has_registers() {
        return Err(DriverError::NotPossible("opening rings", backing.name()));
    }
    expect_magic(backing)?;
    let abi_version = backing.read32(registers::ABI_VERSION)?;
    if abi_version >> 16 != ABI_VERSION >> 16 {
        return Err(DriverError::DeviceVersion { found: abi_version });
    }
    match DeviceState(read_patiently(backing, registers::STATE)?) {
        DeviceState::BLANK => {}
        DeviceState::QUARANTINED => return Err(DriverError::DeviceQuarantined),
        _ => reset(backing)?,
    }
    backing.begin_mastering()?;
    let features = backing.read64(registers::FEATURES_LOW)?;
    backing.write64(registers::FEATURES_ACK_LOW, features & FEATURES_WANTED)?;
    let features_agreed = backing.read64(registers::FEATURES_ACK_LOW)? & FEATURES_WANTED;
    let read = |offset| backing.read32(offset);
    let entries = read(registers::RING_ENTRIES_MAX)?;
    if !entries.is_power_of_two() {
        return Err(DriverError::DeviceLimit {
            what: "entries of a ring",
            value: entries.into(),
        });
    }
    let vectors = limit(
        "interrupt vectors",
        read(registers::VECTORS)?,
        registers::VECTORS_MAX as u32,
    )?;
    let facts = DeviceFacts {
        abi_version,
        features,
        features_agreed,
        ring_count: limit("rings", read(registers::RING_COUNT)?, RINGS_MAX as u32)?,
        ring_entries_max: limit("entries of a ring", entries, 1 << 16)?,
        vectors,
        transfer_bytes_max: limit(
            "bytes of a buffer",
            read(registers::TRANSFER_BYTES_MAX)?,
            u32::MAX - 1,
        )?,
        list_entries_max: limit(
            "entries of a list",
            read(registers::LIST_ENTRIES_MAX)?,
            LIST_ENTRIES_MAX,
        )?,
        session: backing.read64(registers::SESSION_LOW)?,
        generation: read(registers::GENERATION)?,
        core_life: backing.read64(registers::CORE_LIFE_LOW)?,
    };
    let interrupts = backing.set_up_interrupts(vectors)?;
    if interrupts.kind == InterruptKind::IntX {
        backing.write32(registers::INTERRUPT_ENABLE, u32::MAX >> (32 - vectors))?;
    }
    Ok((facts, interrupts))
}

/// A pause that a cancellation ends.
///
/// # Errors
/// `Interrupted`.
pub(crate) fn pause(duration: Duration, cancel: Option<&OwnedFd>) -> Result<()> {
    let Some(cancel) = cancel else {
        std::thread::sleep(duration);
        return Ok(());
    };
    let timeout = rustix::event::Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(cancel, PollFlags::IN)], Some(&timeout)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
        Ok(_) => Err(DriverError::Interrupted),
        Err(error) => Err(DriverError::system("pausing", error)),
    }
}
