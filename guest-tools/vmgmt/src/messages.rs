//! The commands of chat mode: send, recv, peers, publish.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use vmgmt_driver::abi::chat::{message_flag, presence};
use vmgmt_driver::operations::chat::{Message, Receiver};
use vmgmt_driver::{DriverError, Mode};

use crate::ending::{self, ending};
use crate::local::{printable, read_all};
use crate::output::say;
use crate::session::{Session, seconds};

/// Receives posted at once: one is being read while the next may come.
const RECEIVES_POSTED: usize = 4;

/// `vmgmt send`.
pub fn send(session: &Session, target: &str, text: &str, key: u64) -> Result<()> {
    let bytes = if text == "-" {
        read_all(std::io::stdin().as_fd(), &session.cancel)?
    } else {
        text.as_bytes().to_vec()
    };
    let mut client = session.client(Mode::CHAT)?;
    let number = client
        .send(target, &bytes, key)
        .with_context(|| printable(target))?;
    if session.general.json {
        say!(
            "{}",
            json!({"target": target, "number": number, "bytes": bytes.len()})
        );
    }
    Ok(())
}

/// What `recv` waits for.
pub struct ReceiveOrder {
    pub count: u64,
    pub timeout: Option<f64>,
    pub follow: bool,
    pub raw: bool,
}

/// `vmgmt recv`.
pub fn receive(session: &Session, order: &ReceiveOrder) -> Result<()> {
    let timeout = order.timeout.map(seconds).transpose()?;
    let mut client = session.client(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    let mut got = 0;
    // No more are posted than wanted: a message taken from the mailbox must be shown.
    let wanted = |got: u64| {
        if order.follow {
            usize::MAX
        } else {
            usize::try_from(order.count - got).unwrap_or(usize::MAX)
        }
    };
    while order.follow || got < order.count {
        client.post_receives(&mut receiver, wanted(got).min(RECEIVES_POSTED))?;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        match client.receive(&mut receiver, deadline) {
            Ok(Some(message)) => {
                show(&message, session.general.json, order.raw)?;
                got += 1;
            }
            Ok(None) => break,
            Err(error) if error.is_recoverable() => {
                for message in client.reopen_receiving(&mut receiver)? {
                    show(&message, session.general.json, order.raw)?;
                    got += 1;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    for message in client.withdraw_receives(&mut receiver)? {
        show(&message, session.general.json, order.raw)?;
        got += 1;
    }
    if got == 0 && order.count > 0 {
        return Err(DriverError::TimedOut.into());
    }
    Ok(())
}

fn show(message: &Message, json: bool, raw: bool) -> Result<()> {
    let mut output = std::io::stdout().lock();
    let text = String::from_utf8_lossy(&message.bytes);
    if json {
        let document = json!({
            "from": message.source_name, "source": message.source, "sequence": message.sequence,
            "accepted_ns": message.accepted_ns, "to_all": message.flags & message_flag::TO_ALL != 0,
            "from_mailbox": message.flags & message_flag::FROM_MAILBOX != 0,
            "bytes": message.bytes.len(), "text": text,
        });
        writeln!(output, "{document}")
    } else if raw {
        output
            .write_all(&message.bytes)
            .and_then(|()| output.write_all(b"\n"))
    } else {
        writeln!(
            output,
            "{}: {}",
            printable(&message.source_name),
            printable(&text)
        )
    }
    .and_then(|()| output.flush())
    .context("writing standard output")
}

/// `vmgmt peers`.
pub fn peers(session: &Session) -> Result<()> {
    for peer in session.client(Mode::CHAT)?.peers()? {
        let has = |bit| peer.presence & bit != 0;
        if session.general.json {
            say!(
                "{}",
                json!({"number": peer.number, "name": peer.name, "description": peer.description,
                       "connected": has(presence::CONNECTED), "published": has(presence::PUBLISHED), "listening": has(presence::LISTENING)})
            );
        } else {
            let state = match (has(presence::CONNECTED), has(presence::LISTENING)) {
                (false, _) => "away",
                (true, true) => "listening",
                (true, false) => "connected",
            };
            say!(
                "{} ({state}) {}",
                printable(&peer.name),
                printable(&peer.description)
            );
        }
    }
    Ok(())
}

/// `vmgmt publish`.
pub fn publish(session: &Session, description: Option<&str>, plain: bool, stay: bool) -> Result<()> {
    let mut client = session.client(Mode::CHAT)?;
    client.publish(description.or(plain.then_some("")))?;
    if !stay {
        return Ok(());
    }
    loop {
        // Presence is the device's: this only keeps the device in use until Ctrl-C, and publishes again after a restore.
        match client
            .channel()
            .wait(Some(Instant::now() + Duration::from_secs(3600)))
        {
            Ok(_) => while client.channel().reap()?.is_some() {},
            // The ring is closed by the drop; presence ends with it.
            Err(DriverError::Interrupted) => return Err(ending(ending::INTERRUPTED, "interrupted")),
            Err(error) if error.is_recoverable() => {
                client.reopen()?;
                client.publish(description.or(plain.then_some("")))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
