//! The set of operators' connections, for an event loop of mio. No thread, no blocking.
//!
//! In: readiness of tokens; answers. Out: [`Incoming`] requests. Must never know what a request does.
//!
//! A client that does not read its answers gets no further events and its requests wait, so it costs a bounded amount of memory
//! and nobody else anything.

use super::connection::{Connection, ReadState};
use super::limits::{CLIENTS_MAX, OUTPUT_BYTES_MAX, REQUESTS_IN_FLIGHT_MAX, TOKENS};
use super::protocol::{Call, ErrorCode, Event, Failure, LINE_BYTES_MAX, Request, Response};
use mio::net::UnixListener;
use mio::{Interest, Registry, Token};
use rustix::fd::OwnedFd;
use serde::Serialize;
use slab::Slab;
use std::collections::{BTreeSet, VecDeque};
use std::io::ErrorKind;
use std::os::unix::net::UnixListener as StdUnixListener;

/// A connection; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId {
    /// Position in the set.
    pub index: u32,
    /// Which of those that had this position.
    pub generation: u32,
}

impl ClientId {
    /// As one number, for rooms that know no sockets.
    #[must_use]
    pub const fn to_number(self) -> u64 {
        ((self.generation as u64) << 32) | self.index as u64
    }

    /// Back from it.
    #[must_use]
    pub const fn from_number(number: u64) -> Self {
        Self {
            index: number as u32,
            generation: (number >> 32) as u32,
        }
    }
}

/// A request to be answered by [`ControlServer::reply`] or [`ControlServer::fail`], exactly once, with any number of events before.
#[derive(Debug)]
pub struct Asked {
    pub client: ClientId,
    pub id: u64,
    pub call: Call,
    pub fds: Vec<OwnedFd>,
}

/// What came in.
#[derive(Debug)]
pub enum Incoming {
    Request(Asked),
    /// The connection is gone with all its requests; nothing is to be answered any more.
    Gone {
        client: ClientId,
    },
    /// A client that had no room for events has it again.
    Room {
        client: ClientId,
    },
}

#[derive(Debug)]
struct Client {
    generation: u32,
    connection: Connection,
    in_flight: BTreeSet<u64>,
    /// Its socket may have something to read.
    readable: bool,
    /// An event was refused for want of room.
    starved: bool,
    /// No more is read; it goes when its output is sent.
    ending: bool,
}

