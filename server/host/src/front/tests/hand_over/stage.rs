//! A front that is turned by hand, with a keeper, a core and clients that the test plays; all that comes out of it is written down.

use crate::channel::Channel;
use crate::config::{DeviceConfig, Identity, ListenerConfig};
use crate::front::server::Front;
use crate::messages::{CoreToFront, FrontToCore, FrontToKeeper, KeeperToFront};
use crate::words::{MappedWords, create_page};
use mio::Events;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;
use vmgmt_device::page::{CorePage, FrontPage, LifePage, TouchedPage, Words};
use vmgmt_testkit::client::{QEMU_CAPABILITIES, encode};

/// Session numbers begin here, so that two runs have the same.
pub const FIRST_SESSION: u64 = 1000;

/// A client's end of its socket.
pub struct Peer {
    pub socket: UnixStream,
    pub admitted: bool,
    pub page: Option<FrontPage<MappedWords>>,
    words: Option<MappedWords>,
    /// All that came, read.
    pub came: Vec<u8>,
    /// It reads what comes.
    pub reads: bool,
    next_id: u16,
    /// Bytes of a message of which the rest is yet to be sent.
    pub unsent: Vec<u8>,
    answered: usize,
}

/// The core's end of one life.
pub struct Life {
    pub life: u64,
    pub channel: Channel,
    pub page: LifePage<MappedWords>,
    pub touched: TouchedPage<MappedWords>,
    /// By session number.
    pub pages: Vec<(u64, usize, CorePage<MappedWords>)>,
    pub takes: bool,
    _wake: [OwnedFd; 2],
}

pub struct Stage {
    pub front: Option<Front>,
    pub keeper: Channel,
    theirs: OwnedFd,
    pub path: std::path::PathBuf,
    _directory: tempfile::TempDir,
    pub listener: UnixListener,
    pub peers: Vec<Peer>,
    pub life: Option<Life>,
    pub lives: u64,
    pub memory: Vec<OwnedFd>,
    pub eventfds: Vec<OwnedFd>,
    /// Everything that the front said to the keeper and the core.
    pub story: Vec<String>,
    pub hand_overs: usize,
    next_request: u64,
}

/// A DMA_MAP of a page, for reading and writing.
pub fn map_body(iova: u64) -> Vec<u8> {
    let mut body: Vec<u8> = [32u32, 3].iter().flat_map(|word| word.to_le_bytes()).collect();
    for value in [0, iova, 0x1000] {
        body.extend_from_slice(&u64::to_le_bytes(value));
    }
    body
}

