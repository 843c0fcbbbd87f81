//! The stress run's day of a machine: letters, files, a ring of VMs, the host; and now and then its own end.
//!
//! In: all machines, each behind a lock (one program uses a device at a time), and the course. Out: entries in the ledger. Two machines are locked in
//! the order of their numbers. It must never know what happens to the daemon meanwhile, nor excuse a machine that nothing was done to.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result, bail, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use vmgmt_driver::abi::chat::HOST_NAME;
use vmgmt_testkit::process::locked;

use super::cut::{self, Blow, During};
use super::machine::{COMMAND_DEADLINE, Ended, Machine};
use crate::endurance::content::Paper;
use crate::endurance::crew::{Course, Hand};
use crate::endurance::guest::SHARE;
use crate::endurance::ledger::Way;
use crate::endurance::operator;

/// How long an offer waits to be answered: the acceptor may begin after it, and vfio resets the device when it is opened, which ends offers that do not say
/// that they wait.
pub const OFFER_SECONDS: u32 = 100;
/// Letters in a row.
const LETTERS: u64 = 3;
/// One round in so many ends with a disruption of the machine itself.
const OWN_TROUBLE_EVERY: u32 = 4;

/// What happens to a machine now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnTrouble {
    Reload,
    Replug,
    /// While letters are received.
    Reset,
    Kill,
    Cut(Blow, During),
}

/// Each machine begins with another one: the first four are of every kind.
pub const OWN_TROUBLES: [OwnTrouble; 16] = [
    OwnTrouble::Cut(Blow::Kill, During::Taking),
    OwnTrouble::Cut(Blow::Reset, During::Sending),
    OwnTrouble::Cut(Blow::Unplug, During::Put),
    OwnTrouble::Reload,
    OwnTrouble::Cut(Blow::Reset, During::Get),
    OwnTrouble::Cut(Blow::Unplug, During::Taking),
    OwnTrouble::Kill,
    OwnTrouble::Cut(Blow::Kill, During::Put),
    OwnTrouble::Replug,
    OwnTrouble::Cut(Blow::Reset, During::Taking),
    OwnTrouble::Cut(Blow::Unplug, During::Get),
    OwnTrouble::Reset,
    OwnTrouble::Cut(Blow::Kill, During::Sending),
    OwnTrouble::Cut(Blow::Reset, During::Put),
    OwnTrouble::Cut(Blow::Unplug, During::Sending),
    OwnTrouble::Cut(Blow::Kill, During::Get),
];

impl OwnTrouble {
    /// The one of a machine's turn.
    pub const fn of(turn: usize) -> Self {
        OWN_TROUBLES[turn % OWN_TROUBLES.len()]
    }

    /// With another machine only where there is one.
    pub fn name(self) -> String {
        match self {
            Self::Reload => "driver reloaded".into(),
            Self::Replug => "device unplugged and plugged".into(),
            Self::Reset => "VM reset while receiving".into(),
            Self::Kill => "QEMU killed while receiving".into(),
            Self::Cut(blow, during) => format!("{} in {}", blow.name(), during.name()),
        }
    }

    const fn has_partner(self) -> bool {
        matches!(self, Self::Cut(_, During::Sending | During::Taking))
    }
}

/// What all machines' threads share.
pub struct Yard {
    pub machines: Vec<Mutex<Machine>>,
    pub control: std::path::PathBuf,
}

/// Works until nothing new is to be begun, then only receives.
pub fn live(
    course: &Course,
    hand: &Hand,
    yard: &Yard,
    own: usize,
    chance: &mut ChaCha8Rng,
    sender: Sender,
) -> Result<()> {
    let mut round = own as u32;
    // The machines begin with different ones, so that four of them meet every kind.
    let mut trouble = own;
    while course.working() || trouble == own {
        round += 1;
        letters(course, hand, yard, own, chance)?;
        match round % 3 {
            0 => files(course, hand, yard, own, chance)?,
            1 => pass_on(course, hand, yard, own, chance, round)?,
            _ => with_host(course, hand, yard, own, round)?,
        }
        if round.is_multiple_of(OWN_TROUBLE_EVERY) {
            own_trouble(course, hand, yard, own, OwnTrouble::of(trouble), round)?;
            trouble += 1;
        }
    }
    drop(sender);
    while !course.over() {
        hand.doing("receiving what is left");
        locked(machine(yard, own)?).receive(course)?;
    }
    locked(machine(yard, own)?).inspect(course)
}

/// A reference that says: this thread may still send letters.
pub type Sender = Arc<()>;

fn machine(yard: &Yard, number: usize) -> Result<&Mutex<Machine>> {
    yard.machines.get(number).context("no such machine")
}

fn letters(course: &Course, hand: &Hand, yard: &Yard, own: usize, chance: &mut ChaCha8Rng) -> Result<()> {
    let machine = locked(machine(yard, own)?);
    for _ in 0..LETTERS {
        let others: Vec<&String> = course
            .addressees
            .iter()
            .filter(|name| **name != machine.name)
            .collect();
        let place = usize::try_from(chance.next_u64() % (others.len() as u64 + 1)).unwrap_or(0);
        let target = others.get(place).map_or(HOST_NAME, |name| name.as_str());
        hand.doing(format!("sending a letter to {target}"));
        machine.send(course, target)?;
    }
    hand.doing("receiving letters");
    machine.receive(course).map(drop)
}

