//! GARDEN, one run: a seed's world, step by step, until its end or its first complaint.

use crate::faults::Fault;
use crate::world::{World, text_of};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub seed: u64,
    /// Steps before everything heals.
    pub steps: u64,
    /// A deliberate mistake of the shell's.
    pub fault: Fault,
    /// Every action goes to standard error.
    pub aloud: bool,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Of everything that was done: the same for the same seed.
    pub hash: u64,
    pub completions: u64,
    pub delivered: u64,
    pub committed: u64,
    /// Offers that came to a stream.
    pub taken: u64,
    pub deaths: u64,
    pub upgrades: u64,
    pub undead: u64,
    /// Hand-overs of the front, with their ways back.
    pub hand_overs: u64,
    /// Times that an operator was told that a VM is quiet.
    pub freezes: u64,
    /// Messages that came again after a reset that no core had seen.
    pub repeats: u64,
}

/// What must not be.
#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    /// The step after which it was seen; `None`: when everything had healed.
    pub step: Option<u64>,
    pub complaint: String,
    /// The last actions.
    pub actions: Vec<String>,
    /// Steps that were asked for.
    pub steps: u64,
    /// The mistake that was asked for.
    pub fault: Fault,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for action in &self.actions {
            writeln!(f, "  {action}")?;
        }
        match self.step {
            Some(step) => writeln!(f, "seed {:#x}, step {step}: {}", self.seed, self.complaint)?,
            None => writeln!(f, "seed {:#x}, at the end: {}", self.seed, self.complaint)?,
        }
        write!(
            f,
            "again: cargo xtask sim --seed {:#x} --steps {}",
            self.seed, self.steps
        )?;
        match self.fault {
            Fault::None => Ok(()),
            fault => write!(f, " --fault {fault:?}"),
        }
    }
}

/// Runs a seed.
///
/// # Errors
/// The first thing that must not be.
pub fn run(options: Options) -> Result<Report, Box<Failure>> {
    let mut world = World::new(options.seed, options.fault, options.aloud);
    for step in 0..options.steps {
        act(&mut world, options, Some(step), World::step)?;
    }
    act(&mut world, options, None, World::run_dry)?;
    let town = world.town.borrow();
    Ok(Report {
        hash: town.trace.hash(),
        completions: town.shadow.completions,
        delivered: town.shadow.delivered,
        committed: town.shadow.committed,
        taken: town.shadow.offers.taken,
        deaths: world.deaths,
        upgrades: world.upgrades,
        undead: world.undead,
        hand_overs: town.front.handed_over,
        freezes: world.quiets(),
        repeats: town.shadow.repeats,
    })
}

/// Lets something happen; what is complained of then, or a panic in it, is the failure.
fn act(
    world: &mut World,
    options: Options,
    step: Option<u64>,
    action: impl FnOnce(&mut World),
) -> Result<(), Box<Failure>> {
    world.clock.begin_action();
    let outcome = catch_unwind(AssertUnwindSafe(|| action(world)));
    let panic = outcome
        .err()
        .map(|cause| format!("a panic: {}", text_of(&*cause)));
    // Whoever complained before the panic knows more of it.
    let Some(complaint) = world.complaints.first().or(panic) else {
        return Ok(());
    };
    Err(Box::new(Failure {
        seed: options.seed,
        step,
        complaint,
        actions: world.town.borrow().trace.last(),
        steps: options.steps,
        fault: options.fault,
    }))
}
