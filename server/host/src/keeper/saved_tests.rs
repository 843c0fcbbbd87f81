//! The keeper's saved state of each version that this one must read, as it was written then.
//!
//! `UPDATE_GOLDEN=1 cargo test -p vmgmt-host --lib keeper::saved_tests` writes `tests/golden/keeper-state-v1.cbor` anew (and `-later`, with the
//! fields that came later and need not be there): once for each version, and never again once a release has that version.

use super::saved::{SavedKeeper, VERSION, VERSION_OLDEST};
use super::*;
use crate::config::{Access, Identity, ShareConfig, ShareGrant, VmConfig, VmLimits};
use crate::control::protocol::UpgradeReport;
use crate::messages::{BURIED, Notice};
use crate::packed::{self, Refusal};
use crate::sandbox::SandboxConfig;
use crate::words::MappedWords;
use crate::words::create_page;
use lives::Standing;
use restart::Death;
use rustix::event::{EventfdFlags, eventfd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vmgmt_device::page::LifePage;

/// Times that are the same in each run.
const AGO: Duration = Duration::from_millis(1500);

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/keeper-state-v1.cbor")
}

/// Stands for any descriptor: it can be watched, and it is no process.
fn any() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn signals() -> Signals {
    Signals {
        came: UnixStream::pair().unwrap().0,
        stop_asked: Arc::default(),
        upgrade_asked: Arc::default(),
        reload_asked: Arc::default(),
    }
}

pub(super) fn child<T>(pid: u32, waiting: Vec<(T, Vec<OwnedFd>)>, fault: Option<&'static str>) -> Child<T> {
    Child {
        pid,
        pidfd: any(),
        channel: crate::channel::Channel::from_fd(any()),
        waiting: waiting.into(),
        held: None,
        killed: fault.is_some(),
        fault: fault.map(Into::into),
        exit: None,
    }
}

fn socket(path: &str) -> Socket {
    Socket {
        fd: any(),
        path: path.into(),
        file: Some((2049, 77)),
    }
}

fn vm(vm: u64, name: &str) -> VmConfig {
    VmConfig {
        vm,
        name: name.into(),
        shares: vec![ShareGrant {
            share: "work".into(),
            access: Access::ReadWrite,
        }],
        reach: vec!["db".into()],
        send_to_all: true,
        limits: VmLimits::default(),
        transient: vm > 1,
    }
}

fn listener(listener: u32, identity: Identity) -> ListenerConfig {
    ListenerConfig {
        listener,
        path: format!("/nowhere/{listener}.sock").into(),
        mode: 0o660,
        group: Some("kvm".into()),
        identity,
        device: crate::config::DeviceConfig {
            devices_max: 4,
            ..Default::default()
        },
    }
}

