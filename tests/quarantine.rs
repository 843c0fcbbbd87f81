//! A session whose input kills the core: its device is quarantined, its neighbours live, an operator releases it.
//!
//! The core really dies (SIGABRT), by `VMGMT_FAULT`, which debug builds honour.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vmgmt_abi::file::open;
use vmgmt_abi::registers::{DOORBELLS, DeviceState, STATE};
use vmgmt_abi::{Mode, Opcode};
use vmgmt_ctl::ClientError;
use vmgmt_ctl::protocol::{Call, Release, Status};
use vmgmt_driver::backing::Backing;
use vmgmt_driver::channel::Request;
use vmgmt_driver::{Client, TransferOptions};
use vmgmt_testkit::guest::{SimulatedVm, Site, SitePlan};
use vmgmt_testkit::process::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);

fn site() -> Result<Site> {
    let faults = "submission=kill the core,submission-panics=panic the core,submission-hangs=hang the core,\
                  submission-waits=keep the core,worker=killer-name";
    site_with(faults)
}

fn site_with(faults: &str) -> Result<Site> {
    SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2)
        .variable("VMGMT_FAULT", faults)
        .start()
}

fn call<T: serde::de::DeserializeOwned>(site: &Site, call: &Call) -> Result<T, ClientError> {
    let mut client = vmgmt_ctl::Client::connect(&site.control())?;
    let result = client.call(call, &[], Some(PATIENCE), &mut |_| true)?;
    serde_json::from_value(result).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn status(site: &Site) -> Result<Status> {
    wait_until("a status", PATIENCE, || Ok(call(site, &Call::Status).ok()))
}

fn state(vm: &SimulatedVm) -> Result<u32> {
    Ok(vm.backing().read32(STATE)?)
}

/// That vm0 is quarantined, and nobody else is harmed.
fn check_quarantine(site: &Site, culprit: &SimulatedVm, neighbour: &SimulatedVm) -> Result<()> {
    site.daemon
        .log()
        .wait_for("its device is quarantined until `vmgmtctl release vm0`", PATIENCE)?;
    wait_until("quarantine", PATIENCE, || {
        Ok((state(culprit)? == DeviceState::QUARANTINED.0).then_some(()))
    })?;
    let mut ring = neighbour.ring(Mode::COMMON)?;
    ensure!(ring.echo(b"still here")? == b"still here");
    ensure!(state(neighbour)? == DeviceState::ACTIVE.0);
    let core = site.daemon.role("core")?;
    let status = status(site)?;
    let [quarantined, usual] = &status.vm_states[..] else {
        anyhow::bail!("{status:?}");
    };
    let fault = quarantined.last_fault.as_ref().map_or("", |fault| &fault.text);
    ensure!(
        quarantined.name == "vm0" && quarantined.state == "quarantined" && fault.contains("is quarantined"),
        "{quarantined:?}"
    );
    ensure!(
        usual.state == "connected" && usual.last_fault.is_none(),
        "{usual:?}"
    );
    let told = status.notices;
    ensure!(
        told.iter().any(|line| line.contains("vmgmtctl release vm0")),
        "{told:?}"
    );
    ensure!(!told.iter().any(|line| line.contains("VM \"vm1\"")), "{told:?}");
    ring.noop()?;
    ensure!(
        site.daemon.role("core")? == core,
        "a core died after the quarantine"
    );
    Ok(())
}

#[test]
fn a_session_that_kills_the_core_twice_is_quarantined_and_released() -> Result<()> {
    let site = site()?;
    let (culprit, neighbour) = (site.vm(0)?, site.vm(1)?);
    neighbour.ring(Mode::COMMON)?.noop()?;
    let mut ring = culprit.ring(Mode::FILE)?;
    ensure!(ring.open_for_reading("work/kill the core").is_err());
    check_quarantine(&site, &culprit, &neighbour)?;
    check_two_deaths(&site, "SIGABRT")
}

/// That two cores died, and no more, and so. (One that unwinds lets go of the front's channel, and may be killed before it has ended.)
fn check_two_deaths(site: &Site, how: &str) -> Result<()> {
    let text = site.daemon.log().text();
    // The keeper's own lines: each core that follows tells its log of them, too.
    let deaths: Vec<_> = text
        .lines()
        .filter(|line| line.contains("vmgmt_host::keeper: core life"))
        .collect();
    ensure!(
        deaths.len() == 2 && deaths.iter().any(|line| line.contains(how)),
        "{deaths:?}"
    );
    Ok(())
}

#[test]
fn a_session_whose_input_makes_the_core_panic_is_quarantined() -> Result<()> {
    let site = site()?;
    let (culprit, neighbour) = (site.vm(0)?, site.vm(1)?);
    ensure!(
        culprit
            .ring(Mode::FILE)?
            .open_for_reading("work/panic the core")
            .is_err()
    );
    check_quarantine(&site, &culprit, &neighbour)?;
    check_two_deaths(&site, "exit code 101")
}

#[test]
fn a_session_whose_input_makes_the_core_hang_is_quarantined() -> Result<()> {
    let site = site()?;
    let (culprit, neighbour) = (site.vm(0)?, site.vm(1)?);
    ensure!(
        culprit
            .ring(Mode::FILE)?
            .open_for_reading("work/hang the core")
            .is_err()
    );
    check_quarantine(&site, &culprit, &neighbour)?;
    check_two_deaths(&site, "it stood still while a fence or a doorbell waited")
}

/// What the hub makes of the end of bulk work belongs to the VM for which it was done, as everything that it does for one.
#[test]
fn a_vm_whose_bulk_work_kills_the_core_when_it_has_ended_is_quarantined() -> Result<()> {
    let site = site_with("outcome=1")?;
    std::fs::write(site.share().join("file"), vec![7; 1 << 20])?;
    let (culprit, neighbour) = (site.vm(0)?, site.vm(1)?);
    let got = culprit
        .ring(Mode::FILE)?
        .get_to_memory("work/file", &TransferOptions::default());
    ensure!(got.is_err(), "the VM with number 1 is to be the culprit");
    check_quarantine(&site, &culprit, &neighbour)?;
    check_two_deaths(&site, "SIGABRT")
}

#[test]
fn a_name_that_kills_a_worker_blames_its_vm_and_a_release_lifts_it() -> Result<()> {
    let site = site()?;
    let (culprit, neighbour) = (site.vm(0)?, site.vm(1)?);
    let mut files = culprit.ring(Mode::FILE)?;
    ensure!(files.open_for_reading("work/killer-name").is_err());
    check_quarantine(&site, &culprit, &neighbour)?;
    let _: serde_json::Value = call(&site, &Call::Release(Release { vm: "vm0".into() }))?;
    wait_until("the release", PATIENCE, || {
        Ok((state(&culprit)? != DeviceState::QUARANTINED.0).then_some(()))
    })?;
    // Twice is a mistake.
    let again = call::<serde_json::Value>(&site, &Call::Release(Release { vm: "vm0".into() }));
    ensure!(again.is_err_and(|error| error.to_string().contains("is quarantined")));
    // The same device, of the same session, works again when it is reset.
    drop(files);
    culprit.device().recover()?;
    ensure!(culprit.ring(Mode::COMMON)?.echo(b"back")? == b"back");
    ensure!(state(&culprit)? == DeviceState::ACTIVE.0);
    let told = status(&site)?;
    ensure!(told.answered_by == "core", "{told:?}");
    Ok(())
}

#[test]
fn a_new_session_of_a_quarantined_vm_begins_anew() -> Result<()> {
    let site = site()?;
    let (culprit, neighbour) = (site.vm(0)?, site.vm(1)?);
    ensure!(
        culprit
            .ring(Mode::FILE)?
            .open_for_reading("work/kill the core")
            .is_err()
    );
    check_quarantine(&site, &culprit, &neighbour)?;
    drop(culprit);
    let again = wait_until("the VM's return", PATIENCE, || Ok(site.vm(0).ok()))?;
    ensure!(again.ring(Mode::COMMON)?.echo(b"anew")? == b"anew");
    let count = status(&site)?;
    ensure!(count.answered_by == "core", "{count:?}");
    Ok(())
}

#[test]
fn who_kills_the_core_from_outside_blames_nobody() -> Result<()> {
    let site = site()?;
    let (one, other) = (site.vm(0)?, site.vm(1)?);
    let mut rings = [one.ring(Mode::COMMON)?, other.ring(Mode::COMMON)?];
    for _ in 0..3 {
        let old = site.daemon.kill_role("core")?;
        for ring in &mut rings {
            ring.echo(&[7; 1000])?;
        }
        site.daemon.wait_for_new("core", old, PATIENCE)?;
    }
    let text = site.daemon.log().text();
    ensure!(!text.contains("quarantined"), "{text}");
    ensure!(state(&one)? == DeviceState::ACTIVE.0 && state(&other)? == DeviceState::ACTIVE.0);
    status(&site).context("a status").map(drop)
}

/// The message that the fault writes when the core has it in hand.
const IN_HAND: &str = "this core stands still in a submission";

fn open_request(files: &Client, path: &str) -> Result<Request> {
    let buffer = files.allocate(path.len())?;
    buffer.write(0, path.as_bytes())?;
    let request = Request::new(Opcode::OPEN).argument(open::READ);
    Ok(request.output(&buffer, 0, path.len(), path.len()))
}

#[test]
fn who_kills_the_core_while_it_handles_a_session_does_not_blame_that() -> Result<()> {
    let site = site()?;
    let (handled, other) = (site.vm(0)?, site.vm(1)?);
    let mut files = handled.ring(Mode::FILE)?;
    let _open = files.start(open_request(&files, "work/keep the core")?)?;
    for count in 1..=4 {
        site.daemon.log().wait_for_count(IN_HAND, count, PATIENCE)?;
        if count < 4 {
            site.daemon.kill_role("core")?;
        }
    }
    // Three deaths were seen before the fourth core was started; each of them named that session.
    let text = site.daemon.log().text();
    let named = text.matches("from outside), while it handled sessions").count();
    ensure!(named >= 3, "the core did not have it in hand: {text}");
    ensure!(!text.contains("quarantined"), "{text}");
    ensure!(state(&handled)? == DeviceState::ACTIVE.0 && state(&other)? != DeviceState::QUARANTINED.0);
    // Before the guest lets its ring go, for which that core has no time.
    drop(site);
    Ok(())
}

#[test]
fn who_stops_the_core_while_it_handles_a_session_does_not_blame_that() -> Result<()> {
    let site = site()?;
    let (handled, other) = (site.vm(0)?, site.vm(1)?);
    let _ring = other.ring(Mode::COMMON)?;
    let mut files = handled.ring(Mode::FILE)?;
    let _open = files.start(open_request(&files, "work/keep the core")?)?;
    for count in 1..=3 {
        site.daemon.log().wait_for_count(IN_HAND, count, PATIENCE)?;
        if count < 3 {
            site.daemon.signal_role("core", Signal::STOP)?;
            // It owes something now, and the front has it killed.
            other.backing().write32(DOORBELLS, 0)?;
        }
    }
    let text = site.daemon.log().text();
    ensure!(text.contains("the core's beat stands still"), "{text}");
    ensure!(!text.contains("quarantined"), "{text}");
    ensure!(state(&handled)? == DeviceState::ACTIVE.0 && state(&other)? != DeviceState::QUARANTINED.0);
    // Before the guest lets its ring go, for which that core has no time.
    drop(site);
    Ok(())
}
