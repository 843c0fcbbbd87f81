//! frozen.sh and what it runs: the thaw comes after the end of the copy, which is not the end of the command. libvirt and QEMU are played here,
//! and go on whatever becomes of virsh and of qmp-job.py; all that happens is written into one file, in its order.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::mpsc,
};
use tempfile::TempDir;
use vmgmt_testkit::setup::repository;

const FREEZE: &str = "freeze web --timeout 60\n";
const THAW: &str = "thaw web\n";

fn configs() -> PathBuf {
    repository().join("qemu-configs")
}

fn program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// A folder with a vmgmtctl that writes down what it is asked, and ends with that code where it is asked to thaw.
fn folder(thaw: u8) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    program(
        &folder.path().join("vmgmtctl"),
        &format!("#!/bin/sh\necho \"$@\" >> asked\n[ \"$1\" != thaw ] || exit {thaw}\n"),
    )?;
    Ok(folder)
}

/// frozen.sh in such a folder, around what is still to be said.
fn frozen(folder: &TempDir) -> Command {
    frozen_with(folder, ["--timeout", "60"])
}

fn frozen_with(folder: &TempDir, option: [&str; 2]) -> Command {
    let mut command = Command::new(configs().join("frozen.sh"));
    command
        .env("VMGMTCTL", folder.path().join("vmgmtctl"))
        .env("VMGMT_LOCKS", folder.path())
        .env("VMGMT_PATIENCE", "0")
        .current_dir(folder.path())
        .args(option)
        .args(["web", "--"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn asked(folder: &TempDir) -> Result<String> {
    Ok(fs::read_to_string(folder.path().join("asked"))?)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.clone(), output.stderr.clone()].concat()).into_owned()
}

fn check(folder: &TempDir, output: &Output, code: i32, expected: &str) -> Result<()> {
    let asked = asked(folder)?;
    ensure!(
        output.status.code() == Some(code) && asked == expected,
        "{:?}:\n{asked}{}",
        output.status,
        said(output)
    );
    Ok(())
}

/// A virsh and the libvirt behind it: `save` begins a copy that lasts until `domjobinfo` was asked `left` times, or until `domjobabort`, which
/// does `aborts` first; when it has begun, virsh does `begun`. The process of frozen.sh is in `parent`.
fn libvirt(folder: &TempDir, left: u32, begun: &str, aborts: &str) -> Result<PathBuf> {
    let path = folder.path().join("virsh");
    let text = format!(
        "#!/bin/sh
        case \"$1\" in
        uri) echo qemu:///system; echo ;;
        domname) echo web; echo ;;
        save)
            echo {left} > left; echo $PPID > parent; echo 'copy begins' >> asked
            {begun}
            while [ -s left ]; do sleep 0.05; done
            exit 1 ;;
        domjobinfo)
            [ -s left ] || {{ echo 'Job type:         None       '; echo; exit; }}
            echo 'Job type:         Unbounded  '
            left=$(($(cat left) - 1))
            [ $left -gt 0 ] && echo $left > less && mv less left && exit
            echo 'copy ends' >> asked; : > left ;;
        domjobabort) {aborts}
            echo 'copy cancelled' >> asked; : > left ;;
        list) echo web; echo db ;;
        esac\n"
    );
    program(&path, &text)?;
    Ok(path)
}

fn save(folder: &TempDir, virsh: &Path) -> Result<Output> {
    Ok(frozen(folder).arg(virsh).args(["save", "web", "/f"]).output()?)
}

#[test]
fn a_signal_cancels_libvirts_copy_before_the_thaw() -> Result<()> {
    // An impatient person sends another one while the copy is being cancelled.
    let impatient = "kill -INT $(cat parent); kill -TERM $(cat parent); kill -HUP $(cat parent)";
    for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        let folder = folder(0)?;
        let virsh = libvirt(&folder, 1_000_000, &format!("kill -{signal} $PPID"), impatient)?;
        let output = save(&folder, &virsh)?;
        let expected = format!("{FREEZE}copy begins\ncopy cancelled\n{THAW}");
        check(&folder, &output, code, &expected)?;
    }
    Ok(())
}

/// As with a snapshot inside the disk image.
#[test]
fn what_libvirt_does_not_cancel_is_waited_for() -> Result<()> {
    let folder = folder(0)?;
    let virsh = libvirt(&folder, 4, "kill -TERM $PPID", "exit 1")?;
    let output = save(&folder, &virsh)?;
    let expected = format!("{FREEZE}copy begins\ncopy ends\n{THAW}");
    check(&folder, &output, 143, &expected)
}

