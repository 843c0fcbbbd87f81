//! BAR0's map: an offset becomes a register id once; what the register does is decided elsewhere.
//!
//! In: an offset. Out: a [`Register`]. Must never know: a value.

use vmgmt_abi::registers as abi;

/// A 32-bit register of BAR0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Register {
    Magic,
    AbiVersion,
    Features(Half),
    FeaturesAck(Half),
    State,
    FailCause,
    Control,
    RingCount,
    RingEntriesMax,
    Vectors,
    CoreLife(Half),
    Session(Half),
    Generation,
    TransferBytesMax,
    ListEntriesMax,
    BadAccesses,
    InterruptPending,
    InterruptEnable,
    InterruptAck,
    HostPage(Half),
    /// A register of a ring; the ring may be beyond those that the device has.
    Ring(usize, RingRegister),
    /// The doorbell of a ring; likewise.
    Doorbell(usize),
}

/// Which half of a 64-bit value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Half {
    Low,
    High,
}

/// A register in a ring's block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingRegister {
    Submissions(Half),
    Completions(Half),
    Events(Half),
    SubmissionEntries,
    CompletionEntries,
    Mode,
    Vector,
    Nonce(Half),
    Enable,
    Status,
    Epoch,
}

impl Register {
    /// The register at a 4-byte aligned offset.
    pub const fn decode(offset: u32) -> Option<Self> {
        use Half::{High, Low};
        Some(match offset {
            abi::MAGIC => Self::Magic,
            abi::ABI_VERSION => Self::AbiVersion,
            abi::FEATURES_LOW => Self::Features(Low),
            abi::FEATURES_HIGH => Self::Features(High),
            abi::FEATURES_ACK_LOW => Self::FeaturesAck(Low),
            abi::FEATURES_ACK_HIGH => Self::FeaturesAck(High),
            abi::STATE => Self::State,
            abi::FAIL_CAUSE => Self::FailCause,
            abi::CONTROL => Self::Control,
            abi::RING_COUNT => Self::RingCount,
            abi::RING_ENTRIES_MAX => Self::RingEntriesMax,
            abi::VECTORS => Self::Vectors,
            abi::CORE_LIFE_LOW => Self::CoreLife(Low),
            abi::CORE_LIFE_HIGH => Self::CoreLife(High),
            abi::SESSION_LOW => Self::Session(Low),
            abi::SESSION_HIGH => Self::Session(High),
            abi::GENERATION => Self::Generation,
            abi::TRANSFER_BYTES_MAX => Self::TransferBytesMax,
            abi::LIST_ENTRIES_MAX => Self::ListEntriesMax,
            abi::BAD_ACCESSES => Self::BadAccesses,
            abi::INTERRUPT_PENDING => Self::InterruptPending,
            abi::INTERRUPT_ENABLE => Self::InterruptEnable,
            abi::INTERRUPT_ACK => Self::InterruptAck,
            abi::HOST_PAGE_LOW => Self::HostPage(Low),
            abi::HOST_PAGE_HIGH => Self::HostPage(High),
            abi::RINGS..abi::DOORBELLS => return Self::decode_ring(offset - abi::RINGS),
            abi::DOORBELLS.. => return Self::decode_doorbell(offset - abi::DOORBELLS),
            _ => return None,
        })
    }

    const fn decode_ring(offset: u32) -> Option<Self> {
        use Half::{High, Low};
        let ring = (offset / abi::RING_STRIDE) as usize;
        if ring >= abi::RINGS_MAX {
            return None;
        }
        let register = match offset % abi::RING_STRIDE {
            abi::RING_SUBMISSIONS_LOW => RingRegister::Submissions(Low),
            abi::RING_SUBMISSIONS_HIGH => RingRegister::Submissions(High),
            abi::RING_COMPLETIONS_LOW => RingRegister::Completions(Low),
            abi::RING_COMPLETIONS_HIGH => RingRegister::Completions(High),
            abi::RING_EVENTS_LOW => RingRegister::Events(Low),
            abi::RING_EVENTS_HIGH => RingRegister::Events(High),
            abi::RING_SUBMISSION_ENTRIES => RingRegister::SubmissionEntries,
            abi::RING_COMPLETION_ENTRIES => RingRegister::CompletionEntries,
            abi::RING_MODE => RingRegister::Mode,
            abi::RING_VECTOR => RingRegister::Vector,
            abi::RING_NONCE_LOW => RingRegister::Nonce(Low),
            abi::RING_NONCE_HIGH => RingRegister::Nonce(High),
            abi::RING_ENABLE => RingRegister::Enable,
            abi::RING_STATUS => RingRegister::Status,
            abi::RING_EPOCH => RingRegister::Epoch,
            _ => return None,
        };
        Some(Self::Ring(ring, register))
    }

    const fn decode_doorbell(offset: u32) -> Option<Self> {
        let ring = (offset / 4) as usize;
        if ring < abi::RINGS_MAX && offset.is_multiple_of(4) {
            Some(Self::Doorbell(ring))
        } else {
            None
        }
    }

    /// Whether the register and the one behind it form a 64-bit value, that may be accessed as one.
    pub const fn is_low_half(self) -> bool {
        matches!(
            self,
            Self::Features(Half::Low)
                | Self::FeaturesAck(Half::Low)
                | Self::CoreLife(Half::Low)
                | Self::Session(Half::Low)
                | Self::HostPage(Half::Low)
                | Self::Ring(
                    _,
                    RingRegister::Submissions(Half::Low)
                        | RingRegister::Completions(Half::Low)
                        | RingRegister::Events(Half::Low)
                        | RingRegister::Nonce(Half::Low)
                )
        )
    }
}

impl Half {
    /// This half of `value`.
    pub const fn of(self, value: u64) -> u32 {
        match self {
            Self::Low => value as u32,
            Self::High => (value >> 32) as u32,
        }
    }

    /// Replaces this half of `value`.
    pub const fn set(self, value: &mut u64, half: u32) {
        *value = match self {
            Self::Low => (*value & !0xffff_ffff) | half as u64,
            Self::High => (*value & 0xffff_ffff) | ((half as u64) << 32),
        };
    }
}
