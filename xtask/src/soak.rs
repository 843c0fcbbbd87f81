//! The caretaker's soak: real vmgmtd processes, simulated guests that never rest, and a core that is killed and replaced all the time.
//!
//! In: how many guests, kills and upgrades, for how long. Out: a table of stalls, one line that is the ledger, an exit code. It must never count a
//! run as good in which a byte is missing, or in which a part was silently left out.

use crate::build::host_programs;
use crate::endurance::{
    crew::{Course, Crew},
    disruption::{Kind, Trouble, kills, upgradable},
    guest::{self, Plan},
    ledger::Ledger,
    operator::Operator,
    report, site,
    stall::{Stalls, Watches},
};
use anyhow::{Context, Result, ensure};
use clap::Args;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use vmgmt_testkit::guest::SimulatedVm;
use vmgmt_testkit::process::{Daemon, locked, patience};

/// Guests that move files as well; further ones exchange letters, as most VMs of a host would.
const FILE_GUESTS_MAX: usize = 64;
/// All guests together send about so many letters, and begin so many files, a second.
const LETTERS_PER_SECOND: f64 = 400.0;
const FILES_PER_SECOND: f64 = 60.0;
/// One guest alone is not to be faster than this.
const LETTER_PAUSE_MIN: Duration = Duration::from_millis(10);
const FILE_PAUSE_MIN: Duration = Duration::from_millis(30);
const HOST_LETTER_PAUSE: Duration = Duration::from_millis(50);
/// Watches on completions: guests spread over the order in which they came, so the first and the last adopted are among them.
const COMPLETION_WATCHES_MAX: usize = 8;
/// Machines whose registers alone are watched.
const REGISTER_WATCHES: usize = 2;
/// Between two disruptions, where nothing else is said.
const SPACING: Duration = Duration::from_secs(2);
/// Before the first one: everybody is at work.
const WARM_UP: Duration = Duration::from_secs(1);
/// Nothing more comes when nothing came for so long.
pub const SETTLE_PATIENCE: Duration = Duration::from_secs(20);
/// What was begun before the end is finished in this time.
const HOME_DEADLINE: Duration = Duration::from_secs(30);
pub const STOP_DEADLINE: Duration = Duration::from_secs(30);

#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Simulated guests.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    sessions: u16,
    /// Deaths of the core: mostly kill -9, some twice in a row, while adopting, by SIGSTOP.
    #[arg(long, default_value_t = 50)]
    kills: u32,
    /// Upgrades, in turn of core, front and keeper.
    #[arg(long, default_value_t = 9)]
    upgrades: u32,
    /// Replays the order of disruptions and what guests send; default: from the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// Spread over so many minutes; default: two seconds from one to the next.
    #[arg(long)]
    minutes: Option<f64>,
    /// Seconds from one disruption to the next. From 11 on no death is "in a row", and the keeper's back-off is not measured.
    #[arg(long, conflicts_with = "minutes")]
    spacing: Option<f64>,
    /// Guests that do nothing but wait, but for those whose completions are watched.
    #[arg(long)]
    idle: bool,
    /// A release build of vmgmtd (figures mean nothing without).
    #[arg(long)]
    release: bool,
    /// This vmgmtd instead of building one; vmgmtctl lies beside it.
    #[arg(long, value_name = "PROGRAM")]
    server: Option<PathBuf>,
    /// The figures and the ledger as JSON; - for standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Options {
    /// What `cargo xtask test` runs.
    pub const fn short() -> Self {
        Self {
            sessions: 8,
            kills: 10,
            upgrades: 3,
            seed: None,
            minutes: None,
            spacing: None,
            idle: false,
            release: false,
            server: None,
            json: None,
        }
    }
}

