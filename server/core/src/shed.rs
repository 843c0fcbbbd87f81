//! ATTIC: a state that does not fit its memory is made smaller.
//!
//! In: how large it may be. Out: records of what went. No request makes such a state: it can only come from an earlier version, or from a larger
//! memory. It never knows what fits; the shell does.

use crate::hub::Hub;
use crate::journal::Record;
use crate::kept::Change;
use crate::limits::FILE_OFFSET_MAX;
use crate::modes::mailbox::Mailbox;
use vmgmt_abi::chat::PEER_HOST;

impl Hub {
    /// Makes what survives so small that a snapshot has at most so many bytes, as far as it can be done: first checksums of puts go, which
    /// are worked out from the files again at COMMIT; then messages that are on their way to nobody, the oldest of the fullest mailbox first.
    /// How many messages went.
    pub fn shed(&mut self, bytes: u64) -> u64 {
        let office = &mut self.office;
        let puts = office.ledger.kept.puts.iter();
        let known: Vec<u64> = puts
            .filter(|(_, put)| put.coverage.count() > 0)
            .map(|(handle, _)| *handle)
            .collect();
        for handle in known {
            if office.ledger.books.total() <= bytes {
                return 0;
            }
            office.change(Change::Wrote {
                handle,
                offset: 0,
                bytes: FILE_OFFSET_MAX,
                crc32: None,
                extent: 0,
            });
        }
        let mut dropped = 0;
        while office.ledger.books.total() > bytes {
            let ledger = &office.ledger;
            let mailboxes = ledger.vms.iter().map(|(vm, account)| (vm, &account.mailbox));
            let fullest = mailboxes
                .chain([(PEER_HOST, &ledger.host)])
                .filter_map(|(target, mailbox)| Some((target, mailbox, Mailbox::oldest(mailbox)?)))
                .max_by_key(|(_, mailbox, _)| mailbox.usage().1);
            let Some((target, _, (position, _))) = fullest else {
                break;
            };
            office.record(Record::Dropped { target, position });
            if let Some(entry) = office.vm_mut(target) {
                entry.counters.messages_dropped = entry.counters.messages_dropped.saturating_add(1);
            }
            dropped += 1;
        }
        dropped
    }
}
