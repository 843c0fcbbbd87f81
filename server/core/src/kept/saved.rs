//! What is kept, packed and unpacked; what comes back is checked as a stranger's would be.

use super::{
    HostResult, HostStage, Intent, Kept, KeptFile, KeptHost, KeptOffer, KeptPut, KeptStream, Settled, feature,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use vmgmt_device::rings::Token;

/// As it is saved.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SavedKept {
    settled: Vec<Settled>,
    intents: Vec<(Token, Intent)>,
    files: Vec<(u64, KeptFile)>,
    puts: Vec<(u64, KeptPut)>,
    offers: Vec<(u64, KeptOffer)>,
    streams: Vec<(u64, KeptStream)>,
    #[serde(default)]
    host: Vec<(u64, KeptHost)>,
    #[serde(default)]
    host_results: Vec<HostResult>,
}

impl SavedKept {
    /// What of it is in use, by name.
    #[must_use]
    pub fn features(&self) -> BTreeSet<&'static str> {
        let Self {
            settled,
            intents,
            files,
            puts,
            offers,
            streams,
            host,
            host_results: _, // who asks again is told by the next core that nothing is known of it
        } = self;
        let in_use = [
            (feature::SETTLED_ANSWERS, !settled.is_empty()),
            (feature::NAME_OPERATIONS, !intents.is_empty()),
            (feature::OPEN_FILES, !files.is_empty()),
            (feature::PUTS, !puts.is_empty()),
            (feature::TRANSFERS, !offers.is_empty() || !streams.is_empty()),
            (feature::OPERATOR_TRANSFERS, !host.is_empty()),
        ];
        let in_use = in_use.into_iter().filter(|(_, in_use)| *in_use);
        in_use.map(|(name, _)| name).collect()
    }
}

impl Kept {
    /// Without the sends that were accepted: see [`Kept::sends`].
    #[must_use]
    pub fn save(&self) -> SavedKept {
        let Self {
            settled,
            intents,
            files,
            puts,
            offers,
            streams,
            host,
            host_results,
        } = self;
        SavedKept {
            settled: settled.values().filter(|entry| !entry.send).cloned().collect(),
            intents: intents
                .iter()
                .map(|(token, intent)| (*token, intent.clone()))
                .collect(),
            files: pairs(files),
            puts: pairs(puts),
            offers: pairs(offers),
            streams: pairs(streams),
            host: pairs(host),
            host_results: host_results.iter().copied().collect(),
        }
    }

    /// Sends that were accepted and whose answer is not known to be published, as version 1 keeps them too: token, tag, result.
    pub fn sends(&self) -> impl Iterator<Item = (Token, u32, u64)> {
        let sends = self.settled.values().filter(|entry| entry.send);
        sends.map(|entry| (entry.token, entry.tag, entry.answer.result))
    }

    /// # Errors
    /// What is wrong with the saved state.
    pub fn restore(saved: SavedKept) -> Result<Self, &'static str> {
        let SavedKept {
            settled,
            intents,
            files,
            puts,
            offers,
            streams,
            host,
            host_results,
        } = saved;
        let sound = |put: &KeptPut| put.coverage.is_sound() && put.extent <= crate::limits::FILE_OFFSET_MAX;
        if !puts.iter().all(|(_, put)| sound(put)) {
            return Err("a put has ranges that no file has");
        }
        let mut numbers = BTreeSet::new();
        let ends = streams
            .iter()
            .flat_map(|(_, stream)| [stream.source.handle, stream.target.handle]);
        let handles = files.iter().map(|(handle, _)| *handle);
        let host_ends = host.iter().filter_map(|(_, kept)| match &kept.stage {
            HostStage::Streaming(stream) => Some(stream.end.handle),
            HostStage::Offered(_) => None,
        });
        let handles = handles
            .chain(puts.iter().map(|(handle, _)| *handle))
            .chain(ends)
            .chain(host_ends);
        if !handles.into_iter().all(|handle| numbers.insert(handle)) {
            return Err("a handle is there twice");
        }
        Ok(Self {
            settled: settled
                .into_iter()
                .map(|settled| (settled.token, settled))
                .collect(),
            intents: intents.into_iter().collect(),
            files: files.into_iter().collect(),
            puts: puts.into_iter().collect(),
            offers: offers.into_iter().collect(),
            streams: streams.into_iter().collect(),
            host: host.into_iter().collect(),
            host_results: host_results.into(),
        })
    }
}

fn pairs<V: Clone>(map: &BTreeMap<u64, V>) -> Vec<(u64, V)> {
    map.iter()
        .map(|(number, value)| (*number, value.clone()))
        .collect()
}
