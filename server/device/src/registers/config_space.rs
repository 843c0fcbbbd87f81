//! PCI configuration space: a header, power management, MSI or MSI-X, and PCI Express with function-level reset.
//!
//! In: reads and writes of any length within it. Out: bytes, and whether a function-level reset was asked for.
//! Must never know: what bus mastering or an interrupt mean to the rest of the device.
//!
//! Every writable bit is in one mask; what is not in it keeps its value.

use super::limits;
use super::settings::Settings;
use vmgmt_abi::port::BAR2_BYTES;
use vmgmt_abi::registers::BAR0_BYTES;
use vmgmt_wire::pci::*;

const BYTES: usize = PCI_CFG_SPACE_SIZE as usize;
/// Where the capabilities stand: power management, then the interrupts', then PCI Express.
const PM: u8 = 0x40;
const MSI: u8 = 0x50;
const EXPRESS: u8 = 0x70;
const _: () = assert!(PM + PCI_PM_SIZEOF <= MSI && MSI + 24 <= EXPRESS);
const _: () = assert!(EXPRESS as usize + 0x3c <= BYTES);

const COMMAND_WRITABLE: u16 = PCI_COMMAND_IO
    | PCI_COMMAND_MEMORY
    | PCI_COMMAND_MASTER
    | PCI_COMMAND_PARITY
    | PCI_COMMAND_SERR
    | PCI_COMMAND_INTX_DISABLE;
const DEVCTL_WRITABLE: u16 = PCI_EXP_DEVCTL_CERE
    | PCI_EXP_DEVCTL_NFERE
    | PCI_EXP_DEVCTL_FERE
    | PCI_EXP_DEVCTL_URRE
    | PCI_EXP_DEVCTL_RELAX_EN
    | PCI_EXP_DEVCTL_PAYLOAD
    | PCI_EXP_DEVCTL_NOSNOOP_EN
    | PCI_EXP_DEVCTL_READRQ;
/// As PCI Express wants it after a reset: relaxed ordering and no snoop allowed, reads of 512 bytes.
const DEVCTL_DEFAULT: u16 = PCI_EXP_DEVCTL_RELAX_EN | PCI_EXP_DEVCTL_NOSNOOP_EN | PCI_EXP_DEVCTL_READRQ_512B;

/// The first 256 bytes; what lies behind reads zero (no extended capability).
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
}

impl ConfigSpace {
    /// As after power-on.
    pub fn new(settings: &Settings) -> Self {
        let mut space = Self {
            bytes: [0; BYTES],
            writable: [0; BYTES],
        };
        space.header(settings);
        space.power_management();
        if settings.msix {
            space.msix(settings.vectors);
        } else {
            space.msi(settings.vectors);
        }
        space.express();
        space
    }

    /// Fills `into` from `offset` on. `interrupt` is STATUS bit 3.
    pub fn read(&self, offset: u64, into: &mut [u8], interrupt: bool) {
        for (position, byte) in (offset..).zip(into) {
            let index = usize::try_from(position).unwrap_or(usize::MAX);
            *byte = self.bytes.get(index).copied().unwrap_or(0);
            if interrupt && index == usize::from(PCI_STATUS) {
                *byte |= PCI_STATUS_INTERRUPT as u8;
            }
        }
    }

    /// Stores `data` from `offset` on, where the space is writable. True: a function-level reset was asked for (and
    /// is still to be done).
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        const RESET_BYTE: usize = (EXPRESS + PCI_EXP_DEVCTL) as usize + 1;
        const RESET_BIT: u8 = (PCI_EXP_DEVCTL_BCR_FLR >> 8) as u8;
        let power_before = self.power_state();
        let mut reset = false;
        for (position, value) in (offset..).zip(data) {
            let index = usize::try_from(position).unwrap_or(usize::MAX);
            reset |= index == RESET_BYTE && value & RESET_BIT != 0;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(index), self.writable.get(index)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
        // D1 and D2 do not exist: a write of them changes nothing.
        if matches!(self.power_state(), 1 | 2) {
            let control = self.word(PM + PCI_PM_CTRL) & !PCI_PM_CTRL_STATE_MASK;
            self.set_word(PM + PCI_PM_CTRL, control | power_before);
        }
        reset
    }

    /// The COMMAND register.
    pub fn command(&self) -> u16 {
        self.word(PCI_COMMAND)
    }

    /// Powered (D0) and mastering the bus: DMA is allowed.
    pub fn may_do_dma(&self) -> bool {
        self.command() & PCI_COMMAND_MASTER != 0 && self.power_state() == 0
    }

    /// INTx may be asserted.
    pub fn may_assert_intx(&self) -> bool {
        self.command() & PCI_COMMAND_INTX_DISABLE == 0 && self.power_state() == 0
    }

    /// The writable bits, for saving.
    pub fn writable_bytes(&self) -> Vec<u8> {
        let bits = self.bytes.iter().zip(&self.writable);
        bits.map(|(byte, mask)| byte & mask).collect()
    }

    fn power_state(&self) -> u16 {
        self.word(PM + PCI_PM_CTRL) & PCI_PM_CTRL_STATE_MASK
    }

