//! OFFICE: the one table of what the hub refuses: a rule, the status and budget the guest gets, the sentence the host's log gets.
//!
//! In: nothing. Out: [`Refusal`]. It never knows who was refused.

use serde::{Deserialize, Serialize};
use vmgmt_abi::{Budget, Status};
use vmgmt_device::rings::Answer;

macro_rules! refusals {
    ($($name:ident = $number:literal, $status:ident, $budget:ident, $text:literal;)*) => {
        /// A rule or a limit by which the hub refuses.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
        pub enum Refusal { $($name = $number,)* }

        impl Refusal {
            /// Every refusal.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// What the guest gets.
            #[must_use]
            pub const fn status(self) -> Status {
                match self { $(Self::$name => Status::$status,)* }
            }
            /// The budget, where one is named.
            #[must_use]
            pub const fn budget(self) -> Budget {
                match self { $(Self::$name => Budget::$budget,)* }
            }
            /// For the host's log: the limit or rule, and what to do about it.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

refusals! {
    NoSession = 0, NOT_READY, NONE, "a submission of a session that is not open";
    UnknownOpcode = 1, NOT_SUPPORTED, NONE, "an operation that this version does not have";
    ModeNotSupported = 2, NOT_SUPPORTED, NONE, "an operation of a mode that this version does not have yet";
    WrongMode = 3, WRONG_MODE, NONE, "an operation of another mode than the ring was opened in";
    Field = 4, BAD_ARGUMENT, NONE, "a field of the submission is not valid for its operation";
    Path = 5, BAD_ARGUMENT, NONE, "a path is not of the form SHARE/relative/path (UTF-8, no empty, `.` or `..` component, no NUL, no temporary name, within the lengths)";
    Name = 6, BAD_ARGUMENT, NONE, "a peer's or file's name is not valid (UTF-8, lengths, no leading slash, no `..`)";
    BufferSmall = 7, TOO_LARGE, NONE, "the buffer is too small for the answer";
    Stale = 8, STALE, NONE, "a handle that is not open (closed, or from before a restart or reset)";
    HandleKind = 9, BAD_ARGUMENT, NONE, "a handle of another kind than the operation needs";
    HandleRight = 10, DENIED, NONE, "a file handle was not opened for this";
    ShareUnknown = 11, NO_SUCH_NAME, NONE, "a share that is not granted to this VM (vm.shares)";
    ShareReadOnly = 12, READ_ONLY, NONE, "the share is granted read-only to this VM (vm.shares.access)";
    PutBusy = 13, BUSY, NONE, "another put of this VM to the same path is under way";
    Reach = 14, DENIED, NONE, "the policy does not let this VM reach that peer (vm.reach)";
    PeerAbsent = 15, PEER_ABSENT, NONE, "no such peer, or it is not connected";
    SendToAll = 16, DENIED, NONE, "this VM may not send to all (vm.send-to-all)";
    OfferToHost = 17, DENIED, NONE, "a file was offered to the host, which had not asked for one: an offer to `host` must carry the handle of a request (or use PUT into a share)";
    SubmissionRate = 18, OVER_BUDGET, SUBMISSION_RATE, "over limits.submissions-per-second-max for longer than a delay can even out";
    ByteRate = 19, OVER_BUDGET, BYTE_RATE, "over limits.bytes-per-second-max for longer than a delay can even out";
    BytesInFlight = 20, OVER_BUDGET, BYTES_IN_FLIGHT, "over limits.bytes-in-flight-max";
    SubmissionsInFlight = 21, OVER_BUDGET, SUBMISSIONS_IN_FLIGHT, "over limits.submissions-in-flight-max";
    OpenFiles = 22, OVER_BUDGET, OPEN_FILES, "over limits.open-files-max (files, puts and streams together)";
    MailboxBytes = 23, OVER_BUDGET, MAILBOX_BYTES, "the receiver's mailbox is full (its limits.mailbox-bytes-max)";
    MessageBytes = 24, OVER_BUDGET, MESSAGE_BYTES, "over limits.message-bytes-max";
    Offers = 25, OVER_BUDGET, OFFERS, "over limits.offers-max of this VM or of the receiver";
    Receives = 26, OVER_BUDGET, RECEIVES, "over limits.receives-max";
    TokenTwice = 27, BAD_ARGUMENT, NONE, "the rings gave the same token twice (a fault of this program)";
    StreamEnded = 28, ENDED, NONE, "the stream has ended";
    HandleBusy = 30, BUSY, NONE, "a COMMIT or CLOSE of this handle is under way";
    OfferUnknown = 31, STALE, NONE, "an offer or request that is not open (answered, withdrawn, or from before a restart)";
    AnswerToHost = 32, BAD_ARGUMENT, NONE, "an answer to a request must be offered to `host`";
    StreamFailed = 34, CANCELLED, NONE, "a stream that has failed";
    StateBytes = 35, OVER_BUDGET, STATE_BYTES, "the memory for what survives a crash is nearly full: what waits in mailboxes must be read, or lower limits.mailbox-bytes-max";
    Checksum = 29, INTEGRITY, NONE, "a checksum did not match: the file was thrown away";
}

impl Refusal {
    /// As the guest's completion.
    #[must_use]
    pub const fn answer(self) -> Answer {
        Answer {
            status: self.status().0,
            flags: 0,
            detail: self.budget().0,
            result: 0,
            extra: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_named_exactly_when_the_status_says_so() {
        for &refusal in Refusal::ALL {
            assert_eq!(
                refusal.status() == Status::OVER_BUDGET,
                refusal.budget() != Budget::NONE,
                "{refusal:?}"
            );
            assert!(!refusal.text().is_empty());
        }
    }
}
