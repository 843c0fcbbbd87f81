//! What QEMU and the guest's kernel driver do between a program and its device, over the raw client.
//!
//! In: register and configuration accesses, allocations, sleeps. Out: messages on the socket, in QEMU's manner: writes to BAR0 are
//! posted, all else waits; a dead connection reads all ones. It must never know rings and modes.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use vmgmt_driver::backing::{
    Backing, COMMAND_INTX_DISABLE, COMMAND_MASTER, CONFIG_COMMAND, InterruptKind, Interrupts, Width,
};
use vmgmt_driver::{DmaMemory, DriverError, Result};

use super::memory::GuestMemory;
use crate::client::{Client, ClientError, Mapping, eventfd, irq};
use crate::process::locked;

const BAR0: u32 = 0;
const BAR2: u32 = 2;
const CONFIG: u32 = 7;
/// STATUS of configuration space, and its bit "interrupt asserted" (PCI 3.0, 6.2.3).
const CONFIG_STATUS: u64 = 6;
const STATUS_INTERRUPT: u8 = 1 << 3;
/// Capability id of MSI (PCI 3.0, 6.8.1).
const CAPABILITY_MSI: u8 = 5;
/// Where QEMU's firmware lies: mapped readable and without a descriptor.
const FIRMWARE: (u64, u64) = (0xfffc_0000, 0x4_0000);

/// Interrupts that the guest's kernel enables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestInterrupts {
    /// None: the driver looks now and then (or spins).
    None,
    /// As `uio_pci_generic` does it.
    IntX,
    /// At most so many vectors, as `vfio-pci` does it.
    Msi(u32),
}

/// A device at the end of a socket.
pub struct SocketBacking {
    client: Arc<Mutex<Client>>,
    memory: Arc<GuestMemory>,
    wanted: GuestInterrupts,
    granted: Mutex<Vec<Arc<OwnedFd>>>,
    service: Option<Service>,
}

/// A thread that serves the server's DMA messages while the guest does something else, as QEMU's main loop does.
struct Service {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl SocketBacking {
    /// Takes over a connection on which VERSION is agreed: maps memory and firmware as QEMU does at realize.
    ///
    /// # Errors
    /// The server refused or is gone.
    pub fn new(
        mut client: Client,
        memory: Arc<GuestMemory>,
        wanted: GuestInterrupts,
    ) -> std::result::Result<Arc<Self>, ClientError> {
        let (base, bytes) = (memory.base(), memory.bytes());
        client.dma_map(Mapping {
            iova: base,
            bytes,
            flags: 3,
            memory: memory.descriptor().map(|descriptor| (descriptor, 0)),
        })?;
        client.dma_map(Mapping {
            iova: FIRMWARE.0,
            bytes: FIRMWARE.1,
            flags: 1,
            memory: None,
        })?;
        client.serve_memory(base, bytes, memory.ram(), 0);
        client.set_bus_master(false);
        let client = Arc::new(Mutex::new(client));
        let service = if memory.needs_messages() {
            Some(Service::start(&client)?)
        } else {
            None
        };
        Ok(Arc::new(Self {
            client,
            memory,
            wanted,
            granted: Mutex::default(),
            service,
        }))
    }

    /// The connection, for a test that wants to do more than a guest can.
    pub fn with_client<T>(&self, act: impl FnOnce(&mut Client) -> T) -> T {
        act(&mut locked(&self.client))
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Closes the connection at once, as a killed QEMU does. Every later access finds a dead device.
    pub fn vanish(&self) {
        self.with_client(|client| {
            // Already gone is gone.
            let _ = rustix::net::shutdown(client.socket(), rustix::net::Shutdown::Both);
        });
    }

    fn read(&self, region: u32, offset: u32, width: Width) -> Result<u32> {
        let bytes = width.bytes();
        match self.with_client(|client| client.region_read(region, offset.into(), bytes as u32)) {
            Ok(data) => {
                let mut word = [0; 4];
                if let (Some(target), Some(source)) = (word.get_mut(..bytes), data.get(..bytes)) {
                    target.copy_from_slice(source);
                }
                Ok(u32::from_le_bytes(word))
            }
            // QEMU answers so, once its own wait is over.
            Err(ClientError::Closed | ClientError::TimedOut(_)) => Ok(u32::MAX),
            Err(error) => Err(failed("reading a register", error)),
        }
    }

    fn write(&self, region: u32, offset: u32, width: Width, value: u32, posted: bool) -> Result<()> {
        let word = value.to_le_bytes();
        let data = word.get(..width.bytes()).unwrap_or(&word);
        let done = self.with_client(|client| match posted {
            true => client.region_write_posted(region, offset.into(), data),
            false => client.region_write(region, offset.into(), data),
        });
        match done {
            Ok(()) | Err(ClientError::Closed | ClientError::TimedOut(_)) => Ok(()),
            Err(error) => Err(failed("writing a register", error)),
        }
    }

    /// Sets MSI's enable bit and the number of vectors (a power of two), as the guest's kernel does before QEMU sends the eventfds.
    fn enable_msi(&self, vectors: u32) -> Result<()> {
        let mut at = self.config_read(0x34, Width::One)?;
        // A list in 256 bytes has at most 48 entries.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            if self.config_read(at, Width::One)? as u8 == CAPABILITY_MSI {
                let control = self.config_read(at + 2, Width::Two)?;
                let control = (control & !0x71) | (vectors.trailing_zeros() << 4) | 1;
                return self.config_write(at + 2, Width::Two, control);
            }
            at = self.config_read(at + 1, Width::One)?;
        }
        Err(DriverError::SetUp("the device has no MSI capability".into()))
    }

