//! Files of this VM: written under a temporary name and renamed when whole; opened beneath a directory and never outside.
//!
//! Comes in: names, some of them a peer's. Goes out: open files. A name of a peer is one component of printable text, or refused.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use crate::ending::{self, ending};

/// Free names tried before giving up (`name.1.ext` … ).
const NAMES_TRIED: u32 = 1000;

/// A file that appears only when it is whole. Dropped before, it leaves nothing.
pub struct Pending {
    directory: OwnedFd,
    temporary: String,
    pub file: File,
    kept: bool,
}

impl Pending {
    /// Makes a temporary file in a directory.
    pub fn create(directory: &Path) -> Result<Self> {
        let shown = directory.display();
        let directory = rustix::fs::openat(
            CWD,
            directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .with_context(|| format!("opening the directory {shown}"))?;
        for attempt in 0..NAMES_TRIED {
            let temporary = format!(".vmgmt-{}-{attempt}.part", std::process::id());
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            match rustix::fs::openat(&directory, &temporary, flags, Mode::from_raw_mode(0o666)) {
                Ok(file) => {
                    return Ok(Self {
                        directory,
                        temporary,
                        file: file.into(),
                        kept: false,
                    });
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error).with_context(|| format!("making a file in {shown}")),
            }
        }
        Err(ending(
            ending::FAILED,
            format!("{shown} is full of temporary files .vmgmt-*.part: remove them"),
        ))
    }

    /// Gives it its name. An existing one is replaced, refused, or another name is found.
    pub fn keep(mut self, name: &str, existing: Existing) -> Result<String> {
        for attempt in 0..NAMES_TRIED {
            let wanted = numbered(name, attempt);
            let flags = if existing == Existing::Replace {
                RenameFlags::empty()
            } else {
                RenameFlags::NOREPLACE
            };
            match rustix::fs::renameat_with(&self.directory, &self.temporary, &self.directory, &wanted, flags)
            {
                Ok(()) => {
                    self.kept = true;
                    return Ok(wanted);
                }
                Err(Errno::EXIST) if existing == Existing::Rename => {}
                Err(Errno::EXIST) => {
                    return Err(ending(
                        ending::FAILED,
                        format!("{wanted} exists already (--force replaces it)"),
                    ));
                }
                Err(error) => return Err(error).with_context(|| format!("naming {wanted}")),
            }
        }
        Err(ending(ending::FAILED, format!("no free name for {name}")))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.kept {
            // If it cannot be removed there is nothing left to do about it.
            let _left = rustix::fs::unlinkat(&self.directory, &self.temporary, AtFlags::empty());
        }
    }
}

/// What to do with an existing name here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    Replace,
    Rename,
}

/// `name.ext`, `name.1.ext`, `name.2.ext`, …
fn numbered(name: &str, attempt: u32) -> String {
    match (attempt, name.rsplit_once('.')) {
        (0, _) => name.to_owned(),
        (_, Some((stem, extension))) if !stem.is_empty() => format!("{stem}.{attempt}.{extension}"),
        _ => format!("{name}.{attempt}"),
    }
}

/// A peer's file name, if it is one plain component.
pub fn plain_name(name: &str) -> Option<&str> {
    let plain = !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name.starts_with(".vmgmt-")
        && !name.chars().any(|c| c == '/' || c.is_control());
    plain.then_some(name)
}

/// A peer's text for a terminal: control characters are shown, not obeyed.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect()
}

/// Opens a file beneath a directory for reading: no `..`, absolute path or link leads out.
pub fn open_beneath(directory: &Path, name: &str) -> Result<File> {
    let root = rustix::fs::openat(
        CWD,
        directory,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("opening the directory {}", directory.display()))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(root.as_fd(), name, flags, Mode::empty(), resolve)
        .with_context(|| format!("opening {} beneath {}", printable(name), directory.display()))?;
    let file = File::from(file);
    let kind = file.metadata().context("looking at it")?;
    if !kind.is_file() {
        return Err(ending(
            ending::FAILED,
            format!("{} is not a regular file", printable(name)),
        ));
    }
    Ok(file)
}

