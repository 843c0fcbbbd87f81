//! ATTIC: what survives of operations: answers not known to be published, intents, open handles, offers and streams.
//!
//! In: [`Change`]s and [`Settled`] answers, live from the rooms and again in replay: this is the only way it changes. Out: look-ups.
//! It never knows slots, effects or what is under way: that is found again in the rings, whose submissions come again.

mod change;
mod saved;

pub use change::{Change, feature};
pub use saved::SavedKept;

use crate::effect::Identity;
use crate::limits::OPERATOR_RESULTS_MAX;
use crate::modes::coverage::Coverage;
use crate::modes::offers::OfferState;
use crate::modes::puts::PutOpening;
use crate::modes::streams::{Failure, Side};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vmgmt_device::rings::{Answer, Token};

/// An answer that is not known to be published: should its submission come again, it is this and nothing is done again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Settled {
    pub token: Token,
    /// The guest's own.
    pub tag: u32,
    pub answer: Answer,
    pub payload: Vec<u8>,
    /// That a message was accepted, which version 1 keeps, too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub send: bool,
}

/// An operation on names is about to be done, to this file or directory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Intent {
    pub tag: u32,
    pub identity: Identity,
    /// Share and temporary name of a directory that is being made.
    pub temporary: Option<(String, String)>,
}

/// An open file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptFile {
    pub session: u64,
    pub vm: u64,
    pub share: String,
    pub path: String,
    pub read: bool,
    pub write: bool,
    pub identity: Identity,
}

/// A put under way. Its temporary file may have its final name already: the identity tells.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptPut {
    pub session: u64,
    pub what: PutOpening,
    pub identity: Identity,
    /// Ranges with their checksum, as far as they are known.
    pub coverage: Coverage,
    /// Bytes the temporary file has at least.
    pub extent: u64,
}

/// One end of a stream between VMs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptEnd {
    pub vm: u64,
    pub session: u64,
    pub handle: u64,
    pub open: bool,
}

/// A stream between VMs. `written` and `read` count bytes of submissions that are settled; where they differ the difference is in the
/// buffer of the one submission that is half done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptStream {
    pub source: KeptEnd,
    pub target: KeptEnd,
    pub size: u64,
    pub written: u64,
    pub read: u64,
    /// The read that has the bytes between `read` and `written`.
    pub into: Option<Token>,
    /// The write whose bytes between `written` and `read` are moved.
    pub from: Option<Token>,
    pub end_read: bool,
    /// The sender's STREAM_END and its tag, once the reader was told the end.
    pub finish: Option<(Token, u32)>,
    pub failure: Option<Failure>,
}

impl KeptStream {
    /// One that begins.
    #[must_use]
    pub const fn new(source: KeptEnd, target: KeptEnd, size: u64) -> Self {
        Self {
            source,
            target,
            size,
            written: 0,
            read: 0,
            into: None,
            from: None,
            end_read: false,
            finish: None,
            failure: None,
        }
    }
}

/// An offer of a VM that is not answered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptOffer {
    pub vm: u64,
    /// The OFFER submission.
    pub token: Token,
    pub tag: u32,
    pub target: u64,
    pub name: String,
    pub size: u64,
    pub state: OfferState,
    /// Its submission has no deadline: it waits as long as the target has a device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub while_present: bool,
}

/// A transfer of the operator that has a key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptHost {
    pub key: u64,
    pub vm: u64,
    /// From the host to the VM.
    pub push: bool,
    pub name: String,
    pub size: u64,
    pub stage: HostStage,
}

/// How far it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum HostStage {
    Offered(OfferState),
    Streaming(KeptHostStream),
}

/// A stream with the operator's file at one end. What is moved of a submission that is not settled is moved again: the file has it still.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptHostStream {
    pub end: KeptEnd,
    /// Bytes of submissions that are settled.
    pub moved: u64,
    /// Push: of the whole file, once known. Pull: of the bytes moved.
    pub crc32: Option<u32>,
    pub end_read: bool,
    pub failure: Option<Failure>,
}

/// What came of one, for an operator that asks again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostResult {
    pub key: u64,
    /// A `vmgmt_abi::Status`.
    pub status: u16,
    pub bytes: u64,
    pub crc32: u32,
}

/// All that is kept.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    pub settled: BTreeMap<Token, Settled>,
    pub intents: BTreeMap<Token, Intent>,
    pub files: BTreeMap<u64, KeptFile>,
    pub puts: BTreeMap<u64, KeptPut>,
    pub offers: BTreeMap<u64, KeptOffer>,
    pub streams: BTreeMap<u64, KeptStream>,
    /// By the number of the offer, then of the stream.
    pub host: BTreeMap<u64, KeptHost>,
    /// Oldest first.
    pub host_results: VecDeque<HostResult>,
}

