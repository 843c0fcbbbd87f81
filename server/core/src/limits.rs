//! Numbers of the hub, with their derivation. Room: OFFICE. Nothing here comes from a peer.

use vmgmt_abi::chat::MessageHeader;
use vmgmt_abi::file::OfferHeader;
use vmgmt_abi::{NAME_BYTES_MAX, PATH_BYTES_MAX};

/// Most bytes of one memory copy, or of one file access of a host transfer: about 100 µs of a memory copy, so that the loop
/// serves everybody else between two of them and an unmap never waits behind more.
pub const COPY_PIECE_BYTES_MAX: u64 = 1 << 20;

/// A VM over a rate is delayed at most this long, then refused. One second: a guest that overruns by a burst never sees
/// an error, one that overruns for good does, and the queue is bounded by rate x 1 s and by submissions in flight.
pub const RATE_DELAY_NS_MAX: u64 = NS_PER_SECOND;
/// Depth of a rate's bucket: what a VM that was idle for this long may use at once.
pub const RATE_BURST_NS: u64 = NS_PER_SECOND;
pub const NS_PER_SECOND: u64 = 1_000_000_000;

/// Effects of one kind that may sleep on a disk, given to the shell at once: some times the worker threads of a pool, so that they
/// never idle, and few enough that the queue behind them (where VMs take turns) is what decides.
pub const EFFECTS_RUNNING_MAX: u32 = 128;
/// The same for one VM, so that one with a hung disk leaves room for others; less, where fewer places than this are left.
pub const EFFECTS_RUNNING_PER_VM_MAX: u32 = 32;
/// What one VM may have running however many others have: those whose disk hangs, or who are frozen, give no place back, and no number of them
/// may stop the rest. Enough that a VM has one under way while another ends.
pub const EFFECTS_RUNNING_PER_VM_MIN: u32 = 4;

/// Idempotency keys remembered for each source VM; the oldest go first.
pub const KEYS_PER_SOURCE_MAX: usize = 1024;

/// Bytes of messages that wait for the operator.
pub const HOST_MAILBOX_BYTES_MAX: u64 = 64 << 20;
/// How long they wait, in seconds.
pub const HOST_MAILBOX_SECONDS_MAX: u64 = 24 * 3600;
/// What a message costs a mailbox besides its bytes, so that empty messages are bounded too: its records here.
pub const MESSAGE_OVERHEAD_BYTES: u64 = 128;
/// Wall time may move this much more than the host's own clock between two readings; a jump further counts as this.
pub const CLOCK_JUMP_NS_MAX: u64 = NS_PER_SECOND;
/// The operator's own message limit, as a VM's default.
pub const HOST_MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Messages that one request of the operator's was given and that are not in its socket yet: enough for a burst, and at most 16 MiB.
pub const HOST_GIVEN_MAX: usize = 16;

/// The smallest data area of RECEIVE: header, longest name, one byte of message.
pub const RECEIVE_BYTES_MIN: u64 = (size_of::<MessageHeader>() + NAME_BYTES_MAX + 1) as u64;
/// The smallest data area of NEXT_OFFER: header and names of usual length; an offer that needs more answers TOO_LARGE and stays.
pub const NEXT_OFFER_BYTES_MIN: u64 = (size_of::<OfferHeader>() + 2 * NAME_BYTES_MAX) as u64;

/// One log line for each VM and rule in this time; what was left out is counted in the next one.
pub const LOG_INTERVAL_NS: u64 = NS_PER_SECOND;

/// Broken puts are looked for this often, and removed when older than [`SWEEP_AGE_SECONDS`].
pub const SWEEP_INTERVAL_NS: u64 = 3600 * NS_PER_SECOND;
pub const SWEEP_AGE_SECONDS: u64 = 24 * 3600;

/// Separate ranges of a put whose checksum is remembered; further ones are read back at COMMIT.
pub const PUT_RANGES_MAX: usize = 1024;
/// At COMMIT up to this many gaps are read back one by one; with more the whole file is, in one go.
pub const PUT_GAPS_MAX: usize = 16;

/// How long a transfer of the operator that outlived its core waits for the operator to ask again: vmgmtctl does within
/// fractions of a second of the core's return; ten times the longest return of a core with hundreds of devices.
pub const OPERATOR_RETURNS_NS_MAX: u64 = 30 * NS_PER_SECOND;
/// Results of the operator's transfers that are remembered, for one that asks again after its answer was lost; the oldest go first.
pub const OPERATOR_RESULTS_MAX: usize = 256;

/// The operator gets a progress event at most this often.
pub const PROGRESS_INTERVAL_NS: u64 = 100_000_000;

/// Longest component of a path, as Linux file systems have it.
pub const COMPONENT_BYTES_MAX: usize = 255;
/// Names beginning so belong to puts under way.
pub const TEMPORARY_PREFIX: &str = ".vmgmt-put-";
/// And those ending so to what nobody can go on with, but the core life (or its successor) that made them.
pub const ONCE_SUFFIX: &str = "-once";
/// Largest file offset (`off_t`).
pub const FILE_OFFSET_MAX: u64 = i64::MAX as u64;

const _: () = {
    assert!(EFFECTS_RUNNING_PER_VM_MAX < EFFECTS_RUNNING_MAX);
    assert!(EFFECTS_RUNNING_PER_VM_MIN < EFFECTS_RUNNING_PER_VM_MAX);
    assert!(RATE_DELAY_NS_MAX <= RATE_BURST_NS);
    assert!(PUT_GAPS_MAX <= PUT_RANGES_MAX);
    assert!(COMPONENT_BYTES_MAX < PATH_BYTES_MAX);
    // A port window's output must hold the smallest RECEIVE and NEXT_OFFER.
    assert!(RECEIVE_BYTES_MIN as usize <= vmgmt_abi::port::OUTPUT_BYTES_MAX);
    assert!(NEXT_OFFER_BYTES_MIN as usize <= vmgmt_abi::port::OUTPUT_BYTES_MAX);
};
