//! The core that the front's target plays: it hears what the front says, and can be made to write and send anything.

use rustix::fd::{AsFd, OwnedFd};
use std::collections::BTreeMap;
use vmgmt_device::page::{FrontPage, LifePage, TouchedPage};
use vmgmt_host::channel::{Channel, ChannelError};
use vmgmt_host::messages::{FrontToCore, KeeperToFront};
use vmgmt_host::words::{MappedWords, create_page};

/// A core life that the input plays.
pub struct Core {
    pub life: u64,
    pub channel: Channel,
    pub page: LifePage<MappedWords>,
    pub words: MappedWords,
    pub wake_front: OwnedFd,
    _wake_core: OwnedFd,
    /// Core pages by session.
    pub pages: BTreeMap<u64, MappedWords>,
    pub fronts: BTreeMap<u64, (usize, FrontPage<MappedWords>)>,
}

impl Core {
    pub fn begin(life: u64, keeper: &Channel) -> Self {
        use rustix::event::{EventfdFlags, eventfd};
        let eventfd = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let (channel, theirs) = Channel::pair().unwrap();
        let (touched, _) = create_page("touched", TouchedPage::<MappedWords>::WORDS).unwrap();
        let (life_rw, life_ro) = create_page("life", LifePage::<MappedWords>::WORDS).unwrap();
        let words = MappedWords::writable(&life_rw).unwrap();
        let page = LifePage::new(words.clone());
        page.init();
        page.move_beat();
        let (wake_core, wake_front) = (eventfd(), eventfd());
        let theirs = theirs.into_fd();
        let fds = [
            theirs.as_fd(),
            touched.as_fd(),
            life_ro.as_fd(),
            wake_core.as_fd(),
            wake_front.as_fd(),
        ];
        keeper.send(&KeeperToFront::Core { life }, b"", &fds).unwrap();
        Self {
            life,
            channel,
            page,
            words,
            wake_front,
            _wake_core: wake_core,
            pages: BTreeMap::new(),
            fronts: BTreeMap::new(),
        }
    }

    pub fn hear(&mut self) {
        loop {
            match self.channel.receive::<FrontToCore>() {
                Ok(Some(packet)) => {
                    if let FrontToCore::Session { session, slot, .. } = packet.header {
                        let front = FrontPage::new(MappedWords::read_only(&packet.fds[0]).unwrap());
                        self.fronts.insert(session, (slot as usize, front));
                        self.pages
                            .insert(session, MappedWords::writable(&packet.fds[1]).unwrap());
                    }
                }
                Ok(None) | Err(ChannelError::Closed) => return,
                Err(error) => panic!("the front sent nonsense: {error}"),
            }
        }
    }

    pub fn kick(&self) {
        let _ = rustix::io::write(&self.wake_front, &1u64.to_ne_bytes());
    }
}
