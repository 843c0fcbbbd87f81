//! Push and pull: opens the host's file, hands its descriptor to the daemon, shows progress.
//!
//! A pulled file appears only complete: it is written under a temporary name and then given its own.

use crate::cli::{Session, failed, parse, usage};
use crate::client::{Client, ClientError};
use crate::output::bytes;
use crate::protocol::{Call, ErrorCode, Event, Failure, Progress, Pull, Push, Transferred, new_key};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::fd::AsFd;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a transfer may stand still before it is given up; the VM's time to accept comes on top.
const STANDSTILL_MAX: Duration = Duration::from_secs(120);

pub(crate) fn push(session: &Session, path: &Path, target: &str, wait_ms: u64) -> Result<(), ClientError> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| failed(format!("{shown}: {error}")))?;
    let metadata = file
        .metadata()
        .map_err(|error| failed(format!("{shown}: {error}")))?;
    if !metadata.is_file() {
        return Err(usage(
            format!("{shown} is no regular file"),
            "push files one by one; copy a pipe into a file first",
        ));
    }
    let (to, name) = match target.split_once(':') {
        Some((to, name)) if !name.is_empty() => (to.to_owned(), name.to_owned()),
        Some((to, _)) => (to.to_owned(), own_name(path)?),
        None => (target.to_owned(), own_name(path)?),
    };
    let key = Some(new_key());
    let call = Call::Push(Push {
        to,
        name,
        wait_ms,
        key,
    });
    let result = transfer(session, &call, &file, Some(metadata.len()), wait_ms)?;
    report(session, result, "sent")
}

pub(crate) fn pull(
    session: &Session,
    source: &str,
    file: Option<PathBuf>,
    force: bool,
    wait_ms: u64,
) -> Result<(), ClientError> {
    let Some((from, path)) = source
        .split_once(':')
        .filter(|(from, path)| !from.is_empty() && !path.is_empty())
    else {
        return Err(usage(
            format!("{source:?} is no VM:PATH"),
            "for example: vmgmtctl pull web:report.txt",
        ));
    };
    let target = match file {
        Some(file) if file.is_dir() => file.join(own_name(Path::new(path))?),
        Some(file) => file,
        None => own_name(Path::new(path))?.into(),
    };
    if target.exists() && !force {
        let message = format!("{} exists", target.display());
        return Err(ClientError::Failed(Failure::new(
            ErrorCode::Exists,
            message,
            "--force replaces it",
        )));
    }
    let mut temporary = Temporary::create(&target)?;
    let call = Call::Pull(Pull {
        from: from.to_owned(),
        path: path.to_owned(),
        wait_ms,
        key: Some(new_key()),
    });
    let result = transfer(session, &call, &temporary.file, None, wait_ms)?;
    temporary.commit(&target, force)?;
    report(session, result, "received")
}

fn own_name(path: &Path) -> Result<String, ClientError> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| {
        usage(
            format!("{} has no name that can be used", path.display()),
            "name the target yourself",
        )
    })
}

/// A file that goes unless it is committed.
struct Temporary {
    file: File,
    path: Option<PathBuf>,
}

impl Temporary {
    fn create(target: &Path) -> Result<Self, ClientError> {
        let name = format!(".{}.vmgmt-{}", own_name(target)?, std::process::id());
        let path = target.with_file_name(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        let file = file.map_err(|error| failed(format!("{}: {error}", path.display())))?;
        Ok(Self {
            file,
            path: Some(path),
        })
    }

    fn commit(&mut self, target: &Path, replace: bool) -> Result<(), ClientError> {
        let Some(path) = &self.path else { return Ok(()) };
        let flags = if replace {
            RenameFlags::empty()
        } else {
            RenameFlags::NOREPLACE
        };
        renameat_with(CWD, path, CWD, target, flags)
            .map_err(|errno| failed(format!("{} cannot be named so: {errno}", target.display())))?;
        self.path = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // What is left is named so that it can be told.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn transfer(
    session: &Session,
    call: &Call,
    file: &File,
    total: Option<u64>,
    wait_ms: u64,
) -> Result<Value, ClientError> {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    let style = "{spinner} {binary_bytes} of {binary_total_bytes}  {wide_bar}  {binary_bytes_per_sec}  {eta}";
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    let silence = Duration::from_millis(wait_ms).saturating_add(STANDSTILL_MAX);
    let mut client = Client::connect(&session.control)?;
    let result = client.call(call, &[file.as_fd()], Some(silence), &mut |event| {
        if let Event::Progress(Progress { bytes, total }) = event {
            if session.json {
                return session.print(&serde_json::to_string(&event).unwrap_or_default());
            }
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(bytes);
        }
        true
    });
    bar.finish_and_clear();
    result
}

fn report(session: &Session, result: Value, done: &str) -> Result<(), ClientError> {
    if session.json {
        session.print(&result.to_string());
    } else {
        let transferred: Transferred = parse(result)?;
        let line = format!(
            "{done}: {} bytes ({}), crc32 {}",
            transferred.bytes,
            bytes(transferred.bytes),
            transferred.crc32
        );
        session.print(&line);
    }
    Ok(())
}
