//! The PCI function of one session: its verbs.
//!
//! In: [`Input`]. Out: [`Output`], words on the front page. Must never know: a descriptor, a clock, who the client is.

use super::config_space::ConfigSpace;
use super::dma_table::{DmaTable, MapObject, Mapped};
use super::fences::{AttachedCore, Cores, Held, HeldReplies, HeldReply};
use super::interrupts::{Interrupts, IrqEffects};
use super::limits;
use super::msix_table::MsixTable;
use super::port_window::PortWindow;
use super::settings::{Settings, SettingsError};
use crate::page::{CorePage, FrontPage, Interrupts as Kind, RingSetup, Words, rights};
use crate::tick::Tick;
use std::collections::VecDeque;
use vmgmt_abi::Status;
use vmgmt_abi::registers::{RingState, VECTORS_MAX};
use vmgmt_wire::uapi::*;
use vmgmt_wire::{
    Command, DeviceInfo, DmaMap, DmaUnmap, Errno, FdSlot, IrqOperation, Reply, ReplyHandle, SetIrqs,
};

/// What comes in.
#[derive(Debug)]
pub enum Input<W: Words> {
    /// A request of the client; VERSION and DMA_MAP are not for here.
    Command { handle: ReplyHandle, command: Command },
    /// DMA_MAP with its descriptor interned; the core has been sent the object, or will get all of them.
    Map {
        handle: ReplyHandle,
        map: DmaMap,
        object: Option<MapObject>,
    },
    /// A core life begins; `page` is the session's fresh core page.
    CoreBegins { life: u64, page: W },
    /// That life is dead for guest memory.
    CoreDead { life: u64 },
    /// The core asks to look at its page.
    Kicked,
    /// The client signalled the eventfd that unmasks INTx.
    UnmaskSignalled,
    /// The operator stops (or lets go on) all DMA.
    Freeze(bool),
    /// The operator's or keeper's verdict: the device has failed until it is released.
    Quarantine(bool),
    /// The session ends; [`Output::Gone`] follows when no DMA goes on.
    Gone,
}

/// What goes out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    Reply {
        handle: ReplyHandle,
        reply: Reply,
    },
    /// A reply that would come too late is not to be sent at all.
    GiveUp {
        handle: ReplyHandle,
    },
    /// Words that the core looks at have changed.
    Touched,
    /// Signal this eventfd.
    Signal(FdSlot),
    /// Nobody's any more: close it.
    Close(FdSlot),
    /// The message vectors' eventfds, as the core is to know them.
    Vectors {
        present: u32,
        eventfds: Vec<FdSlot>,
    },
    /// The client unmasks INTx by this eventfd from now on.
    WatchUnmask(Option<FdSlot>),
    /// No map names this object any more.
    ObjectGone(u64),
    /// The session's DMA is over: everything of it may be freed.
    Gone,
}

/// A ring's registers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Ring {
    /// What the guest wrote; `epoch` as published.
    pub setup: RingSetup,
    pub enabled: bool,
    /// The fence behind which the closed ring's DMA is over.
    pub closing: Option<u64>,
    /// The core's last answer to this epoch.
    pub answer: Option<(RingState, Status)>,
}

impl Ring {
    /// Closes an enabled ring on the front page (its fence is the caller's).
    pub fn close<W: Words>(&mut self, n: usize, page: &FrontPage<W>) {
        self.enabled = false;
        self.answer = None;
        self.setup.epoch = page.set_ring(
            n,
            &RingSetup {
                enabled: false,
                ..self.setup
            },
        );
    }
}

/// The function.
#[derive(Debug)]
pub struct Function<W: Words> {
    pub(super) settings: Settings,
    pub(super) page: FrontPage<W>,
    pub(super) cores: Cores<W>,
    pub(super) config: ConfigSpace,
    pub(super) interrupts: Interrupts,
    pub(super) msix: MsixTable,
    pub(super) table: DmaTable,
    pub(super) port: PortWindow,
    pub(super) rings: Vec<Ring>,
    pub(super) interrupt_enable: u32,
    pub(super) host_page: u64,
    pub(super) bad_accesses: u32,
    /// A ring was enabled since the last reset.
    pub(super) activated: bool,
    /// What the core said when it failed the device.
    pub(super) failed: Option<Status>,
    pub(super) frozen: bool,
    pub(super) quarantined: bool,
    /// Replies that wait for a fence.
    pub(super) held: HeldReplies,
    /// The last reset's fence, until it has passed and the client has answered all messages of before.
    pub(super) reset_fence: Option<u64>,
    /// [`Function::set_messages_out`].
    pub(super) messages_out: bool,
    /// The session's end: its fence, until that has passed.
    pub(super) gone_fence: Option<u64>,
    /// The session has ended.
    pub(super) gone: bool,
    pub(super) touched: bool,
    pub(super) output: VecDeque<Output>,
    /// When something that waits is to be looked at again.
    pub(super) look_again: Tick,
}