/// A keeper with something in each field, in the middle of its own upgrade.
pub(super) fn scene() -> Keeper {
    let now = Instant::now();
    let (page, page_ro) = create_page("vmgmt-life", LifePage::<MappedWords>::WORDS).unwrap();
    LifePage::new(MappedWords::writable(&page).unwrap()).init();
    let mut upgrades = Upgrades::default();
    let report = UpgradeReport {
        number: 3,
        binary: "/new/vmgmtd".into(),
        reason: "none".into(),
        begun_ns: 17,
        parts: vec![crate::control::protocol::PartReport {
            part: crate::control::protocol::Part::Keeper,
            state: crate::control::protocol::UpgradeState::Running,
            reason: String::new(),
            stall_ms: 0,
        }],
        ..UpgradeReport::default()
    };
    upgrades.resume(Some(report.clone()));
    let mut vms = Vms::default();
    assert_eq!(vms.next_number(), 1);
    vms.insert(vm(1, "web"), 1);
    let shared = listener(2, Identity::Anonymous(Box::new(vm(0, ""))));
    for (session, listener) in [(10, &listener(1, Identity::Vm { vm: 1 })), (11, &shared)] {
        let pid = std::process::id().cast_signed();
        let guest = Guest {
            session,
            pid,
            uid: 107,
        };
        assert!(matches!(
            vms.admit(guest, listener),
            vms::Admission::Admitted { .. }
        ));
    }
    vms.named("web").unwrap().removal = Some((4, 5));
    let mut restarts = Restarts::default();
    for at in [1, 2, 9] {
        restarts.died(Death {
            at: Duration::from_secs(at),
            served: Duration::ZERO,
            by_itself: true,
            suspects: [if at < 9 { 10 } else { 11 }].into(),
        });
    }
    let own = Binary::own().unwrap();
    let to_core = vec![
        (KeeperToCore::Vm(vm(1, "web")), vec![]),
        (KeeperToCore::Upgrade(Box::new(report)), vec![]),
        (KeeperToCore::Drain { deadline_ms: 5 }, vec![any(), any()]),
    ];
    let to_front = vec![
        (KeeperToFront::Core { life: 4 }, vec![any()]),
        (KeeperToFront::Listen(shared.clone()), vec![any()]),
        (KeeperToFront::Serve, vec![]),
    ];
    Keeper {
        poll: Poll::new().unwrap(),
        signals: signals(),
        drain_deadline_ms: 2000,
        origin: None,
        path: own.path.clone(),
        core_binary: Binary {
            path: "/old/vmgmtd".into(),
            ..own
        },
        upgrades,
        upgrading: None,
        reload: None,
        core_config: CoreConfig {
            shares: vec![ShareConfig {
                name: "work".into(),
                path: "/srv/work".into(),
                bytes_max: Some(1 << 30),
                files_max: None,
            }],
            poll_ns: 50_000,
            workers: 2,
            sockets: vec![(Some("web".into()), "/nowhere/1.sock".into())],
            device: crate::config::DeviceConfig::default(),
            vm_limits: VmLimits::default(),
            sandbox: SandboxConfig {
                enabled: true,
                front: "107:108".parse().ok(),
                core: None,
            },
        },
        shares: Shares::default(),
        arguments: vec!["--log".into(), "info".into()],
        control: socket("/nowhere/control.sock"),
        fallback: None,
        listeners: [
            (
                1,
                (listener(1, Identity::Vm { vm: 1 }), socket("/nowhere/1.sock")),
            ),
            (2, (shared, socket("/nowhere/2.sock"))),
        ]
        .into(),
        last_listener: 2,
        configured: BTreeSet::new(),
        vms,
        hub_state: any(),
        session_states: [(10, any()), (11, any())].into(),
        front: child(100, to_front, None),
        front_ready: true,
        front_said: None,
        front_sandbox: Some(SandboxedRole {
            role: "front".into(),
            process: 100,
            notes: vec!["no landlock".into()],
            ..SandboxedRole::default()
        }),
        leaving: vec![(child(99, vec![(KeeperToFront::Leave, vec![])], None), now)],
        core: Some(CoreLife {
            life: 4,
            child: child(101, to_core, None),
            page: LifePage::new(MappedWords::read_only(&page_ro).unwrap()),
            page_fd: page_ro,
            started: now,
            ready: Some(now),
            dying: Some(now),
            unread: None,
            standing: Standing::Usual,
            refusal: None,
        }),
        last_life: 4,
        core_end: "signal 9".into(),
        undead: vec![child(98, vec![], Some("killed: it stood still"))],
        dismissed: Vec::new(),
        // A keeper of the first days had none.
        undead_vms: BTreeSet::new(),
        restarts,
        restart_at: now,
        begin: now,
        announced: true,
        stop_at: None,
        notices: [Notice {
            text: "core life 1 died".into(),
            ..Notice::default()
        }]
        .into(),
        flush_log: Box::new(|| ()),
    }
}

/// Descriptors as they would come with a state, in its order: copies of the scene's.
fn saved(keeper: &Keeper) -> (Vec<u8>, Vec<OwnedFd>) {
    let packed = keeper.save().unwrap();
    let copies = packed.fds.iter().map(|fd| fd.try_clone_to_owned().unwrap());
    (at_rest(&packed.bytes, packed.fds.len()), copies.collect())
}

/// As a keeper of the first days would have written it.
fn as_first(bytes: &[u8], fds: usize) -> Vec<u8> {
    let mut saved: SavedKeeper = packed::read(bytes, VERSION..=VERSION, fds).unwrap();
    saved.forget_later_fields();
    packed::write(VERSION, &saved, fds).unwrap()
}

