//! Reads a file of a share straight into this program's memory, and says how fast that was.
//!
//! `cargo run -p vmgmt-driver --example get -- SHARE/path`

use std::time::{Duration, Instant};

use vmgmt_driver::backing::pci::{DeviceLock, PciFunction};
use vmgmt_driver::backing::{BackingKind, open};
use vmgmt_driver::{Client, Device, Mode, Ring, RingOptions, TransferOptions, abi};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: get SHARE/path")?;
    let function = PciFunction::find(abi::PCI_VENDOR, abi::PCI_DEVICE)?;
    let _lock = DeviceLock::take(&function, Duration::ZERO)?;
    let device = Device::open(open(&function, BackingKind::Automatic)?)?;
    let mut files = Client::new(Ring::open(&device, RingOptions::new(Mode::FILE))?);
    let started = Instant::now();
    let (memory, done) = files.get_to_memory(&path, &TransferOptions::default())?;
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{path}: {} bytes in {seconds:.3} s, crc32 {:08x}",
        done.bytes,
        done.checksum.unwrap_or_default()
    );
    println!(
        "first bytes: {:02x?}",
        memory.to_vec(0, 16.min(done.bytes as usize))?
    );
    Ok(())
}
