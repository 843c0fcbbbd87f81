//! What the roles say to each other over their channels. State is in the pages; messages carry descriptors, admissions
//! and DMA for memory that is not shared.
//!
//! Order that holds: the keeper tells the core of a VM before it admits a session of that VM to the front, and the core
//! empties the keeper's channel before the front's; so a session never names a VM that the core does not know.

use crate::config::{CoreConfig, ListenerConfig, VmConfig};
use crate::control::protocol::{Upgrade, UpgradeReport};
use crate::fault;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::time::SystemTime;
use vmgmt_ctl::protocol::SandboxedRole;
use vmgmt_device::Tick;

/// Versions of what keeper and core say to each other that this program speaks: its own, and the one before where there is one.
const SPOKEN: RangeInclusive<u32> = 1..=1;

/// Versions that this program speaks (in tests perhaps more than [`SPOKEN`]).
#[must_use]
pub fn spoken() -> RangeInclusive<u32> {
    fault::range("speaks").unwrap_or(SPOKEN)
}

/// The newest version that both speak. A keeper says its oldest, in which all that it says before the answer is said, and its newest (0: it is of
/// the time when there was one version); the core says in [`CoreToKeeper::Ready`] what came of it.
///
/// # Errors
/// There is none, and what to do.
pub fn agree(oldest: u32, newest: u32) -> anyhow::Result<u32> {
    let (theirs, ours) = (oldest..=newest.max(oldest), spoken());
    let common = *theirs.end().min(ours.end());
    anyhow::ensure!(
        common >= *theirs.start().max(ours.start()),
        "the keeper speaks versions {} to {} of the roles' words, this program {} to {}: upgrade to a program between them first, or start the daemon anew with it",
        theirs.start(),
        theirs.end(),
        ours.start(),
        ours.end()
    );
    Ok(common)
}

/// The number of a request that nobody makes: the keeper says [`KeeperToCore::Done`] to it when no killed core is left that slept in the
/// kernel. (No message of its own: a core of the version before, which waits for nothing, takes this as nothing.)
pub const BURIED: u64 = 0;

/// Keeper to front.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum KeeperToFront {
    /// Accept on this socket. fds: the listening socket. A second one with the same number replaces the limits.
    Listen(ListenerConfig),
    /// Do not accept any more on it; sessions that came in by it are closed.
    Unlisten {
        /// [`ListenerConfig::listener`].
        listener: u32,
    },
    /// Answer to [`FrontToKeeper::Admit`]. fds: front page (read-write), front page (read-only), session state.
    Admitted { session: u64, vm: u64, name: String },
    /// The other answer: the connection is refused in VERSION with this reason (which names the holder or the rule).
    Refused { session: u64, reason: String },
    /// A core life begins. fds: channel, touched page (read-write), life page (read-only), the core's wake-up eventfd, the
    /// front's wake-up eventfd.
    Core { life: u64 },
    /// That core life is dead for guest memory: its fences are answered.
    CoreDead { life: u64 },
    /// Close all sessions of this VM.
    CloseVm { vm: u64 },
    /// The device of this session fails (`true`) until it is released (`false`).
    Quarantine { session: u64, quarantined: bool },
    /// To the old front: stop, and give everything to the new one. fds: a channel to it.
    HandOver,
    /// To the new front, which is fresh: take everything over. fds: a channel to the old one.
    TakeOver,
    /// To the old front: go on, nothing came of it.
    Resume,
    /// To the old front: the other one serves; exit.
    Leave,
    /// To the new front: serve.
    Serve,
    /// End in order.
    Stop,
}

