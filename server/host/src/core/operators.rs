//! The operators: what they ask over the control socket, as the hub, the keeper and the core's own books can answer it.
//!
//! In: requests of the [`ControlServer`], the hub's and the keeper's answers. Out: [`Ask`]s for the loop to pass on. Must
//! never know a session or a ring.

mod views;

use super::lines::Lines;
use super::sessions::Sessions;
use crate::config::{CoreConfig, ListenerConfig, VmConfig, added_vm};
use crate::control::protocol::{
    self, Call, Done, ErrorCode, Event, Failure, Hello, LogLine, Message, Peers, Progress, Received, Sent,
    Transferred, UpgradeReport, Upgrading, Vms,
};
use crate::control::{Asked, ClientId, ControlServer, Incoming};
use mio::{Registry, Token};
use rustix::fd::OwnedFd;
use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;
use views::{failure, peer, shares, states, vm_of};
use vmgmt_abi::Status;
use vmgmt_core::interface::{ControlReply, ControlRequest};
use vmgmt_device::Tick;

/// What the loop is to do for an operator.
#[derive(Debug)]
pub enum Ask {
    /// A question for the hub.
    Hub {
        client: u64,
        id: u64,
        request: ControlRequest,
    },
    /// A transfer: the loop adopts the file, then asks the hub. `read`: push.
    Transfer {
        client: u64,
        id: u64,
        fd: OwnedFd,
        transfer: Transfer,
    },
    /// A VM for the keeper.
    AddVm {
        request: u64,
        vm: Box<VmConfig>,
        listener: Box<ListenerConfig>,
    },
    RemoveVm {
        request: u64,
        name: String,
    },
    /// An upgrade, for the keeper.
    Upgrade {
        request: u64,
        upgrade: protocol::Upgrade,
    },
    /// A reload, for the keeper.
    Reload {
        request: u64,
    },
    /// A release, for the keeper.
    Release {
        request: u64,
        vm: String,
    },
    /// No DMA of this VM from now on; the answer comes when there is none. `timeout_ns`: how long at most.
    Freeze {
        client: u64,
        id: u64,
        name: String,
        timeout_ns: Option<u64>,
    },
    Thaw {
        client: u64,
        id: u64,
        name: String,
    },
    /// The connection is gone.
    Closed {
        client: u64,
    },
}

/// A push or a pull.
#[derive(Debug)]
pub enum Transfer {
    Push {
        target: String,
        size: u64,
        name: String,
        wait_ns: u64,
        key: u64,
    },
    Pull {
        source: String,
        path: String,
        wait_ns: u64,
        key: u64,
    },
}

/// What the core knows beside the hub.
pub struct Books<'a> {
    pub config: &'a CoreConfig,
    pub vms: &'a BTreeMap<u64, VmConfig>,
    pub lines: &'a Lines,
    /// How front and core are sandboxed.
    pub sandbox: &'a [protocol::SandboxedRole],
    /// The last fault that took a device of a VM out of service, by the VM's name.
    pub faults: &'a BTreeMap<String, protocol::LastFault>,
    /// Number of this core life, and when it began.
    pub life: u64,
    pub started: Instant,
    /// Sessions connected now.
    pub sessions: &'a Sessions,
    /// The last upgrade.
    pub upgrade: Option<&'a UpgradeReport>,
    /// Until when which VM is frozen.
    pub frozen: &'a BTreeMap<u64, Tick>,
    pub now: Tick,
}

impl Books<'_> {
    fn status(&self) -> protocol::Status {
        protocol::Status {
            state: "serving".into(),
            answered_by: "core".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get() as u32),
            life: self.life,
            uptime_seconds: self.started.elapsed().as_secs(),
            vms: self.vms.len() as u64,
            sessions: self.sessions.count() as u64,
            notices: self
                .lines
                .since(0)
                .0
                .filter(|line| line.vm.is_none())
                .map(|line| line.text.clone())
                .collect(),
            counters: BTreeMap::from([("frozen VMs".to_owned(), self.frozen.len() as u64)]),
            upgrade: self.upgrade.cloned(),
            sandbox: self.sandbox.to_vec(),
            vm_states: states(self),
        }
    }
}

