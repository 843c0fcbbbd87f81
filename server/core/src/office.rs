//! OFFICE: what all modes share: who is there, which submissions are open, effects, timers, and the way out.
//!
//! In: calls of the modes. Out: [`Output`]s in order. It never knows what an operation means.

use crate::budgets::{Bucket, LogLimiter};
use crate::deadlines::{Timer, Timers};
use crate::effect::{Effect, EffectId};
use crate::effects::{Continuation, Effects};
use crate::interface::Output;
use crate::journal::Record;
use crate::kept::{Change, Settled};
use crate::ledger::Ledger;
use crate::ledger::books::{self, ahead};
use crate::limits::CLOCK_JUMP_NS_MAX;
use crate::policy::VmLimits;
use crate::refusal::Refusal;
use crate::table::Table;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vmgmt_abi::chat::PEER_HOST;
use vmgmt_abi::port::OUTPUT_BYTES_MAX;
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Channel, Fetched, Token};

/// What an open submission waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Wait {
    /// Its VM's rate.
    Rate,
    /// An earlier SEND of its channel.
    Turn,
    /// A message.
    Receive,
    /// An offer.
    NextOffer,
    /// An answer to its offer.
    Offer(u64),
    StreamWrite(u64),
    StreamRead(u64),
    StreamEnd(u64),
    /// An effect. `fills`: it writes into the submission's buffer, so the submission cannot end before it.
    Effect {
        id: EffectId,
        fills: bool,
    },
    /// That the file of this handle, of an earlier core life, is open again.
    Reopening(u64),
    /// A room that looks, at its next step, whether the submission is still open.
    Room,
}

/// A submission that is open in the hub.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Flight {
    pub vm: u64,
    pub opcode: u16,
    /// The guest's own.
    pub tag: u32,
    /// Bytes of its data area.
    pub data_bytes: u64,
    /// Counted as bytes in flight.
    pub charged_bytes: u64,
    pub deadline: Tick,
    pub wait: Wait,
    /// Its guest wants it ended so, as soon as its buffer is not written any more.
    pub ending: Option<u16>,
    /// Bytes that are set aside for what survives of it.
    #[serde(default)]
    pub ahead_bytes: u64,
}

/// Counted since a VM exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    pub submissions: u64,
    pub messages_sent: u64,
    pub messages_delivered: u64,
    pub messages_dropped: u64,
    pub bytes_from_vm: u64,
    pub bytes_to_vm: u64,
    pub refusals: u64,
}

/// A VM, as far as it does not survive a core.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Vm {
    /// Copy of its configuration's, so that the usual way needs one look-up.
    pub limits: VmLimits,
    /// Numbers of the VMs it may reach; `None`: all. Derived.
    pub reach: Option<BTreeSet<u64>>,
    /// Derived.
    pub sessions: BTreeSet<u64>,
    /// Open submissions and their bytes. Derived.
    pub flights: u32,
    pub bytes_in_flight: u64,
    pub ahead_bytes: u64,
    pub submission_rate: Bucket,
    pub byte_rate: Bucket,
    /// Submissions that its rates hold back, in order, with the time they may go.
    pub delayed: VecDeque<(Tick, Box<Fetched>)>,
    /// Files, puts and streams. Derived.
    pub open_files: u32,
    /// RECEIVE and NEXT_OFFER submissions, in order.
    pub receives: VecDeque<Token>,
    pub next_offers: VecDeque<Token>,
    /// Offers to it that no NEXT_OFFER has taken yet, in order.
    pub offers_in: VecDeque<u64>,
    /// Offers of it that are not answered. Derived.
    pub offers_out: u32,
    pub log: LogLimiter,
    pub counters: Counters,
    /// When the timer for its mailbox is armed.
    pub expiry: Option<Tick>,
}

/// A connected device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Session {
    pub vm: u64,
    /// Derived.
    pub handles: BTreeSet<u64>,
}

/// Wall time, and the mailbox clock: wall time as far as it does not jump.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Wall {
    pub known: bool,
    pub at: Tick,
    pub wall_ns: u64,
    pub mailbox_ns: u64,
}

