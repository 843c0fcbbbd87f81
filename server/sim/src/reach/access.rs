//! GARDEN, the rings' way to guest memory: loads and stores by mapping or by message, and the proof that a mapping is the guest's memory.
//!
//! In: addresses of the guest. Out: bytes, or why there are none. Which maps there are and who holds them is the parent's.

use super::*;

impl GuestMemory for Reach {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.quiet()?;
        self.steps.access();
        let spans = self.spans(iova, into.len() as u64, rights::READ, true)?;
        let messages: Vec<(u64, u32, u64)> = spans
            .iter()
            .filter(|span| span.place.is_none())
            .flat_map(|span| {
                let step = u64::from(MESSAGE_BYTES_MAX);
                (0..span.bytes.div_ceil(step)).map(move |n| {
                    (
                        span.iova + n * step,
                        (span.bytes - n * step).min(step) as u32,
                        span.number,
                    )
                })
            })
            .collect();
        let (mut pending, mut failed) = (false, None);
        for (iova, bytes, number) in &messages {
            match self.messages.ask(*iova, *bytes, *number) {
                Asked::Ready => {}
                Asked::Pending => pending = true,
                Asked::Failed => failed = failed.or(Some(*iova)),
            }
        }
        if let Some(iova) = failed {
            for (iova, bytes, _) in &messages {
                self.messages.forget(*iova, *bytes);
            }
            return Err(MemoryError::Gone { iova });
        }
        if pending {
            return Err(MemoryError::Pending);
        }
        let mut data = Vec::with_capacity(into.len());
        let mut messages = messages.into_iter();
        for span in &spans {
            if let Some((ram, offset)) = &span.place {
                let start = data.len();
                data.resize(start + span.bytes as usize, 0);
                ram.device_read(*offset, &mut data[start..]);
                continue;
            }
            let end = data.len() + span.bytes as usize;
            while data.len() < end {
                let (iova, bytes, _) = messages.next().ok_or(MemoryError::Gone { iova })?;
                data.extend(
                    self.messages
                        .take(iova, bytes)
                        .ok_or(MemoryError::Gone { iova })?,
                );
            }
        }
        into.copy_from_slice(&data);
        Ok(())
    }

    fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.put(iova, from, false, false)
    }

    fn write_buffer(&mut self, iova: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.put(iova, from, false, true)
    }

    fn take_refused(&mut self, iova: u64, bytes: u64) -> bool {
        self.messages.take_refused(iova, bytes)
    }

    fn forget_reads(&mut self) {
        self.messages.forget_reads();
    }

    fn forget_reads_of(&mut self, iova: u64, bytes: u64) {
        self.messages.forget_reads_of(iova, bytes);
    }

    fn drop_writes(&mut self, iova: u64, bytes: u64) {
        self.messages.drop_writes(iova, bytes);
    }

    fn arrived(&mut self, iova: u64, bytes: u64) -> Result<bool, MemoryError> {
        self.messages.arrived(iova, bytes).ok_or(MemoryError::Pending)
    }

    fn forget_given_up(&mut self) {
        self.messages.forget_given_up();
    }

    fn load_u32(&mut self, iova: u64) -> Result<u32, MemoryError> {
        let mut bytes = [0; 4];
        self.read(iova, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn store_u32(&mut self, iova: u64, value: u32) -> Result<(), MemoryError> {
        self.put(iova, &value.to_le_bytes(), true, false)
    }

    fn store_u64(&mut self, iova: u64, value: u64) -> Result<(), MemoryError> {
        self.put(iova, &value.to_le_bytes(), true, false)
    }

    fn fence(&mut self) {
        self.steps.access();
    }

    fn settled(&mut self) -> Result<(), MemoryError> {
        self.store_late();
        match self.messages.settled() {
            Ok(true) => Ok(()),
            Ok(false) => Err(MemoryError::Pending),
            Err(iova) => Err(MemoryError::Gone { iova }),
        }
    }

    fn check(&mut self, iova: u64, bytes: u64, direction: Direction) -> Result<(), MemoryError> {
        self.quiet()?;
        let (mut iova, mut left) = (iova, bytes);
        while left > 0 {
            let map = self.find_fresh(iova)?;
            if map.rights & right(direction) == 0 {
                return Err(MemoryError::Denied { iova });
            }
            let part = left.min(map.bytes - (iova - map.iova));
            left -= part;
            if left > 0 {
                iova = iova
                    .checked_add(part)
                    .ok_or(MemoryError::Unmapped { iova: u64::MAX })?;
            }
        }
        Ok(())
    }

    fn newest_map(&self) -> u64 {
        self.newest
    }

    fn newest_map_of(&mut self, iova: u64, bytes: u64) -> u64 {
        let meets = |map: &&MapRecord| {
            map.iova < iova.saturating_add(bytes) && iova < map.iova.saturating_add(map.bytes)
        };
        let numbers = self.maps.values().filter(meets).map(|map| map.number);
        numbers.max().unwrap_or(0)
    }

    fn is_shared(&mut self, iova: u64) -> bool {
        self.find(iova)
            .and_then(|map| self.objects.get(&map.object))
            .is_some_and(|(_, proof)| *proof == Proof::Shared)
    }

    fn prove(&mut self, iova: u64, nonce: u64) -> Result<bool, MemoryError> {
        self.check(iova, 8, Direction::FromGuest)?;
        let map = self.find(iova).ok_or(MemoryError::Unmapped { iova })?;
        let awaited = map.object != 0
            && !self.objects.contains_key(&map.object)
            && self.drained < self.events.unwrap_or(0);
        if nonce != 0 && awaited {
            self.wants_drain = true;
            return Err(MemoryError::Pending);
        }
        if nonce != 0
            && let Some((ram, proof)) = self.objects.get_mut(&map.object)
            && iova - map.iova + 8 <= map.bytes
        {
            let mut bytes = [0; 8];
            ram.device_read(map.offset + (iova - map.iova), &mut bytes);
            if u64::from_le_bytes(bytes) == nonce {
                *proof = Proof::Shared;
                self.messages.forget(iova, 8);
                return Ok(true);
            }
        }
        if let Some((_, proof)) = self.objects.get_mut(&map.object) {
            *proof = Proof::Unproven;
        }
        let mut bytes = [0; 8];
        self.read(iova, &mut bytes)?;
        if u64::from_le_bytes(bytes) != nonce {
            return Err(MemoryError::Gone { iova });
        }
        if let Some((_, proof)) = self.objects.get_mut(&map.object) {
            *proof = Proof::Private;
        }
        Ok(false)
    }
}