/// vmgmtd and vmgmtctl, and how they were built.
pub fn programs(server: Option<&Path>, release: bool) -> Result<(PathBuf, PathBuf, &'static str)> {
    if let Some(server) = server {
        let beside = server.with_file_name("vmgmtctl");
        ensure!(beside.exists(), "there is no {}", beside.display());
        return Ok((server.to_owned(), beside, "ready-made (--server)"));
    }
    let built = if release { "release build" } else { "debug build" };
    println!("* building vmgmtd and vmgmtctl ({built})");
    match host_programs(&["vmgmtd", "vmgmtctl"], release)?.as_slice() {
        [server, operator] => Ok((server.clone(), operator.clone(), built)),
        _ => anyhow::bail!("cargo built something else"),
    }
}

/// From the clock, where none is given.
pub fn seed_or_clock(seed: Option<u64>) -> u64 {
    let clock = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |time| time.as_secs())
    };
    seed.unwrap_or_else(clock)
}

/// Runs it.
pub fn soak(options: &Options) -> Result<()> {
    let (server, vmgmtctl, built) = programs(options.server.as_deref(), options.release)?;
    let seed = seed_or_clock(options.seed);
    let sessions = usize::from(options.sessions);
    println!("* soak: {sessions} sessions, {built}, --seed {seed}");
    site::allow_guests(sessions as u64 + REGISTER_WATCHES as u64)?;
    let names: Vec<String> = (0..sessions).map(|number| format!("vm{number}")).collect();
    let watched: Vec<String> = (0..REGISTER_WATCHES)
        .map(|number| format!("watch{number}"))
        .collect();
    let daemon = site::open(&server, &[names.clone(), watched.clone()].concat())?;

    let mut course = Course::new(Ledger::new(), daemon.path("share"), seed);
    site::stock(&mut course)?;
    if !options.idle {
        course.addressees.clone_from(&names);
        course.acceptors = names.iter().take(FILE_GUESTS_MAX).cloned().collect();
    }
    let course = Arc::new(course);
    let begin = Instant::now();
    let vms: Vec<Arc<SimulatedVm>> = names
        .iter()
        .map(|name| site::connect(&daemon, name))
        .collect::<Result<_>>()?;
    println!(
        "* {sessions} guests connected in {:.1} s",
        begin.elapsed().as_secs_f64()
    );

    let upgrades = upgrades(&vmgmtctl, &daemon, options.upgrades)?;
    let mut crew = Crew::default();
    let operator = Operator::start(
        &mut crew,
        &course,
        &daemon.path("control.sock"),
        HOST_LETTER_PAUSE,
    )?;
    for (name, vm) in names.iter().zip(&vms) {
        let files = course.acceptors.contains(name);
        let share = |rate: f64, guests: usize, least: Duration| {
            Duration::from_secs_f64(guests as f64 / rate).max(least)
        };
        let plan = Plan {
            name: name.clone(),
            files,
            letter_pause: share(LETTERS_PER_SECOND, sessions, LETTER_PAUSE_MIN),
            file_pause: share(FILES_PER_SECOND, course.acceptors.len(), FILE_PAUSE_MIN),
        };
        guest::start(&mut crew, &course, vm, &plan)?;
    }
    let machines = watched
        .iter()
        .map(|name| SimulatedVm::plug(daemon.path(&format!("{name}.sock")), guest::options()))
        .collect::<Result<_>>()?;
    let watches = Watches::start(
        &mut crew,
        &course,
        machines,
        &spread(&vms, COMPLETION_WATCHES_MAX),
    )?;

    let mut trouble = Trouble::new(&daemon, vmgmtctl, &course, &watches)?;
    let mut chance = ChaCha8Rng::seed_from_u64(seed);
    let plan = plan(options, upgrades, &mut chance);
    let result = disturb(options, &plan, &mut chance, &mut trouble);
    if let Err(error) = &result {
        course.ledger.mismatch(format!("{error:#}"));
    }
    course.quiet();
    site::settle(&course, patience(SETTLE_PATIENCE));
    // Files that were under way may be followed by letters to nobody; the farewell ends the operator's wait.
    if let Err(error) = operator.farewell() {
        course
            .ledger
            .mismatch(format!("the operator's last message: {error:#}"));
    }
    course.end();
    crew.wait(&course, patience(HOME_DEADLINE));
    site::inspect(&course)?;
    trouble.account(&plan);
    drop(vms);
    let stalls = trouble.stalls;
    report(&course, options, built, seed, &stalls, &operator)?;
    daemon.stop(STOP_DEADLINE).context("stopping vmgmtd").map(drop)
}

