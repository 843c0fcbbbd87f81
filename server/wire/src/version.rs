//! Negotiation: what a client proposes, what this server offers, what holds between them.
//!
//! In: the body of VERSION; the shell's offer. Out: a [`VersionProposal`], and the body of the reply.
//! Must never know: who the client is (admission is the front's), sockets, the device.
//! Specification: section "VFIO_USER_VERSION".

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use crate::limits;
use crate::request::Refusal;
use crate::uapi::{VersionHead, user};

/// VERSION as the client sent it; the major version is ours, else it was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionProposal {
    /// The client's minor version; answered with ours, 0.
    pub minor: u16,
    /// What the client said it can do, with the specification's defaults for what it left out.
    pub capabilities: ClientCapabilities,
}

/// The client's side of the negotiation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientCapabilities {
    /// Descriptors it can receive in one message (default 1).
    pub max_msg_fds: u64,
    /// Most bytes of data in one message it takes from us (default 1 MiB).
    pub max_data_xfer_bytes: u64,
    /// DMA maps it says it will hold at once (default 65535). QEMU does not keep to a smaller answer.
    pub max_dma_maps: u64,
    /// Page sizes of its DMA maps, or'ed together (default 4096).
    pub page_sizes: u64,
    /// It sends REGION_WRITE_MULTI if we take it (default no).
    pub write_multiple: bool,
    /// It offers a second socket for our requests (default no; not used by this server).
    pub twin_socket: bool,
    /// Which keys it named: the reply may only speak about these.
    pub named: NamedCapabilities,
}

/// Which capabilities a proposal named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedCapabilities {
    /// `max_msg_fds`.
    pub max_msg_fds: bool,
    /// `max_data_xfer_size`.
    pub max_data_xfer_size: bool,
    /// `max_dma_maps`.
    pub max_dma_maps: bool,
    /// `pgsizes`.
    pub pgsizes: bool,
}

impl Default for ClientCapabilities {
    fn default() -> Self {
        Self {
            max_msg_fds: 1,
            max_data_xfer_bytes: u64::from(limits::DATA_BYTES_MAX),
            max_dma_maps: 65_535,
            page_sizes: 4096,
            write_multiple: false,
            twin_socket: false,
            named: NamedCapabilities::default(),
        }
    }
}

/// What the shell offers to every client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOffer {
    /// Descriptors taken with one message; more than 16 becomes 16.
    pub max_msg_fds: u32,
    /// Most bytes of data in one region access; more than 1 MiB becomes 1 MiB.
    pub max_data_xfer_bytes: u32,
    /// DMA maps taken per connection.
    pub max_dma_maps: u32,
    /// Page sizes taken; a multiple of 4096, as QEMU demands.
    pub page_sizes: u64,
    /// Take REGION_WRITE_MULTI.
    pub write_multiple: bool,
}

impl Default for ServerOffer {
    fn default() -> Self {
        Self {
            max_msg_fds: limits::MESSAGE_DESCRIPTORS_MAX,
            max_data_xfer_bytes: limits::DATA_BYTES_MAX,
            max_dma_maps: 65_535,
            page_sizes: 4096,
            write_multiple: true,
        }
    }
}

/// What holds on a connection from the VERSION reply on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// The client's side, as proposed.
    pub client: ClientCapabilities,
    /// REGION_WRITE_MULTI is taken: offered by both.
    pub write_multiple: bool,
    /// Most bytes in one of our DMA messages: the client's limit and ours. 0: no DMA by messages.
    pub dma_message_bytes_max: u32,
}

/// Unknown keys are skipped (QEMU adds `migration`); a known key of the wrong type is refused.
#[derive(Default, Deserialize)]
struct CapabilitiesJson {
    max_msg_fds: Option<u64>,
    max_data_xfer_size: Option<u64>,
    max_dma_maps: Option<u64>,
    pgsizes: Option<u64>,
    write_multiple: Option<bool>,
    twin_socket: Option<serde_json::Map<String, serde_json::Value>>,
}

/// Decodes the body of VERSION.
pub(crate) fn decode_proposal(body: &[u8]) -> Result<VersionProposal, Refusal> {
    let (head, json) = VersionHead::read_from_prefix(body).map_err(|_| Refusal::BodyLength {
        actual: body.len(),
        needed: size_of::<VersionHead>(),
    })?;
    if head.major.get() != user::VERSION_MAJOR {
        return Err(Refusal::VersionMajor(head.major.get()));
    }
    let capabilities = if json.is_empty() {
        ClientCapabilities::default()
    } else {
        decode_json(json)?
    };
    Ok(VersionProposal {
        minor: head.minor.get(),
        capabilities,
    })
}

