//! The port window, core half: one submission at a time, without guest memory.
//!
//! In: the front page's port submission. Out: `Output::Submission`, then the result in the core page, which the front copies out.
//! The result is journaled before it is published, and published again by the next core life until the front has taken it.
//!
//! The window has one record in the in-flight table. It stays until the hub has heard how its submission ended and has journaled that (the end
//! of the turn in which the shell polled it); only then the next submission is begun. So a core that dies sooner leaves the next one what it
//! has to tell. The same goes for the end of the channel when the mode changes: the mode of before stays in the table until then.

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
    /// The hub is being told this, and nothing is begun before it has journaled it.
    Ending { end: Output, polled: bool },
}

impl Port {
    /// The port window as an earlier core life left it; `None`: the table says what no core of this version writes.
    pub fn adopt<W: Words>(desk: &Desk<W>) -> Option<Self> {
        let record = desk.table.port()?;
        // A record that is free still says in which mode the channel was used.
        let used = record.sequence != 0 && is_of(record.sequence, desk.generation);
        Some(Self {
            mode: used.then_some(record.mode),
            adopted: (record.kind != Kind::Free).then_some(record),
            ..Self::default()
        })
    }

    /// The device was reset, or the session has ended: the hub hears of a result that the guest has got, and all else is forgotten. The record
    /// stays: it is freed with the end of the turn in which the hub hears of the reset.
    pub fn take_leave<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>) {
        let Self {
            sequence,
            state,
            adopted,
            ..
        } = std::mem::take(self);
        let done = match (adopted, state) {
            (Some(record), _) => (record.kind != Kind::Fetched).then_some(record),
            (None, State::Done { generation, flags }) => Some(PortRecord {
                kind: Kind::Completing,
                flags,
                generation,
                sequence,
                mode: 0,
            }),
            _ => None,
        };
        if let Some(record) = done
            && record.flags & FLAG_CONFIRM != 0
            && front.port_taken() == record.sequence
        {
            let token = token(desk, record.generation);
            desk.tell(token, record.flags & FLAG_LOST == 0, None);
        }
    }

    /// Compares with the front page.
    pub fn look<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>, core: &CorePage<W>) {
        if !self.is_ending() {
            self.go_on(desk, front, core);
        }
        // The shell is to come again when the end of this turn has freed the record: another submission may be there already.
        desk.turn.more |= self.is_ending();
    }

    fn go_on<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>, core: &CorePage<W>) {
        let sequence = front.port_sequence();
        if sequence == self.sequence && self.adopted.is_none() {
            return self.look_taken(desk, front);
        }
        // Of another generation: one of the two pages' readers is late, and is told again.
        if !is_of(sequence, desk.generation) {
            return;
        }
        // `None`: it is being written, and the front will touch the session again.
        let Some(submission) = front.port_submission() else {
            return;
        };
        if submission.sequence != sequence {
            return;
        }
        self.take_over(desk, front, core, sequence);
        if sequence == self.sequence && self.adopted.is_none() {
            return self.look_taken(desk, front);
        }
        self.withdraw(desk, front);
        if !self.is_ending() {
            self.begin(desk, front, core, &submission);
        }
    }

    /// Goes on with what an earlier core life left. What it had only fetched, and what is still wanted, stays for `begin`, which gives it the
    /// same token again.
    fn take_over<W: Words>(
        &mut self,
        desk: &mut Desk<W>,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        sequence: u64,
    ) {
        let Some(record) = self.adopted else {
            return;
        };
        self.sequence = record.sequence;
        let PortRecord {
            kind,
            flags,
            generation,
            ..
        } = record;
        if kind != Kind::Fetched {
            self.adopted = None;
            self.state = State::Done { generation, flags };
            if record.sequence == sequence && front.port_taken() != sequence {
                core.set_port_result(sequence, &desk.table.port_result());
                desk.outputs.push_back(Output::Kick);
            }
        } else if record.sequence != sequence {
            self.adopted = None;
            self.end(desk, Output::Void(token(desk, generation)));
        }
    }

    /// The front has copied the result: it is delivered, for any core.
    fn look_taken<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>) {
        if let State::Done { generation, flags } = self.state
            && flags & FLAG_CONFIRM != 0
            && front.port_taken() == self.sequence
        {
            self.tell(desk, generation, flags & FLAG_LOST == 0);
        }
    }

    /// The window's user aborted, or goes on with another submission.
    fn withdraw<W: Words>(&mut self, desk: &mut Desk<W>, front: &FrontPage<W>) {
        match self.state {
            State::Hub { generation, .. } => self.end(desk, Output::Void(token(desk, generation))),
            State::Done { generation, flags } if flags & FLAG_CONFIRM != 0 => {
                // The front says of no later submission that it was taken before this one's end is told.
                let taken = front.port_taken() == self.sequence;
                self.tell(desk, generation, taken && flags & FLAG_LOST == 0);
            }
            State::Done { .. } => self.state = State::Idle,
            State::Idle | State::Ending { .. } => {}
        }
    }

    fn tell<W: Words>(&mut self, desk: &mut Desk<W>, generation: u32, published: bool) {
        let token = token(desk, generation);
        self.end(desk, Output::Published { token, published });
    }

    /// Tells the hub an end.
    fn end<W: Words>(&mut self, desk: &mut Desk<W>, end: Output) {
        match end {
            Output::Published { token, published } => desk.tell(token, published, None),
            _ => desk.outputs.push_back(end.clone()),
        }
        self.state = State::Ending { end, polled: false };
    }

    const fn is_ending(&self) -> bool {
        matches!(self.state, State::Ending { .. })
    }

    /// The shell has polled this.
    pub fn note_polled(&mut self, output: &Output) {
        if let State::Ending { end, polled } = &mut self.state {
            *polled |= output == end;
        }
    }

    /// The end of a turn: the hub has journaled what was polled.
    pub fn note_told<W: Words>(&mut self, desk: &Desk<W>) {
        if matches!(self.state, State::Ending { polled: true, .. }) {
            desk.table.set_port_free();
            self.state = State::Idle;
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
        // Taken already: its record went when the hub knew.
        if bytes.is_empty() || (self.adopted.is_none() && front.port_taken() == *sequence) {
            (self.sequence, self.adopted) = (*sequence, None);
            desk.table.set_port_free();
            return;
        }
        if self.mode.take_if(|before| before != mode).is_some() {
            let session = desk.settings.session;
            let channel = Channel::Port;
            return self.end(desk, Output::ChannelClosed { session, channel });
        }
        self.sequence = *sequence;
        let adopted = self.adopted.take();
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
}

fn is_of(sequence: u64, generation: u64) -> bool {
    sequence >> 32 == generation & 0xffff_ffff
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
