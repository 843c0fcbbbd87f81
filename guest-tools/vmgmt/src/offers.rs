//! `vmgmt cp` and `vmgmt accept`: files from VM to VM, and to and from the host.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use vmgmt_driver::abi::chat::HOST_NAME;
use vmgmt_driver::operations::offer::Offer;
use vmgmt_driver::transfer::Descriptor;
use vmgmt_driver::{Client, DriverError, Mode, Status};

use crate::ending::{self, ending};
use crate::files::told;
use crate::local::{self, Existing, Pending, printable};
use crate::output::say;
use crate::progress::Progress;
use crate::session::{Session, seconds};

/// `vmgmt cp`.
pub fn copy(session: &Session, source: &Path, target: &str, timeout: Option<f64>, check: bool) -> Result<()> {
    let (input, size, shown) = local::open_source(source)?;
    let Some((peer, name)) = target.split_once(':') else {
        return Err(ending(ending::USAGE, format!("{target:?} is not VM:[name]")));
    };
    if peer == HOST_NAME {
        return Err(ending(
            ending::USAGE,
            "the host takes files in its shares: `vmgmt put FILE SHARE/` (`vmgmt ls` lists them); or it fetches one: `vmgmtctl pull` there, `vmgmt accept --serve DIR` here",
        ));
    }
    let name = if name.is_empty() {
        local::split(source).context("standard input needs a name")?.1
    } else {
        name.to_owned()
    };
    let deadline = timeout.map(seconds).transpose()?;
    let started = Instant::now();
    let mut client = session.client(Mode::FILE)?;
    let stream = client
        .offer(peer, &name, size, 0, deadline)
        .with_context(|| printable(target))?;
    let mut progress = Progress::new(size, session.general.json);
    let mut source = Descriptor::new(input.as_fd(), &shown);
    let sent = client.stream_send(stream, &mut source, &session.transfer(check), &mut |bytes| {
        progress.at(bytes)
    });
    drop(progress);
    let done = sent.inspect_err(|_| {
        // The receiver learns of it; the first error is the one that matters.
        let _aborted = client.close(stream);
    });
    told(
        session,
        "cp",
        &format!("{peer}:{name}"),
        done.with_context(|| printable(target))?,
        started.elapsed(),
    )?;
    Ok(())
}

/// What `accept` does with offers and requests.
pub struct AcceptOrder<'a> {
    pub from: Option<&'a str>,
    pub once: bool,
    pub into: &'a Path,
    pub serve: Option<&'a Path>,
    pub check: bool,
}

