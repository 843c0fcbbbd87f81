//! Tries a backing against any PCI function, without the contract: memory, its device addresses, interrupts, registers.
//!
//! `probe BDF auto|vfio|uio|ports`

use vmgmt_driver::backing::pci::PciFunction;
use vmgmt_driver::backing::{BackingKind, Width, open};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let function = PciFunction::at(&words.next().ok_or("usage: probe BDF auto|vfio|uio|ports")?)?;
    let kind = match words.next().as_deref() {
        Some("vfio") => BackingKind::Vfio,
        Some("uio") => BackingKind::Uio,
        Some("ports") => BackingKind::Ports,
        _ => BackingKind::Automatic,
    };
    let backing = open(&function, kind)?;
    println!("{} through {}", function.address(), backing.name());
    println!("COMMAND {:#x}", backing.config_read(4, Width::Two)?);
    if backing.has_registers() {
        println!("register 0: {:#010x}", backing.read32(0)?);
    }
    for bytes in [4096, 64 << 10, 4 << 20] {
        let memory = backing.allocate(bytes)?;
        memory.write(0, b"hello")?;
        println!(
            "{bytes} bytes: {} pieces, first {:x?}",
            memory.pieces().len(),
            memory.pieces().first()
        );
    }
    let interrupts = backing.set_up_interrupts(16)?;
    println!("{interrupts:?}");
    backing.take_interrupt(0)?;
    println!("reset: {}", backing.reset_function()?);
    println!("COMMAND {:#x}", backing.config_read(4, Width::Two)?);
    Ok(())
}
