//! The machine room: real QEMU VMs for tests and the demo, with a shell into each.
//!
//! In: what the VM should be ([`VmBuilder`]). Out: a running [`Vm`]: commands inside the guest, QEMU's monitor, its
//! console. It must never know what a management device is beyond the path of its socket.

mod arguments;
mod builder;
mod channel;
mod complaints;
mod qmp;

pub use builder::VmBuilder;
pub use channel::{Output, Running};
pub use qmp::Qmp;

use crate::{
    process::{Process, locked, patience, wait_until},
    setup::{self, Image, Tools, Wanted},
};
use anyhow::{Context, Result, bail};
use channel::{Channel, Evidence};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A guest is up in about 5 s under TCG; with several at once on two processors and a cold page cache it takes longer.
pub const BOOT_DEADLINE: Duration = Duration::from_secs(180);

/// What [`Vm::run`] gives a command.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// How long a device may take to be unplugged: the guest has a say in it.
const UNPLUG_DEADLINE: Duration = Duration::from_secs(30);

/// What is needed to boot VMs, brought up to date once per process and image.
///
/// Where that is impossible the reason is printed as `skipped: …` and there is nothing; with `CI=true` it is an error, since CI
/// runs setup first and must not pass by skipping.
pub fn tools_or_skip(image: Image) -> Result<Option<Tools>> {
    static FOUND: Mutex<BTreeMap<Image, Result<Tools, String>>> = Mutex::new(BTreeMap::new());
    let mut found = locked(&FOUND);
    let tools = found.entry(image).or_insert_with(|| {
        setup::prepare(Wanted {
            image,
            install: false,
        })
        .map_err(|error| format!("{error:#}"))
    });
    match tools {
        Ok(tools) => Ok(Some(tools.clone())),
        Err(reason) if std::env::var_os("CI").is_some_and(|value| value == "true") => {
            bail!("CI=true and no VM can be booted: {reason}")
        }
        Err(reason) => {
            crate::skipped(format_args!("no VM can be booted here: {reason}"));
            Ok(None)
        }
    }
}

/// Where the guest's memory is, seen from a device's server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// A memfd that the server gets and can map.
    Shared,
    /// QEMU's own: the server gets no descriptor, only DMA messages.
    Plain,
    /// A trap: a memfd is sent, but the guest runs on private copies of its pages.
    Private,
    /// A file on disk, shared.
    File,
    /// A memfd of huge pages; the host must have reserved some.
    HugePages,
}

/// The VM's virtual IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// None: the guest can use `uio_pci_generic`.
    None,
    /// Intel's, with caching mode.
    Intel,
    /// virtio's.
    Virtio,
}

/// Which driver the guest's kernel gives to management devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// No driver.
    None,
    /// `uio_pci_generic`.
    Uio,
    /// `vfio-pci`; wants an IOMMU.
    Vfio,
}

/// What the VM starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// The guest image's kernel.
    Kernel,
    /// UEFI with its shell on the console; there is no agent.
    Ovmf,
}

/// A running VM. Dropping it kills it; its logs stay in the cache folder's `logs`.
pub struct Vm {
    name: String,
    process: Mutex<Process>,
    pid: u32,
    qmp: Qmp,
    console: Mutex<UnixStream>,
    channels: Vec<Arc<Channel>>,
    evidence: Arc<Evidence>,
    command_line: String,
    folder: tempfile::TempDir,
}

impl Vm {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// QEMU's monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// The command line QEMU was started with.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// The file with what the console said.
    pub fn console_path(&self) -> &Path {
        &self.evidence.console
    }