/// All that is to happen, in an order of chance's.
fn plan(options: &Options, upgrades: Vec<Kind>, chance: &mut ChaCha8Rng) -> Vec<Kind> {
    let mut plan = kills(options.kills);
    plan.extend(upgrades);
    // Fisher-Yates.
    for last in (1..plan.len()).rev() {
        let other = usize::try_from(chance.next_u64() % (last as u64 + 1)).unwrap_or(0);
        plan.swap(last, other);
    }
    plan
}

/// The disruptions in their order, with quiet windows between.
fn disturb(
    options: &Options,
    plan: &[Kind],
    chance: &mut ChaCha8Rng,
    trouble: &mut Trouble<'_>,
) -> Result<()> {
    let spacing = match (options.minutes, options.spacing) {
        (Some(minutes), _) => Duration::try_from_secs_f64(minutes * 60.0 / plan.len().max(1) as f64)?,
        (None, Some(seconds)) => Duration::try_from_secs_f64(seconds)?,
        (None, None) => SPACING,
    };
    std::thread::sleep(WARM_UP);
    for kind in plan {
        let next = Instant::now() + spacing.mul_f64(0.5 + f64::from(chance.next_u32()) / f64::from(u32::MAX));
        trouble.nothing()?;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        trouble.cause(*kind, chance)?;
    }
    trouble.nothing()
}

/// So many upgrades, of the parts in turn that can be upgraded; the others are named.
pub fn upgrades(vmgmtctl: &Path, daemon: &Daemon, count: u32) -> Result<Vec<Kind>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let (can, cannot): (Vec<_>, Vec<_>) = upgradable(vmgmtctl, &daemon.path("control.sock"))?
        .into_iter()
        .partition(|(_, cannot)| cannot.is_none());
    for (part, why) in cannot {
        println!(
            "skipped: upgrades of the {}: {}",
            part.name(),
            why.unwrap_or_default()
        );
    }
    let parts = can.into_iter().map(|(part, _)| Kind::Upgrade(part));
    let parts: Vec<Kind> = parts.collect();
    Ok(parts.iter().copied().cycle().take(count as usize).collect())
}

/// At most `count` of them, the first and the last included.
fn spread(vms: &[Arc<SimulatedVm>], count: usize) -> Vec<Arc<SimulatedVm>> {
    let last = vms.len().saturating_sub(1);
    let steps = count.min(vms.len()).saturating_sub(1);
    let place = |step: usize| (step * last).checked_div(steps).unwrap_or(0);
    (0..=steps)
        .filter_map(|step| vms.get(place(step)).cloned())
        .collect()
}

fn report(
    course: &Course,
    options: &Options,
    built: &str,
    seed: u64,
    stalls: &Stalls,
    operator: &Operator,
) -> Result<()> {
    let balance = course.ledger.close();
    let answers = locked(&operator.answers).clone();
    report::print_stalls(stalls);
    if let Some(path) = &options.json {
        let facts =
            json!({"sessions": options.sessions, "vmgmtd": built, "seed": seed, "idle": options.idle});
        write_json(path, &report::document(&facts, &balance, &answers, stalls))?;
    }
    for mismatch in &balance.mismatches {
        println!("MISMATCH {mismatch}");
    }
    println!("{}", report::ledger_line(&balance, &answers));
    ensure!(
        balance.mismatch_count == 0,
        "the ledger does not balance; again: cargo xtask soak --sessions {} --kills {} --upgrades {} --seed {seed}",
        options.sessions,
        options.kills,
        options.upgrades
    );
    Ok(())
}

pub fn write_json(path: &Path, document: &serde_json::Value) -> Result<()> {
    let text = format!("{document:#}\n");
    if path == Path::new("-") {
        print!("{text}");
        return Ok(());
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
