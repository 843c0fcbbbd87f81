//! ATTIC, books: how many bytes the saved form of the ledger takes at most, and who they are of.
//!
//! In: what comes and what goes. Out: a bound that every snapshot keeps to. It never knows how much room there is.
//!
//! A message in several mailboxes is saved in each of them: one record of a megabyte may be a hundred in the next snapshot. So it is this
//! bound, and not what is written, that tells whether the state fits its memory.

use crate::journal::Message;
use crate::kept::{Change, Intent, Kept, KeptFile, KeptHost, KeptOffer, KeptPut, Settled};
use crate::ledger::Account;
use std::collections::BTreeMap;
use vmgmt_device::rings::Token;

/// Bytes that are of no VM in particular. (No VM has this number.)
pub(crate) const NOBODY: u64 = 0;

/// A hub that keeps nothing, but what is bounded anyhow: the operator's results, names of features.
pub(crate) const EMPTY_BYTES: u64 = 20 << 10;
/// An answer that is not known to be published.
pub(crate) const ANSWER_BYTES: u64 = 192;
const DELIVERING_BYTES: u64 = 128;
const INTENT_BYTES: u64 = 192;
const FILE_BYTES: u64 = 160;
const PUT_BYTES: u64 = 320;
/// A range of a put whose checksum is known.
pub(crate) const RANGE_BYTES: u64 = 24;
/// An offer, or the stream that becomes of it: so that its acceptance takes no more room.
const TRANSFER_BYTES: u64 = 448;
const HOST_TRANSFER_BYTES: u64 = 256;
/// A message in a mailbox, and its delivery, of which there is one at a time: so that to take one needs no room, however little there is.
const MESSAGE_BYTES: u64 = 192 + DELIVERING_BYTES;
pub(crate) const KEY_BYTES: u64 = 28;
const ACCOUNT_BYTES: u64 = 704;
/// One of a VM's shares, and one of those it may reach, without their names.
const GRANT_BYTES: u64 = 48;
const REACH_BYTES: u64 = 9;
/// What a temporary name is longer than the name at most.
const TEMPORARY_BYTES: u64 = 128;

/// The books.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Books {
    total: u64,
    /// By VM: the messages that it sent and nobody took yet, its files, puts, offers and streams.
    parts: BTreeMap<u64, u64>,
}

impl Books {
    /// Bytes that a snapshot has at most.
    pub(crate) const fn total(&self) -> u64 {
        self.total.saturating_add(EMPTY_BYTES)
    }

    /// Those of a VM.
    pub(crate) fn part(&self, vm: u64) -> u64 {
        self.parts.get(&vm).copied().unwrap_or(0)
    }

    pub(super) fn add(&mut self, owner: u64, bytes: u64) {
        self.total = self.total.saturating_add(bytes);
        if owner != NOBODY {
            let part = self.parts.entry(owner).or_default();
            *part = part.saturating_add(bytes);
        }
    }

    pub(super) fn remove(&mut self, owner: u64, bytes: u64) {
        self.total = self.total.saturating_sub(bytes);
        if let Some(part) = self.parts.get_mut(&owner) {
            *part = part.saturating_sub(bytes);
            if *part == 0 {
                self.parts.remove(&owner);
            }
        }
    }
}

/// A message in one mailbox.
pub(crate) fn message(message: &Message) -> u64 {
    message_of(message.source_name.len(), message.body.len() as u64)
}

/// The same of one that is to be sent.
pub(crate) const fn message_of(name_bytes: usize, body_bytes: u64) -> u64 {
    MESSAGE_BYTES
        .saturating_add(name_bytes as u64)
        .saturating_add(body_bytes)
}

