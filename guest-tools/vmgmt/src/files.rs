//! The commands of file mode: put, get, ls, rm, stat, mkdir, mv.

use std::io::Seek;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use vmgmt_driver::abi::file::{self, existing, kind};
use vmgmt_driver::operations::file::Share;
use vmgmt_driver::transfer::{Descriptor, announced};
use vmgmt_driver::{Client, DriverError, Mode, Status, TransferOptions, Transferred};

use crate::arguments::Existing;
use crate::ending::{self, ending};
use crate::local::{self, Pending, printable};
use crate::output::say;
use crate::progress::Progress;
use crate::session::Session;

/// How often a transfer is taken up again after the device was replaced.
const ATTEMPTS: u32 = 5;

/// The number for PUT and RENAME.
pub const fn existing_number(choice: Existing) -> u64 {
    match choice {
        Existing::Refuse => existing::REFUSE,
        Existing::Replace => existing::REPLACE,
        Existing::Rename => existing::RENAME,
    }
}

/// What a put shall do.
pub struct PutOrder {
    pub existing: Existing,
    pub resume: bool,
    pub durable: bool,
    pub mode: Option<u32>,
    pub check: bool,
}

/// `vmgmt put`.
pub fn put(session: &Session, source: &Path, target: &str, order: &PutOrder) -> Result<()> {
    let (input, size, name) = local::open_source(source)?;
    let mut path = target.to_owned();
    if path.ends_with('/') || !path.contains('/') {
        let (_, last) = local::split(source).context("the target names no file")?;
        path = format!("{}/{last}", path.trim_end_matches('/'));
    }
    let mut client = session.client(Mode::FILE)?;
    let options = session.transfer(order.check);
    let mut how = existing_number(order.existing);
    if let Some(mode) = order.mode {
        how |= file::put::SET_PERMISSIONS | u64::from(mode) << file::put::PERMISSIONS_SHIFT;
    }
    if how & existing::MASK == existing::REFUSE && client.stat(&path).is_ok() {
        // COMMIT would say so too, but only after all the data was sent.
        bail!("{} exists already (see --existing)", printable(&path));
    }
    let started = std::time::Instant::now();
    let mut progress = Progress::new(size, session.general.json);
    let mut resume = order.resume;
    let mut attempt = 1;
    let (done, stored) = loop {
        let upload = Upload {
            path: &path,
            size,
            how,
            resume,
            durable: order.durable,
        };
        let mut source = Descriptor::new(input.as_fd(), &name);
        match upload.run(&mut client, &mut source, &options, &mut progress) {
            Ok(done) => break done,
            Err(error) if error.is_recoverable() && size.is_some() && attempt < ATTEMPTS => {
                client.reopen()?;
                rustix::fs::seek(&input, rustix::fs::SeekFrom::Start(0)).with_context(|| name.clone())?;
                resume = true;
                attempt += 1;
            }
            Err(error) => return Err(anyhow::Error::new(error).context(printable(&path))),
        }
    };
    drop(progress);
    let stored = if stored.is_empty() { path } else { stored };
    told(session, "put", &stored, done, started.elapsed())?;
    Ok(())
}

/// One attempt to put.
struct Upload<'a> {
    path: &'a str,
    size: Option<u64>,
    how: u64,
    resume: bool,
    durable: bool,
}

impl Upload<'_> {
    fn run(
        &self,
        client: &mut Client,
        source: &mut Descriptor<'_>,
        options: &TransferOptions,
        progress: &mut Progress,
    ) -> vmgmt_driver::Result<(Transferred, String)> {
        let resume = if self.resume { file::put::RESUME } else { 0 };
        let how = self.how | resume | options.put_bits();
        let mut put = client.put(self.path, announced(self.size), how)?;
        let mut prefix = None;
        if put.resumed_bytes > 0 {
            // What is there must be the beginning of what we have.
            let mine = client.skip(source, put.resumed_bytes, options)?;
            let (bytes, theirs) = client.checksum(put.handle, 0, put.resumed_bytes)?;
            if bytes != put.resumed_bytes || mine != theirs {
                client.close(put.handle)?;
                return Err(DriverError::Integrity {
                    what: format!(
                        "what an earlier put left of {} (put it without --resume)",
                        self.path
                    ),
                    expected: mine,
                    found: theirs,
                });
            }
            prefix = Some((bytes, mine));
        } else if self.resume && self.size.is_none() {
            put.resumed_bytes = 0;
        }
        let sent = client
            .write_all(put.handle, prefix, source, options, &mut |bytes| {
                progress.at(bytes)
            })
            .and_then(|done| {
                Ok((
                    done,
                    client.commit(put.handle, done.bytes, done.checksum, self.durable)?,
                ))
            });
        if sent
            .as_ref()
            .is_err_and(|error| !error.is_recoverable() && !matches!(error, DriverError::Interrupted))
        {
            // The first error is the one that matters.
            let _closed = client.close(put.handle);
        }
        sent
    }
}

