//! The port window, core half: one submission at a time, without guest memory.
//!
//! In: the front page's port submission. Out: `Output::Submission`, then the result in the core page, which the front copies out.
//! The result is journaled before it is published, and published again by the next core life until the front has taken it.

use super::interface::{Answer, Channel, Fetched, Output, PortInput, Token};
use super::limits::PORT_RESULT_BYTES_MAX;
use super::ring::Desk;
use super::shape::{Who, judge_port};
use super::table::{FLAG_CONFIRM, FLAG_LOST, Kind, PortRecord};
use crate::Tick;
use crate::page::{CorePage, FrontPage, PortSubmission, Words};
use vmgmt_abi::port::OUTPUT_BYTES_MAX;
use vmgmt_abi::{Completion, Mode, Opcode, Status, Submission};
use zerocopy::{FromBytes, IntoBytes};

/// Stands for a ring's number where a place of the port window is meant.
pub(super) const PORT_PLACE: usize = usize::MAX;

/// The port window of a session.
#[derive(Debug, Default)]
pub(super) struct Port {
    /// Sequence of the submission that `state` speaks of.
    sequence: u64,
    mode: Option<u32>,
    state: State,
    /// What an earlier core life knew, until it is compared with the front page.
    adopted: Option<PortRecord>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Hub {
        generation: u32,
        tag: u32,
        buffer: PortInput,
        room: u64,
    },
    /// The result is in the core page.
    Done { generation: u32, flags: u8 },
}

impl Port {
    /// The port window as an earlier core life left it; `None`: the table says what no core of this version writes.
    pub fn adopt<W: Words>(desk: &Desk<W>) -> Option<Self> {
        let record = desk.table.port()?;
        Some(Self {
            adopted: (record.kind != Kind::Free).then_some(record),
            ..Self::default()
        })
    }

    /// Forgets everything: the device was reset.
    pub fn reset<W: Words>(&mut self, desk: &Desk<W>) {
        desk.table.set_port_free();
        *self = Self::default();
    }

