//! The stress run's day of a machine: letters, files, a ring of VMs, the host; and now and then its own end.
//!
//! In: all machines, each behind a lock (one program uses a device at a time), and the course. Out: entries in the ledger. Two machines are locked in
//! the order of their numbers. It must never know what happens to the daemon meanwhile.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use vmgmt_driver::abi::chat::HOST_NAME;
use vmgmt_testkit::process::locked;

use super::machine::{COMMAND_DEADLINE, Ended, Machine};
use crate::endurance::content::Paper;
use crate::endurance::crew::{Course, Hand};
use crate::endurance::guest::SHARE;
use crate::endurance::ledger::Way;
use crate::endurance::operator;

/// Letters in a row.
const LETTERS: u64 = 3;
/// One round in so many ends with a disruption of the machine itself.
const OWN_TROUBLE_EVERY: u32 = 4;

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
            own_trouble(course, hand, yard, own, trouble)?;
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

fn library<'a>(course: &'a Course, chance: &mut ChaCha8Rng) -> Result<&'a Paper> {
    let place = chance
        .next_u64()
        .checked_rem(course.library.len() as u64)
        .unwrap_or(0);
    let place = usize::try_from(place).unwrap_or(0);
    course.library.get(place).context("the library is empty")
}

/// Runs a command until it was done well.
fn insist(course: &Course, machine: &Machine, kind: &str, command: &str) -> Result<()> {
    loop {
        match machine.try_to(course, kind, command)? {
            Ended::Well(_) => return Ok(()),
            Ended::Empty | Ended::Again => {}
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
    let paper = library(course, chance)?;
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
    let (low, high) = (own.min(next), own.max(next));
    let (low, high) = (locked(machine(yard, low)?), locked(machine(yard, high)?));
    let (source, target) = if own < next { (&low, &high) } else { (&high, &low) };
    let paper = library(course, chance)?;
    hand.doing(format!("getting {}", paper.name));
    fetch(course, source, paper)?;
    let name = format!("pass.{round}.{}", paper.name);
    loop {
        hand.doing(format!("passing {name} to {}", target.name));
        let since = course.ledger.epoch();
        let accept_command = "rm -rf /tmp/in && mkdir /tmp/in && vmgmt accept --once --into /tmp/in";
        let mut accept = target.spawn(accept_command)?;
        accept.pid(COMMAND_DEADLINE)?;
        let copied = source.try_to(
            course,
            "cp",
            &format!("vmgmt cp /tmp/file {}:{name}", target.name),
        )?;
        if !matches!(copied, Ended::Well(_)) {
            course.ledger.broke(&source.name, &target.name, &name);
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
        course
            .ledger
            .took(&source.name, &target.name, &name, paper.length);
        course
            .ledger
            .sent(&source.name, &target.name, &name, paper.length);
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

fn own_trouble(course: &Course, hand: &Hand, yard: &Yard, own: usize, turn: usize) -> Result<()> {
    let mut machine = locked(machine(yard, own)?);
    let what = [
        "driver reloaded",
        "VM reset",
        "device unplugged and plugged",
        "QEMU killed and started",
    ]
    .get(turn % 4)
    .copied()
    .unwrap_or_default();
    hand.doing(what);
    match turn % 4 {
        0 => machine.reload()?,
        1 => machine.reset(course)?,
        2 => machine.replug()?,
        _ => machine.kill(course)?,
    }
    println!("        {}: {what}", machine.name);
    course.ledger.happened(what);
    Ok(())
}
