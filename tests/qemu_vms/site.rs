//! A host for tests: vmgmtd with a share and a socket per VM, and the VMs on it.

use anyhow::{Context, Result, bail, ensure};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use vmgmt_testkit::process::{Daemon, DaemonBuilder};
use vmgmt_testkit::setup::{Image, Tools};
use vmgmt_testkit::vm::{Driver, Vm, VmBuilder, tools_or_skip};

/// Everything in a VM that is not a large transfer.
pub const SHORT: Duration = Duration::from_secs(60);
/// Large transfers, and what waits for them.
pub const LONG: Duration = Duration::from_secs(240);

/// vmgmtd, and what it takes to start VMs on it.
pub struct Site {
    pub tools: Tools,
    pub daemon: Daemon,
}

/// A site with VMs `vm1`…`vmN`; `None`: there is no QEMU here, and that was said.
pub fn site(vms: usize) -> Result<Option<Site>> {
    let Some(tools) = tools_or_skip(Image::Small)? else {
        return Ok(None);
    };
    let mut configuration = String::from(
        "[server]\ncontrol = \"@DIR@/control.sock\"\n\n[[share]]\nname = \"data\"\npath = \"@DIR@/share\"\n\
         \n[[socket]]\npath = \"@DIR@/shared.sock\"\nshares = [\"data\"]\n",
    );
    for number in 1..=vms {
        configuration.push_str(&format!(
            "\n[[vm]]\nname = \"vm{number}\"\nsocket = \"@DIR@/vm{number}.sock\"\nshares = [\"data\"]\nsend-to-all = true\n"
        ));
    }
    let daemon = DaemonBuilder::new(env!("CARGO_BIN_EXE_vmgmtd"))
        .configuration(configuration)
        .folder("share")
        .start()?;
    Ok(Some(Site { tools, daemon }))
}

impl Site {
    /// A VM on its own socket, with the uio driver; more can be said before it is started.
    pub fn builder(&self, name: &str) -> VmBuilder {
        VmBuilder::new(&self.tools, name)
            .driver(Driver::Uio)
            .device(self.daemon.path(&format!("{name}.sock")), "mgmt")
    }

    /// That VM, booted.
    pub fn vm(&self, name: &str) -> Result<Vm> {
        self.builder(name).start()
    }

    /// A file in the share.
    pub fn shared(&self, name: &str) -> PathBuf {
        self.daemon.path("share").join(name)
    }

    /// Fills a file in the share with bytes that repeat nowhere near.
    pub fn fill(&self, name: &str, bytes: usize) -> Result<Vec<u8>> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ bytes as u64;
        let mut data = Vec::with_capacity(bytes + 8);
        while data.len() < bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            data.extend_from_slice(&state.to_le_bytes());
        }
        data.truncate(bytes);
        std::fs::write(self.shared(name), &data)?;
        Ok(data)
    }

    /// vmgmtctl; what it says.
    pub fn operator(&self, words: &[&str]) -> Result<String> {
        let output = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
            .arg("--control")
            .arg(self.daemon.path("control.sock"))
            .args(words)
            .stdin(Stdio::null())
            .output()
            .context("cannot run vmgmtctl")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "vmgmtctl {words:?} ended with {}: {said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(said)
    }

    /// Runs what a test does; the VMs' kernels must have nothing to complain about. If it fails, with all that the VMs and vmgmtd said.
    pub fn check(&self, vms: &[&Vm], work: impl FnOnce() -> Result<()>) -> Result<()> {
        let clean = || {
            let unclean = |vm: &&Vm| {
                vm.kernel_complaints()
                    .first()
                    .map(|line| (vm.name().to_owned(), line.clone()))
            };
            match vms.iter().find_map(unclean) {
                Some((vm, line)) => bail!("the kernel of {vm} says: {line}"),
                None => Ok(()),
            }
        };
        work().and_then(|()| clean()).map_err(|error| {
            let said: String = vms.iter().map(|vm| vm.evidence()).collect();
            error.context(format!("vmgmtd said:\n{}\n{said}", self.daemon.log().tail()))
        })
    }
}

/// sha256 of a file in a VM.
pub fn checksum(vm: &Vm, path: &str) -> Result<String> {
    let line = vm.ok_for(&format!("sha256sum {path}"), LONG)?;
    Ok(line.split_whitespace().next().unwrap_or_default().to_owned())
}

/// sha256 of a file of the host.
pub fn host_checksum(path: &std::path::Path) -> Result<String> {
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
    Ok(String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}
