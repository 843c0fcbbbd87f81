//! Operations on names in a share: opening, temporary files and their final name, directories.
//!
//! Runs on workers. Must never know: guests. A target appears only complete: temporary name, contents, rename.

use super::{Done, OpenFile, Share, charge, over_quota, refused, resolve};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, fstat, fsync, ftruncate, mkdirat,
    renameat_with, seek, statat, unlinkat,
};
use rustix::io::Errno;
use std::mem::MaybeUninit;
use std::sync::Arc;
use vmgmt_abi::Status;
use vmgmt_abi::file::existing;
use vmgmt_core::effect::{Effect, FailedAt, Identity, Outcome, entry_bytes};

/// How temporary names begin; no guest can name or see one. (The hub makes them and refuses them in paths.)
pub const TEMPORARY_PREFIX: &str = ".vmgmt-put-";
/// How those end that only the submission which made them can go on with.
pub const ONCE_SUFFIX: &str = "-once";
/// Names that RENAME tries before it says EXISTS.
const RENAMES_MAX: u32 = 1000;
/// Entries of one listing at most, whatever the guest's buffer holds: bounds the time on a worker.
const LISTED_MAX: usize = 4096;

/// Carries out an effect on names. `file` is the open file of Commit.
pub(super) fn run(share: &Arc<Share>, file: Option<&OpenFile>, effect: &Effect) -> Done {
    let done = match effect {
        Effect::Open {
            path,
            read,
            write,
            create,
            exclusive,
            truncate,
            ..
        } => {
            return open(share, path, *read, *write, *create, *exclusive, *truncate)
                .unwrap_or_else(Done::Outcome);
        }
        Effect::CreateTemporary {
            target,
            temporary,
            resume,
            permissions,
            ..
        } => {
            return create_temporary(share, target, temporary, *resume, *permissions)
                .unwrap_or_else(Done::Outcome);
        }
        Effect::Commit {
            temporary,
            target,
            existing,
            durable,
            bytes,
            again,
            ..
        } => match file {
            Some(file) => {
                let name = Naming {
                    source: temporary,
                    target,
                    policy: *existing,
                    durable: *durable,
                };
                commit(share, file, &name, *bytes, *again)
            }
            None => Err(Errno::BADF),
        },
        Effect::Reopen {
            path,
            put,
            read,
            write,
            identity,
            ..
        } => {
            let put = put.as_ref().map(|(target, policy)| (target.as_str(), *policy));
            return reopen(share, path, put, *read, *write, *identity)
                .unwrap_or_else(|errno| Done::Outcome(refused(errno)));
        }
        Effect::Identify { path, .. } => {
            resolve::stat(share.root(), path).map(|(_, identity)| Outcome::Identified(identity))
        }
        Effect::PrepareDirectory { path, temporary, .. } => prepare_directory(share, path, temporary),
        Effect::Discard { temporary, .. } => remove(share, temporary).or_else(|errno| match errno {
            Errno::NOENT => Ok(Outcome::Done),
            errno => Err(errno),
        }),
        Effect::Stat { path, .. } => resolve::stat(share.root(), path).map(|(stat, _)| Outcome::Stat(stat)),
        Effect::List {
            path,
            cursor,
            bytes_max,
            ..
        } => list(share, path, *cursor, *bytes_max),
        Effect::MakeDirectory {
            path,
            temporary,
            intended,
            ..
        } => make_directory(share, path, temporary, *intended),
        Effect::Remove { path, intended, .. } => {
            match intended.map(|identity| resolve::is_at(share.root(), path, identity)) {
                // It is gone, or another one is there now: that one was not meant.
                Some(Ok(false)) => Ok(Outcome::Done),
                Some(Err(_)) => Ok(unknown()),
                None | Some(Ok(true)) => remove(share, path),
            }
        }
        Effect::Rename {
            source,
            target,
            existing,
            durable,
            intended,
            ..
        } => {
            let name = Naming {
                source,
                target,
                policy: *existing,
                durable: *durable,
            };
            rename(share, &name, *intended)
        }
        _ => Err(Errno::OPNOTSUPP),
    };
    Done::Outcome(done.unwrap_or_else(refused))
}

