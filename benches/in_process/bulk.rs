//! How much: host file -> guest memory and back against plain system calls, and VM -> VM against a copy in memory. All in the same
//! run, alternating, over the same memory and the same file.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vmgmt_driver::transfer::{Discard, Source};
use vmgmt_driver::{DmaMemory, Mode, Status, TransferOptions};
use vmgmt_mem::{GuestMapping, copy_guest};
use vmgmt_testkit::guest::GuestOptions;

use super::{Figures, median, rate, site};

const BYTES: usize = 128 << 20;
const PIECE: usize = 1 << 20;
const RUNS: usize = 5;
const OPTIONS: TransferOptions = TransferOptions {
    chunk_bytes: PIECE,
    chunks_in_flight: 8,
    check: false,
};

fn speed(start: Instant) -> f64 {
    BYTES as f64 / 1e6 / start.elapsed().as_secs_f64()
}

/// In pieces of 1 MiB, beside plain system calls.
pub fn files(figures: &mut Figures) -> Result<()> {
    figures.title("Files: 128 MiB in the page cache, 1 MiB submissions, guest polls");
    files_in(figures, "", PIECE)
}

/// In the smallest pieces that a transfer is made of.
pub fn files_in_small_pieces(figures: &mut Figures) -> Result<()> {
    figures.title("Files: 128 MiB in the page cache, 64 KiB submissions, guest polls");
    files_in(figures, "_64k", 64 << 10)
}

fn files_in(figures: &mut Figures, suffix: &str, piece_bytes: usize) -> Result<()> {
    let transfer = TransferOptions {
        chunk_bytes: piece_bytes,
        ..OPTIONS
    };
    let site = site(1)?;
    let path = site.share().join("bench");
    let pattern: Vec<u8> = (0..BYTES as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    std::fs::write(&path, &pattern)?;
    let vm = site.vm_with(
        0,
        GuestOptions::spinning().ram_bytes(2 * BYTES as u64 + (16 << 20)),
    )?;
    let mut files = rate::spinning(&vm, Mode::FILE, 64)?;
    let memory = files.allocate(BYTES)?;
    let opened = files.open_for_reading("work/bench")?;
    let mut local = File::open(&path)?;
    let mut ours = Vec::new();
    let mut plain = Vec::new();
    for _ in 0..RUNS {
        let start = Instant::now();
        let done = files.get_into(opened.handle, &memory, BYTES, &transfer)?;
        ours.push(speed(start));
        ensure!(done.bytes == BYTES as u64);
        local.seek(SeekFrom::Start(0))?;
        let start = Instant::now();
        for piece in 0..BYTES / piece_bytes {
            ensure!(memory.read_from(local.as_fd(), piece * piece_bytes, piece_bytes)? == piece_bytes);
        }
        plain.push(speed(start));
    }
    ensure!(memory.to_vec(BYTES - 4096, 4096)? == pattern.get(BYTES - 4096..).context("slice")?);
    report(
        figures,
        &format!("host_to_guest{suffix}"),
        "host file -> guest memory",
        "read(2) into the same memory",
        ours,
        plain,
    );

    for check in [false, true] {
        let (mut ours, mut plain) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let how = TransferOptions { check, ..transfer }.put_bits();
            let put = files.put(
                "work/back",
                BYTES as u64,
                vmgmt_abi::file::existing::REPLACE | how,
            )?;
            let start = Instant::now();
            // The host's checksum is what is measured, not this program's, which in a VM has a processor of its own.
            let done = files.write_from(put.handle, &memory, BYTES, &transfer)?;
            ours.push(speed(start));
            ensure!(done.bytes == BYTES as u64);
            files.close(put.handle)?;
            let file = File::create(site.share().join("plain"))?;
            let mut hasher = crc32fast::Hasher::new();
            let start = Instant::now();
            for piece in 0..BYTES / piece_bytes {
                let from = piece * piece_bytes;
                ensure!(memory.write_to(file.as_fd(), from, piece_bytes)? == piece_bytes);
                if check {
                    memory.checksum(from, piece_bytes, &mut hasher)?;
                }
            }
            plain.push(speed(start));
            std::hint::black_box(hasher.finalize());
            std::fs::remove_file(site.share().join("plain"))?;
        }
        let (key, words, against) = if check {
            (
                "guest_to_host_crc32",
                "guest memory -> new host file, crc32 of what the file holds",
                "write(2) of the same memory, and crc32 of it",
            )
        } else {
            (
                "guest_to_host",
                "guest memory -> new host file",
                "write(2) of the same memory",
            )
        };
        report(figures, &format!("{key}{suffix}"), words, against, ours, plain);
    }
    Ok(())
}