/// `vmgmt accept`.
pub fn accept(session: &Session, order: &AcceptOrder<'_>) -> Result<()> {
    let mut client = session.client(Mode::FILE)?;
    // A directory that cannot be written is better known now than when a file comes.
    drop(Pending::create(order.into)?);
    loop {
        let posted = client.post_next_offer()?;
        let offer = match client.next_offer(posted, None) {
            Ok(Some(offer)) => offer,
            Ok(None) => continue,
            Err(error) if error.is_recoverable() => {
                client.reopen()?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let handled = handle(session, &mut client, &offer, order);
        match handled {
            Ok(true) if order.once => return Ok(()),
            Ok(_) => {}
            Err(error) if order.once => return Err(error),
            Err(error) => match error.downcast_ref::<DriverError>() {
                Some(
                    DriverError::Interrupted | DriverError::DeviceAbsent | DriverError::DeviceQuarantined,
                ) => {
                    return Err(error);
                }
                Some(broken) if broken.is_recoverable() => client.reopen()?,
                _ => {
                    // One transfer that failed is no reason to stop waiting for the next.
                    crate::ending::report(&error, session.general.json);
                }
            },
        }
    }
}

/// Answers one offer or request; whether it was for us.
fn handle(session: &Session, client: &mut Client, offer: &Offer, order: &AcceptOrder<'_>) -> Result<bool> {
    if offer.is_request {
        return match order.serve {
            Some(directory) => serve(session, client, offer, directory, order.check).map(|()| true),
            None => client
                .refuse(offer.handle, Status::DENIED)
                .map(|()| false)
                .map_err(Into::into),
        };
    }
    if order.from.is_some_and(|from| from != offer.source_name) {
        client.refuse(offer.handle, Status::REFUSED)?;
        return Ok(false);
    }
    let Some(name) = local::plain_name(&offer.file_name) else {
        client.refuse(offer.handle, Status::BAD_ARGUMENT)?;
        let shown = printable(&offer.file_name);
        return Err(ending(
            ending::DENIED,
            format!(
                "{} offered a file named {shown:?}: refused",
                printable(&offer.source_name)
            ),
        ));
    };
    let mut pending = match Pending::create(order.into) {
        Ok(pending) => pending,
        Err(error) => {
            client.refuse(offer.handle, Status::IO_ERROR)?;
            return Err(error);
        }
    };
    let stream = client.accept(offer.handle)?;
    let received = receive(session, client, stream, offer, &mut pending.file, order.check);
    let kept = received.and_then(|done| Ok((done, pending.keep(name, Existing::Rename)?)));
    match kept {
        Ok((done, kept)) => {
            client.stream_confirm(stream, Status::OK)?;
            if session.general.json {
                say!(
                    "{}",
                    json!({"command": "accept", "from": offer.source_name, "name": kept, "bytes": done.bytes,
                           "crc32": done.checksum.map(|checksum| format!("{checksum:08x}"))})
                );
            } else {
                say!(
                    "{} from {}: {} bytes",
                    printable(&kept),
                    printable(&offer.source_name),
                    done.bytes
                );
            }
            Ok(true)
        }
        Err(error) => {
            let status = match error.downcast_ref::<DriverError>() {
                Some(DriverError::Integrity { .. }) => Status::INTEGRITY,
                Some(DriverError::File { .. }) | None => Status::IO_ERROR,
                // Not a disk's doing: it was interrupted, or its device goes away or was reset under it.
                Some(_) => Status::CANCELLED,
            };
            // The stream may be over already; then there is nobody to tell.
            let _told = client.stream_confirm(stream, status);
            Err(error)
        }
    }
}

fn receive(
    session: &Session,
    client: &mut Client,
    stream: u64,
    offer: &Offer,
    file: &mut File,
    check: bool,
) -> Result<vmgmt_driver::Transferred> {
    let mut progress = Progress::new(offer.size, session.general.json);
    let mut sink = Descriptor::new(file.as_fd(), "the local file");
    let options = session.transfer(check);
    let (done, theirs) =
        client.stream_receive(stream, &mut sink, &options, &mut |bytes| progress.at(bytes))?;
    if !done.matches(theirs) {
        return Err(DriverError::Integrity {
            what: offer.file_name.clone(),
            expected: theirs.unwrap_or_default(),
            found: done.checksum.unwrap_or_default(),
        }
        .into());
    }
    if offer.size.is_some_and(|size| size != done.bytes) {
        return Err(DriverError::Changed(offer.file_name.clone()).into());
    }
    Ok(done)
}

/// Sends the host a file that it asked for.
fn serve(
    session: &Session,
    client: &mut Client,
    request: &Offer,
    directory: &Path,
    check: bool,
) -> Result<()> {
    if request.source_name != HOST_NAME {
        client.refuse(request.handle, Status::DENIED)?;
        return Err(ending(
            ending::DENIED,
            format!(
                "{} asked for a file: only the host may",
                printable(&request.source_name)
            ),
        ));
    }
    let file = match local::open_beneath(directory, &request.file_name) {
        Ok(file) => file,
        Err(error) => {
            let absent = error
                .chain()
                .any(|cause| cause.downcast_ref::<rustix::io::Errno>() == Some(&rustix::io::Errno::NOENT));
            client.refuse(
                request.handle,
                if absent {
                    Status::NO_SUCH_NAME
                } else {
                    Status::DENIED
                },
            )?;
            return Err(error);
        }
    };
    let started = Instant::now();
    let size = local::known_size(&file.metadata().context("looking at the file")?);
    let stream = client.offer(HOST_NAME, &request.file_name, size, request.handle, None)?;
    let mut source = Descriptor::new(file.as_fd(), &request.file_name);
    let done = client
        .stream_send(stream, &mut source, &session.transfer(check), &mut |_| {})
        .inspect_err(|_| {
            let _aborted = client.close(stream);
        })?;
    told(session, "served", &request.file_name, done, started.elapsed())?;
    Ok(())
}
