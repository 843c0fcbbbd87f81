//! The front's side of one core life: its channel, the pages both share, waking it, and whether it is alive.
//!
//! In: what Core{life} brought. Out: packets, touches, wake-ups; "it is stuck". Must never know: a session's contents.
//!
//! The sleep scheme is in `vmgmt_device::page::shared`.

use super::limits::BEAT_NS_MAX;
use super::outbox::Outbox;
use crate::channel::Channel;
use crate::messages::FrontToCore;
use crate::words::MappedWords;
use anyhow::{Context, bail};
use rustix::fd::OwnedFd;
use vmgmt_device::Tick;
use vmgmt_device::page::{LifePage, TouchedPage};

/// One core life.
#[derive(Debug)]
pub struct CoreLink {
    pub life: u64,
    pub outbox: Outbox<FrontToCore>,
    /// The eventfd by which the core wakes us.
    pub wake_front: OwnedFd,
    pub(super) wake_core: OwnedFd,
    /// Descriptors of the two pages, for a hand-over.
    pub(super) page_fds: [OwnedFd; 2],
    pub(super) touched: TouchedPage<MappedWords>,
    pub(super) page: LifePage<MappedWords>,
    pub(super) kicks_seen: u64,
    /// The core owes something: its beat then, and since when it has stood still.
    pub(super) watch: Option<(u64, Tick)>,
    /// The same of the packets that it has taken, while some wait: one that beats and takes none holds up everybody as well.
    pub(super) queue_watch: Option<(u64, Tick)>,
    pub(super) told_stuck: bool,
}

impl CoreLink {
    /// Takes over what [`crate::messages::KeeperToFront::Core`] brought.
    ///
    /// # Errors
    /// Descriptors that are not as agreed.
    pub fn new(life: u64, fds: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let Ok([channel, touched_fd, page_fd, wake_core, wake_front]) = <[OwnedFd; 5]>::try_from(fds) else {
            bail!("core life {life} came without its five descriptors");
        };
        let touched = TouchedPage::new(MappedWords::writable(&touched_fd).context("the touched page")?);
        if !touched.is_valid() {
            touched.init();
        }
        let page = LifePage::new(MappedWords::read_only(&page_fd).context("the life page")?);
        Ok(Self {
            life,
            outbox: Outbox::new(Channel::from_fd(channel)),
            wake_front,
            wake_core,
            page_fds: [touched_fd, page_fd],
            kicks_seen: page.kicks().wrapping_sub(1),
            touched,
            page,
            watch: None,
            queue_watch: None,
            told_stuck: false,
        })
    }

    /// Words of the session in `slot` changed; wakes the core if it sleeps.
    pub fn touch(&mut self, now: Tick, slot: usize) {
        let beat = self.page.beat();
        self.touched.touch(slot);
        self.wake_after(now, beat);
    }

    /// Wakes the core if it sleeps, for what is about to be sent to it.
    pub fn wake(&mut self, now: Tick) {
        let beat = self.page.beat();
        self.wake_after(now, beat);
    }

    /// `beat`: from before the core could know. Read later, it could be the last one of a core that has seen everything and sleeps.
    fn wake_after(&mut self, now: Tick, beat: u64) {
        if self.page.must_wake_core() {
            // A full counter is as good as a signal.
            let _ = rustix::io::write(&self.wake_core, &1u64.to_ne_bytes());
        }
        // What was watched before is done when the beat has moved since; this is not.
        if self.watch.is_none_or(|(seen, _)| seen != beat) {
            self.watch = Some((beat, now));
        }
    }

    /// Whether the core kicked since the last call.
    pub fn take_kicks(&mut self) -> bool {
        let kicks = self.page.kicks();
        std::mem::replace(&mut self.kicks_seen, kicks) != kicks
    }

    /// The kick counter of a slot.
    pub fn kicked(&self, slot: usize) -> u64 {
        self.page.kicked(slot)
    }

    /// Says that we go to sleep. False: something came meanwhile, stay awake.
    pub fn fall_asleep(&self) -> bool {
        self.touched.front_falls_asleep(&self.page, self.kicks_seen)
    }

    pub fn wake_up(&self) {
        self.touched.set_front_asleep(false);
    }

