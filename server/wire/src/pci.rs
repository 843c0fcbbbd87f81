//! PCI configuration space in numbers: registers, bits and capabilities that an endpoint of this kind uses.
//!
//! In: nothing. Out: constants, spelled as in `linux/pci_regs.h` and held against it by `tests/uapi_check.rs`.
//! Must never know: what this device puts there. Offsets of capability registers count from the capability.

use crate::uapi::constants;

constants! {
    /// Bytes of the configuration space that conventional PCI has.
    PCI_CFG_SPACE_SIZE: u32 = 256;
    /// Bytes of the configuration space that PCI Express has.
    PCI_CFG_SPACE_EXP_SIZE: u32 = 4096;
    /// Bytes of the standard header.
    PCI_STD_HEADER_SIZEOF: u32 = 64;
    /// Number of base address registers.
    PCI_STD_NUM_BARS: u32 = 6;
    /// Register: vendor (16 bits).
    PCI_VENDOR_ID: u8 = 0x00;
    /// Register: device (16 bits).
    PCI_DEVICE_ID: u8 = 0x02;
    /// Register: command (16 bits).
    PCI_COMMAND: u8 = 0x04;
    /// COMMAND: answer in I/O space.
    PCI_COMMAND_IO: u16 = 0x1;
    /// COMMAND: answer in memory space.
    PCI_COMMAND_MEMORY: u16 = 0x2;
    /// COMMAND: bus mastering, without which there is no DMA.
    PCI_COMMAND_MASTER: u16 = 0x4;
    /// COMMAND: special cycles.
    PCI_COMMAND_SPECIAL: u16 = 0x8;
    /// COMMAND: memory write and invalidate.
    PCI_COMMAND_INVALIDATE: u16 = 0x10;
    /// COMMAND: palette snooping.
    PCI_COMMAND_VGA_PALETTE: u16 = 0x20;
    /// COMMAND: parity checking.
    PCI_COMMAND_PARITY: u16 = 0x40;
    /// COMMAND: address stepping.
    PCI_COMMAND_WAIT: u16 = 0x80;
    /// COMMAND: SERR.
    PCI_COMMAND_SERR: u16 = 0x100;
    /// COMMAND: back-to-back writes.
    PCI_COMMAND_FAST_BACK: u16 = 0x200;
    /// COMMAND: INTx is not asserted.
    PCI_COMMAND_INTX_DISABLE: u16 = 0x400;
    /// Register: status (16 bits).
    PCI_STATUS: u8 = 0x06;
    /// STATUS: ready at once after a reset.
    PCI_STATUS_IMM_READY: u16 = 0x01;
    /// STATUS: INTx pending.
    PCI_STATUS_INTERRUPT: u16 = 0x08;
    /// STATUS: there is a capability list.
    PCI_STATUS_CAP_LIST: u16 = 0x10;
    /// Register: revision (8 bits).
    PCI_REVISION_ID: u8 = 0x08;
    /// Register: class in the high 24 bits, revision in the low 8.
    PCI_CLASS_REVISION: u8 = 0x08;
    /// Register: programming interface (8 bits).
    PCI_CLASS_PROG: u8 = 0x09;
    /// Register: class and subclass (16 bits).
    PCI_CLASS_DEVICE: u8 = 0x0a;
    /// Register: cache line size (8 bits, read-write, no effect).
    PCI_CACHE_LINE_SIZE: u8 = 0x0c;
    /// Register: latency timer (8 bits).
    PCI_LATENCY_TIMER: u8 = 0x0d;
    /// Register: header type (8 bits).
    PCI_HEADER_TYPE: u8 = 0x0e;
    /// HEADER_TYPE: an ordinary function.
    PCI_HEADER_TYPE_NORMAL: u8 = 0;
    /// Register: built-in self test (8 bits).
    PCI_BIST: u8 = 0x0f;
    /// Register: BAR 0 (32 bits).
    PCI_BASE_ADDRESS_0: u8 = 0x10;
    /// Register: BAR 1 (32 bits).
    PCI_BASE_ADDRESS_1: u8 = 0x14;
    /// Register: BAR 2 (32 bits).
    PCI_BASE_ADDRESS_2: u8 = 0x18;
    /// Register: BAR 3 (32 bits).
    PCI_BASE_ADDRESS_3: u8 = 0x1c;
    /// Register: BAR 4 (32 bits).
    PCI_BASE_ADDRESS_4: u8 = 0x20;
    /// Register: BAR 5 (32 bits).
    PCI_BASE_ADDRESS_5: u8 = 0x24;
    /// BAR: the bit that tells I/O from memory.
    PCI_BASE_ADDRESS_SPACE: u32 = 0x01;
    /// BAR: I/O.
    PCI_BASE_ADDRESS_SPACE_IO: u32 = 0x01;
    /// BAR: memory.
    PCI_BASE_ADDRESS_SPACE_MEMORY: u32 = 0x00;
    /// BAR: bits of the memory type.
    PCI_BASE_ADDRESS_MEM_TYPE_MASK: u32 = 0x06;
    /// BAR: 32-bit memory.
    PCI_BASE_ADDRESS_MEM_TYPE_32: u32 = 0x00;
    /// BAR: 64-bit memory.
    PCI_BASE_ADDRESS_MEM_TYPE_64: u32 = 0x04;
    /// BAR: prefetchable.
    PCI_BASE_ADDRESS_MEM_PREFETCH: u32 = 0x08;
    /// Register: subsystem vendor (16 bits).
    PCI_SUBSYSTEM_VENDOR_ID: u8 = 0x2c;
    /// Register: subsystem (16 bits).
    PCI_SUBSYSTEM_ID: u8 = 0x2e;
    /// Register: expansion ROM (32 bits).
    PCI_ROM_ADDRESS: u8 = 0x30;
    /// Register: offset of the first capability (8 bits).
    PCI_CAPABILITY_LIST: u8 = 0x34;
    /// Register: interrupt line (8 bits, the guest's scratch).
    PCI_INTERRUPT_LINE: u8 = 0x3c;
    /// Register: interrupt pin, 1 = INTA (8 bits).
    PCI_INTERRUPT_PIN: u8 = 0x3d;
    /// Register: minimum grant (8 bits).
    PCI_MIN_GNT: u8 = 0x3e;
    /// Register: maximum latency (8 bits).
    PCI_MAX_LAT: u8 = 0x3f;
    /// Capability: id (8 bits).
    PCI_CAP_LIST_ID: u8 = 0;
    /// Capability: offset of the next (8 bits).
    PCI_CAP_LIST_NEXT: u8 = 1;
    /// Capability: bytes of the common head.
    PCI_CAP_SIZEOF: u8 = 4;
    /// Capability id: power management.
    PCI_CAP_ID_PM: u8 = 0x01;
    /// Capability id: MSI.
    PCI_CAP_ID_MSI: u8 = 0x05;
    /// Capability id: vendor-specific.
    PCI_CAP_ID_VNDR: u8 = 0x09;
    /// Capability id: PCI Express.
    PCI_CAP_ID_EXP: u8 = 0x10;
    /// Capability id: MSI-X.
    PCI_CAP_ID_MSIX: u8 = 0x11;
    /// Power management: capabilities (16 bits).
    PCI_PM_PMC: u8 = 2;
    /// PMC: version.
    PCI_PM_CAP_VER_MASK: u16 = 0x0007;
    /// Power management: control and status (16 bits).
    PCI_PM_CTRL: u8 = 4;
    /// PM CTRL: power state.
    PCI_PM_CTRL_STATE_MASK: u16 = 0x0003;
    /// PM CTRL: no reset from D3hot to D0.
    PCI_PM_CTRL_NO_SOFT_RESET: u16 = 0x0008;
    /// Power management: bytes of the capability.
    PCI_PM_SIZEOF: u8 = 8;
    /// MSI: control (16 bits).
    PCI_MSI_FLAGS: u8 = 0x02;
    /// MSI control: enabled.
    PCI_MSI_FLAGS_ENABLE: u16 = 0x0001;
    /// MSI control: vectors offered, as log2, from bit 1.
    PCI_MSI_FLAGS_QMASK: u16 = 0x000e;
    /// MSI control: vectors in use, as log2, from bit 4.
    PCI_MSI_FLAGS_QSIZE: u16 = 0x0070;
    /// MSI control: 64-bit addresses.
    PCI_MSI_FLAGS_64BIT: u16 = 0x0080;
    /// MSI control: a mask bit for each vector.
    PCI_MSI_FLAGS_MASKBIT: u16 = 0x0100;
    /// MSI: low address (32 bits).
    PCI_MSI_ADDRESS_LO: u8 = 0x04;
    /// MSI: high address (32 bits, 64-bit form).
    PCI_MSI_ADDRESS_HI: u8 = 0x08;
    /// MSI: data (16 bits, 32-bit form).
    PCI_MSI_DATA_32: u8 = 0x08;
    /// MSI: mask bits (32 bits, 32-bit form).
    PCI_MSI_MASK_32: u8 = 0x0c;
    /// MSI: pending bits (32 bits, 32-bit form).
    PCI_MSI_PENDING_32: u8 = 0x10;
    /// MSI: data (16 bits, 64-bit form).
    PCI_MSI_DATA_64: u8 = 0x0c;
    /// MSI: mask bits (32 bits, 64-bit form).
    PCI_MSI_MASK_64: u8 = 0x10;
    /// MSI: pending bits (32 bits, 64-bit form).
    PCI_MSI_PENDING_64: u8 = 0x14;
    /// MSI-X: control (16 bits).
    PCI_MSIX_FLAGS: u8 = 2;
    /// MSI-X control: vectors less one.
    PCI_MSIX_FLAGS_QSIZE: u16 = 0x07ff;
    /// MSI-X control: all vectors masked.
    PCI_MSIX_FLAGS_MASKALL: u16 = 0x4000;
    /// MSI-X control: enabled.
    PCI_MSIX_FLAGS_ENABLE: u16 = 0x8000;
    /// MSI-X: where the table is (32 bits).
    PCI_MSIX_TABLE: u8 = 4;
    /// MSI-X TABLE: number of the BAR.
    PCI_MSIX_TABLE_BIR: u32 = 0x00000007;
    /// MSI-X TABLE: offset in it.
    PCI_MSIX_TABLE_OFFSET: u32 = 0xfffffff8;
    /// MSI-X: where the pending bits are (32 bits).
    PCI_MSIX_PBA: u8 = 8;
    /// MSI-X PBA: number of the BAR.
    PCI_MSIX_PBA_BIR: u32 = 0x00000007;
    /// MSI-X PBA: offset in it.
    PCI_MSIX_PBA_OFFSET: u32 = 0xfffffff8;
    /// MSI-X: bytes of the capability.
    PCI_CAP_MSIX_SIZEOF: u8 = 12;
    /// MSI-X: bytes of one table entry.
    PCI_MSIX_ENTRY_SIZE: u8 = 16;
    /// MSI-X entry: low address (32 bits).
    PCI_MSIX_ENTRY_LOWER_ADDR: u8 = 0x0;
    /// MSI-X entry: high address (32 bits).
    PCI_MSIX_ENTRY_UPPER_ADDR: u8 = 0x4;
    /// MSI-X entry: data (32 bits).
    PCI_MSIX_ENTRY_DATA: u8 = 0x8;
    /// MSI-X entry: control (32 bits).
    PCI_MSIX_ENTRY_VECTOR_CTRL: u8 = 0xc;
    /// MSI-X entry control: masked.
    PCI_MSIX_ENTRY_CTRL_MASKBIT: u32 = 0x00000001;
    /// PCI Express: capabilities (16 bits).
    PCI_EXP_FLAGS: u8 = 0x02;
    /// PCIe flags: version.
    PCI_EXP_FLAGS_VERS: u16 = 0x000f;
    /// PCIe flags: port type, from bit 4.
    PCI_EXP_FLAGS_TYPE: u16 = 0x00f0;
    /// PCIe flags: interrupt message number.
    PCI_EXP_FLAGS_IRQ: u16 = 0x3e00;
    /// PCIe type: endpoint.
    PCI_EXP_TYPE_ENDPOINT: u16 = 0x0;
    /// PCIe type: legacy endpoint (one that may have I/O BARs).
    PCI_EXP_TYPE_LEG_END: u16 = 0x1;
    /// PCIe type: integrated endpoint.
    PCI_EXP_TYPE_RC_END: u16 = 0x9;
    /// PCI Express: device capabilities (32 bits).
    PCI_EXP_DEVCAP: u8 = 0x04;
    /// DEVCAP: largest payload.
    PCI_EXP_DEVCAP_PAYLOAD: u32 = 0x00000007;
    /// DEVCAP: role-based error reporting.
    PCI_EXP_DEVCAP_RBER: u32 = 0x00008000;
    /// DEVCAP: function-level reset.
    PCI_EXP_DEVCAP_FLR: u32 = 0x10000000;
    /// PCI Express: device control (16 bits).
    PCI_EXP_DEVCTL: u8 = 0x08;
    /// DEVCTL: report correctable errors.
    PCI_EXP_DEVCTL_CERE: u16 = 0x0001;
    /// DEVCTL: report non-fatal errors.
    PCI_EXP_DEVCTL_NFERE: u16 = 0x0002;
    /// DEVCTL: report fatal errors.
    PCI_EXP_DEVCTL_FERE: u16 = 0x0004;
    /// DEVCTL: report unsupported requests.
    PCI_EXP_DEVCTL_URRE: u16 = 0x0008;
    /// DEVCTL: relaxed ordering.
    PCI_EXP_DEVCTL_RELAX_EN: u16 = 0x0010;
    /// DEVCTL: payload.
    PCI_EXP_DEVCTL_PAYLOAD: u16 = 0x00e0;
    /// DEVCTL: no snoop.
    PCI_EXP_DEVCTL_NOSNOOP_EN: u16 = 0x0800;
    /// DEVCTL: read request size.
    PCI_EXP_DEVCTL_READRQ: u16 = 0x7000;
    /// DEVCTL: read requests of 512 bytes.
    PCI_EXP_DEVCTL_READRQ_512B: u16 = 0x2000;
    /// DEVCTL: writing 1 is a function-level reset.
    PCI_EXP_DEVCTL_BCR_FLR: u16 = 0x8000;
    /// PCI Express: device status (16 bits).
    PCI_EXP_DEVSTA: u8 = 0x0a;
    /// DEVSTA: transactions pending.
    PCI_EXP_DEVSTA_TRPND: u16 = 0x0020;
    /// PCI Express: link capabilities (32 bits).
    PCI_EXP_LNKCAP: u8 = 0x0c;
    /// LNKCAP: 2.5 GT/s.
    PCI_EXP_LNKCAP_SLS_2_5GB: u32 = 0x00000001;
    /// PCI Express: link control (16 bits).
    PCI_EXP_LNKCTL: u8 = 0x10;
    /// PCI Express: link status (16 bits).
    PCI_EXP_LNKSTA: u8 = 0x12;
    /// LNKSTA: 2.5 GT/s.
    PCI_EXP_LNKSTA_CLS_2_5GB: u16 = 0x0001;
    /// LNKSTA: one lane.
    PCI_EXP_LNKSTA_NLW_X1: u16 = 0x0010;
    /// PCI Express: device capabilities 2 (32 bits).
    PCI_EXP_DEVCAP2: u8 = 0x24;
    /// PCI Express: device control 2 (16 bits).
    PCI_EXP_DEVCTL2: u8 = 0x28;
    /// PCI Express: link capabilities 2 (32 bits).
    PCI_EXP_LNKCAP2: u8 = 0x2c;
    /// PCI Express: link control 2 (16 bits).
    PCI_EXP_LNKCTL2: u8 = 0x30;
    /// PCI Express: link status 2 (16 bits).
    PCI_EXP_LNKSTA2: u8 = 0x32;
    /// PCI Express: bytes of the capability of an endpoint, version 2.
    PCI_CAP_EXP_ENDPOINT_SIZEOF_V2: u8 = 0x32;
}