    /// Compares with the front page.
    pub fn look<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>, core: &CorePage<W>) {
        let sequence = front.port_sequence();
        if sequence == self.sequence && self.adopted.is_none() {
            self.look_taken(desk, front);
            return;
        }
        // Of another generation: one of the two pages' readers is late, and is told again.
        if sequence >> 32 != desk.generation & 0xffff_ffff {
            return;
        }
        // `None`: it is being written, and the front will touch the session again.
        let Some(submission) = front.port_submission() else {
            return;
        };
        if submission.sequence == sequence && !self.take_over(desk, front, core, sequence) {
            self.withdraw(desk, front);
            self.begin(desk, front, core, &submission);
        }
    }

    /// Goes on with what an earlier core life left; true: nothing is to be begun.
    fn take_over<W: Words>(
        &mut self,
        desk: &mut Desk<W>,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        sequence: u64,
    ) -> bool {
        let Some(record) = self.adopted else {
            return false;
        };
        self.sequence = record.sequence;
        self.mode = Some(record.mode);
        let PortRecord {
            kind,
            flags,
            generation,
            ..
        } = record;
        if kind == Kind::Fetched {
            if record.sequence == sequence {
                // `begin` gives it the same token again.
                return false;
            }
            let token = token(desk, generation);
            desk.outputs.push_back(Output::Void(token));
            self.adopted = None;
            return false;
        }
        self.adopted = None;
        self.state = State::Done { generation, flags };
        if record.sequence != sequence {
            return false;
        }
        if front.port_taken() != sequence {
            core.set_port_result(sequence, &desk.table.port_result());
            desk.outputs.push_back(Output::Kick);
        }
        self.look_taken(desk, front);
        true
    }

    /// The front has copied the result: it is delivered, for any core.
    fn look_taken<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>) {
        if let State::Done { generation, flags } = &mut self.state
            && *flags & FLAG_CONFIRM != 0
            && front.port_taken() == self.sequence
        {
            let token = token(desk, *generation);
            desk.tell(token, *flags & FLAG_LOST == 0, Some((PORT_PLACE, 0, *generation)));
            *flags = 0;
        }
    }

    /// The window's user aborted, or goes on with another submission.
    fn withdraw<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>) {
        match std::mem::take(&mut self.state) {
            State::Idle => {}
            State::Hub { generation, .. } => {
                let token = token(desk, generation);
                desk.outputs.push_back(Output::Void(token));
            }
            State::Done { generation, flags } => {
                if flags & FLAG_CONFIRM != 0 {
                    let token = token(desk, generation);
                    let taken = front.port_taken() == self.sequence;
                    desk.tell(token, taken && flags & FLAG_LOST == 0, None);
                }
            }
        }
    }

    fn begin<W: Words>(
        &mut self,
        desk: &mut Desk<W>,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        submission: &PortSubmission,
    ) {
        let PortSubmission {
            sequence,
            mode,
            bytes,
        } = submission;
        self.sequence = *sequence;
        let adopted = self.adopted.take();
        // Taken already: its record went when the hub knew.
        if bytes.is_empty() || (adopted.is_none() && front.port_taken() == *sequence) {
            desk.table.set_port_free();
            return;
        }
        if self.mode.is_some_and(|before| before != *mode) {
            desk.outputs.push_back(Output::ChannelClosed {
                session: desk.settings.session,
                channel: Channel::Port,
            });
        }
        self.mode = Some(*mode);
        let generation = match adopted {
            Some(record) => record.generation,
            None => {
                let generation = desk.table.next_port_generation();
                desk.table.set_port_fetched(*sequence, *mode, generation);
                generation
            }
        };
        desk.counters.submissions += 1;
        desk.turn.fetched += 1;
        let again = adopted.is_some();
        let Ok((header, input)) = Submission::read_from_prefix(bytes) else {
            self.state = hub(generation, 0, Vec::new(), 0);
            return self.refuse(desk, core, Status::BAD_ARGUMENT);
        };
        let mode = Mode(*mode);
        let shape = match judge_port(&header, mode, desk.settings.modes, input.len()) {
            Ok(shape) => shape,
            Err(status) => {
                self.state = hub(generation, header.tag, Vec::new(), 0);
                return self.refuse(desk, core, status);
            }
        };
        let (meta, data) = input.split_at((header.meta_bytes as usize).min(input.len()));
        let mut data_bytes = header.length.saturating_sub(u64::from(header.meta_bytes));
        if !shape.data_is_input {
            // More could not be given back.
            data_bytes = data_bytes.min(OUTPUT_BYTES_MAX as u64);
        }
        self.state = hub(generation, header.tag, data.to_vec(), data_bytes);
        match shape.who {
            Who::Echo => {
                let answer = Answer::ok(meta.len() as u64);
                self.finish(desk, core, answer, meta, false);
            }
            // No other submission is in flight here.
            Who::Noop | Who::Prove | Who::Cancel => self.finish(desk, core, Answer::ok(0), &[], false),
            Who::Hub => {
                if again {
                    desk.counters.again += 1;
                }
                let token = token(desk, generation);
                desk.outputs.push_back(Output::Submission(Box::new(Fetched {
                    token,
                    mode,
                    opcode: Opcode(header.opcode),
                    flags: header.flags,
                    tag: header.tag,
                    handle: header.handle,
                    offset: header.offset,
                    argument: header.argument,
                    deadline: match header.deadline_ns {
                        0 => Tick::NEVER,
                        nanoseconds => desk.now.after_ns(nanoseconds),
                    },
                    meta: meta.to_vec(),
                    data_bytes,
                    data: Some(data.to_vec()),
                    again,
                })));
            }
        }
    }

    fn refuse<W: Words>(&mut self, desk: &mut Desk<W>, core: &CorePage<W>, status: Status) {
        desk.counters.refused += 1;
        self.finish(desk, core, Answer::failed(status), &[], false);
    }

    /// The hub's answer; false: the token is stale.
    pub fn complete<W: Words>(
        &mut self,
        desk: &mut Desk<W>,
        core: &CorePage<W>,
        token: Token,
        answer: Answer,
        payload: &[u8],
        confirm: bool,
    ) -> bool {
        let ours = self.is_in_flight(token);
        if ours {
            self.finish(desk, core, answer, payload, confirm);
        }
        ours
    }

    fn finish<W: Words>(
        &mut self,
        desk: &mut Desk<W>,
        core: &CorePage<W>,
        mut answer: Answer,
        payload: &[u8],
        confirm: bool,
    ) {
        let State::Hub {
            generation,
            tag,
            buffer,
            room,
        } = std::mem::take(&mut self.state)
        else {
            return;
        };
        let mut output = buffer.output;
        let mut flags = if confirm { FLAG_CONFIRM } else { 0 };
        if payload.len() as u64 > room || payload.len() > OUTPUT_BYTES_MAX {
            answer = Answer::failed(Status::TOO_LARGE);
            flags |= FLAG_LOST;
            output.clear();
        } else {
            output.resize(output.len().max(payload.len()), 0);
            output.iter_mut().zip(payload).for_each(|(to, from)| *to = *from);
        }
        let completion = Completion {
            result: answer.result,
            extra: answer.extra,
            detail: answer.detail,
            reserved: 0,
            tag,
            status: answer.status,
            flags: answer.flags & !vmgmt_abi::ring::completion_flag::PHASE,
        };
        let mut result = Vec::with_capacity(PORT_RESULT_BYTES_MAX);
        result.extend_from_slice(completion.as_bytes());
        result.extend_from_slice(&output);
        desk.table.set_port_completing(generation, flags, &result);
        core.set_port_result(self.sequence, &result);
        self.state = State::Done { generation, flags };
        desk.outputs.push_back(Output::Kick);
        super::complete::count(desk);
    }

    pub fn is_in_flight(&self, token: Token) -> bool {
        matches!(&self.state, State::Hub { generation, .. } if *generation == token.generation && token.index == 0)
    }

    /// Input and room of the submission in flight.
    pub fn buffer(&self) -> Option<(&[u8], u64)> {
        match &self.state {
            State::Hub { buffer, room, .. } => Some((&buffer.data, *room)),
            _ => None,
        }
    }

    /// Writes output at `offset` of the data area; false: it does not fit.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let State::Hub { buffer, room, .. } = &mut self.state else {
            return false;
        };
        let end = offset.checked_add(bytes.len() as u64);
        let room = (*room).min(OUTPUT_BYTES_MAX as u64);
        let Some(end) = end.filter(|end| *end <= room) else {
            return false;
        };
        let (offset, end) = (offset as usize, end as usize);
        buffer.output.resize(buffer.output.len().max(end), 0);
        if let Some(into) = buffer.output.get_mut(offset..end) {
            into.copy_from_slice(bytes);
        }
        true
    }

    /// The hub knows that the result with this token generation was delivered.
    pub fn told<W: Words>(&mut self, desk: &Desk<W>, generation: u32) {
        if matches!(self.state, State::Done { generation: ours, .. } if ours == generation) {
            desk.table.set_port_free();
            self.state = State::Idle;
        }
    }
}

fn hub(generation: u32, tag: u32, data: Vec<u8>, room: u64) -> State {
    State::Hub {
        generation,
        tag,
        buffer: PortInput {
            data,
            output: Vec::new(),
        },
        room,
    }
}

fn token<W: Words>(desk: &Desk<W>, generation: u32) -> Token {
    Token {
        session: desk.settings.session,
        channel: Channel::Port,
        index: 0,
        generation,
    }
}
