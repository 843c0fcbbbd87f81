//! Numbers of the keeper.

use std::time::Duration;

/// Bytes of the hub's state: twice a snapshot of all mailboxes that are likely to be full at once, and its journal. Memory is taken only
/// for what is written.
pub(super) const HUB_STATE_BYTES: u64 = 256 << 20;
/// Bytes of a session's state: what its rings need.
pub(super) const SESSION_STATE_BYTES: u64 = vmgmt_device::rings::STATE_BYTES as u64;
/// Waits before a core is started again, by deaths in a row (survival.md, "Crash loops").
pub(super) const BACK_OFF: [Duration; 4] = [
    Duration::ZERO,
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_secs(1),
];
/// A core that served this long has ended a row of deaths; two deaths with the same session, and less service between them, quarantine that one.
pub(super) const ROW_OF_DEATHS: Duration = Duration::from_secs(10);
/// Deaths after which all sessions that were handled at each of them are quarantined, although one of them will have been enough.
pub(super) const SUSPECT_DEATHS_MAX: usize = 4;
/// Deaths in a row after which a daemon that never was in service gives up: something is wrong that a restart does not mend.
pub(super) const FIRST_DEATHS_MAX: usize = 5;
/// How long a core may take from its start to READY: it adopts in slices and only reads its state before.
pub(super) const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long a program that is asked whether it could take over may take, or a new front to say that it is there. No VM waits for its answer, which takes a tenth of a second; a host that is
/// busy with other things must not be refused an upgrade for that.
pub(super) const CHECK_DEADLINE: Duration = Duration::from_secs(5);
/// How long a core may take to write its state in the form of the oldest version that can have it; one of before that cannot says nothing.
pub(super) const TIDY_DEADLINE: Duration = Duration::from_secs(1);
/// How long the configuration may take to be read anew, with its shares: nobody waits for it, but the operator.
pub(super) const READ_DEADLINE: Duration = Duration::from_secs(10);
/// How long a core may take to stand still, so that its state can be copied: its loop never waits, but for a processor.
pub(super) const FREEZE_DEADLINE: Duration = Duration::from_millis(500);
/// How long a draining core may take beyond its deadline to write its snapshot and end.
pub(super) const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// How long a core on trial may take: it reads what the check has read, and is told all sessions. And then how long to take them over.
pub(super) const TRIAL_DEADLINE: Duration = Duration::from_secs(10);
/// How long the old program may take to serve again after another one failed, before the upgrade's report says that it does not.
pub(super) const RETURN_DEADLINE: Duration = Duration::from_secs(10);
/// How long a hand-over to a front that has started may take, while no client is served: QEMU waits 5 s for an answer.
pub(super) const HAND_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// How long a front that was told to serve, or to go on, may take to say that it does: as long as QEMU waits for an answer.
pub(super) const SERVE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a front that was replaced may take to leave.
pub(super) const LEAVE_DEADLINE: Duration = Duration::from_secs(1);
/// How long front and core may take to end in order.
pub(super) const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// How long a front that was killed at the end may take to be gone, before the daemon ends without it: it may sleep in the kernel for as long as
/// the server of a client's file likes.
pub(super) const DEATH_DEADLINE: Duration = Duration::from_secs(2);
/// How long a core in service may take none of the messages that wait for it: the front is told nothing meanwhile, and a QEMU that connects waits 5 s.
pub(super) const UNREAD_DEADLINE: Duration = Duration::from_secs(2);
/// Messages for a core in service from which on it is not listened to, since what it asks is answered.
pub(super) const UNREAD_MAX: usize = 1024;
/// Between two looks at what tells nothing by itself: a process that dies slowly, a full channel.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Packets taken from one child before the others have their turn.
pub(super) const PACKETS_PER_TURN: usize = 64;
/// Lines about deaths that are kept for the status.
pub(super) const NOTICES_MAX: usize = 32;
/// How long the sockets of a daemon that has died may stay open: its processes end one by one, each with all its threads.
pub(super) const DYING_DEADLINE: Duration = Duration::from_secs(5);
/// Connections that may wait on a socket before they are accepted.
pub(super) const BACKLOG: i32 = 1024;
/// How long a core that has closed its channel may take to end by itself, so that its exit code or signal is known.
pub(super) const END_DEADLINE: Duration = Duration::from_millis(200);
/// When the start of a core is tried again for which memory or descriptors were missing.
pub(super) const START_AGAIN: Duration = Duration::from_secs(1);
/// A signal to stop that comes this long after the first means: at once.
pub(super) const IMPATIENCE: Duration = Duration::from_secs(1);

const _: () = assert!(IMPATIENCE.as_nanos() < STOP_DEADLINE.as_nanos());
