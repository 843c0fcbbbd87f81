//! Numbers of the guest driver, each with its reason.

use std::time::Duration;

/// Bytes of a page of guest memory on every machine that has this device.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a huge page (x86-64, and arm64 with 4 KiB pages).
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// How often a register that reads all ones is asked again. QEMU answers all ones only after its own timeout (5 s) or
/// when its socket is closed; two of those are enough to tell a hiccup from a death.
pub const ABSENT_ATTEMPTS: u32 = 5;
/// Pause between two such attempts.
pub const ABSENT_PAUSE: Duration = Duration::from_millis(20);

/// How often a device is set up when somebody resets the function meanwhile: the kernel needs 100 ms for that, in which registers read as anything.
pub const SET_UP_ATTEMPTS: u32 = 4;
/// Pause before the next attempt.
pub const SET_UP_PAUSE: Duration = Duration::from_millis(50);
/// Looks at a ring that opens before COMMAND is looked at: without bus mastering it would not open.
pub const LOOKS_BEFORE_COMMAND: u32 = 8;

/// How often a vfio device is opened while its function is being reset, which takes 100 ms and may take a second, and the pause between.
pub const OPEN_DEVICE_ATTEMPTS: u32 = 40;
pub const OPEN_DEVICE_PAUSE: Duration = Duration::from_millis(50);

/// How long a reset, or the opening of a ring, takes at most, but of a device that is frozen. The core may be replaced meanwhile (back-off up to 1 s), and
/// DMA that had begun is fenced within QEMU's own 5 s.
pub const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause between two looks at a state register while it settles: a read costs the VM about 40 µs.
pub const SETTLE_PAUSE_FIRST: Duration = Duration::from_micros(50);
pub const SETTLE_PAUSE_LAST: Duration = Duration::from_millis(5);

/// How often a ring is opened anew when the VM is restored just then: twice in a row is an operator's game, not an accident.
pub const OPEN_ATTEMPTS: u32 = 3;

/// How long a sleeper sleeps before it asks the device whether it is still the same one. Nothing else wakes an idle
/// driver: a VM that was restored, or whose device died, gets no interrupt.
pub const HEALTH_INTERVAL: Duration = Duration::from_secs(5);

/// Default spin before a sleep: as long as the core polls after its last work, so that a busy ring sees no interrupt.
pub const SPIN_DEFAULT: Duration = Duration::from_micros(50);
/// Looks at the ring between two looks at the clock while spinning.
pub const SPINS_PER_CLOCK: u32 = 32;

/// Default ring sizes: 64 submissions are one page, 128 completions too, so they open even on scattered pages.
pub const SUBMISSION_ENTRIES_DEFAULT: u32 = 64;
pub const COMPLETION_ENTRIES_DEFAULT: u32 = 128;
const _: () = assert!(SUBMISSION_ENTRIES_DEFAULT as usize * vmgmt_abi::ring::SUBMISSION_BYTES == PAGE_BYTES);
const _: () = assert!(COMPLETION_ENTRIES_DEFAULT as usize * vmgmt_abi::ring::COMPLETION_BYTES == PAGE_BYTES);

/// Bytes of one submission of a streamed transfer. Scattered over 4 KiB pages its list is 256 entries: one page.
pub const CHUNK_BYTES_DEFAULT: usize = 1 << 20;
const _: () = assert!(CHUNK_BYTES_DEFAULT / PAGE_BYTES * vmgmt_abi::ring::LIST_ENTRY_BYTES <= PAGE_BYTES);
/// Chunks of a streamed transfer in flight at once: one at the device, one at the file, the rest against jitter.
pub const CHUNKS_IN_FLIGHT_DEFAULT: usize = 8;
/// Most bytes asked for in one CHECKSUM submission, so that a cancel never waits behind more than that.
pub const CHECKSUM_BYTES: u64 = 64 << 20;

/// Room for a listing's records in one submission.
pub const LISTING_BYTES: usize = 60 * 1024;
/// Bytes of the buffer of one RECEIVE: a message of 60 KiB comes in one piece, longer ones in several.
pub const RECEIVE_BYTES: usize = 64 * 1024;
/// Most bytes of a message that `receive` puts together: what the host grants is less.
pub const MESSAGE_BYTES_MAX: u64 = 256 << 20;

/// Bytes that are copied out of device memory at once to compute a checksum: they stay in the first-level cache.
pub const CHECKSUM_COPY_BYTES: usize = 8 * 1024;

/// First and longest pause between two looks at the port window (a look costs about 60 µs).
pub const PORT_PAUSE_FIRST: Duration = Duration::from_micros(100);
pub const PORT_PAUSE_LAST: Duration = Duration::from_millis(10);
