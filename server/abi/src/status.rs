//! How a submission ended. Every refusal names its cause; a number not listed here is legal and means "failed".

macro_rules! open_enum {
    ($(#[$meta:meta])* $name:ident($int:ty) { $($(#[$vmeta:meta])* $variant:ident = $value:expr, $text:expr;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$vmeta])* pub const $variant: Self = Self($value);)*

            /// Every number that has a name, with that name and a sentence for a person.
            pub const NAMED: &'static [(Self, &'static str, &'static str)] = &[$((Self::$variant, stringify!($variant), $text),)*];

            /// The name, where the number has one.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                Self::NAMED.iter().find(|(value, _, _)| *value == self).map(|(_, name, _)| *name)
            }

            /// A sentence for a person.
            #[must_use]
            pub fn describe(self) -> &'static str {
                Self::NAMED.iter().find(|(value, _, _)| *value == self).map_or("a number this version does not know", |(_, _, text)| *text)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }
    };
}
pub(crate) use open_enum;

open_enum! {
    /// Status of a completion (16 bits).
    Status(u16) {
        OK = 0, "done";
        BAD_ARGUMENT = 1, "bad argument: a field, name or length of the submission is not valid";
        NOT_SUPPORTED = 2, "not supported by this version of the host daemon";
        DENIED = 3, "denied by the host's policy";
        OVER_BUDGET = 4, "over a budget of this VM";
        PEER_ABSENT = 5, "the peer is not there";
        BUSY = 6, "busy: try again later";
        TIMED_OUT = 7, "the deadline passed";
        CANCELLED = 8, "cancelled";
        NO_SUCH_NAME = 9, "no such name";
        EXISTS = 10, "the name exists already";
        STALE = 11, "stale: the handle is from before a restart or a reset";
        INTEGRITY = 12, "the checksum does not match";
        BAD_ADDRESS = 13, "a guest address of the buffer is not mapped for the device, or not for this direction";
        IO_ERROR = 14, "the host could not read or write";
        NO_SPACE = 15, "no space left";
        NOT_A_DIRECTORY = 16, "not a directory";
        IS_A_DIRECTORY = 17, "is a directory";
        NOT_EMPTY = 18, "the directory is not empty";
        WRONG_MODE = 19, "the ring or the port window was opened in another mode";
        TOO_LARGE = 20, "too large for the buffer or for a limit";
        REFUSED = 21, "the peer refused";
        OUTCOME_UNKNOWN = 22, "whether it is done, and on the disk where that was asked for, cannot be told: the host daemon was replaced meanwhile, or the disk failed";
        READ_ONLY = 23, "the share is read-only for this VM";
        NOT_A_FILE = 24, "not a regular file";
        ENDED = 25, "the stream has ended";
        NOT_READY = 26, "the device is not ready: bus mastering is off or it is being reset";
    }
}

open_enum! {
    /// Which budget was exceeded (`Completion::detail` with OVER_BUDGET).
    Budget(u32) {
        NONE = 0, "none";
        SUBMISSION_RATE = 1, "submissions per second";
        BYTE_RATE = 2, "bytes per second";
        BYTES_IN_FLIGHT = 3, "bytes in flight";
        OPEN_FILES = 4, "open files";
        MAILBOX_BYTES = 5, "bytes in the mailbox of the receiver";
        DMA_REGIONS = 6, "DMA regions";
        MESSAGE_BYTES = 7, "bytes of one message";
        OFFERS = 8, "offers that wait for an answer";
        SHARE_BYTES = 9, "bytes of the share";
        SHARE_FILES = 10, "files of the share";
        RECEIVES = 11, "receive submissions posted";
        SUBMISSIONS_IN_FLIGHT = 12, "submissions in flight";
        STATE_BYTES = 13, "the host daemon's memory for messages and open files, of all VMs together";
    }
}