impl<W: Words> Function<W> {
    /// A function as after power-on, on a fresh front page.
    ///
    /// # Errors
    /// A setting out of its range.
    pub fn new(settings: Settings, words: W) -> Result<Self, SettingsError> {
        settings.check()?;
        let page = FrontPage::new(words);
        page.init(settings.session, settings.vm);
        page.set_interrupts(Kind::None);
        let maps_max = page.maps_max().min(settings.maps_max as usize);
        Ok(Self {
            config: ConfigSpace::new(&settings),
            interrupts: Interrupts::new(settings.msix, settings.vectors),
            msix: MsixTable::new(settings.vectors),
            table: DmaTable::new(maps_max, settings.mapped_bytes_max, settings.objects_max as usize),
            port: PortWindow::default(),
            rings: vec![Ring::default(); usize::from(settings.rings)],
            cores: Cores::new(Vec::new()),
            interrupt_enable: 0,
            host_page: 0,
            bad_accesses: 0,
            activated: false,
            failed: None,
            frozen: false,
            quarantined: false,
            held: HeldReplies::new(),
            reset_fence: None,
            messages_out: false,
            gone_fence: None,
            gone: false,
            touched: false,
            output: VecDeque::new(),
            look_again: Tick::NEVER,
            settings,
            page,
        })
    }

    /// Takes one input. Everything it leads to is in [`Function::poll_output`] and on the front page.
    pub fn handle(&mut self, now: Tick, input: Input<W>) {
        match input {
            Input::Command { handle, command } => self.command(now, handle, command),
            Input::Map { handle, map, object } => {
                let reply = self.map(&map, object);
                self.answer(handle, reply.map(|()| Reply::Done));
            }
            Input::CoreBegins { life, page } => self.core_begins(life, page),
            Input::CoreDead { life } => self.cores.detach(life),
            Input::Kicked => self.take_port_result(),
            Input::UnmaskSignalled => self.interrupts.unmask_intx(),
            Input::Freeze(frozen) => {
                self.frozen = frozen;
                self.publish_control();
            }
            Input::Quarantine(quarantined) => {
                self.quarantined = quarantined;
                self.publish_control();
            }
            Input::Gone => self.end(),
        }
        self.settle(now);
    }

