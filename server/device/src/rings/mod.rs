//! The core half of the device: rings and port window of one session.
//!
//! In: "look again" (the front page is level-triggered), and [`Answer`]s to submissions. Out: [`Output`]s.
//! Guest memory, the pages and the in-flight table are handed in at each call; nothing here knows where they come from.

mod interface;

pub use interface::{Answer, Channel, Fetched, Output, PortInput, Segment, Token};
