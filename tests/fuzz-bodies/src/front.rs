//! The front as a whole, in this process: clients that send any bytes and descriptors, a core that writes and sends anything and dies, a keeper
//! that admits, refuses, quarantines and closes. Beside them a well-behaved client, which gets its right answers after every step. At the end
//! the front has stopped in order and holds no descriptor any more. (A panic that the front catches is a finding too: both ways to run this
//! make a panic anywhere end the process.)

mod core;

use self::core::Core;
use crate::edits::edge;
use crate::wire::{COMMANDS, body, message};
use arbitrary::{Result, Unstructured};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmgmt_device::Tick;
use vmgmt_device::page::{CorePage, FrontPage, Words};
use vmgmt_host::channel::Channel;
use vmgmt_host::config::{DeviceConfig, Identity, ListenerConfig};
use vmgmt_host::messages::{CoreToFront, FrontToKeeper, KeeperToFront};
use vmgmt_host::sandbox::{self, Role, SandboxConfig};
use vmgmt_host::words::{MappedWords, create_page};

/// Nothing here takes as long, on any machine: what does is a finding.
const WAIT: Duration = Duration::from_secs(60);
const MAPS: u32 = 16;
const HOSTILE: u32 = 1;
const HONEST: u32 = 2;

thread_local! {
    static SITE: OnceCell<Site> = const { OnceCell::new() };
}

/// What all runs share.
struct Site {
    listeners: [UnixListener; 2],
    addresses: [SocketAddr; 2],
    /// What hostile clients attach: memory, memory without a seal, an eventfd, a pipe, a directory.
    wares: Vec<OwnedFd>,
}

impl Site {
    fn new() -> Self {
        use rustix::event::{EventfdFlags, eventfd};
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        let address = |n: u32| {
            let name = format!(
                "vmgmt-fuzz-front-{n}-{}-{:?}",
                std::process::id(),
                std::thread::current().id()
            );
            SocketAddr::from_abstract_name(name).unwrap()
        };
        let addresses = [address(HOSTILE), address(HONEST)];
        let memory = |sealed: bool| {
            let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
            ftruncate(&fd, 1 << 18).unwrap();
            if sealed {
                fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
            }
            fd
        };
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        Self {
            listeners: addresses
                .each_ref()
                .map(|address| UnixListener::bind_addr(address).unwrap()),
            addresses,
            wares: vec![
                memory(true),
                eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap(),
                memory(false),
                pipe,
                std::fs::File::open("/").unwrap().into(),
            ],
        }
    }
}

/// Descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

struct Play<'a> {
    site: &'a Site,
    keeper: Channel,
    thread: JoinHandle<std::result::Result<(), String>>,
    clients: Vec<UnixStream>,
    /// Sessions that wait for the keeper, and all that live: number to listener.
    asked: Vec<u64>,
    admissions: u64,
    sessions: BTreeMap<u64, u32>,
    core: Option<Core>,
    lives: u64,
    honest: UnixStream,
    honest_session: u64,
    requests: u16,
}

pub fn run(bytes: &[u8]) {
    SITE.with(|site| {
        let site = site.get_or_init(Site::new);
        let before = descriptors();
        let mut u = Unstructured::new(bytes);
        let mut play = Play::new(site);
        let _ = play.play(&mut u);
        play.end();
        let after = descriptors();
        assert_eq!(before, after, "descriptors before and after");
    });
}

impl<'a> Play<'a> {
    fn new(site: &'a Site) -> Self {
        let (keeper, theirs) = Channel::pair().unwrap();
        let theirs = theirs.into_fd();
        let thread = std::thread::Builder::new()
            .name("front".into())
            .spawn(move || {
                // The fuzzer is this process: what a sandbox forbids is tested with real ones.
                let off = SandboxConfig {
                    enabled: false,
                    front: None,
                    core: None,
                };
                sandbox::enter(Role::Front, &off, 0, &[])
                    .and_then(|entered| vmgmt_host::front::run(theirs, entered))
                    .map_err(|error| format!("{error:#}"))
            })
            .unwrap();
        for (listener, socket) in (HOSTILE..).zip(&site.listeners) {
            let config = ListenerConfig {
                listener,
                path: "/nowhere".into(),
                mode: 0o600,
                group: None,
                identity: Identity::Vm { vm: listener.into() },
                device: DeviceConfig {
                    maps_max: MAPS,
                    objects_max: 4,
                    ..DeviceConfig::default()
                },
            };
            keeper
                .send(&KeeperToFront::Listen(config), b"", &[socket.as_fd()])
                .unwrap();
        }
        let honest = UnixStream::connect_addr(&site.addresses[1]).unwrap();
        honest.set_read_timeout(Some(WAIT)).unwrap();
        let mut play = Self {
            site,
            keeper,
            thread,
            clients: Vec::new(),
            asked: Vec::new(),
            admissions: 0,
            sessions: BTreeMap::new(),
            core: None,
            lives: 0,
            honest,
            honest_session: 0,
            requests: 0,
        };
        play.wait("the honest session", |play| play.honest_session != 0);
        play.admit(play.honest_session, HONEST.into(), MAPS);
        let mut body = vec![0; 4];
        body.extend(b"{}\0");
        let (error, _) = play.ask(1, &body);
        assert_eq!(error, 0);
        play
    }