fn decode_json(json: &[u8]) -> Result<ClientCapabilities, Refusal> {
    if json.len() > limits::VERSION_JSON_BYTES_MAX {
        return Err(Refusal::VersionJson);
    }
    // Exactly one NUL, at the end.
    let (nul, text) = json.split_last().ok_or(Refusal::VersionJson)?;
    if *nul != 0 || text.contains(&0) {
        return Err(Refusal::VersionJson);
    }
    let json = capabilities_of(text).ok_or(Refusal::VersionJson)?;
    let default = ClientCapabilities::default();
    Ok(ClientCapabilities {
        named: NamedCapabilities {
            max_msg_fds: json.max_msg_fds.is_some(),
            max_data_xfer_size: json.max_data_xfer_size.is_some(),
            max_dma_maps: json.max_dma_maps.is_some(),
            pgsizes: json.pgsizes.is_some(),
        },
        max_msg_fds: json.max_msg_fds.unwrap_or(default.max_msg_fds),
        max_data_xfer_bytes: json.max_data_xfer_size.unwrap_or(default.max_data_xfer_bytes),
        max_dma_maps: json.max_dma_maps.unwrap_or(default.max_dma_maps),
        page_sizes: json.pgsizes.unwrap_or(default.page_sizes),
        write_multiple: json.write_multiple.unwrap_or(false),
        twin_socket: json
            .twin_socket
            .is_some_and(|twin| twin.get("supported") == Some(&true.into())),
    })
}

/// The `capabilities` object, or the empty one where there is none. Read as a value first: that bounds the
/// depth (serde_json: 128) of unknown keys too, and a derived structure would take an array for an object.
fn capabilities_of(text: &[u8]) -> Option<CapabilitiesJson> {
    let serde_json::Value::Object(mut root) = serde_json::from_slice(text).ok()? else {
        return None;
    };
    match root.remove("capabilities") {
        None => Some(CapabilitiesJson::default()),
        Some(capabilities) if capabilities.is_object() => serde_json::from_value(capabilities).ok(),
        Some(_) => None,
    }
}

/// What holds between a client and an offer.
pub(crate) fn negotiate(client: &ClientCapabilities, offer: &ServerOffer) -> Negotiated {
    let dma_bytes = client
        .max_data_xfer_bytes
        .min(u64::from(limits::DMA_MESSAGE_BYTES_MAX));
    Negotiated {
        client: client.clone(),
        write_multiple: client.write_multiple && offer.write_multiple,
        dma_message_bytes_max: dma_bytes as u32,
    }
}

/// The body of the VERSION reply. "The capability list must be a subset of those proposed": a key that
/// the client did not name is left out, but for a limit of ours that is lower than the default it assumes.
pub(crate) fn encode_reply(client: &ClientCapabilities, offer: &ServerOffer) -> Vec<u8> {
    let default = ClientCapabilities::default();
    let named = client.named;
    let mut keys = serde_json::Map::new();
    let mut say = |named: bool, key: &str, value: u64, assumed: u64| {
        if named || value < assumed {
            keys.insert(key.to_owned(), value.into());
        }
    };
    let fds = u64::from(offer.max_msg_fds.min(limits::MESSAGE_DESCRIPTORS_MAX));
    let data = u64::from(offer.max_data_xfer_bytes.min(limits::DATA_BYTES_MAX));
    say(named.max_msg_fds, "max_msg_fds", fds, default.max_msg_fds);
    say(
        named.max_data_xfer_size,
        "max_data_xfer_size",
        data,
        default.max_data_xfer_bytes,
    );
    // QEMU refuses an answer above its own default.
    let maps = u64::from(offer.max_dma_maps).min(default.max_dma_maps);
    say(named.max_dma_maps, "max_dma_maps", maps, default.max_dma_maps);
    say(named.pgsizes, "pgsizes", offer.page_sizes, default.page_sizes);
    if client.write_multiple && offer.write_multiple {
        keys.insert("write_multiple".to_owned(), true.into());
    }
    let json = serde_json::json!({ "capabilities": keys }).to_string();
    let head = VersionHead {
        major: user::VERSION_MAJOR.into(),
        minor: user::VERSION_MINOR.into(),
    };
    let mut body = head.as_bytes().to_vec();
    body.extend_from_slice(json.as_bytes());
    body.push(0);
    body
}
