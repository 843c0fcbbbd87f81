//! `vmgmt bench`: figures, one JSON document each with `--json`. Every figure is measured on the real device, or, for what
//! is compared with it, on the other way that was named.
//!
//! Comes in: what to measure. Goes out: figures. Never: a figure of bytes that were not looked at.

mod files;
mod messages;
mod peers;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use vmgmt_driver::channel::Request;
use vmgmt_driver::{Client, Mode, Opcode};

use crate::output::say;
use crate::session::Session;

/// What is measured, how often, and with what.
pub struct BenchOrder<'a> {
    pub share: Option<&'a str>,
    pub mib: u32,
    /// No checksum, and no file on the guest's side.
    pub memory_only: bool,
    /// How often files go both ways.
    pub repeat: u32,
    pub count: u32,
    pub tmpfs: &'a Path,
    /// No figures of the device alone.
    pub skip_rings: bool,
    /// Who sends messages back.
    pub partner: Option<&'a str>,
    /// Only send messages back.
    pub answer: bool,
    /// A directory of another file system, to compare with.
    pub peer_directory: Option<&'a Path>,
    /// A character device with [`peers`]' protocol at its other end.
    pub peer_port: Option<&'a Path>,
}

fn figure(session: &Session, name: &str, unit: &str, value: f64, more: serde_json::Value) -> Result<()> {
    if session.general.json {
        say!(
            "{}",
            json!({"figure": name, "value": value, "unit": unit, "detail": more})
        );
    } else {
        let more = more.as_object().map_or_else(String::new, |more| {
            more.iter()
                .map(|(key, value)| format!(" {key}={value}"))
                .collect::<String>()
        });
        say!("{name:<44} {value:>12.1} {unit}{more}");
    }
    Ok(())
}

/// Latency of something, p50 first.
fn latency(session: &Session, name: &str, count: u32, mut once: impl FnMut() -> Result<()>) -> Result<()> {
    let mut times = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let started = Instant::now();
        once()?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    let at = |thousandth: usize| {
        let index = (times.len() * thousandth / 1000).min(times.len().saturating_sub(1));
        times.get(index).copied().unwrap_or_default().as_secs_f64() * 1e6
    };
    figure(
        session,
        name,
        "us",
        at(500),
        json!({"p99": at(990), "max": at(1000), "count": count}),
    )?;
    Ok(())
}

/// Measures what was asked for.
pub fn bench(session: &Session, order: &BenchOrder<'_>) -> Result<()> {
    if order.answer {
        return messages::answer(session);
    }
    if !order.skip_rings {
        rings(session, order)?;
    }
    if let Some(partner) = order.partner {
        messages::round_trips(session, order, partner)?;
    }
    if let Some(share) = order.share {
        files::files(session, order, share)?;
    }
    if let Some(directory) = order.peer_directory {
        peers::directory(session, order, directory)?;
    }
    match order.peer_port {
        Some(port) => peers::port(session, order, port),
        None => Ok(()),
    }
}

/// The device alone.
fn rings(session: &Session, order: &BenchOrder<'_>) -> Result<()> {
    let spin = Duration::from_micros(session.general.spin_us);
    {
        let mut client = session.port(Mode::COMMON)?;
        latency(session, "port window, no-op", order.count.min(200), || {
            Ok(client.noop()?)
        })?;
    }
    if let Some(device) = &session.device {
        let mut sleeping = session.ring(device, Mode::COMMON, Duration::ZERO)?;
        latency(session, "ring, no-op, sleeping", order.count, || {
            Ok(sleeping.noop()?)
        })?;
        drop(sleeping);
        let mut client = session.ring(device, Mode::COMMON, spin)?;
        latency(session, "ring, no-op", order.count, || Ok(client.noop()?))?;
        let bytes = [0x5a; 64];
        latency(session, "ring, echo of 64 bytes", order.count, || {
            Ok(client.echo(&bytes).map(drop)?)
        })?;
        rate(session, &mut client, order.count.saturating_mul(10))?;
    }
    Ok(())
}

/// Submissions a second with a full ring.
fn rate(session: &Session, client: &mut Client, count: u32) -> Result<()> {
    let before = client.channel().counters();
    let started = Instant::now();
    let mut done = 0;
    let mut submitted = 0;
    let channel = client.channel();
    while done < count {
        while submitted < count && channel.in_flight() < channel.depth() {
            match channel.submit(Request::new(Opcode::NOOP)) {
                Ok(_) => submitted += 1,
                Err(vmgmt_driver::DriverError::Full(_)) => break,
                Err(error) => return Err(error.into()),
            }
        }
        channel.wait(None)?;
        while let Some(finished) = channel.reap()? {
            finished.ok()?;
            done += 1;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let after = channel.counters();
    figure(
        session,
        "ring, no-ops with a full ring",
        "/s",
        f64::from(count) / seconds,
        json!({"count": count, "doorbells": after.doorbells - before.doorbells, "sleeps": after.sleeps - before.sleeps}),
    )?;
    Ok(())
}
