//! GARDEN, mutations: deliberate mistakes of the shells, by which the simulator proves that it can fail.
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
    /// A reset of a device is taken for its departure.
    TakesResetsForDepartures,
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
    /// A frozen VM's transfers go on.
    WritesWhileFrozen,
    /// What needs a frozen VM's memory ends with an error, instead of waiting for the thaw.
    RefusesWhileFrozen,
    /// A message is noted as given to an operator before it is in its socket.
    NotesTooEarly,
    /// The front writes its words and does not move `touched`.
    ForgetsToTouch,
    /// The front looks whether the core sleeps before it moves `touched`.
    WakesTooEarly,
    /// Which VMs are frozen is lost when the front is handed over.
    ForgetsFreezes,
    /// What waits for the channel's room is lost when the front is handed over.
    ForgetsStalledMaps,
    /// The next front takes the answer to one message for that to another.
    SwapsDmaAnswers,
    /// A panic while the front serves a client.
    PanicsInFront,
    /// A loop without an end while the front serves a client.
    NeverEnds,
}

impl Fault {
    /// All mistakes.
    pub const ALL: [Self; 23] = [
        Self::ForgetsJournal,
        Self::JournalsTooLate,
        Self::SnapshotsTwice,
        Self::CompletesTwice,
        Self::TakesResetsForDepartures,
        Self::ForgetsSignals,
        Self::SleepsUnarmed,
        Self::SleepsWithoutLooking,
        Self::SleepsOnAnswers,
        Self::FencesTooEarly,
        Self::LosesTables,
        Self::DropsFences,
        Self::ForgetsTheUndead,
        Self::WritesWhileFrozen,
        Self::RefusesWhileFrozen,
        Self::NotesTooEarly,
        Self::ForgetsToTouch,
        Self::WakesTooEarly,
        Self::ForgetsFreezes,
        Self::ForgetsStalledMaps,
        Self::SwapsDmaAnswers,
        Self::PanicsInFront,
        Self::NeverEnds,
    ];

    /// By its name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| format!("{fault:?}") == name)
    }
}
