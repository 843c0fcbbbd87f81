//! GARDEN, an honest guest's submissions: what its programs ask for, and where the bytes lie meanwhile.
//!
//! In: what chance wants. Out: submissions in rings, buffers that the device may write. What comes of them stands in completions.rs.

use super::*;

impl Guest {
    /// One action. What it was, for the trace; `None`: nothing could be done.
    pub fn act(&mut self, site: &mut Site<'_>, act: Act) -> Option<String> {
        match act {
            Act::Noop => self.submit(site, CHAT, Opcode::NOOP, Kind::Noop, &[], 0, |_| {}),
            Act::Echo => {
                let ring = site.chance.below(2) as usize;
                let meta: Vec<u8> = (0..site.chance.between(1, 64))
                    .map(|at| at as u8 ^ crate::ram::mark(site.vm.number))
                    .collect();
                self.submit(site, ring, Opcode::ECHO, Kind::Echo, &meta, 64, |_| {})
            }
            Act::Identity => self.submit(site, CHAT, Opcode::IDENTITY, Kind::Identity, &[], 64, |_| {}),
            Act::Publish => {
                let argument = u64::from(site.chance.below(4) != 0);
                let bytes = site.chance.below(2) * argument * 16;
                self.submit(
                    site,
                    CHAT,
                    Opcode::PUBLISH,
                    Kind::Publish,
                    &[],
                    bytes,
                    |submission| {
                        submission.argument = argument;
                    },
                )
            }
            Act::Peers => self.submit(site, CHAT, Opcode::PEERS, Kind::Peers, &[], 512, |_| {}),
            Act::Cancel => {
                let tags: Vec<u32> = self.rings[CHAT]
                    .flights
                    .iter()
                    .filter(|(_, flight)| matches!(flight.kind, Kind::Receive | Kind::Send { .. }))
                    .map(|(tag, _)| *tag)
                    .collect();
                let tag = *site.chance.pick(&tags)?;
                let done = self.submit(site, CHAT, Opcode::CANCEL, Kind::Cancel, &[], 0, |submission| {
                    submission.argument = u64::from(tag);
                })?;
                if let Some(flight) = self.rings[CHAT].flights.get_mut(&tag) {
                    flight.cut = true;
                }
                Some(done)
            }
            Act::Send => {
                let target = *site.chance.pick(site.peers)?;
                self.send(site, target)
            }
            Act::SendHost => self.send(site, HOST),
            Act::SendAll => self.send(site, ALL),
            Act::Receive => {
                let bytes = [128, 200, 600, 1024, 2048][site.chance.below(5) as usize];
                let deadline = if site.chance.permille(150) {
                    site.chance.between(1, 50_000_000)
                } else {
                    0
                };
                self.submit(
                    site,
                    CHAT,
                    Opcode::RECEIVE,
                    Kind::Receive,
                    &[],
                    bytes,
                    |submission| {
                        submission.deadline_ns = deadline;
                    },
                )
            }
            Act::File => self.file(site),
            Act::Reap => {
                let n = site.chance.below(self.rings.len() as u64) as usize;
                let most = site.chance.between(1, 8) as usize;
                self.wake(site, n, false)
                    .then(|| self.reap(site, n, most))
                    .filter(|taken| *taken > 0)
                    .map(|taken| format!("ring {n}: {taken} completions"))
            }
            Act::Sleep => {
                let n = site.chance.below(self.rings.len() as u64) as usize;
                self.sleep(site, n).then(|| format!("ring {n} sleeps"))
            }
            Act::Look => {
                let state = site.vm.register(site.front, abi::STATE);
                if state == abi::DeviceState::FAILED.0 {
                    let cause = site.vm.register(site.front, abi::FAIL_CAUSE);
                    (site.complain)(format!(
                        "VM {}: its device failed: {:?}",
                        site.vm.number,
                        Status(cause as u16)
                    ));
                }
                Some(format!("state {state}"))
            }
            Act::Reset => {
                site.vm.set_register(site.front, abi::CONTROL, abi::CONTROL_RESET);
                self.state = State::Resetting;
                self.dma_ends += 1;
                Some("reset register".into())
            }
            Act::FunctionReset => {
                self.state = State::FunctionReset;
                self.dma_ends += 1;
                if site.chance.permille(500) {
                    site.vm.function_level_reset();
                    return Some("function-level reset".into());
                }
                site.vm.device_reset();
                Some("DEVICE_RESET".into())
            }
            Act::ToggleRing => {
                let n = site.chance.below(self.rings.len() as u64) as usize;
                let ring = &mut self.rings[n];
                if ring.closing || !ring.enabled {
                    return None;
                }
                (ring.enabled, ring.closing) = (false, true);
                let at = abi::RINGS + n as u32 * abi::RING_STRIDE + abi::RING_ENABLE;
                site.vm.set_register(site.front, at, 0);
                Some(format!("ring {n} off"))
            }
            Act::BusMaster => {
                site.vm.bus_master(!self.bus_master);
                self.dma_ends += 1;
                Some(format!("bus master {}", !self.bus_master))
            }
            Act::Plug => {
                if site.vm.maps.contains_key(&PLUGGED) {
                    site.vm.unplug(PLUGGED);
                    Some("unplug".into())
                } else {
                    site.vm.plug(PLUGGED, crate::limits::RAM_BYTES - PLUGGED);
                    Some("plug".into())
                }
            }
            Act::Leave => {
                site.vm.close(site.front);
                site.shadow.leaves(site.vm.number);
                self.state = State::Leaving;
                Some("the process ends".into())
            }
        }
    }

