//! ATTIC, changes: what can happen to what is kept, and the names under which a saved state says that it has it.
//!
//! In: nothing. Out: [`Change`], which the rooms make and the journal holds. What one does is [`Kept::apply`](super::Kept::apply)'s.

use super::{HostResult, Intent, KeptEnd, KeptFile, KeptHost, KeptOffer, KeptPut, KeptStream};
use crate::modes::offers::OfferState;
use crate::modes::streams::{Failure, Side};
use serde::{Deserialize, Serialize};
use vmgmt_device::rings::Token;

/// A change of what is kept. One that fits nothing changes nothing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Change {
    /// Nothing beside the answers.
    None,
    FileOpened {
        handle: u64,
        file: Box<KeptFile>,
    },
    PutOpened {
        handle: u64,
        put: Box<KeptPut>,
    },
    /// Bytes of a put have this checksum, or (`None`) are about to change. The file has `extent` bytes at least.
    Wrote {
        handle: u64,
        offset: u64,
        bytes: u64,
        crc32: Option<u32>,
        extent: u64,
    },
    /// A put's file was given this length.
    Cut {
        handle: u64,
        bytes: u64,
    },
    /// A file or put is not open any more.
    Closed {
        handle: u64,
    },
    Intends {
        token: Token,
        intent: Intent,
    },
    /// Its submission is void.
    Forgone {
        token: Token,
    },
    Offered {
        offer: u64,
        kept: Box<KeptOffer>,
    },
    OfferMoved {
        offer: u64,
        state: OfferState,
    },
    OfferGone {
        offer: u64,
    },
    /// An offer was accepted.
    Began {
        offer: u64,
        stream: u64,
        kept: Box<KeptStream>,
    },
    /// A write ended with so many of its bytes moved; `into`: the read they went to last.
    Sent {
        stream: u64,
        bytes: u64,
        into: Option<Token>,
    },
    /// A read ended with so many bytes; `from`: the write that has more for the next.
    Received {
        stream: u64,
        bytes: u64,
        from: Option<Token>,
    },
    /// The reader was told the end.
    EndRead {
        stream: u64,
        finish: Option<(Token, u32)>,
    },
    StreamFailed {
        stream: u64,
        failure: Failure,
    },
    EndClosed {
        stream: u64,
        side: Side,
    },
    StreamGone {
        stream: u64,
    },
    HostOffered {
        offer: u64,
        kept: Box<KeptHost>,
    },
    /// The VM took it.
    HostBegan {
        offer: u64,
        stream: u64,
        end: KeptEnd,
        size: u64,
    },
    /// The checksum of the file that is pushed.
    HostSum {
        stream: u64,
        crc32: u32,
    },
    /// A submission ended with so many bytes; with any, `crc32` is that of all so far (pull).
    HostMoved {
        stream: u64,
        bytes: u64,
        crc32: u32,
    },
    /// The operator is told this.
    HostTold(HostResult),
}

/// What survives a core that version 1 does not know. Named in a saved state where it is in use; the names are never used for anything else.
pub mod feature {
    pub const OPEN_FILES: &str = "open-files";
    pub const PUTS: &str = "puts";
    pub const NAME_OPERATIONS: &str = "name-operations";
    pub const SETTLED_ANSWERS: &str = "settled-answers";
    pub const TRANSFERS: &str = "transfers";
    /// Transfers of an operator that outlive a core.
    pub const OPERATOR_TRANSFERS: &str = "operator-transfers";
    /// All of them.
    pub const ALL: [&str; 6] = [
        OPEN_FILES,
        PUTS,
        NAME_OPERATIONS,
        SETTLED_ANSWERS,
        TRANSFERS,
        OPERATOR_TRANSFERS,
    ];
}

impl Change {
    /// The [`feature`] that it is about.
    #[must_use]
    pub const fn feature(&self) -> &'static str {
        match self {
            Self::None => feature::SETTLED_ANSWERS,
            Self::FileOpened { .. } | Self::Closed { .. } => feature::OPEN_FILES,
            Self::PutOpened { .. } | Self::Wrote { .. } | Self::Cut { .. } => feature::PUTS,
            Self::Intends { .. } | Self::Forgone { .. } => feature::NAME_OPERATIONS,
            Self::Offered { .. }
            | Self::OfferMoved { .. }
            | Self::OfferGone { .. }
            | Self::Began { .. }
            | Self::Sent { .. }
            | Self::Received { .. }
            | Self::EndRead { .. }
            | Self::StreamFailed { .. }
            | Self::EndClosed { .. }
            | Self::StreamGone { .. } => feature::TRANSFERS,
            Self::HostOffered { .. }
            | Self::HostBegan { .. }
            | Self::HostSum { .. }
            | Self::HostMoved { .. }
            | Self::HostTold(_) => feature::OPERATOR_TRANSFERS,
        }
    }

    /// Numbers of the handle, offer or stream that it is about.
    pub(crate) fn numbers(&self) -> [Option<u64>; 2] {
        match self {
            Self::None | Self::Intends { .. } | Self::Forgone { .. } | Self::HostTold(_) => [None; 2],
            Self::FileOpened { handle, .. }
            | Self::PutOpened { handle, .. }
            | Self::Wrote { handle, .. }
            | Self::Cut { handle, .. }
            | Self::Closed { handle } => [Some(*handle), None],
            Self::Offered { offer, .. }
            | Self::OfferMoved { offer, .. }
            | Self::OfferGone { offer }
            | Self::HostOffered { offer, .. } => [Some(*offer), None],
            Self::Began { offer, stream, .. } | Self::HostBegan { offer, stream, .. } => {
                [Some(*offer), Some(*stream).filter(|stream| stream != offer)]
            }
            Self::Sent { stream, .. }
            | Self::Received { stream, .. }
            | Self::EndRead { stream, .. }
            | Self::StreamFailed { stream, .. }
            | Self::EndClosed { stream, .. }
            | Self::StreamGone { stream }
            | Self::HostSum { stream, .. }
            | Self::HostMoved { stream, .. } => [Some(*stream), None],
        }
    }

    /// The submission whose intent it is about.
    pub(crate) const fn token(&self) -> Option<Token> {
        match self {
            Self::Intends { token, .. } | Self::Forgone { token } => Some(*token),
            _ => None,
        }
    }
}
