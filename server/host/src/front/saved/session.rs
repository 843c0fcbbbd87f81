//! One client packed: its connection with partial messages both ways, its device, its descriptors.
//!
//! In: a [`Session`]; or its saved form, checked like a peer's bytes. Out: the other. Must never know: another session.

use super::SavedLogBudget;
use crate::front::closer::{Closer, SharedFd};
use crate::front::descriptors::{Descriptors, Objects};
use crate::front::limits;
use crate::front::message_dma::{Ask, MessageDma};
use crate::front::session::{Admission, Device, Session};
use crate::messages::SessionFault;
use crate::packed::{Carried, Packer, Refusal, Unpacker};
use crate::words::MappedWords;
use serde::{Deserialize, Serialize};
use slab::Slab;
use std::collections::{BTreeMap, BTreeSet};
use vmgmt_device::Tick;
use vmgmt_device::registers::{Function, MapObject, SavedFunction};
use vmgmt_wire::{Connection, DmaMap, FdSlot, IovaRange, ReplyHandle, SavedConnection};

#[derive(Debug, Serialize, Deserialize)]
pub struct SavedSession {
    number: u64,
    slot: usize,
    listener: u32,
    vm: u64,
    admission: SavedAdmission,
    name: String,
    quiet: bool,
    /// Its fault was [`SessionFault::Lost`].
    abandoned: bool,
    /// It was [`SessionFault::Contained`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    contained: bool,
    socket: Option<Carried>,
    connection: SavedConnection,
    device: Option<SavedDevice>,
    /// The connection's and the device's descriptors, by slot.
    descriptors: Vec<(u32, Carried)>,
    /// Memory, by number.
    objects: Vec<(u64, Carried)>,
    next_object: u64,
    dma: SavedMessageDma,
    stalled_map: Option<SavedStalledMap>,
    /// The eventfd that is watched to unmask INTx.
    unmask: Option<Carried>,
    told_life: Option<u64>,
    kicked: u64,
    accepted_at: Tick,
    held_back_since: Option<Tick>,
    log: SavedLogBudget,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum SavedAdmission {
    Asked,
    Admitted,
    Refused,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedDevice {
    function: SavedFunction,
    front_page_writable: Carried,
    front_page: Carried,
    state: Carried,
    /// By core life.
    core_pages: Vec<(u64, Carried)>,
}

/// What the core asked a client for by messages.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedMessageDma {
    waiting: Vec<(u64, u64, SavedAsk)>,
    /// Cookie, life, request.
    under_way: Vec<(u64, u64, u64)>,
    next_cookie: u64,
}

#[derive(Debug, Serialize, Deserialize)]
enum SavedAsk {
    Read {
        iova: u64,
        bytes: u32,
    },
    Write {
        iova: u64,
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
}

/// A DMA_MAP whose object is not with the core yet; its descriptor is among the objects.
#[derive(Debug, Serialize, Deserialize)]
struct SavedStalledMap {
    handle: ReplyHandle,
    range: IovaRange,
    readable: bool,
    writable: bool,
    file_offset: u64,
    object: u64,
    rights: u64,
}

impl SavedSession {
    pub fn save<'a>(
        session: &'a Session,
        unmask: Option<&'a SharedFd>,
        packer: &mut Packer<'a>,
    ) -> Result<Self, Refusal> {
        let Session {
            number,
            slot,
            listener,
            vm,
            admission,
            name,
            socket,
            // Closed before the call that ended it is over.
            ended_socket: _,
            // What is ready is looked at anew.
            readable: _,
            writable: _,
            quiet,
            queued: _,
            deadline: _,
            watch_unmask: _,
            done: _,
            fault,
            messages_out: _,
            told_life,
            kicked,
            connection,
            device,
            descriptors,
            objects,
            dma,
            stalled_map,
            accepted_at,
            held_back_since,
            log,
        } = session;
        // Nothing of an abandoned session is trusted: its slot alone stays taken.
        let abandoned = fault.is_lost();
        let nothing = Connection::new();
        let (connection, device) = if abandoned {
            (&nothing, None)
        } else {
            (connection, device.as_ref())
        };
        let device = device
            .map(|device| save_device(*number, device, packer))
            .transpose()?;
        let descriptors = descriptors.slots.iter().filter(|_| !abandoned);
        Ok(Self {
            number: *number,
            slot: *slot,
            listener: *listener,
            vm: *vm,
            admission: match admission {
                Admission::Asked => SavedAdmission::Asked,
                Admission::Admitted => SavedAdmission::Admitted,
                Admission::Refused => SavedAdmission::Refused,
            },
            name: name.clone(),
            quiet: *quiet,
            abandoned,
            contained: *fault == SessionFault::Contained,
            socket: socket.as_ref().map(|socket| packer.carry(socket)),
            connection: connection.save(),
            device,
            descriptors: descriptors
                .map(|(slot, fd)| (slot as u32, packer.carry(fd)))
                .collect(),
            objects: objects
                .iter()
                .map(|(number, object)| (number, packer.carry(&object.fd)))
                .collect(),
            next_object: objects.next,
            dma: SavedMessageDma::from(dma),
            stalled_map: stalled_map.as_ref().map(SavedStalledMap::from),
            unmask: unmask.map(|fd| packer.carry(fd)),
            told_life: *told_life,
            kicked: *kicked,
            accepted_at: *accepted_at,
            held_back_since: *held_back_since,
            log: SavedLogBudget::from(log),
        })
    }