    fn assign(&self, index: u32, count: u32) -> Result<()> {
        let fds: std::result::Result<Vec<_>, _> = (0..count).map(|_| eventfd().map(Arc::new)).collect();
        let fds = fds.map_err(|error| failed("making an eventfd", error))?;
        self.with_client(|client| client.assign_irqs(index, 0, &fds))
            .map_err(|error| failed("SET_IRQS", error))?;
        *locked(&self.granted) = fds;
        Ok(())
    }

    /// `uio_pci_generic`'s handler and QEMU's end of interrupt, once for each signal: the line is masked by COMMAND bit 10, the register
    /// access that follows (the driver's acknowledge went before) makes QEMU send UNMASK, and the program clears bit 10.
    fn end_of_intx(&self) -> Result<()> {
        let asserted = self
            .with_client(|client| client.region_read(CONFIG, CONFIG_STATUS, 1))
            .map_err(|error| failed("reading STATUS", error))?;
        if asserted
            .first()
            .is_some_and(|status| status & STATUS_INTERRUPT != 0)
        {
            self.set_command(COMMAND_INTX_DISABLE, 0)?;
        }
        self.with_client(|client| client.set_irqs(irq::INTX, irq::DATA_NONE | irq::UNMASK, 0, 1, &[], &[]))
            .map_err(|error| failed("UNMASK", error))?;
        self.set_command(0, COMMAND_INTX_DISABLE)
    }
}

fn failed(what: &str, error: ClientError) -> DriverError {
    DriverError::system(what, std::io::Error::other(error))
}

impl Backing for SocketBacking {
    fn name(&self) -> &'static str {
        "socket"
    }

    fn has_registers(&self) -> bool {
        true
    }

    fn has_dma(&self) -> bool {
        true
    }

    fn read32(&self, offset: u32) -> Result<u32> {
        self.read(BAR0, offset, Width::Four)
    }

    fn write32(&self, offset: u32, value: u32) -> Result<()> {
        self.write(BAR0, offset, Width::Four, value, true)
    }

    fn port_read(&self, offset: u32, width: Width) -> Result<u32> {
        self.read(BAR2, offset, width)
    }

    fn port_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        self.write(BAR2, offset, width, value, false)
    }

    fn allocate(&self, bytes: usize) -> Result<DmaMemory> {
        self.memory.allocate(bytes)
    }

    fn set_up_interrupts(&self, vectors_wanted: u32) -> Result<Interrupts> {
        match self.wanted {
            GuestInterrupts::None => Ok(Interrupts::NONE),
            GuestInterrupts::IntX => {
                self.assign(irq::INTX, 1)?;
                Ok(Interrupts {
                    kind: InterruptKind::IntX,
                    vectors: 1,
                })
            }
            GuestInterrupts::Msi(most) => {
                let vectors = vectors_wanted.min(most).max(1);
                // A power of two, as the capability counts.
                let vectors = 1 << vectors.ilog2();
                self.with_client(|client| client.disable_irqs(irq::MSI))
                    .map_err(|error| failed("SET_IRQS", error))?;
                self.enable_msi(vectors)?;
                self.assign(irq::MSI, vectors)?;
                Ok(Interrupts {
                    kind: InterruptKind::Msi,
                    vectors,
                })
            }
        }
    }

    fn interrupt_descriptor(&self, vector: u32) -> Option<Arc<OwnedFd>> {
        let granted = locked(&self.granted);
        let count = granted.len().max(1);
        granted.get(vector as usize % count).cloned()
    }

    fn take_interrupt(&self, vector: u32) -> Result<()> {
        let Some(descriptor) = self.interrupt_descriptor(vector) else {
            return Ok(());
        };
        match rustix::io::read(&descriptor, &mut [0; 8]) {
            Ok(_) if self.wanted == GuestInterrupts::IntX => self.end_of_intx(),
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(DriverError::system("taking an interrupt", error)),
        }
    }

    fn config_read(&self, offset: u32, width: Width) -> Result<u32> {
        self.read(CONFIG, offset, width)
    }

    fn config_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        self.write(CONFIG, offset, width, value, false)?;
        if offset == CONFIG_COMMAND {
            self.with_client(|client| client.set_bus_master(value & COMMAND_MASTER != 0));
        }
        Ok(())
    }

    fn reset_function(&self) -> Result<bool> {
        self.with_client(|client| client.reset())
            .map(|()| true)
            .map_err(|error| failed("DEVICE_RESET", error))
    }
}

impl Service {
    fn start(client: &Arc<Mutex<Client>>) -> std::result::Result<Self, ClientError> {
        let stop = Arc::new(eventfd()?);
        let socket = rustix::io::fcntl_dupfd_cloexec(locked(client).socket(), 0)?;
        let (client, stopping) = (Arc::clone(client), Arc::clone(&stop));
        let serve = move || {
            loop {
                let mut set = [
                    PollFd::new(&socket, PollFlags::IN),
                    PollFd::new(&*stopping, PollFlags::IN),
                ];
                match poll(&mut set, None) {
                    Ok(_) if set.get(1).is_some_and(|stop| !stop.revents().is_empty()) => return,
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(_) => return,
                }
                // A dead connection is seen by the next access as well.
                if locked(&client).serve_pending().is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("guest-dma".into())
            .spawn(serve)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // An eventfd takes 2^64 - 2 of these.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for SocketBacking {
    fn drop(&mut self) {
        // The thread first: it holds the connection.
        self.service = None;
    }
}
