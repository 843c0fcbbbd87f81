//! GARDEN, what the core writes down for the next one: records of the hub and snapshots.
//!
//! In: records, before what depends on them. Out: words of the hub's memory.

use super::*;

impl Core {
    pub(super) fn write_record(&mut self, record: &vmgmt_core::Record) {
        let mut bytes = Vec::with_capacity(128);
        record.write(&mut bytes);
        let fill = self.fill();
        let long = fill.compact || self.journal.journal_bytes() > JOURNAL_BYTES_MAX;
        match self.journal.append(&bytes) {
            Ok(()) if !long => {}
            Ok(()) | Err(JournalError::Full { .. }) => self.take_snapshot(),
            Err(error) => panic!("the journal: {error}"),
        }
    }

    fn fill(&self) -> Fill {
        let journal = &self.journal;
        Fill::of(journal.room_bytes(), self.snapshot_bytes, journal.journal_bytes())
    }

    pub(super) fn take_snapshot(&mut self) {
        let snapshot = if self.outside.fault.get() == Fault::SnapshotsTwice {
            self.hub.save()
        } else {
            let snapshot = self.hub.snapshot();
            self.hub.drop_records();
            snapshot
        };
        let snapshot = snapshot.to_bytes();
        if let Err(error) = self.journal.snapshot(&snapshot) {
            panic!("the hub's state ({} bytes): {error}", snapshot.len());
        }
        self.snapshot_bytes = snapshot.len();
    }
}
