//! GARDEN, numbers: how large the simulated world is. Small on purpose: what is small is full soon.

/// As the real core: how long a fence waits for leases.
pub const LEASE_WAIT_NS: u64 = 100_000_000;
/// Bytes of one message-DMA request; far below the real 60 KiB, so that a buffer takes several.
pub const MESSAGE_BYTES_MAX: u32 = 1024;
/// Bytes moved between file and memory in one go.
pub const PIECE_BYTES_MAX: u64 = 1536;
/// Packets that the channel between front and core holds.
pub const CHANNEL_PACKETS_MAX: usize = 12;
/// Map slots of a front page.
pub const MAPS_MAX: usize = 16;
/// Words of the hub's journal memory.
pub const HUB_WORDS: usize = 1 << 17;
/// A journal longer than this gives way to a snapshot. Far below the real value: the change-over is what is to be tested.
pub const JOURNAL_BYTES_MAX: usize = 12_000;
/// How long a core polls after its last work: as configured by default, or not at all.
pub const POLL_NS: [u64; 2] = [50_000, 0];
/// A fence's answer comes within this virtual time, whatever the disk does: the wait for leases, the death of a core and the start of the next.
pub const FENCE_NS_MAX: u64 = 1_000_000_000;
/// From the death of a core until the keeper sees it.
pub const DEATH_SEEN_NS_MAX: u64 = 50_000_000;
/// How long a dead core's worker still sleeps in the disk.
pub const UNDEAD_NS_MAX: u64 = 300_000_000;
/// Replies that an operator's socket holds: then the core waits until it reads.
pub const REPLIES_MAX: usize = 3;
/// Accesses within one action; the longest (everybody comes to rest) has some hundred thousand.
pub const ACTION_ACCESSES_MAX: u64 = 20_000_000;
/// Rounds that a core has at most where it overtakes the front.
pub const CUT_ROUNDS_MAX: u64 = 4;
/// How long a hand-over of the front takes at most.
pub const HAND_OVER_NS_MAX: u64 = 20_000_000;
/// How long a freeze that nobody was told of outlives the core that asked for it; far below the real value.
pub const FREEZE_ORPHANED_NS: u64 = 100_000_000;
/// Longest time limit of a freeze; the shortest are over before anybody has answered.
pub const FREEZE_NS_MAX_BITS: u64 = 28;
/// Actions kept for a failure's report.
pub const ACTIONS_KEPT: usize = 40;

/// Turns in which everybody must have come to rest, or nothing is concluded.
pub const REST_TURNS: u32 = 400;
/// Virtual time between two of them: a core that polls for its longest time has stopped long before the last.
pub const REST_STEP_NS: u64 = 2_000;
/// How often the world still overtakes the core on its way to rest.
pub const REST_OVERTAKES_MAX: u64 = 3;
/// Before which of so many accesses of a round: the rounds before sleep have not many more.
pub const REST_ACCESSES: u64 = 60;
/// And before each how manieth of the front's, at most.
pub const REST_CUTS: u64 = 10;
/// Turns in a row in which nobody did anything: then all sleep.
pub const REST_TURNS_CALM: u32 = 3;

/// Turns in which everything that is under way must have come to its end. (A VM that is reached by message takes some 14 for each of the hundreds of
/// messages that may wait for it.)
pub const DRY_TURNS: u64 = 100_000;
/// Virtual time between two of them.
pub const DRY_STEP_NS: u64 = 1_000;

// A hand-over that has just begun takes its time of them.
const _: () = assert!(HAND_OVER_NS_MAX <= DRY_STEP_NS * DRY_TURNS / 2);
const _: () = assert!(POLL_NS[0] < REST_STEP_NS * REST_TURNS as u64 / 4);

/// Entries of a guest's rings.
pub const RING_ENTRIES: u32 = 16;
/// First byte of the arena of buffers in a guest's memory; below it are the rings and the host's page.
pub const ARENA: u64 = 0x8000;
/// Bytes of a buffer slot.
pub const BUFFER_BYTES: u64 = 1024;
/// Buffer slots.
pub const BUFFERS: usize = 64;
/// Bytes of a guest's memory: the last quarter of the arena is a map of its own, which comes and goes.
pub const RAM_BYTES: u64 = ARENA + BUFFER_BYTES * BUFFERS as u64;
/// First byte of the part that is unplugged and plugged again.
pub const PLUGGED: u64 = ARENA + BUFFER_BYTES * (BUFFERS as u64 * 3 / 4);

const _: () = assert!(PLUGGED < RAM_BYTES && ARENA.is_multiple_of(4096) && PLUGGED.is_multiple_of(4096));