#[test]
fn libvirts_copy_is_waited_for_when_virsh_is_gone() -> Result<()> {
    for begun in ["kill -KILL $$", "exit 1"] {
        let folder = folder(0)?;
        let virsh = libvirt(&folder, 4, begun, "")?;
        let output = save(&folder, &virsh)?;
        let code = if begun == "exit 1" { 1 } else { 137 };
        let expected = format!("{FREEZE}copy begins\ncopy ends\n{THAW}");
        check(&folder, &output, code, &expected)?;
    }
    // Who does not want to wait for it stops frozen.sh.
    let folder = folder(0)?;
    let virsh = libvirt(&folder, 1_000_000, "exit 1", "")?;
    let stop = "domjobinfo) kill -TERM $(cat parent);";
    let text = fs::read_to_string(&virsh)?.replace("domjobinfo)", stop);
    program(&virsh, &text)?;
    let output = save(&folder, &virsh)?;
    let expected = format!("{FREEZE}copy begins\ncopy cancelled\n{THAW}");
    check(&folder, &output, 143, &expected)
}

/// A save that succeeds ends the domain, and libvirt then has nothing to say of it.
#[test]
fn a_domain_that_has_ended_is_copied_no_more() -> Result<()> {
    let folder = folder(0)?;
    let virsh = libvirt(&folder, 1, "kill -KILL $$", "")?;
    let text = fs::read_to_string(&virsh)?
        .replace("domjobinfo)", "domjobinfo) exit 1 ;; nothing)")
        .replace("echo web; echo db ;;", "echo webserver; echo db ;;");
    program(&virsh, &text)?;
    let output = save(&folder, &virsh)?;
    check(&folder, &output, 137, &format!("{FREEZE}copy begins\n{THAW}"))
}

#[test]
fn a_copy_whose_end_is_not_known_leaves_the_vm_frozen() -> Result<()> {
    let folder = folder(0)?;
    let virsh = libvirt(&folder, 4, "kill -KILL $$", "")?;
    let text = fs::read_to_string(&virsh)?.replace("domjobinfo)", "domjobinfo) exit 1 ;; nothing)");
    program(&virsh, &text)?;
    let output = save(&folder, &virsh)?;
    check(&folder, &output, 75, &format!("{FREEZE}copy begins\n"))?;
    let text = said(&output);
    ensure!(
        text.contains("stays frozen") && text.contains("vmgmtctl thaw web"),
        "{text}"
    );
    Ok(())
}

/// A frozen.sh that is stopped while its virsh cannot be: what it said.
fn left_alone(folder: &TempDir, mut command: Command, virsh: &Path) -> Result<String> {
    // virsh goes on, and would hold a pipe open.
    let path = folder.path().join("said");
    let file = fs::File::create(&path)?;
    let status = command
        .arg(virsh)
        .args(["save", "web", "/f"])
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()?;
    let text = fs::read_to_string(path)?;
    ensure!(status.code() == Some(75), "{status:?}: {text}");
    // Its copy must see no thaw by another one either.
    let output = frozen(folder).arg("true").output()?;
    ensure!(
        output.status.code() == Some(75) && said(&output).contains("another frozen.sh (process "),
        "{output:?}"
    );
    let asked = asked(folder)?;
    ensure!(!asked.contains("thaw"), "{asked}");
    fs::write(folder.path().join("left"), "")?;
    // With its end another one may.
    let output = frozen_with(folder, ["--wait", "60"]).arg("true").output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(text)
}

/// libvirt does not answer, and virsh waits for it.
#[test]
fn a_libvirt_that_does_not_tell_is_not_waited_for_without_end() -> Result<()> {
    let folder = folder(0)?;
    let begun = "trap '' TERM; kill -TERM $PPID";
    let virsh = libvirt(&folder, 1_000_000, begun, "exit 1")?;
    let text = fs::read_to_string(&virsh)?.replace("domjobinfo)", "domjobinfo) exit 1 ;; nothing)");
    program(&virsh, &text)?;
    let text = left_alone(&folder, frozen(&folder), &virsh)?;
    ensure!(
        text.contains("virsh domjobinfo web") && text.contains("still runs"),
        "{text}"
    );
    Ok(())
}

