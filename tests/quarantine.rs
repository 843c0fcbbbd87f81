//! A session whose input kills the core: its device is quarantined, its neighbours live, an operator releases it.
//!
//! The core really dies (SIGABRT), by `VMGMT_FAULT`, which debug builds honour.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmgmt_abi::Mode;
use vmgmt_abi::registers::{DeviceState, STATE};
use vmgmt_ctl::protocol::{Call, Release, Status};
use vmgmt_ctl::{Client, ClientError};
use vmgmt_driver::backing::Backing;
use vmgmt_testkit::guest::{SimulatedVm, Site, SitePlan};
use vmgmt_testkit::process::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);

fn site() -> Result<Site> {
    let faults = "submission=kill the core,worker=killer-name";
    SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2)
        .variable("VMGMT_FAULT", faults)
        .start()
}

fn call<T: serde::de::DeserializeOwned>(site: &Site, call: &Call) -> Result<T, ClientError> {
    let mut client = Client::connect(&site.control())?;
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
    let told = status(site)?.notices;
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
    let text = site.daemon.log().text();
    // The keeper's own lines: each core that follows tells its log of them, too.
    let deaths = text.matches("vmgmt_host::keeper: core life").count();
    ensure!(deaths == 2, "{deaths} deaths: {text}");
    Ok(())
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
    // A device that was reset after it works.
    drop(files);
    drop(culprit);
    let fresh = wait_until("the VM's return", PATIENCE, || Ok(site.vm(0).ok()))?;
    ensure!(fresh.ring(Mode::COMMON)?.echo(b"back")? == b"back");
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
