//! Offers and streams: files from one VM to another, or to and from the host, through nobody's file system.

use std::time::{Duration, Instant};

use vmgmt_abi::file::{OfferHeader, offer_kind};
use vmgmt_abi::ring::flag;
use vmgmt_abi::{NAME_BYTES_MAX, Opcode, PATH_BYTES_MAX, Status};

use super::{check_meta, pair};
use crate::channel::{Finished, Request, Tag};
use crate::client::Client;
use crate::error::{DriverError, Result};
use crate::records::Records;

/// What NEXT_OFFER gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// For accept, refuse, or the offer that answers a request.
    pub handle: u64,
    pub source: u64,
    pub source_name: String,
    pub file_name: String,
    /// Bytes; none: not known.
    pub size: Option<u64>,
    /// True: the host asks for this file. False: it is offered.
    pub is_request: bool,
}

/// Room for one offer: head and both names, within what the port window gives.
const OFFER_BYTES: usize = {
    let all = size_of::<OfferHeader>() + NAME_BYTES_MAX + PATH_BYTES_MAX;
    assert!(all <= vmgmt_abi::port::OUTPUT_BYTES_MAX);
    all
};

impl Client {
    /// Offers a file to a VM or to `host`; waits until it is answered. Gives the stream.
    ///
    /// # Errors
    /// REFUSED, PEER_ABSENT, TIMED_OUT, DENIED, …
    pub fn offer(
        &mut self,
        target: &str,
        file_name: &str,
        size: Option<u64>,
        answers: u64,
        deadline: Option<Duration>,
    ) -> Result<u64> {
        let meta = pair(target, file_name)?;
        check_meta(&meta)?;
        let request = Request::new(Opcode::OFFER)
            .handle(answers)
            .offset(size.unwrap_or(vmgmt_abi::file::SIZE_UNKNOWN))
            .deadline(deadline);
        Ok(self.call_with(request, &meta, 0)?.result)
    }

    /// Posts a wait for the next offer or request.
    ///
    /// # Errors
    /// As [`Client::start`].
    pub fn post_next_offer(&mut self) -> Result<Tag> {
        let buffer = self.allocate(OFFER_BYTES)?;
        self.start(Request::new(Opcode::NEXT_OFFER).output(&buffer, 0, OFFER_BYTES, 0))
    }

    /// Waits for a posted one; nothing when the deadline passed first (it stays posted).
    ///
    /// # Errors
    /// As [`Client::finish`].
    pub fn next_offer(&mut self, posted: Tag, deadline: Option<Instant>) -> Result<Option<Offer>> {
        self.finish(posted, deadline)?
            .map(|finished| parse_offer(&finished.ok()?))
            .transpose()
    }

    /// Accepts an offer; gives the stream.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn accept(&mut self, offer: u64) -> Result<u64> {
        Ok(self.call(Request::new(Opcode::ACCEPT).handle(offer))?.result)
    }

    /// Refuses an offer or a request with a status for the other side.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn refuse(&mut self, offer: u64, status: Status) -> Result<()> {
        self.call(
            Request::new(Opcode::REFUSE)
                .handle(offer)
                .argument(status.0.into()),
        )
        .map(drop)
    }

    /// Ends a stream of `bytes` bytes; waits until the receiver has confirmed.
    ///
    /// # Errors
    /// The status that the receiver gave.
    pub fn stream_end(&mut self, stream: u64, bytes: u64, checksum: Option<u32>) -> Result<()> {
        let flags = if checksum.is_some() { flag::CHECK } else { 0 };
        let request = Request::new(Opcode::STREAM_END)
            .handle(stream)
            .offset(bytes)
            .argument(checksum.unwrap_or(0).into())
            .flags(flags);
        self.call(request).map(drop)
    }

    /// Tells the sender how the stream was received.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn stream_confirm(&mut self, stream: u64, status: Status) -> Result<()> {
        self.call(
            Request::new(Opcode::STREAM_CONFIRM)
                .handle(stream)
                .argument(status.0.into()),
        )
        .map(drop)
    }
}

fn parse_offer(finished: &Finished) -> Result<Offer> {
    let bytes = finished.data(finished.result_bytes(OFFER_BYTES)?)?;
    let mut records = Records::new(&bytes, "an offer");
    let head: OfferHeader = records.head()?;
    let source_name = records.text(head.source_name_bytes.into())?;
    let file_name = records.text(head.file_name_bytes.into())?;
    let is_request = match head.kind {
        offer_kind::OFFER => false,
        offer_kind::REQUEST => true,
        other => return Err(DriverError::contract(format!("an offer of unknown kind {other}"))),
    };
    let size = Some(head.size).filter(|size| *size != vmgmt_abi::file::SIZE_UNKNOWN);
    Ok(Offer {
        handle: head.handle,
        source: head.source,
        source_name,
        file_name,
        size,
        is_request,
    })
}
