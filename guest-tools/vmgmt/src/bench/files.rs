//! Get and put of one large file: to and from the program's memory, to nowhere, to and from a file in memory.
//!
//! Comes in: a share that may be written. Goes out: MB/s with and without checksum. What came back is compared with what was put.

use std::fs::{File, OpenOptions};
use std::io::Seek;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vmgmt_driver::abi::file::existing;
use vmgmt_driver::transfer::{Descriptor, Discard};
use vmgmt_driver::{Client, Mode};

use super::{BenchOrder, figure};
use crate::session::Session;

/// One word in each page says where it belongs.
const PAGE_BYTES: usize = 4096;

/// What stands at the start of the page at `place`.
pub(super) const fn marker(place: usize) -> u64 {
    place as u64 ^ 0x9e37_79b9_7f4a_7c15
}

/// A file in memory that lives as long as it is open.
pub(super) fn temporary(tmpfs: &Path) -> Result<File> {
    let path = tmpfs.join(format!("vmgmt-bench-{}", std::process::id()));
    let shown = || path.display().to_string();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(shown)?;
    std::fs::remove_file(&path).with_context(shown)?;
    Ok(file)
}

/// Everything about files.
pub(super) fn files(session: &Session, order: &BenchOrder<'_>, share: &str) -> Result<()> {
    let bytes = u64::from(order.mib) << 20;
    let path = format!(
        "{}/vmgmt-bench-{}",
        share.trim_end_matches('/'),
        std::process::id()
    );
    let mut client = session.client(Mode::FILE)?;
    let measured = (0..order.repeat).try_for_each(|_| measure(session, order, &mut client, &path, bytes));
    // Also when a figure failed.
    let removed = client.remove(&path);
    measured?;
    removed.context(path)
}

fn measure(
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
        )
    };
    let checks: &[bool] = if order.memory_only {
        &[false]
    } else {
        &[true, false]
    };
    for check in checks.iter().copied() {
        let options = session.transfer(check);
        let how = if check { "with crc32" } else { "no check" };
        // Memory that the program has, as a program would: making it is not part of the transfer.
        let memory = client.allocate(size)?;
        for place in (0..size).step_by(PAGE_BYTES) {
            memory.store64(place, marker(place))?;
        }
        let started = Instant::now();
        client.put_from_memory(path, &memory, size, existing::REPLACE, &options)?;
        told(&format!("put from memory, {how}"), started)?;

        for place in (0..size).step_by(PAGE_BYTES) {
            memory.store64(place, 0)?;
        }
        let started = Instant::now();
        let file = client.open_for_reading(path)?;
        let done = client.get_into(file.handle, &memory, size, &options)?;
        client.verify(file.handle, path, done)?;
        told(&format!("get to memory, {how}"), started)?;
        for place in (0..size).step_by(PAGE_BYTES) {
            ensure!(
                memory.load64(place)? == marker(place),
                "byte {place} is not what was put"
            );
        }
        drop(memory);
        if order.memory_only {
            client.close(file.handle)?;
            continue;
        }

        let started = Instant::now();
        client.get(file.handle, 0, file.size, &mut Discard, &options, &mut |_| {})?;
        told(&format!("get to nowhere, {how}"), started)?;

        let mut target = temporary(order.tmpfs)?;
        let shown = order.tmpfs.display().to_string();
        let started = Instant::now();
        client.get(
            file.handle,
            0,
            file.size,
            &mut Descriptor::new(target.as_fd(), &shown),
            &options,
            &mut |_| {},
        )?;
        told(&format!("get to tmpfs, {how}"), started)?;
        client.close(file.handle)?;

        target.rewind().context(shown.clone())?;
        let started = Instant::now();
        let put = client.put(path, bytes, existing::REPLACE | options.put_bits())?;
        let done = client.write_all(
            put.handle,
            None,
            &mut Descriptor::new(target.as_fd(), &shown),
            &options,
            &mut |_| {},
        )?;
        client.commit(put.handle, done.bytes, done.checksum, false)?;
        told(&format!("put from tmpfs, {how}"), started)?;
        ensure!(
            done.bytes == bytes,
            "{} bytes went back instead of {bytes}",
            done.bytes
        );
    }
    Ok(())
}