#[allow(clippy::fn_params_excessive_bools)] // the fields of one effect, spelled out by its only caller
fn open(
    share: &Arc<Share>,
    path: &str,
    read: bool,
    write: bool,
    create: bool,
    exclusive: bool,
    truncate: bool,
) -> Result<Done, Outcome> {
    let mut flags = match (read, write) {
        (_, false) => OFlags::RDONLY,
        (false, true) => OFlags::WRONLY,
        (true, true) => OFlags::RDWR,
    };
    // So that what is made here is not made by another meanwhile.
    let names = create.then(|| share.quota.lock_names());
    let is_new = create && resolve::stat(share.root(), path).is_err();
    if is_new {
        share.quota.charge(0, 1).map_err(over_quota)?;
        flags |= OFlags::CREATE;
        flags.set(OFlags::EXCL, exclusive);
    } else if create && exclusive {
        return Err(Outcome::failed(Status::EXISTS, FailedAt::File));
    }
    let mode = if is_new { share.mode(0o644) } else { Mode::empty() };
    let fd = resolve::file(share.root(), path, flags, mode).map_err(|errno| {
        if is_new {
            share.quota.give_back(0, 1);
        }
        refused(errno)
    })?;
    if is_new {
        made(share, &fd);
    }
    drop(names);
    let file = Box::new(share.opened(fd).map_err(refused)?);
    if truncate && write {
        file.resize(0, || ftruncate(file.fd(), 0))?.map_err(refused)?;
    }
    let (stat, identity) = resolve::stat_of(file.fd()).map_err(refused)?;
    Ok(Done::Opened { file, stat, identity })
}

/// A file is new, and charged for.
fn made(share: &Share, fd: &OwnedFd) {
    // What cannot be looked at stays charged twice.
    if let Ok(stat) = fstat(fd) {
        share.quota.made(charge::key_of(&stat));
    }
}

