//! GARDEN, mutations: deliberate mistakes of the core's shell, by which the simulator proves that it can fail.
//!
//! Each is a mistake that somebody could make in the real shell. None can be reached but through [`Fault`].

/// A mistake, or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Fault {
    #[default]
    None,
    /// Records of the hub are not written.
    ForgetsJournal,
    /// Records of the hub are written after what depends on them.
    JournalsTooLate,
    /// Records that a snapshot stands for already are written behind it.
    SnapshotsTwice,
    /// An answer is handed to the rings twice, the second time as another one.
    CompletesTwice,
    /// Interrupts are forgotten.
    ForgetsSignals,
    /// The core sleeps without asking the guests for their doorbell.
    SleepsUnarmed,
    /// The core sleeps without looking whether it was touched meanwhile.
    SleepsWithoutLooking,
    /// The core does not look at the hub again before it sleeps: it sleeps on answers to what bulk work and the ends of turns told the hub.
    SleepsOnAnswers,
    /// Fences are answered although leases are held or messages are under way.
    FencesTooEarly,
    /// The in-flight tables of a dead core are lost.
    LosesTables,
    /// A dead core's fences are never answered.
    DropsFences,
    /// A core goes on with files that a dead one's worker, asleep in the disk, may still write.
    ForgetsTheUndead,
}

impl Fault {
    /// All mistakes.
    pub const ALL: [Self; 12] = [
        Self::ForgetsJournal,
        Self::JournalsTooLate,
        Self::SnapshotsTwice,
        Self::CompletesTwice,
        Self::ForgetsSignals,
        Self::SleepsUnarmed,
        Self::SleepsWithoutLooking,
        Self::SleepsOnAnswers,
        Self::FencesTooEarly,
        Self::LosesTables,
        Self::DropsFences,
        Self::ForgetsTheUndead,
    ];
}
