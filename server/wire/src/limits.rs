//! Every bound of the hall, with where it comes from. In: nothing. Out: numbers.
//! Must never know: a configuration; what an operator may set is bounded by these.

use crate::uapi;

/// Most bytes of data in one region access or DMA message. The specification's default for
/// `max_data_xfer_size`, and what QEMU proposes.
pub const DATA_BYTES_MAX: u32 = 1024 * 1024;

/// Longest message taken: a header, the largest fixed part (DMA map, region info: 32 bytes), and the data.
/// A header that claims more has lost step or means harm: the connection ends.
pub const MESSAGE_BYTES_MAX: u32 = uapi::HEADER_BYTES as u32 + 32 + DATA_BYTES_MAX;

/// Longest JSON of a VERSION proposal, with its NUL. QEMU sends 194 bytes; room for keys yet unknown.
pub const VERSION_JSON_BYTES_MAX: usize = 4096;

/// Longest message before VERSION is accepted, when a peer may be anyone: it gets no megabyte of our memory.
/// Larger than the JSON may be, so that a proposal somewhat too long gets an answer and not a hang-up.
pub const MESSAGE_BYTES_MAX_BEFORE_VERSION: u32 = 16 * 1024;

/// QEMU reads the VERSION reply into the buffer of its own 214-byte request and refuses a longer one.
pub const VERSION_REPLY_BYTES_MAX: usize = 214;

/// Descriptors taken with one message; QEMU refuses a `max_msg_fds` above 16.
pub const MESSAGE_DESCRIPTORS_MAX: u32 = 16;

/// Descriptors held for messages not yet looked at. The kernel hands out at most 253 (SCM_MAX_FD) with
/// one read, and the door looks at all whole messages before it reads again; so only a peer that attaches
/// more than a message may carry can reach this.
pub const QUEUED_DESCRIPTORS_MAX: usize = 253 + MESSAGE_DESCRIPTORS_MAX as usize;

/// Bytes held that were read but not yet looked at: one message still incomplete and one read of the door.
pub const INPUT_BYTES_MAX: usize = 2 * MESSAGE_BYTES_MAX as usize;

/// Above this many unsent bytes no further request is looked at, so that a client which does not read
/// its replies stops itself and nobody else.
pub const OUTPUT_BYTES_HIGH: usize = 2 * MESSAGE_BYTES_MAX as usize;

/// Requests without an answer yet. Message ids have 16 bits, so no honest client waits for more.
pub const REPLIES_OWED_MAX: usize = 1 << 16;

/// Interrupts that one SET_IRQS may name: the largest MSI-X table.
pub const IRQ_COUNT_MAX: u32 = 2048;

/// Writes in one REGION_WRITE_MULTI. QEMU sends at most 200.
pub const MULTI_WRITES_MAX: u64 = 4096;

/// Data bytes of one write inside REGION_WRITE_MULTI (the entry has room for no more).
pub const MULTI_WRITE_BYTES_MAX: u32 = 8;

/// Longest DMA_READ / DMA_WRITE sent by us: QEMU serves them between register accesses in its main loop,
/// and what is in flight when one arrives delays it.
pub const DMA_MESSAGE_BYTES_MAX: u32 = 60 * 1024;

/// DMA messages sent and not yet answered, per connection.
pub const DMA_OUTSTANDING_MAX: usize = 4;

const _: () = assert!(MESSAGE_BYTES_MAX_BEFORE_VERSION < MESSAGE_BYTES_MAX);
const _: () = assert!(VERSION_JSON_BYTES_MAX + 20 < MESSAGE_BYTES_MAX_BEFORE_VERSION as usize);
const _: () = assert!(DMA_MESSAGE_BYTES_MAX <= DATA_BYTES_MAX);
const _: () = assert!(MULTI_WRITES_MAX * 24 + 8 <= DATA_BYTES_MAX as u64);
const _: () = assert!(DMA_OUTSTANDING_MAX < u16::MAX as usize);