    /// What the console said so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.evidence.console).unwrap_or_default()).into_owned()
    }

    /// What its kernel said and must not say: warnings, faults, stalls ([`complaints`]).
    pub fn kernel_complaints(&self) -> Vec<String> {
        complaints::complaints(&self.console())
    }

    /// Waits until the console has said `needle`.
    pub fn wait_console(&self, needle: &str, deadline: Duration) -> Result<()> {
        wait_until(&format!("{needle:?} on the console"), deadline, || {
            self.check_alive()?;
            Ok(self.console().contains(needle).then_some(()))
        })
        .with_context(|| self.evidence.text())
    }

    /// Types on the console.
    pub fn type_on_console(&self, text: &str) -> Result<()> {
        Ok(locked(&self.console).write_all(text.as_bytes())?)
    }

    /// What QEMU itself said (stdout and stderr).
    pub fn qemu_log(&self) -> String {
        self.evidence.qemu.text()
    }

    /// The ends of console and QEMU's messages, for an error.
    pub fn evidence(&self) -> String {
        self.evidence.text()
    }

    /// Waits until every command channel is served.
    pub fn wait_boot(&self) -> Result<()> {
        let start = Instant::now();
        for channel in &self.channels {
            let left = patience(BOOT_DEADLINE).saturating_sub(start.elapsed());
            channel
                .wait_ready(left)
                .with_context(|| format!("VM {} did not boot", self.name))?;
        }
        Ok(())
    }

    /// Runs a shell command in the guest, for at most a minute; any exit status is an answer.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, COMMAND_DEADLINE)
    }

    /// Runs a shell command in the guest with its own deadline.
    pub fn run_for(&self, command: &str, deadline: Duration) -> Result<Output> {
        self.spawn(command)?.wait(deadline)
    }

    /// Runs a shell command that must succeed; gives its output.
    pub fn ok(&self, command: &str) -> Result<String> {
        self.ok_for(command, COMMAND_DEADLINE)
    }

    /// Runs a shell command that must succeed, with its own deadline.
    pub fn ok_for(&self, command: &str, deadline: Duration) -> Result<String> {
        let output = self.run_for(command, deadline)?;
        output
            .ok()
            .with_context(|| format!("`{command}` in VM {}", self.name))
    }

    /// Begins a shell command in the guest on any free channel. Its standard input is empty; what it leaves running in
    /// the background should have its output elsewhere.
    pub fn spawn(&self, command: &str) -> Result<Running> {
        let control = self.channels.first().context("this VM has no command channel")?;
        for channel in self.channels.iter().skip(1) {
            if let Some(mut running) = channel.begin(command)? {
                running.control = Some(Arc::clone(control));
                return Ok(running);
            }
        }
        bail!(
            "all {} command channels of VM {} are in use: wait for a command, or ask the builder for more",
            self.channels.len() - 1,
            self.name
        )
    }

    /// Writes a small file in the guest (through the command channel; about 1 MB/s).
    pub fn write_file(&self, path: &str, contents: &[u8]) -> Result<()> {
        self.ok(&format!(": > '{path}'"))?;
        for piece in contents.chunks(30_000) {
            self.ok(&format!(
                "base64 -d >> '{path}' <<'EOF'\n{}\nEOF",
                channel::base64(piece)
            ))?;
        }
        Ok(())
    }

    /// Plugs a management device in while the VM runs, on root port `port` (see [`VmBuilder::ports`]).
    pub fn plug(&self, socket: impl AsRef<Path>, id: &str, port: usize) -> Result<()> {
        self.plug_json(arguments::device(socket.as_ref(), id), port)
    }

    /// Plugs any device in, in the JSON form of `-device`, on root port `port`.
    pub fn plug_json(&self, mut device: Value, port: usize) -> Result<()> {
        if let Some(object) = device.as_object_mut() {
            object.insert("bus".into(), format!("port{port}").into());
        }
        self.qmp.execute("device_add", device).map(drop)
    }

    /// Unplugs a device and waits until it is gone.
    pub fn unplug(&self, id: &str) -> Result<()> {
        self.qmp.execute("device_del", json!({ "id": id }))?;
        let gone = |data: &Value| data.get("device").and_then(Value::as_str) == Some(id);
        self.qmp
            .wait_event_where("DEVICE_DELETED", UNPLUG_DEADLINE, gone)
            .map(drop)
    }

    /// Stops the processors.
    pub fn pause(&self) -> Result<()> {
        self.qmp.execute("stop", json!({})).map(drop)
    }

    /// Lets the processors go on.
    pub fn go_on(&self) -> Result<()> {
        self.qmp.execute("cont", json!({})).map(drop)
    }

    /// Presses the reset button, lets the processors go on where they stood still, and waits until the guest is up again.
    pub fn reset(&self) -> Result<()> {
        for channel in &self.channels {
            channel.forget();
        }
        self.qmp.execute("system_reset", json!({}))?;
        self.go_on()?;
        self.wait_boot()
    }

    /// An error if QEMU has ended.
    pub fn check_alive(&self) -> Result<()> {
        match locked(&self.process).ended()? {
            Some(status) => bail!(
                "QEMU of VM {} ended ({status}):\n{}",
                self.name,
                self.evidence.text()
            ),
            None => Ok(()),
        }
    }

    /// Lets QEMU end in order and waits for it.
    pub fn quit(&self, deadline: Duration) -> Result<()> {
        // The answer may be lost with the socket.
        let _ = self.qmp.execute("quit", json!({}));
        locked(&self.process).wait(deadline).map(drop)
    }

    /// Kills QEMU, as `kill -9` would.
    pub fn kill(&self) {
        locked(&self.process).kill();
    }

    /// The folder of its sockets and, with [`Memory::File`], its memory.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
        for channel in &self.channels {
            channel.close();
        }
        if std::thread::panicking() {
            eprintln!(
                "logs of VM {}: {}, {}",
                self.name,
                self.evidence.console.display(),
                self.evidence.qemu.path().display()
            );
        }
    }
}