/// A source given on the command line: the file or standard input, its size, and what to call it.
pub fn open_source(path: &Path) -> Result<(OwnedFd, Option<u64>, String)> {
    if path == Path::new("-") {
        let input = std::io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .context("standard input")?;
        return Ok((input, None, "standard input".into()));
    }
    let name = path.display().to_string();
    let file = File::open(path).map_err(|error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound {
            ending::ABSENT
        } else {
            ending::FAILED
        };
        ending(code, format!("{name}: {error}"))
    })?;
    let metadata = file.metadata().with_context(|| name.clone())?;
    if metadata.is_dir() {
        return Err(ending(ending::USAGE, format!("{name} is a directory")));
    }
    let size = known_size(&metadata);
    Ok((file.into(), size, name))
}

/// Everything that comes out of a descriptor, until its end or a signal.
pub fn read_all(input: BorrowedFd<'_>, cancel: &OwnedFd) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut part = [0; 64 * 1024];
    loop {
        vmgmt_driver::ring::wait_readable(input, Some(cancel))?;
        match rustix::io::read(input, &mut part) {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes.extend_from_slice(part.get(..count).unwrap_or_default()),
            // A signal: whether it asks the program to end is seen in the next turn.
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("standard input"),
        }
    }
}

/// How long a file is, where that is known beforehand: files of /proc and /sys say 0 and are longer.
pub fn known_size(metadata: &std::fs::Metadata) -> Option<u64> {
    (metadata.is_file() && metadata.len() > 0).then_some(metadata.len())
}

/// The directory and the last component of a local path.
pub fn split(path: &Path) -> Result<(PathBuf, String)> {
    let name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let name = name.ok_or_else(|| ending(ending::USAGE, format!("{} names no file", path.display())))?;
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    Ok((directory.to_path_buf(), name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let mut pending = Pending::create(directory.path()).unwrap();
        pending.file.write_all(b"one").unwrap();
        drop(pending);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        for expected in ["a.txt", "a.1.txt", "a.2.txt"] {
            let pending = Pending::create(directory.path()).unwrap();
            assert_eq!(pending.keep("a.txt", Existing::Rename).unwrap(), expected);
        }
        assert!(
            Pending::create(directory.path())
                .unwrap()
                .keep("a.txt", Existing::Refuse)
                .is_err()
        );
        Pending::create(directory.path())
            .unwrap()
            .keep("a.txt", Existing::Replace)
            .unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn input_ends_with_its_writer_or_with_a_signal() {
        let (cancel, ended) = std::io::pipe().unwrap();
        let cancel = OwnedFd::from(cancel);
        let (input, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"some text").unwrap();
        drop(writer);
        assert_eq!(read_all(input.as_fd(), &cancel).unwrap(), b"some text");
        let (input, _writer) = std::io::pipe().unwrap();
        drop(ended);
        let error = read_all(input.as_fd(), &cancel).unwrap_err();
        assert_eq!(ending::code(&error), ending::INTERRUPTED);
    }

    #[test]
    fn nothing_outside_is_served() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("served");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(outer.path().join("secret"), "x").unwrap();
        std::fs::write(inner.join("public"), "y").unwrap();
        std::os::unix::fs::symlink("../secret", inner.join("link")).unwrap();
        std::os::unix::fs::symlink(outer.path().join("secret"), inner.join("absolute")).unwrap();
        for name in ["../secret", "link", "absolute", "/etc/passwd", ".", "missing"] {
            assert!(open_beneath(&inner, name).is_err(), "{name}");
        }
        let mut text = String::new();
        open_beneath(&inner, "public")
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "y");
    }

    #[test]
    fn names_of_peers_are_one_component() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "a\nb",
            "a\0",
            ".vmgmt-1-0.part",
            "\u{1b}[2J",
        ] {
            assert_eq!(plain_name(name), None, "{name:?}");
        }
        assert_eq!(plain_name("Bericht 1.pdf"), Some("Bericht 1.pdf"));
        assert_eq!(printable("a\u{1b}[2Jb"), "a\\u{1b}[2Jb");
    }
}