/// A VM with its presence; what is in its mailbox and its keys come beside.
pub(super) fn account(account: &Account) -> u64 {
    let config = &account.config;
    let shares = config.shares.iter();
    let shares = shares.map(|grant| GRANT_BYTES + grant.share.len() as u64);
    let reach = config.reach.iter().map(|name| REACH_BYTES + name.len() as u64);
    let description = account.presence.as_ref();
    let description = description.map_or(0, |presence| presence.description.len() as u64);
    ACCOUNT_BYTES + config.name.len() as u64 + description + shares.chain(reach).sum::<u64>()
}

/// An answer that is not known to be published.
pub(super) const fn settled(settled: &Settled) -> u64 {
    // (Its bytes are saved as numbers, of which most take two.)
    ANSWER_BYTES.saturating_add((settled.payload.len() as u64).saturating_mul(2))
}

fn intent(intent: &Intent) -> u64 {
    let temporary = intent.temporary.as_ref();
    INTENT_BYTES + temporary.map_or(0, |(share, path)| (share.len() + path.len()) as u64)
}

fn file(file: &KeptFile) -> u64 {
    FILE_BYTES + (file.share.len() + file.path.len()) as u64
}

fn put(put: &KeptPut) -> u64 {
    let what = &put.what;
    let names = (what.share.len() + what.path.len() + what.temporary.len()) as u64;
    PUT_BYTES + names + put.coverage.count() as u64 * RANGE_BYTES
}

fn offer(offer: &KeptOffer) -> u64 {
    TRANSFER_BYTES + offer.name.len() as u64
}

fn host(host: &KeptHost) -> u64 {
    HOST_TRANSFER_BYTES + host.name.len() as u64
}

/// What is set aside for what becomes of a submission, while it is open.
pub(crate) mod ahead {
    use super::{
        ANSWER_BYTES, FILE_BYTES, HOST_TRANSFER_BYTES, INTENT_BYTES, PUT_BYTES, TEMPORARY_BYTES,
        TRANSFER_BYTES,
    };
    use vmgmt_abi::Opcode;
    use vmgmt_abi::chat::DESCRIPTION_BYTES_MAX;

    /// By a VM's submission with so many bytes of names.
    pub(crate) const fn submission(opcode: Opcode, meta_bytes: usize) -> u64 {
        let meta = meta_bytes as u64;
        match opcode {
            // Nothing is kept of them, or less than before.
            Opcode::NOOP
            | Opcode::ECHO
            | Opcode::IDENTITY
            | Opcode::SHARES
            | Opcode::LIST
            | Opcode::STAT
            | Opcode::READ
            | Opcode::WRITE
            | Opcode::TRUNCATE
            | Opcode::FSYNC
            | Opcode::CHECKSUM
            | Opcode::CLOSE
            | Opcode::COMMIT
            | Opcode::PEERS
            | Opcode::NEXT_OFFER
            | Opcode::RECEIVE => 0,
            Opcode::OPEN => ANSWER_BYTES + FILE_BYTES + meta,
            Opcode::PUT => ANSWER_BYTES + PUT_BYTES + TEMPORARY_BYTES + 2 * meta,
            Opcode::MAKE_DIRECTORY => ANSWER_BYTES + INTENT_BYTES + TEMPORARY_BYTES + meta,
            Opcode::REMOVE | Opcode::RENAME => ANSWER_BYTES + INTENT_BYTES,
            Opcode::OFFER => ANSWER_BYTES + TRANSFER_BYTES + meta,
            Opcode::PUBLISH => DESCRIPTION_BYTES_MAX as u64,
            _ => ANSWER_BYTES,
        }
    }

    /// By an operator's push or pull of a file of this name.
    pub(crate) const fn host_transfer(name_bytes: usize) -> u64 {
        HOST_TRANSFER_BYTES + name_bytes as u64
    }
}