    fn header(&mut self, settings: &Settings) {
        self.set_word(PCI_VENDOR_ID, settings.pci_vendor);
        self.set_word(PCI_DEVICE_ID, settings.pci_device);
        self.set_word(PCI_STATUS, PCI_STATUS_CAP_LIST);
        self.set_long(PCI_CLASS_REVISION, vmgmt_abi::PCI_CLASS << 8);
        self.set_word(PCI_SUBSYSTEM_VENDOR_ID, settings.pci_vendor);
        self.set_word(PCI_SUBSYSTEM_ID, settings.pci_device);
        self.set_long(
            PCI_BASE_ADDRESS_0,
            PCI_BASE_ADDRESS_SPACE_MEMORY | PCI_BASE_ADDRESS_MEM_TYPE_32,
        );
        self.set_long(PCI_BASE_ADDRESS_2, PCI_BASE_ADDRESS_SPACE_IO);
        self.set_byte(PCI_CAPABILITY_LIST, PM);
        self.set_byte(PCI_INTERRUPT_PIN, 1);

        self.open_word(PCI_COMMAND, COMMAND_WRITABLE);
        self.open_byte(PCI_CACHE_LINE_SIZE, 0xff);
        self.open_byte(PCI_INTERRUPT_LINE, 0xff);
        self.open_long(PCI_BASE_ADDRESS_0, size_mask(BAR0_BYTES as u64));
        self.open_long(PCI_BASE_ADDRESS_2, size_mask(BAR2_BYTES as u64));
        if settings.msix {
            self.open_long(PCI_BASE_ADDRESS_4, size_mask(limits::MSIX_BAR_BYTES));
        }
    }

    fn power_management(&mut self) {
        self.capability(PM, PCI_CAP_ID_PM, MSI);
        // Version 3 of the specification; D0 and D3hot only, no power management events.
        self.set_word(PM + PCI_PM_PMC, 3);
        self.set_word(PM + PCI_PM_CTRL, PCI_PM_CTRL_NO_SOFT_RESET);
        self.open_word(PM + PCI_PM_CTRL, PCI_PM_CTRL_STATE_MASK);
    }

    fn msi(&mut self, vectors: u8) {
        self.capability(MSI, PCI_CAP_ID_MSI, EXPRESS);
        let log2 = vectors.trailing_zeros() as u16;
        self.set_word(
            MSI + PCI_MSI_FLAGS,
            (log2 << 1) | PCI_MSI_FLAGS_64BIT | PCI_MSI_FLAGS_MASKBIT,
        );
        self.open_word(MSI + PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE);
        self.open_long(MSI + PCI_MSI_ADDRESS_LO, !3);
        self.open_long(MSI + PCI_MSI_ADDRESS_HI, !0);
        self.open_word(MSI + PCI_MSI_DATA_64, !0);
        self.open_long(MSI + PCI_MSI_MASK_64, (1 << vectors) - 1);
    }

    fn msix(&mut self, vectors: u8) {
        self.capability(MSI, PCI_CAP_ID_MSIX, EXPRESS);
        self.set_word(MSI + PCI_MSIX_FLAGS, u16::from(vectors).saturating_sub(1));
        self.open_word(
            MSI + PCI_MSIX_FLAGS,
            PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL,
        );
        self.set_long(MSI + PCI_MSIX_TABLE, 4);
        self.set_long(MSI + PCI_MSIX_PBA, limits::MSIX_PENDING_OFFSET as u32 | 4);
    }

    fn express(&mut self) {
        self.capability(EXPRESS, PCI_CAP_ID_EXP, 0);
        // Not a legacy endpoint, although it has an I/O BAR: QEMU drops the whole capability, and the reset with it, of a
        // legacy endpoint on the root bus.
        self.set_word(EXPRESS + PCI_EXP_FLAGS, 2 | (PCI_EXP_TYPE_ENDPOINT << 4));
        self.set_long(EXPRESS + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_RBER | PCI_EXP_DEVCAP_FLR);
        self.set_word(EXPRESS + PCI_EXP_DEVCTL, DEVCTL_DEFAULT);
        self.open_word(EXPRESS + PCI_EXP_DEVCTL, DEVCTL_WRITABLE);
        self.set_long(EXPRESS + PCI_EXP_LNKCAP, PCI_EXP_LNKCAP_SLS_2_5GB | (1 << 4));
        self.set_word(
            EXPRESS + PCI_EXP_LNKSTA,
            PCI_EXP_LNKSTA_CLS_2_5GB | PCI_EXP_LNKSTA_NLW_X1,
        );
    }

    fn capability(&mut self, at: u8, id: u8, next: u8) {
        self.set_byte(at + PCI_CAP_LIST_ID, id);
        self.set_byte(at + PCI_CAP_LIST_NEXT, next);
    }

    fn word(&self, at: u8) -> u16 {
        u16::from_le_bytes([self.bytes[usize::from(at)], self.bytes[usize::from(at) + 1]])
    }
    fn set_byte(&mut self, at: u8, value: u8) {
        self.bytes[usize::from(at)] = value;
    }
    fn set_word(&mut self, at: u8, value: u16) {
        self.bytes[usize::from(at)..][..2].copy_from_slice(&value.to_le_bytes());
    }
    fn set_long(&mut self, at: u8, value: u32) {
        self.bytes[usize::from(at)..][..4].copy_from_slice(&value.to_le_bytes());
    }
    fn open_byte(&mut self, at: u8, mask: u8) {
        self.writable[usize::from(at)] = mask;
    }
    fn open_word(&mut self, at: u8, mask: u16) {
        self.writable[usize::from(at)..][..2].copy_from_slice(&mask.to_le_bytes());
    }
    fn open_long(&mut self, at: u8, mask: u32) {
        self.writable[usize::from(at)..][..4].copy_from_slice(&mask.to_le_bytes());
    }
}

/// The writable bits of a BAR of `bytes` bytes, a power of two.
const fn size_mask(bytes: u64) -> u32 {
    !((bytes - 1) as u32)
}
