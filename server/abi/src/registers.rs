//! BAR0: 16 KiB of memory registers.
//!
//! Registers are 32 bits wide and accessed as aligned 32-bit words; those named `_LOW`/`_HIGH` form a 64-bit value and
//! may also be accessed as one aligned 64-bit word. Any other width or alignment reads zeros, is ignored when written
//! and counted. A read of all ones from `MAGIC` means that the device did not answer: ask again, it is not data.

/// Size of BAR0 in bytes.
pub const BAR0_BYTES: usize = 16 * 1024;

/// read: [`crate::MAGIC`].
pub const MAGIC: u32 = 0x000;
/// read: [`crate::ABI_VERSION`].
pub const ABI_VERSION: u32 = 0x004;
/// read: feature bits the device offers (64 bits).
pub const FEATURES_LOW: u32 = 0x008;
pub const FEATURES_HIGH: u32 = 0x00c;
/// read/write: feature bits the driver uses; bits that are not offered are dropped. Locked while a ring is enabled.
pub const FEATURES_ACK_LOW: u32 = 0x010;
pub const FEATURES_ACK_HIGH: u32 = 0x014;
/// read: [`DeviceState`].
pub const STATE: u32 = 0x018;
/// read: why the state is FAILED: a [`crate::Status`] code; 0 else.
pub const FAIL_CAUSE: u32 = 0x01c;
/// write: [`CONTROL_RESET`]; other bits must be zero. The write is posted: `STATE` shows RESETTING until every DMA
/// that had begun is over, the driver waits for BLANK.
pub const CONTROL: u32 = 0x020;
/// read: ring pairs of this device.
pub const RING_COUNT: u32 = 0x024;
/// read: most entries of a submission ring and of a completion ring.
pub const RING_ENTRIES_MAX: u32 = 0x028;
/// read: interrupt vectors the device has (the guest may enable fewer).
pub const VECTORS: u32 = 0x02c;
/// read: number of the life of the management core (64 bits); another number: it was replaced. Nothing is to be done.
pub const CORE_LIFE_LOW: u32 = 0x030;
pub const CORE_LIFE_HIGH: u32 = 0x034;
/// read: number of this session (64 bits), never used again by this host daemon: another number after a restore of
/// the VM says that the device was replaced.
pub const SESSION_LOW: u32 = 0x038;
pub const SESSION_HIGH: u32 = 0x03c;
/// read: moves by one at each reset; the session epoch.
pub const GENERATION: u32 = 0x040;
/// read: most bytes of one submission's buffer.
pub const TRANSFER_BYTES_MAX: u32 = 0x044;
/// read: most entries of a buffer list.
pub const LIST_ENTRIES_MAX: u32 = 0x048;
/// read: accesses to BAR0 of a wrong width or alignment, or to no register, since the last reset.
pub const BAD_ACCESSES: u32 = 0x04c;

/// read: vectors whose interrupt is pending, one bit each.
pub const INTERRUPT_PENDING: u32 = 0x050;
/// read/write: vectors that may assert INTx, one bit each. MSI and MSI-X do not look at it.
pub const INTERRUPT_ENABLE: u32 = 0x054;
/// write: acknowledge the pending vectors whose bits are set.
pub const INTERRUPT_ACK: u32 = 0x058;

/// read/write: guest address (64 bits) of the host's page, 4 KiB aligned; a write of the high half latches it, 0 takes it back.
pub const HOST_PAGE_LOW: u32 = 0x060;
pub const HOST_PAGE_HIGH: u32 = 0x064;