fn memfd(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

impl Stage {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let (keeper, theirs) = Channel::pair().unwrap();
        let theirs = theirs.into_fd();
        let listener = UnixListener::bind(&path).unwrap();
        let mut front = Front::new(Channel::from_fd(theirs.try_clone().unwrap())).unwrap();
        front.next_session = FIRST_SESSION;
        let mut stage = Self {
            front: Some(front),
            keeper,
            theirs,
            path,
            _directory: directory,
            listener,
            peers: Vec::new(),
            life: None,
            lives: 0,
            memory: (0..3).map(|_| memfd(1 << 20)).collect(),
            eventfds: (0..8)
                .map(|_| vmgmt_testkit::client::eventfd().unwrap())
                .collect(),
            story: Vec::new(),
            hand_overs: 0,
            next_request: 0,
        };
        let config = ListenerConfig {
            listener: 1,
            path: stage.path.clone(),
            mode: 0o600,
            group: None,
            identity: Identity::Vm { vm: 3 },
            device: DeviceConfig {
                maps_max: 64,
                ..DeviceConfig::default()
            },
        };
        let socket = stage.listener.as_fd().try_clone_to_owned().unwrap();
        stage.tell(&KeeperToFront::Listen(config), &[socket.as_fd()]);
        stage
    }

    pub fn tell(&mut self, message: &KeeperToFront, fds: &[BorrowedFd<'_>]) {
        self.keeper.send(message, b"", fds).unwrap();
        self.settle();
    }

    /// Turns until nothing more happens, and writes down what came of it.
    pub fn settle(&mut self) {
        let mut events = Events::with_capacity(64);
        let mut quiet = 0;
        for _ in 0..10_000 {
            if quiet == 2 {
                break;
            }
            let front = self.front.as_mut().unwrap();
            front.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
            front.turn(&events).unwrap();
            let idle = front.is_held_up() || (front.ready.is_empty() && front.adopting.is_none());
            let mut said = false;
            while let Some(packet) = self.keeper.receive::<FrontToKeeper>().unwrap() {
                said = true;
                self.heard(packet.header);
            }
            said |= self.core_hears();
            for peer in &mut self.peers {
                said |= peer.read();
            }
            quiet = if idle && !said && events.is_empty() {
                quiet + 1
            } else {
                0
            };
        }
        assert_eq!(quiet, 2, "the front never comes to rest");
    }

    fn heard(&mut self, message: FrontToKeeper) {
        match message {
            FrontToKeeper::Ready => {}
            FrontToKeeper::Admit {
                session, listener, ..
            } => self.story.push(format!("keeper: admit {session} by {listener}?")),
            other => self.story.push(format!("keeper: {other:?}")),
        }
    }

    /// What a descriptor is, in words that are the same in each run.
    fn name(&self, fd: &OwnedFd) -> String {
        let inode = |fd: &OwnedFd| fstat(fd).unwrap().st_ino;
        let memory = self.memory.iter().position(|memory| inode(memory) == inode(fd));
        let target = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        match memory {
            Some(number) => format!("ram {number}"),
            None => target.to_string_lossy().into_owned(),
        }
    }

    fn core_hears(&mut self) -> bool {
        let Some(life) = self.life.as_ref().filter(|life| life.takes) else {
            return false;
        };
        let mut heard = Vec::new();
        while let Ok(Some(packet)) = life.channel.receive::<FrontToCore>() {
            heard.push(packet);
        }
        let any = !heard.is_empty();
        for packet in heard {
            let names: Vec<_> = packet.fds.iter().map(|fd| self.name(fd)).collect();
            self.story.push(format!(
                "core: {:?} {:?} {names:?}",
                packet.header, packet.payload
            ));
            if let (FrontToCore::Session { session, slot, .. }, Some(life)) = (&packet.header, &mut self.life)
            {
                let page = CorePage::new(MappedWords::writable(&packet.fds[1]).unwrap());
                life.pages.push((*session, *slot as usize, page));
            }
        }
        any
    }

    /// The core takes one packet, which nobody looks at; whether there was one.
    pub fn take_one(&self) -> bool {
        let life = self.life.as_ref().unwrap();
        life.channel.receive::<FrontToCore>().unwrap().is_some()
    }

    // ---- clients

    pub fn connect(&mut self) -> usize {
        let socket = UnixStream::connect(&self.path).unwrap();
        socket.set_nonblocking(true).unwrap();
        self.peers.push(Peer {
            socket,
            admitted: false,
            page: None,
            words: None,
            came: Vec::new(),
            reads: true,
            next_id: 0,
            unsent: Vec::new(),
            answered: 0,
        });
        self.settle();
        self.peers.len() - 1
    }

    /// A client of a second listener.
    pub fn connect_to_another(&mut self) -> UnixStream {
        let path = self.path.with_extension("other");
        let listener = UnixListener::bind(&path).unwrap();
        let config = ListenerConfig {
            listener: 2,
            path: path.clone(),
            mode: 0o600,
            group: None,
            identity: Identity::Vm { vm: 4 },
            device: DeviceConfig::default(),
        };
        let client = UnixStream::connect(&path).unwrap();
        self.tell(&KeeperToFront::Listen(config), &[listener.as_fd()]);
        client
    }

    pub fn session(peer: usize) -> u64 {
        FIRST_SESSION + peer as u64
    }

    pub fn admit(&mut self, peer: usize) {
        if std::mem::replace(&mut self.peers[peer].admitted, true) {
            return;
        }
        let words = FrontPage::<MappedWords>::words_needed(64);
        let (writable, read_only) = create_page("front page", words).unwrap();
        let (state, _) = create_page("state", 512).unwrap();
        let page = MappedWords::read_only(&read_only).unwrap();
        self.peers[peer].page = Some(FrontPage::new(page.clone()));
        self.peers[peer].words = Some(page);
        let message = KeeperToFront::Admitted {
            session: Self::session(peer),
            vm: 3,
            name: format!("vm{peer}"),
        };
        self.tell(&message, &[writable.as_fd(), read_only.as_fd(), state.as_fd()]);
    }

    /// Sends the first part of a message with its descriptors; the rest is kept.
    pub fn begin(&mut self, peer: usize, command: u16, body: &[u8], fds: &[usize], memory: bool, cut: usize) {
        self.finish(peer);
        let peer = &mut self.peers[peer];
        let bytes = encode(peer.next_id, command, 0, body);
        peer.next_id = peer.next_id.wrapping_add(1);
        let from = if memory { &self.memory } else { &self.eventfds };
        let fds: Vec<_> = fds.iter().map(|fd| from[*fd].as_fd()).collect();
        let cut = cut.clamp(1, bytes.len());
        peer.send(&bytes[..cut], &fds);
        peer.unsent = bytes[cut..].to_vec();
        self.settle();
    }

    /// Sends the rest.
    pub fn finish(&mut self, peer: usize) {
        let rest = std::mem::take(&mut self.peers[peer].unsent);
        if !rest.is_empty() {
            self.peers[peer].send(&rest, &[]);
            self.settle();
        }
    }

    pub fn request(&mut self, peer: usize, command: u16, body: &[u8]) {
        self.begin(peer, command, body, &[], false, usize::MAX);
    }

    pub fn negotiate(&mut self, peer: usize) {
        let mut body = vec![0; 4];
        body.extend_from_slice(QEMU_CAPABILITIES.as_bytes());
        body.push(0);
        self.request(peer, 1, &body);
    }

    /// Answers the oldest DMA message that is not answered.
    pub fn answer_dma(&mut self, peer: usize) {
        if !self.peers[peer].unsent.is_empty() {
            return;
        }
        let asked = self.peers[peer].asked();
        if let Some((id, command, iova, bytes)) = asked.get(self.peers[peer].answered).copied() {
            self.peers[peer].answered += 1;
            let mut body = [iova.to_le_bytes(), bytes.to_le_bytes()].concat();
            if command == 11 {
                body.extend((0..bytes).map(|n| n as u8));
            }
            let reply = encode(id, command, 1, &body);
            self.peers[peer].send(&reply, &[]);
            self.settle();
        }
    }

    // ---- the core

    pub fn core_begins(&mut self) {
        if let Some(dead) = self.life.take() {
            self.tell(&KeeperToFront::CoreDead { life: dead.life }, &[]);
        }
        self.lives += 1;
        let life = self.lives;
        let (ours, theirs) = Channel::pair().unwrap();
        let (touched_rw, touched) = create_page("touched", TouchedPage::<MappedWords>::WORDS).unwrap();
        let (life_rw, life_ro) = create_page("life", LifePage::<MappedWords>::WORDS).unwrap();
        let page = LifePage::new(MappedWords::writable(&life_rw).unwrap());
        page.init();
        let wake = [(); 2].map(|()| vmgmt_testkit::client::eventfd().unwrap());
        let theirs = theirs.into_fd();
        self.life = Some(Life {
            life,
            channel: ours,
            page,
            touched: TouchedPage::new(MappedWords::read_only(&touched).unwrap()),
            pages: Vec::new(),
            takes: true,
            _wake: [wake[0].try_clone().unwrap(), wake[1].try_clone().unwrap()],
        });
        let fds = [
            theirs.as_fd(),
            touched_rw.as_fd(),
            life_ro.as_fd(),
            wake[0].as_fd(),
            wake[1].as_fd(),
        ];
        self.tell(&KeeperToFront::Core { life }, &fds);
    }

    /// Does something with the core page of a client, and kicks.
    pub fn with_page(&mut self, peer: usize, act: impl FnOnce(&CorePage<MappedWords>, u64)) {
        let Some(life) = &self.life else { return };
        let page = life
            .pages
            .iter()
            .find(|(session, ..)| *session == Self::session(peer));
        if let (Some((_, slot, page)), Some(front)) = (page, &self.peers[peer].page) {
            act(page, front.fence());
            life.page.kick(*slot);
            self.settle();
        }
    }

    pub fn core_asks(&mut self, peer: usize, write: bool) {
        let Some(life) = &self.life else { return };
        let (session, request) = (Self::session(peer), self.next_request);
        self.next_request += 1;
        let (fence, iova) = (u64::MAX, 0x40 * request);
        let (message, payload) = if write {
            (
                CoreToFront::DmaWrite {
                    session,
                    request,
                    fence,
                    iova,
                },
                vec![7; 9],
            )
        } else {
            (
                CoreToFront::DmaRead {
                    session,
                    request,
                    fence,
                    iova,
                    bytes: 5,
                },
                vec![],
            )
        };
        if life.channel.send(&message, &payload, &[]).is_ok() {
            self.settle();
        }
    }

    // ---- the hand-over

    /// Everything goes to a new front in this process.
    pub fn hand_over(&mut self) {
        let old = self.front.take().unwrap();
        let (bytes, fds) = old.save().unwrap();
        let copies = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        let mut new = Front::new(Channel::from_fd(self.theirs.try_clone().unwrap())).unwrap();
        new.restore(&bytes, copies).unwrap();
        // Whatever can be packed comes back the same.
        let (again, _) = new.save().unwrap();
        assert!(bytes == again, "a second packing differs");
        drop(old);
        // As when the keeper has said that it serves.
        new.give_up_lost();
        self.front = Some(new);
        self.hand_overs += 1;
        self.settle();
    }

    /// All that can be seen from outside.
    pub fn seen(&mut self) -> String {
        for peer in 0..self.peers.len() {
            self.finish(peer);
            self.peers[peer].reads = true;
        }
        if let Some(life) = &mut self.life {
            life.takes = true;
        }
        self.settle();
        // Packets wait for the channel as long as the clock says: until all are there.
        while self
            .front
            .as_ref()
            .unwrap()
            .core
            .as_ref()
            .is_some_and(|core| !core.outbox.is_empty())
        {
            self.settle();
        }
        let mut seen = self.story.join("\n");
        for (number, peer) in self.peers.iter().enumerate() {
            seen += &format!("\nclient {number}: {:02x?}", peer.came);
            if let Some(words) = &peer.words {
                let all: Vec<u64> = (0..words.len()).map(|index| words.load(index)).collect();
                seen += &format!("\npage {number}: {all:x?}");
            }
        }
        if let Some(life) = &self.life {
            seen += &format!("\ntouched: {}", life.touched.total());
        }
        for (number, fd) in self.eventfds.iter().enumerate() {
            let mut count = [0; 8];
            let signals = match rustix::io::read(fd, &mut count) {
                Ok(_) => u64::from_ne_bytes(count),
                Err(_) => 0,
            };
            seen += &format!("\neventfd {number}: {signals}");
        }
        seen
    }
}

impl Peer {
    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        // A closed socket is part of the story, a full one is not met here.
        match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
            Ok(sent) => assert_eq!(sent, bytes.len()),
            Err(Errno::PIPE | Errno::CONNRESET) => {}
            Err(errno) => panic!("{errno}"),
        }
    }

    fn read(&mut self) -> bool {
        let mut any = false;
        let mut buffer = vec![0; 1 << 16];
        while self.reads {
            match recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, bytes @ 1..)) => {
                    self.came.extend_from_slice(&buffer[..bytes]);
                    any = true;
                }
                Ok(_) => {
                    self.came.extend_from_slice(b"closed");
                    self.reads = false;
                }
                Err(_) => break,
            }
        }
        any
    }

    /// The DMA messages that came: id, command, address, bytes.
    fn asked(&self) -> Vec<(u16, u16, u64, u64)> {
        let mut asked = Vec::new();
        let mut at = 0;
        let word = |at: usize, bytes: usize| {
            let part = self.came.get(at..at + bytes)?;
            Some(
                part.iter()
                    .rev()
                    .fold(0, |value: u64, byte| value << 8 | u64::from(*byte)),
            )
        };
        while let (Some(id), Some(command), Some(size), Some(flags)) =
            (word(at, 2), word(at + 2, 2), word(at + 4, 4), word(at + 8, 4))
        {
            if let (0, 11 | 12, Some(iova), Some(bytes)) =
                (flags & 1, command, word(at + 16, 8), word(at + 24, 8))
            {
                asked.push((id as u16, command as u16, iova, bytes));
            }
            at += size as usize;
        }
        asked
    }
}