    /// Looks at what waits, when [`Function::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Tick) {
        self.take_port_result();
        self.settle(now);
    }

    /// Whether the client was sent DMA messages that it has not answered, given up or not: each may still be carried out. To be told before
    /// each input; a reset is over only without them (docs/abi.md, "Reset").
    pub const fn set_messages_out(&mut self, messages_out: bool) {
        self.messages_out = messages_out;
    }

    /// When [`Function::handle_timeout`] is to be called; [`Tick::NEVER`] while nothing waits.
    pub const fn poll_timeout(&self) -> Tick {
        self.look_again
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        if std::mem::take(&mut self.touched) {
            return Some(Output::Touched);
        }
        self.output.pop_front()
    }

    /// Whether a map could be added now, before its object is told to the core. `object` is 0 where there is none.
    ///
    /// # Errors
    /// What the client is to be told.
    pub fn check_map(&self, map: &DmaMap, object: u64) -> Result<(), Errno> {
        if self.gone {
            Err(Errno::ENODEV)
        } else {
            self.table.check(map.range, object)
        }
    }

    /// Whether a map names the object.
    pub fn uses_object(&self, object: u64) -> bool {
        self.table.uses_object(object)
    }

    /// All maps, by address.
    pub fn maps(&self) -> impl Iterator<Item = &Mapped> {
        self.table.maps()
    }

    /// Something waits for a core. A reset that waits for the client's answers is looked at again when the guest reads STATE.
    pub fn waits_for_core(&self) -> bool {
        !self.held.is_empty()
            || self.reset_fence.is_some() && !self.messages_out
            || self.gone_fence.is_some()
            || self.rings_closing()
    }

    /// Message vectors that have an eventfd, as a mask, and those eventfds in order.
    pub fn vectors(&self) -> (u32, Vec<FdSlot>) {
        self.interrupts.vectors()
    }

    /// Every eventfd the function holds.
    pub fn eventfds(&self) -> Vec<FdSlot> {
        self.interrupts.all().collect()
    }

    /// The front page's fence: a higher value than before means that message DMA which was asked for before is void.
    pub fn fence(&self) -> u64 {
        self.page.fence()
    }

    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    fn command(&mut self, now: Tick, handle: ReplyHandle, command: Command) {
        let reply = match command {
            Command::DmaUnmap(unmap) => return self.unmap(now, handle, unmap),
            Command::RegionWrite(write) => return self.region_write(now, handle, &write),
            Command::RegionWriteMulti(writes) => return self.region_writes(now, handle, &writes),
            Command::DeviceReset => {
                self.function_reset();
                return self.hold(now, handle, HeldReply::Done);
            }
            Command::DeviceGetInfo => Ok(Reply::DeviceInfo(DeviceInfo {
                flags: VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI,
                regions: VFIO_PCI_NUM_REGIONS,
                irqs: VFIO_PCI_NUM_IRQS,
            })),
            Command::DeviceGetRegionInfo { region } => self.region_info(region).map(Reply::RegionInfo),
            Command::DeviceGetRegionIoFds { region } => {
                self.region_info(region).map(|_| Reply::RegionIoFds { region })
            }
            Command::DeviceGetIrqInfo { index } => self.interrupts.info(index).map(Reply::IrqInfo),
            Command::DeviceSetIrqs(request) => self.set_irqs(&request).map(|()| Reply::Done),
            Command::RegionRead(access) => self
                .region_read(access)
                .map(|data| Reply::RegionRead { access, data }),
            Command::DeviceFeature(_) => Err(Errno::EOPNOTSUPP),
            Command::DmaMap(map) => {
                self.output.extend(map.descriptor.map(Output::Close));
                Err(Errno::EINVAL)
            }
            Command::Version(_) => Err(Errno::EINVAL),
        };
        self.answer(handle, reply);
    }

    // ---- DMA maps

    fn map(&mut self, map: &DmaMap, object: Option<MapObject>) -> Result<(), Errno> {
        if self.gone {
            return Err(Errno::ENODEV);
        }
        let mut wanted = 0;
        if map.readable {
            wanted |= rights::READ;
        }
        if map.writable {
            wanted |= rights::WRITE;
        }
        let mapped = self.table.map(map, wanted, object)?;
        self.page.set_map(mapped.slot, Some(&mapped.record));
        self.touched = true;
        Ok(())
    }

    fn unmap(&mut self, now: Tick, handle: ReplyHandle, unmap: DmaUnmap) {
        let maps = match unmap {
            DmaUnmap::Range(range) => match self.table.unmap(range) {
                Ok(maps) => maps,
                Err(errno) => return self.answer(handle, Err(errno)),
            },
            DmaUnmap::All => self.table.unmap_all(),
        };
        if maps.is_empty() {
            return self.answer(handle, Ok(Reply::DmaUnmap(unmap)));
        }
        let mut objects: Vec<u64> = maps.iter().map(|mapped| mapped.record.object).collect();
        objects.sort_unstable();
        objects.dedup();
        for mapped in &maps {
            self.page.set_map(mapped.slot, None);
        }
        let gone = objects
            .into_iter()
            .filter(|object| *object != 0 && !self.table.uses_object(*object));
        self.output.extend(gone.map(Output::ObjectGone));
        self.page.move_fence();
        self.touched = true;
        self.hold(now, handle, HeldReply::DmaUnmap(unmap));
    }

    // ---- interrupts

    fn set_irqs(&mut self, request: &SetIrqs) -> Result<(), Errno> {
        let effects = match self.interrupts.set(request) {
            Ok(effects) => effects,
            Err(errno) => {
                if let IrqOperation::Assign { eventfds, .. } = &request.operation {
                    self.output.extend(eventfds.iter().copied().map(Output::Close));
                }
                return Err(errno);
            }
        };
        let kind = self.interrupts.kind();
        // Masks and signals are the front's own affair: QEMU unmasks INTx after each interrupt.
        self.touched |= self.page.interrupts() != kind;
        self.page.set_interrupts(kind);
        let IrqEffects {
            close,
            signal,
            vectors_changed,
            unmask_changed,
        } = effects;
        self.output.extend(signal.into_iter().map(Output::Signal));
        if vectors_changed {
            let (present, eventfds) = self.interrupts.vectors();
            self.output.push_back(Output::Vectors { present, eventfds });
            self.page.move_vectors_changed();
            self.touched = true;
        }
        if unmask_changed {
            self.output
                .push_back(Output::WatchUnmask(self.interrupts.intx_unmask()));
        }
        // Last, so that nobody is handed a descriptor that was closed.
        self.output.extend(close.into_iter().map(Output::Close));
        Ok(())
    }

    /// Something is pending that INTx is enabled for.
    fn intx_level(&self) -> bool {
        self.pending() & self.interrupt_enable != 0
    }

    /// STATUS bit 3: INTx would be asserted, were it allowed, or the client still holds the line up.
    pub(super) fn intx_status(&self) -> bool {
        self.intx_level() || self.interrupts.intx_signalled()
    }

    /// Signals INTx when its level is up and nothing hinders; then it is masked until the client unmasks it.
    fn update_intx(&mut self) {
        if self.interrupts.intx_masked || self.interrupts.kind() != Kind::Intx {
            return;
        }
        if self.config.may_assert_intx() && self.intx_level() {
            let signal = self.interrupts.signal_intx();
            self.output.extend(signal.map(Output::Signal));
        }
    }

    // ---- end, core lives

    fn end(&mut self) {
        if self.gone {
            return;
        }
        self.gone = true;
        self.publish_control();
        // Nobody is there to be answered.
        self.held.clear();
        self.gone_fence = Some(self.page.fence());
    }

    fn core_begins(&mut self, life: u64, words: W) {
        if self.cores.all().len() >= limits::CORE_LIVES_MAX {
            // The keeper begins a life only when the one before is dead for guest memory; this bounds its mistakes.
            let oldest = self.cores.all().first().map(|core| core.life);
            oldest.into_iter().for_each(|life| self.cores.detach(life));
        }
        let page = CorePage::new(words);
        page.init(self.settings.session, life);
        // What was raised and not acknowledged in the life before is raised again by the new core: a page of zeros would
        // show every vector as pending that was ever acknowledged.
        for vector in 0..VECTORS_MAX {
            page.set_raise(vector, self.page.ack(vector));
        }
        self.page.set_life(life);
        self.cores.attach(AttachedCore {
            life,
            page,
            passed: self.page.fence(),
        });
        self.touched = true;
    }

    // ---- fences and replies

    /// Looks at the core pages and lets go what waited for fences that have passed.
    pub(super) fn observe_fences(&mut self) {
        if !self.waits_for_core() {
            return;
        }
        let passed = self.cores.observe(self.page.fence());
        while let Some(held) = self.held.pop_front_if(|held| held.fence <= passed) {
            self.output.push_back(Output::Reply {
                handle: held.handle,
                reply: held.reply.into(),
            });
        }
        let cores = &self.cores;
        for (n, ring) in self.rings.iter_mut().enumerate() {
            let epoch = ring.setup.epoch;
            ring.closing = ring
                .closing
                .filter(|fence| *fence > passed || !cores.have_closed(n, epoch));
        }
        let messages_out = self.messages_out;
        self.reset_fence = self.reset_fence.filter(|fence| *fence > passed || messages_out);
        if self.gone_fence.is_some_and(|fence| fence <= passed) {
            self.gone_fence = None;
            self.output.push_back(Output::Gone);
        }
    }

    fn rings_closing(&self) -> bool {
        self.rings.iter().any(|ring| ring.closing.is_some())
    }

    /// Answers when all that was fenced so far has ended.
    pub(super) fn hold(&mut self, now: Tick, handle: ReplyHandle, reply: HeldReply) {
        if !handle.no_reply && !self.gone {
            self.held.push_back(Held {
                handle,
                reply,
                fence: self.page.fence(),
                arrival: now,
            });
        }
    }

    pub(super) fn answer(&mut self, handle: ReplyHandle, reply: Result<Reply, Errno>) {
        if !handle.no_reply {
            let reply = reply.unwrap_or_else(Reply::Error);
            self.output.push_back(Output::Reply { handle, reply });
        }
    }

    /// The end of every verb.
    fn settle(&mut self, now: Tick) {
        self.observe_fences();
        let late = |held: &mut Held| now.since_ns(held.arrival) >= limits::REPLY_HELD_NS_MAX;
        while let Some(held) = self.held.pop_front_if(late) {
            self.output.push_back(Output::GiveUp { handle: held.handle });
        }
        self.update_intx();
        self.look_again = if self.waits_for_core() {
            now.after_ns(limits::FENCE_POLL_NS)
        } else {
            Tick::NEVER
        };
    }
}