    /// Takes what the front tells the keeper, until `done`.
    fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        loop {
            self.hear();
            if done(self) {
                return;
            }
            assert!(start.elapsed() < WAIT, "{what} does not come");
            assert!(
                !self.thread.is_finished(),
                "the front has ended while {what} was waited for"
            );
            std::thread::yield_now();
        }
    }

    fn hear(&mut self) {
        while let Ok(Some(packet)) = self.keeper.receive::<FrontToKeeper>() {
            match packet.header {
                FrontToKeeper::Ready | FrontToKeeper::CoreStuck { .. } | FrontToKeeper::Sandboxed(_) => {}
                FrontToKeeper::Admit {
                    session, listener, ..
                } => {
                    assert!(self.sessions.insert(session, listener).is_none());
                    self.admissions += 1;
                    if listener == HONEST {
                        self.honest_session = session;
                    } else {
                        self.asked.push(session);
                    }
                }
                FrontToKeeper::CanServe { .. }
                | FrontToKeeper::CannotHandOver { .. }
                | FrontToKeeper::Serves { .. } => panic!("nobody asked for a hand-over"),
                FrontToKeeper::SessionGone { session, .. } => {
                    assert!(self.sessions.remove(&session).is_some(), "gone once");
                    self.asked.retain(|asked| *asked != session);
                }
            }
        }
    }

    fn admit(&self, session: u64, vm: u64, maps: u32) {
        let (writable, read_only) = create_page(
            "front page",
            FrontPage::<MappedWords>::words_needed(maps as usize),
        )
        .unwrap();
        let (state, _) = create_page("state", 512).unwrap();
        let message = KeeperToFront::Admitted {
            session,
            vm,
            name: "name".into(),
        };
        self.keeper
            .send(
                &message,
                b"",
                &[writable.as_fd(), read_only.as_fd(), state.as_fd()],
            )
            .unwrap();
    }

    /// The honest client asks; the errno and the body of the answer.
    fn ask(&mut self, command: u16, body: &[u8]) -> (u32, Vec<u8>) {
        self.requests = self.requests.wrapping_add(1);
        let request = message(self.requests, command, 0, 0, body, None);
        assert!(
            send(&self.honest, &request, &[]),
            "the honest client is not heard"
        );
        loop {
            let mut header = [0; 16];
            self.honest
                .read_exact(&mut header)
                .expect("an answer for the honest client");
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let mut body = vec![0; word(4) as usize - 16];
            self.honest
                .read_exact(&mut body)
                .expect("an answer for the honest client");
            // Messages of the core (DMA) go to this client too: they are not answered, and harm nobody.
            if word(8) & 0xf == 1 {
                assert_eq!(word(0), u32::from(self.requests) | u32::from(command) << 16);
                return (word(12), body);
            }
        }
    }

    /// After every step: the neighbour reads its registers.
    fn check(&mut self) {
        for (offset, expected) in [
            (vmgmt_abi::registers::MAGIC, u64::from(vmgmt_abi::MAGIC)),
            (
                vmgmt_abi::registers::SESSION_LOW,
                self.honest_session & 0xffff_ffff,
            ),
        ] {
            let mut request = u64::from(offset).to_le_bytes().to_vec();
            request.extend([0, 0, 0, 0, 4, 0, 0, 0]);
            let (error, answer) = self.ask(9, &request);
            assert_eq!(error, 0);
            assert_eq!(
                u64::from(u32::from_le_bytes(answer[16..20].try_into().unwrap())),
                expected
            );
        }
        self.hear();
        // Hostile clients do not read, or the kernel's buffer would hold them up for ever; nothing of it matters.
        for client in &mut self.clients {
            let _ = client.read(&mut [0; 8192]);
        }
        if let Some(core) = &mut self.core {
            core.hear();
        }
    }

    fn play(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut steps = 0;
        while !u.is_empty() && steps < 60 {
            steps += 1;
            self.step(u)?;
            self.check();
        }
        Ok(())
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=19u8)? {
            0 if self.clients.len() < 4 => {
                let client = UnixStream::connect_addr(&self.site.addresses[0]).unwrap();
                client.set_nonblocking(true).unwrap();
                let known = self.admissions;
                self.clients.push(client);
                self.wait("a session", |play| play.admissions > known);
                if u.ratio(3, 4)? {
                    self.admit_some(u)?;
                    let mut body = vec![0; 4];
                    body.extend(b"{\"capabilities\":{\"write_multiple\":true}}\0");
                    let client = self.clients.last().unwrap();
                    send(client, &message(0, 1, 0, 0, &body, None), &[]);
                }
            }
            1 => self.admit_some(u)?,
            2 if u.ratio(1, 3)? && !self.clients.is_empty() => {
                let n = u.int_in_range(0..=self.clients.len() - 1)?;
                drop(self.clients.swap_remove(n));
            }
            3..=8 if !self.clients.is_empty() => {
                let n = u.int_in_range(0..=self.clients.len() - 1)?;
                let command = if u.ratio(1, 16)? {
                    u.arbitrary()?
                } else {
                    *u.choose(&COMMANDS)?
                };
                let flags = if u.ratio(1, 8)? { u.arbitrary()? } else { 0 };
                let body = body(u, command)?;
                let claimed = if u.ratio(1, 40)? {
                    Some(edge(u)? as u32)
                } else {
                    None
                };
                let mut bytes = message(u.arbitrary()?, command, flags, 0, &body, claimed);
                if u.ratio(1, 24)? {
                    bytes.truncate(u.int_in_range(0..=bytes.len())?);
                }
                let mut fds = Vec::new();
                for _ in 0..*u.choose(&[0u8, 1, 1, 2, 20])? {
                    fds.push(u.choose(&self.site.wares)?.as_fd());
                }
                send(&self.clients[n], &bytes, &fds);
            }
            9 if !self.clients.is_empty() => {
                let n = u.int_in_range(0..=self.clients.len() - 1)?;
                let bytes = u.bytes(u.len().min(64))?;
                send(&self.clients[n], bytes, &[]);
            }
            10 => self.core_life(u)?,
            11..=16 => self.core_acts(u)?,
            17 => {
                let session = self.any_session(u)?;
                self.tell(&KeeperToFront::Quarantine {
                    session,
                    quarantined: u.arbitrary()?,
                });
            }
            18 => match u.int_in_range(0..=3u8)? {
                0 => self.tell(&KeeperToFront::CloseVm { vm: HOSTILE.into() }),
                1 => self.tell(&KeeperToFront::CloseVm { vm: edge(u)?.max(3) }),
                2 => {
                    let session = self.any_session(u)?;
                    if session != self.honest_session {
                        self.tell(&KeeperToFront::Refused {
                            session,
                            reason: "refused".into(),
                        });
                    }
                }
                _ => self.tell(&KeeperToFront::CoreDead { life: edge(u)? }),
            },
            19 => self.core_freezes(u)?,
            _ => {}
        }
        Ok(())
    }

    /// Freezes, thaws, and what is to be kept, in any order, of any VM (also the honest one's: its registers answer), and many at once.
    fn core_freezes(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let vm = match u.int_in_range(0..=3u8)? {
            0 => edge(u)?,
            1 => HONEST.into(),
            _ => HOSTILE.into(),
        };
        let until = match u.int_in_range(0..=2u8)? {
            0 => None,
            1 => Some(Tick::NEVER),
            _ => Some(Tick(edge(u)?)),
        };
        let (kept, request, count) = (u.arbitrary()?, edge(u)?, *u.choose(&[1u64, 1, 2, 100])?);
        let Some(core) = &mut self.core else { return Ok(()) };
        core.hear();
        for number in 0..count {
            let header = CoreToFront::Freeze {
                vm: vm.wrapping_add(number),
                until,
                request: request.wrapping_add(number),
                kept,
            };
            let _ = core.channel.send(&header, b"", &[]);
        }
        Ok(())
    }

    fn tell(&self, message: &KeeperToFront) {
        self.keeper.send(message, b"", &[]).unwrap();
    }

    /// The honest session's too, for verdicts that must not change what it reads here.
    fn any_session(&self, u: &mut Unstructured<'_>) -> Result<u64> {
        let numbers: Vec<u64> = self.sessions.keys().copied().collect();
        Ok(if u.ratio(1, 8)? || numbers.is_empty() {
            edge(u)?
        } else {
            *u.choose(&numbers)?
        })
    }

    fn admit_some(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if self.asked.is_empty() {
            return Ok(());
        }
        let session = self.asked.swap_remove(u.int_in_range(0..=self.asked.len() - 1)?);
        if u.ratio(1, 10)? {
            self.tell(&KeeperToFront::Refused {
                session,
                reason: "no".into(),
            });
        } else {
            let maps = if u.ratio(1, 16)? { 0 } else { MAPS };
            self.admit(session, HOSTILE.into(), maps);
        }
        Ok(())
    }

    fn core_life(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let told = u.arbitrary()?;
        if let Some(core) = self.core.take()
            && told
        {
            let life = core.life;
            if u.arbitrary()? {
                drop(core);
            }
            self.tell(&KeeperToFront::CoreDead { life });
        }
        if self.lives < 4 {
            self.lives += 1;
            self.core = Some(Core::begin(self.lives, &self.keeper));
        }
        Ok(())
    }

    fn core_acts(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let session = self.any_session(u)?;
        let Some(core) = &mut self.core else { return Ok(()) };
        core.hear();
        match u.int_in_range(0..=6u8)? {
            0 => {
                let header = CoreToFront::DmaRead {
                    session,
                    request: edge(u)?,
                    fence: if u.arbitrary()? { u64::MAX } else { edge(u)? },
                    iova: edge(u)?,
                    bytes: edge(u)? as u32,
                };
                let _ = core.channel.send(&header, b"", &[]);
            }
            1 => {
                let header = CoreToFront::DmaWrite {
                    session,
                    request: edge(u)?,
                    fence: u64::MAX,
                    iova: edge(u)?,
                };
                let _ = core
                    .channel
                    .send(&header, &vec![1; u.int_in_range(0..=70_000)?], &[]);
            }
            2 => {
                if u.ratio(1, 4)? {
                    let bytes = u.bytes(u.len().min(32))?;
                    let _ = rustix::net::send(
                        core.channel.as_fd(),
                        bytes,
                        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
                    );
                }
            }
            3 => {
                if let Some(words) = core.pages.get(&session) {
                    words.store(u.int_in_range(0..=CorePage::<MappedWords>::WORDS)?, edge(u)?);
                }
            }
            4 => core.words.store(u.int_in_range(0..=80)?, edge(u)?),
            5 => {
                // What makes sense: fences pass, a port submission is answered.
                if let Some((slot, front)) = core.fronts.get(&session)
                    && let Some(words) = core.pages.get(&session)
                {
                    let page = CorePage::new(words.clone());
                    page.set_fenced(front.fence());
                    page.set_port_result(front.port_sequence(), &vec![9; u.int_in_range(0..=5000)?]);
                    core.page.kick(*slot);
                }
            }
            _ => {
                core.page.kick(u.int_in_range(0..=5)?);
                core.page.move_beat();
            }
        }
        core.kick();
        Ok(())
    }

    /// Stops the front in order: its clients leave, the core is dead, all sessions are told gone.
    fn end(mut self) {
        self.clients.clear();
        self.core = None;
        for life in 1..=self.lives {
            self.tell(&KeeperToFront::CoreDead { life });
        }
        self.check();
        self.tell(&KeeperToFront::Stop);
        let start = Instant::now();
        while !self.thread.is_finished() {
            self.hear();
            assert!(start.elapsed() < WAIT, "the front does not stop");
            std::thread::yield_now();
        }
        self.hear();
        self.thread
            .join()
            .expect("no panic")
            .expect("the front ends in order");
        assert!(
            self.sessions.is_empty(),
            "all sessions have ended: {:?}",
            self.sessions
        );
        // Who connected and was not accepted any more is nobody's.
        for listener in &self.site.listeners {
            listener.set_nonblocking(true).unwrap();
            while listener.accept().is_ok() {}
        }
    }
}

/// Sends at once, as much as goes; false: nobody hears.
fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    if bytes.is_empty() {
        return true;
    }
    let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )
    .is_ok()
}
