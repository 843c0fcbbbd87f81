//! Numbers of the register side, with where they come from. In: nothing. Out: numbers. Must never know: a session.

/// Bytes of configuration space: that of PCI Express, so that the client keeps the PCIe capability (and with it
/// the function-level reset).
pub const CONFIG_BYTES: u64 = 4096;

/// Bytes of BAR4 (MSI-X table and pending bits): one page, so that nothing else shares it.
pub const MSIX_BAR_BYTES: u64 = 4096;
/// Offset of the pending bits in BAR4, behind the largest table we offer (16 vectors of 16 bytes).
pub const MSIX_PENDING_OFFSET: u64 = 0x800;

/// A reply that would leave later than this after its request's arrival is not sent: QEMU gives up after 5 s and loses step over a
/// late reply, while it survives none. Half a second is left for the way.
pub const REPLY_HELD_NS_MAX: u64 = 4_500_000_000;

/// While something waits for a fence, the core page is looked at this often even without a kick: a kick is a hint and may be lost with
/// its core. Costs nothing while nothing waits.
pub const FENCE_POLL_NS: u64 = 2_000_000;

/// Core lives that may hold maps of one session at once: the one in service, and dying ones whose workers hang in the kernel.
pub const CORE_LIVES_MAX: usize = 8;

const _: () = assert!(
    MSIX_PENDING_OFFSET as usize
        >= vmgmt_abi::registers::VECTORS_MAX * vmgmt_wire::pci::PCI_MSIX_ENTRY_SIZE as usize
);
const _: () = assert!(MSIX_PENDING_OFFSET < MSIX_BAR_BYTES);
const _: () = assert!(FENCE_POLL_NS < REPLY_HELD_NS_MAX);