/// The operators' requests that are under way.
pub struct Operators {
    server: ControlServer,
    /// What a hub's reply is to become.
    asked: BTreeMap<(u64, u64), Expected>,
    /// Requests to the keeper.
    at_keeper: BTreeMap<u64, (ClientId, u64)>,
    keeper_requests: u64,
    /// Messages that a client had no room for yet, in order; at most as many as the hub gives one request before it is told of the first.
    held: BTreeMap<(ClientId, u64), VecDeque<Held>>,
    /// Followers of the log, and the number of the next line for each.
    followers: BTreeMap<(ClientId, u64), u64>,
}

/// A message, and the result that ends its request.
#[derive(Debug, Clone)]
struct Held {
    event: Event,
    end: Option<Received>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Vms,
    Peers,
    Sent,
    /// Messages given so far.
    Messages(u64),
    Transfer,
}

impl Operators {
    /// Takes the listening socket over.
    ///
    /// # Errors
    /// The system's.
    pub fn new(listener: OwnedFd, registry: &Registry, tokens_begin: usize) -> std::io::Result<Self> {
        let mut server = ControlServer::new(listener)?;
        server.register(registry, tokens_begin)?;
        Ok(Self {
            server,
            asked: BTreeMap::new(),
            at_keeper: BTreeMap::new(),
            keeper_requests: 0,
            held: BTreeMap::new(),
            followers: BTreeMap::new(),
        })
    }

    /// Notes that a token is ready.
    pub fn handle_ready(&mut self, token: Token) -> bool {
        self.server.handle_ready(token)
    }

    /// Answers what the books can answer; the next thing that they cannot.
    pub fn poll(&mut self, books: &Books<'_>) -> Option<Ask> {
        loop {
            match self.server.poll_request()? {
                Incoming::Request(asked) => {
                    let (client, id) = (asked.client, asked.id);
                    match self.begin(asked, books) {
                        Ok(None) => {}
                        Ok(Some(ask)) => return Some(ask),
                        Err(failure) => self.server.fail(client, id, failure),
                    }
                }
                Incoming::Gone { client } => {
                    self.followers.retain(|(follower, _), _| *follower != client);
                    self.held.retain(|(holder, _), _| *holder != client);
                    self.asked.retain(|(asker, _), _| *asker != client.to_number());
                    return Some(Ask::Closed {
                        client: client.to_number(),
                    });
                }
                Incoming::Room { client } => {
                    self.tell_held(client);
                    self.tell_followers(books.lines);
                }
            }
        }
    }

    /// Gives followers of the log the lines they have not had.
    pub fn tell_followers(&mut self, lines: &Lines) {
        for ((client, id), next) in &mut self.followers {
            *next = tell_lines(&mut self.server, *client, *id, lines, *next);
        }
    }

    /// The hub answers.
    pub fn handle_reply(&mut self, client: u64, id: u64, reply: ControlReply, last: bool, books: &Books<'_>) {
        let key = (client, id);
        let Some(expected) = self.asked.get_mut(&key) else {
            return;
        };
        let client = ClientId::from_number(client);
        let expected_now = *expected;
        match reply {
            ControlReply::Message {
                source,
                sequence,
                accepted_ns,
                message,
            } => {
                if let Expected::Messages(count) = expected {
                    *count += 1;
                }
                let event = Message {
                    from: source,
                    sequence,
                    accepted_ns,
                    ..Message::default()
                }
                .with_bytes(message);
                let end = match expected_now {
                    Expected::Messages(count) if last => Some(Received { messages: count + 1 }),
                    _ => None,
                };
                let event = Event::Message(event);
                self.held
                    .entry((client, id))
                    .or_default()
                    .push_back(Held { event, end });
                self.tell_held(client);
            }
            ControlReply::NoMessage => {
                let messages = if let Expected::Messages(count) = expected_now {
                    count
                } else {
                    0
                };
                self.server.reply(client, id, &Received { messages });
            }
            ControlReply::Vms(vms) if expected_now == Expected::Peers => {
                let peers = vms.iter().filter(|vm| vm.published).map(peer).collect();
                self.server.reply(client, id, &Peers { peers });
            }
            ControlReply::Vms(vms) => {
                let vms = vms.iter().map(|vm| vm_of(vm, books)).collect();
                self.server.reply(client, id, &Vms { vms });
            }
            ControlReply::Sent { number } => self.server.reply(client, id, &Sent { number }),
            ControlReply::Progress { bytes, total } => {
                let total = (total != u64::MAX).then_some(total);
                // A client that does not read misses steps of progress, no more.
                let _ = self
                    .server
                    .event(client, id, Event::Progress(Progress { bytes, total }));
            }
            ControlReply::Transferred { bytes, crc32 } => {
                self.server.reply(
                    client,
                    id,
                    &Transferred {
                        bytes,
                        crc32: format!("{crc32:08x}"),
                    },
                );
            }
            ControlReply::Failed { status, text } => {
                self.server.fail(client, id, failure(Status(status), text))
            }
        }
        if last {
            self.asked.remove(&key);
        }
    }

