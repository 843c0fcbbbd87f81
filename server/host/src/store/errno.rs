//! The one table from the host's errno to a guest's status.

use rustix::io::Errno;
use vmgmt_abi::Status;

/// What a guest is told when a file operation fails with `errno`.
#[must_use]
pub fn status_of(errno: Errno) -> Status {
    match errno {
        Errno::NOENT => Status::NO_SUCH_NAME,
        Errno::EXIST => Status::EXISTS,
        Errno::NOTDIR => Status::NOT_A_DIRECTORY,
        Errno::ISDIR => Status::IS_A_DIRECTORY,
        Errno::NOTEMPTY => Status::NOT_EMPTY,
        // LOOP: a symbolic link in the path; XDEV: a way out of the share. Both are the policy of openat2's resolve flags.
        Errno::LOOP | Errno::XDEV | Errno::ACCESS | Errno::PERM => Status::DENIED,
        Errno::ROFS => Status::READ_ONLY,
        Errno::NOSPC | Errno::DQUOT => Status::NO_SPACE,
        Errno::FBIG | Errno::NAMETOOLONG => Status::TOO_LARGE,
        Errno::INVAL => Status::BAD_ARGUMENT,
        Errno::BUSY | Errno::MFILE | Errno::NFILE | Errno::AGAIN | Errno::TXTBSY => Status::BUSY,
        Errno::OPNOTSUPP => Status::NOT_SUPPORTED,
        Errno::STALE | Errno::BADF => Status::STALE,
        _ => Status::IO_ERROR,
    }
}
