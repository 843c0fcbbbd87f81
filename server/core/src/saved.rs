//! ATTIC: VMs and submissions packed and unpacked. As `state.rs`, which packs the whole.

use crate::budgets::{Bucket, LogLimiter};
use crate::office::{Counters, Flight, Office, Vm, Wait};
use crate::state::RestoreError;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vmgmt_abi::{Mode, Opcode};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Fetched, Token};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct SavedVm {
    pub(crate) vm: u64,
    pub(crate) submission_rate: Bucket,
    pub(crate) byte_rate: Bucket,
    pub(crate) delayed: Vec<(Tick, SavedFetched)>,
    pub(crate) receives: Vec<Token>,
    pub(crate) next_offers: Vec<Token>,
    pub(crate) offers_in: Vec<u64>,
    pub(crate) log: LogLimiter,
    pub(crate) counters: Counters,
    pub(crate) expiry: Option<Tick>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct SavedFetched {
    pub(crate) token: Token,
    pub(crate) mode: u32,
    pub(crate) opcode: u16,
    pub(crate) flags: u16,
    pub(crate) tag: u32,
    pub(crate) handle: u64,
    pub(crate) offset: u64,
    pub(crate) argument: u64,
    pub(crate) deadline: Tick,
    pub(crate) meta: Vec<u8>,
    pub(crate) data_bytes: u64,
    pub(crate) data: Option<Vec<u8>>,
    pub(crate) again: bool,
}

pub(crate) fn save_vm(vm: u64, entry: &Vm) -> SavedVm {
    let Vm {
        limits: _,
        reach: _,
        sessions: _,
        flights: _,
        bytes_in_flight: _,
        submission_rate,
        byte_rate,
        delayed,
        open_files: _,
        receives,
        next_offers,
        offers_in,
        offers_out: _,
        log,
        counters,
        expiry,
        ahead_bytes: _,
    } = entry;
    SavedVm {
        vm,
        submission_rate: *submission_rate,
        byte_rate: *byte_rate,
        delayed: delayed
            .iter()
            .map(|(at, fetched)| (*at, save_fetched(fetched)))
            .collect(),
        receives: receives.iter().copied().collect(),
        next_offers: next_offers.iter().copied().collect(),
        offers_in: offers_in.iter().copied().collect(),
        log: log.clone(),
        counters: *counters,
        expiry: *expiry,
    }
}

pub(crate) fn restore_vm(office: &mut Office, saved: SavedVm) -> Result<(), RestoreError> {
    let SavedVm {
        vm,
        submission_rate,
        byte_rate,
        delayed,
        receives,
        next_offers,
        offers_in,
        log,
        counters,
        expiry,
    } = saved;
    let account = office
        .ledger
        .vms
        .get(&vm)
        .ok_or("a VM is not known to the ledger")?;
    let entry = Vm {
        limits: account.config.limits.clone(),
        submission_rate,
        byte_rate,
        delayed: delayed
            .into_iter()
            .map(|(at, fetched)| (at, restore_fetched(fetched)))
            .collect(),
        receives: receives.into(),
        next_offers: next_offers.into(),
        offers_in: offers_in.into(),
        log,
        counters,
        expiry,
        ..Vm::default()
    };
    if office.vms.insert(vm, entry).is_some() {
        return Err("a VM is there twice".into());
    }
    Ok(())
}

pub(crate) fn restore_flights(
    office: &mut Office,
    flights: Vec<(Token, Flight)>,
) -> Result<(), RestoreError> {
    for (token, flight) in flights {
        if office.vm_of(token) != Some(flight.vm) {
            return Err("a submission is of no session".into());
        }
        let entry = office.vms.get_mut(&flight.vm).ok_or("a submission is of no VM")?;
        entry.flights += 1;
        entry.ahead_bytes = entry.ahead_bytes.saturating_add(flight.ahead_bytes);
        office.ahead_bytes = office.ahead_bytes.saturating_add(flight.ahead_bytes);
        entry.bytes_in_flight = entry.bytes_in_flight.saturating_add(flight.charged_bytes);
        if office.flights.insert(token, flight).is_some() {
            return Err("a submission is there twice".into());
        }
    }
    let waits = |token: &Token, wait: Wait| {
        office
            .flights
            .get(token)
            .is_some_and(|flight| flight.wait == wait)
    };
    for entry in office.vms.values() {
        let good = entry.receives.iter().all(|token| waits(token, Wait::Receive))
            && entry
                .next_offers
                .iter()
                .all(|token| waits(token, Wait::NextOffer))
            && entry
                .delayed
                .iter()
                .all(|(_, fetched)| waits(&fetched.token, Wait::Rate));
        if !good {
            return Err("a queue holds a submission that does not wait in it".into());
        }
    }
    Ok(())
}

pub(crate) fn save_queue(queue: &VecDeque<Box<Fetched>>) -> Vec<SavedFetched> {
    queue.iter().map(|fetched| save_fetched(fetched)).collect()
}

pub(crate) fn save_fetched(fetched: &Fetched) -> SavedFetched {
    let Fetched {
        token,
        mode,
        opcode,
        flags,
        tag,
        handle,
        offset,
        argument,
        deadline,
        meta,
        data_bytes,
        data,
        again,
    } = fetched;
    SavedFetched {
        token: *token,
        mode: mode.0,
        opcode: opcode.0,
        flags: *flags,
        tag: *tag,
        handle: *handle,
        offset: *offset,
        argument: *argument,
        deadline: *deadline,
        meta: meta.clone(),
        data_bytes: *data_bytes,
        data: data.clone(),
        again: *again,
    }
}

pub(crate) fn restore_fetched(saved: SavedFetched) -> Box<Fetched> {
    let SavedFetched {
        token,
        mode,
        opcode,
        flags,
        tag,
        handle,
        offset,
        argument,
        deadline,
        meta,
        data_bytes,
        data,
        again,
    } = saved;
    let (mode, opcode) = (Mode(mode), Opcode(opcode));
    Box::new(Fetched {
        token,
        mode,
        opcode,
        flags,
        tag,
        handle,
        offset,
        argument,
        deadline,
        meta,
        data_bytes,
        data,
        again,
    })
}
