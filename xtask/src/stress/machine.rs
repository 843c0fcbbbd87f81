//! The stress run's machine: one real VM that works, is reset, killed, unplugged and started again.
//!
//! In: commands of the guest's own tool, by its shell. Out: their exit codes and what they said, in the ledger. It must never take an error for granted:
//! a command may fail only while the core was disturbed in its time and it says so (STALE and its like), or because this very file ended its
//! guest.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vmgmt_testkit::process::wait_until;
use vmgmt_testkit::setup::Tools;
use vmgmt_testkit::vm::{Driver, Output, Running, Vm, VmBuilder};

use crate::endurance::content;
use crate::endurance::crew::Course;

/// One command in a guest, on a machine that runs several under TCG.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// A guest's memory in MiB.
const MEMORY_MIB: u32 = 128;
/// The device's name for QEMU's monitor.
const DEVICE: &str = "mgmt";
/// `vmgmt recv` has at most so many receives posted: what its end can take along.
const RECEIVES_POSTED: u64 = 4;
/// What a command says when the VM at the other end of its stream was killed, or a name operation cannot be told.
const EXCUSABLE: [&str; 3] = [
    "cannot tell whether it was done",
    "a stream that has failed",
    ": cancelled",
];
/// Words of a guest's kernel that must never be said.
const KERNEL_COMPLAINTS: [&str; 10] = [
    "Oops",
    "BUG:",
    "WARNING:",
    "Call Trace",
    "Kernel panic",
    "nobody cared",
    "AER:",
    "vfio-pci: probe",
    "uio_pci_generic: probe",
    "can't reserve",
];

/// How a command ended.
pub enum Ended {
    Well(String),
    /// Nothing came, nobody was there: exit code 5.
    Empty,
    /// Excused; to be done again.
    Again,
}

/// A VM on its socket.
pub struct Machine {
    pub name: String,
    builder: VmBuilder,
    socket: PathBuf,
    vm: Option<Vm>,
}

impl Machine {
    /// Boots it.
    pub fn start(tools: &Tools, name: &str, socket: PathBuf) -> Result<Self> {
        let builder = VmBuilder::new(tools, name)
            .memory_mib(MEMORY_MIB)
            .driver(Driver::Uio)
            .device_on_port(&socket, DEVICE);
        let vm = builder.clone().start()?;
        Ok(Self {
            name: name.into(),
            builder,
            socket,
            vm: Some(vm),
        })
    }

    fn vm(&self) -> Result<&Vm> {
        self.vm.as_ref().context("the VM was not started again")
    }

    pub fn spawn(&self, command: &str) -> Result<Running> {
        self.vm()?.spawn(command)
    }

    /// A command that no disruption may be seen in.
    pub fn must(&self, command: &str) -> Result<String> {
        let output = self.vm()?.run_for(command, COMMAND_DEADLINE)?;
        let text = output.ok();
        text.with_context(|| format!("`{}` in {}", shown(command), self.name))
    }

    /// A command on handles and streams.
    pub fn try_to(&self, course: &Course, kind: &str, command: &str) -> Result<Ended> {
        let since = course.ledger.epoch();
        let output = self.vm()?.run_for(command, COMMAND_DEADLINE)?;
        self.judge(course, kind, command, &output, since)
    }

    /// What an exit code means.
    pub fn judge(
        &self,
        course: &Course,
        kind: &str,
        command: &str,
        output: &Output,
        since: u64,
    ) -> Result<Ended> {
        let text = output.text();
        match output.status {
            0 => return Ok(Ended::Well(text)),
            5 => return Ok(Ended::Empty),
            _ => {}
        }
        let disturbed = since % 2 == 1 || course.ledger.epoch() != since;
        let excuse = EXCUSABLE.into_iter().find(|excuse| text.contains(excuse));
        match excuse {
            Some(excuse) if disturbed => {
                course.ledger.excuse_said(&format!("vmgmt {kind}: {excuse}"));
                Ok(Ended::Again)
            }
            _ => bail!(
                "`{}` in {} ended with {}: {text}",
                shown(command),
                self.name,
                output.status
            ),
        }
    }