    /// A ring that sleeps is woken by its interrupt alone (or by `force`). True: it is awake.
    pub fn wake(&mut self, site: &Site<'_>, n: usize, force: bool) -> bool {
        let ring = &mut self.rings[n];
        let count = site.vm.eventfds.get(n).map_or(0, |fd| fd.get());
        if ring.sleeping && (force || count != ring.interrupts_seen) {
            ring.sleeping = false;
        }
        ring.interrupts_seen = count;
        !ring.sleeping
    }

    /// Sleeps unless there is a completion.
    pub fn sleep(&mut self, site: &Site<'_>, n: usize) -> bool {
        let ring = &mut self.rings[n];
        if ring.sleeping || !ring.enabled {
            return false;
        }
        ring.interrupts_seen = site.vm.eventfds.get(n).map_or(0, |fd| fd.get());
        ring.arm(&site.vm.ram);
        ring.sleeping = !ring.has_completion(&site.vm.ram);
        ring.sleeping
    }

    fn send(&mut self, site: &mut Site<'_>, target: u64) -> Option<String> {
        let bytes = match site.chance.below(6) {
            0 => site.chance.between(4097, 7000),
            1 => site.chance.between(600, 4096),
            _ => site.chance.between(HEAD_BYTES as u64, 300),
        };
        if !self.rings[CHAT].enabled || !self.rings[CHAT].has_room(&site.vm.ram) {
            return None;
        }
        let (first, buffers) = self.allocate(site, bytes, true)?;
        let (number, body) = site.shadow.send(site.vm.number, target, bytes as usize);
        let at = ARENA + first as u64 * BUFFER_BYTES;
        site.vm.ram.write(at, &body);
        let kind = Kind::Send {
            number,
            plugged: at + bytes > PLUGGED,
        };
        let submission = Submission {
            opcode: Opcode::SEND.0,
            handle: target,
            buffer: at,
            length: bytes,
            ..Submission::default()
        };
        let flight = Flight {
            kind,
            first,
            buffers,
            data: at,
            data_bytes: bytes,
            meta: Vec::new(),
            cut: false,
            dma: None,
        };
        self.publish(site, CHAT, submission, flight);
        Some(format!("sends number {number} to {target:#x}, {bytes} bytes"))
    }

    fn file(&mut self, site: &mut Site<'_>) -> Option<String> {
        if !self.rings[FILES].enabled || !self.rings[FILES].has_room(&site.vm.ram) {
            return None;
        }
        let (step, request) = self.files.next(site.shadow, site.chance)?;
        let bytes = (request.meta.len() + request.data.len()) as u64;
        let room = bytes.max(1);
        let Some((first, buffers)) = self.allocate(site, room, !request.into_guest) else {
            self.files.put_back(step);
            return None;
        };
        let at = ARENA + first as u64 * BUFFER_BYTES;
        site.vm.ram.write(at, &request.meta);
        let data = at + request.meta.len() as u64;
        if request.into_guest {
            site.vm.ram.expect(data, request.data.len() as u64);
        } else {
            site.vm.ram.write(data, &request.data);
        }
        let submission = Submission {
            opcode: request.opcode.0,
            flags: request.flags,
            handle: request.handle,
            offset: request.offset,
            argument: request.argument,
            buffer: if bytes == 0 { 0 } else { at },
            length: bytes,
            meta_bytes: request.meta.len() as u32,
            ..Submission::default()
        };
        let what = format!("file: {step:?}");
        let flight = Flight {
            kind: Kind::File(step),
            first,
            buffers,
            data,
            data_bytes: request.data.len() as u64,
            meta: request.meta,
            cut: false,
            dma: None,
        };
        self.publish(site, FILES, submission, flight);
        Some(what)
    }

