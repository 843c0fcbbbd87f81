//! GARDEN, an honest guest's completions: what it was told, held against what the contract with guests promises.
//!
//! In: completions of its rings. Out: complaints; what came of sends and files goes to the shadow.

use super::*;

impl Guest {
    /// Takes at most so many completions.
    pub fn reap(&mut self, site: &mut Site<'_>, n: usize, most: usize) -> usize {
        let mut taken = 0;
        while taken < most
            && let Some(completion) = self.rings[n].take(&site.vm.ram)
        {
            taken += 1;
            site.shadow.completions += 1;
            // (One that has left looks once more at what was there.)
            if !matches!(self.state, State::Leaving | State::Off) {
                site.shadow.is_heard(site.vm.number);
            }
            let Some(flight) = self.rings[n].flights.remove(&completion.tag) else {
                (site.complain)(format!(
                    "VM {} ring {n}: a completion for nothing in flight: {completion:?}",
                    site.vm.number
                ));
                continue;
            };
            self.completed(site, n, &flight, &completion);
            self.free(site, &flight);
        }
        taken
    }

    fn completed(&mut self, site: &mut Site<'_>, n: usize, flight: &Flight, completion: &Completion) {
        let status = Status(completion.status);
        let mut data = vec![0; flight.data_bytes as usize];
        site.vm.ram.read(flight.data, &mut data);
        let cut = flight.cut && matches!(status, Status::CANCELLED | Status::TIMED_OUT);
        let unexpected = |site: &Site<'_>, what: &str| {
            (site.complain)(format!(
                "VM {} ring {n}: {what}: {:?} ended as {status:?} with {completion:?}",
                site.vm.number, flight.kind
            ));
        };
        // Bus mastering was off, or is now. Where the operator has frozen the VM, it waits for the thaw.
        if status == Status::NOT_READY && flight.dma == Some(self.dma_ends) {
            unexpected(site, "NOT_READY while there was DMA");
        }
        match &flight.kind {
            Kind::Noop | Kind::Cancel | Kind::Publish | Kind::Peers | Kind::Identity => {
                // A description is kept, and the memory for that may be nearly full.
                let no_room = matches!(flight.kind, Kind::Publish)
                    && (status, completion.detail) == (Status::OVER_BUDGET, Budget::STATE_BYTES.0);
                if status != Status::OK && !cut && !no_room {
                    unexpected(site, "not OK");
                }
                if matches!(flight.kind, Kind::Identity)
                    && status == Status::OK
                    && completion.result != site.vm.number
                {
                    unexpected(site, "the wrong identity");
                }
            }
            Kind::Echo => {
                if status == Status::OK && data.get(..flight.meta.len()) != Some(&flight.meta) {
                    unexpected(site, "no echo");
                } else if status != Status::OK && !cut {
                    unexpected(site, "not OK");
                }
            }
            Kind::Send { number, plugged } => {
                let fate = match status {
                    Status::OK => Fate::Done,
                    Status::OUTCOME_UNKNOWN => Fate::Unknown,
                    Status::BAD_ADDRESS if *plugged => Fate::Refused,
                    Status::OVER_BUDGET
                    | Status::PEER_ABSENT
                    | Status::DENIED
                    | Status::NO_SUCH_NAME
                    | Status::NOT_READY => Fate::Refused,
                    _ if cut => Fate::Refused,
                    _ => {
                        unexpected(site, "no such end of a send");
                        Fate::Refused
                    }
                };
                site.shadow.sent(site.vm.number, *number, fate, completion.result);
            }
            Kind::Receive => {
                if status == Status::OK {
                    self.received(site, &data, completion);
                } else if !cut && status != Status::OVER_BUDGET {
                    unexpected(site, "not OK");
                }
            }
            Kind::File(step) => {
                let more = completion.flags & completion_flag::MORE != 0;
                let plugged = flight.data >= PLUGGED;
                let complaint = self.files.completed(
                    site.shadow,
                    step,
                    (status, completion.result, completion.extra, more),
                    &data,
                    plugged,
                );
                if let Some(complaint) = complaint {
                    unexpected(site, &complaint);
                }
            }
            Kind::Offer(step) => {
                let said = (status, completion.result);
                let complaint = self.offers.completed(site.shadow, *step, said, &data, flight.cut);
                if let Some(complaint) = complaint {
                    unexpected(site, &complaint);
                }
            }
        }
    }

    fn received(&mut self, site: &mut Site<'_>, data: &[u8], completion: &Completion) {
        let bad = |what: &str| {
            (site.complain)(format!(
                "VM {}: RECEIVE gave {what}: {completion:?}",
                site.vm.number
            ));
        };
        let bytes = completion.result as usize;
        let Some(data) = data
            .get(..bytes)
            .filter(|data| data.len() >= size_of::<chat::MessageHeader>())
        else {
            return bad("more than its buffer, or less than a header");
        };
        let word = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n| data[at + n]));
        let (sequence, source, message_bytes) = (word(0), word(8), word(16));
        let name_bytes = (word(32) & 0xffff_ffff) as usize;
        let flags = (word(32) >> 32) as u32;
        let part = data.get(40 + name_bytes..).unwrap_or_default();
        if flags & chat::message_flag::CONTINUED == 0 {
            if let Some((source, sequence, _)) = &self.partial {
                bad(&format!("a new message before the end of {sequence} of {source}"));
            }
            self.partial = Some((source, sequence, Vec::new()));
        }
        let Some((from, number, whole)) = &mut self.partial else {
            return bad("a part of a message without its start");
        };
        if (*from, *number) != (source, sequence) {
            return bad("a part of another message");
        }
        whole.extend_from_slice(part);
        if completion.flags & completion_flag::MORE == 0 {
            let whole = std::mem::take(whole);
            self.partial = None;
            if whole.len() as u64 != message_bytes {
                bad("another length than its header says");
            }
            site.shadow.deliver(site.vm.number, source, &whole);
        }
    }
}
