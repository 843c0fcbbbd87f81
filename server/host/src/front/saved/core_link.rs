//! The link to the core, packed: its channel with what waits for it, the pages, how far its beat was seen.
//!
//! In: a [`CoreLink`]; or its saved form. Out: the other. Must never know: a session.

use crate::front::closer::{Closer, NO_LISTENER};
use crate::front::core_link::CoreLink;
use crate::front::limits;
use crate::front::outbox::{Outbox, Waiting};
use crate::messages::FrontToCore;
use crate::packed::{Carried, Packer, Refusal, Unpacker};
use serde::{Deserialize, Serialize};
use vmgmt_device::Tick;

#[derive(Debug, Serialize, Deserialize)]
pub struct SavedCoreLink {
    life: u64,
    channel: Carried,
    wake_core: Carried,
    wake_front: Carried,
    /// To write, to read.
    pages: [Carried; 2],
    queue: Vec<SavedPacket>,
    broken: bool,
    kicks_seen: u64,
    watch: Option<(u64, Tick)>,
    told_stuck: bool,
}

/// A packet that the core has not taken yet. Its header has the form in which the two roles of different versions talk.
#[derive(Debug, Serialize, Deserialize)]
struct SavedPacket {
    header: FrontToCore,
    #[serde(with = "serde_bytes")]
    payload: Vec<u8>,
    fds: Vec<Carried>,
}

impl SavedCoreLink {
    pub fn save<'a>(core: &'a CoreLink, packer: &mut Packer<'a>) -> Self {
        let CoreLink {
            life,
            outbox,
            wake_front,
            wake_core,
            page_fds: [touched_fd, page_fd],
            touched: _,
            page: _,
            kicks_seen,
            watch,
            // The next front looks for itself how long nothing is taken.
            queue_watch: _,
            told_stuck,
        } = core;
        let queue = outbox.queue.iter().map(|packet| {
            let Waiting { header, payload, fds } = packet;
            SavedPacket {
                header: header.clone(),
                payload: payload.clone(),
                fds: fds.iter().map(|fd| packer.carry(fd)).collect(),
            }
        });
        Self {
            life: *life,
            queue: queue.collect(),
            channel: packer.carry(outbox.channel()),
            wake_core: packer.carry(wake_core),
            wake_front: packer.carry(wake_front),
            pages: [packer.carry(touched_fd), packer.carry(page_fd)],
            broken: outbox.is_broken(),
            kicks_seen: *kicks_seen,
            watch: *watch,
            told_stuck: *told_stuck,
        }
    }

    pub fn restore(self, unpacker: &mut Unpacker, closer: &Closer) -> Result<CoreLink, Refusal> {
        let Self {
            life,
            channel,
            wake_core,
            wake_front,
            pages: [touched, page],
            queue,
            broken,
            kicks_seen,
            watch,
            told_stuck,
        } = self;
        // A session alone may put more than one packet over the limit, never as many again.
        if queue.len() > 2 * limits::CORE_QUEUE_MAX {
            return Err("more packets wait for the core than can".into());
        }
        let fds = [channel, touched, page, wake_core, wake_front]
            .into_iter()
            .map(|number| unpacker.alone(number))
            .collect::<Result<_, _>>()?;
        let mut core = CoreLink::new(life, fds).map_err(|error| Refusal::Other(format!("{error:#}")))?;
        core.kicks_seen = kicks_seen;
        core.watch = watch;
        core.told_stuck = told_stuck;
        let Outbox {
            queue: waiting,
            broken: dead,
            ..
        } = &mut core.outbox;
        *dead = broken;
        for SavedPacket { header, payload, fds } in queue {
            let fds = fds
                .into_iter()
                .map(|fd| Ok(closer.watch(NO_LISTENER, unpacker.shared(fd)?)))
                .collect::<Result<_, Refusal>>()?;
            waiting.push_back(Waiting { header, payload, fds });
        }
        Ok(core)
    }
}