fn restored(bytes: &[u8], fds: Vec<OwnedFd>) -> Keeper {
    Keeper::restore(bytes, fds, Vec::new(), signals(), Box::new(|| ())).unwrap()
}

/// The state with the times that cannot be the same twice set to [`AGO`], and no process of today's.
fn at_rest(bytes: &[u8], fds: usize) -> Vec<u8> {
    let mut saved: SavedKeeper = packed::read(bytes, VERSION..=VERSION, fds).unwrap();
    saved.set_times(AGO);
    saved.vms.set_processes(4242);
    packed::write(VERSION, &saved, fds).unwrap()
}

#[test]
fn a_state_of_version_1_is_read_and_this_version_writes_it_as_it_was() {
    let scene = scene();
    let (bytes, fds) = saved(&scene);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(golden(), as_first(&bytes, fds.len())).unwrap();
    }
    let golden = std::fs::read(golden())
        .expect("tests/golden/keeper-state-v1.cbor is there; UPDATE_GOLDEN=1 makes it");
    // A field more, one less or one of another form needs a new version, a golden file of its own, and this one goes on being read.
    let again = at_rest(&golden, fds.len());
    assert!(
        VERSION > 1 || again == golden,
        "the format has changed, but not its version"
    );
    let keeper = restored(&golden, fds);
    let core = keeper.core.as_ref().unwrap();
    assert_eq!((core.life, core.child.pid, core.child.waiting.len()), (4, 101, 3));
    assert_eq!(core.child.waiting[2].1.len(), 2);
    assert!(core.ready.is_some() && core.dying.is_some() && core.started.elapsed() >= AGO);
    assert_eq!(
        (keeper.front.pid, keeper.front.waiting.len(), keeper.leaving.len()),
        (100, 3, 1)
    );
    assert_eq!((keeper.restarts.total(), keeper.restarts.quarantined()), (3, 1));
    assert_eq!(
        (keeper.vms.holding(10), keeper.vms.holding(11)),
        (Some("web"), Some("anon-1"))
    );
    assert_eq!(keeper.upgrades.report().unwrap().number, 3);
    assert_eq!(keeper.undead[0].fault(), Some("killed: it stood still"));
    assert_eq!(keeper.core_binary.path(), std::path::Path::new("/old/vmgmtd"));
    assert_eq!(keeper.listeners.keys().copied().collect::<Vec<_>>(), [1, 2]);
    assert!(keeper.front_ready && keeper.announced && keeper.front_sandbox.is_some());
    assert_eq!(keeper.notices.len() + keeper.session_states.len(), 3);
    assert_eq!(keeper.path, std::env::current_exe().unwrap());
    let packed = keeper.save().unwrap();
    let bytes = at_rest(&packed.bytes, packed.fds.len());
    assert!(
        VERSION > 1 || as_first(&bytes, packed.fds.len()) == golden,
        "it is not all kept"
    );
}

/// The same keeper with what later ones have, too.
fn later_scene() -> Keeper {
    let server = ServerConfig {
        control: "/nowhere/control.sock".into(),
        control_mode: 0o600,
        control_group: Some("kvm".into()),
        log: None,
        drain_deadline_ms: 2000,
    };
    let flags = crate::config::Flags {
        sockets: vec!["/nowhere/2.sock".into()],
        sandbox: Some(true),
        ..Default::default()
    };
    let file = Some("/etc/vmgmt/vmgmtd.toml".into());
    Keeper {
        undead_vms: [1, 7].into(),
        path: "/usr/local/bin/vmgmtd".into(),
        shares: Shares::of_opened([("/srv/a".into(), any()), ("/srv/b".into(), any())]),
        origin: Some((Source { file, flags }, server)),
        configured: [1, 2].into(),
        ..scene()
    }
}

