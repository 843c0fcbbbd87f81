//! The device in this process as the driver finds it: registers, memory, interrupts.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmgmt_driver::abi;
use vmgmt_driver::abi::registers::{self, DeviceState, RING_STRIDE, RINGS, RINGS_MAX};
use vmgmt_driver::backing::{Backing, COMMAND_MASTER, CONFIG_COMMAND, InterruptKind, Interrupts, Width};
use vmgmt_driver::{DmaMemory, DriverError, Result};

use super::{Fake, FakeRing, RESETTING_READS};

impl Backing for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn has_registers(&self) -> bool {
        true
    }

    fn has_dma(&self) -> bool {
        true
    }

    fn read32(&self, offset: u32) -> Result<u32> {
        let mut state = self.state();
        Ok(match offset {
            _ if !state.is_decoded() => state.undecoded,
            registers::MAGIC if state.absent_reads > 0 => {
                state.absent_reads -= 1;
                u32::MAX
            }
            registers::MAGIC => abi::MAGIC,
            registers::ABI_VERSION => abi::ABI_VERSION,
            registers::FEATURES_LOW if state.suppression => abi::feature::EVENT_SUPPRESSION as u32 | 0xf00,
            registers::FEATURES_LOW => 0xf00,
            registers::RING_COUNT => 4,
            registers::RING_ENTRIES_MAX => 1024,
            registers::VECTORS => 1,
            registers::TRANSFER_BYTES_MAX => abi::ring::TRANSFER_BYTES_MAX,
            registers::LIST_ENTRIES_MAX => abi::ring::LIST_ENTRIES_MAX,
            registers::STATE if state.resetting_reads > 0 => {
                state.resetting_reads -= 1;
                if state.resetting_reads == 0 {
                    state.registers.insert(registers::STATE, DeviceState::BLANK.0);
                }
                DeviceState::RESETTING.0
            }
            offset => state.registers.get(&offset).copied().unwrap_or(0),
        })
    }

    fn write32(&self, offset: u32, value: u32) -> Result<()> {
        let mut state = self.state();
        if !state.is_decoded() {
            return Ok(());
        }
        if offset == registers::CONTROL {
            assert_eq!(value, registers::CONTROL_RESET);
            state.registers.insert(registers::STATE, DeviceState::RESETTING.0);
            state.resetting_reads = RESETTING_READS;
            *state.registers.entry(registers::GENERATION).or_default() += 1;
            state.rings = [FakeRing::default(); RINGS_MAX];
            state.receives.clear();
            state.resets += 1;
        } else if offset >= registers::DOORBELLS {
            state.doorbells += 1;
            if state.deaf_doorbells > 0 {
                state.deaf_doorbells -= 1;
                return Ok(());
            }
            state.kicks += 1;
            self.shared.kick.notify_all();
        } else if offset >= RINGS
            && (offset - RINGS) % RING_STRIDE == registers::RING_ENABLE
            && value == 1
            && std::mem::take(&mut state.replace_at_enable)
        {
            state.replace();
        } else if offset >= RINGS && (offset - RINGS) % RING_STRIDE == registers::RING_ENABLE {
            self.shared
                .enable(&mut state, ((offset - RINGS) / RING_STRIDE) as usize, value == 1);
            state.kicks += 1;
            self.shared.kick.notify_all();
        } else {
            state.registers.insert(offset, value);
        }
        Ok(())
    }

    fn port_read(&self, _offset: u32, _width: Width) -> Result<u32> {
        Err(DriverError::NotPossible("a port access", "fake"))
    }

    fn port_write(&self, _offset: u32, _width: Width, _value: u32) -> Result<()> {
        Err(DriverError::NotPossible("a port access", "fake"))
    }

    fn allocate(&self, bytes: usize) -> Result<DmaMemory> {
        self.shared.memory.allocate(bytes)
    }

    fn set_up_interrupts(&self, vectors_wanted: u32) -> Result<Interrupts> {
        assert_eq!(vectors_wanted, 1);
        Ok(Interrupts {
            kind: InterruptKind::Msi,
            vectors: 1,
        })
    }

    fn interrupt_descriptor(&self, _vector: u32) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.shared.interrupt))
    }

    fn take_interrupt(&self, _vector: u32) -> Result<()> {
        let mut count = [0; 8];
        match rustix::io::read(&self.shared.interrupt, &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(DriverError::system("eventfd", error)),
        }
        self.state().taken += 1;
        self.shared.quiet.notify_all();
        Ok(())
    }

    fn config_read(&self, offset: u32, _width: Width) -> Result<u32> {
        assert_eq!(offset, CONFIG_COMMAND);
        let state = self.state();
        Ok(if state.unplugged { 0xffff } else { state.command })
    }

    fn config_write(&self, offset: u32, _width: Width, value: u32) -> Result<()> {
        assert_eq!(offset, CONFIG_COMMAND);
        let mut state = self.state();
        if state.unplugged {
            return Ok(());
        }
        let begins = value & !state.command & COMMAND_MASTER != 0;
        assert!(
            !begins || state.resetting_reads == 0,
            "a DMA of who was there before may be under way"
        );
        state.command = value;
        state.kicks += 1;
        self.shared.kick.notify_all();
        Ok(())
    }
}
