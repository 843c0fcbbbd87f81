//! Resets, and the control word whose transitions end DMA.
//!
//! In: the guest's and the client's wish for a reset, configuration space as it is now. Out: words on the front page, fences.
//! Must never know: who asked, and who waits for the fence.

use super::config_space::ConfigSpace;
use super::function::{Function, Ring};
use super::msix_table::MsixTable;
use crate::page::{RingSetup, Words, control};
use vmgmt_abi::registers::VECTORS_MAX;

impl<W: Words> Function<W> {
    /// The reset register: all but configuration space and what the client set up (maps, eventfds). Posted; STATE shows RESETTING.
    pub(super) fn reset(&mut self) {
        let generation = self.page.generation().wrapping_add(1);
        let withdrawn = self.port.reset(generation);
        self.withdraw_port(withdrawn);
        for (n, ring) in self.rings.iter_mut().enumerate() {
            if ring.enabled {
                ring.close(n, &self.page);
            }
            *ring = Ring {
                setup: RingSetup {
                    epoch: ring.setup.epoch,
                    ..RingSetup::default()
                },
                ..Ring::default()
            };
        }
        self.page.set_features(0);
        self.host_page = 0;
        self.page.set_host_page(0);
        self.interrupt_enable = 0;
        for vector in 0..VECTORS_MAX {
            if let Some(page) = self.cores.page() {
                self.page.set_ack(vector, page.raise(vector));
            }
        }
        self.bad_accesses = 0;
        self.activated = false;
        self.failed = None;
        self.page.set_generation(generation);
        self.reset_fence = Some(self.page.move_fence());
        self.touched = true;
        self.observe_fences();
    }

    /// DEVICE_RESET and the function-level reset: configuration space too.
    pub(super) fn function_reset(&mut self) {
        self.config = ConfigSpace::new(&self.settings);
        self.msix = MsixTable::new(self.settings.vectors);
        self.publish_control();
        self.reset();
    }

    /// Publishes the control word; a transition that ends DMA moves the fence.
    pub(super) fn publish_control(&mut self) {
        let mut bits = 0;
        for (is_set, bit) in [
            (self.config.may_do_dma(), control::BUS_MASTER),
            (!self.config.may_assert_intx(), control::INTX_DISABLE),
            (self.frozen, control::FROZEN),
            (self.quarantined, control::QUARANTINED),
            (self.gone, control::GONE),
        ] {
            bits |= if is_set { bit } else { 0 };
        }
        let before = self.page.control();
        if bits == before {
            return;
        }
        self.page.set_control(bits);
        // The INTx disable bit is the front's own affair: a guest's kernel moves it twice at each interrupt, and a core that is woken for it
        // finds nothing and polls a while.
        self.touched |= (bits ^ before) & !control::INTX_DISABLE != 0;
        let ending = control::FROZEN | control::QUARANTINED | control::GONE;
        if before & !bits & control::BUS_MASTER != 0 || bits & !before & ending != 0 {
            self.page.move_fence();
        }
    }
}
