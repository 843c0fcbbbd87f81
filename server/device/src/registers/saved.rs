//! The function packed for a hand-over, and unpacked again.
//!
//! In: a [`Function`]; or a [`SavedFunction`] of this or another version, checked like a peer's bytes. Out: the other of both. The front
//! page stays where it is and is not part of it. Must never know: the format that the saved form is written in.

use super::config_space::ConfigSpace;
use super::dma_table::{DmaTable, Mapped};
use super::fences::{AttachedCore, Cores, Held};
use super::function::{Function, Ring};
use super::interrupts::{Interrupts, SavedInterrupts};
use super::limits;
use super::msix_table::MsixTable;
use super::port_window::PortWindow;
use super::settings::{Settings, SettingsError};
use crate::page::{CorePage, FrontPage, MapRecord, RingSetup, Words};
use crate::tick::Tick;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vmgmt_abi::Status;
use vmgmt_abi::registers::RingState;

/// The state between two calls, all outputs polled.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedFunction {
    settings: Settings,
    /// The writable bits of configuration space.
    #[serde(with = "serde_bytes")]
    config: Vec<u8>,
    interrupts: SavedInterrupts,
    #[serde(with = "serde_bytes")]
    msix: Vec<u8>,
    maps: Vec<(usize, MapRecord)>,
    next_map_number: u64,
    port: PortWindow,
    rings: Vec<SavedRing>,
    interrupt_enable: u32,
    host_page: u64,
    bad_accesses: u32,
    activated: bool,
    failed: Option<u16>,
    frozen: bool,
    quarantined: bool,
    held: Vec<Held>,
    reset_fence: Option<u64>,
    gone_fence: Option<u64>,
    gone: bool,
    look_again: Tick,
    /// Core lives not known to be dead, oldest first, and the fence that has passed in each.
    cores: Vec<(u64, u64)>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct SavedRing {
    setup: RingSetup,
    enabled: bool,
    closing: Option<u64>,
    answer: Option<(u32, u16)>,
}

/// Why a saved function cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    #[error("saved function: {0}")]
    Settings(#[from] SettingsError),
    #[error("saved function: {0}")]
    Contradiction(&'static str),
    #[error("saved function: no core page was given for core life {0}")]
    CorePage(u64),
}

impl From<&'static str> for RestoreError {
    fn from(what: &'static str) -> Self {
        Self::Contradiction(what)
    }
}

impl SavedFunction {
    /// The core lives whose pages [`Function::restore`] wants.
    pub fn core_lives(&self) -> impl Iterator<Item = u64> {
        self.cores.iter().map(|(life, _)| *life)
    }
}

impl<W: Words> Function<W> {
    /// Packs the function; `None` while outputs are not polled.
    pub fn save(&self) -> Option<SavedFunction> {
        let Self {
            settings,
            page: _,
            cores,
            config,
            interrupts,
            msix,
            table,
            port,
            rings,
            interrupt_enable,
            host_page,
            bad_accesses,
            activated,
            failed,
            frozen,
            quarantined,
            held,
            reset_fence,
            // The connection's to know: told after the restore and before each input.
            messages_out: _,
            gone_fence,
            gone,
            touched,
            output,
            look_again,
        } = self;
        if *touched || !output.is_empty() {
            return None;
        }
        Some(SavedFunction {
            settings: settings.clone(),
            config: config.writable_bytes(),
            interrupts: interrupts.save(),
            msix: msix.bytes().to_vec(),
            maps: table.maps().map(|mapped| (mapped.slot, mapped.record)).collect(),
            next_map_number: table.next_number(),
            port: port.clone(),
            rings: rings.iter().map(SavedRing::from).collect(),
            interrupt_enable: *interrupt_enable,
            host_page: *host_page,
            bad_accesses: *bad_accesses,
            activated: *activated,
            failed: failed.map(|cause| cause.0),
            frozen: *frozen,
            quarantined: *quarantined,
            held: held.iter().copied().collect(),
            reset_fence: *reset_fence,
            gone_fence: *gone_fence,
            gone: *gone,
            look_again: *look_again,
            cores: cores.all().iter().map(|core| (core.life, core.passed)).collect(),
        })
    }

