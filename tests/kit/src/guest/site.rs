//! A building site: one `vmgmtd` with VMs' sockets and shares, in a folder of its own.
//!
//! In: how many VMs, which settings. Out: sockets to connect to, folders to look into, processes to watch. It must never know what
//! is tested.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::machine::{GuestOptions, SimulatedVm};
use crate::process::{Daemon, DaemonBuilder};

/// What to build.
#[derive(Clone, Debug)]
pub struct SitePlan {
    program: PathBuf,
    vms: usize,
    devices_max: u32,
    server: String,
    device: String,
    limits: String,
    share_lines: String,
    vm: String,
    shared_socket: bool,
    log: String,
    share: Option<PathBuf>,
    variables: Vec<(String, String)>,
}

impl SitePlan {
    /// `vms` VMs (`vm0`, `vm1`, …) with a socket each and one share, `work`, that all may write to.
    pub fn new(program: impl Into<PathBuf>, vms: usize) -> Self {
        Self {
            program: program.into(),
            vms,
            devices_max: 1,
            server: String::new(),
            device: String::new(),
            limits: String::new(),
            share_lines: String::new(),
            vm: String::new(),
            shared_socket: false,
            log: "info".into(),
            share: None,
            variables: Vec::new(),
        }
    }

    /// Devices that one VM may have at once.
    #[must_use]
    pub const fn devices_max(mut self, devices: u32) -> Self {
        self.devices_max = devices;
        self
    }

    /// A line for `[server]`.
    #[must_use]
    pub fn server(mut self, line: &str) -> Self {
        self.server.push_str(line);
        self.server.push('\n');
        self
    }

    /// A line for `[device]`.
    #[must_use]
    pub fn device(mut self, line: &str) -> Self {
        self.device.push_str(line);
        self.device.push('\n');
        self
    }

    /// A line for `[limits]`.
    #[must_use]
    pub fn limits(mut self, line: &str) -> Self {
        self.limits.push_str(line);
        self.limits.push('\n');
        self
    }

    /// A line for each `[[vm]]`.
    #[must_use]
    pub fn vm(mut self, line: &str) -> Self {
        self.vm.push_str(line);
        self.vm.push('\n');
        self
    }

    /// A line for the share's table.
    #[must_use]
    pub fn share_line(mut self, line: &str) -> Self {
        self.share_lines.push_str(line);
        self.share_lines.push('\n');
        self
    }

    /// And a socket for any number of anonymous VMs: [`Site::shared_socket`].
    #[must_use]
    pub const fn shared_socket(mut self) -> Self {
        self.shared_socket = true;
        self
    }

    /// Another folder as the share (on another file system, say).
    #[must_use]
    pub fn share_at(mut self, folder: impl Into<PathBuf>) -> Self {
        self.share = Some(folder.into());
        self
    }

    /// What is logged (`debug`, `warn`).
    #[must_use]
    pub fn log(mut self, filter: &str) -> Self {
        self.log = filter.into();
        self
    }

    /// A variable of its environment.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    fn configuration(&self) -> String {
        let share = self
            .share
            .as_ref()
            .map_or_else(|| "@DIR@/share".into(), |path| path.display().to_string());
        let mut text = format!(
            "[server]\ncontrol = \"@DIR@/control.sock\"\nlog = \"{}\"\n{}\n[device]\n{}\n[limits]\n{}\n\
             [[share]]\nname = \"work\"\npath = \"{share}\"\n{}\n",
            self.log, self.server, self.device, self.limits, self.share_lines
        );
        for number in 0..self.vms {
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n[[vm]]\nname = \"vm{number}\"\nsocket = \"@DIR@/vm{number}.sock\"\nshares = [\"work:rw\"]\n\
                 devices-max = {}\n{}",
                self.devices_max, self.vm
            );
        }
        if self.shared_socket {
            text.push_str("\n[[socket]]\npath = \"@DIR@/shared.sock\"\nshares = [\"work:ro\"]\n");
        }
        text
    }

    /// Builds it and waits until `vmgmtd` is ready.
    pub fn start(self) -> Result<Site> {
        let builder = DaemonBuilder::new(&self.program)
            .configuration(self.configuration())
            .folder("share");
        let daemon = (self.variables.iter())
            .fold(builder, |builder, (name, value)| builder.variable(name, value))
            .start()
            .context("starting vmgmtd")?;
        let share = self.share.unwrap_or_else(|| daemon.path("share"));
        Ok(Site { daemon, share })
    }
}

/// A running `vmgmtd` with its VMs' sockets. Dropping it ends it.
pub struct Site {
    /// The processes.
    pub daemon: Daemon,
    share: PathBuf,
}

/// The ids of the three processes that last as long as nothing breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pids {
    /// Main process.
    pub keeper: u32,
    /// What speaks vfio-user.
    pub front: u32,
    /// What does the work.
    pub core: u32,
}

impl Site {
    /// The socket of VM `number`.
    pub fn socket(&self, number: usize) -> PathBuf {
        self.daemon.path(&format!("vm{number}.sock"))
    }

    /// The socket for anonymous VMs.
    pub fn shared_socket(&self) -> PathBuf {
        self.daemon.path("shared.sock")
    }

    /// The operator's socket.
    pub fn control(&self) -> PathBuf {
        self.daemon.path("control.sock")
    }

    /// The folder behind the share `work`.
    pub fn share(&self) -> &Path {
        &self.share
    }

    /// VM `number`, connected as usual.
    pub fn vm(&self, number: usize) -> Result<SimulatedVm> {
        self.vm_with(number, GuestOptions::default())
    }

    /// VM `number`, as the options say.
    pub fn vm_with(&self, number: usize, options: GuestOptions) -> Result<SimulatedVm> {
        SimulatedVm::connect_with(self.socket(number), options)
            .with_context(|| format!("vm{number}; vmgmtd said:\n{}", self.daemon.log().tail()))
    }

    /// Its processes now.
    pub fn pids(&self) -> Result<Pids> {
        Ok(Pids {
            keeper: self.daemon.pid(),
            front: self.daemon.role("front")?,
            core: self.daemon.role("core")?,
        })
    }

    /// That the same processes still run and that none of them panicked.
    pub fn check_unharmed(&self, before: Pids) -> Result<()> {
        let now = self.pids().context(self.daemon.log().tail())?;
        ensure!(
            now == before,
            "processes were {before:?} and are {now:?}; vmgmtd said:\n{}",
            self.daemon.log().tail()
        );
        let text = self.daemon.log().text();
        let panicked = text.lines().find(|line| line.contains("panicked at"));
        ensure!(panicked.is_none(), "vmgmtd panicked: {panicked:?}");
        Ok(())
    }
}
