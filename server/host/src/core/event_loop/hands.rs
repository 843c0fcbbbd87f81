//! What a core begins with: channels, pages, the hub's memory, workers, the event queue.
//!
//! In: the keeper's first packet. Out: [`Hands`], which the loop takes apart. Nothing here looks at what comes from a guest.

use super::*;

/// All that the core works with, before it has looked at anything that comes from a guest: after this no thread and no event queue
/// is made any more.
pub struct Hands {
    pub(super) keeper: Channel,
    pub(super) front: ManuallyDrop<Channel>,
    pub(super) wake: Wake,
    pub(super) hub_state: OwnedFd,
    pub(super) life: u64,
    pub(super) channel: u32,
    pub(super) config: CoreConfig,
    pub(super) store: Store,
    pub(super) poll: Poll,
    pub(super) operators: Operators,
    /// VMs for which workers of killed cores may still do something.
    pub(super) undead: BTreeSet<u64>,
    pub(super) reloads: bool,
}

impl Hands {
    /// Takes the keeper's first packet apart.
    ///
    /// # Errors
    /// A descriptor is missing or wrong.
    pub fn new(start: Start) -> anyhow::Result<Self> {
        if FORGETFUL {
            tracing::warn!(
                "built to measure what crash-consistency costs: what is in flight is lost with this core; never use this program"
            );
        }
        let Start {
            keeper,
            life,
            channel,
            config,
            fds,
            shares,
            umask,
            trial: _,
            undead,
            reloads,
        } = start;
        let Ok(
            [
                front,
                touched,
                life_page,
                core_wake,
                front_wake,
                hub_state,
                control,
            ],
        ) = <[OwnedFd; START_FDS]>::try_from(fds)
        else {
            bail!("Start came without its descriptors");
        };
        let touched = TouchedPage::new(MappedWords::read_only(&touched).context("the touched page")?);
        let life_page = LifePage::new(MappedWords::writable(&life_page).context("the life page")?);
        if !touched.is_valid() || !life_page.is_valid() {
            bail!("the pages of this core life are not of this version");
        }
        let front = ManuallyDrop::new(Channel::from_fd(front));
        let wake = Wake::new(touched, life_page, core_wake, front_wake);
        let store = Store::new(&config.shares, shares, config.workers as usize, umask)?;
        store.set_blame(wake.worker_blame());
        let poll = Poll::new().context("an event queue")?;
        let watch = |fd: i32, token, interest| poll.registry().register(&mut SourceFd(&fd), token, interest);
        watch(keeper.as_fd().as_raw_fd(), KEEPER, Interest::READABLE)?;
        watch(
            front.as_fd().as_raw_fd(),
            FRONT,
            Interest::READABLE | Interest::WRITABLE,
        )?;
        watch(wake.core_fd().as_raw_fd(), WAKE, Interest::READABLE)?;
        watch(store.wake_fd().as_raw_fd(), STORE, Interest::READABLE)?;
        let operators = Operators::new(control, poll.registry(), CONTROL).context("the control socket")?;
        Ok(Self {
            keeper,
            front,
            wake,
            hub_state,
            life,
            channel,
            config,
            store,
            poll,
            operators,
            undead,
            reloads,
        })
    }

    /// The keeper's channel.
    pub const fn keeper(&self) -> &Channel {
        &self.keeper
    }

    /// Number of this core life.
    pub const fn life(&self) -> u64 {
        self.life
    }
}
