//! The machine room's order desk: what a VM should be, and how one is started.
//!
//! In: the builder's calls. Out: a started [`Vm`] with its sockets connected. It must never know what runs in the guest.

use super::{
    Driver, Firmware, Iommu, Memory, Qmp, Vm,
    arguments::{self, Wiring},
    channel::{Channel, Evidence},
};
use crate::{
    process::{Process, Start, new_log_path, wait_until},
    setup::Tools,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

/// QEMU connects to our sockets before it does anything slow.
const CONNECT_DEADLINE: Duration = Duration::from_secs(60);

/// What a VM should be. Defaults: 256 MiB shared memory (768 with the large image), one processor, no IOMMU, no device,
/// no driver, four command channels.
#[derive(Clone)]
pub struct VmBuilder {
    pub(super) tools: Tools,
    pub(super) name: String,
    pub(super) uuid: Option<String>,
    pub(super) memory_mib: u32,
    pub(super) memory: Memory,
    pub(super) processors: u32,
    pub(super) iommu: Iommu,
    pub(super) driver: Driver,
    pub(super) firmware: Firmware,
    pub(super) devices: Vec<Value>,
    pub(super) ports: usize,
    pub(super) channels: usize,
    pub(super) guest_huge_pages: u32,
    pub(super) kernel_words: Vec<String>,
    pub(super) extra: Vec<String>,
    pub(super) no_reboot: bool,
    pub(super) paused: bool,
}

impl VmBuilder {
    /// A VM called `name` (QEMU's `-name` and the guest's host name: letters, digits, dashes).
    pub fn new(tools: &Tools, name: &str) -> Self {
        let large = !tools.images.initramfs.ends_with("initramfs-small");
        Self {
            tools: tools.clone(),
            name: name.into(),
            uuid: None,
            memory_mib: if large { 768 } else { 256 },
            memory: Memory::Shared,
            processors: 1,
            iommu: Iommu::None,
            driver: Driver::None,
            firmware: Firmware::Kernel,
            devices: Vec::new(),
            ports: 0,
            // The first is for the harness itself.
            channels: 5,
            guest_huge_pages: 0,
            kernel_words: Vec::new(),
            extra: Vec::new(),
            no_reboot: false,
            paused: false,
        }
    }

    /// QEMU's `-uuid`.
    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = Some(uuid.into());
        self
    }

    /// The memory's size in MiB.
    pub fn memory_mib(mut self, size: u32) -> Self {
        self.memory_mib = size;
        self
    }

    /// Where the memory is.
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = memory;
        self
    }

    /// The number of virtual processors.
    pub fn processors(mut self, count: u32) -> Self {
        self.processors = count;
        self
    }

    /// The virtual IOMMU.
    pub fn iommu(mut self, iommu: Iommu) -> Self {
        self.iommu = iommu;
        self
    }

    /// The driver for management devices.
    pub fn driver(mut self, driver: Driver) -> Self {
        self.driver = driver;
        self
    }

    /// What it starts with.
    pub fn firmware(mut self, firmware: Firmware) -> Self {
        self.firmware = firmware;
        self
    }

    /// Root ports for [`Vm::plug`] and [`VmBuilder::device_on_port`]: what sits on the root bus itself can neither come nor go.
    pub fn ports(mut self, count: usize) -> Self {
        self.ports = count;
        self
    }

    /// A management device at this socket, on a root port of its own, so that it can be unplugged.
    pub fn device_on_port(mut self, socket: impl AsRef<Path>, id: &str) -> Self {
        let mut device = arguments::device(socket.as_ref(), id);
        if let Some(object) = device.as_object_mut() {
            object.insert("bus".into(), format!("port{}", self.ports).into());
        }
        self.ports += 1;
        self.device_json(device)
    }

    /// A management device at this socket, on the root bus.
    pub fn device(self, socket: impl AsRef<Path>, id: &str) -> Self {
        let device = arguments::device(socket.as_ref(), id);
        self.device_json(device)
    }

    /// Any device in the JSON form of `-device`.
    pub fn device_json(mut self, device: Value) -> Self {
        self.devices.push(device);
        self
    }

    /// How many commands may run in the guest at once (at most 29: the ports of one virtio-serial device).
    pub fn channels(mut self, count: usize) -> Self {
        self.channels = count.clamp(1, 29) + 1;
        self
    }

    /// Huge pages of 2 MiB that the guest reserves for itself.
    pub fn guest_huge_pages(mut self, count: u32) -> Self {
        self.guest_huge_pages = count;
        self
    }

    /// One more word on the guest kernel's command line.
    pub fn kernel_word(mut self, word: &str) -> Self {
        self.kernel_words.push(word.into());
        self
    }

    /// More QEMU arguments.
    pub fn extra<A: Into<String>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.extra.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// QEMU ends when the guest reboots.
    pub fn no_reboot(mut self) -> Self {
        self.no_reboot = true;
        self
    }

    /// The processors stand still until the monitor's `cont`.
    pub fn paused(mut self) -> Self {
        self.paused = true;
        self
    }

    /// The command that gives a person this VM on the terminal.
    pub fn interactive(&self) -> Result<Command> {
        let mut command = Command::new(&self.tools.qemu.program);
        command.args(arguments::arguments(self, &Wiring::Terminal)?);
        Ok(command)
    }

    /// Starts it and waits until its guest serves commands (kernel) or at once (OVMF, paused).
    pub fn start(self) -> Result<Vm> {
        let wait = self.firmware == Firmware::Kernel && !self.paused;
        let vm = self.start_only()?;
        if wait {
            vm.wait_boot()?;
        }
        Ok(vm)
    }

    /// Starts it without waiting for the guest; [`Vm::wait_boot`] does that later.
    pub fn start_only(self) -> Result<Vm> {
        let valid =
            !self.name.is_empty() && self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        ensure!(
            valid,
            "the VM name {:?} is not made of letters, digits and dashes",
            self.name
        );
        let folder = tempfile::Builder::new().prefix("vm-").tempdir()?;
        let console_log = new_log_path(&format!("{}-console", self.name))?;
        let list = arguments::arguments(&self, &Wiring::Sockets(folder.path(), &console_log))?;
        let channel_count = if self.firmware == Firmware::Kernel {
            self.channels
        } else {
            0
        };
        let mut names = vec!["qmp".to_owned(), "console".to_owned()];
        names.extend((0..channel_count).map(|number| format!("channel.{number}")));
        // We listen before QEMU starts, and QEMU connects while it starts: nothing has to be tried twice.
        let listeners: Vec<UnixListener> = names
            .iter()
            .map(|name| {
                UnixListener::bind(folder.path().join(name)).with_context(|| format!("socket {name}"))
            })
            .collect::<Result<_>>()?;
        let command_line = shown(&self.tools.qemu.program, &list);
        let log = new_log_path(&format!("{}-qemu", self.name))?;
        let mut process = Start::new(&self.tools.qemu.program, log)
            .arguments(list)
            .start()?;
        let mut streams = Vec::new();
        for (listener, name) in listeners.iter().zip(&names) {
            let stream = accept(listener, &mut process).with_context(|| {
                format!(
                    "QEMU did not connect to {name}; it said:\n{}\n{command_line}",
                    process.log().tail()
                )
            })?;
            streams.push(stream);
        }
        let mut streams = streams.into_iter();
        let monitor = streams.next().context("no monitor")?;
        let console = streams.next().context("no console")?;
        // What the console says is in its log file; a socket nobody reads would stop the guest.
        let mut sink = console.try_clone()?;
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                let _ = std::io::copy(&mut sink, &mut std::io::sink());
            })?;
        let evidence = Arc::new(Evidence {
            vm: self.name.clone(),
            console: console_log,
            qemu: process.log().clone(),
        });
        let qmp = Qmp::new(monitor).with_context(|| evidence.text())?;
        let channels = streams
            .enumerate()
            .map(|(number, stream)| Channel::new(number, stream, Arc::clone(&evidence)))
            .collect::<Result<Vec<_>>>()?;
        let pid = process.pid();
        Ok(Vm {
            name: self.name,
            process: Mutex::new(process),
            pid,
            qmp,
            console: Mutex::new(console),
            channels,
            evidence,
            command_line,
            folder,
        })
    }
}

/// The command line as a person could type it.
fn shown(program: &Path, arguments: &[String]) -> String {
    let quoted = arguments.iter().map(|word| match word.contains([' ', '{', '"']) {
        true => format!("'{word}'"),
        false => word.clone(),
    });
    std::iter::once(program.display().to_string())
        .chain(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Waits for QEMU on one of our sockets, as long as QEMU lives.
fn accept(listener: &UnixListener, process: &mut Process) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let stream = wait_until("QEMU to connect", CONNECT_DEADLINE, || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => match process.ended()? {
            Some(status) => bail!("QEMU ended ({status})"),
            None => Ok(None),
        },
        Err(error) => Err(error.into()),
    })?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}