#[test]
fn what_later_keepers_keep_is_read_and_written_as_it_was() {
    let scene = later_scene();
    let (bytes, fds) = saved(&scene);
    let shares = || -> Vec<OwnedFd> {
        let packed = scene.save().unwrap();
        let copies = packed.shares.iter().map(|fd| fd.try_clone_to_owned().unwrap());
        copies.collect()
    };
    let file = golden().with_file_name("keeper-state-v1-later.cbor");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&file, &bytes).unwrap();
    }
    let golden = std::fs::read(file).unwrap();
    // A program of the first days takes what is named by number, and finds no more.
    let first: SavedKeeper = packed::read(&golden, VERSION..=VERSION, fds.len()).unwrap();
    assert_eq!(first.named().len(), fds.len());
    let mut missing = shares();
    missing.pop();
    let refused = Keeper::restore(&golden, fds, missing, signals(), Box::new(|| ()));
    let text = refused.map(drop).unwrap_err().to_string();
    assert_eq!(text, "2 shares came with 1 directories");
    let (_, fds) = saved(&scene);
    let keeper = Keeper::restore(&golden, fds, shares(), signals(), Box::new(|| ())).unwrap();
    assert_eq!(keeper.undead_vms, [1, 7].into());
    assert_eq!(keeper.path, PathBuf::from("/usr/local/bin/vmgmtd"));
    assert_eq!(
        (&keeper.origin, &keeper.configured),
        (&scene.origin, &scene.configured)
    );
    assert!(
        keeper
            .shares
            .opened()
            .map(|(path, _)| path)
            .eq(scene.shares.opened().map(|(path, _)| path))
    );
    assert_eq!(saved(&keeper).0, golden, "it is not all kept");
}

// The keeper waits for the process.
#[allow(clippy::zombie_processes)]
#[test]
fn when_the_last_sleeper_is_gone_the_core_is_told_once() {
    let mut keeper = scene();
    keeper.undead_vms = [1].into();
    let told = |keeper: &mut Keeper| {
        let waiting = keeper.core.as_mut().unwrap().child.waiting.drain(..);
        let told = waiting.filter(
            |(message, _)| matches!(message, KeeperToCore::Done { request, .. } if *request == BURIED),
        );
        told.count()
    };
    let mut sleeper = child(97, vec![], None);
    // (A process that is this one's child and does not end: its pidfd says so.)
    let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    sleeper.pidfd = rustix::process::pidfd_open(
        rustix::process::Pid::from_child(&process),
        rustix::process::PidfdFlags::empty(),
    )
    .unwrap();
    keeper.undead = vec![sleeper];
    keeper.bury_undead();
    assert_eq!((told(&mut keeper), keeper.undead_vms.len()), (0, 1));
    process.kill().unwrap();
    while !keeper.undead.is_empty() {
        keeper.bury_undead();
    }
    assert_eq!((told(&mut keeper), keeper.undead_vms.len()), (1, 0));
    keeper.bury_undead();
    assert_eq!(told(&mut keeper), 0);
}

#[test]
fn another_version_and_descriptors_that_do_not_fit_are_refused_before_anything_is_taken_over() {
    let scene = scene();
    let restore = |bytes: &[u8], fds| {
        let restored = Keeper::restore(bytes, fds, Vec::new(), signals(), Box::new(|| ()));
        restored.map(drop).map_err(|error| error.to_string()).unwrap_err()
    };
    let (bytes, fds) = saved(&scene);
    let parsed: SavedKeeper = packed::read(&bytes, VERSION..=VERSION, fds.len()).unwrap();
    let later = packed::write(VERSION + 1, &parsed, fds.len()).unwrap();
    let text = format!(
        "has version {}; this program reads {VERSION_OLDEST} to {VERSION}",
        VERSION + 1
    );
    assert!(restore(&later, fds).contains(&text));
    let (bytes, mut fds) = saved(&scene);
    fds.pop();
    assert!(restore(&bytes, fds).contains("another number of descriptors"));
    let (_, fds) = saved(&scene);
    let mut parsed = parsed;
    parsed.session_states[0].1 = parsed.session_states[1].1;
    let twice = packed::write(VERSION, &parsed, fds.len()).unwrap();
    assert!(restore(&twice, fds).contains("named twice"));
    let cut: Result<SavedKeeper, Refusal> = packed::read(&bytes[..bytes.len() - 1], VERSION..=VERSION, 0);
    assert!(cut.is_err());
}
