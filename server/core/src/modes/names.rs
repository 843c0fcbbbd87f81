//! WORKSHOP file: the form of names. In: bytes from a peer. Out: text that is a name of this form, or a refusal.
//! It never knows what exists.

use crate::limits::{COMPONENT_BYTES_MAX, ONCE_SUFFIX, TEMPORARY_PREFIX};
use crate::refusal::Refusal;
use vmgmt_abi::{NAME_BYTES_MAX, PATH_BYTES_MAX};

/// A path split in share and rest. The rest is empty for the share's root.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SharePath<'a> {
    pub share: &'a str,
    pub path: &'a str,
}

/// `SHARE` or `SHARE/relative/path`.
///
/// # Errors
/// [`Refusal::Path`].
pub fn share_path(meta: &[u8]) -> Result<SharePath<'_>, Refusal> {
    let text = std::str::from_utf8(meta).map_err(|_| Refusal::Path)?;
    let (share, path) = match text.split_once('/') {
        Some((_, "")) => return Err(Refusal::Path),
        Some((share, path)) => (share, path),
        None => (text, ""),
    };
    if share.is_empty()
        || share.len() > NAME_BYTES_MAX
        || share.contains('\0')
        || share == "."
        || share == ".."
    {
        return Err(Refusal::Path);
    }
    if !path.is_empty() && !is_relative(path) {
        return Err(Refusal::Path);
    }
    Ok(SharePath { share, path })
}

/// As [`share_path`], below the share's root.
///
/// # Errors
/// [`Refusal::Path`].
pub fn path_below(meta: &[u8]) -> Result<SharePath<'_>, Refusal> {
    let path = share_path(meta)?;
    if path.path.is_empty() {
        Err(Refusal::Path)
    } else {
        Ok(path)
    }
}

/// A relative path without empty, `.` or `..` components, NUL, or a temporary name.
#[must_use]
pub fn is_relative(path: &str) -> bool {
    path.len() <= PATH_BYTES_MAX
        && path.split('/').all(|component| {
            !component.is_empty()
                && component.len() <= COMPONENT_BYTES_MAX
                && component != "."
                && component != ".."
                && !component.contains('\0')
                && !component.starts_with(TEMPORARY_PREFIX)
        })
}

/// `first NUL second`.
///
/// # Errors
/// [`Refusal::Name`] where there is no NUL.
pub fn two(meta: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let nul = meta.iter().position(|byte| *byte == 0).ok_or(Refusal::Name)?;
    Ok((&meta[..nul], &meta[nul + 1..]))
}

/// The name of a peer.
///
/// # Errors
/// [`Refusal::Name`].
pub fn peer(name: &[u8]) -> Result<&str, Refusal> {
    let name = std::str::from_utf8(name).map_err(|_| Refusal::Name)?;
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
        Err(Refusal::Name)
    } else {
        Ok(name)
    }
}

/// The name under which a file is offered: a relative path, so that whole trees can be.
///
/// # Errors
/// [`Refusal::Name`].
pub fn offered(name: &[u8]) -> Result<&str, Refusal> {
    let name = std::str::from_utf8(name).map_err(|_| Refusal::Name)?;
    if is_relative(name) {
        Ok(name)
    } else {
        Err(Refusal::Name)
    }
}

/// The temporary name of a VM's put to `path`, in the same directory: the same one each time, so that a broken put is found again. Two paths
/// whose names collide (64 bits, within one VM and directory) exclude each other as BUSY and never see each other's bytes,
/// unless the guest resumes one as the other and skips its own check of the prefix.
#[must_use]
pub fn temporary(vm: u64, path: &str) -> String {
    let directory = path.rfind('/').map_or("", |slash| &path[..=slash]);
    // FNV-1a: its numbers are fixed for ever, as those of the standard library's hasher are not.
    let hash = path.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{directory}{TEMPORARY_PREFIX}{vm:x}-{hash:016x}")
}

/// The same of a put that nobody can resume; `number` is nobody else's. What is left of it goes when a core life finds that nobody owns it.
#[must_use]
pub fn temporary_once(vm: u64, path: &str, number: u64) -> String {
    format!("{}-{number:x}{ONCE_SUFFIX}", temporary(vm, path))
}

/// The temporary name of a directory that is being made; `number` is nobody else's.
#[must_use]
pub fn temporary_directory(path: &str, number: u64) -> String {
    let directory = path.rfind('/').map_or("", |slash| &path[..=slash]);
    format!("{directory}{TEMPORARY_PREFIX}{number:x}{ONCE_SUFFIX}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_form_pass() {
        assert_eq!(
            share_path(b"share").unwrap(),
            SharePath {
                share: "share",
                path: ""
            }
        );
        assert_eq!(
            share_path(b"s/a/b c").unwrap(),
            SharePath {
                share: "s",
                path: "a/b c"
            }
        );
        assert_eq!(path_below("s/ä/..b/.c".as_bytes()).unwrap().path, "ä/..b/.c");
    }

    #[test]
    fn everything_else_does_not() {
        let long = [b"s/".as_slice(), &[b'a'; COMPONENT_BYTES_MAX + 1]].concat();
        let deep = [b"s".to_vec(), b"/ab".repeat(PATH_BYTES_MAX / 3 + 1)].concat();
        let bad: &[&[u8]] = &[
            b"",
            b"/",
            b"/s/a",
            b"s/",
            b"s//a",
            b"s/a/",
            b"s/.",
            b"s/..",
            b"s/a/../b",
            b"../a",
            b"s/a\0b",
            b"s/\xff",
            b"./a",
            b"s/.vmgmt-put-1-2",
            b"s/.vmgmt-put-1/x",
            &long,
            &deep,
        ];
        for bytes in bad {
            assert_eq!(
                share_path(bytes),
                Err(Refusal::Path),
                "{:?}",
                String::from_utf8_lossy(bytes)
            );
        }
        assert_eq!(path_below(b"s"), Err(Refusal::Path));
        assert_eq!(offered(b"/etc/passwd"), Err(Refusal::Name));
        assert_eq!(peer(&[b'n'; NAME_BYTES_MAX + 1]), Err(Refusal::Name));
        assert_eq!(two(b"no nul"), Err(Refusal::Name));
    }

    #[test]
    fn a_temporary_name_stands_beside_its_target_and_is_stable() {
        let name = temporary(0x1f, "a/b/file");
        assert!(name.starts_with("a/b/.vmgmt-put-1f-"), "{name}");
        assert_eq!(name, temporary(0x1f, "a/b/file"));
        assert_ne!(name, temporary(0x1f, "a/b/filf"));
        assert_ne!(name, temporary(0x20, "a/b/file"));
        assert!(temporary(u64::MAX, "x").len() <= COMPONENT_BYTES_MAX);
        assert!(!is_relative(&temporary(1, "x")));
    }
}
