//! What the core writes down for the next one: the hub's records, and a snapshot when it pays.
//!
//! In: the hub, its records before what depends on them. Out: words of the hub's memory, and lines for the log. Must never know where the
//! records come from.
//!
//! The hub is told how large a snapshot may be and refuses what would make its state larger, so every snapshot fits. One that does not (the
//! state is of an earlier version, which did not know) is no reason to end: the next core would end as well, and nobody be served any
//! more. Its records go on behind the snapshot that is in force, as long as there is room for them; most of them make the state smaller. Only
//! when there is none, or a record is of a feature that the snapshot in force does not name, is as much given up as is needed: see [`Hub::shed`].

use super::journal::{Fill, Journal, JournalError};
use crate::fault;
use anyhow::Context;
use std::collections::{BTreeSet, VecDeque};
use vmgmt_core::{Hub, Record, Saved, feature};
use vmgmt_device::page::Words;

/// A long record's memory is not kept.
const RECORD_BYTES_KEPT_MAX: usize = 64 << 10;

/// The hub's memory, as its core writes it.
pub struct Saving<W: Words> {
    journal: Journal<W>,
    snapshot_bytes: usize,
    /// Features that the snapshot names, or that were in use in this life: see [`vmgmt_core::feature`].
    named: BTreeSet<&'static str>,
    /// The record that is being written; between two it only keeps its memory.
    record: Vec<u8>,
    /// The hub's bytes when they did not fit: not tried again before they are fewer.
    too_many: Option<u64>,
    /// It was said that the memory is nearly full.
    nearly_full: bool,
    lines: VecDeque<String>,
}

impl<W: Words> Saving<W> {
    /// Of a memory that is open.
    pub fn new(journal: Journal<W>) -> Self {
        Self {
            journal,
            snapshot_bytes: 0,
            named: BTreeSet::new(),
            record: Vec::new(),
            too_many: None,
            nearly_full: false,
            lines: VecDeque::new(),
        }
    }