/// A paper of the library, of at most so many bytes.
fn library<'a>(course: &'a Course, chance: &mut ChaCha8Rng, bytes_max: usize) -> Result<&'a Paper> {
    let fit = || course.library.iter().filter(|paper| paper.length <= bytes_max);
    let place = chance.next_u64().checked_rem(fit().count() as u64).unwrap_or(0);
    let place = usize::try_from(place).unwrap_or(0);
    fit().nth(place).context("nothing in the library is so small")
}

/// Runs a command until it was done well.
fn insist(course: &Course, machine: &Machine, kind: &str, command: &str) -> Result<()> {
    loop {
        match machine.try_to(course, kind, command)? {
            Ended::Well(_) => return Ok(()),
            Ended::Again => {}
            Ended::Empty => bail!("vmgmt {kind} came back with nothing"),
        }
    }
}

/// sha256 of a file's bytes on the host.
fn checksum(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum")
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .context("cannot run sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = text.split_whitespace().next();
    Ok(word.context("sha256sum said nothing")?.to_owned())
}

fn check_in_guest(course: &Course, machine: &Machine, path: &str, paper: &Paper) -> Result<()> {
    let expected = checksum(&course.share.join(&paper.name))?;
    let said = machine.must(&format!("sha256sum {path}"))?;
    ensure!(
        said.starts_with(&expected),
        "{path} in {} is not {}: {said}",
        machine.name,
        paper.name
    );
    Ok(())
}

/// A file of the share, in the guest.
fn fetch(course: &Course, machine: &Machine, paper: &Paper) -> Result<()> {
    course.ledger.begun(Way::Get);
    let command = format!("vmgmt get --force {SHARE}/{} /tmp/file", paper.name);
    insist(course, machine, "get", &command)?;
    check_in_guest(course, machine, "/tmp/file", paper)?;
    course.ledger.done(Way::Get, paper.length);
    Ok(())
}

fn files(course: &Course, hand: &Hand, yard: &Yard, own: usize, chance: &mut ChaCha8Rng) -> Result<()> {
    let machine = locked(machine(yard, own)?);
    let paper = library(course, chance, machine.fashion.file_bytes_max())?;
    hand.doing(format!("getting {}", paper.name));
    fetch(course, &machine, paper)?;
    let name = format!("{}.{:x}", machine.name, chance.next_u64());
    hand.doing(format!("putting {name}"));
    course.ledger.begun(Way::Put);
    let command = format!("vmgmt put --existing replace /tmp/file {SHARE}/{name}");
    insist(course, &machine, "put", &command)?;
    let found = std::fs::read(course.share.join(&name))
        .with_context(|| format!("{name} was put and is not there"))?;
    paper.check(&found).with_context(|| format!("put of {name}"))?;
    course.ledger.done(Way::Put, found.len());
    course.ledger.begun(Way::Remove);
    machine.must(&format!("vmgmt rm {SHARE}/{name}"))?;
    course.ledger.done(Way::Remove, 0);
    Ok(())
}

/// One link of the ring: this machine's file goes to the next.
fn pass_on(
    course: &Course,
    hand: &Hand,
    yard: &Yard,
    own: usize,
    chance: &mut ChaCha8Rng,
    round: u32,
) -> Result<()> {
    let next = (own + 1) % yard.machines.len();
    if next == own {
        return Ok(());
    }
    hand.doing("waiting for the next machine");
    let (source, target) = both(yard, own, next)?;
    let most = source
        .fashion
        .file_bytes_max()
        .min(target.fashion.file_bytes_max());
    let paper = library(course, chance, most)?;
    let name = format!("pass.{round}.{}", paper.name);
    pass(course, hand, &source, &target, paper, &name)
}

/// Two machines, locked in the order of their numbers; given as asked for.
fn both(
    yard: &Yard,
    first: usize,
    second: usize,
) -> Result<(MutexGuard<'_, Machine>, MutexGuard<'_, Machine>)> {
    let low = locked(machine(yard, first.min(second))?);
    let high = locked(machine(yard, first.max(second))?);
    Ok(if first < second { (low, high) } else { (high, low) })
}

/// A paper goes from the share to one machine, and from it to another, whole.
fn pass(
    course: &Course,
    hand: &Hand,
    source: &Machine,
    target: &Machine,
    paper: &Paper,
    name: &str,
) -> Result<()> {
    hand.doing(format!("getting {}", paper.name));
    fetch(course, source, paper)?;
    loop {
        hand.doing(format!("passing {name} to {}", target.name));
        let since = course.ledger.epoch();
        let accept_command = "rm -rf /tmp/in && mkdir /tmp/in && vmgmt accept --once --into /tmp/in";
        let mut accept = target.spawn(accept_command)?;
        accept.pid(COMMAND_DEADLINE)?;
        let copied = source.try_to(
            course,
            "cp",
            &format!(
                "vmgmt cp --timeout {OFFER_SECONDS} /tmp/file {}:{name}",
                target.name
            ),
        )?;
        if !matches!(copied, Ended::Well(_)) {
            course.ledger.broke(&source.name, &target.name, name);
            // It may wait for another offer, or have ended with the stream.
            accept.signal("INT").ok();
            let output = accept.wait(COMMAND_DEADLINE)?;
            let interrupted = output.status == 130;
            if !interrupted {
                target.judge(course, "accept", accept_command, &output, since)?;
            }
            continue;
        }
        let output = accept.wait(COMMAND_DEADLINE)?;
        // The sender knows that all is there, whatever the receiver heard of its confirmation.
        target.judge(course, "accept", accept_command, &output, since)?;
        check_in_guest(course, target, &format!("/tmp/in/{name}"), paper)?;
        course.ledger.took(&source.name, &target.name, name, paper.length);
        course.ledger.sent(&source.name, &target.name, name, paper.length);
        return Ok(());
    }
}

/// The host pushes a file, and pulls it back.
fn with_host(course: &Course, hand: &Hand, yard: &Yard, own: usize, round: u32) -> Result<()> {
    let machine = locked(machine(yard, own)?);
    let length = 10_000 + round as usize;
    let paper = Paper::new("push", round.into(), round.into(), length);
    let mut accept =
        machine.spawn("rm -rf /tmp/in && mkdir /tmp/in && vmgmt accept --into /tmp/in --serve /tmp/in")?;
    accept.pid(COMMAND_DEADLINE)?;
    operator::push(course, hand, &yard.control, &machine.name, &paper)?;
    course.ledger.took(HOST_NAME, &machine.name, &paper.name, length);
    operator::pull(course, hand, &yard.control, &machine.name, &paper)?;
    course.ledger.sent(&machine.name, HOST_NAME, &paper.name, length);
    accept.signal("INT")?;
    let output = accept.wait(COMMAND_DEADLINE)?;
    ensure!(
        output.status == 130,
        "`vmgmt accept` in {} ended with {} instead of by its signal: {}",
        machine.name,
        output.status,
        output.text()
    );
    Ok(())
}

fn own_trouble(
    course: &Course,
    hand: &Hand,
    yard: &Yard,
    own: usize,
    trouble: OwnTrouble,
    round: u32,
) -> Result<()> {
    let next = (own + 1) % yard.machines.len();
    if trouble.has_partner() && next == own {
        return Ok(());
    }
    let what = trouble.name();
    hand.doing(what.clone());
    match trouble {
        OwnTrouble::Cut(blow, during @ (During::Sending | During::Taking)) => {
            let (mut machine, mut partner) = both(yard, own, next)?;
            cut::with_partner(course, hand, &mut machine, &mut partner, blow, during)?;
            let (source, target) = match during {
                During::Sending => (&machine, &partner),
                _ => (&partner, &machine),
            };
            // Small enough for every way.
            let paper = course
                .library
                .iter()
                .filter(|paper| paper.length < 100_000)
                .max_by_key(|paper| paper.length)
                .context("the library is empty")?;
            let name = format!("after.{round}.{}", paper.name);
            pass(course, hand, source, target, paper, &name)?;
        }
        OwnTrouble::Cut(blow, during) => {
            let mut machine = locked(machine(yard, own)?);
            cut::with_share(course, hand, &mut machine, blow, during)?;
        }
        OwnTrouble::Reload => locked(machine(yard, own)?).reload()?,
        OwnTrouble::Replug => locked(machine(yard, own)?).replug()?,
        OwnTrouble::Reset => locked(machine(yard, own)?).reset(course)?,
        OwnTrouble::Kill => locked(machine(yard, own)?).kill(course)?,
    }
    println!("        {}: {what}", locked(machine(yard, own)?).name);
    course.ledger.happened(&what);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_blow_falls_in_every_transfer_and_four_machines_begin_with_every_kind() {
        for blow in [Blow::Reset, Blow::Kill, Blow::Unplug] {
            for during in [During::Get, During::Put, During::Sending, During::Taking] {
                assert!(
                    OWN_TROUBLES.contains(&OwnTrouble::Cut(blow, during)),
                    "{blow:?} {during:?}"
                );
            }
            let begins =
                |trouble: &OwnTrouble| matches!(trouble, OwnTrouble::Cut(other, _) if *other == blow);
            assert!(OWN_TROUBLES.iter().take(4).any(begins), "{blow:?}");
        }
        for trouble in [
            OwnTrouble::Reload,
            OwnTrouble::Replug,
            OwnTrouble::Reset,
            OwnTrouble::Kill,
        ] {
            assert!(OWN_TROUBLES.contains(&trouble), "{trouble:?}");
        }
        let mut names: Vec<String> = OWN_TROUBLES.map(OwnTrouble::name).to_vec();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), OWN_TROUBLES.len());
    }
}
