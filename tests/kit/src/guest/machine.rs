//! A whole simulated VM: one connection, one device, as many rings as wanted.
//!
//! In: a socket's path and [`GuestOptions`]. Out: the driver's own types. It must never know what the server does with them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use vmgmt_driver::backing::{Backing, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY};
use vmgmt_driver::{Client as Channel, Device, Mode, PortChannel, Ring, RingOptions};

use super::backing::{GuestInterrupts, SocketBacking};
use super::memory::{GuestMemory, Sharing};
use crate::client::{Client, TIMEOUT};

/// What the machine is like.
#[derive(Clone, Copy, Debug)]
pub struct GuestOptions {
    /// Bytes of RAM, whole pages.
    pub ram_bytes: u64,
    pub sharing: Sharing,
    pub interrupts: GuestInterrupts,
    /// Buffers are scattered over pages and become lists.
    pub scattered: bool,
    /// Longest wait for an answer of the server.
    pub timeout: Duration,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            ram_bytes: 64 << 20,
            sharing: Sharing::Sealed,
            interrupts: GuestInterrupts::Msi(16),
            scattered: false,
            timeout: TIMEOUT,
        }
    }
}

impl GuestOptions {
    /// Spins instead of sleeping: no interrupts at all.
    #[must_use]
    pub fn spinning() -> Self {
        Self {
            interrupts: GuestInterrupts::None,
            ..Self::default()
        }
    }

    /// With so much RAM.
    #[must_use]
    pub const fn ram_bytes(mut self, bytes: u64) -> Self {
        self.ram_bytes = bytes;
        self
    }

    /// Shared in this way.
    #[must_use]
    pub const fn sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// With these interrupts.
    #[must_use]
    pub const fn interrupts(mut self, interrupts: GuestInterrupts) -> Self {
        self.interrupts = interrupts;
        self
    }

    /// With scattered buffers.
    #[must_use]
    pub const fn scattered(mut self) -> Self {
        self.scattered = true;
        self
    }
}

/// A guest's program with its device.
pub struct SimulatedVm {
    backing: Arc<SocketBacking>,
    device: Arc<Device>,
}

impl SimulatedVm {
    /// Connects as an ordinary VM does.
    pub fn connect(socket: impl AsRef<Path>) -> Result<Self> {
        Self::connect_with(socket, GuestOptions::default())
    }

    /// Connects as the options say.
    pub fn connect_with(socket: impl AsRef<Path>, options: GuestOptions) -> Result<Self> {
        let socket = socket.as_ref();
        let backing =
            Self::plug(socket, options).with_context(|| format!("connecting to {}", socket.display()))?;
        let device = Device::open(backing.clone())?;
        Ok(Self { backing, device })
    }

    /// Only the machine: connected, memory mapped, COMMAND set; no driver has touched the device yet.
    pub fn plug(socket: impl AsRef<Path>, options: GuestOptions) -> Result<Arc<SocketBacking>> {
        let mut client = Client::connect_ready(socket.as_ref())?;
        client.set_timeout(options.timeout);
        let memory = GuestMemory::new(options.ram_bytes, options.sharing, options.scattered)?;
        let backing = SocketBacking::new(client, memory, options.interrupts)?;
        backing.set_command(COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER, 0)?;
        Ok(backing)
    }

    /// The driver's device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The machine below it.
    pub fn backing(&self) -> &Arc<SocketBacking> {
        &self.backing
    }

    /// A ring in a mode.
    pub fn ring(&self, mode: Mode) -> Result<Channel> {
        self.ring_with(RingOptions::new(mode))
    }

    /// A ring as the options say.
    pub fn ring_with(&self, options: RingOptions) -> Result<Channel> {
        Ok(Channel::new(Ring::open(&self.device, options)?))
    }

    /// The port window in a mode.
    pub fn ports(&self, mode: Mode) -> Result<Channel> {
        let backing: Arc<dyn Backing> = self.backing.clone();
        Ok(Channel::new(PortChannel::open(&backing, mode, None)?))
    }
}