fn report(figures: &mut Figures, key: &str, words: &str, against: &str, ours: Vec<f64>, plain: Vec<f64>) {
    let (ours, plain) = (median(ours), median(plain));
    figures.add(&format!("{key}_mb_per_second"), ours, "MB/s", words);
    figures.add(&format!("{key}_plain_mb_per_second"), plain, "MB/s", against);
    figures.add(
        &format!("{key}_ratio"),
        ours / plain,
        "of plain",
        format!("{words}: ratio"),
    );
}

/// Bytes that are in memory already.
struct Ready(usize);

impl Source for Ready {
    fn fill(&mut self, _memory: &DmaMemory, _start: usize, length: usize) -> vmgmt_driver::Result<usize> {
        let bytes = length.min(self.0);
        self.0 -= bytes;
        Ok(bytes)
    }
}

pub fn streams(figures: &mut Figures) -> Result<()> {
    figures.title("Streams: 128 MiB from VM to VM, 1 MiB submissions");
    let site = site(2)?;
    // Three parties on few processors: guests that slept would be woken; guests that spin would take turns.
    let options = GuestOptions::default();
    let (source, target) = (site.vm_with(0, options)?, site.vm_with(1, options)?);
    let patience = Some(Duration::from_secs(10));
    let mut receiver = target.ring(Mode::FILE)?;
    let mut sender = source.ring(Mode::FILE)?;
    let mut speeds = Vec::new();
    // Once more than is counted: in the first run both guests' kernels would be asked for the buffers' pages.
    for run in 0..=RUNS {
        let (speed, received) = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let posted = receiver.post_next_offer()?;
                let offer = receiver.next_offer(posted, None)?.context("no offer")?;
                let stream = receiver.accept(offer.handle)?;
                let (done, _) = receiver.stream_receive(stream, &mut Discard, &OPTIONS, &mut |_| {})?;
                receiver.stream_confirm(stream, Status::OK)?;
                Ok::<_, anyhow::Error>(done.bytes)
            });
            let stream = sender.offer("vm1", "bench", Some(BYTES as u64), 0, patience)?;
            let start = Instant::now();
            sender.stream_send(stream, &mut Ready(BYTES), &OPTIONS, &mut |_| {})?;
            let speed = speed(start);
            let received = receiving
                .join()
                .map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
            Ok::<_, anyhow::Error>((speed, received))
        })?;
        ensure!(received == BYTES as u64);
        if run > 0 {
            speeds.push(speed);
        }
    }
    // The same amount in pieces of the same size, from a buffer of as many pieces as are in flight into another such.
    let window = OPTIONS.chunk_bytes * OPTIONS.chunks_in_flight;
    let (from, mut into) = (vec![1_u8; window], vec![0_u8; window]);
    let copies = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..BYTES / window {
                for (target, source) in into.chunks_mut(PIECE).zip(from.chunks(PIECE)) {
                    target.copy_from_slice(source);
                }
                std::hint::black_box(&mut into);
            }
            speed(start)
        })
        .collect();
    report(
        figures,
        "vm_to_vm",
        "VM memory -> VM memory",
        "copies of 1 MiB between two buffers of 8 MiB, which stay in the cache",
        speeds.clone(),
        copies,
    );
    // The limit of a machine for data that was not touched just now: all of it, between memory of the guests' kind.
    let (from, into) = (guest_memory()?, guest_memory()?);
    let copies = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            for at in (0..BYTES).step_by(PIECE) {
                copy_guest(&into.slice(at, PIECE)?, &from.slice(at, PIECE)?)?;
            }
            Ok(speed(start))
        })
        .collect::<Result<_>>()?;
    let (ours, plain) = (median(speeds), median(copies));
    figures.add(
        "vm_to_vm_uncached_plain_mb_per_second",
        plain,
        "MB/s",
        "one copy of 128 MiB between two memories of the guests' kind",
    );
    figures.add(
        "vm_to_vm_uncached_ratio",
        ours / plain,
        "of plain",
        "VM memory -> VM memory: ratio to that",
    );
    Ok(())
}

/// Memory of a guest's kind, all of it touched.
fn guest_memory() -> Result<GuestMapping> {
    let object = memfd_create("bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&object, BYTES as u64)?;
    fcntl_add_seals(&object, SealFlags::SHRINK)?;
    let mapping = GuestMapping::map(&object, 0, BYTES, true)?;
    for at in (0..BYTES).step_by(PIECE) {
        mapping.write(at, &vec![1; PIECE])?;
    }
    Ok(mapping)
}
