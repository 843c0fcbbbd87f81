//! The UNIX error numbers that a vfio-user reply may carry (Linux, x86 and asm-generic).
//! In: nothing. Out: names for numbers. Must never know: which guest mistake led to which of them.

use serde::{Deserialize, Serialize};

/// An errno as it stands in a reply's header: positive. Open: a client's reply may hold any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Errno(pub u32);

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        impl Errno {
            $($(#[$doc])* pub const $name: Errno = Errno($value);)*
        }
        /// Name and value of each, for the check against the system's headers.
        pub const CONSTANTS: &[(&str, u64)] = &[$((stringify!($name), $value)),*];
    };
}

errnos! {
    /// Not allowed: identity or policy.
    EPERM = 1;
    /// No such thing.
    ENOENT = 2;
    /// The device failed.
    EIO = 5;
    /// More data than may be transferred.
    E2BIG = 7;
    /// Try again.
    EAGAIN = 11;
    /// A memory budget is used up.
    ENOMEM = 12;
    /// Permission denied.
    EACCES = 13;
    /// A DMA address is not mapped.
    EFAULT = 14;
    /// Somebody else holds it.
    EBUSY = 16;
    /// The DMA range overlaps one that is mapped.
    EEXIST = 17;
    /// No such device, or bus mastering is off.
    ENODEV = 19;
    /// The request contradicts the specification.
    EINVAL = 22;
    /// Descriptors ran out.
    EMFILE = 24;
    /// A quota is used up.
    ENOSPC = 28;
    /// A number is out of range.
    ERANGE = 34;
    /// Unknown command (what QEMU answers).
    ENOSYS = 38;
    /// The peer breaks the protocol.
    EPROTO = 71;
    /// A value does not fit.
    EOVERFLOW = 75;
    /// Known, but not offered by this server.
    EOPNOTSUPP = 95;
    /// The answer would come too late.
    ETIMEDOUT = 110;
}

impl std::fmt::Display for Errno {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match CONSTANTS.iter().find(|(_, value)| *value == u64::from(self.0)) {
            Some((name, _)) => formatter.write_str(name),
            None => write!(formatter, "errno {}", self.0),
        }
    }
}
