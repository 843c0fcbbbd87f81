//! A connection packed for a hand-over, and unpacked again.
//!
//! In: a [`Connection`]; or a [`SavedConnection`] of this or another version, checked like a peer's bytes.
//! Out: the other of the two. The tokens of descriptors stay what they are: the shell hands over its table
//! with them. Must never know: the format the saved form is written in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::FdSlot;
use crate::connection::{Connection, Counters, FatalError, Phase};
use crate::dma::{Outstanding, OwnRequests};
use crate::input::{Attached, Input};
use crate::limits;
use crate::output::{Outgoing, Output};
use crate::version::{ClientCapabilities, Negotiated};

/// The state of a connection between two calls, with partial messages both ways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedConnection {
    phase: Phase,
    input_base: u64,
    #[serde(with = "serde_bytes")]
    input_bytes: Vec<u8>,
    attached: Vec<SavedAttached>,
    output: Vec<SavedOutgoing>,
    outstanding: BTreeMap<u16, Outstanding>,
    next_id: u16,
    proposal: Option<ClientCapabilities>,
    negotiated: Option<Negotiated>,
    owed: BTreeSet<u64>,
    next_sequence: u64,
    closing: Vec<FdSlot>,
    failure: Option<FatalError>,
    counters: Counters,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedAttached {
    position: u64,
    slots: Vec<FdSlot>,
    lost: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedOutgoing {
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
    sent: usize,
    descriptors: Vec<FdSlot>,
    dma_id: Option<u16>,
}

/// Why a saved connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// A list or buffer beyond its limit.
    #[error("saved connection: {what} is over its limit of {limit}")]
    OverLimit {
        /// Which.
        what: &'static str,
        /// Its limit.
        limit: usize,
    },
    /// Parts that contradict each other.
    #[error("saved connection: {0}")]
    Contradiction(&'static str),
}

impl SavedConnection {
    /// All descriptor tokens the saved connection names, so that a hand-over can prove it carries each.
    pub fn descriptors(&self) -> Vec<FdSlot> {
        let mut slots = self.closing.clone();
        slots.extend(
            self.attached
                .iter()
                .flat_map(|attached| attached.slots.iter().copied()),
        );
        slots.extend(
            self.output
                .iter()
                .flat_map(|message| message.descriptors.iter().copied()),
        );
        slots
    }
}

impl Connection {
    /// Packs the connection. It may go on afterwards: saving changes nothing.
    pub fn save(&self) -> SavedConnection {
        // Exhaustive, so that a new field cannot be forgotten.
        let Connection {
            phase,
            input,
            output,
            own,
            proposal,
            negotiated,
            owed,
            next_sequence,
            closing,
            failure,
            counters,
        } = self;
        let Input {
            bytes,
            consumed,
            base,
            attached,
        } = input;
        let OwnRequests { outstanding, next_id } = own;
        SavedConnection {
            phase: *phase,
            input_base: base.saturating_add(*consumed as u64),
            input_bytes: bytes.get(*consumed..).unwrap_or_default().to_vec(),
            attached: attached.iter().cloned().map(SavedAttached::from).collect(),
            output: output.queue.iter().cloned().map(SavedOutgoing::from).collect(),
            outstanding: outstanding.clone(),
            next_id: *next_id,
            proposal: proposal.clone(),
            negotiated: negotiated.clone(),
            owed: owed.clone(),
            next_sequence: *next_sequence,
            closing: closing.iter().copied().collect(),
            failure: *failure,
            counters: *counters,
        }
    }

    /// Unpacks a connection, checking what it says.
    pub fn restore(saved: SavedConnection) -> Result<Self, RestoreError> {
        check(&saved)?;
        let SavedConnection {
            phase,
            input_base,
            input_bytes,
            attached,
            output,
            outstanding,
            next_id,
            proposal,
            negotiated,
            owed,
            next_sequence,
            closing,
            failure,
            counters,
        } = saved;
        Ok(Connection {
            phase,
            input: Input {
                bytes: input_bytes,
                consumed: 0,
                base: input_base,
                attached: attached.into_iter().map(Attached::from).collect(),
            },
            output: Output::restore(output.into_iter().map(Outgoing::from).collect::<VecDeque<_>>()),
            own: OwnRequests { outstanding, next_id },
            proposal,
            negotiated,
            owed,
            next_sequence,
            closing: closing.into(),
            failure,
            counters,
        })
    }
}

fn check(saved: &SavedConnection) -> Result<(), RestoreError> {
    let within = |what, actual: usize, limit: usize| {
        if actual > limit {
            Err(RestoreError::OverLimit { what, limit })
        } else {
            Ok(())
        }
    };
    within("input", saved.input_bytes.len(), limits::INPUT_BYTES_MAX)?;
    within(
        "list of attached descriptors",
        saved.attached.len(),
        limits::QUEUED_DESCRIPTORS_MAX,
    )?;
    within("list of owed replies", saved.owed.len(), limits::REPLIES_OWED_MAX)?;
    within(
        "list of DMA messages",
        saved.outstanding.len(),
        limits::DMA_OUTSTANDING_MAX,
    )?;
    if (saved.phase == Phase::Ready) != saved.negotiated.is_some() && saved.phase != Phase::Failed {
        return Err(RestoreError::Contradiction(
            "ready, but nothing was agreed (or the other way round)",
        ));
    }
    if (saved.phase == Phase::VersionProposed) != saved.proposal.is_some() && saved.phase != Phase::Failed {
        return Err(RestoreError::Contradiction(
            "a proposal without its phase (or the other way round)",
        ));
    }
    let agreed = saved.negotiated.as_ref();
    if agreed.is_some_and(|agreed| agreed.dma_message_bytes_max > limits::DMA_MESSAGE_BYTES_MAX) {
        return Err(RestoreError::Contradiction(
            "DMA messages larger than this version sends",
        ));
    }
    if saved
        .owed
        .last()
        .is_some_and(|sequence| *sequence >= saved.next_sequence)
    {
        return Err(RestoreError::Contradiction(
            "a reply is owed to a request that is yet to come",
        ));
    }
    if saved
        .output
        .iter()
        .any(|message| message.sent >= message.bytes.len())
    {
        return Err(RestoreError::Contradiction(
            "a message to send has nothing left to send",
        ));
    }
    if saved.output.iter().skip(1).any(|message| message.sent != 0) {
        return Err(RestoreError::Contradiction(
            "a message was begun before the one ahead of it ended",
        ));
    }
    Ok(())
}

impl From<Attached> for SavedAttached {
    fn from(
        Attached {
            position,
            slots,
            lost,
        }: Attached,
    ) -> Self {
        Self {
            position,
            slots,
            lost,
        }
    }
}

impl From<SavedAttached> for Attached {
    fn from(
        SavedAttached {
            position,
            slots,
            lost,
        }: SavedAttached,
    ) -> Self {
        Self {
            position,
            slots,
            lost,
        }
    }
}

impl From<Outgoing> for SavedOutgoing {
    fn from(
        Outgoing {
            bytes,
            sent,
            descriptors,
            dma_id,
        }: Outgoing,
    ) -> Self {
        Self {
            bytes,
            sent,
            descriptors,
            dma_id,
        }
    }
}

impl From<SavedOutgoing> for Outgoing {
    fn from(
        SavedOutgoing {
            bytes,
            sent,
            descriptors,
            dma_id,
        }: SavedOutgoing,
    ) -> Self {
        Self {
            bytes,
            sent,
            descriptors,
            dma_id,
        }
    }
}