    /// The session, its slot, and the eventfd to be watched.
    pub fn restore(
        self,
        unpacker: &mut Unpacker,
        closer: &Closer,
    ) -> Result<(usize, Session, Option<SharedFd>), Refusal> {
        let number = self.number;
        self.try_restore(unpacker, closer)
            .map_err(|refusal| told(number, &refusal.to_string()))
    }

    fn try_restore(
        self,
        unpacker: &mut Unpacker,
        closer: &Closer,
    ) -> Result<(usize, Session, Option<SharedFd>), Refusal> {
        let Self {
            number,
            slot,
            listener,
            vm,
            admission,
            name,
            quiet,
            abandoned,
            contained,
            socket,
            connection,
            device,
            descriptors,
            objects,
            next_object,
            dma,
            stalled_map,
            unmask,
            told_life,
            kicked,
            accepted_at,
            held_back_since,
            log,
        } = self;
        let mut take = |fd| Ok(closer.watch(listener, unpacker.shared(fd)?));
        let descriptors = restore_descriptors(descriptors, &mut take)?;
        let mut kept = Objects::new();
        for (object, fd) in objects {
            kept.take_over(object, take(fd)?)?;
        }
        if kept.iter().any(|(object, _)| object >= next_object) {
            return Err("a memory object's number is to come".into());
        }
        kept.next = next_object;
        let unmask = unmask.map(take).transpose()?;
        let mut device = device.map(|device| device.restore(unpacker)).transpose()?;
        let named = device.as_ref().map(|device| device.function.eventfds());
        let missing = |slot: &FdSlot| descriptors.get(*slot).is_none();
        if connection.descriptors().iter().any(missing) || named.iter().flatten().any(missing) {
            return Err("a descriptor is named that did not come".into());
        }
        // An ended session waits for its fence alone: its maps are for nobody any more.
        if let (Some(device), Some(_)) = (&device, &socket) {
            let mut maps = device.function.maps().map(|mapped| mapped.record.object);
            if maps.any(|object| object != 0 && !kept.contains(object)) {
                return Err("a map names memory that did not come".into());
            }
        }
        let admission = match admission {
            SavedAdmission::Asked => Admission::Asked,
            SavedAdmission::Admitted => Admission::Admitted,
            SavedAdmission::Refused => Admission::Refused,
        };
        if (admission == Admission::Admitted) != (device.is_some() || abandoned) && !abandoned {
            return Err("admitted without a device, or the other way round".into());
        }
        let connection =
            Connection::restore(connection).map_err(|error| Refusal::Other(error.to_string()))?;
        if let Some(device) = &mut device {
            device.function.set_messages_out(connection.dma_outstanding() > 0);
        }
        let stalled_map = stalled_map.map(|map| map.restore(&kept)).transpose()?;
        let session = Session {
            number,
            slot,
            listener,
            vm,
            admission,
            name,
            socket: socket.map(|socket| unpacker.alone(socket)).transpose()?,
            ended_socket: None,
            readable: true,
            writable: true,
            quiet,
            queued: false,
            deadline: Tick::NEVER,
            watch_unmask: None,
            done: false,
            fault: match (abandoned, contained) {
                (true, _) => SessionFault::Lost,
                (false, true) => SessionFault::Contained,
                (false, false) => SessionFault::None,
            },
            messages_out: false,
            told_life,
            kicked,
            connection,
            device,
            descriptors,
            objects: kept,
            dma: dma.restore()?,
            stalled_map,
            accepted_at,
            held_back_since,
            log: log.into(),
        };
        Ok((slot, session, unmask))
    }
}

fn told(session: u64, reason: &str) -> Refusal {
    Refusal::Other(format!("session {session}: {reason}"))
}

fn save_device<'a>(number: u64, device: &'a Device, packer: &mut Packer<'a>) -> Result<SavedDevice, Refusal> {
    let Device {
        function,
        front_page_writable,
        core_pages,
        front_page,
        state,
    } = device;
    let function = function
        .save()
        .ok_or_else(|| told(number, "its device is in the middle of something"))?;
    let core_pages = function
        .core_lives()
        .filter_map(|life| Some((life, core_pages.get(&life)?)));
    Ok(SavedDevice {
        core_pages: core_pages
            .map(|(life, fd)| (life, packer.carry(fd.as_ref())))
            .collect(),
        function,
        front_page_writable: packer.carry(front_page_writable.as_ref()),
        front_page: packer.carry(front_page.as_ref()),
        state: packer.carry(state.as_ref()),
    })
}

