//! The host's page in guest memory: what the host says to a VM, behind a sequence word that is odd while it is written.
//!
//! In: the address from the front page, the facts from the shell. Out: 64 bytes in guest memory. Knows nothing of who decides the facts.

use super::interface::HostFacts;
use super::ring::{Desk, Stop};
use crate::page::{CorePage, FrontPage, Words};
use crate::{GuestMemory, MemoryError};
use vmgmt_abi::registers::HostPage;
use zerocopy::IntoBytes;

/// Guest address alignment of the page, in bytes.
const ALIGNMENT_BYTES: u64 = 4096;

/// What is (to be) in the host's page.
#[derive(Debug, Default)]
pub(super) struct HostPageWriter {
    pub facts: HostFacts,
    /// Address and sequence that the page was last written for; `None`: never in this core life.
    written: Option<(u64, u64)>,
    stale: bool,
}

impl HostPageWriter {
    pub fn set(&mut self, facts: HostFacts) {
        self.stale |= facts != self.facts;
        self.facts = facts;
    }

    /// Writes the page if it is new, or says something new.
    pub fn write<W: Words, M: GuestMemory>(
        &mut self,
        desk: &mut Desk<W>,
        front: &FrontPage<W>,
        core: &CorePage<W>,
        memory: &mut M,
    ) -> Result<(), Stop> {
        let place = front.host_page();
        let (iova, _) = place;
        if self.written == Some(place) && !self.stale {
            return Ok(());
        }
        let outcome = if iova == 0 {
            Ok(())
        } else if iova % ALIGNMENT_BYTES != 0 {
            Err(MemoryError::Unmapped { iova })
        } else {
            // The sequence goes on where the last core life was, even if that one died in the middle.
            let sequence = desk.table.next_host_page_sequence();
            let page = HostPage {
                sequence,
                core_life: core.life(),
                throttled_ns: self.facts.throttled_ns,
                granted_cpu_milli: self.facts.granted_cpu_milli,
                granted_memory_bytes: self.facts.granted_memory_bytes,
                reserved: [0; 3],
            };
            write_page(memory, iova, &page)
        };
        match outcome {
            Err(MemoryError::Quiet) => return Err(Stop::Quiet),
            Err(MemoryError::Pending) => return Err(Stop::Wait),
            // The guest's mistake, or it has unmapped the page: it is written when the guest names one again.
            Err(_) => desk.counters.host_page_errors += 1,
            Ok(()) => {}
        }
        self.written = Some(place);
        self.stale = false;
        Ok(())
    }
}

fn write_page<M: GuestMemory>(memory: &mut M, iova: u64, page: &HostPage) -> Result<(), MemoryError> {
    let bytes = page.as_bytes();
    let (_, content) = bytes.split_at(size_of::<u64>());
    memory.store_u64(iova, page.sequence - 1)?;
    memory.fence();
    memory.write(iova + size_of::<u64>() as u64, content)?;
    memory.store_u64(iova, page.sequence)
}