fn create_temporary(
    share: &Arc<Share>,
    target: &str,
    temporary: &str,
    resume: bool,
    permissions: Option<u32>,
) -> Result<Done, Outcome> {
    let create = || -> Result<(OwnedFd, bool), Errno> {
        // The target's directory must be there and the target must not be a directory, or the put would fail only at its end.
        let (directory, name) = resolve::parent(share.root(), target)?;
        if let Ok(stat) = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)
            && FileType::from_raw_mode(stat.st_mode) == FileType::Directory
        {
            return Err(Errno::ISDIR);
        }
        if resume {
            match resolve::file(share.root(), temporary, OFlags::RDWR, Mode::empty()) {
                Err(Errno::NOENT) => {}
                found => return found.map(|fd| (fd, false)),
            }
        } else {
            // Left over from a put that broke off and that nobody resumes.
            match remove(share, temporary) {
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        // (The process's own umask is 0: a mode that was asked for is had without a chmod.)
        let mode = permissions.map_or(share.mode(0o644), |asked| Mode::from_raw_mode(asked & 0o777));
        let fd = resolve::file(
            share.root(),
            temporary,
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
            mode,
        )?;
        Ok((fd, true))
    };
    share.quota.charge(0, 1).map_err(over_quota)?;
    let (fd, is_new) = create().map_err(|errno| {
        share.quota.give_back(0, 1);
        refused(errno)
    })?;
    if is_new {
        made(share, &fd);
    } else {
        share.quota.give_back(0, 1);
    }
    let file = Box::new(share.opened(fd).map_err(refused)?);
    if !is_new {
        // A sweep that is under way does not know that it is wanted again: it is as old as its last change, and this is one.
        let bytes = charge::size_of(&fstat(file.fd()).map_err(refused)?);
        file.resize(bytes, || ftruncate(file.fd(), bytes))?
            .map_err(refused)?;
    }
    let (stat, identity) = resolve::stat_of(file.fd()).map_err(refused)?;
    Ok(Done::Opened { file, stat, identity })
}

/// A file of an earlier core life, if it is the same. One that was temporary may have its final name.
fn reopen(
    share: &Arc<Share>,
    path: &str,
    put: Option<(&str, u64)>,
    read: bool,
    write: bool,
    identity: Identity,
) -> Result<Done, Errno> {
    let flags = match (read, write) {
        (_, false) => OFlags::RDONLY,
        (false, true) => OFlags::WRONLY,
        (true, true) => OFlags::RDWR,
    };
    let found = match put {
        _ if resolve::is_at(share.root(), path, identity)? => Some(path.to_owned()),
        Some((target, policy)) => name_of(share, target, policy, identity)?,
        None => None,
    };
    let fd = resolve::file(share.root(), &found.ok_or(Errno::STALE)?, flags, Mode::empty())?;
    let (stat, seen) = resolve::stat_of(fd.as_fd())?;
    if seen != identity {
        return Err(Errno::STALE);
    }
    let file = Box::new(share.opened(fd)?);
    Ok(Done::Opened { file, stat, identity })
}

/// It was begun by an earlier core life, and nobody can tell whether it was done.
const fn unknown() -> Outcome {
    Outcome::failed(Status::OUTCOME_UNKNOWN, FailedAt::File)
}

/// The name that a file got under a policy for an existing target, if it has one of those.
fn name_of(share: &Share, target: &str, policy: u64, identity: Identity) -> Result<Option<String>, Errno> {
    let numbers = if policy == existing::RENAME {
        RENAMES_MAX
    } else {
        1
    };
    let (above, name) = target.split_at(target.rfind('/').map_or(0, |slash| slash + 1));
    for number in 0..numbers {
        let path = format!("{above}{}", numbered(name, number));
        if resolve::is_at(share.root(), &path, identity)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// A file that is to get a name.
struct Naming<'a> {
    source: &'a str,
    target: &'a str,
    policy: u64,
    durable: bool,
}

impl Naming<'_> {
    /// It has this name now; which is written to the disk, if that was asked for.
    fn got(&self, share: &Share, path: String) -> Outcome {
        let sync = || sync_parent(share, &path).and_then(|()| sync_parent(share, self.source));
        if self.durable && sync().is_err() {
            Outcome::NotDurable { path }
        } else {
            Outcome::Committed { path }
        }
    }
}

fn commit(
    share: &Share,
    file: &OpenFile,
    name: &Naming<'_>,
    bytes: u64,
    again: bool,
) -> Result<Outcome, Errno> {
    let (seen, identity) = resolve::stat_of(file.fd())?;
    let is_temporary = match resolve::is_at(share.root(), name.source, identity) {
        Err(_) if again => return Ok(unknown()),
        found => found?,
    };
    if !is_temporary {
        // An earlier core life gave it its name; or somebody on the host took the temporary name away, or gave it to another file, that is not
        // to be published.
        return match name_of(share, name.target, name.policy, identity) {
            Ok(Some(path)) => {
                if name.durable && fsync(file.fd()).is_err() {
                    return Ok(Outcome::NotDurable { path });
                }
                Ok(name.got(share, path))
            }
            Ok(None) | Err(_) if again => Ok(unknown()),
            Ok(None) => Err(Errno::STALE),
            Err(errno) => Err(errno),
        };
    }
    if seen.size != bytes {
        match file.resize(bytes, || ftruncate(file.fd(), bytes)) {
            Ok(cut) => cut?,
            Err(outcome) => return Ok(outcome),
        }
    }
    if name.durable
        && let Err(errno) = fsync(file.fd())
    {
        // Linux says once that it lost pages, and takes them for written from then on: a second COMMIT would be told that all is well. So nothing
        // is left that could be committed or resumed: both find STALE, and the put begins again.
        let _ = remove(share, name.source);
        return Err(errno);
    }
    let path = give_name(share, name.source, name.target, name.policy)?;
    Ok(name.got(share, path))
}

fn rename(share: &Share, name: &Naming<'_>, intended: Option<Identity>) -> Result<Outcome, Errno> {
    let done = match intended {
        None => None,
        Some(identity) => match name_of(share, name.target, name.policy, identity) {
            Ok(Some(path)) => Some(path),
            Ok(None) if resolve::is_at(share.root(), name.source, identity) == Ok(true) => None,
            // It has left, and not for there; or nobody can look.
            Ok(None) | Err(_) => return Ok(unknown()),
        },
    };
    let path = match done {
        Some(path) => path,
        None => give_name(share, name.source, name.target, name.policy)?,
    };
    Ok(name.got(share, path))
}

/// Moves `source` to `target` under a policy for an existing target; the name it got.
fn give_name(share: &Share, source: &str, target: &str, policy: u64) -> Result<String, Errno> {
    let (source_directory, source_name) = resolve::parent(share.root(), source)?;
    let (target_directory, target_name) = resolve::parent(share.root(), target)?;
    let move_to =
        |name: &str, flags| renameat_with(&source_directory, source_name, &target_directory, name, flags);
    let names = share.quota.lock_names();
    let look = || statat(&source_directory, source_name, AtFlags::SYMLINK_NOFOLLOW);
    let source = names.as_ref().map(|_| look()).transpose()?;
    if let Some(stat) = &source
        && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
    {
        // A count that is under way may have passed its new place.
        share.quota.settle(charge::key_of(stat), charge::size_of(stat));
    }
    let moved = match policy {
        existing::REPLACE => {
            let replace = || move_to(target_name, RenameFlags::empty());
            match source.as_ref().map(charge::key_of) {
                None => replace(),
                // Of a file that gets the name which it has, nothing goes.
                Some(source) => {
                    let target = target_directory.as_fd();
                    share.quota.lose_name(target, target_name, Some(source), replace)
                }
            }
            .map(|()| target.to_owned())
        }
        existing::RENAME => {
            let above = target.len() - target_name.len();
            (0..RENAMES_MAX)
                .map(|number| numbered(target_name, number))
                .map(|name| {
                    move_to(&name, RenameFlags::NOREPLACE).map(|()| format!("{}{name}", &target[..above]))
                })
                .find(|moved| *moved != Err(Errno::EXIST))
                .unwrap_or(Err(Errno::EXIST))
        }
        _ => move_to(target_name, RenameFlags::NOREPLACE).map(|()| target.to_owned()),
    };
    // (One that was just made is empty.)
    if source.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
        && !source_name.starts_with(TEMPORARY_PREFIX)
    {
        share.quota.directory_moved();
    }
    moved
}

/// `name.ext` → `name.1.ext`; number 0 is the name itself.
fn numbered(name: &str, number: u32) -> String {
    match (number, name.rsplit_once('.')) {
        (0, _) => name.to_owned(),
        (_, Some((stem, extension))) if !stem.is_empty() => format!("{stem}.{number}.{extension}"),
        _ => format!("{name}.{number}"),
    }
}

fn sync_parent(share: &Share, path: &str) -> Result<(), Errno> {
    let (directory, _) = resolve::split(path)?;
    fsync(resolve::directory_to_read(share.root(), directory)?)
}

/// A directory is made under a name that nobody else has, so that it is known for certain who made it, and then moved to where nothing is.
fn prepare_directory(share: &Share, path: &str, temporary: &str) -> Result<Outcome, Errno> {
    let (directory, name) = resolve::parent(share.root(), path)?;
    match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => {}
        Ok(_) => return Err(Errno::EXIST),
        Err(errno) => return Err(errno),
    }
    let (_, temporary_name) = resolve::split(temporary)?;
    mkdirat(&directory, temporary_name, share.mode(0o755))?;
    resolve::stat(share.root(), temporary).map(|(_, identity)| Outcome::Identified(identity))
}