impl Wall {
    /// A reading. `floor_ns`: the youngest stamp in any mailbox, 0: none; there a new mailbox clock starts.
    pub fn read(&mut self, now: Tick, wall_ns: u64, floor_ns: u64) {
        if self.known {
            let most_ns = now.since_ns(self.at).saturating_add(CLOCK_JUMP_NS_MAX);
            let step_ns = wall_ns.saturating_sub(self.wall_ns).min(most_ns);
            self.mailbox_ns = self.mailbox_ns.saturating_add(step_ns);
        } else {
            // What is in the mailboxes must not age by more than it did: the downtime of a core is not counted.
            self.mailbox_ns = if floor_ns == 0 { wall_ns } else { floor_ns };
        }
        (self.known, self.at, self.wall_ns) = (true, now, wall_ns);
    }

    pub fn wall_now_ns(&self, now: Tick) -> u64 {
        self.wall_ns.saturating_add(now.since_ns(self.at))
    }

    pub fn mailbox_now_ns(&self, now: Tick) -> u64 {
        self.mailbox_ns.saturating_add(now.since_ns(self.at))
    }
}

/// What all modes share.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Office {
    pub now: Tick,
    pub wall: Wall,
    pub ledger: Ledger,
    pub vms: Table<Vm>,
    pub sessions: Table<Session>,
    pub flights: BTreeMap<Token, Flight>,
    pub timers: Timers,
    pub effects: Effects,
    pub outputs: VecDeque<Output>,
    /// Numbers of handles, offers and streams; never used again, whichever core life.
    pub next_handle: u64,
    /// Bytes that a snapshot may have. The shell tells it, in each life anew.
    pub state_room: Option<u64>,
    /// Bytes that are set aside for what survives of open submissions. Derived.
    pub ahead_bytes: u64,
    /// Mailboxes that got something in this turn; empty between turns.
    pub woken: Vec<u64>,
    /// After a crash: the sessions that are still there are being told; who is absent is known when all are.
    pub adopting: bool,
    /// After a crash: sessions that were not told yet and that a message of this VM's mailbox is bound to or on its way to. Until it is known
    /// what became of that message, none that came after it is given to anybody.
    pub awaited: BTreeSet<(u64, u64)>,
    /// After a crash: deliveries of before of which it is not known yet whether they were published. Their messages may go back to the mailbox,
    /// so what came after them goes to no other RECEIVE of the same channel before that.
    pub inherited: BTreeSet<Token>,
}

impl Office {
    /// Whether a part of a message is on its way to the channel of this RECEIVE, so that another message must wait.
    pub fn part_on_its_way(&self, token: Token) -> bool {
        self.ledger.part_on_its_way(token.session, token.channel)
    }

    /// Whether a message of this VM's mailbox is with a session of before the crash that was not told yet.
    pub fn awaits_session_of(&self, vm: u64) -> bool {
        self.awaited.range((vm, 0)..=(vm, u64::MAX)).next().is_some()
    }

    /// Whether a message of before the crash may still be on its way to the channel of this RECEIVE.
    pub fn inherits_for(&self, token: Token) -> bool {
        let [first, last] = [0, u32::MAX].map(|end| Token {
            index: end,
            generation: end,
            ..token
        });
        !self.inherited.is_empty() && self.inherited.range(first..=last).next().is_some()
    }

    /// A number for a handle.
    pub fn handle(&mut self) -> u64 {
        self.next_handle += 1;
        self.next_handle
    }

    /// Whether the state may grow by so many bytes on behalf of a VM (or of the host, as whose all counts that is nobody's in particular), and
    /// still every snapshot fits, with what becomes of open submissions. `lasting`: something that stays as long as somebody likes. Of that
    /// there is less, so that what makes the state smaller again finds room.
    ///
    /// A VM may have as much as is left when it has it, so that it never takes all: one that fills the room gets half, and who comes then half of
    /// the rest. Of what lasts that is all that is its own; of the rest, its open submissions.
    ///
    /// # Errors
    /// [`Refusal::StateBytes`].
    pub fn has_room(&self, vm: u64, bytes: u64, lasting: bool) -> Result<(), Refusal> {
        let Some(room) = self.state_room else {
            return Ok(());
        };
        let most = if lasting { room / 4 * 3 } else { room / 16 * 15 };
        let taken = self.ledger.books.total().saturating_add(self.ahead_bytes);
        let left = most.saturating_sub(taken);
        let lasts = if lasting { self.ledger.books.part(vm) } else { 0 };
        // It has `own` and `bytes` then, and that much is to be left beside.
        let own = self.vms.get(&vm).map_or(0, |entry| {
            entry.ahead_bytes.saturating_add(lasts).saturating_add(bytes)
        });
        if own.saturating_add(bytes) <= left {
            Ok(())
        } else {
            Err(Refusal::StateBytes)
        }
    }

