//! The caretaker's stress: real VMs and simulated ones on one vmgmtd, everything at once, and everything ends and begins again meanwhile.
//!
//! ```text
//!  mod       options, the daemon, the disruptions of the core
//!  machine   one real VM: its commands, its ends and beginnings
//!  work      what a machine does all day
//!  cut       a machine that ends in the middle of a transfer
//! ```
//!
//! In: how many VMs, for how long. Out: the ledger's line, an exit code. It must never excuse more than the ledger says.

mod cut;
mod machine;
mod work;

use crate::endurance::{
    content,
    crew::{Course, Crew},
    disruption::{Kind, Trouble, round},
    guest::{self, Plan},
    ledger::Ledger,
    operator::Operator,
    report, site,
    stall::Watches,
};
use crate::soak::{SETTLE_PATIENCE, STOP_DEADLINE, programs, seed_or_clock, upgrades, write_json};
use anyhow::{Context, Result, ensure};
use clap::Args;
use machine::{FASHIONS, Machine};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::json;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use vmgmt_testkit::guest::SimulatedVm;
use vmgmt_testkit::process::{Daemon, locked, patience};
use vmgmt_testkit::setup::{self, Image, Tools, Wanted};
use work::{OwnTrouble, Yard};

/// Simulated guests that move files as well.
const FILE_GUESTS_MAX: usize = 8;
/// Of a simulated guest among real ones: these wait for a processor that is not there.
const LETTER_PAUSE: Duration = Duration::from_secs(2);
const FILE_PAUSE: Duration = Duration::from_secs(1);
const OPERATOR_PAUSE: Duration = Duration::from_millis(500);
/// Between two disruptions of the daemon.
const SPACING: Duration = Duration::from_secs(6);
/// A round of a machine that was begun is finished in this time: it may hold a boot.
const HOME_DEADLINE: Duration = Duration::from_secs(240);
/// Upgrades of a round: one of each part.
const UPGRADES: u32 = 3;
const WATCH: &str = "watch0";

#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Real VMs, 128 MiB each.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    vms: u16,
    /// For so long new work is begun.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// Simulated guests on the same daemon.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=512))]
    simulated: u16,
    /// Replays what is chosen by chance; default: from the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// A release build of vmgmtd.
    #[arg(long)]
    release: bool,
    /// This vmgmtd instead of building one; vmgmtctl lies beside it.
    #[arg(long, value_name = "PROGRAM")]
    server: Option<PathBuf>,
    /// The ledger as JSON; - for standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Options {
    /// What `cargo xtask test` runs.
    pub const fn short() -> Self {
        Self {
            vms: 4,
            minutes: 1.0,
            simulated: 8,
            seed: None,
            release: false,
            server: None,
            json: None,
        }
    }
}

fn names(kind: &str, count: u16) -> Vec<String> {
    (1..=count).map(|number| format!("{kind}{number}")).collect()
}

/// Boots all at once.
fn boot(tools: &Tools, daemon: &Daemon, names: &[String]) -> Result<Vec<Mutex<Machine>>> {
    thread::scope(|scope| {
        let starting: Vec<_> = names
            .iter()
            .zip(FASHIONS.iter().cycle())
            .map(|(name, fashion)| {
                println!("* {name}: {}", fashion.name);
                let socket = daemon.path(&format!("{name}.sock"));
                scope.spawn(move || Machine::start(tools, name, socket, *fashion))
            })
            .collect();
        starting
            .into_iter()
            .map(|machine| Ok(Mutex::new(machine.join().ok().context("a thread died")??)))
            .collect()
    })
}

