//! What stands in a single field: names, paths of sockets, file modes, groups.
//!
//! In: a field's text and where it stands. Out: its value, or a mistake with a remedy. It must never know what section it is of.

use super::Mistakes;
use super::limits::{ANONYMOUS_PREFIX, NAME_BYTES_MAX, SOCKET_PATH_BYTES_MAX};
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use vmgmt_abi::chat::{ALL_NAME, HOST_NAME};

/// What is wrong with a name, if anything.
fn name_mistake(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > NAME_BYTES_MAX {
        Some("it has more than 63 bytes")
    } else if name.chars().any(char::is_control) {
        Some("it has control characters")
    } else if name.contains(['/', ':']) {
        Some("it has '/' or ':'")
    } else if name.trim() != name {
        Some("it begins or ends with blanks")
    } else if matches!(name, HOST_NAME | ALL_NAME | "." | "..") || name.starts_with(ANONYMOUS_PREFIX) {
        Some("it is reserved (host, all, ., .. and anon-…)")
    } else {
        None
    }
}

pub(super) fn check_name(
    name: &str,
    kind: &str,
    place: &str,
    names: &mut BTreeMap<String, String>,
    mistakes: &mut Mistakes,
) {
    if let Some(wrong) = name_mistake(name) {
        let remedy = "1 to 63 bytes, no control characters, '/' or ':', and none of the reserved names";
        mistakes.push(
            place,
            format!("{name:?} is no name for a {kind}: {wrong}"),
            remedy,
        );
    }
    if let Some(first) = names.insert(name.to_owned(), place.to_owned()) {
        mistakes.push(
            place,
            format!("there is a {kind} {name:?} already, at {first}"),
            "give each a name of its own",
        );
    }
}

/// What is wrong with a socket's path, and what to do.
fn socket_path_mistake(path: &Path) -> Option<(String, String)> {
    let bytes = path.as_os_str().as_bytes();
    if !path.is_absolute() {
        return Some((
            format!("{} is not absolute", path.display()),
            "write the whole path, from / on".into(),
        ));
    }
    if bytes.contains(&0) || bytes.ends_with(b"/") {
        return Some((
            format!("{path:?} is no path of a socket"),
            "for example /run/vmgmt/web.sock".into(),
        ));
    }
    (bytes.len() > SOCKET_PATH_BYTES_MAX).then(|| {
        let what = format!("{} has {} bytes", path.display(), bytes.len());
        (
            what,
            format!("the kernel takes {SOCKET_PATH_BYTES_MAX} at most: choose a shorter directory"),
        )
    })
}

pub(super) fn check_socket_path(
    path: &Path,
    place: &str,
    paths: &mut BTreeMap<PathBuf, String>,
    mistakes: &mut Mistakes,
) {
    if let Some((what, remedy)) = socket_path_mistake(path) {
        mistakes.push(place, what, remedy);
    }
    if let Some(first) = paths.insert(path.to_owned(), place.to_owned()) {
        let what = format!("{} is used already, at {first}", path.display());
        mistakes.push(
            place,
            what,
            "give each VM a socket of its own, or write one [[socket]] for all of them",
        );
    }
}

pub(super) fn check_identity(identity: Option<&str>, place: &str, mistakes: &mut Mistakes) {
    let what = match identity {
        None | Some("anonymous") => return,
        Some("name") => "identity = \"name\" is not supported yet".to_owned(),
        Some(other) => format!("no identity {other:?}"),
    };
    mistakes.push(
        place,
        what,
        "use \"anonymous\", or give each VM a socket of its own with [[vm]]",
    );
}

pub(super) fn check_mode(text: Option<&str>, default: u32, place: &str, mistakes: &mut Mistakes) -> u32 {
    let Some(text) = text else { return default };
    parse_mode(text).unwrap_or_else(|| {
        mistakes.push(
            place,
            format!("{text:?} is no file mode"),
            "write it in octal and quotes: \"0660\"",
        );
        default
    })
}

fn parse_mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    if digits.is_empty() || digits.len() > 4 || !digits.bytes().all(|byte| (b'0'..=b'7').contains(&byte)) {
        return None;
    }
    u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o777)
}

pub(super) fn check_group(group: Option<&str>, place: &str, mistakes: &mut Mistakes) -> Option<String> {
    let group = group?;
    if group_id(group).is_none() {
        let what = format!("no group {group:?} on this host");
        mistakes.push(
            place,
            what,
            "see /etc/group, or write the group's number (as text)",
        );
    }
    Some(group.to_owned())
}

/// Number of a group that is given by name (from /etc/group) or by number.
pub(crate) fn group_id(group: &str) -> Option<u32> {
    if let Ok(number) = group.parse() {
        return Some(number);
    }
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group))
            .then(|| fields.nth(1)?.parse().ok())
            .flatten()
    })
}
