//! What guest memory costs the core: small accesses in nanoseconds, copies in gigabytes a second. Run it with `--release`.

#![allow(clippy::unwrap_used)]

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::hint::black_box;
use std::time::Instant;
use vmgmt_device::page::{CorePage, FrontPage, MapRecord, control};
use vmgmt_device::{Direction, GuestMemory, Tick};
use vmgmt_host::core::memory::{MemoryLimits, SessionMemory};
use vmgmt_host::words::{MappedWords, create_page};

const RAM: u64 = 256 << 20;
const NONCE: u64 = 0x0102_0304_0506_0708;

fn session(sealed: bool, map_bytes: u64) -> (SessionMemory, OwnedFd) {
    let maps = (RAM / map_bytes) as usize;
    let (front, view) = create_page("front", FrontPage::<MappedWords>::words_needed(maps)).unwrap();
    let (core, _) = create_page("core", CorePage::<MappedWords>::WORDS).unwrap();
    let front = FrontPage::new(MappedWords::writable(front).unwrap());
    let view = FrontPage::new(MappedWords::read_only(view).unwrap());
    let core = CorePage::new(MappedWords::writable(core).unwrap());
    front.init(1, 1);
    front.set_control(control::BUS_MASTER);
    let limits = MemoryLimits {
        mapped_bytes_max: 1 << 40,
        objects_max: 1,
    };
    let mut memory = SessionMemory::new(1, view, core, limits);
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, RAM).unwrap();
    if sealed {
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    }
    memory.object(1, rustix::io::dup(fd.as_fd()).unwrap(), true);
    for slot in 0..maps as u64 {
        let (iova, offset) = (slot * map_bytes, slot * map_bytes);
        let record = MapRecord {
            number: slot + 1,
            iova,
            bytes: map_bytes,
            object: 1,
            offset,
            rights: 3,
        };
        front.set_map(slot as usize, Some(&record));
    }
    memory.drained();
    rustix::io::pwrite(&fd, &NONCE.to_le_bytes(), 0).unwrap();
    memory.begin_dma(Tick(1));
    assert_eq!(memory.prove(0, NONCE), Ok(true));
    memory.drained();
    (memory, fd)
}

fn each(name: &str, rounds: u64, mut work: impl FnMut(u64)) {
    (0..rounds / 10).for_each(&mut work);
    let start = Instant::now();
    (0..rounds).for_each(&mut work);
    println!(
        "{name:<66} {:>9.1} ns",
        start.elapsed().as_nanos() as f64 / rounds as f64
    );
}

fn speed(name: &str, bytes: usize, rounds: u64, mut work: impl FnMut(u64)) {
    (0..rounds).for_each(&mut work);
    let start = Instant::now();
    (0..rounds).for_each(&mut work);
    let bytes = bytes as f64 * rounds as f64;
    println!(
        "{name:<66} {:>9.2} GB/s",
        bytes / start.elapsed().as_nanos() as f64
    );
}

fn main() {
    for (sealed, map_bytes, name, rounds) in [
        (true, RAM, "sealed, one map", 10_000_000u64),
        (true, 4096, "sealed, 65,536 maps of 4 KiB", 2_000_000),
        (false, RAM, "not sealed, one map", 300_000),
    ] {
        let (mut memory, _fd) = session(sealed, map_bytes);
        // Another page each time; with 4 KiB maps the cache of look-ups misses always.
        let spread = |n: u64| (n.wrapping_mul(4096 * 97 + 64) % (RAM - 8192)) & !63;
        each(&format!("{name}: load_u32, same page"), rounds, |n| {
            black_box(memory.load_u32((n & 63) * 64)).unwrap();
        });
        each(&format!("{name}: store_u64, same page"), rounds, |n| {
            memory.store_u64((n & 63) * 64, n).unwrap()
        });
        let mut entry = [0; 64];
        each(&format!("{name}: read 64 bytes, same page"), rounds, |n| {
            memory.read((n & 63) * 64, &mut entry).unwrap();
            black_box(&entry);
        });
        each(&format!("{name}: load_u32, any page"), rounds / 10, |n| {
            black_box(memory.load_u32(spread(n))).unwrap();
        });
        each(&format!("{name}: empty turn"), rounds / 10, |_| {
            memory.end_dma(Tick(1));
            memory.begin_dma(Tick(1));
        });
        each(&format!("{name}: resolve and drop 64 KiB"), rounds / 100, |n| {
            black_box(memory.resolve(&[((n & 63) << 16, 1 << 16)], Direction::IntoGuest)).unwrap();
        });
        let from = memory.resolve(&[(0, 64 << 20)], Direction::FromGuest).unwrap();
        let into = memory
            .resolve(&[(128 << 20, 64 << 20)], Direction::IntoGuest)
            .unwrap();
        let mut buffer = vec![0; 1 << 20];
        for bytes in [4096, 65_536, 1 << 20] {
            let at = |n: u64| (n * bytes as u64) % (32 << 20);
            let rounds = (1 << 29) / bytes as u64;
            speed(&format!("{name}: copy out, {bytes} bytes"), bytes, rounds, |n| {
                from.read_bytes(at(n), &mut buffer[..bytes]).unwrap();
            });
            speed(&format!("{name}: copy in, {bytes} bytes"), bytes, rounds, |n| {
                into.write_bytes(at(n), &buffer[..bytes]).unwrap();
            });
            speed(
                &format!("{name}: copy VM to VM, {bytes} bytes"),
                bytes,
                rounds,
                |n| {
                    into.copy_from(at(n), &from, at(n), bytes).unwrap();
                },
            );
        }
    }
    let (source, mut target) = (vec![1u8; 32 << 20], vec![0u8; 1 << 20]);
    speed(
        "for comparison: memcpy of private memory, 1 MiB",
        1 << 20,
        512,
        |n| {
            let at = ((n & 31) << 20) as usize;
            target.copy_from_slice(black_box(&source[at..at + (1 << 20)]));
            black_box(&mut target);
        },
    );
}
