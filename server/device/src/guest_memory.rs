//! The trait through which a room reaches guest memory: copies in and out, never a reference.
//!
//! The shell implements it over `vmgmt-mem` (`host/`), tests and the simulator over memory that changes between reads.
//!
//! **Pending**: memory that is not shared is reached by messages to the VM's process, which take time. Such an
//! access answers [`MemoryError::Pending`] and has been asked for; the room keeps its state as it was and makes the same call
//! again (same address, same length) when the shell calls it again. A room must therefore change nothing before an access that may be
//! pending. Writes never answer Pending: they are queued in order; [`GuestMemory::settled`] answers it until all
//! queued writes are visible to the guest. (Signal an interrupt only then.)

/// What an address is going to be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The device reads guest memory.
    FromGuest,
    /// The device writes guest memory.
    IntoGuest,
}

/// Why guest memory could not be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MemoryError {
    /// Asked for by message; call again later.
    #[error("asked for, not there yet")]
    Pending,
    /// No DMA region covers all of it.
    #[error("guest address {iova:#x} is not mapped for the device")]
    Unmapped {
        /// First address that is not covered.
        iova: u64,
    },
    /// The region does not allow this direction.
    #[error("guest address {iova:#x} may not be accessed in this direction")]
    Denied {
        /// First address that is not allowed.
        iova: u64,
    },
    /// The memory behind the region is gone (its owner shrank or punched it), or its owner did not answer.
    #[error("the memory behind guest address {iova:#x} cannot be reached")]
    Gone {
        /// First address that failed, as far as it is known.
        iova: u64,
    },
    /// Bus mastering is off or the session is frozen: no DMA now.
    #[error("no DMA now: bus mastering is off, or the device is frozen or being reset")]
    Quiet,
}

/// Guest memory of one session. Addresses are guest physical addresses or IOVAs, as the VM maps them.
///
/// 32- and 64-bit accesses are naturally aligned (callers check that before) and never torn where memory is shared.
pub trait GuestMemory {
    /// Copies `into.len()` bytes out of guest memory.
    ///
    /// # Errors
    /// See [`MemoryError`]; nothing of `into` means anything then.
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies `from` into guest memory.
    ///
    /// # Errors
    /// See [`MemoryError`], never Pending; some of it may have been written.
    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError>;

    /// As [`GuestMemory::write`], into a buffer that a submission named. When such a write fails later (its owner refused the message), that is
    /// the matter of this submission alone: [`GuestMemory::settled`] does not tell, [`GuestMemory::take_refused`] does.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    fn write_buffer(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.write(iova, from)
    }

    /// Whether a write into a buffer failed within this range, since it was last written or this was last asked.
    fn take_refused(&mut self, _iova: u64, _bytes: u64) -> bool {
        false
    }

    /// Loads a word with acquire order.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError>;

    /// Stores a word with release order.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError>;

    /// Stores a word with release order.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError>;

    /// A sequentially consistent fence between what was stored before and what is loaded after.
    fn fence(&mut self);

    /// Whether all writes so far are visible to the guest.
    ///
    /// # Errors
    /// Pending while they are not; Gone when one (not into a buffer) failed since the last call that answered Ok.
    fn settled(&mut self) -> Result<(), MemoryError>;

    /// Forgets reads that were asked for and are Pending, answered or not: who still wants one asks again, and gets what is there then.
    fn forget_reads(&mut self) {}

    /// The same, of a range that is somebody else's from now on: whoever read there before may have given up, and nobody is to find that
    /// answer. What has not gone out yet may stay: its answer will be as new as anybody's.
    fn forget_reads_of(&mut self, _iova: u64, _bytes: u64) {}

    /// Drops what was written into a range and has not gone out: nobody expects it there any more.
    fn drop_writes(&mut self, _iova: u64, _bytes: u64) {}

    /// Whether what was written into a range is there, now that its ring or its device has ended and what waited was given up.
    ///
    /// # Errors
    /// Pending: that is not known yet.
    fn arrived(&mut self, _iova: u64, _bytes: u64) -> Result<bool, MemoryError> {
        Ok(true)
    }

    /// Nobody will ask [`GuestMemory::arrived`] about what was given up so far.
    fn forget_given_up(&mut self) {}

    /// Checks that a range is mapped for `direction`, without touching it.
    ///
    /// # Errors
    /// Unmapped, Denied or Quiet.
    fn check(&mut self, iova: u64, bytes: u64, direction: Direction) -> Result<(), MemoryError>;

    /// The highest number of a map that was seen so far. Numbers of maps grow and are never used again. 0: maps have none here.
    fn newest_map(&self) -> u64 {
        0
    }

    /// The highest number of the maps that a range lies in, as far as it is mapped. 0: none.
    fn newest_map_of(&mut self, _iova: u64, _bytes: u64) -> u64 {
        0
    }

    /// Whether the memory at `iova` has been proven to be shared, so that event words work there.
    fn is_shared(&mut self, iova: u64) -> bool;

    /// Proves (or disproves) that the memory at `iova` is shared: the 8 bytes there, read through the mapping, are compared with
    /// `nonce`; if they differ they are read by message. True: shared. False: reached by messages from now on.
    ///
    /// # Errors
    /// As [`GuestMemory::read`]; [`MemoryError::Gone`] when neither way gives the nonce.
    fn prove(&mut self, iova: u64, nonce: u64) -> Result<bool, MemoryError>;
}
