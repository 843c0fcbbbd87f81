//! The caretaker's open house: the whole product at work, told to a person.
//!
//! In: nothing but this repository. Out: a file that went host -> VM -> VM -> host with its checksum at each station, messages each
//! way, and a report. It must never use anything but the programs' command lines: what is shown is what a user would do.

use crate::build::host_programs;
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::{
    fs,
    io::{BufRead, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use vmgmt_testkit::{
    process::{Daemon, DaemonBuilder},
    setup::{self, Image, Tools, Wanted},
    vm::{Driver, Vm, VmBuilder},
};

/// The file's size: a person should see it take a moment; CI should not wait.
const FILE_BYTES: u64 = 64 << 20;
const FILE_BYTES_SHORT: u64 = 4 << 20;

/// Copies run at tens of MB/s under TCG; the checksum in the guest is slower.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(180);

/// Everything that only passes a message.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(30);

/// Between the steps of the long form, so that a person can read along.
const READING_TIME: Duration = Duration::from_secs(1);

/// Two VMs with a socket each, one more for whoever wants to join, and a share for all.
const CONFIGURATION: &str = r#"
[server]
control = "@DIR@/control.sock"

[[share]]
name = "demo"
path = "@DIR@/share"

[[vm]]
name = "vm1"
socket = "@DIR@/vm1.sock"
shares = ["demo"]

[[vm]]
name = "vm2"
socket = "@DIR@/vm2.sock"
shares = ["demo"]

[[vm]]
name = "vm3"
socket = "@DIR@/vm3.sock"
shares = ["demo"]
"#;

#[derive(Args)]
pub struct Options {
    /// A small file and no pauses.
    #[arg(long)]
    short: bool,
    /// Afterwards keep everything running and take commands for the VMs.
    #[arg(long)]
    stay: bool,
}

/// What the demo holds while it runs; dropped in this order.
struct Stage {
    vm1: Vm,
    vm2: Vm,
    daemon: Daemon,
    control: PathBuf,
    /// `vmgmtctl`.
    operator: PathBuf,
    pause: Duration,
}

/// Sets up, shows everything, stops everything.
pub fn demo(options: &Options) -> Result<()> {
    let begin = Instant::now();
    let tools = setup::prepare(Wanted {
        image: Image::Small,
        install: true,
    })?;
    say("building vmgmtd and vmgmtctl");
    let programs = host_programs(&["vmgmtd", "vmgmtctl"], !options.short)?;
    let [server, operator] = programs.as_slice() else {
        anyhow::bail!("cargo gave {programs:?}")
    };
    let pause = if options.short {
        Duration::ZERO
    } else {
        READING_TIME
    };
    let stage = open(&tools, server, operator, pause)?;
    let bytes = if options.short {
        FILE_BYTES_SHORT
    } else {
        FILE_BYTES
    };
    let result = show_file(&stage, bytes).and_then(|()| show_messages(&stage));
    if let Err(error) = &result {
        println!(
            "\nvmgmtd said:\n{}\n{}\n{}",
            stage.daemon.log().tail(),
            stage.vm1.evidence(),
            stage.vm2.evidence()
        );
        println!("\ndemo: FAILED: {error:#}");
    }
    if options.stay {
        stay(&stage)?;
    }
    drop((stage.vm1, stage.vm2));
    stage.daemon.stop(MESSAGE_DEADLINE).context("stopping vmgmtd")?;
    result?;
    println!(
        "\ndemo: ok, {:.0} s in all; VMs and vmgmtd are stopped",
        begin.elapsed().as_secs_f64()
    );
    Ok(())
}

fn say(what: &str) {
    println!("* {what}");
}

/// Starts vmgmtd and both VMs.
fn open(tools: &Tools, server: &Path, operator: &Path, pause: Duration) -> Result<Stage> {
    let daemon = DaemonBuilder::new(server)
        .configuration(CONFIGURATION)
        .folder("share")
        .start()?;
    say(&format!(
        "vmgmtd runs (process {}), its folder is {}",
        daemon.pid(),
        daemon.folder().display()
    ));
    let start = Instant::now();
    let boot = |name: &'static str| {
        let socket = daemon.path(&format!("{name}.sock"));
        VmBuilder::new(tools, name)
            .driver(Driver::Uio)
            .device(socket, "mgmt")
            .start()
    };
    let (vm1, vm2) = thread::scope(|scope| {
        let second = scope.spawn(|| boot("vm2"));
        let first = boot("vm1");
        (first, second.join())
    });
    let vm2 = vm2.ok().context("starting vm2")??;
    say(&format!(
        "vm1 and vm2 are up after {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    let control = daemon.path("control.sock");
    Ok(Stage {
        vm1: vm1?,
        vm2,
        daemon,
        control,
        operator: operator.into(),
        pause,
    })
}

/// One file through all stations.
fn show_file(stage: &Stage, bytes: u64) -> Result<()> {
    println!("\nA file of {} MiB: host -> vm1 -> vm2 -> host", bytes >> 20);
    let original = stage.daemon.path("share/original.bin");
    write_random(&original, bytes)?;
    let expected = checksum_on_host(&original)?;
    station("host", &expected, None, bytes);

    let time = timed(stage, &stage.vm1, "vmgmt get demo/original.bin /tmp/file.bin")?;
    same(&stage.vm1, "/tmp/file.bin", &expected, time, bytes)?;

    let accept = stage
        .vm2
        .spawn("mkdir -p /tmp/in && vmgmt accept --once --into /tmp/in")?;
    let time = timed(stage, &stage.vm1, "vmgmt cp /tmp/file.bin vm2:")?;
    accept
        .wait(TRANSFER_DEADLINE)?
        .ok()
        .context("vmgmt accept in vm2")?;
    same(&stage.vm2, "/tmp/in/file.bin", &expected, time, bytes)?;

    let time = timed(stage, &stage.vm2, "vmgmt put /tmp/in/file.bin demo/returned.bin")?;
    let returned = checksum_on_host(&stage.daemon.path("share/returned.bin"))?;
    ensure!(
        returned == expected,
        "the file came back changed: {returned} instead of {expected}"
    );
    station("host", &returned, Some(time), bytes);
    Ok(())
}

/// Runs a command in a VM, shows it, and gives the time it took.
fn timed(stage: &Stage, vm: &Vm, command: &str) -> Result<Duration> {
    thread::sleep(stage.pause);
    println!("  {}$ {command}", vm.name());
    let start = Instant::now();
    vm.ok_for(command, TRANSFER_DEADLINE)?;
    Ok(start.elapsed())
}

fn same(vm: &Vm, path: &str, expected: &str, time: Duration, bytes: u64) -> Result<()> {
    let line = vm.ok_for(&format!("sha256sum {path}"), TRANSFER_DEADLINE)?;
    let found = line.split_whitespace().next().unwrap_or_default();
    ensure!(
        found == expected,
        "the file is another one in {}: {found} instead of {expected}",
        vm.name()
    );
    station(vm.name(), found, Some(time), bytes);
    Ok(())
}

fn station(place: &str, checksum: &str, time: Option<Duration>, bytes: u64) {
    let speed = time.map_or(String::new(), |time| {
        let seconds = time.as_secs_f64().max(1e-9);
        format!("  in {seconds:.2} s, {:.0} MB/s", bytes as f64 / 1e6 / seconds)
    });
    println!(
        "  {place:<5} sha256 {}…{speed}",
        checksum.get(..16).unwrap_or(checksum)
    );
}

fn write_random(path: &Path, bytes: u64) -> Result<()> {
    let mut source = fs::File::open("/dev/urandom")?.take(bytes);
    let mut target = fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    std::io::copy(&mut source, &mut target)?;
    Ok(())
}

fn checksum_on_host(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum")
        .arg(path)
        .output()
        .context("cannot run sha256sum")?;
    ensure!(
        output.status.success(),
        "sha256sum {}: {}",
        path.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .split_whitespace()
        .next()
        .context("sha256sum said nothing")?
        .to_owned())
}

/// Messages vm1 -> vm2, vm2 -> vm1, host -> vm1, vm2 -> host.
fn show_messages(stage: &Stage) -> Result<()> {
    println!("\nMessages");
    for (from, to) in [(&stage.vm1, &stage.vm2), (&stage.vm2, &stage.vm1)] {
        let text = format!("greetings from {}", from.name());
        let receive = to.spawn("vmgmt recv --count 1 --timeout 30")?;
        from.ok_for(&format!("vmgmt send {} '{text}'", to.name()), MESSAGE_DEADLINE)?;
        arrived(
            from.name(),
            to.name(),
            &text,
            &receive.wait(MESSAGE_DEADLINE)?.ok()?,
        )?;
        thread::sleep(stage.pause);
    }
    let text = "greetings from the host";
    let receive = stage.vm1.spawn("vmgmt recv --count 1 --timeout 30")?;
    operator(stage, &["send", "vm1", text])?;
    arrived("host", "vm1", text, &receive.wait(MESSAGE_DEADLINE)?.ok()?)?;

    let text = "greetings to the host";
    stage
        .vm2
        .ok_for(&format!("vmgmt send host '{text}'"), MESSAGE_DEADLINE)?;
    arrived("vm2", "host", text, &operator(stage, &["recv", "--wait", "30"])?)
}

fn arrived(from: &str, to: &str, text: &str, received: &str) -> Result<()> {
    ensure!(
        received.contains(text) && received.contains(from),
        "{to} received {received:?} instead of {text:?}"
    );
    println!("  {from} -> {to}: {}", received.trim());
    Ok(())
}

/// Runs vmgmtctl and gives what it says.
fn operator(stage: &Stage, words: &[&str]) -> Result<String> {
    let output = Command::new(&stage.operator)
        .arg("--control")
        .arg(&stage.control)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .context("cannot run vmgmtctl")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "vmgmtctl {} ended with {}: {said}{}",
        words.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// Takes commands from a person until `quit` or the end of the input.
fn stay(stage: &Stage) -> Result<()> {
    println!("\nEverything keeps running. Type");
    println!("  1 COMMAND   a shell command in vm1 (try: 1 vmgmt --help)");
    println!("  2 COMMAND   a shell command in vm2");
    println!("  h WORDS     vmgmtctl WORDS on the host (try: h status)");
    println!("  quit");
    println!(
        "A third VM, in another terminal: cargo xtask vm --socket {}",
        stage.daemon.path("vm3.sock").display()
    );
    for line in prompt_lines() {
        let line = line?;
        let (first, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let said = match first {
            "1" => stage.vm1.run(rest).map(|output| output.text()),
            "2" => stage.vm2.run(rest).map(|output| output.text()),
            "h" => operator(stage, &rest.split_whitespace().collect::<Vec<_>>()),
            "quit" => break,
            "" => continue,
            _ => Ok("1 COMMAND, 2 COMMAND, h WORDS or quit".into()),
        };
        match said {
            Ok(text) => println!("{text}"),
            Err(error) => println!("{error:#}"),
        }
    }
    Ok(())
}

fn prompt_lines() -> impl Iterator<Item = std::io::Result<String>> {
    let mut lines = std::io::stdin().lock().lines();
    std::iter::from_fn(move || {
        print!("demo> ");
        let _ = std::io::stdout().flush();
        lines.next()
    })
}