impl Client {
    fn has_room(&self) -> bool {
        self.connection.output_bytes() < OUTPUT_BYTES_MAX
    }
    fn may_ask(&self) -> bool {
        !self.ending && self.has_room() && self.in_flight.len() < REQUESTS_IN_FLIGHT_MAX
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    registry: Option<Registry>,
    tokens_begin: usize,
    clients: Slab<Client>,
    generation: u32,
    /// The listener may have somebody waiting.
    acceptable: bool,
    /// Where the next look for a line begins, so that no client is served before the others.
    turn: usize,
    events: VecDeque<Incoming>,
    /// Requests one of whose deliveries is in its socket.
    written: Vec<(ClientId, u64)>,
}

impl ControlServer {
    /// Takes a listening UNIX stream socket over.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn new(listener: OwnedFd) -> std::io::Result<Self> {
        let listener = StdUnixListener::from(listener);
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener: UnixListener::from_std(listener),
            registry: None,
            tokens_begin: 0,
            clients: Slab::new(),
            generation: 0,
            acceptable: true,
            turn: 0,
            events: VecDeque::new(),
            written: Vec::new(),
        })
    }

    /// Joins an event loop, with the tokens from `tokens_begin` on, [`TOKENS`] of them.
    ///
    /// # Errors
    /// The event loop's.
    pub fn register(&mut self, registry: &Registry, tokens_begin: usize) -> std::io::Result<()> {
        let registry = registry.try_clone()?;
        registry.register(&mut self.listener, Token(tokens_begin), Interest::READABLE)?;
        self.tokens_begin = tokens_begin;
        self.registry = Some(registry);
        Ok(())
    }

    /// Notes that a token is ready; `false`: it is none of this set's.
    pub fn handle_ready(&mut self, token: Token) -> bool {
        let Some(index) = token
            .0
            .checked_sub(self.tokens_begin)
            .filter(|index| *index < TOKENS)
        else {
            return false;
        };
        match index.checked_sub(1) {
            None => self.acceptable = true,
            Some(index) => {
                if let Some(client) = self.clients.get_mut(index) {
                    client.readable = true;
                    self.flush(index);
                }
            }
        }
        true
    }

    /// The next thing that came in. Call it until it gives `None`: only then will the event loop tell of more.
    pub fn poll_request(&mut self) -> Option<Incoming> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            self.accept();
            if let Some(asked) = self.next_request() {
                return Some(Incoming::Request(asked));
            }
            if self.events.is_empty() {
                return None;
            }
        }
    }

    /// Ends a request with its result.
    pub fn reply(&mut self, client: ClientId, id: u64, result: &impl Serialize) {
        self.end_request(client, id, &Response::result(id, result));
    }

    /// Ends a request with a failure.
    pub fn fail(&mut self, client: ClientId, id: u64, failure: Failure) {
        self.end_request(client, id, &Response::failed(Some(id), failure));
    }

    /// Tells a client something on the way to the result. `false`: it has no room (then [`Incoming::Room`] comes later) or is gone; the
    /// event was not queued.
    #[must_use]
    pub fn event(&mut self, client: ClientId, id: u64, event: Event) -> bool {
        self.tell(client, id, event, false)
    }

    /// As [`ControlServer::event`], of something that must not be lost: [`ControlServer::take_written`] names the request when all bytes are
    /// in the client's socket. (Never, when the connection breaks before.)
    #[must_use]
    pub fn deliver(&mut self, client: ClientId, id: u64, event: Event) -> bool {
        self.tell(client, id, event, true)
    }

    /// Requests one of whose deliveries is in its client's socket, in order; one of several is there as often.
    pub fn take_written(&mut self) -> Vec<(ClientId, u64)> {
        std::mem::take(&mut self.written)
    }

    fn tell(&mut self, client: ClientId, id: u64, event: Event, receipt: bool) -> bool {
        let Some((index, state)) = self.client(client) else {
            return false;
        };
        if !state.in_flight.contains(&id) {
            return false;
        }
        if !state.has_room() {
            state.starved = true;
            return false;
        }
        let line = Response::event(id, event).to_line();
        if receipt {
            state.connection.queue_with_receipt(&line, id);
        } else {
            state.connection.queue(&line);
        }
        self.flush(index);
        true
    }

    /// Clients connected now.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    fn client(&mut self, client: ClientId) -> Option<(usize, &mut Client)> {
        let index = client.index as usize;
        let state = self
            .clients
            .get_mut(index)
            .filter(|state| state.generation == client.generation)?;
        Some((index, state))
    }

    fn end_request(&mut self, client: ClientId, id: u64, response: &Response) {
        if let Some((index, state)) = self.client(client)
            && state.in_flight.remove(&id)
        {
            state.connection.queue(&response.to_line());
            self.flush(index);
        }
    }

    fn accept(&mut self) {
        while self.acceptable && self.clients.len() < CLIENTS_MAX {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Any other error than "interrupted" or "that one has gone" is tried again at the next readiness.
                    self.acceptable = matches!(
                        error.kind(),
                        ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                    );
                    continue;
                }
            };
            self.generation = self.generation.wrapping_add(1);
            let index = self.clients.insert(Client {
                generation: self.generation,
                connection: Connection::new(stream),
                in_flight: BTreeSet::new(),
                readable: true,
                starved: false,
                ending: false,
            });
            let token = Token(self.tokens_begin + 1 + index);
            if let (Some(registry), Some(client)) = (&self.registry, self.clients.get_mut(index)) {
                let interest = Interest::READABLE | Interest::WRITABLE;
                if registry
                    .register(&mut client.connection.stream, token, interest)
                    .is_err()
                {
                    self.clients.remove(index);
                }
            }
        }
    }

    /// Looks through the clients, beginning behind the one served last.
    fn next_request(&mut self) -> Option<Asked> {
        let mut order: Vec<usize> = self.clients.iter().map(|(index, _)| index).collect();
        let begin = order.partition_point(|index| *index < self.turn);
        order.rotate_left(begin);
        for index in order {
            if let Some(asked) = self.next_request_of(index) {
                self.turn = index + 1;
                return Some(asked);
            }
        }
        None
    }

    fn next_request_of(&mut self, index: usize) -> Option<Asked> {
        loop {
            let client = self.clients.get_mut(index)?;
            if !client.may_ask() {
                return None;
            }
            let line = match client.connection.next_line() {
                Ok(Some(line)) => line,
                Ok(None) if !client.readable => return None,
                Ok(None) => match client.connection.read() {
                    ReadState::More => continue,
                    ReadState::Empty => {
                        client.readable = false;
                        return None;
                    }
                    ReadState::Ended => {
                        self.drop_client(index);
                        return None;
                    }
                },
                Err(_too_long) => {
                    let message = format!("a line of more than {LINE_BYTES_MAX} bytes");
                    let remedy = "send long contents as a file, with push; this connection is closed";
                    let failure = Failure::new(ErrorCode::BadRequest, message, remedy);
                    client
                        .connection
                        .queue(&Response::failed(None, failure).to_line());
                    client.ending = true;
                    self.flush(index);
                    return None;
                }
            };
            if line.bytes.trim_ascii().is_empty() {
                continue;
            }
            let response = match Request::from_line(&line.bytes) {
                Ok(Request { id, call }) if client.in_flight.insert(id) => {
                    let client = ClientId {
                        index: index as u32,
                        generation: client.generation,
                    };
                    return Some(Asked {
                        client,
                        id,
                        call,
                        fds: line.fds,
                    });
                }
                Ok(Request { id, .. }) => {
                    let message = format!("request {id} is still being answered");
                    let remedy = "give each request of a connection an id of its own";
                    Response::failed(Some(id), Failure::new(ErrorCode::BadRequest, message, remedy))
                }
                Err(response) => response,
            };
            client.connection.queue(&response.to_line());
            self.flush(index);
        }
    }

    fn flush(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        let lives = client.connection.flush();
        let number = ClientId {
            index: index as u32,
            generation: client.generation,
        };
        while let Some(request) = client.connection.written() {
            self.written.push((number, request));
        }
        if !lives || (client.ending && client.connection.output_bytes() == 0) {
            self.drop_client(index);
        } else if client.starved && client.has_room() {
            client.starved = false;
            self.events.push_back(Incoming::Room { client: number });
        }
    }

    fn drop_client(&mut self, index: usize) {
        if let Some(mut client) = self.clients.try_remove(index) {
            if let Some(registry) = &self.registry {
                // It is closed below; that the event loop forgets it first is only tidiness.
                let _ = registry.deregister(&mut client.connection.stream);
            }
            let client = ClientId {
                index: index as u32,
                generation: client.generation,
            };
            self.events.push_back(Incoming::Gone { client });
        }
    }
}

impl Drop for ControlServer {
    /// The listening socket lives on in other processes, so closing ours would not take it out of the event loop.
    fn drop(&mut self) {
        if let Some(registry) = &self.registry {
            // An event loop that has forgotten it already is as good.
            let _ = registry.deregister(&mut self.listener);
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
