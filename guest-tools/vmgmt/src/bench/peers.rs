//! The same figures over other ways out of this VM: a directory of another file system (virtiofs), a character device (virtio-serial).
//! The device is not used here: these figures stand beside its own, from the same machine in the same minute.
//!
//! Comes in: a mounted directory, or a port. Goes out: MB/s and round trips under the same names as the device's.
//!
//! The protocol on the port: this side writes a head of two little-endian u64, what and how many bytes. [`SEND`]: the other
//! side sends so many bytes. [`TAKE`]: so many follow, and one byte comes back when all have arrived. [`ECHO`]: so many
//! follow and come back.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::files::{marker, temporary};
use super::{BenchOrder, figure, latency};
use crate::session::Session;

const SEND: u64 = 1;
const TAKE: u64 = 2;
const ECHO: u64 = 3;

/// One read or write: the size that file systems and ports like best here.
const PIECE_BYTES: usize = 1 << 20;
const PAGE_BYTES: usize = 4096;
const MESSAGE_BYTES: usize = 64;

/// A way to move one large file: gives something to read it from, and something to write it to.
trait Way {
    fn name(&self) -> &'static str;
    fn reader(&mut self, bytes: u64) -> Result<Box<dyn Read>>;
    fn writer(&mut self, bytes: u64) -> Result<Box<dyn Write>>;
    /// After the last byte was written: until the host has it.
    fn written(&mut self) -> Result<()>;
}

/// A file in a directory.
struct InDirectory<'a>(&'a Path);

impl InDirectory<'_> {
    fn path(&self) -> std::path::PathBuf {
        self.0.join(format!("vmgmt-bench-peer-{}", std::process::id()))
    }
}

impl Way for InDirectory<'_> {
    fn name(&self) -> &'static str {
        "directory"
    }

    fn reader(&mut self, _: u64) -> Result<Box<dyn Read>> {
        let path = self.path();
        Ok(Box::new(
            File::open(&path).with_context(|| path.display().to_string())?,
        ))
    }

    fn writer(&mut self, _: u64) -> Result<Box<dyn Write>> {
        let path = self.path();
        // A new file each time, as a put makes one.
        if path.exists() {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        Ok(Box::new(
            File::create(&path).with_context(|| path.display().to_string())?,
        ))
    }

    fn written(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A stream through a character device.
struct ThroughPort(File);

impl ThroughPort {
    fn head(&mut self, what: u64, bytes: u64) -> Result<()> {
        let mut head = [0; 16];
        head[..8].copy_from_slice(&what.to_le_bytes());
        head[8..].copy_from_slice(&bytes.to_le_bytes());
        self.0.write_all(&head).context("the port")
    }
}

impl Way for ThroughPort {
    fn name(&self) -> &'static str {
        "port"
    }

    fn reader(&mut self, bytes: u64) -> Result<Box<dyn Read>> {
        self.head(SEND, bytes)?;
        Ok(Box::new(self.0.try_clone().context("the port")?))
    }

    fn writer(&mut self, bytes: u64) -> Result<Box<dyn Write>> {
        self.head(TAKE, bytes)?;
        Ok(Box::new(self.0.try_clone().context("the port")?))
    }

    fn written(&mut self) -> Result<()> {
        self.0.read_exact(&mut [0]).context("the port")
    }
}

/// Another file system.
pub(super) fn directory(session: &Session, order: &BenchOrder<'_>, directory: &Path) -> Result<()> {
    let mut way = InDirectory(directory);
    let measured = files(session, order, &mut way, true);
    let path = way.path();
    if path.exists() {
        fs::remove_file(&path).with_context(|| path.display().to_string())?;
    }
    measured
}

/// A character device with the protocol above at its other end.
pub(super) fn port(session: &Session, order: &BenchOrder<'_>, path: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| path.display().to_string())?;
    let mut way = ThroughPort(file);
    let message = [0x5a; MESSAGE_BYTES];
    latency(session, "port: message round trip with host", order.count, || {
        way.head(ECHO, MESSAGE_BYTES as u64)?;
        way.0.write_all(&message).context("the port")?;
        let mut answer = [0; MESSAGE_BYTES];
        way.0.read_exact(&mut answer).context("the port")?;
        ensure!(answer == message, "the port's answer is another one");
        Ok(())
    })?;
    files(session, order, &mut way, false)
}

/// `keeps`: what was written is what is read afterwards.
fn files(session: &Session, order: &BenchOrder<'_>, way: &mut dyn Way, keeps: bool) -> Result<()> {
    let bytes = u64::from(order.mib) << 20;
    let size = usize::try_from(bytes).context("--mib")?;
    let name = way.name();
    let told = |what: &str, started: Instant| {
        let speed = bytes as f64 / 1e6 / started.elapsed().as_secs_f64();
        figure(
            session,
            &format!("{name}: {what}"),
            "MB/s",
            speed,
            json!({"mib": order.mib, "piece_kib": PIECE_BYTES >> 10}),
        )
    };

    // Touched, so that no page has to be made while it is measured.
    let mut memory = vec![0_u8; size];
    for (index, page) in memory.chunks_mut(PAGE_BYTES).enumerate() {
        if let Some(word) = page.first_chunk_mut() {
            *word = marker(index * PAGE_BYTES).to_le_bytes();
        }
    }
    let started = Instant::now();
    let mut writer = way.writer(bytes)?;
    for piece in memory.chunks(PIECE_BYTES) {
        writer.write_all(piece).context(name)?;
    }
    drop(writer);
    way.written()?;
    told("put from memory", started)?;

    for page in memory.chunks_mut(PAGE_BYTES) {
        if let Some(word) = page.first_chunk_mut() {
            *word = [0_u8; 8];
        }
    }
    let started = Instant::now();
    let mut reader = way.reader(bytes)?;
    for piece in memory.chunks_mut(PIECE_BYTES) {
        reader.read_exact(piece).context(name)?;
    }
    told("get to memory", started)?;
    let same = memory
        .chunks(PAGE_BYTES)
        .enumerate()
        .all(|(index, page)| page.first_chunk() == Some(&marker(index * PAGE_BYTES).to_le_bytes()));
    ensure!(same || !keeps, "what came back is not what was written");
    drop(memory);

    let mut piece = vec![0_u8; PIECE_BYTES];
    let started = Instant::now();
    let mut reader = way.reader(bytes)?;
    copy(&mut *reader, &mut std::io::sink(), bytes, &mut piece).context(name)?;
    told("get to nowhere", started)?;

    let mut target = temporary(order.tmpfs)?;
    let started = Instant::now();
    let mut reader = way.reader(bytes)?;
    copy(&mut *reader, &mut target, bytes, &mut piece).context(name)?;
    told("get to tmpfs", started)?;

    target.rewind().context("tmpfs")?;
    let started = Instant::now();
    let mut writer = way.writer(bytes)?;
    copy(&mut target, &mut *writer, bytes, &mut piece).context(name)?;
    drop(writer);
    way.written()?;
    told("put from tmpfs", started)?;
    Ok(())
}

/// Copies so many bytes through `piece`, never more: a port has no end.
fn copy(
    source: &mut dyn Read,
    target: &mut dyn Write,
    mut bytes: u64,
    piece: &mut [u8],
) -> std::io::Result<()> {
    while bytes > 0 {
        let most = piece.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        let room = piece.get_mut(..most).unwrap_or_default();
        let got = source.read(room)?;
        if got == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        target.write_all(room.get(..got).unwrap_or_default())?;
        bytes -= got as u64;
    }
    Ok(())
}