/// Runs it.
pub fn stress(options: &Options) -> Result<()> {
    let tools = setup::prepare(Wanted {
        image: Image::Small,
        install: true,
    })?;
    let (server, vmgmtctl, built) = programs(options.server.as_deref(), options.release)?;
    let seed = seed_or_clock(options.seed);
    let (real, simulated) = (names("vm", options.vms), names("sim", options.simulated));
    println!(
        "* stress: {} VMs, {} simulated, {} minutes, {built}, --seed {seed}",
        real.len(),
        simulated.len(),
        options.minutes
    );
    site::allow_guests(u64::from(options.simulated) + 1)?;
    let all = [real.clone(), simulated.clone(), vec![WATCH.to_owned()]].concat();
    let daemon = site::open(&server, &all)?;
    let mut course = Course::new(Ledger::new(), daemon.path("share"), seed);
    site::stock(&mut course)?;
    let endless = course.share.join(cut::ENDLESS);
    std::fs::File::create(&endless)?.set_len(cut::ENDLESS_BYTES)?;
    course.addressees = [real.clone(), simulated.clone()].concat();
    course.acceptors = simulated.iter().take(FILE_GUESTS_MAX).cloned().collect();
    let course = Arc::new(course);
    let begin = Instant::now();
    let yard = Arc::new(Yard {
        machines: boot(&tools, &daemon, &real)?,
        control: daemon.path("control.sock"),
    });
    println!(
        "* {} VMs are up after {:.0} s",
        real.len(),
        begin.elapsed().as_secs_f64()
    );
    let upgrades = upgrades(&vmgmtctl, &daemon, UPGRADES)?;

    let mut crew = Crew::default();
    let operator = Operator::start(&mut crew, &course, &yard.control, OPERATOR_PAUSE)?;
    let mut vms: Vec<Arc<SimulatedVm>> = Vec::new();
    for name in &simulated {
        let vm = site::connect(&daemon, name)?;
        let plan = Plan {
            name: name.clone(),
            files: course.acceptors.contains(name),
            letter_pause: LETTER_PAUSE,
            file_pause: FILE_PAUSE,
        };
        guest::start(&mut crew, &course, &vm, &plan)?;
        vms.push(vm);
    }
    for (number, name) in real.iter().enumerate() {
        let (yard, sender) = (Arc::clone(&yard), course.sender());
        let mut chance = ChaCha8Rng::seed_from_u64(content::mix(&[name], seed));
        crew.hire(&course, name.clone(), move |course, hand| {
            work::live(course, hand, &yard, number, &mut chance, sender)
        })?;
    }
    let machine = SimulatedVm::plug(daemon.path(&format!("{WATCH}.sock")), guest::options())?;
    let watched: Vec<_> = vms.iter().take(1).cloned().collect();
    let watches = Watches::start(&mut crew, &course, vec![machine], &watched)?;
    let mut trouble = Trouble::new(&daemon, vmgmtctl, &course, &watches)?;
    let plan = round(&upgrades);
    if let Err(error) = disturb(options, seed, &plan, &mut trouble) {
        course.ledger.mismatch(format!("{error:#}"));
    }
    course.quiet();
    // Work that was begun is finished first: a boot among it takes its time.
    site::settle(&course, patience(HOME_DEADLINE.max(SETTLE_PATIENCE)));
    if let Err(error) = operator.farewell() {
        course
            .ledger
            .mismatch(format!("the operator's last message: {error:#}"));
    }
    course.end();
    crew.wait(&course, patience(HOME_DEADLINE));
    std::fs::remove_file(&endless)?;
    site::inspect(&course)?;
    trouble.account(&plan);
    let stalls = trouble.stalls;
    own_troubles(&course, real.len());
    drop((yard, vms));
    let balance = course.ledger.close();
    let answers = locked(&operator.answers).clone();
    report::print_stalls(&stalls);
    if let Some(path) = &options.json {
        let facts = json!({"vms": options.vms, "simulated": options.simulated, "minutes": options.minutes, "vmgmtd": built, "seed": seed});
        write_json(path, &report::document(&facts, &balance, &answers, &stalls))?;
    }
    for mismatch in &balance.mismatches {
        println!("MISMATCH {mismatch}");
    }
    println!("{}", report::ledger_line(&balance, &answers));
    daemon.stop(STOP_DEADLINE).context("stopping vmgmtd")?;
    ensure!(
        balance.mismatch_count == 0,
        "the ledger does not balance; again: cargo xtask stress --vms {} --simulated {} --minutes {} --seed {seed}",
        options.vms,
        options.simulated,
        options.minutes
    );
    Ok(())
}

/// What each machine was to meet first has happened.
fn own_troubles(course: &Course, machines: usize) {
    for number in 0..machines {
        let what = OwnTrouble::of(number).name();
        if machines > 1 && !course.ledger.has_happened(&what) {
            course
                .ledger
                .mismatch(format!("{what}: this was to happen and did not"));
        }
    }
}

/// The plan's disruptions, again and again for so long, and all of it at least once.
fn disturb(options: &Options, seed: u64, plan: &[Kind], trouble: &mut Trouble<'_>) -> Result<()> {
    let mut chance = ChaCha8Rng::seed_from_u64(seed);
    let whole = Duration::try_from_secs_f64(options.minutes * 60.0)?;
    let end = Instant::now() + whole;
    let spacing = spacing(whole, plan.len());
    for (turn, kind) in plan.iter().cycle().enumerate() {
        let pause = spacing.mul_f64(0.5 + f64::from(chance.next_u32()) / f64::from(u32::MAX));
        thread::sleep(pause.min(end.saturating_duration_since(Instant::now())));
        if turn >= plan.len() && Instant::now() >= end {
            break;
        }
        trouble.cause(*kind, &mut chance)?;
    }
    Ok(())
}

/// Between two disruptions: in a short run so little that a whole round of them falls into it.
fn spacing(whole: Duration, round: usize) -> Duration {
    let turns = u32::try_from(round).unwrap_or(u32::MAX).saturating_add(1);
    SPACING.min(whole / turns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_is_long_enough_for_a_round() {
        assert_eq!(spacing(Duration::from_secs(60), 9), Duration::from_secs(6));
        assert_eq!(spacing(Duration::from_secs(20), 9), Duration::from_secs(2));
        assert_eq!(spacing(Duration::from_secs(3600), 9), SPACING);
    }
}