    /// Something that its programs do about offers; `ends`: only what ends what there is.
    pub fn offer(&mut self, site: &mut Site<'_>, ends: bool) -> Option<String> {
        if !self.rings[FILES].enabled || !self.rings[FILES].has_room(&site.vm.ram) {
            return None;
        }
        if !ends && site.chance.permille(100) {
            return self.withdraw(site);
        }
        let (step, request) = if ends {
            self.offers.wind_down(site.shadow, site.chance)
        } else {
            self.offers.next(site.shadow, site.chance, site.peers)
        }?;
        let (opcode, kind) = (request.opcode, Kind::Offer(step));
        let fill = |submission: &mut Submission| {
            submission.handle = request.handle;
            submission.offset = request.offset;
            submission.deadline_ns = request.deadline_ns;
        };
        let done = self.submit(site, FILES, opcode, kind, &request.meta, request.room, fill);
        if done.is_none() {
            self.offers.put_back(site.shadow, step);
        }
        done.map(|what| format!("{what}: {step:?}"))
    }

    /// Cancels an offer of its own.
    fn withdraw(&mut self, site: &mut Site<'_>) -> Option<String> {
        let is_offer = |flight: &Flight| matches!(flight.kind, Kind::Offer(OfferStep::Offer(_)));
        let mut flights = self.rings[FILES].flights.iter();
        let tag = *flights.find(|(_, flight)| is_offer(flight))?.0;
        let fill = |submission: &mut Submission| submission.argument = u64::from(tag);
        let done = self.submit(site, FILES, Opcode::CANCEL, Kind::Cancel, &[], 0, fill)?;
        if let Some(flight) = self.rings[FILES].flights.get_mut(&tag) {
            flight.cut = true;
        }
        Some(done)
    }

    #[allow(clippy::too_many_arguments)] // one submission, spelled out by its callers
    fn submit(
        &mut self,
        site: &mut Site<'_>,
        n: usize,
        opcode: Opcode,
        kind: Kind,
        meta: &[u8],
        data_bytes: u64,
        fill: impl FnOnce(&mut Submission),
    ) -> Option<String> {
        if !self.rings[n].enabled || !self.rings[n].has_room(&site.vm.ram) {
            return None;
        }
        let bytes = meta.len() as u64 + data_bytes;
        let (first, buffers) = self.allocate(site, bytes.max(1), false)?;
        let at = ARENA + first as u64 * BUFFER_BYTES;
        site.vm.ram.write(at, meta);
        let data = at + meta.len() as u64;
        if matches!(kind, Kind::Publish) {
            site.vm.ram.write(data, &vec![b'x'; data_bytes as usize]);
        } else if data_bytes > 0 {
            site.vm.ram.expect(data, data_bytes);
        }
        let mut submission = Submission {
            opcode: opcode.0,
            buffer: if bytes == 0 { 0 } else { at },
            length: bytes,
            meta_bytes: meta.len() as u32,
            ..Submission::default()
        };
        fill(&mut submission);
        let what = format!("ring {n}: {opcode:?}");
        let flight = Flight {
            cut: submission.deadline_ns != 0,
            kind,
            first,
            buffers,
            data,
            data_bytes,
            meta: meta.to_vec(),
            dma: None,
        };
        self.publish(site, n, submission, flight);
        Some(what)
    }

    fn publish(&mut self, site: &mut Site<'_>, n: usize, mut submission: Submission, mut flight: Flight) {
        flight.dma = self.bus_master.then_some(self.dma_ends);
        submission.tag = self.next_tag;
        self.next_tag = self.next_tag.wrapping_add(1);
        let suppression = site.suppression && !site.vm.unshared;
        self.rings[n].submit(&site.vm.ram, &submission, suppression, flight);
        if site.chance.permille(700) {
            self.doorbells(site);
        }
    }

    /// Finds free buffers in a row; above [`PLUGGED`] only for what is read by the device, and only while it is plugged.
    fn allocate(&mut self, site: &mut Site<'_>, bytes: u64, anywhere: bool) -> Option<(usize, usize)> {
        let buffers = bytes.div_ceil(BUFFER_BYTES) as usize;
        let below = ((PLUGGED - ARENA) / BUFFER_BYTES) as usize;
        let high =
            anywhere && site.chance.permille(300) && site.vm.maps.get(&PLUGGED).is_some_and(|map| map.told);
        let range = if high { below..BUFFERS } else { 0..below };
        let first = range.clone().find(|first| {
            first + buffers <= range.end && !self.used[*first..first + buffers].contains(&true)
        })?;
        self.used[first..first + buffers].fill(true);
        Some((first, buffers))
    }

    pub(super) fn free(&mut self, site: &Site<'_>, flight: &Flight) {
        site.vm.ram.forbid(flight.data);
        let at = ARENA + flight.first as u64 * BUFFER_BYTES;
        // Whoever reads it later finds this VM's mark and nothing else.
        let blank = vec![crate::ram::mark(site.vm.number); flight.buffers * BUFFER_BYTES as usize];
        site.vm.ram.write(at, &blank);
        self.used[flight.first..flight.first + flight.buffers].fill(false);
    }
}