/// What is waited for is held no more.
#[test]
fn a_cancelled_copy_is_not_waited_for_after_the_freeze() -> Result<()> {
    let folder = folder(0)?;
    let begun = "trap '' TERM; kill -TERM $PPID";
    let virsh = libvirt(&folder, 1_000_000, begun, "exit 1")?;
    let text = left_alone(&folder, frozen_with(&folder, ["--timeout", "1"]), &virsh)?;
    ensure!(text.contains("still runs"), "{text}");
    Ok(())
}

/// A sudo, which hands on no signal that comes from its own group of processes: it writes that down, and ends what it runs.
fn sudo(folder: &TempDir) -> Result<PathBuf> {
    let path = folder.path().join("sudo");
    let text = "#!/usr/bin/env python3
import os, signal, subprocess, sys
heard = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, heard)
heed = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
child = subprocess.Popen(sys.argv[1:], preexec_fn=heed)
while child.poll() is None:
    signals = signal.sigwaitinfo(heard)
    if signals.si_signo == signal.SIGCHLD:
        continue
    try:
        own = os.getpgid(signals.si_pid) == os.getpgid(0)
    except ProcessLookupError:
        own = False
    if own:
        with open('asked', 'a') as asked:
            print('kept back', signals.si_signo, file=asked)
    child.send_signal(signal.SIGKILL if own else signals.si_signo)
sys.exit(child.returncode if child.returncode >= 0 else 128 - child.returncode)
";
    program(&path, text)?;
    Ok(path)
}

#[test]
fn a_signal_passes_sudo() -> Result<()> {
    // sudo's parent is frozen.sh.
    let stop = "kill -TERM $(cut -d ' ' -f 4 /proc/$PPID/stat)";
    let folder = folder(0)?;
    let own =
        format!("trap 'echo ended >> asked; exit 1' TERM; {stop}; while [ -e asked ]; do sleep 0.05; done");
    let output = frozen(&folder)
        .arg(sudo(&folder)?)
        .args(["sh", "-c", &own])
        .output()?;
    check(&folder, &output, 143, &format!("{FREEZE}ended\n{THAW}"))?;

    // virsh itself has libvirt cancel it; and one that has no copy yet is ended.
    for (begun, expected) in [
        (stop.to_owned(), "copy begins\ncopy cancelled\n"),
        (
            format!(": > left; {stop}; while [ -e asked ]; do sleep 0.05; done"),
            "copy begins\n",
        ),
    ] {
        let folder = self::folder(0)?;
        let virsh = libvirt(&folder, 1_000_000, &begun, "")?;
        let output = frozen(&folder)
            .arg(sudo(&folder)?)
            .arg(virsh)
            .args(["save", "web", "/f"])
            .output()?;
        check(&folder, &output, 143, &format!("{FREEZE}{expected}{THAW}"))?;
    }
    Ok(())
}

/// `frozen.sh … 2>&1 | head -1`: what it says has no reader any more.
#[test]
fn the_thaw_needs_no_reader() -> Result<()> {
    let unread = || -> Result<Stdio> {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        Ok(writer.into())
    };
    let folder = folder(0)?;
    let stopped =
        "trap 'echo ended >> asked; exit' TERM; kill -TERM $PPID; while [ -e asked ]; do sleep 0.05; done";
    let output = frozen(&folder)
        .args(["sh", "-c", stopped])
        .stdout(unread()?)
        .stderr(unread()?)
        .output()?;
    check(&folder, &output, 143, &format!("{FREEZE}ended\n{THAW}"))?;

    let folder = self::folder(0)?;
    let virsh = libvirt(&folder, 4, "exit 1", "")?;
    let output = frozen(&folder)
        .arg(virsh)
        .args(["save", "web", "/f"])
        .stderr(unread()?)
        .output()?;
    let expected = format!("{FREEZE}copy begins\ncopy ends\n{THAW}");
    check(&folder, &output, 1, &expected)?;

    // Such a signal from elsewhere is not the command's end, and the command does not ignore it.
    let folder = self::folder(0)?;
    let piped = "kill -PIPE $PPID; (kill -PIPE $(exec sh -c 'echo $PPID'); echo ignored >> asked); exit 9";
    let output = frozen(&folder).args(["sh", "-c", piped]).output()?;
    check(&folder, &output, 9, &format!("{FREEZE}{THAW}"))
}

/// What the played QEMU does when its copy has begun.
#[derive(Clone, Copy, PartialEq)]
enum Begun {
    /// Somebody stops frozen.sh.
    Signal,
    /// qmp-job.py is killed outright.
    Kill,
}