impl Kept {
    /// Takes answers and a change in, as one.
    pub fn apply(&mut self, settled: &[Settled], change: &Change) {
        for entry in settled {
            self.intents.remove(&entry.token);
            self.settled.insert(entry.token, entry.clone());
        }
        match change {
            Change::None => {}
            Change::Intends { token, intent } => {
                self.intents.insert(*token, intent.clone());
            }
            Change::Forgone { token } => {
                self.intents.remove(token);
            }
            Change::FileOpened { handle, file } => {
                self.files.insert(*handle, (**file).clone());
            }
            Change::PutOpened { handle, put } => {
                self.puts.insert(*handle, (**put).clone());
            }
            Change::Wrote {
                handle,
                offset,
                bytes,
                crc32,
                extent,
            } => {
                if let Some(put) = self.puts.get_mut(handle) {
                    match crc32 {
                        Some(crc32) => put.coverage.insert(*offset, *bytes, *crc32),
                        None => put.coverage.forget(*offset, *bytes),
                    }
                    put.extent = put.extent.max(*extent);
                }
            }
            Change::Cut { handle, bytes } => {
                if let Some(put) = self.puts.get_mut(handle) {
                    put.extent = *bytes;
                }
            }
            Change::Closed { handle } => {
                self.files.remove(handle);
                self.puts.remove(handle);
            }
            change => self.apply_transfer(change),
        }
    }

    /// A send was accepted: this is its answer.
    pub fn settle_send(&mut self, token: Token, tag: u32, result: u64) {
        let settled = Settled {
            token,
            tag,
            answer: Answer::ok(result),
            payload: Vec::new(),
            send: true,
        };
        self.settled.insert(token, settled);
    }

    fn apply_transfer(&mut self, change: &Change) {
        match change {
            Change::Offered { offer, kept } => {
                self.offers.insert(*offer, (**kept).clone());
            }
            Change::OfferMoved { offer, state } => {
                if let Some(kept) = self.offers.get_mut(offer) {
                    kept.state = *state;
                }
                if let Some(kept) = self.host.get_mut(offer) {
                    kept.stage = HostStage::Offered(*state);
                }
            }
            Change::OfferGone { offer } => {
                self.offers.remove(offer);
                self.host.remove(offer);
            }
            Change::Began { offer, stream, kept } => {
                self.offers.remove(offer);
                self.streams.insert(*stream, (**kept).clone());
            }
            Change::Sent { stream, bytes, into } => {
                if let Some(kept) = self.streams.get_mut(stream) {
                    kept.written = kept.written.saturating_add(*bytes);
                    (kept.from, kept.into) = (None, *into);
                }
            }
            Change::Received { stream, bytes, from } => {
                if let Some(kept) = self.streams.get_mut(stream) {
                    kept.read = kept.read.saturating_add(*bytes);
                    (kept.from, kept.into) = (*from, None);
                }
            }
            Change::EndRead { stream, finish } => {
                if let Some(kept) = self.streams.get_mut(stream) {
                    (kept.end_read, kept.finish) = (true, *finish);
                }
                if let Some(kept) = self.host_stream(*stream) {
                    kept.end_read = true;
                }
            }
            Change::StreamFailed { stream, failure } => {
                if let Some(kept) = self.streams.get_mut(stream) {
                    kept.failure = Some(*failure);
                }
                if let Some(kept) = self.host_stream(*stream) {
                    kept.failure = Some(*failure);
                }
            }
            Change::EndClosed { stream, side } => {
                if let Some(kept) = self.streams.get_mut(stream) {
                    match side {
                        Side::Source => kept.source.open = false,
                        Side::Target => kept.target.open = false,
                    }
                }
                if let Some(kept) = self.host_stream(*stream) {
                    kept.end.open = false;
                }
            }
            Change::StreamGone { stream } => {
                self.streams.remove(stream);
                self.host.remove(stream);
            }
            change => self.apply_host(change),
        }
    }