    /// Requests (client and id) of which a message is in the operator's socket now, once for each.
    pub fn take_written(&mut self) -> Vec<(u64, u64)> {
        let written = self.server.take_written().into_iter();
        written.map(|(client, id)| (client.to_number(), id)).collect()
    }

    /// Gives a client what is held for it, as far as it has room.
    fn tell_held(&mut self, client: ClientId) {
        let waiting: Vec<_> = self
            .held
            .keys()
            .filter(|(holder, _)| *holder == client)
            .copied()
            .collect();
        for key in waiting {
            while let Some(held) = self.held.get(&key).and_then(|held| held.front().cloned()) {
                if !self.server.deliver(client, key.1, held.event) {
                    return;
                }
                self.held.get_mut(&key).map(VecDeque::pop_front);
                if let Some(end) = held.end {
                    self.server.reply(client, key.1, &end);
                }
            }
            self.held.remove(&key);
        }
    }

    /// The keeper answers.
    pub fn handle_keeper(&mut self, request: u64, error: Option<String>) {
        let Some((client, id)) = self.at_keeper.remove(&request) else {
            return;
        };
        match error {
            None => self.server.reply(client, id, &Done {}),
            Some(error) => self
                .server
                .fail(client, id, Failure::new(ErrorCode::Failed, error, "")),
        }
    }

    /// The keeper has begun an upgrade.
    pub fn handle_upgrading(&mut self, request: u64, number: u64) {
        if let Some((client, id)) = self.at_keeper.remove(&request) {
            self.server.reply(client, id, &Upgrading { number });
        }
    }

    /// Answers a request with its result.
    pub fn answer(&mut self, client: u64, id: u64, result: &impl serde::Serialize) {
        self.server.reply(ClientId::from_number(client), id, result);
    }

    /// Answers a request with its failure.
    pub fn refuse(&mut self, client: u64, id: u64, failure: Failure) {
        self.server.fail(ClientId::from_number(client), id, failure);
    }

    /// Ends a request that could not be begun.
    pub fn fail(&mut self, client: u64, id: u64, status: Status, text: String) {
        self.asked.remove(&(client, id));
        self.server
            .fail(ClientId::from_number(client), id, failure(status, text));
    }