    /// Bytes that a snapshot may have: for `Input::StateRoom`.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        self.journal.room_bytes() as u64
    }

    /// The next line for the log.
    pub fn poll_line(&mut self) -> Option<String> {
        self.lines.pop_front()
    }

    /// A core life begins. `snapshot`: as [`Saving::pack`] has made it.
    ///
    /// # Errors
    /// The memory cannot be used.
    pub fn begin(&mut self, hub: &Hub, snapshot: Option<Vec<u8>>) -> anyhow::Result<()> {
        if let Some(snapshot) = snapshot {
            return self.put(hub, &snapshot);
        }
        // What goes on behind the snapshot in force is of what that names.
        let recovered = self.journal.recover().context("the hub's state")?;
        let bytes = recovered.snapshot.unwrap_or_default();
        let in_force = Saved::from_bytes(&bytes).context("the hub's state")?;
        self.named = named(&in_force);
        self.snapshot_bytes = bytes.len();
        Ok(())
    }

    /// Writes a record of the hub before what depends on it goes out.
    ///
    /// # Errors
    /// The memory cannot be used.
    pub fn write(&mut self, hub: &mut Hub, record: &Record) -> anyhow::Result<()> {
        if let Some(name) = record.feature().filter(|name| !self.named.contains(name)) {
            // A program of before is to find the name of what it does not know before it finds a record that it cannot read.
            self.named.insert(name);
            return self.snapshot(hub);
        }
        self.record.clear();
        self.record.shrink_to(RECORD_BYTES_KEPT_MAX);
        record.write(&mut self.record);
        let appended = self.journal.append(&self.record);
        match appended {
            Ok(()) if self.fill().compact && self.is_worth_a_try(hub) => {
                if let Some(snapshot) = self.pack(hub) {
                    self.put(hub, &snapshot)?;
                }
            }
            Ok(()) => {}
            // The hub's state has the change already: the snapshot stands for the record.
            Err(JournalError::Full { .. }) => return self.snapshot(hub),
            Err(error) => return Err(error.into()),
        }
        self.tell_fill(hub);
        Ok(())
    }

    /// Nobody waits for anything: if it pays then, a new snapshot. Whether one was written.
    ///
    /// # Errors
    /// The memory cannot be used.
    pub fn idle(&mut self, hub: &mut Hub) -> anyhow::Result<bool> {
        if !self.fill().compact_idle || !self.is_worth_a_try(hub) {
            return Ok(false);
        }
        let Some(snapshot) = self.pack(hub) else {
            return Ok(false);
        };
        self.put(hub, &snapshot)?;
        Ok(true)
    }

    /// A snapshot that names only what is in use now, however much was: what a program of before looks at.
    ///
    /// # Errors
    /// The memory cannot be used.
    pub fn tidy_up(&mut self, hub: &mut Hub) -> anyhow::Result<()> {
        let before = std::mem::take(&mut self.named);
        match self.pack(hub) {
            Some(snapshot) => self.put(hub, &snapshot),
            None => {
                self.named = before;
                Ok(())
            }
        }
    }

    /// A snapshot that stands for all records so far. `None`: it does not fit, and the hub's records are to be written as ever.
    pub fn pack(&mut self, hub: &mut Hub) -> Option<Vec<u8>> {
        let mut snapshot = hub.snapshot();
        snapshot.name(self.named.iter().copied());
        let names = named(&snapshot);
        let snapshot = snapshot.to_bytes();
        if snapshot.len() as u64 > self.room_bytes() {
            if self.too_many.replace(hub.state_bytes()).is_none() {
                self.lines.push_back(format!(
                    "what survives a crash ({} bytes) does not fit its memory: it is kept as records until there are fewer; what waits in mailboxes must be read, or lower limits.mailbox-bytes-max",
                    snapshot.len()
                ));
            }
            return None;
        }
        (self.named, self.too_many) = (names, None);
        hub.drop_records();
        Some(snapshot)
    }

    /// Puts it in force. Nothing may have happened to the hub meanwhile.
    fn put(&mut self, hub: &Hub, snapshot: &[u8]) -> anyhow::Result<()> {
        self.snapshot_bytes = snapshot.len();
        self.journal
            .snapshot(fault::replaced("snapshot").unwrap_or(snapshot))
            .context("the hub's state does not fit its memory: lower the mailbox limits")?;
        self.tell_fill(hub);
        Ok(())
    }

    /// A new snapshot, whatever it costs: there is no other place for what is to be written.
    fn snapshot(&mut self, hub: &mut Hub) -> anyhow::Result<()> {
        let snapshot = match self.pack(hub) {
            Some(snapshot) => snapshot,
            None => {
                let dropped = hub.shed(self.room_bytes() / 4 * 3);
                self.lines.push_back(format!(
                    "what survives a crash does not fit its memory: checksums of puts were forgotten (COMMIT reads their files), and {dropped} messages dropped, the oldest of the fullest mailboxes"
                ));
                self.pack(hub)
                    .context("the hub's state does not fit its memory: lower the mailbox limits")?
            }
        };
        self.put(hub, &snapshot)
    }

    /// One that did not fit is not packed again for every record.
    fn is_worth_a_try(&self, hub: &Hub) -> bool {
        let less = self.room_bytes() / 16;
        self.too_many
            .is_none_or(|bytes| hub.state_bytes().saturating_add(less) < bytes)
    }

    fn fill(&self) -> Fill {
        let journal = &self.journal;
        Fill::of(journal.room_bytes(), self.snapshot_bytes, journal.journal_bytes())
    }

    /// The hub refuses what would make its state larger than its memory, long before it is.
    fn tell_fill(&mut self, hub: &Hub) {
        let sixteenth = self.room_bytes() / 16;
        // (A message of a megabyte may be too much a little below three quarters.)
        let bounds = if self.nearly_full { 10 } else { 11 };
        let nearly_full = hub.state_bytes() > sixteenth * bounds;
        if nearly_full == self.nearly_full {
            return;
        }
        self.nearly_full = nearly_full;
        let text = if nearly_full {
            "the memory for what survives a crash is nearly full: messages, puts, opens and offers are refused until what waits in mailboxes is read, or lower limits.mailbox-bytes-max"
        } else {
            "there is room again in the memory for what survives a crash"
        };
        self.lines.push_back(text.to_owned());
    }
}