    fn apply_host(&mut self, change: &Change) {
        match change {
            Change::HostOffered { offer, kept } => {
                self.host.insert(*offer, (**kept).clone());
            }
            Change::HostBegan {
                offer,
                stream,
                end,
                size,
            } => {
                if let Some(mut kept) = self.host.remove(offer) {
                    kept.size = *size;
                    kept.stage = HostStage::Streaming(KeptHostStream {
                        end: *end,
                        moved: 0,
                        crc32: None,
                        end_read: false,
                        failure: None,
                    });
                    self.host.insert(*stream, kept);
                }
            }
            Change::HostSum { stream, crc32 } => {
                if let Some(kept) = self.host_stream(*stream) {
                    kept.crc32 = Some(*crc32);
                }
            }
            Change::HostMoved { stream, bytes, crc32 } => {
                let push = self.host.get(stream).is_some_and(|kept| kept.push);
                if let Some(kept) = self.host_stream(*stream) {
                    kept.moved = kept.moved.saturating_add(*bytes);
                    if !push && *bytes > 0 {
                        kept.crc32 = Some(*crc32);
                    }
                }
            }
            Change::HostTold(result) => {
                self.host_results.retain(|told| told.key != result.key);
                self.host_results.push_back(*result);
                if self.host_results.len() > OPERATOR_RESULTS_MAX {
                    self.host_results.pop_front();
                }
            }
            _ => {}
        }
    }

    fn host_stream(&mut self, stream: u64) -> Option<&mut KeptHostStream> {
        match &mut self.host.get_mut(&stream)?.stage {
            HostStage::Streaming(kept) => Some(kept),
            HostStage::Offered(_) => None,
        }
    }

    /// What came of the operator's transfer with this key.
    #[must_use]
    pub fn host_result(&self, key: u64) -> Option<HostResult> {
        self.host_results.iter().find(|told| told.key == key).copied()
    }

    /// What a submission that comes again was answered. Its token is the one of before: a tag may be another submission's by now.
    #[must_use]
    pub fn answered(&self, token: Token) -> Option<&Settled> {
        self.settled.get(&token)
    }

    /// What a submission that comes again was about to be done to.
    #[must_use]
    pub fn intended(&self, token: Token) -> Option<&Intent> {
        self.intents.get(&token)
    }

    /// The offer that a submission which comes again has made.
    #[must_use]
    pub fn offered(&self, token: Token) -> Option<u64> {
        let found = self.offers.iter().find(|(_, kept)| kept.token == token);
        found.map(|(offer, _)| *offer)
    }

    /// Ends of streams that are open.
    pub fn ends(&self) -> impl Iterator<Item = KeptEnd> {
        let both = |stream: &KeptStream| [stream.source, stream.target];
        let hosts = self.host.values().filter_map(|kept| match &kept.stage {
            HostStage::Streaming(stream) => Some(stream.end),
            HostStage::Offered(_) => None,
        });
        let ends = self.streams.values().flat_map(both).chain(hosts);
        ends.filter(|end| end.open)
    }

    /// Sessions that something here belongs to, of one VM or of all.
    #[must_use]
    pub fn sessions(&self, vm: Option<u64>) -> BTreeSet<u64> {
        let of = |number: u64| vm.is_none_or(|vm| vm == number);
        let files = self.files.values().map(|file| (file.vm, file.session));
        let puts = self.puts.values().map(|put| (put.what.vm, put.session));
        let ends = self.ends().map(|end| (end.vm, end.session));
        let offers = self.offers.values().map(|offer| (offer.vm, offer.token.session));
        let owned = files.chain(puts).chain(ends).chain(offers);
        let mut sessions: BTreeSet<u64> = owned
            .filter(|(vm, _)| of(*vm))
            .map(|(_, session)| session)
            .collect();
        if vm.is_none() {
            sessions.extend(
                self.settled
                    .keys()
                    .chain(self.intents.keys())
                    .map(|token| token.session),
            );
            let hosts = self.host.values().filter_map(|kept| match kept.stage {
                HostStage::Offered(state) => Some(state),
                HostStage::Streaming(_) => None,
            });
            let states = self.offers.values().map(|offer| offer.state).chain(hosts);
            let seen = states.filter_map(|state| match state {
                OfferState::Queued => None,
                OfferState::Presenting { token } => Some(token.session),
                OfferState::Shown { session } => Some(session),
            });
            sessions.extend(seen);
        }
        sessions
    }

    /// The temporary names of a share that somebody goes on with.
    #[must_use]
    pub fn temporaries(&self, share: &str) -> Vec<String> {
        let puts = self
            .puts
            .values()
            .map(|put| (&put.what.share, &put.what.temporary));
        let directories = self
            .intents
            .values()
            .filter_map(|intent| intent.temporary.as_ref());
        let all = puts.chain(directories.map(|(share, path)| (share, path)));
        all.filter(|(of, _)| *of == share)
            .map(|(_, path)| path.clone())
            .collect()
    }
}
