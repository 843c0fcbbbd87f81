//! Sockets: who may come in by which, and what is done with files left over from another life.

use super::*;
use std::os::unix::fs::FileTypeExt;
use vmgmt_testkit::process::{DaemonBuilder, Ready};

#[test]
fn a_second_device_of_a_vm_is_refused_and_the_log_names_the_holder() -> Result<()> {
    let scene = scene()?;
    let mut first = scene.client()?;
    let mut second = scene.silent()?;
    let outcome = second.negotiate();
    ensure!(
        matches!(outcome, Err(ClientError::Refused { .. })),
        "the second device got {outcome:?}"
    );
    second.wait_closed()?;
    let log = scene.site.daemon.log();
    // Its other lines name vm0 as well.
    let told = wait_until("a line that says why", PATIENCE, || {
        let text = log.text();
        let mut lines = text.lines();
        let told = lines.find(|line| line.contains("refused") && line.contains("vm0"));
        Ok(told.map(str::to_owned))
    })
    .with_context(|| log.tail())?;
    let holder = std::process::id().to_string();
    ensure!(
        told.contains(&holder),
        "the holder, process {holder}, is not named: {told}"
    );
    alive(&mut first)?;
    drop(first);
    alive(&mut scene.client()?)?;
    scene.check()
}

#[test]
fn more_devices_are_let_in_where_the_operator_says_so() -> Result<()> {
    let scene = scene_of(SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2).devices_max(3))?;
    let mut devices: Vec<Client> = (0..3)
        .map(|_| Client::connect_ready(scene.site.socket(0)))
        .collect::<Result<_, _>>()?;
    ensure!(Client::connect_ready(scene.site.socket(0)).is_err());
    devices.iter_mut().try_for_each(alive)?;
    scene.check()
}

#[test]
fn a_shared_socket_makes_a_new_vm_of_each() -> Result<()> {
    let scene = scene_of(
        SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2)
            .shared_socket()
            .devices_max(4),
    )?;
    // One process is one VM here, so its devices are limited like those of any VM: one.
    let mut client = Client::connect_ready(scene.site.shared_socket())?;
    alive(&mut client)?;
    let session = vmgmt_abi::registers::SESSION_LOW.into();
    let first = client.read_u32(0, session)?;
    drop(client);
    let mut next = wait_until("the place to be free", PATIENCE, || {
        Ok(Client::connect_ready(scene.site.shared_socket()).ok())
    })?;
    ensure!(
        next.read_u32(0, session)? != first,
        "a session number was used twice"
    );
    scene.check()
}

#[test]
fn a_stale_socket_file_is_replaced_and_a_live_one_refused() -> Result<()> {
    let scene = scene()?;
    let program = env!("CARGO_BIN_EXE_vmgmtd");
    // A socket file that nobody listens on.
    let folder = tempfile::tempdir()?;
    let stale = folder.path().join("vm.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale)?);
    ensure!(std::fs::symlink_metadata(&stale)?.file_type().is_socket());
    let configuration = |socket: &std::path::Path, control: &str| {
        format!(
            "[server]\ncontrol = \"@DIR@/{control}\"\n[[vm]]\nname = \"one\"\nsocket = \"{}\"\n",
            socket.display()
        )
    };
    let daemon = DaemonBuilder::new(program)
        .configuration(configuration(&stale, "control.sock"))
        .start()
        .context("a stale socket file")?;
    let mut client = Client::connect_ready(&stale)?;
    alive(&mut client)?;
    // One that somebody listens on stays theirs.
    let second = DaemonBuilder::new(program)
        .configuration(configuration(&stale, "control.sock"))
        .start();
    let Err(error) = second else {
        bail!("a second vmgmtd took a socket that is in use");
    };
    let said = format!("{error:#}");
    ensure!(
        said.contains("vm.sock"),
        "the error does not name the socket: {said}"
    );
    alive(&mut client)?;
    drop(client);
    daemon.stop(PATIENCE)?;
    // A file that is no socket is never removed.
    let precious = folder.path().join("precious");
    std::fs::write(&precious, "mine")?;
    let third = DaemonBuilder::new(program)
        .configuration(configuration(&precious, "control.sock"))
        .ready(Ready::LogText("vmgmtd: ready".into()))
        .start();
    ensure!(third.is_err(), "vmgmtd started over a file that is no socket");
    ensure!(std::fs::read(&precious)? == b"mine");
    scene.check()
}

#[test]
fn many_clients_come_and_go() -> Result<()> {
    let scene = scene()?;
    for _ in 0..100 {
        alive(&mut scene.client()?)?;
    }
    scene.check()
}
