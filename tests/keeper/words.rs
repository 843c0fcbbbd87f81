//! What the two programs tell a person or a script: words, JSON, exit codes; mistakes before anything is started.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vmgmt_ctl::Client;
use vmgmt_ctl::protocol::{Call, Event, Log};

use super::{Daemon, PATIENCE, signal};

#[test]
fn vmgmtctl_tells_by_words_json_and_exit_code() -> Result<()> {
    let daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock", "--share", "pub=DIR/pub"])?;
    let control = daemon.path("control.sock");
    let file = daemon.path("pub/file");
    std::fs::write(&file, "contents")?;
    let (file, socket) = (file.to_str().context("a path")?, daemon.path("web.sock"));
    let socket = socket.to_str().context("a path")?;
    let run = |arguments: &[&str]| -> Result<(i32, String, String)> {
        let output = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
            .env("VMGMT_CONTROL", &control)
            .args(arguments)
            .output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((
            output.status.code().context("a code")?,
            text(output.stdout),
            text(output.stderr),
        ))
    };
    let expected: [(&[&str], i32, &str, &str); 17] = [
        (&["status"], 0, "is serving", ""),
        (&["status", "--json"], 0, "{\"answered_by\":\"core\"", ""),
        (&["shares"], 0, "pub ", ""),
        (
            &["add-vm", "web", "--socket", socket, "--share", "pub:ro"],
            0,
            "",
            "",
        ),
        (
            &["add-vm", "x", "--socket", socket],
            1,
            "",
            "somebody listens on it already",
        ),
        (
            &["add-vm", "x", "--socket", "/x", "--share", "nothing"],
            2,
            "",
            "there are: pub",
        ),
        (&["vms"], 0, "web ", ""),
        (&["peers"], 0, "NAME", ""),
        (&["log"], 0, "", ""),
        (&["send", "nobody", "hello"], 4, "", "nobody"),
        (&["recv"], 5, "", "--follow"),
        (&["recv", "--wait", "-1"], 2, "", "error"),
        (&["push", "/nowhere", "web"], 1, "", "/nowhere: No such file"),
        (&["push", file, "nobody:x"], 4, "", "nobody"),
        (&["pull", "web", "x"], 2, "", "VM:PATH"),
        (
            &["--json", "remove-vm", "nobody"],
            1,
            "",
            "{\"error\":{\"code\":\"failed\"",
        ),
        (
            &["--control", "/nowhere.sock", "status"],
            7,
            "",
            "is vmgmtd running?",
        ),
    ];
    for (arguments, code, out, error) in expected {
        let (found, stdout, stderr) = run(arguments)?;
        let fits = found == code && stdout.contains(out) && stderr.contains(error);
        ensure!(
            fits && (code == 0) == stderr.is_empty(),
            "{arguments:?}: {found}\n{stdout}\n{stderr}"
        );
    }
    // A pull that fails leaves nothing behind.
    let target = daemon.path("pulled");
    let (code, ..) = run(&["pull", "nobody:x", target.to_str().context("a path")?])?;
    ensure!(code == 4);
    let names: Vec<_> = std::fs::read_dir(daemon.directory.path())?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    ensure!(
        !names.iter().any(|name| name.to_string_lossy().contains("pulled")),
        "{names:?}"
    );
    let (code, out, _) = run(&["doctor", "--socket", socket])?;
    ensure!(
        out.contains(&format!("{socket}: you may connect")) || out.contains("libvirt-qemu"),
        "{out}"
    );
    ensure!((code == 1) == out.contains("FAIL"), "{out}");
    Ok(())
}

#[test]
fn flags_and_files_are_checked_before_anything_is_started() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vmgmtd.toml");
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String)> {
        let output = Command::new(env!("CARGO_BIN_EXE_vmgmtd"))
            .args(arguments)
            .output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
    };
    let path = file.to_str().context("a path")?;
    std::fs::write(
        &file,
        "[[vm]]\nname = \"web\"\nsocket = \"/run/vmgmt-test/web.sock\"\n",
    )?;
    ensure!(
        run(&["--config", path, "--check"])?
            == (
                Some(0),
                "the configuration is good: 1 VMs, 0 shared sockets, 0 shares\n".into()
            )
    );
    ensure!(!Path::new("/run/vmgmt-test").exists());
    std::fs::write(&file, "[[vm]]\nname = \"all\"\nsocket = \"web.sock\"\n")?;
    for arguments in [&["--config", path, "--check"][..], &["--config", path]] {
        let (code, text) = run(arguments)?;
        ensure!(
            code == Some(2) && text.contains("2 mistakes") && text.contains("vmgmtd.toml:2"),
            "{text}"
        );
    }
    for arguments in [
        &[][..],
        &["--check"],
        &["--nonsense"],
        &["--socket", "/x", "--log", "a=b=c"],
    ] {
        let (code, text) = run(arguments)?;
        ensure!(code == Some(2), "{arguments:?}: {code:?} {text}");
    }
    let (code, text) = run(&["--role", "core", "--parent", "1"])?;
    ensure!(code == Some(1) && text.contains("not by hand"), "{text}");
    Ok(())
}

/// A script that closed its end, or a full disk: the exit code still says what happened.
#[test]
fn vmgmtctl_needs_no_reader_of_its_errors() -> Result<()> {
    for json in [&[][..], &["--json"]] {
        let full = std::fs::File::options().write(true).open("/dev/full")?;
        let status = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
            .args(["--control", "/nowhere/control.sock", "status"])
            .args(json)
            .stderr(full)
            .status()?;
        ensure!(status.code() == Some(7), "{status}");
    }
    Ok(())
}

/// When a thing happened that `vmgmtctl log` tells of.
fn time_of(daemon: &Daemon, text: &str) -> Result<Option<u64>> {
    let mut time = None;
    let mut look = |event| {
        if let Event::Log(line) = event
            && line.text.contains(text)
        {
            time = Some(line.time_ns);
        }
        true
    };
    let call = Call::Log(Log { follow: false });
    Client::connect(&daemon.path("control.sock"))?.call(&call, &[], Some(PATIENCE), &mut look)?;
    Ok(time)
}

/// Each core is told of all that happened before it: for operators who ask, not for the daemon's log, which has it.
#[test]
fn what_happened_is_logged_once_and_keeps_its_time() -> Result<()> {
    let daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    let mut times = Vec::new();
    let mut core = None;
    for life in 2..=4 {
        let next = daemon.wait_role("core", core)?;
        core = Some(next);
        signal(next, Signal::KILL)?;
        daemon.wait_serving(life)?;
        times.push(time_of(&daemon, "core life 1 died")?.context("the first death")?);
    }
    ensure!(times.iter().all(|time| *time == times[0]), "{times:?}");
    daemon.wait_line("core life 3 died")?;
    let lines = daemon.lines();
    for life in 1..=3 {
        let told = lines.matches(&format!("core life {life} died")).count();
        ensure!(told == 1, "{told} times in {lines}");
    }
    Ok(())
}