/// What a record is about, as it is kept now: owners and bytes. A record is booked by this, before and after.
pub(super) fn about(kept: &Kept, answers: &[Settled], change: &Change, mut each: impl FnMut(u64, u64)) {
    let mut tokens: Vec<Token> = answers.iter().map(|settled| settled.token).collect();
    tokens.extend(change.token());
    tokens.sort_unstable();
    tokens.dedup();
    for token in &tokens {
        if let Some(kept) = kept.settled.get(token) {
            each(NOBODY, settled(kept));
        }
        if let Some(kept) = kept.intents.get(token) {
            each(NOBODY, intent(kept));
        }
    }
    for number in change.numbers().into_iter().flatten() {
        if let Some(kept) = kept.files.get(&number) {
            each(kept.vm, file(kept));
        }
        if let Some(kept) = kept.puts.get(&number) {
            each(kept.what.vm, put(kept));
        }
        if let Some(kept) = kept.offers.get(&number) {
            each(kept.vm, offer(kept));
        }
        if let Some(kept) = kept.streams.get(&number) {
            each(kept.source.vm, TRANSFER_BYTES);
        }
        if let Some(kept) = kept.host.get(&number) {
            each(NOBODY, host(kept));
        }
    }
}

/// All that is kept: as [`about`].
pub(super) fn everything(kept: &Kept, mut each: impl FnMut(u64, u64)) {
    let Kept {
        settled: answers,
        intents,
        files,
        puts,
        offers,
        streams,
        host: hosts,
        host_results: _, // of a number that is bounded
    } = kept;
    answers.values().for_each(|kept| each(NOBODY, settled(kept)));
    intents.values().for_each(|kept| each(NOBODY, intent(kept)));
    files.values().for_each(|kept| each(kept.vm, file(kept)));
    puts.values().for_each(|kept| each(kept.what.vm, put(kept)));
    offers.values().for_each(|kept| each(kept.vm, offer(kept)));
    streams
        .values()
        .for_each(|kept| each(kept.source.vm, TRANSFER_BYTES));
    hosts.values().for_each(|kept| each(NOBODY, host(kept)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cbor;
    use crate::effect::Identity;
    use crate::kept::{HostStage, KeptEnd, KeptHostStream, KeptStream};
    use crate::ledger::{Delivering, Ledger};
    use crate::modes::coverage::Coverage;
    use crate::modes::mailbox::Held;
    use crate::modes::offers::OfferState;
    use crate::modes::puts::PutOpening;
    use crate::modes::streams::Failure;
    use crate::policy::{Access, ShareGrant, VmConfig, VmLimits};
    use serde::Serialize;
    use std::sync::Arc;
    use vmgmt_device::rings::{Answer, Channel};

    const MOST: u64 = u64::MAX;
    const TOKEN: Token = Token {
        session: MOST,
        channel: Channel::Ring(u8::MAX),
        index: u32::MAX,
        generation: u32::MAX,
    };
    const IDENTITY: Identity = Identity {
        device: MOST,
        inode: MOST,
        born_ns: i64::MIN,
    };
    const END: KeptEnd = KeptEnd {
        vm: MOST,
        session: MOST,
        handle: MOST,
        open: true,
    };
    const FAILURE: Failure = Failure {
        source: u16::MAX,
        target: u16::MAX,
    };

    /// It takes no more than is booked for it, and not much less.
    fn fits(value: &impl Serialize, booked: u64) {
        let mut bytes = Vec::new();
        cbor::write(value, &mut bytes);
        let bytes = bytes.len() as u64;
        assert!(
            (booked / 3..=booked).contains(&bytes),
            "{bytes} bytes, and {booked} in the books"
        );
    }

    fn long() -> String {
        "x".repeat(300)
    }

    #[test]
    fn whatever_is_kept_takes_no_more_than_is_booked() {
        let answer = Settled {
            token: TOKEN,
            tag: u32::MAX,
            answer: Answer {
                status: u16::MAX,
                flags: u16::MAX,
                detail: u32::MAX,
                result: MOST,
                extra: MOST,
            },
            payload: vec![255; 1000],
            send: true,
        };
        fits(&answer, settled(&answer));
        let entry = Delivering {
            target: MOST,
            position: MOST,
            end: MOST,
            last: true,
        };
        fits(&(TOKEN, entry), DELIVERING_BYTES);
        let kept = Intent {
            tag: u32::MAX,
            identity: IDENTITY,
            temporary: Some((long(), long())),
        };
        fits(&(TOKEN, &kept), intent(&kept));
        let kept = KeptFile {
            session: MOST,
            vm: MOST,
            share: long(),
            path: long(),
            read: true,
            write: true,
            identity: IDENTITY,
        };
        fits(&(MOST, &kept), file(&kept));
        let what = PutOpening {
            vm: MOST,
            share: long(),
            path: long(),
            temporary: long(),
            size: MOST,
            existing: MOST,
            resumable: true,
            unchecked: true,
        };
        let mut coverage = Coverage::default();
        (0..1000).for_each(|place| coverage.insert((1 << 40) + (place << 34), 1 << 33, u32::MAX));
        let kept = KeptPut {
            session: MOST,
            what,
            identity: IDENTITY,
            coverage,
            extent: MOST,
        };
        fits(&(MOST, &kept), put(&kept));
        fits(&(MOST, MOST, MOST), KEY_BYTES);
    }

    #[test]
    fn an_offer_and_its_stream_take_no_more_than_is_booked() {
        let kept = KeptOffer {
            vm: MOST,
            token: TOKEN,
            tag: u32::MAX,
            target: MOST,
            name: long(),
            size: MOST,
            state: OfferState::Presenting { token: TOKEN },
            while_present: true,
        };
        fits(&(MOST, &kept), offer(&kept));
        let kept = KeptStream {
            written: MOST,
            read: MOST,
            into: Some(TOKEN),
            from: Some(TOKEN),
            end_read: true,
            finish: Some((TOKEN, u32::MAX)),
            failure: Some(FAILURE),
            ..KeptStream::new(END, END, MOST)
        };
        fits(&(MOST, &kept), TRANSFER_BYTES);
        for stage in [
            HostStage::Offered(OfferState::Presenting { token: TOKEN }),
            HostStage::Streaming(KeptHostStream {
                end: END,
                moved: MOST,
                crc32: Some(u32::MAX),
                end_read: true,
                failure: Some(FAILURE),
            }),
        ] {
            let kept = KeptHost {
                key: MOST,
                vm: MOST,
                push: true,
                name: long(),
                size: MOST,
                stage,
            };
            fits(&(MOST, &kept), host(&kept));
        }
    }

    #[test]
    fn a_vm_and_its_mail_take_no_more_than_is_booked() {
        let held = Held {
            message: Arc::new(Message {
                sequence: MOST,
                source: MOST,
                source_name: long().into(),
                accepted_ns: MOST,
                stamp_ns: MOST,
                to_all: true,
                body: vec![7; 100_000],
            }),
            offset: MOST,
            bound: Some((MOST, TOKEN.channel)),
            delivering: true,
        };
        fits(&(MOST, &held), message(&held.message));
        let grant = |_| ShareGrant {
            share: "share".to_owned(),
            access: Access::ReadWrite,
        };
        let limits = VmLimits {
            bytes_in_flight_max: MOST,
            submissions_in_flight_max: u32::MAX,
            open_files_max: u32::MAX,
            mailbox_bytes_max: MOST,
            mailbox_seconds_max: MOST,
            message_bytes_max: MOST,
            offers_max: u32::MAX,
            receives_max: u32::MAX,
            ..VmLimits::default()
        };
        let mut ledger = Ledger::default();
        ledger.apply_vm(&VmConfig {
            vm: 1 << 60,
            name: long(),
            shares: (0..20).map(grant).collect(),
            reach: (0..20).map(|number| format!("a VM {number}")).collect(),
            send_to_all: true,
            limits,
            transient: true,
        });
        let empty = Ledger::default().books;
        let booked = ledger.books.total() - empty.total();
        fits(&ledger.save().accounts, booked);
    }
}
