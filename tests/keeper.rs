//! The keeper with real processes: start, deaths of each role, stop, admission, the operators' socket while no core is there.

#[path = "keeper/priority.rs"]
mod priority;
#[path = "keeper/words.rs"]
mod words;

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use vmgmt_ctl::protocol::{AddVm, Call, ErrorCode, RemoveVm, Status, Vms};
use vmgmt_ctl::{Client, ClientError};
use vmgmt_testkit::client::Client as Device;
use vmgmt_testkit::process::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);

/// A `vmgmtd` with everything in a directory of its own.
struct Daemon {
    directory: tempfile::TempDir,
    process: Child,
    lines: Arc<Mutex<String>>,
}

impl Daemon {
    /// Starts one with these arguments; `DIR` stands for its directory.
    fn start(arguments: &[&str]) -> Result<Self> {
        Self::start_in(tempfile::tempdir()?, arguments, &[])
    }

    fn start_in(
        directory: tempfile::TempDir,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        std::fs::create_dir(directory.path().join("pub"))?;
        let shown = directory.path().to_str().context("a path")?;
        let mut process = Command::new(env!("CARGO_BIN_EXE_vmgmtd"))
            .args(["--control", &format!("{shown}/control.sock"), "--log", "info"])
            .args(arguments.iter().map(|argument| argument.replace("DIR", shown)))
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = Arc::new(Mutex::new(String::new()));
        let stderr = BufReader::new(process.stderr.take().context("stderr")?);
        let into = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                into.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&(line + "\n"));
            }
        });
        Ok(Self {
            directory,
            process,
            lines,
        })
    }

    fn start_ready(arguments: &[&str]) -> Result<Self> {
        let daemon = Self::start(arguments)?;
        daemon.wait_line("vmgmtd: ready")?;
        Ok(daemon)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
    fn lines(&self) -> String {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    fn wait_line(&self, text: &str) -> Result<()> {
        wait_until(text, PATIENCE, || Ok(self.lines().contains(text).then_some(())))
            .with_context(|| self.lines())
    }
    fn wait_end(&mut self) -> Result<ExitStatus> {
        let process = &mut self.process;
        wait_until("the end of vmgmtd", PATIENCE, || Ok(process.try_wait()?))
    }
    fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    /// Process of a role, by its parent and name.
    fn role(&self, role: &str) -> Option<i32> {
        children_of(self.pid()).into_iter().find(|pid| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.starts_with(format!("vmgmtd-{role}\0").as_bytes())
        })
    }
    fn wait_role(&self, role: &str, not: Option<i32>) -> Result<i32> {
        wait_until(role, PATIENCE, || {
            Ok(self.role(role).filter(|pid| Some(*pid) != not))
        })
    }

    fn call<T: serde::de::DeserializeOwned>(&self, call: Call) -> Result<T, ClientError> {
        let mut client = Client::connect(&self.path("control.sock"))?;
        let result = client.call(&call, &[], Some(PATIENCE), &mut |_| true)?;
        serde_json::from_value(result).map_err(|error| ClientError::Garbled(error.to_string()))
    }
    /// The status once a core of life `life` or later serves.
    fn wait_serving(&self, life: u64) -> Result<Status> {
        wait_until("a serving core", PATIENCE, || {
            let status: Status = self.call(Call::Status)?;
            Ok((status.state == "serving" && status.life >= life).then_some(status))
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn children_of(parent: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    Ok(kill_process(Pid::from_raw(pid).context("pid")?, signal)?)
}

/// Gone, or dead and not yet collected.
fn is_dead(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty()
        || stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
}

fn wait_dead(pids: &[i32]) -> Result<()> {
    wait_until("their death", PATIENCE, || {
        Ok(pids.iter().all(|pid| is_dead(*pid)).then_some(()))
    })
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Result<vmgmt_ctl::protocol::Failure> {
    match result {
        Err(ClientError::Failed(failure)) => Ok(failure),
        other => bail!("{other:?}"),
    }
}

#[test]
fn it_starts_serves_and_stops_in_order_leaving_nothing() -> Result<()> {
    for number in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock", "--share", "pub=DIR/pub:ro"])?;
        let status: Status = daemon.call(Call::Status)?;
        ensure!(
            (status.state.as_str(), status.answered_by.as_str(), status.life) == ("serving", "core", 1),
            "{status:?}"
        );
        ensure!(status.pid == daemon.process.id(), "{status:?}");
        let device = Device::connect_ready(daemon.path("mgmt.sock"))?;
        let children = [daemon.wait_role("front", None)?, daemon.wait_role("core", None)?];
        // Twice, as `timeout` and some service managers do.
        signal(daemon.pid(), number)?;
        signal(daemon.pid(), number)?;
        ensure!(daemon.wait_end()?.code() == Some(0), "{}", daemon.lines());
        // (What it said last is read when it has ended already.)
        daemon.wait_line("stopped")?;
        ensure!(
            !daemon.lines().contains("instead of in order"),
            "{}",
            daemon.lines()
        );
        wait_dead(&children)?;
        let left: Vec<_> = std::fs::read_dir(daemon.directory.path())?
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        ensure!(left == ["pub"], "{left:?}");
        drop(device);
    }
    Ok(())
}

#[test]
fn a_killed_core_is_replaced_and_its_devices_stay() -> Result<()> {
    let daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    let mut device = Device::connect_ready(daemon.path("mgmt.sock"))?;
    let before = device.get_info()?;
    let mut core = daemon.wait_role("core", None)?;
    for life in 2..=4 {
        signal(core, Signal::KILL)?;
        let status = daemon.wait_serving(life)?;
        ensure!(status.life == life, "{status:?}");
        ensure!(
            status
                .notices
                .iter()
                .any(|line| line.contains("signal 9 (from outside)")),
            "{status:?}"
        );
        ensure!(device.get_info()? == before);
        core = daemon.wait_role("core", Some(core))?;
    }
    let vms: Vms = daemon.call(Call::Vms)?;
    ensure!(
        vms.vms.len() == 1 && vms.vms[0].name == "anon-1" && vms.vms[0].sessions.len() == 1,
        "{vms:?}"
    );
    // The VM of a shared socket ends with its QEMU.
    drop(device);
    wait_until("no VM", PATIENCE, || {
        Ok(daemon.call::<Vms>(Call::Vms)?.vms.is_empty().then_some(()))
    })
}

#[test]
fn while_no_core_is_there_the_keeper_answers_and_nothing_hangs() -> Result<()> {
    let daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    // Three deaths in a row: the next core waits, and a stopped one is not ready.
    let mut core = None;
    for _ in 0..3 {
        let next = daemon.wait_role("core", core)?;
        signal(next, Signal::KILL)?;
        core = Some(next);
        wait_dead(&[next])?;
    }
    let status = wait_until("the keeper's answer", PATIENCE, || {
        let status: Status = daemon.call(Call::Status)?;
        if status.answered_by == "core" {
            signal(daemon.wait_role("core", None)?, Signal::KILL)?;
            return Ok(None);
        }
        // (It may answer before it has seen the last death.)
        let deaths = status.counters.get("core deaths").copied();
        Ok(deaths.is_some_and(|deaths| deaths >= 3).then_some(status))
    })?;
    ensure!(
        status.state == "restarting" && status.notices.len() >= 3,
        "{status:?}"
    );
    // What the keeper cannot answer is asked again until the core is there.
    let vms: Vms = daemon.call(Call::Vms)?;
    ensure!(vms.vms.is_empty());
    ensure!(daemon.call::<Status>(Call::Status)?.answered_by == "core");
    Ok(())
}

#[test]
fn a_core_that_faults_is_told_from_one_that_was_killed() -> Result<()> {
    let daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    signal(daemon.wait_role("core", None)?, Signal::ABORT)?;
    daemon.wait_line("core life 1 died: signal 6 (SIGABRT)")?;
    daemon.wait_serving(2)?;
    Ok(())
}

#[test]
fn a_dead_front_ends_the_daemon_with_a_clear_line() -> Result<()> {
    let mut daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    let core = daemon.wait_role("core", None)?;
    signal(daemon.wait_role("front", None)?, Signal::KILL)?;
    ensure!(daemon.wait_end()?.code() == Some(1));
    daemon.wait_line("the front has died (signal 9 (from outside)): all devices are gone")?;
    wait_dead(&[core])
}

#[test]
fn a_dead_keeper_takes_all_with_it() -> Result<()> {
    let mut daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    let children = [daemon.wait_role("front", None)?, daemon.wait_role("core", None)?];
    signal(daemon.pid(), Signal::KILL)?;
    ensure!(daemon.wait_end()?.signal() == Some(9));
    wait_dead(&children)?;
    // The next one takes the stale sockets over.
    let shown = daemon.directory.path().to_str().context("a path")?.to_owned();
    ensure!(Path::new(&format!("{shown}/mgmt.sock")).exists());
    let next = Daemon::start_ready(&["--socket", &format!("{shown}/mgmt.sock")])?;
    Device::connect_ready(format!("{shown}/mgmt.sock"))?;
    drop(next);
    Ok(())
}

#[test]
fn a_socket_in_use_is_not_taken() -> Result<()> {
    let daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    let path = daemon.path("mgmt.sock");
    let mut second = Daemon::start(&["--socket", path.to_str().context("a path")?])?;
    ensure!(second.wait_end()?.code() == Some(1));
    second.wait_line("somebody listens on it already")?;
    Device::connect_ready(&path)?;
    Ok(())
}

#[test]
fn a_second_connection_of_a_vm_is_refused_and_comes_in_when_the_first_has_gone() -> Result<()> {
    let daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    let add = |name: &str| {
        let socket = daemon
            .path(&format!("{name}.sock"))
            .to_str()
            .unwrap_or_default()
            .to_owned();
        Call::AddVm(Box::new(AddVm {
            name: name.into(),
            socket,
            mode: Some("0640".into()),
            ..AddVm::default()
        }))
    };
    daemon.call::<serde_json::Value>(add("web"))?;
    ensure!(
        refusal(daemon.call::<serde_json::Value>(add("web")))?
            .message
            .contains("a VM \"web\" already")
    );
    ensure!(refusal(daemon.call::<serde_json::Value>(add("a/b")))?.code == ErrorCode::BadRequest);
    let socket = daemon.path("web.sock");
    let first = Device::connect_ready(&socket)?;
    ensure!(Device::connect_ready(&socket).is_err(), "two at once");
    daemon.wait_line(&format!(
        "VM \"web\" is connected already by process {}",
        std::process::id()
    ))?;
    drop(first);
    let again = wait_until("the second", PATIENCE, || Ok(Device::connect_ready(&socket).ok()))?;
    // It outlives its connections and the core, until it is removed.
    signal(daemon.wait_role("core", None)?, Signal::KILL)?;
    daemon.wait_serving(2)?;
    let vms: Vms = daemon.call(Call::Vms)?;
    ensure!(
        vms.vms
            .iter()
            .any(|vm| vm.name == "web" && vm.sessions.len() == 1),
        "{vms:?}"
    );
    let remove = || Call::RemoveVm(RemoveVm { name: "web".into() });
    daemon.call::<serde_json::Value>(remove())?;
    ensure!(!socket.exists());
    ensure!(daemon.call::<Vms>(Call::Vms)?.vms.is_empty());
    ensure!(
        refusal(daemon.call::<serde_json::Value>(remove()))?
            .message
            .contains("no VM \"web\"")
    );
    drop(again);
    Ok(())
}

#[test]
fn several_devices_of_one_process_are_one_vm_on_a_shared_socket() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("vmgmtd.toml");
    let socket = directory.path().join("shared.sock");
    std::fs::write(&file, format!("[[socket]]\npath = {socket:?}\ndevices-max = 2\n"))?;
    let daemon = Daemon::start_ready(&["--config", file.to_str().context("a path")?])?;
    let devices = [Device::connect_ready(&socket)?, Device::connect_ready(&socket)?];
    let vms: Vms = daemon.call(Call::Vms)?;
    ensure!(vms.vms.len() == 1 && vms.vms[0].sessions.len() == 2, "{vms:?}");
    ensure!(Device::connect_ready(&socket).is_err(), "three");
    drop(devices);
    Ok(())
}

#[test]
fn the_service_manager_hears_of_it_when_all_is_ready() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path)?;
    manager.set_read_timeout(Some(PATIENCE))?;
    let environment = [("NOTIFY_SOCKET", path.to_str().context("a path")?)];
    let daemon = Daemon::start_in(directory, &["--socket", "DIR/mgmt.sock"], &environment)?;
    let mut buffer = [0; 256];
    let bytes = manager.recv(&mut buffer)?;
    ensure!(buffer[..bytes].trim_ascii() == b"READY=1");
    // It is the keeper's alone to speak to it.
    let front = daemon.wait_role("front", None)?;
    let environment = std::fs::read(format!("/proc/{front}/environ"))?;
    ensure!(!String::from_utf8_lossy(&environment).contains("NOTIFY_SOCKET"));
    ensure!(daemon.call::<Status>(Call::Status)?.answered_by == "core");
    Ok(())
}

#[test]
fn hundreds_of_vms_are_told_to_each_core_before_their_sessions() -> Result<()> {
    const VMS: usize = 400;
    let directory = tempfile::tempdir()?;
    let mut text = String::new();
    for number in 0..VMS {
        let socket = directory.path().join(format!("{number}.sock"));
        text += &format!("[[vm]]\nname = \"vm{number}\"\nsocket = {socket:?}\n");
    }
    let file = directory.path().join("vmgmtd.toml");
    std::fs::write(&file, text)?;
    let sockets: Vec<_> = (0..VMS)
        .map(|number| directory.path().join(format!("{number}.sock")))
        .collect();
    let daemon = Daemon::start_in(directory, &["--config", file.to_str().context("a path")?], &[])?;
    daemon.wait_line("vmgmtd: ready")?;
    let devices = sockets
        .iter()
        .step_by(10)
        .map(Device::connect_ready)
        .collect::<Result<Vec<_>, _>>()?;
    for life in 1..=2 {
        daemon.wait_serving(life)?;
        wait_until("all VMs and devices", PATIENCE, || {
            let vms: Vms = daemon.call(Call::Vms)?;
            let connected = vms.vms.iter().filter(|vm| vm.sessions.len() == 1).count();
            Ok((vms.vms.len() == VMS && connected == devices.len()).then_some(()))
        })?;
        if life == 1 {
            signal(daemon.wait_role("core", None)?, Signal::KILL)?;
        }
    }
    Ok(())
}

#[test]
fn children_that_do_not_end_are_ended() -> Result<()> {
    let mut daemon = Daemon::start_ready(&["--socket", "DIR/mgmt.sock"])?;
    let core = daemon.wait_role("core", None)?;
    signal(core, Signal::STOP)?;
    signal(daemon.pid(), Signal::TERM)?;
    ensure!(daemon.wait_end()?.code() == Some(0), "{}", daemon.lines());
    daemon.wait_line("instead of in order")?;
    wait_dead(&[core])
}