/// Front to keeper.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum FrontToKeeper {
    Ready,
    /// Somebody connected; nothing is answered to it before the keeper has.
    Admit {
        session: u64,
        listener: u32,
        pid: i32,
        uid: u32,
    },
    /// A session has ended (or its connection went away before it was admitted).
    SessionGone {
        session: u64,
        #[serde(default)]
        fault: SessionFault,
    },
    /// The core's beat has stood still while a fence or a doorbell is outstanding: kill it. `innocent`: it has not, but its death is the only
    /// fence that is left to a session (a fault of the front's): nobody is to be blamed for it.
    CoreStuck {
        life: u64,
        #[serde(default)]
        innocent: bool,
    },
    /// The new front has everything and can serve; it touches nothing before it is told to.
    CanServe {
        sessions: u64,
        descriptors: u64,
    },
    /// The hand-over cannot be.
    CannotHandOver {
        reason: String,
    },
    /// Clients are served again, by the new front or (after a hand-over that failed) the old one; nobody was served for this time.
    Serves {
        stood_still_ns: u64,
    },
    /// How it is sandboxed, for the status that the keeper gives: said whenever it is told to a core.
    Sandboxed(Box<SandboxedRole>),
}

/// A fault of the front's own in a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionFault {
    #[default]
    None,
    /// The session was ended for it.
    Contained,
    /// Its end failed, too: its number and slot are kept until no core knows of it.
    Lost,
}

impl SessionFault {
    /// Nothing of the session can be trusted any more.
    #[must_use]
    pub fn is_lost(self) -> bool {
        self == Self::Lost
    }
}

/// A line about the other roles, for `vmgmtctl log` and the status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    pub text: String,
    /// The VM whose device it took out of service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault_of: Option<String>,
    /// When, in nanoseconds since 1970; 0: not known.
    #[serde(default)]
    pub time_ns: u64,
}

impl From<String> for Notice {
    fn from(text: String) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let time_ns = since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        Self {
            text,
            fault_of: None,
            time_ns,
        }
    }
}

impl Notice {
    /// A session has ended; nothing, if that is nobody's fault.
    #[must_use]
    pub fn of_front(vm: Option<&str>, fault: SessionFault) -> Option<Self> {
        let vm = vm.filter(|_| fault != SessionFault::None)?;
        let price = match fault {
            SessionFault::Lost => "; its end failed too, and the core was killed, which ended its DMA",
            _ => "",
        };
        let text = format!(
            "a fault of vmgmtd's front in the device of VM {vm:?}: that device ended{price}. Another comes by device_del and device_add, or by a restart of the VM; please report the panic in the log"
        );
        Some(Self {
            fault_of: Some(vm.to_owned()),
            ..text.into()
        })
    }

    /// A session is put into quarantine.
    #[must_use]
    pub fn of_quarantine(vm: &str, session: u64) -> Self {
        let text = format!(
            "session {session} of VM {vm:?} kills the core again and again: its device is quarantined until `vmgmtctl release {vm}`"
        );
        Self {
            fault_of: Some(vm.to_owned()),
            ..text.into()
        }
    }

    /// All of them as a keeper saves them: their texts, and, of those that tell of a fault, all.
    #[must_use]
    pub fn save(notices: &VecDeque<Self>) -> (Vec<String>, Vec<Self>) {
        let texts = notices.iter().map(|notice| notice.text.clone());
        let faults = notices.iter().filter(|notice| notice.fault_of.is_some());
        (texts.collect(), faults.cloned().collect())
    }

    /// As they were, but for the time of those that tell of no fault.
    #[must_use]
    pub fn restore(texts: Vec<String>, faults: Vec<Self>) -> VecDeque<Self> {
        let mut faults = faults.into_iter().peekable();
        let whole = |text: String| {
            let fault = faults.next_if(|fault| fault.text == text);
            fault.unwrap_or(Self {
                text,
                ..Self::default()
            })
        };
        texts.into_iter().map(whole).collect()
    }
}