fn make_directory(
    share: &Share,
    path: &str,
    temporary: &str,
    intended: Option<Identity>,
) -> Result<Outcome, Errno> {
    match intended.map(|identity| resolve::is_at(share.root(), path, identity)) {
        Some(Ok(true)) => return Ok(Outcome::Done),
        Some(Err(_)) => return Ok(unknown()),
        None | Some(Ok(false)) => {}
    }
    let moved = give_name(share, temporary, path, existing::REFUSE);
    if moved.is_err() {
        // What made it fail is said, not what comes of tidying up: the sweep does that again.
        let _ = remove(share, temporary);
    }
    match moved {
        Ok(_) => Ok(Outcome::Done),
        Err(Errno::NOENT) if intended.is_some() => Ok(unknown()),
        Err(errno) => Err(errno),
    }
}

fn remove(share: &Share, path: &str) -> Result<Outcome, Errno> {
    let (directory, name) = resolve::parent(share.root(), path)?;
    let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => unlinkat(&directory, name, AtFlags::REMOVEDIR)?,
        _ => share.unlink(directory.as_fd(), name)?,
    }
    Ok(Outcome::Done)
}

fn list(share: &Share, path: &str, cursor: u64, bytes_max: u64) -> Result<Outcome, Errno> {
    let directory = resolve::directory_to_read(share.root(), path)?;
    if cursor != 0 {
        // The cursor is the directory's own position cookie; a made-up one gives other entries, no harm.
        seek(&directory, SeekFrom::Start(cursor))?;
    }
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    let mut reader = RawDir::new(&directory, &mut buffer);
    let (mut entries, mut bytes, mut position) = (Vec::new(), 0u64, cursor);
    while let Some(entry) = reader.next() {
        let entry = entry?;
        let next = entry.next_entry_cookie();
        // A name that is not UTF-8 cannot be said to a guest.
        let name = entry
            .file_name()
            .to_str()
            .ok()
            .filter(|name| !matches!(*name, "." | "..") && !name.starts_with(TEMPORARY_PREFIX));
        let stat = name.and_then(|_| statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).ok());
        if let (Some(name), Some(stat)) = (name, stat) {
            let more = entry_bytes(name) as u64;
            if bytes + more > bytes_max || entries.len() == LISTED_MAX {
                // Position 0 means "from the start" and, as an answer, "that was all": with nothing listed the buffer is too small.
                return if entries.is_empty() {
                    Ok(Outcome::failed(Status::TOO_LARGE, FailedAt::Into))
                } else {
                    Ok(Outcome::Listed {
                        entries,
                        next: position,
                    })
                };
            }
            bytes += more;
            entries.push((name.to_owned(), resolve::record(&stat)));
        }
        position = next;
    }
    Ok(Outcome::Listed { entries, next: 0 })
}

#[cfg(test)]
mod tests {
    use super::numbered;

    #[test]
    fn a_free_name_keeps_its_extension() {
        assert_eq!(numbered("a.txt", 0), "a.txt");
        assert_eq!(numbered("a.tar.gz", 2), "a.tar.2.gz");
        assert_eq!(numbered("noext", 1), "noext.1");
        assert_eq!(numbered(".hidden", 1), ".hidden.1");
    }
}