    /// Looks at the beat, and at what waits. `owes`: something else than a touch is outstanding. True, once per life: one of them stands still
    /// for too long.
    ///
    /// A core that is awake owes a beat: what it has in hand may have come without a touch, as a ring's next submission does.
    pub fn is_stuck(&mut self, now: Tick, owes: bool) -> bool {
        // In this order: a core that is seen awake now beats once more when it falls asleep.
        let beat = self.page.beat();
        let owes = owes || !self.outbox.is_empty() || !self.page.core_asleep();
        // A core that has not beaten yet is being started; that is for the keeper to watch.
        let starts = beat == 0;
        let (gone, waits) = (self.outbox.gone(), !self.outbox.is_empty());
        let still = [
            stands_still(&mut self.watch, now, beat, owes, starts),
            stands_still(&mut self.queue_watch, now, gone, waits, starts),
        ];
        still.contains(&true) && !std::mem::replace(&mut self.told_stuck, true)
    }

    /// The sessions of which an object is still to be sent.
    pub fn objects_waiting(&self) -> impl Iterator<Item = u64> {
        self.outbox.waiting().filter_map(|header| match header {
            FrontToCore::Object { session, .. } => Some(*session),
            _ => None,
        })
    }

    /// When the beat is to be looked at again.
    pub fn deadline(&self) -> Tick {
        match self.watch {
            Some((_, since)) if !self.told_stuck => since.after_ns(BEAT_NS_MAX),
            _ => Tick::NEVER,
        }
    }

    /// The channel has ended or speaks nonsense; true the first time: the keeper is to be told.
    pub fn give_up(&mut self) -> bool {
        self.outbox.set_broken();
        !std::mem::replace(&mut self.told_stuck, true)
    }
}