    /// Sends a letter; whatever happens, it is accepted once.
    pub fn send(&self, course: &Course, target: &str) -> Result<()> {
        let sequence = course.ledger.number(&self.name, target, true);
        let text = content::letter(&self.name, target, sequence, true);
        // The key is for a program that dies: the letter is sent again under the same number.
        self.must(&format!("vmgmt send --key {sequence} {target} '{text}'"))?;
        course.ledger.accepted(&self.name, target, sequence, text.len());
        Ok(())
    }

    /// Takes the letters that are there, and some that come; how many.
    pub fn receive(&self, course: &Course) -> Result<usize> {
        match self.try_to(course, "recv", "vmgmt --json recv --count 100 --timeout 0.5")? {
            Ended::Well(text) => self.read(course, &text),
            Ended::Empty | Ended::Again => Ok(0),
        }
    }

    fn read(&self, course: &Course, text: &str) -> Result<usize> {
        let mut count = 0;
        for line in text.lines().filter(|line| line.starts_with('{')) {
            let message: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let part = |key| message.get(key).and_then(Value::as_str);
            let (from, body) = part("from").zip(part("text")).with_context(|| line.to_owned())?;
            course.ledger.received(&self.name, from, body.as_bytes());
            count += 1;
        }
        Ok(count)
    }

    /// Presses the reset button while letters are received.
    pub fn reset(&self, course: &Course) -> Result<()> {
        let receiving = self.spawn("vmgmt --json recv --follow")?;
        self.cut_off(course, receiving)?;
        self.vm()?.reset()
    }

    /// Kills QEMU while letters are received, and starts it again on its socket.
    pub fn kill(&mut self, course: &Course) -> Result<()> {
        let receiving = self.spawn("vmgmt --json recv --follow")?;
        self.cut_off(course, receiving)?;
        self.inspect(course)?;
        if let Some(vm) = self.vm.take() {
            vm.kill();
        }
        self.vm = Some(self.builder.clone().start()?);
        Ok(())
    }

    /// Stops the processors while a `recv` runs: what it has said counts, what it had posted may be gone with it.
    fn cut_off(&self, course: &Course, mut receiving: Running) -> Result<()> {
        receiving.pid(COMMAND_DEADLINE)?;
        wait_until("a letter, or a moment without one", COMMAND_DEADLINE, || {
            Ok((course.ledger.outstanding() > 0 || !course.working()).then_some(()))
        })?;
        self.vm()?.pause()?;
        let said = receiving.lost();
        // A line that is not whole was not read by anybody.
        let whole = said
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        let text = String::from_utf8_lossy(said.get(..whole).unwrap_or_default()).into_owned();
        self.read(course, &text)?;
        course.ledger.program_died(&self.name, RECEIVES_POSTED);
        Ok(())
    }

    /// Unplugs the device and plugs it in again.
    pub fn replug(&self) -> Result<()> {
        let vm = self.vm()?;
        vm.unplug(DEVICE)?;
        vm.plug(&self.socket, DEVICE, 0)?;
        wait_until("the guest to see its device", COMMAND_DEADLINE, || {
            let seen = vm.run("grep -q 0x10f0 /sys/bus/pci/devices/*/device")?;
            Ok((seen.status == 0).then_some(()))
        })?;
        self.must("vmgmt bind --driver uio && vmgmt info").map(drop)
    }

    /// Unloads the kernel's driver and loads it again.
    pub fn reload(&self) -> Result<()> {
        self.must(
            "vmgmt bind --driver none && rmmod uio_pci_generic && vmgmt bind --driver uio && vmgmt info",
        )
        .map(drop)
    }

    /// What kernel and QEMU said so far must be clean.
    pub fn inspect(&self, course: &Course) -> Result<()> {
        let vm = self.vm()?;
        for line in vm.console().lines() {
            if KERNEL_COMPLAINTS.iter().any(|complaint| line.contains(complaint)) {
                course
                    .ledger
                    .mismatch(format!("the kernel of {} says: {}", self.name, line.trim()));
            }
        }
        for line in vm.qemu_log().lines().filter(|line| line.contains("vfio")) {
            course
                .ledger
                .mismatch(format!("QEMU of {} says: {}", self.name, line.trim()));
        }
        ensure!(vm.check_alive().is_ok(), "QEMU of {} has ended", self.name);
        Ok(())
    }
}

fn shown(command: &str) -> String {
    command.chars().take(100).collect()
}