/// Keeper to core.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum KeeperToCore {
    /// First packet. fds: channel, touched page (read-only), life page (read-write), the core's wake-up eventfd, the
    /// front's wake-up eventfd, hub state, control listener (accepted by the core while it is READY), then the directory of each
    /// share, in the order of the configuration.
    ///
    /// `trial`: it looks whether it could take over, writes nothing but the hub state that it was given, says
    /// [`CoreToKeeper::Able`], and begins when it hears [`KeeperToCore::Go`].
    ///
    /// `reloads`: this keeper knows [`CoreToKeeper::Reload`].
    ///
    /// `undead`: VMs for which workers of killed cores may still do something to files; until [`BURIED`].
    Start {
        life: u64,
        config: Box<CoreConfig>,
        /// The oldest version that the keeper speaks, see [`agree`].
        channel: u32,
        #[serde(default)]
        channel_newest: u32,
        trial: bool,
        #[serde(default)]
        undead: BTreeSet<u64>,
        #[serde(default)]
        reloads: bool,
    },
    /// The only packet to a program that is asked whether it could take over. fds: one sealed memory with copies of the hub's
    /// state (so many bytes) and behind it of each session's (number, bytes), as after a crash.
    Check {
        config: Box<CoreConfig>,
        channel: u32,
        #[serde(default)]
        channel_newest: u32,
        hub_bytes: u64,
        sessions: Vec<(u64, u64)>,
    },
    /// A core on trial is the core from now on.
    Go,
    /// Another core is to take over: fetch nothing more, end bulk work within so many milliseconds, then end in order.
    Drain {
        deadline_ms: u64,
    },
    /// A VM exists from now on.
    Vm(VmConfig),
    /// It does not any more; its state is forgotten.
    VmGone {
        vm: u64,
    },
    /// Answer to a request of the core; or [`BURIED`].
    Done {
        request: u64,
        error: Option<String>,
    },
    /// Answer to [`CoreToKeeper::Upgrade`], if it has begun ([`KeeperToCore::Done`] with an error, if not).
    Upgrading {
        request: u64,
        number: u64,
    },
    /// The last upgrade, as the status is to show it from now on.
    Upgrade(Box<UpgradeReport>),
    Notice(Notice),
    /// End in order: drain, write what is to be kept, exit 0.
    Stop,
}

/// Core to keeper.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum CoreToKeeper {
    /// In service. `channel`: the version that it speaks from now on (0: it is of the time when there was one).
    Ready {
        life: u64,
        #[serde(default)]
        channel: u32,
    },
    /// On trial: it has seen everything and could take over. In service, when it is told of an upgrade that is to replace it: its state is as
    /// old a version as it can be. (A keeper of before takes that as nothing.)
    Able { life: u64 },
    /// On trial or asked by [`KeeperToCore::Check`]: it cannot, and why.
    Refused { reason: String },
    /// The good answer to [`KeeperToCore::Check`].
    Checked,
    /// The operator adds a VM with a socket of its own at run time (the keeper gives it its number).
    AddVm {
        request: u64,
        vm: Box<VmConfig>,
        listener: Box<ListenerConfig>,
    },
    /// The operator removes one.
    RemoveVm { request: u64, name: String },
    /// The operator wants another program to take over.
    Upgrade { request: u64, upgrade: Upgrade },
    /// The operator wants the configuration to be read anew. Answered as [`CoreToKeeper::Upgrade`].
    Reload { request: u64 },
    /// The operator releases a VM's quarantined devices.
    Release { request: u64, vm: String },
}