/// Whether a count has stood still for too long. `owed`: it is to move; `excused`: but not yet.
fn stands_still(watch: &mut Option<(u64, Tick)>, now: Tick, count: u64, owed: bool, excused: bool) -> bool {
    match *watch {
        None if owed => *watch = Some((count, now)),
        None => {}
        Some((seen, _)) if seen != count => *watch = owed.then_some((count, now)),
        Some(_) if excused => *watch = Some((count, now)),
        // We did not look in time ourselves: the host was suspended, and the core with it.
        Some((_, since)) if now.since_ns(since) >= 2 * BEAT_NS_MAX => *watch = Some((count, now)),
        Some((_, since)) => return now.since_ns(since) >= BEAT_NS_MAX,
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::wake::Wake;
    use crate::words::create_page;
    use rustix::event::{EventfdFlags, eventfd};

    /// Enough to meet every step of a core that falls asleep, on a machine with two processors.
    const TOUCHES: u64 = 100_000;

    fn link() -> (CoreLink, LifePage<MappedWords>) {
        let (channel, _core) = Channel::pair().unwrap();
        let (touched, _) = create_page("touched", TouchedPage::<MappedWords>::WORDS).unwrap();
        let (life, life_read) = create_page("life", LifePage::<MappedWords>::WORDS).unwrap();
        let core = LifePage::new(MappedWords::writable(&life).unwrap());
        core.init();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let fds = vec![channel.into_fd(), touched, life_read, event(), event()];
        (CoreLink::new(1, fds).unwrap(), core)
    }

    #[test]
    fn a_touch_after_a_sign_of_life_is_watched_like_the_first() {
        let (mut link, core) = link();
        core.move_beat();
        link.touch(Tick(1), 0);
        // It does that, and has stood still since.
        core.move_beat();
        let touched = Tick(1).after_ns(BEAT_NS_MAX / 2);
        link.touch(touched, 0);
        assert!(!link.is_stuck(touched, false));
        assert!(
            !link.is_stuck(Tick(1).after_ns(BEAT_NS_MAX), false),
            "not from the first on"
        );
        assert_eq!(link.deadline(), touched.after_ns(BEAT_NS_MAX));
        assert!(link.is_stuck(touched.after_ns(BEAT_NS_MAX), false));
    }

    /// Touches that meet a core at any moment of its falling asleep: one that has seen them and sleeps has beaten since.
    #[test]
    fn a_core_that_has_seen_everything_and_sleeps_is_not_taken_for_stuck() {
        let (channel, _core) = Channel::pair().unwrap();
        let (touched, touched_read) = create_page("touched", TouchedPage::<MappedWords>::WORDS).unwrap();
        let (life, life_read) = create_page("life", LifePage::<MappedWords>::WORDS).unwrap();
        let page = LifePage::new(MappedWords::writable(&life).unwrap());
        page.init();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (wake_core, wake_front) = (event(), event());
        let mut core = Wake::new(
            TouchedPage::new(MappedWords::read_only(&touched_read).unwrap()),
            LifePage::new(MappedWords::writable(&life).unwrap()),
            wake_core.try_clone().unwrap(),
            wake_front.try_clone().unwrap(),
        );
        let fds = vec![channel.into_fd(), touched, life_read, wake_core, wake_front];
        let mut link = CoreLink::new(1, fds).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    core.beat();
                    core.is_touched();
                    if core.fall_asleep() {
                        let mut set = [rustix::event::PollFd::from_borrowed_fd(
                            core.core_fd(),
                            rustix::event::PollFlags::IN,
                        )];
                        rustix::event::poll(&mut set, None).unwrap();
                        core.wake_up();
                        core.drain();
                    }
                }
            });
            let mut stuck = None;
            for number in 1..=TOUCHES {
                link.touch(Tick(number), 0);
                let (beat, _) = link.watch.unwrap();
                let begin = std::time::Instant::now();
                while page.beat() == beat && stuck.is_none() {
                    std::hint::spin_loop();
                    stuck = (begin.elapsed() > std::time::Duration::from_secs(10)).then_some(number);
                }
                if stuck.is_some() {
                    break;
                }
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
            rustix::io::write(&link.wake_core, &1u64.to_ne_bytes()).unwrap();
            assert_eq!(stuck, None, "at this touch the beat stands still for ever");
        });
    }

    #[test]
    fn a_core_that_beats_and_takes_no_packets_is_stuck() {
        let (channel, taken) = Channel::pair().unwrap();
        let (mut link, core) = link();
        link.outbox = Outbox::new(channel);
        while link.outbox.len() < 2 {
            link.outbox.send(FrontToCore::Adopted, vec![0; 4096], Vec::new());
        }
        let mut time = Tick(1);
        let mut look = |link: &mut CoreLink| {
            core.move_beat();
            time = time.after_ns(BEAT_NS_MAX / 2);
            link.is_stuck(time, false)
        };
        for _ in 0..5 {
            // However slowly it takes them, it takes them.
            assert!(!look(&mut link));
            link.outbox.send(FrontToCore::Adopted, vec![0; 4096], Vec::new());
            taken.receive::<FrontToCore>().unwrap().unwrap();
            link.outbox.flush();
        }
        assert_eq!([(); 3].map(|()| look(&mut link)), [false, false, true]);
    }

    #[test]
    fn a_host_that_was_suspended_makes_no_core_stuck() {
        let (mut link, core) = link();
        core.move_beat();
        link.touch(Tick(1), 0);
        // Hours later; both go on, and the core is given as long as ever.
        let late = Tick(1).after_ns(3_600_000_000_000);
        assert!(!link.is_stuck(late, false));
        assert_eq!(link.deadline(), late.after_ns(BEAT_NS_MAX));
        assert!(
            link.is_stuck(late.after_ns(BEAT_NS_MAX), false),
            "it hangs all the same"
        );
    }

    #[test]
    fn a_core_that_hangs_awake_is_stuck_although_all_touches_were_seen_and_one_asleep_is_not() {
        for asleep in [false, true] {
            let (mut link, core) = link();
            core.move_beat();
            link.touch(Tick(1), 0);
            core.move_beat();
            core.set_core_asleep(asleep);
            let mut time = Tick(1);
            let mut stuck = false;
            for _ in 0..3 {
                time = time.after_ns(BEAT_NS_MAX);
                stuck |= link.is_stuck(time, false);
            }
            assert_eq!(stuck, !asleep);
            assert_eq!(link.deadline(), Tick::NEVER, "nothing is left to look at");
        }
    }
}
