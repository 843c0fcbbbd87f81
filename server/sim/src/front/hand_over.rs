//! GARDEN, hand-over of the front: the old one stops and is packed, for a time nobody serves, then a new one goes on, or the old one.
//!
//! In: when, and what becomes of the successor. Out: rooms that were unpacked from bytes; complaints about pages that were written meanwhile. As
//! `host/front/saved`, whose parts are used where they know no descriptor. Core, clients and guests go on all the time.

use super::*;
use serde::{Deserialize, Serialize};
use vmgmt_device::registers::SavedFunction;
use vmgmt_host::front::saved::{SavedFrozen, SavedMessageDma};
use vmgmt_host::packed;
use vmgmt_wire::SavedConnection;

/// What becomes of the next front.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Successor {
    Serves,
    /// It unpacks everything, and then refuses, dies or is late.
    Fails,
}

/// A front that has stopped.
#[derive(Debug)]
pub struct HandOver {
    pub until: Tick,
    successor: Successor,
    bytes: Vec<u8>,
    /// Each session's front page as it was then: nobody writes to one now.
    pages: BTreeMap<u64, Vec<u64>>,
}

#[derive(Serialize, Deserialize)]
struct SavedFront {
    clients: Vec<SavedClient>,
    frozen: SavedFrozen,
}

#[derive(Serialize, Deserialize)]
struct SavedClient {
    session: u64,
    function: SavedFunction,
    connection: SavedConnection,
    dma: SavedMessageDma,
}

/// A deliberate mistake's way to what is in [`SavedMessageDma`]; what waits goes on nowhere.
#[derive(Serialize, Deserialize)]
struct ForgedDma {
    #[serde(skip_deserializing)]
    waiting: Vec<()>,
    under_way: Vec<(u64, u64, u64)>,
    next_cookie: u64,
}

/// A session's rooms, unpacked.
struct Unpacked {
    function: Function<SimWords>,
    connection: Connection,
    dma: MessageDma,
}

impl Front {
    /// A hand-over is under way: the keeper holds back what it has to say.
    #[must_use]
    pub const fn is_stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// The old front stops. False: it has stopped before, or cannot be packed.
    pub fn hand_over(&mut self, until: Tick, successor: Successor) -> bool {
        if self.is_stopped() {
            return false;
        }
        for session in self.sessions() {
            self.after(session);
        }
        match self.pack() {
            Ok(bytes) => {
                self.stopped = Some(HandOver {
                    until,
                    successor,
                    bytes,
                    pages: self.front_pages(),
                });
                true
            }
            Err(error) => {
                self.complaints
                    .add(format!("the front could not be packed: {error}"));
                false
            }
        }
    }

    /// Somebody serves again, if nobody did.
    pub(super) fn end_hand_over(&mut self) {
        let Some(HandOver {
            successor,
            bytes,
            pages,
            ..
        }) = self.stopped.take()
        else {
            return;
        };
        self.handed_over += 1;
        let unpacked = self.unpack(&bytes);
        if self.front_pages() != pages {
            self.complaints
                .add("a front page was written while the front was handed over".into());
        }
        let (frozen, clients) = match unpacked {
            Ok(unpacked) => unpacked,
            Err(error) => {
                return self
                    .complaints
                    .add(format!("the front could not be unpacked: {error}"));
            }
        };
        if successor == Successor::Fails {
            return;
        }
        self.succeeded += 1;
        for (session, unpacked) in clients {
            let Some(client) = self.clients.get_mut(&session) else {
                continue;
            };
            client.function = unpacked.function;
            client.connection = unpacked.connection;
            client.dma = unpacked.dma;
        }
        self.frozen = frozen;
        if self.has(Fault::ForgetsFreezes) {
            self.frozen = Frozen::default();
        }
        if self.has(Fault::ForgetsStalledMaps) {
            self.clients.values_mut().for_each(|client| client.stalled = None);
        }
        // It looks at everything once.
        self.asleep = false;
    }

    fn front_pages(&self) -> BTreeMap<u64, Vec<u64>> {
        let pages = self.clients.iter();
        pages
            .map(|(session, client)| (*session, client.front_page.said()))
            .collect()
    }

    fn pack(&self) -> Result<Vec<u8>, String> {
        let mut clients = Vec::new();
        for (session, client) in &self.clients {
            let function = client.function.save();
            clients.push(SavedClient {
                session: *session,
                function: function.ok_or_else(|| format!("the function of session {session}"))?,
                connection: client.connection.save(),
                dma: self.saved_dma(&client.dma)?,
            });
        }
        let frozen = SavedFrozen::from(&self.frozen);
        packed::write(VERSION, &SavedFront { clients, frozen }, 0).map_err(|error| error.to_string())
    }

    fn saved_dma(&self, dma: &MessageDma) -> Result<SavedMessageDma, String> {
        let saved = SavedMessageDma::from(dma);
        if !self.has(Fault::SwapsDmaAnswers) {
            return Ok(saved);
        }
        let told = |error: packed::Refusal| error.to_string();
        let bytes = packed::write(VERSION, &saved, 0).map_err(told)?;
        let mut forged: ForgedDma = packed::read(&bytes, VERSION..=VERSION, 0).map_err(told)?;
        let cookies: Vec<u64> = forged.under_way.iter().map(|(cookie, ..)| *cookie).collect();
        forged.under_way.reverse();
        for ((cookie, ..), other) in forged.under_way.iter_mut().zip(cookies) {
            *cookie = other;
        }
        let bytes = packed::write(VERSION, &forged, 0).map_err(told)?;
        packed::read(&bytes, VERSION..=VERSION, 0).map_err(told)
    }

    fn unpack(&self, bytes: &[u8]) -> Result<(Frozen, Vec<(u64, Unpacked)>), String> {
        let SavedFront { clients, frozen } =
            packed::read(bytes, VERSION..=VERSION, 0).map_err(|error| error.to_string())?;
        let frozen = frozen.restore().map_err(|error| error.to_string())?;
        let mut unpacked = Vec::new();
        for saved in clients {
            let session = saved.session;
            let told = |error: &dyn std::fmt::Display| format!("session {session}: {error}");
            let client = self.clients.get(&session).ok_or_else(|| told(&"who is that?"))?;
            let pages = saved.function.core_lives().filter_map(|life| {
                let page = client.core_pages.get(&life)?;
                Some((life, page.of_front(&self.steps)))
            });
            let pages: Vec<(u64, SimWords)> = pages.collect();
            let page = client.front_page.of_front(&self.steps);
            let mut function =
                Function::restore(saved.function, page, &pages).map_err(|error| told(&error))?;
            let connection = Connection::restore(saved.connection).map_err(|error| told(&error))?;
            function.set_messages_out(connection.dma_outstanding() > 0);
            unpacked.push((
                session,
                Unpacked {
                    function,
                    connection,
                    dma: saved.dma.restore().map_err(|error| told(&error))?,
                },
            ));
        }
        Ok((frozen, unpacked))
    }
}

/// Of this model's own frame; the rooms carry theirs.
const VERSION: u32 = 1;