    fn begin(&mut self, asked: Asked, books: &Books<'_>) -> Result<Option<Ask>, Failure> {
        let Asked {
            client,
            id,
            call,
            fds,
        } = asked;
        let number = client.to_number();
        let mut ask = |expected, request| {
            self.asked.insert((number, id), expected);
            Ok(Some(Ask::Hub {
                client: number,
                id,
                request,
            }))
        };
        match call {
            Call::Hello => self.server.reply(client, id, &Hello::of_this_version()),
            Call::Status => {
                let status = books.status();
                self.server.reply(client, id, &status);
            }
            Call::Shares => self.server.reply(client, id, &shares(books)),
            Call::Vms => return ask(Expected::Vms, ControlRequest::Vms),
            Call::Peers => return ask(Expected::Peers, ControlRequest::Peers),
            Call::Send(send) => {
                let message = send.bytes()?;
                let key = send.key.unwrap_or(0);
                return ask(
                    Expected::Sent,
                    ControlRequest::Send {
                        target: send.to,
                        message,
                        key,
                    },
                );
            }
            Call::Recv(receive) => {
                let request = ControlRequest::Receive {
                    follow: receive.follow,
                    wait_ns: ns(receive.wait_ms),
                };
                return ask(Expected::Messages(0), request);
            }
            Call::Push(push) => {
                let fd = only_fd(fds)?;
                let size = regular_size(&fd)?;
                let transfer = Transfer::Push {
                    target: push.to,
                    size,
                    name: push.name,
                    wait_ns: ns(push.wait_ms),
                    key: push.key.unwrap_or(0),
                };
                self.asked.insert((number, id), Expected::Transfer);
                return Ok(Some(Ask::Transfer {
                    client: number,
                    id,
                    fd,
                    transfer,
                }));
            }
            Call::Pull(pull) => {
                let fd = only_fd(fds)?;
                regular_size(&fd)?;
                let transfer = Transfer::Pull {
                    source: pull.from,
                    path: pull.path,
                    wait_ns: ns(pull.wait_ms),
                    key: pull.key.unwrap_or(0),
                };
                self.asked.insert((number, id), Expected::Transfer);
                return Ok(Some(Ask::Transfer {
                    client: number,
                    id,
                    fd,
                    transfer,
                }));
            }
            Call::AddVm(add) => {
                let (vm, listener) = added_vm(&add, books.config)?;
                let request = self.ask_keeper(client, id);
                return Ok(Some(Ask::AddVm {
                    request,
                    vm: Box::new(vm),
                    listener: Box::new(listener),
                }));
            }
            Call::RemoveVm(remove) => {
                let request = self.ask_keeper(client, id);
                return Ok(Some(Ask::RemoveVm {
                    request,
                    name: remove.name,
                }));
            }
            Call::Upgrade(upgrade) => {
                let request = self.ask_keeper(client, id);
                return Ok(Some(Ask::Upgrade { request, upgrade }));
            }
            Call::Reload => {
                let request = self.ask_keeper(client, id);
                return Ok(Some(Ask::Reload { request }));
            }
            Call::Release(release) => {
                let request = self.ask_keeper(client, id);
                return Ok(Some(Ask::Release {
                    request,
                    vm: release.vm,
                }));
            }
            Call::Freeze(freeze) => {
                return Ok(Some(Ask::Freeze {
                    client: number,
                    id,
                    name: freeze.name,
                    timeout_ns: freeze.timeout_seconds.map(|s| s.saturating_mul(1_000_000_000)),
                }));
            }
            Call::Thaw(thaw) => {
                return Ok(Some(Ask::Thaw {
                    client: number,
                    id,
                    name: thaw.name,
                }));
            }
            Call::Log(log) => {
                let next = tell_lines(&mut self.server, client, id, books.lines, 0);
                if log.follow {
                    self.followers.insert((client, id), next);
                } else {
                    self.server.reply(client, id, &Done {});
                }
            }
        }
        Ok(None)
    }

    fn ask_keeper(&mut self, client: ClientId, id: u64) -> u64 {
        self.keeper_requests += 1;
        self.at_keeper.insert(self.keeper_requests, (client, id));
        self.keeper_requests
    }
}

/// Sends the lines from number `next` on, as many as the client has room for; the number of the first that it has not had.
fn tell_lines(server: &mut ControlServer, client: ClientId, id: u64, lines: &Lines, next: u64) -> u64 {
    let (new, end) = lines.since(next);
    let new: Vec<_> = new.cloned().collect();
    let first = end - new.len() as u64;
    for (number, line) in (first..).zip(new) {
        let event = Event::Log(LogLine {
            time_ns: line.time_ns,
            vm: line.vm,
            text: line.text,
        });
        if !server.event(client, id, event) {
            return number;
        }
    }
    end
}

const fn ns(milliseconds: u64) -> u64 {
    milliseconds.saturating_mul(1_000_000)
}

fn only_fd(mut fds: Vec<OwnedFd>) -> Result<OwnedFd, Failure> {
    match (fds.pop(), fds.is_empty()) {
        (Some(fd), true) => Ok(fd),
        _ => Err(Failure::new(
            ErrorCode::BadRequest,
            "the request needs one file descriptor",
            "pass the open file with SCM_RIGHTS, with the request's line (vmgmtctl does)",
        )),
    }
}

fn regular_size(fd: &OwnedFd) -> Result<u64, Failure> {
    let stat = rustix::fs::fstat(fd).map_err(|errno| {
        Failure::new(
            ErrorCode::BadRequest,
            format!("the file cannot be looked at: {errno}"),
            "",
        )
    })?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(Failure::new(
            ErrorCode::BadRequest,
            "that is no regular file",
            "copy a pipe or device into a file first",
        ));
    }
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}
