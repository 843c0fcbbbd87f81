//! OFFICE: the operator's requests. In: [`ControlRequest`]s. Out: replies, and what they set going in the rooms.
//! It never knows the operator's connection but by its number.

use crate::deadlines::Timer;
use crate::effect::Effect;
use crate::effects::Continuation;
use crate::hub::Hub;
use crate::interface::{ControlReply, ControlRequest, VmStatus};
use crate::ledger::books::ahead;
use crate::limits::HOST_MESSAGE_BYTES_MAX;
use crate::modes::chat::{Listener, host_refusal};
use crate::modes::names;
use crate::modes::offers::{HostFile, OfferSource, reply, reply_failed};
use crate::modes::streams::Party;
use crate::refusal::Refusal;
use vmgmt_abi::Status;
use vmgmt_abi::chat::{HOST_NAME, PEER_HOST};
use vmgmt_abi::file::SIZE_UNKNOWN;
use vmgmt_device::Tick;

impl Hub {
    pub(crate) fn control(&mut self, client: u64, id: u64, request: ControlRequest) {
        match request {
            ControlRequest::Vms | ControlRequest::Peers => {
                let vms = self.vm_statuses();
                reply(&mut self.office, client, id, ControlReply::Vms(vms), true);
            }
            ControlRequest::Send { target, message, key } => {
                self.control_send(client, id, &target, message, key)
            }
            ControlRequest::Receive { follow, wait_ns } => {
                let deadline = if follow {
                    Tick::NEVER
                } else {
                    self.office.now.after_ns(wait_ns)
                };
                self.chat.listen(
                    &mut self.office,
                    Listener {
                        client,
                        id,
                        follow,
                        deadline,
                    },
                );
            }
            ControlRequest::Push {
                target,
                file,
                size,
                name,
                wait_ns,
                key,
            } => {
                let source = OfferSource::Push(HostFile {
                    client,
                    id,
                    slot: file,
                    key,
                });
                self.control_offer(source, &target, name, size, wait_ns);
            }
            ControlRequest::Pull {
                source,
                path,
                file,
                wait_ns,
                key,
            } => {
                let pull = OfferSource::Pull(HostFile {
                    client,
                    id,
                    slot: file,
                    key,
                });
                self.control_offer(pull, &source, path, SIZE_UNKNOWN, wait_ns);
            }
        }
    }

    fn control_send(&mut self, client: u64, id: u64, target: &str, message: Vec<u8>, key: u64) {
        if message.len() > HOST_MESSAGE_BYTES_MAX {
            let text = format!(
                "a message of the host has at most {HOST_MESSAGE_BYTES_MAX} bytes; send a file instead (push)"
            );
            reply_failed(&mut self.office, client, id, Status::TOO_LARGE.0, text);
            return;
        }
        match self.chat.host_send(&mut self.office, target, message, key) {
            Ok(number) => {
                // The guest first: who waits for the answer is often not the operator.
                self.chat.dispatch_after(&mut self.office);
                reply(&mut self.office, client, id, ControlReply::Sent { number }, true);
            }
            Err(refusal) => {
                let (status, text) = host_refusal(refusal, target);
                reply_failed(&mut self.office, client, id, status, text);
            }
        }
    }

    fn control_offer(&mut self, source: OfferSource, target: &str, name: String, size: u64, wait_ns: u64) {
        let (OfferSource::Push(file) | OfferSource::Pull(file)) = source else {
            return;
        };
        let number = self.office.ledger.number(target);
        if self
            .transfers
            .take_up(&mut self.office, source, number, size, wait_ns)
        {
            return;
        }
        let room = ahead::host_transfer(name.len());
        let room = self.office.has_room(PEER_HOST, room, true);
        let found = match number {
            _ if names::offered(name.as_bytes()).is_err() => Err(Refusal::Name),
            _ if matches!(source, OfferSource::Push(_)) && size > crate::limits::FILE_OFFSET_MAX => {
                Err(Refusal::Field)
            }
            None => Err(Refusal::PeerAbsent),
            Some(_) if room.is_err() => Err(Refusal::StateBytes),
            Some(vm) => match self.office.vms.get(&vm) {
                Some(entry) if entry.offers_in.len() < entry.limits.offers_max as usize => Ok(vm),
                _ => Err(Refusal::Offers),
            },
        };
        match found {
            Ok(vm) => self
                .transfers
                .host_offer(&mut self.office, source, vm, name, size, wait_ns),
            Err(refusal) => {
                self.office
                    .effect(0, Effect::Close { slot: file.slot }, Continuation::Nothing);
                let (status, text) = host_refusal(refusal, target);
                reply_failed(&mut self.office, file.client, file.id, status, text);
            }
        }
    }

    pub(crate) fn control_closed(&mut self, client: u64) {
        self.chat.client_gone(&mut self.office, client);
        self.transfers.client_gone(&mut self.office, client);
    }

    pub(crate) fn control_timer(&mut self, timer: Timer) {
        match timer {
            Timer::ControlReceive { client, id } => {
                self.chat.listener_timed_out(&mut self.office, client, id)
            }
            Timer::ControlOffer { offer } => {
                self.transfers
                    .fail_offer(&mut self.office, offer, Status::TIMED_OUT.0)
            }
            Timer::ControlStream { stream } => self.transfers.nobody_came(&mut self.office, stream),
            _ => {}
        }
    }

    /// All VMs, for the operator.
    #[must_use]
    pub fn vm_statuses(&self) -> Vec<VmStatus> {
        self.office
            .ledger
            .vms
            .keys()
            .filter_map(|vm| self.vm_status(vm))
            .collect()
    }

    fn vm_status(&self, vm: u64) -> Option<VmStatus> {
        let account = self.office.ledger.vms.get(&vm)?;
        let entry = self.office.vms.get(&vm)?;
        let (mailbox_messages, mailbox_bytes) = account.mailbox.usage();
        let at = |party: Party| matches!(party, Party::Vm { vm: number, .. } if number == vm);
        let transfers = self
            .transfers
            .streams
            .values()
            .filter(|stream| at(stream.source) || at(stream.target));
        let counters = entry.counters;
        debug_assert_ne!(account.config.name, HOST_NAME);
        Some(VmStatus {
            vm,
            name: account.config.name.clone(),
            sessions: entry.sessions.iter().copied().collect(),
            published: account.presence.is_some(),
            description: account
                .presence
                .as_ref()
                .map(|presence| presence.description.clone())
                .unwrap_or_default(),
            receives_posted: entry.receives.len() as u64,
            mailbox_messages,
            mailbox_bytes,
            open_files: u64::from(entry.open_files),
            transfers: transfers.count() as u64,
            submissions: counters.submissions,
            messages_sent: counters.messages_sent,
            messages_delivered: counters.messages_delivered,
            messages_dropped: counters.messages_dropped,
            bytes_from_vm: counters.bytes_from_vm,
            bytes_to_vm: counters.bytes_to_vm,
            refusals: counters.refusals,
        })
    }
}