/// `vmgmt get`.
pub fn get(session: &Session, source: &str, target: Option<&Path>, force: bool, check: bool) -> Result<()> {
    let mut client = session.client(Mode::FILE)?;
    let options = session.transfer(check);
    let started = std::time::Instant::now();
    let last = source.rsplit('/').next().unwrap_or(source);
    if target == Some(Path::new("-")) {
        let output = std::io::stdout();
        let mut sink = Descriptor::new(output.as_fd(), "standard output");
        let shown = printable(source);
        let file = client.open_for_reading(source).context(shown.clone())?;
        let mut progress = Progress::new(Some(file.size), session.general.json);
        let done = client.get(file.handle, 0, file.size, &mut sink, &options, &mut |bytes| {
            progress.at(bytes)
        });
        let done = done
            .and_then(|done| client.verify(file.handle, source, done))
            .and_then(|()| client.close(file.handle));
        return done.context(shown);
    }
    let (directory, name) = match target {
        None => (PathBuf::from("."), last.to_owned()),
        Some(path) if path.is_dir() => (path.to_path_buf(), last.to_owned()),
        Some(path) => local::split(path)?,
    };
    if !force && directory.join(&name).symlink_metadata().is_ok() {
        return Err(ending(
            ending::FAILED,
            format!(
                "{} exists already (--force replaces it)",
                directory.join(&name).display()
            ),
        ));
    }
    let mut pending = Pending::create(&directory)?;
    let mut attempt = 1;
    let done = loop {
        match download(
            &mut client,
            source,
            &mut pending.file,
            &options,
            session.general.json,
        ) {
            Ok(done) => break done,
            Err(error) if error.is_recoverable() && attempt < ATTEMPTS => {
                client.reopen()?;
                attempt += 1;
            }
            Err(error) => return Err(anyhow::Error::new(error).context(printable(source))),
        }
    };
    let existing = if force {
        local::Existing::Replace
    } else {
        local::Existing::Refuse
    };
    let name = pending.keep(&name, existing)?;
    told(
        session,
        "get",
        &directory.join(name).display().to_string(),
        done,
        started.elapsed(),
    )?;
    Ok(())
}

/// One attempt to get: goes on behind what the local file holds already, which is checked at the end with the rest.
fn download(
    client: &mut Client,
    source: &str,
    target: &mut std::fs::File,
    options: &TransferOptions,
    json: bool,
) -> vmgmt_driver::Result<Transferred> {
    let local = |error| DriverError::file("the local file", error);
    let mut there = target.seek(std::io::SeekFrom::End(0)).map_err(local)?;
    let file = client.open_for_reading(source)?;
    if there > file.size {
        target.set_len(0).map_err(local)?;
        there = target.seek(std::io::SeekFrom::Start(0)).map_err(local)?;
    }
    let mut progress = Progress::new(Some(file.size), json);
    let begun_before = there > 0;
    let options = TransferOptions {
        check: options.check && !begun_before,
        ..*options
    };
    let reader = target.try_clone().map_err(local)?;
    let mut sink = Descriptor::new(target.as_fd(), "the local file");
    let mut done = client.get(file.handle, there, file.size, &mut sink, &options, &mut |bytes| {
        progress.at(there + bytes)
    })?;
    done.bytes += there;
    if begun_before {
        rustix::fs::seek(&reader, rustix::fs::SeekFrom::Start(0)).map_err(|error| local(error.into()))?;
        let checksum = client.skip(
            &mut Descriptor::new(reader.as_fd(), "the local file"),
            done.bytes,
            &options,
        )?;
        done.checksum = Some(checksum);
    }
    client.verify(file.handle, source, done)?;
    client.close(file.handle)?;
    Ok(done)
}