impl SavedDevice {
    fn restore(self, unpacker: &mut Unpacker) -> Result<Device, Refusal> {
        let Self {
            function,
            front_page_writable,
            front_page,
            state,
            core_pages,
        } = self;
        let front_page_writable = unpacker.shared(front_page_writable)?;
        let words = MappedWords::writable(&*front_page_writable)
            .map_err(|error| Refusal::Other(format!("its front page: {error}")))?;
        let mut pages = BTreeMap::new();
        let mut mapped = Vec::new();
        for (life, fd) in core_pages {
            let fd = unpacker.shared(fd)?;
            let words = MappedWords::writable(&*fd)
                .map_err(|error| Refusal::Other(format!("a core page: {error}")))?;
            mapped.push((life, words));
            pages.insert(life, fd);
        }
        Ok(Device {
            function: Function::restore(function, words, &mapped)
                .map_err(|error| Refusal::Other(error.to_string()))?,
            front_page_writable,
            core_pages: pages,
            front_page: unpacker.shared(front_page)?,
            state: unpacker.shared(state)?,
        })
    }
}

fn restore_descriptors(
    saved: Vec<(u32, Carried)>,
    mut take: impl FnMut(Carried) -> Result<SharedFd, Refusal>,
) -> Result<Descriptors, Refusal> {
    let mut slots = BTreeSet::new();
    let mut fds = Vec::new();
    for (slot, fd) in saved {
        // A slab is as long as its highest slot: nobody may make it longer than a session's descriptors ever are.
        if slot as usize >= limits::DESCRIPTORS_MAX || !slots.insert(slot) {
            return Err("a descriptor's slot is out of range or used twice".into());
        }
        fds.push((slot as usize, take(fd)?));
    }
    Ok(Descriptors {
        slots: fds.into_iter().collect::<Slab<_>>(),
    })
}

impl From<&MessageDma> for SavedMessageDma {
    fn from(dma: &MessageDma) -> Self {
        let MessageDma {
            waiting,
            under_way,
            next_cookie,
            fenced: _,
        } = dma;
        let waiting = waiting.iter().map(|(life, request, ask)| {
            let ask = match ask {
                Ask::Read { iova, bytes } => SavedAsk::Read {
                    iova: *iova,
                    bytes: *bytes,
                },
                Ask::Write { iova, data } => SavedAsk::Write {
                    iova: *iova,
                    data: data.clone(),
                },
            };
            (*life, *request, ask)
        });
        let under_way = under_way
            .iter()
            .map(|(cookie, (life, request))| (*cookie, *life, *request));
        Self {
            waiting: waiting.collect(),
            under_way: under_way.collect(),
            next_cookie: *next_cookie,
        }
    }
}

impl SavedMessageDma {
    /// # Errors
    /// More than there can be.
    pub fn restore(self) -> Result<MessageDma, Refusal> {
        let Self {
            waiting,
            under_way,
            next_cookie,
        } = self;
        if waiting.len() > limits::MESSAGE_DMA_WAITING_MAX
            || under_way.len() > vmgmt_wire::limits::DMA_OUTSTANDING_MAX
            || under_way.iter().any(|(cookie, ..)| *cookie >= next_cookie)
        {
            return Err("more message DMA than there can be".into());
        }
        let waiting = waiting.into_iter().map(|(life, request, ask)| {
            let ask = match ask {
                SavedAsk::Read { iova, bytes } => Ask::Read { iova, bytes },
                SavedAsk::Write { iova, data } => Ask::Write { iova, data },
            };
            (life, request, ask)
        });
        Ok(MessageDma {
            waiting: waiting.collect(),
            under_way: under_way
                .into_iter()
                .map(|(cookie, life, request)| (cookie, (life, request)))
                .collect(),
            next_cookie,
            // Whether there was a fence is not handed over: what is refused is asked for once more.
            fenced: next_cookie,
        })
    }
}

impl From<&(ReplyHandle, DmaMap, MapObject)> for SavedStalledMap {
    fn from((handle, map, object): &(ReplyHandle, DmaMap, MapObject)) -> Self {
        let DmaMap {
            range,
            readable,
            writable,
            // It was taken out of its slot, and there was one.
            descriptor: _,
            descriptor_lost: _,
            file_offset,
        } = map;
        let MapObject { number, rights } = object;
        Self {
            handle: *handle,
            range: *range,
            readable: *readable,
            writable: *writable,
            file_offset: *file_offset,
            object: *number,
            rights: *rights,
        }
    }
}

impl SavedStalledMap {
    fn restore(self, objects: &Objects) -> Result<(ReplyHandle, DmaMap, MapObject), Refusal> {
        let Self {
            handle,
            range,
            readable,
            writable,
            file_offset,
            object,
            rights,
        } = self;
        if !objects.contains(object) || file_offset.checked_add(range.bytes()).is_none() {
            return Err("a map that waits names memory that did not come".into());
        }
        let map = DmaMap {
            range,
            readable,
            writable,
            descriptor: None,
            file_offset,
            descriptor_lost: false,
        };
        let object = MapObject {
            number: object,
            rights,
        };
        Ok((handle, map, object))
    }
}