fn named(snapshot: &Saved) -> BTreeSet<&'static str> {
    let known = feature::ALL.into_iter();
    known
        .filter(|name| snapshot.features().any(|named| named == *name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmgmt_abi::chat::ALL_NAME;
    use vmgmt_abi::{Mode, Opcode};
    use vmgmt_core::policy::{VmConfig, VmLimits};
    use vmgmt_core::{ControlReply, ControlRequest, Input, Output};
    use vmgmt_device::Tick;
    use vmgmt_device::page::PlainWords;
    use vmgmt_device::rings::{Channel, Fetched, Token};

    /// A hub's memory of 2 MiB: 1 MiB for a snapshot and its records.
    const WORDS: usize = 2 << 17;
    const VMS: u64 = 40;

    /// A core, as far as it writes down.
    struct Core {
        hub: Hub,
        saving: Saving<PlainWords>,
        sent: u64,
        refused: u64,
        lines: Vec<String>,
    }

    impl Core {
        /// A life on what the one before left. `knows`: it tells the hub how much room there is, as earlier versions did not.
        fn begin(words: &PlainWords, life: u64, knows: bool) -> Self {
            let journal = Journal::open(words.clone()).unwrap();
            let mut hub = crate::core::event_loop::recover(&journal, life, BTreeSet::new()).unwrap();
            let mut saving = Saving::new(journal);
            if knows {
                hub.handle(Tick(1), Input::StateRoom(saving.room_bytes()));
            }
            let snapshot = saving.pack(&mut hub);
            saving.begin(&hub, snapshot).unwrap();
            let mut core = Self {
                hub,
                saving,
                sent: 0,
                refused: 0,
                lines: Vec::new(),
            };
            core.handle(Input::WallClock { now_ns: 1 << 60 });
            core
        }

        fn handle(&mut self, input: Input) {
            self.hub.handle(Tick(1), input);
            while let Some(output) = self.hub.poll_output() {
                match output {
                    Output::Journal(record) => self.saving.write(&mut self.hub, &record).unwrap(),
                    Output::Complete { token, .. } => {
                        let published = true;
                        self.hub.handle(Tick(1), Input::Published { token, published });
                    }
                    Output::Control { reply, .. } => match reply {
                        ControlReply::Sent { number } => self.sent += number,
                        _ => self.refused += 1,
                    },
                    _ => {}
                }
            }
            while let Some(line) = self.saving.poll_line() {
                self.lines.push(line);
            }
        }

        fn come(&mut self) {
            for vm in 1..=VMS {
                self.handle(Input::Vm(VmConfig {
                    vm,
                    name: format!("vm{vm}"),
                    shares: Vec::new(),
                    reach: Vec::new(),
                    send_to_all: false,
                    limits: VmLimits::default(),
                    transient: false,
                }));
                self.handle(Input::SessionOpened { session: vm, vm });
                self.submit(vm, 0, Opcode::PUBLISH, 1, 0);
            }
        }

        fn submit(&mut self, session: u64, index: u32, opcode: Opcode, argument: u64, data_bytes: u64) {
            self.handle(submission(session, index, opcode, argument, data_bytes));
        }

        /// The operator sends so many bytes to all.
        fn send_all(&mut self, bytes: usize) {
            let request = ControlRequest::Send {
                target: ALL_NAME.to_owned(),
                message: vec![7; bytes],
                key: 0,
            };
            self.handle(Input::Control {
                client: 1,
                id: 1,
                request,
            });
        }

        fn held(&self) -> u64 {
            held_by(&self.hub)
        }
    }

    fn held_by(hub: &Hub) -> u64 {
        let statuses = hub.vm_statuses();
        statuses.iter().map(|status| status.mailbox_messages).sum()
    }

    fn receive(session: u64, index: u32) -> Input {
        submission(session, index, Opcode::RECEIVE, 0, 40 << 10)
    }

    fn submission(session: u64, index: u32, opcode: Opcode, argument: u64, data_bytes: u64) -> Input {
        let token = Token {
            session,
            channel: Channel::Ring(0),
            index,
            generation: 1,
        };
        Input::Submission(Box::new(Fetched {
            token,
            mode: Mode::CHAT,
            opcode,
            flags: 0,
            tag: index,
            handle: 0,
            offset: 0,
            argument,
            deadline: Tick::NEVER,
            meta: Vec::new(),
            data_bytes,
            data: None,
            again: false,
        }))
    }

    #[test]
    fn after_messages_to_all_that_nobody_reads_the_next_core_serves() {
        let words = PlainWords::new(WORDS);
        let mut core = Core::begin(&words, 1, true);
        core.come();
        for _ in 0..4 {
            // In the journal one of them is a fiftieth of what it is in a snapshot.
            core.send_all(60 << 10);
        }
        let (sent, held) = (core.sent, core.held());
        assert!((1..4 * VMS).contains(&sent) && sent == held, "{sent} {held}");
        assert!(core.lines.iter().any(|line| line.contains("nearly full")));
        drop(core);
        let mut next = Core::begin(&words, 2, true);
        assert_eq!((next.held(), next.saving.too_many), (held, None));
        next.come();
        for vm in 1..=VMS {
            next.submit(vm, 9, Opcode::RECEIVE, 0, 64 << 10);
        }
        assert!(next.held() < held);
        next.send_all(100);
        assert!(next.sent > 0);
    }

    #[test]
    fn a_state_that_does_not_fit_is_served_until_it_does() {
        let words = PlainWords::new(WORDS);
        let mut before = Core::begin(&words, 1, false);
        before.come();
        // An earlier version took this, and died when it was to be saved.
        before.send_all(60 << 10);
        drop(before);
        let mut core = Core::begin(&words, 2, true);
        assert!(core.saving.too_many.is_some());
        assert_eq!(core.held(), VMS);
        core.send_all(1);
        assert_eq!((core.sent, core.refused), (0, 1), "nothing that makes it larger");
        core.come();
        assert!(
            core.lines.iter().any(|line| line.contains("does not fit")),
            "{:?}",
            core.lines
        );
        for vm in 1..=VMS {
            core.submit(vm, 9, Opcode::RECEIVE, 0, 64 << 10);
        }
        assert_eq!(core.held(), 0);
        let next = Core::begin(&words, 3, true);
        assert_eq!((next.held(), next.saving.too_many), (0, None));
    }

    #[test]
    fn no_record_is_lost_to_a_snapshot_that_did_not_fit() {
        let words = PlainWords::new(WORDS);
        let mut before = Core::begin(&words, 1, false);
        before.come();
        // So many records that a snapshot would pay.
        (0..13).for_each(|_| before.send_all(60 << 10));
        drop(before);
        let mut core = Core::begin(&words, 2, true);
        core.come();
        let mut tries = 0;
        for vm in 1..=VMS {
            // Each message comes in two parts, and the place for the next part waits already; of the last one only the first has come.
            for index in 1..25 {
                core.hub.handle(Tick(1), receive(vm, index));
            }
            let before = core.saving.too_many;
            core.handle(receive(vm, 25));
            tries += usize::from(core.saving.too_many.is_some() && core.saving.too_many != before);
            let journal = Journal::open(words.clone()).unwrap();
            let next = crate::core::event_loop::recover(&journal, 3, BTreeSet::new()).unwrap();
            assert!(next.surviving() == core.hub.surviving(), "after VM {vm}");
            core.handle(receive(vm, 26));
        }
        assert!(tries > 10, "{tries}");
    }

    #[test]
    fn where_there_is_no_room_for_records_either_the_oldest_messages_go() {
        let words = PlainWords::new(WORDS);
        let mut before = Core::begin(&words, 1, false);
        before.come();
        before.send_all(60 << 10);
        drop(before);
        let mut core = Core::begin(&words, 2, true);
        // The configuration is told again and again, and each time written down.
        while core.saving.too_many.is_some() {
            core.come();
        }
        assert!((1..VMS).contains(&core.held()), "{}", core.held());
        assert!(core.lines.iter().any(|line| line.contains("messages dropped")));
        let next = Core::begin(&words, 3, true);
        assert_eq!((next.held(), next.saving.too_many), (core.held(), None));
    }
}