/// A QEMU with its monitor, one connection at a time. A copy ends only after it was cancelled, when it was looked at some times more.
struct Qemu {
    asked: PathBuf,
    begun: Begun,
    /// Of the snapshot's job: "" where there is none.
    job: &'static str,
    migration: &'static str,
    looks: u32,
    processes: mpsc::Receiver<u32>,
}

impl Qemu {
    fn tell(&self, what: &str) -> Result<()> {
        let mut file = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.asked)?;
        Ok(writeln!(file, "{what}")?)
    }

    /// `client`: the process at the other end.
    fn begins(&self, client: u32) -> Result<()> {
        self.tell("copy begins")?;
        let (signal, process) = match self.begun {
            Begun::Signal => ("-TERM", self.processes.recv()?),
            Begun::Kill => ("-KILL", client),
        };
        let status = Command::new("kill")
            .args([signal, &process.to_string()])
            .status()?;
        ensure!(status.success(), "kill {signal} {process}");
        Ok(())
    }

    /// A look at what goes on: true when that has just ended.
    fn look(&mut self, state: &str) -> Result<bool> {
        self.looks += u32::from(state == "cancelling");
        let ends = state == "cancelling" && self.looks == 4;
        if ends {
            self.tell("copy ends")?;
        }
        Ok(ends)
    }

    fn answer(&mut self, request: &Value, client: u32) -> Result<Value> {
        let mut result = json!({});
        match request["execute"].as_str().context("no command")? {
            "snapshot-save" if !self.job.is_empty() => {
                return Ok(json!({ "error": { "desc": "Job ID is in use" } }));
            }
            "snapshot-save" => {
                self.job = "running";
                self.begins(client)?;
            }
            "migrate" => {
                self.migration = "active";
                self.begins(client)?;
            }
            "job-cancel" => {
                self.tell("cancel")?;
                self.job = "cancelling";
            }
            "migrate_cancel" => {
                self.tell("cancel")?;
                self.migration = "cancelling";
            }
            "query-jobs" => {
                if self.look(self.job)? {
                    self.job = "concluded";
                }
                let job = json!({ "id": "vmgmt-snapshot-save", "status": self.job, "error": "cancelled" });
                let other = json!({ "id": "another", "status": "running" });
                result = if self.job.is_empty() {
                    json!([other])
                } else {
                    json!([other, job])
                };
            }
            "query-migrate" => {
                if self.look(self.migration)? {
                    self.migration = "cancelled";
                }
                result = json!({ "status": self.migration });
            }
            "job-dismiss" => {
                self.tell("dismiss")?;
                self.job = "";
            }
            _ => {}
        }
        Ok(json!({ "return": result }))
    }

    fn serve(&mut self, mut stream: UnixStream) -> Result<()> {
        let client = rustix::net::sockopt::socket_peercred(&stream)?
            .pid
            .as_raw_nonzero()
            .get();
        stream.write_all(b"{\"QMP\": {}}\n")?;
        for line in BufReader::new(stream.try_clone()?).lines() {
            let request: Value = serde_json::from_str(&line?)?;
            let answer = self.answer(&request, u32::try_from(client)?)?;
            writeln!(stream, "{answer}")?;
        }
        Ok(())
    }
}

/// qmp-job.py under frozen.sh with such a QEMU, which has had this job before.
fn qmp_job(folder: &TempDir, begun: Begun, job: &'static str, words: &[&str]) -> Result<Output> {
    let socket = folder.path().join("qmp");
    let listener = UnixListener::bind(&socket)?;
    let (process, processes) = mpsc::channel();
    let mut qemu = Qemu {
        asked: folder.path().join("asked"),
        begun,
        job,
        migration: "none",
        looks: 0,
        processes,
    };
    // It ends with the test. Whoever goes away in the middle of an answer is none of its business.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = qemu.serve(stream) {
                eprintln!("the played QEMU: {error:#}");
            }
        }
    });
    let mut command = frozen(folder);
    command.arg(configs().join("qmp-job.py")).arg(socket).args(words);
    let child = command.spawn()?;
    process.send(child.id())?;
    Ok(child.wait_with_output()?)
}

#[test]
fn a_signal_cancels_qemus_copy_before_the_thaw() -> Result<()> {
    let folder = folder(0)?;
    let output = qmp_job(&folder, Begun::Signal, "", &["savevm", "tag", "disk0"])?;
    let expected = format!("{FREEZE}copy begins\ncancel\ncopy ends\ndismiss\n{THAW}");
    check(&folder, &output, 143, &expected)?;

    let folder = self::folder(0)?;
    let output = qmp_job(&folder, Begun::Signal, "", &["migrate", "tcp:other:1"])?;
    let expected = format!("{FREEZE}copy begins\ncancel\ncopy ends\n{THAW}");
    check(&folder, &output, 143, &expected)
}

