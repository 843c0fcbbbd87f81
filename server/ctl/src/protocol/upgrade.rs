//! The control protocol's words for a planned upgrade, and for the release of a quarantined VM.
//!
//! The request is answered at once with a number, since the core that takes it goes away in its own upgrade; `status` carries the
//! report of the last upgrade from then on, whoever answers it.

use serde::{Deserialize, Serialize};

/// A part of the daemon that can be replaced by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    Core,
    Front,
    Keeper,
}

impl Part {
    /// All, in the order in which they are replaced: what can be taken back most easily goes first.
    pub const ALL: [Self; 3] = [Self::Core, Self::Front, Self::Keeper];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::Front => "front",
            Self::Keeper => "keeper",
        }
    }
}

/// Parameters of `upgrade`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upgrade {
    /// Absolute path of the new `vmgmtd`; `None`: what is now at the path that the daemon was started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Empty: all. Whatever the order here, they are replaced in that of [`Part::ALL`].
    #[serde(default)]
    pub parts: Vec<Part>,
}

/// Result of `upgrade`: it has begun.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrading {
    /// Number of the upgrade, to be found again in [`Status::upgrade`](super::Status::upgrade).
    pub number: u64,
}

/// How far an upgrade, or one part of it, is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpgradeState {
    /// Its turn has not come.
    Waiting,
    Running,
    /// The new program is in service.
    Done,
    /// The old program was never touched.
    Denied,
    /// The new program was tried, and the old one is in service again.
    RolledBack,
    /// Neither program says that it is in service: the reason tells what to look at.
    Failed,
    /// Not begun, because a part before it was not done.
    Skipped,
    /// One that this version does not know.
    #[default]
    #[serde(other)]
    Unknown,
}

impl UpgradeState {
    /// As a person reads it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Done => "done",
            Self::Denied => "denied",
            Self::RolledBack => "rolled back",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
            Self::Unknown => "unknown",
        }
    }
}

/// One part's share of an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartReport {
    pub part: Part,
    pub state: UpgradeState,
    /// Why, in plain words, where it is not done.
    #[serde(default)]
    pub reason: String,
    /// How long the part was out of service, in milliseconds.
    #[serde(default)]
    pub stall_ms: u64,
}

/// An upgrade, under way or over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpgradeReport {
    pub number: u64,
    /// Path of the new program.
    pub binary: String,
    /// Where the configuration was read anew, if this was a reload; empty, if not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub configuration: String,
    /// What differs in it, a line for each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<String>,
    /// Of the whole: that of the first part that is not done.
    pub state: UpgradeState,
    /// Why, in plain words, where it is not done.
    pub reason: String,
    /// When it began and ended, nanoseconds since 1970 (0: it has not ended).
    pub begun_ns: u64,
    pub ended_ns: u64,
    pub parts: Vec<PartReport>,
}

impl UpgradeReport {
    /// Whether nothing more will happen.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        !matches!(self.state, UpgradeState::Waiting | UpgradeState::Running)
    }

    /// What it is, for people.
    #[must_use]
    pub fn title(&self) -> String {
        if self.configuration.is_empty() {
            format!("upgrade {} to {}", self.number, self.binary)
        } else {
            format!("reload {} of {}", self.number, self.configuration)
        }
    }
}

/// Parameters of `release`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The VM whose quarantined devices may work again.
    pub vm: String,
}
