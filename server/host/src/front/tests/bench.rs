//! The front in a thread, and the two roles that the test plays: the keeper and the core.

use crate::channel::{Channel, ChannelError, Packet};
use crate::config::{DeviceConfig, Identity, ListenerConfig};
use crate::messages::{CoreToFront, FrontToCore, FrontToKeeper, KeeperToFront};
use crate::sandbox::{Role, SandboxConfig};
use crate::words::{MappedWords, create_page};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use serde::de::DeserializeOwned;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::thread::JoinHandle;
use vmgmt_device::page::{CorePage, FrontPage, LifePage, TouchedPage};
use vmgmt_testkit::client::Client;

/// A wait longer than this is a failure.
const WAIT: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// Waits until the channel has a packet.
pub fn receive<T: DeserializeOwned>(channel: &Channel) -> Packet<T> {
    loop {
        match channel.receive() {
            Ok(Some(packet)) => return packet,
            Ok(None) => {
                let mut fds = [PollFd::new(channel, PollFlags::IN)];
                assert_ne!(poll(&mut fds, Some(&WAIT)).unwrap(), 0, "no packet came");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// A session as the keeper made it.
pub struct Admitted {
    pub session: u64,
    pub page: FrontPage<MappedWords>,
}

/// The front, its keeper and its listener.
pub struct Bench {
    pub keeper: Channel,
    pub path: PathBuf,
    pub thread: Option<JoinHandle<anyhow::Result<()>>>,
    _directory: tempfile::TempDir,
    pub maps_max: u32,
    device: DeviceConfig,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(DeviceConfig::default())
    }

    pub fn with(device: DeviceConfig) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let (keeper, front) = Channel::pair().unwrap();
        let off = SandboxConfig {
            enabled: false,
            front: None,
            core: None,
        };
        let entered = crate::sandbox::enter(Role::Front, &off, 0, &[]).unwrap();
        let thread = std::thread::spawn(move || super::super::run(front.into_fd(), entered));
        let maps_max = device.maps_max.min(1024);
        let listener = UnixListener::bind(&path).unwrap();
        let mut bench = Self {
            keeper,
            path: path.clone(),
            thread: Some(thread),
            _directory: directory,
            maps_max,
            device: DeviceConfig { maps_max, ..device },
        };
        assert!(matches!(bench.next(), FrontToKeeper::Ready));
        bench.listen(1, &path, listener.into());
        bench
    }

    /// Gives the front a socket, and keeps none of it.
    pub fn listen(&self, listener: u32, path: &Path, socket: OwnedFd) {
        let config = ListenerConfig {
            listener,
            path: path.to_owned(),
            mode: 0o600,
            group: None,
            identity: Identity::Vm { vm: 3 },
            device: self.device.clone(),
        };
        self.keeper
            .send(&KeeperToFront::Listen(config), b"", &[socket.as_fd()])
            .unwrap();
    }

    /// The next thing that the front says, but of its sandbox, and of a core that seems to stand still: a test's own thread may have to wait
    /// for a processor longer than the front for the core that it plays.
    pub fn next(&mut self) -> FrontToKeeper {
        loop {
            let said = self.next_of_all();
            if !matches!(said, FrontToKeeper::CoreStuck { .. }) {
                return said;
            }
        }
    }

    /// Waits until the front says that the core of this life is stuck.
    pub fn stuck(&mut self, life: u64) {
        loop {
            match self.next_of_all() {
                FrontToKeeper::CoreStuck { life: said, .. } if said == life => return,
                FrontToKeeper::CoreStuck { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn next_of_all(&mut self) -> FrontToKeeper {
        loop {
            let said = receive(&self.keeper).header;
            if !matches!(said, FrontToKeeper::Sandboxed(_)) {
                return said;
            }
        }
    }

    pub fn tell(&self, message: &KeeperToFront) {
        self.keeper.send(message, b"", &[]).unwrap();
    }

    /// The session number that the front asks to admit.
    pub fn asked(&mut self) -> u64 {
        match self.next() {
            FrontToKeeper::Admit {
                session,
                listener: 1,
                pid,
                ..
            } => {
                assert_eq!(pid, std::process::id() as i32);
                session
            }
            other => panic!("{other:?}"),
        }
    }

    /// Lets a session in.
    pub fn admit(&self, session: u64) -> Admitted {
        let words = FrontPage::<MappedWords>::words_needed(self.maps_max as usize);
        let (writable, read_only) = create_page("front page", words).unwrap();
        let (state, _) = create_page("state", 512).unwrap();
        let page = FrontPage::new(MappedWords::read_only(&read_only).unwrap());
        let message = KeeperToFront::Admitted {
            session,
            vm: 3,
            name: "one".into(),
        };
        self.keeper
            .send(
                &message,
                b"",
                &[writable.as_fd(), read_only.as_fd(), state.as_fd()],
            )
            .unwrap();
        Admitted { session, page }
    }

    /// A client that is let in and has negotiated.
    pub fn client(&mut self) -> (Client, Admitted) {
        let mut client = Client::connect(&self.path).unwrap();
        let session = self.asked();
        let admitted = self.admit(session);
        client.negotiate().unwrap();
        (client, admitted)
    }

    /// Begins a core life.
    pub fn core(&self, life: u64) -> Core {
        let (ours, theirs) = Channel::pair().unwrap();
        let (touched_rw, touched) = create_page("touched", TouchedPage::<MappedWords>::WORDS).unwrap();
        let (life_rw, life_ro) = create_page("life", LifePage::<MappedWords>::WORDS).unwrap();
        let page = LifePage::new(MappedWords::writable(&life_rw).unwrap());
        page.init();
        page.move_beat();
        let (wake_core, wake_front) = (eventfd(), eventfd());
        let theirs = theirs.into_fd();
        let fds = [
            theirs.as_fd(),
            touched_rw.as_fd(),
            life_ro.as_fd(),
            wake_core.as_fd(),
            wake_front.as_fd(),
        ];
        self.keeper
            .send(&KeeperToFront::Core { life }, b"", &fds)
            .unwrap();
        let touched = TouchedPage::new(MappedWords::read_only(&touched).unwrap());
        Core {
            life,
            channel: ours,
            touched,
            page,
            wake_core,
            wake_front,
        }
    }

    /// Ends the front in order.
    pub fn stop(mut self) {
        self.tell(&KeeperToFront::Stop);
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

fn eventfd() -> OwnedFd {
    vmgmt_testkit::client::eventfd().unwrap()
}

/// A core that the test plays.
pub struct Core {
    pub life: u64,
    pub channel: Channel,
    pub touched: TouchedPage<MappedWords>,
    pub page: LifePage<MappedWords>,
    wake_core: OwnedFd,
    wake_front: OwnedFd,
}

/// A session as the core was told of it.
pub struct Told {
    pub session: u64,
    pub slot: usize,
    pub front: FrontPage<MappedWords>,
    pub page: CorePage<MappedWords>,
}

impl Core {
    /// The next packet about clients; what the front says of its sandbox comes before.
    pub fn next(&self) -> Packet<FrontToCore> {
        loop {
            let packet = receive(&self.channel);
            if !matches!(packet.header, FrontToCore::Sandboxed(_)) {
                return packet;
            }
        }
    }

    /// What the front says next must be a session.
    pub fn session(&self) -> Told {
        let packet = self.next();
        let FrontToCore::Session { session, slot, vm: 3 } = packet.header else {
            panic!("{:?}", packet.header)
        };
        let page = CorePage::new(MappedWords::writable(&packet.fds[1]).unwrap());
        let front = FrontPage::new(MappedWords::read_only(&packet.fds[0]).unwrap());
        assert!(
            MappedWords::writable(&packet.fds[0]).is_err(),
            "the front page is for reading"
        );
        assert_eq!(
            (page.session(), page.life(), front.life()),
            (session, self.life, self.life)
        );
        Told {
            session,
            slot: slot as usize,
            front,
            page,
        }
    }

    pub fn adopted(&self) {
        assert!(matches!(self.next().header, FrontToCore::Adopted));
    }

    /// "Look at this session", by the scheme of the shared pages.
    pub fn kick(&self, slot: usize) {
        self.page.kick(slot);
        fence(Ordering::SeqCst);
        if self.touched.front_asleep() {
            rustix::io::write(&self.wake_front, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Sleeps until the front touches something behind `seen`; the new total.
    pub fn sleep(&self, seen: u64) -> u64 {
        self.page.set_core_asleep(true);
        fence(Ordering::SeqCst);
        while self.touched.total() == seen {
            let mut fds = [PollFd::new(&self.wake_core, PollFlags::IN)];
            assert_ne!(poll(&mut fds, Some(&WAIT)).unwrap(), 0, "no touch came");
            let mut count = [0; 8];
            rustix::io::read(&self.wake_core, &mut count).unwrap();
        }
        self.page.set_core_asleep(false);
        self.page.move_beat();
        self.touched.total()
    }

    pub fn send(&self, message: &CoreToFront, payload: &[u8]) {
        self.channel.send(message, payload, &[]).unwrap();
    }

    /// The front has closed its end.
    pub fn wait_closed(&self) {
        loop {
            match self.channel.receive::<FrontToCore>() {
                Err(ChannelError::Closed) => return,
                Ok(Some(_)) => {}
                Ok(None) => {
                    let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
                    assert_ne!(poll(&mut fds, Some(&WAIT)).unwrap(), 0, "the channel stays open");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