#[test]
fn qemus_copy_is_ended_when_qmp_job_is_killed() -> Result<()> {
    let folder = folder(0)?;
    let output = qmp_job(&folder, Begun::Kill, "", &["savevm", "tag", "disk0"])?;
    let expected = format!("{FREEZE}copy begins\ncancel\ncopy ends\ndismiss\n{THAW}");
    check(&folder, &output, 137, &expected)
}

#[test]
fn what_a_killed_qmp_job_left_is_taken_away_or_named() -> Result<()> {
    let words = ["savevm", "tag", "disk0"];
    let folder = folder(0)?;
    let output = qmp_job(&folder, Begun::Signal, "concluded", &words)?;
    let expected = format!("{FREEZE}dismiss\ncopy begins\ncancel\ncopy ends\ndismiss\n{THAW}");
    check(&folder, &output, 143, &expected)?;

    // Its copy goes on: that must not see DMA either.
    let folder = self::folder(0)?;
    let output = qmp_job(&folder, Begun::Signal, "running", &words)?;
    check(&folder, &output, 75, FREEZE)?;
    let text = said(&output);
    ensure!(
        text.contains("still running") && text.contains(" cancel") && text.contains("stays frozen"),
        "{text}"
    );
    Ok(())
}

#[test]
fn one_vm_is_frozen_by_one_at_a_time() -> Result<()> {
    let folder = folder(0)?;
    let script = configs().join("frozen.sh").display().to_string();
    // Another VM is nobody's business; a second one for this VM is told who is there, or waits.
    let inner = format!(
        "{script} db -- true; {script} web -- sh -c 'echo torn >> asked'; echo \"ended $?\" >> asked
        {script} --wait 60 web -- sh -c 'echo waited >> asked' &"
    );
    let output = frozen(&folder).args(["sh", "-c", &inner]).output()?;
    let expected = format!(
        "{FREEZE}freeze db --timeout 3600\nthaw db\nended 75\n{THAW}freeze web --timeout 3600\nwaited\n{THAW}"
    );
    check(&folder, &output, 0, &expected)?;
    let text = said(&output);
    ensure!(text.contains("another frozen.sh (process "), "{text}");
    Ok(())
}

/// Without the lock, or without knowing whose copy it is, another one could thaw in its middle, or its end could not be asked for.
#[test]
fn what_cannot_be_watched_is_not_run() -> Result<()> {
    let folder = folder(0)?;
    let virsh = libvirt(&folder, 1, "", "")?;
    let output = frozen(&folder)
        .env("VMGMT_LOCKS", folder.path().join("missing"))
        .args(["sh", "-c", "echo run >> asked"])
        .output()?;
    ensure!(
        output.status.code() == Some(75) && said(&output).contains("cannot open"),
        "{output:?}"
    );
    let output = frozen(&folder)
        .arg(virsh)
        .args(["save", "--new-option", "7", "web"])
        .output()?;
    ensure!(
        output.status.code() == Some(75) && said(&output).contains("--domain NAME"),
        "{output:?}"
    );
    // It would be gone at the first signal, and what it runs would go on.
    for before in [&[][..], &["env"]] {
        let output = frozen(&folder)
            .args(before)
            .args(["systemd-inhibit", "--what=sleep", "sh", "-c", "echo run >> asked"])
            .output()?;
        ensure!(
            output.status.code() == Some(75) && said(&output).contains("systemd-inhibit frozen.sh"),
            "{output:?}"
        );
    }
    ensure!(!folder.path().join("asked").exists(), "{}", asked(&folder)?);
    Ok(())
}

#[test]
fn who_cannot_be_asked_is_not_who_thawed_too_early() -> Result<()> {
    for (thaw, expected, other) in [
        (1, "was not frozen to the end", "cannot be asked"),
        (7, "cannot be asked", "was not frozen to the end"),
    ] {
        let folder = folder(thaw)?;
        let output = frozen(&folder).arg("true").output()?;
        check(&folder, &output, 75, &format!("{FREEZE}{THAW}"))?;
        let text = said(&output);
        ensure!(text.contains(expected) && !text.contains(other), "{text}");
    }
    Ok(())
}
