//! Round trips of messages with a VM that runs `vmgmt bench --answer`, or with a program of the host that does the same.
//!
//! Comes in: a partner's name. Goes out: microseconds from before the send until the same bytes are back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_driver::{Client, Mode};

use super::{BenchOrder, latency};
use crate::session::Session;

/// A small message, as the peers' figures have it.
const MESSAGE_BYTES: usize = 64;

/// Receives posted at once: one is being read while the next may come.
const RECEIVES_POSTED: usize = 4;

/// A partner may have to start first; its messages wait in its mailbox.
const PARTNER_DEADLINE: Duration = Duration::from_secs(60);

/// Not counted: the partner starts, caches fill.
const WARM_UP: u64 = 20;

/// Long enough that nobody sleeps between two messages.
const POLLING: Duration = Duration::from_secs(1);

/// Ends [`answer`].
const END: &[u8] = b"end";

/// Round trips with this side sleeping, or polling when `--spin-us` is not 0. The partner chooses for itself.
pub(super) fn round_trips(session: &Session, order: &BenchOrder<'_>, partner: &str) -> Result<()> {
    let how = if session.general.spin_us == 0 {
        "sleeping"
    } else {
        "polling"
    };
    let mut client = client(session)?;
    let mut receiver = Receiver::default();
    let mut number = 0;
    let mut once = || round_trip(&mut client, &mut receiver, partner, &mut number);
    for _ in 0..WARM_UP {
        once()?;
    }
    let name = if partner == "host" { "host" } else { "VM" };
    latency(
        session,
        &format!("message round trip with {name}, {how}"),
        order.count,
        once,
    )?;
    client
        .send(partner, END, 0)
        .context("telling the partner to end")?;
    client.withdraw_receives(&mut receiver)?;
    Ok(())
}

fn client(session: &Session) -> Result<Client> {
    match &session.device {
        Some(device) if session.general.spin_us > 0 => session.ring(device, Mode::CHAT, POLLING),
        Some(device) => session.ring(device, Mode::CHAT, Duration::ZERO),
        None => session.port(Mode::CHAT),
    }
}

fn round_trip(client: &mut Client, receiver: &mut Receiver, partner: &str, number: &mut u64) -> Result<()> {
    *number += 1;
    // Text: a program of the host may speak JSON.
    let sent = format!("{number:0>MESSAGE_BYTES$}");
    client.post_receives(receiver, RECEIVES_POSTED)?;
    client
        .send(partner, sent.as_bytes(), 0)
        .context("sending to the partner")?;
    let message = client
        .receive(receiver, Some(Instant::now() + PARTNER_DEADLINE))?
        .with_context(|| {
            format!(
                "no answer within {} s: does {partner} answer (in a VM: vmgmt bench --answer)?",
                PARTNER_DEADLINE.as_secs()
            )
        })?;
    ensure!(
        message.bytes == sent.as_bytes(),
        "message {number} came back as another one"
    );
    Ok(())
}

/// Sends every message back to where it came from until one says `end`.
pub(super) fn answer(session: &Session) -> Result<()> {
    let mut client = client(session)?;
    let mut receiver = Receiver::default();
    loop {
        client.post_receives(&mut receiver, RECEIVES_POSTED)?;
        let Some(message) = client.receive(&mut receiver, Some(Instant::now() + PARTNER_DEADLINE))? else {
            anyhow::bail!("no message for {} s", PARTNER_DEADLINE.as_secs());
        };
        if message.bytes == END {
            client.withdraw_receives(&mut receiver)?;
            return Ok(());
        }
        client
            .send(&message.source_name, &message.bytes, 0)
            .context("answering")?;
    }
}
