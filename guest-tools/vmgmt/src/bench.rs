//! `vmgmt bench`: figures, one JSON document each with `--json`. Every figure is measured on the real device.

use std::fs::OpenOptions;
use std::io::Seek;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use vmgmt_driver::abi::file::existing;
use vmgmt_driver::channel::Request;
use vmgmt_driver::transfer::{Descriptor, Discard};
use vmgmt_driver::{Client, Mode, Opcode};

use crate::session::Session;

/// What is measured, how often, and with what.
pub struct BenchOrder<'a> {
    pub share: Option<&'a str>,
    pub mib: u32,
    pub count: u32,
    pub tmpfs: &'a Path,
}

fn figure(session: &Session, name: &str, unit: &str, value: f64, more: serde_json::Value) {
    if session.general.json {
        println!(
            "{}",
            json!({"figure": name, "value": value, "unit": unit, "detail": more})
        );
    } else {
        let more = more.as_object().map_or_else(String::new, |more| {
            more.iter()
                .map(|(key, value)| format!(" {key}={value}"))
                .collect::<String>()
        });
        println!("{name:<34} {value:>12.1} {unit}{more}");
    }
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
    );
    Ok(())
}

/// Measures everything.
pub fn bench(session: &Session, order: &BenchOrder<'_>) -> Result<()> {
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
    match order.share {
        Some(share) => files(session, order, share),
        None => Ok(()),
    }
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
    );
    Ok(())
}

/// Get and put, to memory, to nowhere and to a file in memory.
fn files(session: &Session, order: &BenchOrder<'_>, share: &str) -> Result<()> {
    let bytes = u64::from(order.mib) << 20;
    let path = format!(
        "{}/vmgmt-bench-{}",
        share.trim_end_matches('/'),
        std::process::id()
    );
    let mut client = session.client(Mode::FILE)?;
    let measured = measure_files(session, order, &mut client, &path, bytes);
    // Also when a figure failed.
    let removed = client.remove(&path);
    measured?;
    removed.context(path)
}

fn measure_files(
    session: &Session,
    order: &BenchOrder<'_>,
    client: &mut Client,
    path: &str,
    bytes: u64,
) -> Result<()> {
    let size = usize::try_from(bytes).context("--mib")?;
    let megabytes = bytes as f64 / 1e6;
    let detail =
        json!({"mib": order.mib, "depth": session.general.depth, "chunk_kib": session.general.chunk_kib});
    let told = |name: &str, started: Instant| {
        figure(
            session,
            name,
            "MB/s",
            megabytes / started.elapsed().as_secs_f64(),
            detail.clone(),
        );
    };
    for check in [true, false] {
        let options = session.transfer(check);
        let how = if check { "with crc32" } else { "no check" };
        let memory = client.allocate(size)?;
        for start in (0..size).step_by(4096) {
            memory.store64(start, start as u64 ^ 0x9e37_79b9_7f4a_7c15)?;
        }
        let started = Instant::now();
        client.put_from_memory(path, &memory, size, existing::REPLACE, &options)?;
        told(&format!("put from memory, {how}"), started);
        drop(memory);
        let started = Instant::now();
        let (memory, done) = client.get_to_memory(path, &options)?;
        told(&format!("get to memory, {how}"), started);
        let last = (size - 1) / 4096 * 4096;
        let right = memory.load64(last)? == last as u64 ^ 0x9e37_79b9_7f4a_7c15;
        anyhow::ensure!(done.bytes == bytes && right, "what came back is not what was put");
        drop(memory);

        let file = client.open_for_reading(path)?;
        let started = Instant::now();
        client.get(file.handle, 0, file.size, &mut Discard, &options, &mut |_| {})?;
        told(&format!("get to nowhere, {how}"), started);

        let local = order.tmpfs.join(format!("vmgmt-bench-{}", std::process::id()));
        let shown = local.display().to_string();
        let mut target = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&local)
            .with_context(|| shown.clone())?;
        // It lives as long as it is open.
        std::fs::remove_file(&local).with_context(|| shown.clone())?;
        let started = Instant::now();
        client.get(
            file.handle,
            0,
            file.size,
            &mut Descriptor::new(target.as_fd(), &shown),
            &options,
            &mut |_| {},
        )?;
        told(&format!("get to tmpfs, {how}"), started);
        client.close(file.handle)?;

        target.rewind().with_context(|| shown.clone())?;
        let started = Instant::now();
        let put = client.put(path, bytes, existing::REPLACE)?;
        let done = client.write_all(
            put.handle,
            None,
            &mut Descriptor::new(target.as_fd(), &shown),
            &options,
            &mut |_| {},
        )?;
        client.commit(put.handle, done.bytes, done.checksum, false)?;
        told(&format!("put from tmpfs, {how}"), started);
    }
    Ok(())
}
