//! The core half of the device: rings and port window of one session.
//!
//! In: "look again" (the front page is level-triggered), and [`Answer`]s to submissions. Out: [`Output`]s.
//! Guest memory, the pages and the in-flight table are handed in; nothing here knows where they come from.
//!
//! One `Rings` per session and core life. The shell's turn:
//!
//! ```text
//! Rings::attach(settings, state: W, &front, &core) -> Result<Rings<W>, AttachError>     then Input::Touched
//! rings.handle(now, &front, &core, &mut memory, input) -> Turn
//!     Touched when the front's counter for this slot moved; Poll { budget } while there is work; Complete for each answer of the hub
//! while let Some(output) = rings.poll_output() { .. }       after each handle: to the hub, eventfds, kicks
//! rings.handle(.., Input::TurnEnd), poll_output again       once per batch: signals (Published and Reset handled by the hub before)
//! rings.buffer(token) -> Option<Buffer>, rings.port_write(token, offset, &bytes) -> bool      for effects
//! rings.poll_timeout() -> Option<Tick>, rings.handle_timeout(now, &front, &core, &mut memory) -> Turn
//! rings.arm(&front, &mut memory) -> bool                    before sleeping, some 50 us after the last Turn::progressed(); true: there is work
//! rings.arm_but(&front, &mut memory, spared) -> bool        the same, but not for rings that are looked at again soon anyway
//! rings.save() -> Saved, rings.restore(&Saved)              counters; what is in flight is in the table already
//! ```
//! The shell owns `busy` and `fenced` of the core page: it sets busy, fences and compares the front's fence around each call.

mod check;
mod complete;
mod farewell;
mod fetch;
mod host_page;
mod interface;
mod limits;
mod open;
mod port;
mod prepare;
mod recover;
mod refresh;
mod ring;
mod room;
mod shape;
mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use check::{check_state, forget_state};
pub use interface::{
    Answer, AttachError, Buffer, Channel, Counters, Fetched, HostFacts, Input, Modes, Output, PortInput,
    Saved, Segment, Settings, Token, Turn,
};
pub use room::Rings;
pub use table::{STATE_BYTES, STATE_WORDS};
