//! What goes in and out of the hub.

use crate::effect::{Effect, EffectId, FileSlot, Outcome};
use crate::journal::Record;
use crate::policy::VmConfig;
use serde::{Deserialize, Serialize};
use vmgmt_device::rings::{Answer, Channel, Fetched, Token};

/// What the shell tells the hub.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// A VM exists. Told again after a change of its configuration.
    Vm(VmConfig),
    /// It does not any more: its state goes, its transfers fail.
    VmGone { vm: u64 },
    /// A device of a VM is connected.
    SessionOpened { session: u64, vm: u64 },
    /// It is not any more: all its submissions are void (no answers are wanted), its handles go.
    SessionClosed { session: u64 },
    /// The device was reset: as closed and opened again.
    SessionReset { session: u64 },
    /// A ring was closed: what is kept for the channel goes.
    ChannelClosed { session: u64, channel: Channel },
    /// A submission.
    Submission(Box<Fetched>),
    /// Its guest wants it cancelled: answer it as CANCELLED if it is still open.
    Cancel(Token),
    /// It is void: forget it, no answer.
    Void(Token),
    /// A completion that asked for it was published (or could not be).
    Published { token: Token, published: bool },
    /// An effect ended.
    Outcome { effect: EffectId, outcome: Outcome },
    /// The operator asks. `client` names its connection, `id` its request there.
    Control {
        client: u64,
        id: u64,
        request: ControlRequest,
    },
    /// The oldest message that a request of the operator's was given and that this was not said of: its last byte is in the operator's socket.
    Told { client: u64, id: u64 },
    /// The operator's connection is gone. What it was given and not told is somebody else's now.
    ControlClosed { client: u64 },
    /// After [`crate::Hub::replay`]: all sessions that are still there have been told.
    Adopted,
    /// After [`crate::Hub::replay_beside`]: no worker of an earlier core life can do anything any more.
    Buried,
    /// Bytes that a snapshot may have: what would make the state larger is refused. (Without it nothing is.)
    StateRoom(u64),
    /// Wall time, nanoseconds since 1970, told at start and when asked for with every submission batch (messages carry it).
    WallClock { now_ns: u64 },
}

/// What the hub tells the shell.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Output {
    /// Ends a submission: `payload` goes to the start of its data area, then the completion. With `confirm` the shell answers Published.
    Complete {
        token: Token,
        answer: Answer,
        payload: Vec<u8>,
        confirm: bool,
    },
    Effect {
        id: EffectId,
        effect: Effect,
    },
    /// An answer to the operator; `last`: no more will follow to this request.
    Control {
        client: u64,
        id: u64,
        reply: ControlReply,
        last: bool,
    },
    /// To be made durable (in order) before any output after it is carried out.
    Journal(Record),
    /// A line for the host's log (rate-limited by the hub): a refusal names the limit or the rule. No guest data.
    Log {
        vm: u64,
        text: String,
    },
}

/// What the operator may ask of the hub.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ControlRequest {
    /// All VMs, with presence and counters.
    Vms,
    /// As the VMs see it.
    Peers,
    /// A message of the host. `target`: a VM's name or "all". `key`: a repeated one is taken once; 0: none.
    Send {
        target: String,
        message: Vec<u8>,
        key: u64,
    },
    /// Messages to the host: those that wait, then (with `follow`) all that come until the connection closes; without `follow` the first
    /// one that is or comes there, or none after `wait_ns`.
    Receive { follow: bool, wait_ns: u64 },
    /// Offers a host file to a VM. The shell has opened it; the hub closes it. `size`: its bytes. `key`: with the same one the operator takes
    /// the transfer up again when a core has died, or hears what came of it; 0: it ends with the operator's connection.
    Push {
        target: String,
        file: FileSlot,
        size: u64,
        name: String,
        wait_ns: u64,
        key: u64,
    },
    /// Asks a VM for a file that it serves, into a file that the shell has opened. `key`: as for a push.
    Pull {
        source: String,
        path: String,
        file: FileSlot,
        wait_ns: u64,
        key: u64,
    },
}

/// The hub's answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ControlReply {
    Vms(Vec<VmStatus>),
    /// Accepted: its number, or to all how many took it.
    Sent {
        number: u64,
    },
    Message {
        source: String,
        sequence: u64,
        accepted_ns: u64,
        message: Vec<u8>,
    },
    /// No message came in time.
    NoMessage,
    /// Bytes moved so far of `total` (`u64::MAX`: unknown).
    Progress {
        bytes: u64,
        total: u64,
    },
    /// A push or pull is complete and confirmed.
    Transferred {
        bytes: u64,
        crc32: u32,
    },
    /// `status`: the number of a `vmgmt_abi::Status`; `text` names what was wrong and what to do.
    Failed {
        status: u16,
        text: String,
    },
}

/// One VM, for the operator.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VmStatus {
    pub vm: u64,
    pub name: String,
    /// Sessions connected now.
    pub sessions: Vec<u64>,
    pub published: bool,
    pub description: String,
    /// RECEIVE submissions posted now.
    pub receives_posted: u64,
    pub mailbox_messages: u64,
    pub mailbox_bytes: u64,
    pub open_files: u64,
    pub transfers: u64,
    /// Counted since the VM exists.
    pub submissions: u64,
    pub messages_sent: u64,
    pub messages_delivered: u64,
    pub messages_dropped: u64,
    pub bytes_from_vm: u64,
    pub bytes_to_vm: u64,
    pub refusals: u64,
}
