//! The kennel's promise: nothing that a test started outlives the guard, or the test process itself.

use anyhow::{Context, Result, ensure};
use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};
use vmgmt_testkit::process::{DaemonBuilder, Ready, Start, new_log_path, wait_until};

const SHORT: Duration = Duration::from_secs(60);

fn alive(pid: u32) -> bool {
    // A zombie has ended: it only waits for its parent.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.starts_with(" Z"))
    })
}

#[test]
fn a_daemon_is_ready_and_its_tree_ends_with_the_guard() -> Result<()> {
    let script = "sleep 1000 & echo \"child $!\" >&2; test -s \"$2\" && echo 'vmgmtd: ready' >&2; wait";
    let daemon = DaemonBuilder::new("/bin/sh")
        .argument("-c")
        .argument(script)
        .argument("daemon")
        .argument("first")
        .argument("@DIR@/given")
        .ready(Ready::LogText("child".into()))
        .start()?;
    ensure!(
        daemon.log().text().contains("child"),
        "the log holds what it said"
    );
    let child = wait_until("the child", SHORT, || {
        Ok(daemon.children().first().map(|seen| seen.pid))
    })?;
    let (main, folder) = (daemon.pid(), daemon.folder().to_path_buf());
    ensure!(alive(main) && alive(child) && folder.is_dir());
    drop(daemon);
    ensure!(!alive(main) && !folder.exists());
    wait_until("the child to end", SHORT, || Ok((!alive(child)).then_some(())))
}

#[test]
fn the_configuration_is_passed_with_its_folder_named() -> Result<()> {
    let daemon = DaemonBuilder::new("/bin/cat")
        .configuration("socket = \"@DIR@/vm.sock\"\n")
        .argument("/dev/null")
        .ready(Ready::LogText("never".into()))
        .start();
    // cat knows no --config: it ends at once, and the error shows what it said.
    let error = format!("{:#}", daemon.err().context("cat became ready")?);
    ensure!(
        error.contains("the process ended") && error.contains("--config"),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_socket_can_be_the_sign_of_being_ready() -> Result<()> {
    let program = "import socket, sys, time\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen(9)\ntime.sleep(1000)";
    if !Path::new("/usr/bin/python3").exists() {
        vmgmt_testkit::skipped("no python3 to play a daemon with a socket");
        return Ok(());
    }
    let daemon = DaemonBuilder::new("/usr/bin/python3")
        .argument("-c")
        .argument(program)
        .argument("@DIR@/control.sock")
        .ready(Ready::Socket("control.sock".into()))
        .start()?;
    ensure!(daemon.path("control.sock").exists());
    let status = daemon.stop(SHORT)?;
    ensure!(!status.success(), "it ended by SIGTERM, not by itself");
    Ok(())
}

/// Not a test by itself: the next one runs it in a process of its own and kills that.
#[test]
#[ignore = "played by another test"]
fn starts_something_and_waits() -> Result<()> {
    let process = Start::new("/bin/sleep", new_log_path("sleep")?)
        .argument("1000")
        .start()?;
    println!("started {}", process.pid());
    loop {
        std::thread::park();
    }
}

#[test]
fn what_was_started_ends_with_a_killed_test_process() -> Result<()> {
    let mut tester = Command::new(std::env::current_exe()?)
        .args([
            "--ignored",
            "--exact",
            "starts_something_and_waits",
            "--nocapture",
        ])
        .stdout(Stdio::piped())
        .spawn()?;
    let output = tester.stdout.take().context("no output")?;
    let line = std::io::BufRead::lines(std::io::BufReader::new(output))
        .map_while(Result::ok)
        .find_map(|line| Some(line.split_once("started ")?.1.to_owned()))
        .context("the other process did not start anything")?;
    let pid: u32 = line.trim().parse()?;
    ensure!(alive(pid), "process {pid} does not run");
    tester.kill()?;
    tester.wait()?;
    wait_until("the orphan to be killed", SHORT, || {
        Ok((!alive(pid)).then_some(()))
    })
}