/// Front to core.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum FrontToCore {
    /// A session exists. fds: front page (read-only), core page, session state.
    Session { session: u64, slot: u32, vm: u64 },
    /// Memory that maps of this session name. fds: the memory. `events`: the front page's events counter is above this only
    /// when the object was sent before.
    Object {
        session: u64,
        object: u64,
        writable: bool,
    },
    /// No map names it any more.
    ObjectGone { session: u64, object: u64 },
    /// Interrupt vectors' eventfds, whole: bit v of `present` says that vector v has one. fds: theirs, in order.
    Vectors { session: u64, present: u32 },
    /// The session has ended; everything of it is to be let go (its fence is in its front page).
    SessionGone { session: u64 },
    /// How the front is sandboxed, for the status. First packet.
    Sandboxed(Box<SandboxedRole>),
    /// All sessions that existed when this core life began have been told.
    Adopted,
    /// Answer to a DMA request of this life. payload: what was read. `error`: the client's errno, 0: done.
    DmaAnswer { session: u64, request: u64, error: u32 },
    /// Until when a VM is frozen ([`Tick::NEVER`]: until it is thawed; `None`: it is not), after all its front pages say so. Answer to
    /// [`CoreToFront::Freeze`]; `request` 0: its time is over, or the core life begins. `kept`: a core life has said `kept` of it, so that
    /// somebody counts on it. (A front of the version before keeps all that it is told.)
    Frozen {
        vm: u64,
        until: Option<Tick>,
        request: u64,
        #[serde(default = "yes")]
        kept: bool,
    },
}

/// Core to front: DMA for memory that is not shared, at most [`MESSAGE_DMA_BYTES_MAX`] each, and the operator's wish to have no DMA.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum CoreToFront {
    /// `fence`: the front page's fence that the core had seen when it asked. A request from before the front's newest fence is answered
    /// ECANCELED, unsent: what it was checked against may be gone.
    DmaRead {
        session: u64,
        request: u64,
        fence: u64,
        iova: u64,
        bytes: u32,
    },
    /// payload: the bytes. `fence`: as above.
    DmaWrite {
        session: u64,
        request: u64,
        fence: u64,
        iova: u64,
    },
    /// All sessions of this VM, those to come too, are frozen until then, or (`None`) let go. `request` is not 0. `kept`: `Some(false)`: nobody
    /// was told of it yet; if this core life ends before it says more, and nobody asks again, the VM is let go. `Some(true)`: it is quiet, and
    /// somebody will be told so when the front has answered: it stays so whatever becomes of the core (if it is still frozen; nothing else changes).
    /// `None`: the word of a core of the version before, which means it as of then.
    Freeze {
        vm: u64,
        until: Option<Tick>,
        request: u64,
        #[serde(default)]
        kept: Option<bool>,
    },
}

const fn yes() -> bool {
    true
}

