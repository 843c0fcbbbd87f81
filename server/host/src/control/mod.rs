//! The operators' socket: connections and lines. What is asked is decided elsewhere.
//!
//! [`ControlServer`] serves the core while it is READY and the keeper while no core is.

mod connection;
mod server;

pub use server::{Asked, ClientId, ControlServer, Incoming};
pub use vmgmt_ctl::protocol;

/// Numbers of the control socket.
pub mod limits {
    /// Operators connected at once; more wait in the listening socket's queue.
    pub const CLIENTS_MAX: usize = 64;
    /// Tokens of the event loop that the server takes: the listener's and one per client.
    pub const TOKENS: usize = 1 + CLIENTS_MAX;
    /// Requests of one client that are begun and not ended; more wait in its socket.
    pub const REQUESTS_IN_FLIGHT_MAX: usize = 32;
    /// Bytes that wait to be sent to one client before it gets no further events and is asked no further requests.
    pub const OUTPUT_BYTES_MAX: usize = 1 << 20;
    /// Bytes read at once.
    pub const READ_BYTES: usize = 64 * 1024;
    /// Descriptors of lines that are not complete; a client with more is dropped.
    pub const PENDING_FDS_MAX: usize = 16;

    const _: () = assert!(PENDING_FDS_MAX >= vmgmt_ctl::protocol::REQUEST_FDS_MAX);
}