/// First ring's block of registers; ring `n` starts at `RINGS + n * RING_STRIDE`.
pub const RINGS: u32 = 0x400;
pub const RING_STRIDE: u32 = 0x40;
/// read/write while disabled: guest address of the submission ring, 64-byte aligned (64 bits).
pub const RING_SUBMISSIONS_LOW: u32 = 0x00;
pub const RING_SUBMISSIONS_HIGH: u32 = 0x04;
/// read/write while disabled: guest address of the completion ring, 64-byte aligned (64 bits).
pub const RING_COMPLETIONS_LOW: u32 = 0x08;
pub const RING_COMPLETIONS_HIGH: u32 = 0x0c;
/// read/write while disabled: guest address of [`crate::ring::RingEvents`], 64-byte aligned (64 bits).
pub const RING_EVENTS_LOW: u32 = 0x10;
pub const RING_EVENTS_HIGH: u32 = 0x14;
/// read/write while disabled: entries of the submission ring, a power of two.
pub const RING_SUBMISSION_ENTRIES: u32 = 0x18;
/// read/write while disabled: entries of the completion ring, a power of two.
pub const RING_COMPLETION_ENTRIES: u32 = 0x1c;
/// read/write while disabled: a [`crate::Mode`].
pub const RING_MODE: u32 = 0x20;
/// read/write while disabled: interrupt vector of this ring; one beyond the enabled ones is taken modulo their number.
pub const RING_VECTOR: u32 = 0x24;
/// read/write while disabled: the nonce (64 bits) that the driver wrote into `RingEvents::nonce`, the proof of shared memory.
pub const RING_NONCE_LOW: u32 = 0x28;
pub const RING_NONCE_HIGH: u32 = 0x2c;
/// read/write: 1 latches the set-up and opens the ring, 0 closes it (its submissions are cancelled, no DMA afterwards).
pub const RING_ENABLE: u32 = 0x30;
/// read: [`RingState`] in bits 0..8, a [`crate::Status`] in bits 16..32.
pub const RING_STATUS: u32 = 0x34;
/// read: epoch of this ring: moves each time it is enabled or closed.
pub const RING_EPOCH: u32 = 0x38;

/// First doorbell; ring `n`'s is at `DOORBELLS + 4 * n`. write: the submission tail. A hint: the truth is in guest memory.
pub const DOORBELLS: u32 = 0x2000;

/// Value for [`CONTROL`].
pub const CONTROL_RESET: u32 = 1;

/// Ring pairs that the layout has room for.
pub const RINGS_MAX: usize = 16;
/// Most entries of a ring.
pub const ENTRIES_MAX: u32 = 1024;
/// Interrupt vectors at most.
pub const VECTORS_MAX: usize = 16;

const _: () = assert!(RINGS as usize + RINGS_MAX * RING_STRIDE as usize <= DOORBELLS as usize);
const _: () = assert!(DOORBELLS as usize + 4 * RINGS_MAX <= BAR0_BYTES);

/// Values of [`STATE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct DeviceState(pub u32);

impl DeviceState {
    /// After power-on and reset: no ring is enabled.
    pub const BLANK: Self = Self(0);
    /// At least one ring was enabled since.
    pub const ACTIVE: Self = Self(1);
    /// A reset was asked for and DMA that had begun is not yet over.
    pub const RESETTING: Self = Self(2);
    /// The guest broke the contract ([`FAIL_CAUSE`]); a reset heals it.
    pub const FAILED: Self = Self(3);
    /// The host's operator must release this device.
    pub const QUARANTINED: Self = Self(4);
}

/// Values of [`RING_STATUS`], bits 0..8.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub struct RingState(pub u32);

impl RingState {
    pub const CLOSED: Self = Self(0);
    /// Enabled, and the core has not answered yet (it may be absent for a moment).
    pub const OPENING: Self = Self(1);
    pub const OPEN: Self = Self(2);
    /// Refused, with the status beside it.
    pub const REFUSED: Self = Self(3);
}

/// The host's page in guest memory: 4 KiB, written by the core, read by the guest without leaving the VM.
///
/// `sequence` is odd while the core writes; a reader takes the words, and again if it changed. Readers bound their spin.
#[derive(
    Clone, Copy, Debug, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
)]
#[repr(C)]
pub struct HostPage {
    pub sequence: u64,
    /// As [`CORE_LIFE_LOW`].
    pub core_life: u64,
    /// Nanoseconds in which this VM's submissions were held back by a budget.
    pub throttled_ns: u64,
    /// CPU share granted, in thousandths of a CPU; 0: nothing said.
    pub granted_cpu_milli: u64,
    /// Memory granted, in bytes; 0: nothing said.
    pub granted_memory_bytes: u64,
    pub reserved: [u64; 3],
}
const _: () = assert!(core::mem::size_of::<HostPage>() == 64);