/// Bytes of one message-DMA request: what QEMU's client takes with room to spare, and a packet holds.
pub const MESSAGE_DMA_BYTES_MAX: u32 = 60 * 1024;
/// Message-DMA requests outstanding per session.
pub const MESSAGE_DMA_OUTSTANDING_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::DeserializeOwned;

    /// What the version before knew of [`KeeperToCore::Start`] and of answers.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Before {
        Start { life: u64, channel: u32, trial: bool },
        Done { request: u64, error: Option<String> },
    }

    /// As one end of a channel says it and the other understands it.
    fn told<T: DeserializeOwned>(message: &impl Serialize) -> T {
        let mut bytes = Vec::new();
        ciborium::into_writer(message, &mut bytes).unwrap();
        ciborium::from_reader(bytes.as_slice()).unwrap()
    }

    #[test]
    fn a_notice_is_what_it_was_to_the_version_before_and_kept_by_a_keeper() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        enum NoticeBefore {
            Notice { text: String },
        }
        let plain = Notice::from("core life 1 died".to_owned());
        assert!(plain.time_ns > 0 && plain.fault_of.is_none());
        let before: NoticeBefore = told(&KeeperToCore::Notice(plain.clone()));
        let NoticeBefore::Notice { text } = &before;
        assert_eq!(*text, plain.text);
        let KeeperToCore::Notice(notice) = told(&before) else {
            panic!("another message");
        };
        assert_eq!((notice.text, notice.time_ns), (plain.text.clone(), 0));
        assert_eq!(Notice::of_front(Some("web"), SessionFault::None), None);
        assert_eq!(
            Notice::of_front(None, SessionFault::Lost),
            None,
            "nobody's device"
        );
        let ended = Notice::of_front(Some("web"), SessionFault::Contained).unwrap();
        let lost = Notice::of_front(Some("db"), SessionFault::Lost).unwrap();
        assert!(!ended.text.contains("its end failed too") && lost.text.contains("its end failed too"));
        let notices = VecDeque::from([ended, plain, lost, Notice::of_quarantine("web", 7)]);
        let (texts, faults) = Notice::save(&notices);
        assert_eq!((texts.len(), faults.len()), (4, 3));
        let mut expected = notices;
        expected[1].time_ns = 0;
        assert_eq!(Notice::restore(texts, faults), expected);
    }

    /// What the version before knew of a freeze, on both sides.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum FreezeBefore {
        Freeze {
            vm: u64,
            until: Option<Tick>,
            request: u64,
        },
        Frozen {
            vm: u64,
            until: Option<Tick>,
            request: u64,
        },
    }

    #[test]
    fn a_freeze_between_two_versions_is_kept() {
        let (vm, until, request) = (3, Some(Tick(9)), 7);
        let before = FreezeBefore::Freeze { vm, until, request };
        let CoreToFront::Freeze { kept: None, .. } = told(&before) else {
            panic!("another message");
        };
        let kept = Some(false);
        let now = CoreToFront::Freeze {
            vm,
            until,
            request,
            kept,
        };
        assert_eq!(told::<FreezeBefore>(&now), before);
        let before = FreezeBefore::Frozen { vm, until, request };
        let FrontToCore::Frozen { kept: true, .. } = told(&before) else {
            panic!("another message");
        };
        let kept = false;
        let now = FrontToCore::Frozen {
            vm,
            until,
            request,
            kept,
        };
        assert_eq!(told::<FreezeBefore>(&now), before);
    }

    #[test]
    fn the_newest_version_that_both_speak_is_spoken() {
        let (oldest, newest) = (*SPOKEN.start(), *SPOKEN.end());
        // Of now, of before there was a range, and of the versions to come that still speak ours.
        assert_eq!(agree(oldest, newest).unwrap(), newest);
        assert_eq!(agree(oldest, 0).unwrap(), oldest);
        assert_eq!(agree(newest, newest + 1).unwrap(), newest);
        let later = agree(newest + 1, newest + 2).unwrap_err().to_string();
        assert!(
            later.contains("versions 2 to 3") && later.contains("this program 1 to 1"),
            "{later}"
        );
    }

    #[test]
    fn a_core_of_the_version_before_understands_the_undead_as_nothing_and_its_keeper_knows_none() {
        let config = CoreConfig {
            shares: Vec::new(),
            poll_ns: 0,
            workers: 2,
            sockets: Vec::new(),
            device: crate::config::DeviceConfig::default(),
            vm_limits: crate::config::VmLimits::default(),
            sandbox: crate::sandbox::SandboxConfig {
                enabled: false,
                front: None,
                core: None,
            },
        };
        let start = KeeperToCore::Start {
            life: 7,
            config: Box::new(config),
            channel: 1,
            channel_newest: 1,
            trial: false,
            undead: [3, 4].into(),
            reloads: true,
        };
        let KeeperToCore::Start { undead, .. } = told(&start) else {
            panic!("another message");
        };
        assert_eq!(undead, [3, 4].into());
        let before = Before::Start {
            life: 7,
            channel: 1,
            trial: false,
        };
        assert_eq!(told::<Before>(&start), before);
        let buried = KeeperToCore::Done {
            request: BURIED,
            error: None,
        };
        let (request, error) = (BURIED, None);
        assert_eq!(told::<Before>(&buried), Before::Done { request, error });
        // And what an earlier keeper says, without the field.
        let mut value: ciborium::Value = told(&start);
        let fields = value.as_map_mut().unwrap()[0].1.as_map_mut().unwrap();
        fields.retain(|(name, _)| name.as_text() != Some("undead"));
        let KeeperToCore::Start { undead, .. } = told(&value) else {
            panic!("another message");
        };
        assert!(undead.is_empty());
    }
}