    /// A change of what survives: applied and journaled.
    pub fn record(&mut self, record: Record) {
        self.ledger.apply(&record);
        if let Record::Published { token, .. } = &record {
            self.inherited.remove(token);
        }
        self.outputs.push_back(Output::Journal(record));
    }

    /// The VM of a token's session.
    pub fn vm_of(&self, token: Token) -> Option<u64> {
        self.sessions.get(&token.session).map(|session| session.vm)
    }

    pub fn vm_mut(&mut self, vm: u64) -> Option<&mut Vm> {
        self.vms.get_mut(&vm)
    }

    /// Whether a VM is known to have no device now.
    pub fn is_absent(&self, vm: u64) -> bool {
        let connected = |entry: &Vm| !entry.sessions.is_empty();
        !self.adopting && !self.vms.get(&vm).is_some_and(connected)
    }

    /// VMs that have no device now.
    pub fn absent_vms(&self) -> Vec<u64> {
        self.vms.keys().filter(|vm| self.is_absent(*vm)).collect()
    }

    /// A VM's limits; the VM is made when it is new.
    pub fn set_limits(&mut self, vm: u64, limits: VmLimits) {
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.limits = limits;
        } else {
            self.vms.insert(
                vm,
                Vm {
                    limits,
                    ..Vm::default()
                },
            );
        }
    }

    /// Logs a refusal, once in a while, and counts it.
    pub fn log_refusal(&mut self, vm: u64, refusal: Refusal) {
        let Some(entry) = self.vms.get_mut(&vm) else {
            return;
        };
        entry.counters.refusals = entry.counters.refusals.saturating_add(1);
        let Some(left_out) = entry.log.allow(self.now, refusal) else {
            return;
        };
        let status = refusal.status().name().unwrap_or("failed");
        let text = if left_out == 0 {
            format!("refused ({status}): {}", refusal.text())
        } else {
            format!(
                "refused ({status}): {}; {left_out} more since the last line",
                refusal.text()
            )
        };
        self.outputs.push_back(Output::Log { vm, text });
    }

    /// Opens a submission: from here on it is in the table and gets its answer by [`Office::end`].
    pub fn park(&mut self, fetched: &Fetched, wait: Wait) {
        let Some(vm) = self.vm_of(fetched.token) else {
            return;
        };
        let charged_bytes = if Opcode(fetched.opcode.0).is_receive() {
            0
        } else {
            fetched.data_bytes
        };
        let ahead_bytes = ahead::submission(fetched.opcode, fetched.meta.len());
        self.ahead_bytes = self.ahead_bytes.saturating_add(ahead_bytes);
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.flights += 1;
            entry.bytes_in_flight = entry.bytes_in_flight.saturating_add(charged_bytes);
            entry.ahead_bytes = entry.ahead_bytes.saturating_add(ahead_bytes);
        }
        self.timers.arm(fetched.deadline, Timer::Deadline(fetched.token));
        let flight = Flight {
            vm,
            opcode: fetched.opcode.0,
            tag: fetched.tag,
            data_bytes: fetched.data_bytes,
            charged_bytes,
            deadline: fetched.deadline,
            wait,
            ending: None,
            ahead_bytes,
        };
        self.flights.insert(fetched.token, flight);
    }

    /// Takes a submission out of the table, without an answer.
    pub fn unpark(&mut self, token: Token) -> Option<Flight> {
        let flight = self.flights.remove(&token)?;
        self.timers.disarm(flight.deadline, Timer::Deadline(token));
        self.ahead_bytes = self.ahead_bytes.saturating_sub(flight.ahead_bytes);
        if let Some(entry) = self.vms.get_mut(&flight.vm) {
            entry.flights = entry.flights.saturating_sub(1);
            entry.bytes_in_flight = entry.bytes_in_flight.saturating_sub(flight.charged_bytes);
            entry.ahead_bytes = entry.ahead_bytes.saturating_sub(flight.ahead_bytes);
        }
        Some(flight)
    }

    /// Whether a submission is open.
    pub fn is_open(&self, token: Token) -> bool {
        self.flights.contains_key(&token)
    }

    /// Answers a submission that was never opened.
    pub fn answer(&mut self, token: Token, answer: Answer, payload: Vec<u8>, confirm: bool) {
        self.outputs.push_back(Output::Complete {
            token,
            answer,
            payload,
            confirm,
        });
    }

    /// Ends an open submission; nothing, if it has ended already. Returns whether it was open.
    pub fn end(&mut self, token: Token, answer: Answer) -> bool {
        self.end_with(token, answer, Vec::new(), false)
    }

    /// As [`Office::end`], with data.
    pub fn end_with(&mut self, token: Token, answer: Answer, payload: Vec<u8>, confirm: bool) -> bool {
        let flight = self.unpark(token);
        self.forgo(token);
        let Some(flight) = flight else { return false };
        if flight.opcode == Opcode::SEND.0 {
            self.settle_send(token, flight.tag, answer);
        }
        let confirm = confirm || self.ledger.kept.settled.contains_key(&token);
        self.answer(token, answer, payload, confirm);
        true
    }

    /// A SEND that failed is not to succeed after a crash, behind those that came after it and did: its answer holds. (Where there is no room for
    /// that, no other succeeds either.)
    fn settle_send(&mut self, token: Token, tag: u32, answer: Answer) {
        let fits = self.has_room(PEER_HOST, books::ANSWER_BYTES, true).is_ok();
        if fits && !self.ledger.kept.settled.contains_key(&token) {
            let settled = Settled {
                token,
                tag,
                answer,
                payload: Vec::new(),
                send: false,
            };
            self.record(Record::Kept {
                settled: vec![settled],
                change: Change::None,
            });
        }
    }

    /// Answers a submission that was never opened with a refusal, with a line in the log.
    pub fn refuse_at_once(&mut self, vm: u64, token: Token, (opcode, tag): (Opcode, u32), refusal: Refusal) {
        self.log_refusal(vm, refusal);
        if opcode == Opcode::SEND {
            self.settle_send(token, tag, refusal.answer());
        }
        let confirm = self.ledger.kept.settled.contains_key(&token);
        self.answer(token, refusal.answer(), Vec::new(), confirm);
    }

    /// What a submission was about to do does not matter any more.
    pub fn forgo(&mut self, token: Token) {
        if self.ledger.kept.intents.contains_key(&token) {
            self.change(Change::Forgone { token });
        }
    }

    /// A change of what is kept, with no answer.
    pub fn change(&mut self, change: Change) {
        self.record(Record::Kept {
            settled: Vec::new(),
            change,
        });
    }

    /// Ends an open submission (if it is) by an answer that, should the submission come again, is given again; and changes what is kept, as one.
    pub fn settle(&mut self, token: Token, answer: Answer, payload: Vec<u8>, change: Change) -> bool {
        let Some(flight) = self.unpark(token) else {
            if change != Change::None {
                self.change(change);
            }
            return false;
        };
        let settled = Settled {
            token,
            tag: flight.tag,
            answer,
            payload,
            send: false,
        };
        self.settle_all(vec![settled], Some(token), change);
        true
    }

    /// As [`Office::settle`], of a submission that stays open until something is tidied up, and then gets this answer.
    pub fn foretell(&mut self, token: Token, answer: Answer, change: Change) {
        let settled = self.flights.get(&token).map(|flight| Settled {
            token,
            tag: flight.tag,
            answer,
            payload: Vec::new(),
            send: false,
        });
        self.record(Record::Kept {
            settled: settled.into_iter().collect(),
            change,
        });
    }

    /// Settles several submissions and changes what is kept, as one. Those that are open, and `now`, which is not yet, get their answers;
    /// others get them when they come again.
    pub fn settle_all(&mut self, settled: Vec<Settled>, now: Option<Token>, change: Change) {
        self.record(Record::Kept {
            settled: settled.clone(),
            change,
        });
        for Settled {
            token,
            tag: _,
            answer,
            payload,
            send: _,
        } in settled
        {
            if self.unpark(token).is_some() || now == Some(token) {
                self.answer(token, answer, payload, true);
            }
        }
    }

    /// Ends an open submission with a refusal, with a line in the log.
    pub fn refuse(&mut self, token: Token, refusal: Refusal) {
        if let Some(flight) = self.flights.get(&token) {
            let vm = flight.vm;
            self.log_refusal(vm, refusal);
            self.end(token, refusal.answer());
        }
    }

    /// Asks for an effect on behalf of a VM.
    pub fn effect(&mut self, vm: u64, effect: Effect, then: Continuation) -> EffectId {
        let (id, now) = self.effects.add(vm, effect, then);
        if let Some(effect) = now {
            self.outputs.push_back(Output::Effect { id, effect });
        }
        id
    }

    /// As [`Office::effect`], for what an earlier core life may have begun: where a worker of that may still do it, it waits for its end.
    pub fn effect_again(&mut self, vm: u64, effect: Effect, then: Continuation) -> EffectId {
        let (id, now) = self.effects.add_after_burial(vm, effect, then);
        if let Some(effect) = now {
            self.outputs.push_back(Output::Effect { id, effect });
        }
        id
    }

    /// Opens a submission that waits for such an effect.
    pub fn park_effect_again(&mut self, fetched: &Fetched, effect: Effect, then: Continuation) {
        let Some(vm) = self.vm_of(fetched.token) else {
            return;
        };
        let id = self.effect_again(vm, effect, then);
        self.park(fetched, Wait::Effect { id, fills: false });
    }

    /// Opens a submission that waits for an effect.
    pub fn park_effect(&mut self, fetched: &Fetched, effect: Effect, fills: bool, then: Continuation) {
        let Some(vm) = self.vm_of(fetched.token) else {
            return;
        };
        let id = self.effect(vm, effect, then);
        self.park(fetched, Wait::Effect { id, fills });
    }

    /// Whether `source` may reach `target` (a number), without telling whether it exists.
    ///
    /// # Errors
    /// [`Refusal::Reach`], [`Refusal::PeerAbsent`].
    pub fn reach(&self, source: u64, target: u64) -> Result<(), Refusal> {
        if target == PEER_HOST {
            return Ok(());
        }
        match self.vms.get(&source).map(|vm| &vm.reach) {
            Some(Some(reach)) if !reach.contains(&target) => Err(Refusal::Reach),
            Some(_) if self.vms.contains_key(&target) => Ok(()),
            _ => Err(Refusal::PeerAbsent),
        }
    }

    /// Number of the peer of this name, if `source` may reach it.
    ///
    /// # Errors
    /// [`Refusal::Reach`], [`Refusal::PeerAbsent`].
    pub fn resolve(&self, source: u64, name: &str) -> Result<u64, Refusal> {
        if name == vmgmt_abi::chat::HOST_NAME {
            return Ok(PEER_HOST);
        }
        let Some(account) = self.ledger.vms.get(&source) else {
            return Err(Refusal::PeerAbsent);
        };
        let reach = &account.config.reach;
        if !reach.is_empty() && !reach.iter().any(|reachable| reachable == name) {
            return Err(Refusal::Reach);
        }
        self.ledger.number(name).ok_or(Refusal::PeerAbsent)
    }

    /// Works out anew who may reach whom; after a change of the VM table.
    pub fn refresh_reach(&mut self) {
        for (vm, account) in self.ledger.vms.iter() {
            let Some(entry) = self.vms.get_mut(&vm) else {
                continue;
            };
            let reach = &account.config.reach;
            entry.reach = (!reach.is_empty())
                .then(|| reach.iter().filter_map(|name| self.ledger.number(name)).collect());
        }
    }

    /// Takes a place among the open files of a VM.
    ///
    /// # Errors
    /// [`Refusal::OpenFiles`].
    pub fn take_file(&mut self, vm: u64) -> Result<(), Refusal> {
        let Some(entry) = self.vms.get_mut(&vm) else {
            return Err(Refusal::NoSession);
        };
        if entry.open_files >= entry.limits.open_files_max {
            return Err(Refusal::OpenFiles);
        }
        entry.open_files += 1;
        Ok(())
    }

    /// Gives it back.
    pub fn give_file(&mut self, vm: u64) {
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.open_files = entry.open_files.saturating_sub(1);
        }
    }

    pub fn bytes_to(&mut self, vm: u64, bytes: u64) {
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.counters.bytes_to_vm = entry.counters.bytes_to_vm.saturating_add(bytes);
        }
    }

    pub fn bytes_from(&mut self, vm: u64, bytes: u64) {
        if let Some(entry) = self.vms.get_mut(&vm) {
            entry.counters.bytes_from_vm = entry.counters.bytes_from_vm.saturating_add(bytes);
        }
    }
}

/// Room for output in a submission's data area.
#[must_use]
pub fn room(token: Token, data_bytes: u64) -> u64 {
    match token.channel {
        Channel::Port => data_bytes.min(OUTPUT_BYTES_MAX as u64),
        Channel::Ring(_) => data_bytes,
    }
}

/// Bytes of input in a submission's data area: all of it, or what came by the port window.
#[must_use]
pub fn input_bytes(fetched: &Fetched) -> u64 {
    fetched
        .data
        .as_ref()
        .map_or(fetched.data_bytes, |data| data.len() as u64)
}

/// A status as a completion.
#[must_use]
pub fn failed(status: u16) -> Answer {
    Answer::failed(Status(status))
}
