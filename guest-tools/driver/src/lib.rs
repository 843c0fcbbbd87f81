//! The guest's driver for a vmgmt device, as a library for programs in the VM.
//!
//! ```text
//!  operations/, transfer   files, messages, streams: typed                 }
//!  client                  calls and answers by tag                        } over any channel
//!  ring | port             submissions and completions                     }
//!  device                  identity, state, interrupts, sleep
//!  backing/                vfio, uio, ports, or an in-process device of yours
//!  memory                  the bytes the device shares with us: atomics only
//! ```
//!
//! `unsafe` lives in `memory` and in the backings. Nothing that the device or a peer wrote is used before it is bounded: a
//! device that breaks the contract ends as an error that says so.
//!
//! ```no_run
//! use vmgmt_driver::backing::{BackingKind, open, pci::{DeviceLock, PciFunction}};
//! use vmgmt_driver::{Client, Device, Mode, Ring, RingOptions};
//!
//! # fn main() -> vmgmt_driver::Result<()> {
//! let function = PciFunction::find(vmgmt_abi::PCI_VENDOR, vmgmt_abi::PCI_DEVICE)?;
//! let _lock = DeviceLock::take(&function, std::time::Duration::ZERO)?;
//! let device = Device::open(open(&function, BackingKind::Automatic)?)?;
//! let mut files = Client::new(Ring::open(&device, RingOptions::new(Mode::FILE))?);
//! for share in files.shares()? {
//!     println!("{} ({})", share.name, if share.writable { "read and write" } else { "read only" });
//! }
//! # Ok(())
//! # }
//! ```

pub mod backing;
pub mod channel;
pub mod client;
pub mod device;
pub mod error;
pub mod limits;
pub mod list;
#[allow(unsafe_code)]
pub mod memory;
pub mod operations;
pub mod order;
pub mod port;
mod records;
pub mod ring;
pub mod tags;
pub mod transfer;

pub use channel::{Channel, Finished, Request};
pub use client::Client;
pub use device::Device;
pub use error::{DriverError, Refusal, Result};
pub use memory::{Buffer, DmaMemory, Piece};
pub use port::PortChannel;
pub use ring::{Ring, RingOptions};
pub use transfer::{TransferOptions, Transferred};
pub use vmgmt_abi as abi;
pub use vmgmt_abi::{Mode, Opcode, Status};
