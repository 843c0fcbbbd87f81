//! BAR2: the port window, 64 bytes of I/O ports. Every mode without DMA, without interrupts, without a driver.
//!
//! A program writes a [`crate::Submission`] and then its input bytes into DATA, writes COMMIT, polls STATUS until DONE,
//! and reads a [`crate::Completion`] and then the output bytes from DATA. Nothing waits: reading an empty FIFO gives 0 and sets
//! UNDERFLOW, writing a full one is dropped and sets OVERFLOW. A submission's `buffer` must be 0: its buffer
//! *is* the FIFO; `length` counts input and room for output, at most [`INPUT_BYTES_MAX`] + [`OUTPUT_BYTES_MAX`], the
//! input is what follows the submission in the FIFO, the output is cut at [`OUTPUT_BYTES_MAX`].

/// Size of BAR2 in bytes.
pub const BAR2_BYTES: usize = 64;

/// "VMGP", read at offset 0 of BAR2.
pub const PORT_MAGIC: u32 = 0x5047_4d56;

/// read: [`PORT_MAGIC`].
pub const MAGIC: u32 = 0x00;
/// read: [`crate::ABI_VERSION`].
pub const ABI_VERSION: u32 = 0x04;
/// read: who holds the window, 0: nobody. write V: takes the window when nobody holds it, gives it back (and empties
/// both FIFOs) when V holds it, is ignored else. So two programs tell themselves apart by values of their own.
pub const CLAIM: u32 = 0x08;
/// read/write: the [`crate::Mode`] of the window; a write is ignored while BUSY.
pub const MODE: u32 = 0x0c;
/// read: the bits below. write: clears the UNDERFLOW, OVERFLOW and ERROR bits that are set in the value.
pub const STATUS: u32 = 0x10;
/// read: bytes that DATA can give now.
pub const READABLE: u32 = 0x14;
/// read: bytes that DATA can take now.
pub const WRITABLE: u32 = 0x18;
/// read: session epoch (as `registers::GENERATION`).
pub const EPOCH: u32 = 0x1c;
/// The FIFOs: 1, 2 or 4 bytes an access.
pub const DATA: u32 = 0x20;
/// write: hands what was written to the core. Sets ERROR when fewer bytes than a submission are there or BUSY is set.
pub const COMMIT: u32 = 0x24;
/// write: empties both FIFOs; a submission under way is cancelled.
pub const ABORT: u32 = 0x28;
/// read: as `registers::STATE`.
pub const DEVICE_STATE: u32 = 0x2c;

/// A committed submission is not completed yet.
pub const STATUS_BUSY: u32 = 1 << 0;
/// The completion and its output can be read from DATA.
pub const STATUS_DONE: u32 = 1 << 1;
/// DATA was read while empty.
pub const STATUS_UNDERFLOW: u32 = 1 << 2;
/// DATA was written while full, or while BUSY.
pub const STATUS_OVERFLOW: u32 = 1 << 3;
/// COMMIT was refused.
pub const STATUS_ERROR: u32 = 1 << 4;

/// Most input bytes behind the submission.
pub const INPUT_BYTES_MAX: usize = 4096;
/// Most output bytes behind the completion.
pub const OUTPUT_BYTES_MAX: usize = 4096;