    /// Unpacks a function onto its front page; `core_pages` are the mapped core pages of [`SavedFunction::core_lives`].
    ///
    /// # Errors
    /// What contradicts: the saved state itself, or the front page.
    pub fn restore(saved: SavedFunction, words: W, core_pages: &[(u64, W)]) -> Result<Self, RestoreError> {
        let SavedFunction {
            settings,
            config: config_bytes,
            interrupts,
            msix,
            maps,
            next_map_number,
            port,
            rings,
            interrupt_enable,
            host_page,
            bad_accesses,
            activated,
            failed,
            frozen,
            quarantined,
            held,
            reset_fence,
            gone_fence,
            gone,
            look_again,
            cores,
        } = saved;
        settings.check()?;
        let page = FrontPage::new(words);
        if !page.is_valid() || page.session() != settings.session || page.vm() != settings.vm {
            return Err("the front page is another session's".into());
        }
        if rings.len() != usize::from(settings.rings)
            || !port.is_valid()
            || cores.len() > limits::CORE_LIVES_MAX
        {
            return Err("rings, port window or core lives are out of range".into());
        }
        let fence = page.fence();
        let fences = held
            .iter()
            .map(|held| held.fence)
            .chain(reset_fence)
            .chain(gone_fence);
        if fences.max().is_some_and(|highest| highest > fence) || !held.is_sorted_by_key(|held| held.fence) {
            return Err("something waits for a fence that was never moved".into());
        }
        let mut config = ConfigSpace::new(&settings);
        // No bit that asks for a reset is a writable one, so none can be asked for here.
        let _ = config.write(0, &config_bytes);
        let mapped: Vec<Mapped> = maps
            .into_iter()
            .map(|(slot, record)| Mapped { slot, record })
            .collect();
        if mapped
            .iter()
            .any(|mapped| page.map(mapped.slot) != Some(mapped.record))
        {
            return Err("the front page's maps are not the saved ones".into());
        }
        let maps_max = page.maps_max().min(settings.maps_max as usize);
        let table = DmaTable::new(maps_max, settings.mapped_bytes_max, settings.objects_max as usize)
            .restore(&mapped, next_map_number)?;
        let mut attached = Vec::new();
        for (life, passed) in cores {
            let words = core_pages
                .iter()
                .find(|(given, _)| *given == life)
                .map(|(_, words)| words.clone());
            let page = CorePage::new(words.ok_or(RestoreError::CorePage(life))?);
            attached.push(AttachedCore {
                life,
                page,
                passed: passed.min(fence),
            });
        }
        Ok(Self {
            config,
            interrupts: Interrupts::new(settings.msix, settings.vectors).restore(&interrupts)?,
            msix: MsixTable::new(settings.vectors).restore(&msix)?,
            table,
            port,
            rings: rings.iter().map(Ring::from).collect(),
            cores: Cores::new(attached),
            interrupt_enable: interrupt_enable & ((1u32 << settings.vectors) - 1),
            host_page,
            bad_accesses,
            activated,
            failed: failed.map(Status),
            frozen,
            quarantined,
            held: held.into(),
            reset_fence,
            messages_out: false,
            gone_fence,
            gone,
            touched: false,
            output: VecDeque::new(),
            look_again,
            settings,
            page,
        })
    }
}

impl From<&Ring> for SavedRing {
    fn from(ring: &Ring) -> Self {
        let Ring {
            setup,
            enabled,
            closing,
            answer,
        } = ring;
        Self {
            setup: *setup,
            enabled: *enabled,
            closing: *closing,
            answer: answer.map(|(state, status)| (state.0, status.0)),
        }
    }
}

impl From<&SavedRing> for Ring {
    fn from(saved: &SavedRing) -> Self {
        let SavedRing {
            setup,
            enabled,
            closing,
            answer,
        } = saved;
        Self {
            setup: *setup,
            enabled: *enabled,
            closing: *closing,
            answer: answer.map(|(state, status)| (RingState(state), Status(status))),
        }
    }
}
