//! OFFICE, the doors: what comes out of a session's rings becomes an input of the hub; what the hub wants done becomes a call of the shell.
//!
//! In: outputs of the rings, effects of the hub. Out: the hub's inputs, and calls for what is not the hub's. Every shell that moves values
//! between these rooms goes through here, the core's loop and the simulator's: so none forgets what a reset voids. Must never know how a shell
//! does it.

use crate::effect::{BufferRange, Effect, EffectId, FileSlot, Outcome};
use crate::interface::Input;
use vmgmt_device::rings::{self, Channel, Token};

/// What the rings want of their shell beside what they tell the hub. All of it is about the session whose output it is.
pub trait RingShell {
    /// Bulk work with this submission's buffer is void.
    fn void(&mut self, token: Token);
    /// Bulk work with the buffers of this channel is void; `None`: of all channels of the session.
    fn void_channel(&mut self, session: u64, channel: Option<Channel>);
    /// What was read of guest memory by message and not taken yet is nobody's.
    fn forget_reads(&mut self);
    /// An interrupt by message.
    fn signal(&mut self, vector: u8);
    /// The front is to look at the session.
    fn kick(&mut self);
}

/// What an output of the rings is to the hub, after the shell has done its part of it; `None`: nothing.
pub fn from_rings(output: rings::Output, shell: &mut impl RingShell) -> Option<Input> {
    let input = match output {
        rings::Output::Submission(fetched) => Input::Submission(fetched),
        rings::Output::Cancel(token) => {
            shell.forget_reads();
            Input::Cancel(token)
        }
        rings::Output::Void(token) => {
            shell.void(token);
            Input::Void(token)
        }
        rings::Output::ChannelClosed { session, channel } => {
            shell.void_channel(session, Some(channel));
            shell.forget_reads();
            Input::ChannelClosed { session, channel }
        }
        rings::Output::Reset { session } => {
            shell.void_channel(session, None);
            shell.forget_reads();
            Input::SessionReset { session }
        }
        rings::Output::Published { token, published } => Input::Published { token, published },
        rings::Output::Signal { vector } => {
            shell.signal(vector);
            return None;
        }
        rings::Output::Kick => {
            shell.kick();
            return None;
        }
    };
    Some(input)
}

/// Who carries effects out. Each is begun, and its outcome told later; `Err`: it has ended at once, with this.
#[allow(clippy::missing_errors_doc)] // said above, for all of them
pub trait EffectShell {
    /// The turn of a session begins, unless it has: its memory is about to be touched.
    fn open(&mut self, session: u64);
    fn copy(&mut self, id: EffectId, from: BufferRange, into: BufferRange) -> Result<(), Outcome>;
    fn fetch(&mut self, id: EffectId, from: BufferRange) -> Result<(), Outcome>;
    fn read(&mut self, id: EffectId, file: FileSlot, offset: u64, into: BufferRange) -> Result<(), Outcome>;
    fn write(
        &mut self,
        id: EffectId,
        file: FileSlot,
        offset: u64,
        from: BufferRange,
        checksum: bool,
    ) -> Result<(), Outcome>;
    /// What needs no guest's memory.
    fn other(&mut self, id: EffectId, effect: Effect) -> Result<(), Outcome>;
}

/// Begins an effect.
///
/// # Errors
/// Its outcome, where it has ended at once.
pub fn begin(id: EffectId, effect: Effect, shell: &mut impl EffectShell) -> Result<(), Outcome> {
    match effect {
        Effect::Copy { from, into } => {
            shell.open(from.token.session);
            shell.open(into.token.session);
            shell.copy(id, from, into)
        }
        Effect::Fetch { from } => {
            shell.open(from.token.session);
            shell.fetch(id, from)
        }
        Effect::Read { slot, offset, into } => {
            shell.open(into.token.session);
            shell.read(id, slot, offset, into)
        }
        Effect::Write {
            slot,
            offset,
            from,
            checksum,
        } => {
            shell.open(from.token.session);
            shell.write(id, slot, offset, from, checksum)
        }
        effect => shell.other(id, effect),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default, PartialEq, Eq, Debug)]
    struct Called(Vec<String>);

    impl RingShell for Called {
        fn void(&mut self, token: Token) {
            self.0.push(format!("void {}", token.index));
        }
        fn void_channel(&mut self, session: u64, channel: Option<Channel>) {
            self.0.push(format!("void {session} {channel:?}"));
        }
        fn forget_reads(&mut self) {
            self.0.push("forget".into());
        }
        fn signal(&mut self, vector: u8) {
            self.0.push(format!("signal {vector}"));
        }
        fn kick(&mut self) {
            self.0.push("kick".into());
        }
    }

    #[test]
    fn what_ends_in_the_rings_ends_in_the_shell_before_the_hub_hears_of_it() {
        let channel = Channel::Ring(1);
        let token = Token {
            session: 7,
            channel,
            index: 3,
            generation: 1,
        };
        let session = token.session;
        let cases = [
            (
                rings::Output::Cancel(token),
                Some(Input::Cancel(token)),
                vec!["forget"],
            ),
            (
                rings::Output::Void(token),
                Some(Input::Void(token)),
                vec!["void 3"],
            ),
            (
                rings::Output::ChannelClosed { session, channel },
                Some(Input::ChannelClosed { session, channel }),
                vec!["void 7 Some(Ring(1))", "forget"],
            ),
            (
                rings::Output::Reset { session },
                Some(Input::SessionReset { session }),
                vec!["void 7 None", "forget"],
            ),
            (rings::Output::Signal { vector: 2 }, None, vec!["signal 2"]),
            (rings::Output::Kick, None, vec!["kick"]),
        ];
        for (output, input, calls) in cases {
            let mut called = Called::default();
            assert_eq!(from_rings(output.clone(), &mut called), input, "{output:?}");
            assert_eq!(called.0, calls, "{output:?}");
        }
    }
}
