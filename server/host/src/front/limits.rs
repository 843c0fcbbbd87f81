//! Numbers of the front, with where they come from. In: nothing. Out: numbers. Must never know: a session.

use vmgmt_abi::feature;
use vmgmt_device::page::SLOTS_MAX;

/// Features offered to every driver: what this version's core does.
pub const FEATURES: u64 =
    feature::EVENT_SUPPRESSION | feature::HOST_PAGE | feature::MODE_FILE | feature::MODE_CHAT;

/// Sessions at once, those still being let go included: the pages shared with the core have room for no more.
pub const SESSIONS_MAX: usize = SLOTS_MAX;

/// Connections of one listener that have not negotiated yet; others wait in its socket. QEMU negotiates at once: all VMs of a host that start
/// together are let in within seconds.
pub const NEWCOMERS_MAX: usize = 128;

/// A listener holds at most so many times the slots that are left to all: three quarters of them where it is the only one.
pub const SLOTS_LEFT_FACTOR: usize = 3;

/// A client that left before the keeper had decided on it keeps its slot until then, or for this time after it came.
pub const ASKED_NS_MAX: u64 = 60_000_000_000;

/// Requests handled of one session before another one's turn. A request takes 5 to 15 µs, so that the others wait about 1 ms for a
/// session that floods.
pub const REQUESTS_PER_TURN_MAX: usize = 64;

/// Reads of one session's socket in one turn.
pub const READS_PER_TURN_MAX: usize = 16;

/// Bytes of one read: many small requests, or a sixteenth of the largest one.
pub const READ_BYTES: usize = 64 * 1024;

/// Connections accepted, and packets taken of a channel, in one turn.
pub const ACCEPTS_PER_TURN_MAX: usize = 64;
pub const PACKETS_PER_TURN_MAX: usize = 64;

/// Sessions told to a new core in one turn: making and mapping a page takes about 50 µs, and the others' register accesses wait.
pub const ADOPTIONS_PER_TURN_MAX: usize = 64;

/// Packets that may wait for the core. While there are more no session is served, and nothing is taken of the core: QEMU waits 5 s, a core that
/// does not take packets is killed after 2.
pub const CORE_QUEUE_MAX: usize = 4096;

/// Between connect and an accepted VERSION. QEMU sends it at once.
pub const VERSION_NS_MAX: u64 = 10_000_000_000;

/// A client that asks on but does not read its answers (so that the hall holds it back) is closed after this time.
pub const HELD_BACK_NS_MAX: u64 = 30_000_000_000;

/// The core's beat may stand still so long while it owes something; and the queue of packets for it, while some wait.
pub const BEAT_NS_MAX: u64 = 2_000_000_000;

/// Threads that close what clients sent: so many listeners' clients must be hostile before others' descriptors have to wait.
pub const CLOSERS: usize = 8;

/// The stack of one: it only closes.
pub const CLOSER_STACK_BYTES: usize = 64 * 1024;

/// Descriptors of one listener's clients that wait to be closed, before it is not accepted from and its clients may send no more: fifteen times
/// what one client can have the front hold, its memory objects aside. Whoever sends one waits for an answer, and the close of an eventfd takes a microsecond: more
/// wait only where many VMs of one listener end at once, behind the large memory of one of them.
pub const CLOSES_WAITING_MAX: usize = 4096;

/// When no descriptors are left to accept with, or a listener has [`NEWCOMERS_MAX`] or too many wait to be closed: try again after this time.
pub const ACCEPT_RETRY_NS: u64 = 100_000_000;

/// While packets wait for the core: try again after this time. (The kernel could say when, but it would say so of each packet that the core
/// takes, also while none waits: a wake-up for each, which took a tenth of the time in which a core takes sessions over.)
pub const FLUSH_RETRY_NS: u64 = 1_000_000;

/// At the end: how long sessions may wait for their fences.
pub const STOP_NS_MAX: u64 = 2_000_000_000;

/// Message DMA asked for by the core and not yet sent, per session: as many as may be outstanding.
pub const MESSAGE_DMA_WAITING_MAX: usize = crate::messages::MESSAGE_DMA_OUTSTANDING_MAX;

/// Frozen VMs kept in mind: as many as there can be sessions.
pub const FROZEN_VMS_MAX: usize = SESSIONS_MAX;

/// A freeze whose core died before it was answered is let go when nobody has asked again for so long: twice the time for which `vmgmtctl` does.
pub const FREEZE_ORPHANED_NS_MAX: u64 = 10_000_000_000;

/// Freezes that are not answered yet; the core has fewer operators than that.
pub const FREEZES_ASKED_MAX: usize = 64;

/// Descriptor slots of one session: those of unread messages and of all its interrupts, twice over.
pub const DESCRIPTORS_MAX: usize = 4 * vmgmt_wire::limits::QUEUED_DESCRIPTORS_MAX;

/// A hand-over's bytes of state in one packet; well below what a packet holds.
pub const PIECE_BYTES: usize = 64 * 1024;

/// Bytes of a front's state at most: thousands of sessions with a large message half read each.
pub const STATE_BYTES_MAX: usize = 1 << 30;

/// During a hand-over: try again after this time, where the kernel does not say when.
pub const HAND_OVER_RETRY_NS: i64 = 1_000_000;

/// Log lines that one session may cause at once, and how long one more takes to be earned.
pub const LOG_LINES_MAX: u32 = 10;
pub const LOG_LINE_NS: u64 = 1_000_000_000;

// What one session holds at its end, sent to the closer at once, is no pile.
const _: () = assert!(CLOSES_WAITING_MAX > DESCRIPTORS_MAX);
const _: () = assert!(READ_BYTES < vmgmt_wire::limits::INPUT_BYTES_MAX);
const _: () = assert!(BEAT_NS_MAX < vmgmt_device::registers::limits::REPLY_HELD_NS_MAX);