/// Says what went through.
pub fn told(
    session: &Session,
    what: &str,
    name: &str,
    done: Transferred,
    time: std::time::Duration,
) -> Result<()> {
    let checksum = done.checksum.map(|checksum| format!("{checksum:08x}"));
    if session.general.json {
        say!(
            "{}",
            json!({"command": what, "name": name, "bytes": done.bytes, "crc32": checksum, "seconds": time.as_secs_f64()})
        );
    } else {
        let checksum = checksum.map_or_else(
            || "not checked".to_owned(),
            |checksum| format!("crc32 {checksum}"),
        );
        let rate = done.bytes as f64 / time.as_secs_f64().max(1e-9) / 1e6;
        say!(
            "{what} {}: {} bytes, {checksum}, {:.2} s, {rate:.0} MB/s",
            printable(name),
            done.bytes,
            time.as_secs_f64()
        );
    }
    Ok(())
}

fn kind_name(number: u32) -> &'static str {
    match number {
        kind::FILE => "file",
        kind::DIRECTORY => "directory",
        _ => "other",
    }
}

fn stat_json(name: &str, stat: &file::FileStat) -> serde_json::Value {
    json!({
        "name": name, "kind": kind_name(stat.kind), "size": stat.size, "allocated": stat.allocated,
        "modified_ns": stat.modified_ns, "permissions": format!("{:03o}", stat.permissions & 0o777),
    })
}

fn stat_line(name: &str, stat: &file::FileStat) -> String {
    let letter = match stat.kind {
        kind::FILE => '-',
        kind::DIRECTORY => 'd',
        _ => '?',
    };
    let seconds = stat.modified_ns.div_euclid(1_000_000_000);
    format!(
        "{letter}{:03o} {:>14} {seconds:>11} {}",
        stat.permissions & 0o777,
        stat.size,
        printable(name)
    )
}

/// Shares, for `ls` and `info`.
pub fn show_shares(shares: &[Share], json: bool) -> Result<()> {
    for share in shares {
        if json {
            say!(
                "{}",
                json!({"share": share.name, "writable": share.writable, "bytes_left": share.bytes_left})
            );
        } else {
            let left = share
                .bytes_left
                .map_or_else(String::new, |left| format!(", {left} bytes left"));
            say!(
                "{} ({}{left})",
                printable(&share.name),
                if share.writable { "read-write" } else { "read-only" }
            );
        }
    }
    Ok(())
}

/// `vmgmt ls`.
pub fn list(session: &Session, path: Option<&str>) -> Result<()> {
    let mut client = session.client(Mode::FILE)?;
    let Some(path) = path else {
        show_shares(&client.shares()?, session.general.json)?;
        return Ok(());
    };
    let path = path.trim_end_matches('/');
    let entries = match client.list(path) {
        Err(error) if error.status() == Some(Status::NOT_A_DIRECTORY) => {
            return stat(session, &mut client, path);
        }
        other => other.with_context(|| printable(path))?,
    };
    for entry in entries {
        if session.general.json {
            say!("{}", stat_json(&entry.name, &entry.stat));
        } else {
            say!("{}", stat_line(&entry.name, &entry.stat));
        }
    }
    Ok(())
}

/// `vmgmt stat`.
pub fn stat(session: &Session, client: &mut Client, path: &str) -> Result<()> {
    let stat = client.stat(path).with_context(|| printable(path))?;
    if session.general.json {
        say!("{}", stat_json(path, &stat));
    } else {
        say!("{}", stat_line(path, &stat));
    }
    Ok(())
}

/// `vmgmt rm`.
pub fn remove(session: &Session, paths: &[String]) -> Result<()> {
    let mut client = session.client(Mode::FILE)?;
    paths
        .iter()
        .try_for_each(|path| client.remove(path).with_context(|| printable(path)))
}

/// `vmgmt mkdir`.
pub fn make_directory(session: &Session, path: &str) -> Result<()> {
    session
        .client(Mode::FILE)?
        .make_directory(path)
        .with_context(|| printable(path))
}

/// `vmgmt mv`.
pub fn rename(
    session: &Session,
    source: &str,
    target: &str,
    existing: Existing,
    durable: bool,
) -> Result<()> {
    let mut client = session.client(Mode::FILE)?;
    client
        .rename(source, target, existing_number(existing), durable)
        .with_context(|| format!("{} to {}", printable(source), printable(target)))
}
