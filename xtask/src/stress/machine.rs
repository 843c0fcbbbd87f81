//! The stress run's machine: one real VM that works, is reset, killed, unplugged and started again.
//!
//! In: commands of the guest's own tool, by its shell. Out: their exit codes and what they said, in the ledger. It must never take an error for granted:
//! a command may fail only where the core was disturbed in its time and it says that it cannot tell, or where a `recv` had nothing to give.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vmgmt_testkit::process::wait_until;
use vmgmt_testkit::setup::Tools;
use vmgmt_testkit::vm::{Driver, Iommu, Memory, Output, Running, Vm, VmBuilder};

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
/// The one thing that a command may say instead of being done: a name operation whose core died in the middle.
const EXCUSABLE: &str = "cannot tell whether it was done";
/// What `vmgmt recv` says when nothing came in its time, with exit code 5.
const NOTHING_CAME: &str = "no answer in time";

/// How a machine reaches its device, and where its memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fashion {
    pub name: &'static str,
    driver: Driver,
    iommu: Iommu,
    memory: Memory,
}

/// The machines' fashions in turn: four of them meet every way to a device.
pub const FASHIONS: [Fashion; 7] = [
    Fashion::new("uio", Driver::Uio, Iommu::None, Memory::Shared),
    Fashion::new("vfio, Intel's IOMMU", Driver::Vfio, Iommu::Intel, Memory::Shared),
    Fashion::new("uio, memory by messages", Driver::Uio, Iommu::None, Memory::Plain),
    Fashion::new("ports", Driver::None, Iommu::None, Memory::Shared),
    Fashion::new(
        "vfio, virtio's IOMMU",
        Driver::Vfio,
        Iommu::Virtio,
        Memory::Shared,
    ),
    Fashion::new("uio, memory in a file", Driver::Uio, Iommu::None, Memory::File),
    Fashion::new(
        "vfio, memory by messages",
        Driver::Vfio,
        Iommu::Intel,
        Memory::Private,
    ),
];

impl Fashion {
    const fn new(name: &'static str, driver: Driver, iommu: Iommu, memory: Memory) -> Self {
        Self {
            name,
            driver,
            iommu,
            memory,
        }
    }

    /// Longest file that goes there and back in seconds: some 50 kB/s go through the ports of a VM under TCG.
    pub const fn file_bytes_max(self) -> usize {
        match self.driver {
            Driver::None => 100_000,
            Driver::Uio | Driver::Vfio => usize::MAX,
        }
    }

    /// What `vmgmt bind` calls the driver, and the kernel its module.
    const fn driver(self) -> (&'static str, Option<&'static str>) {
        match self.driver {
            Driver::Uio => ("uio", Some("uio_pci_generic")),
            Driver::Vfio => ("vfio", Some("vfio_pci")),
            Driver::None => ("none", None),
        }
    }
}

/// How a command ended.
pub enum Ended {
    Well(String),
    /// A `recv` to which nothing came.
    Empty,
    /// Excused; to be done again.
    Again,
}

/// A VM on its socket.
pub struct Machine {
    pub name: String,
    pub fashion: Fashion,
    builder: VmBuilder,
    socket: PathBuf,
    vm: Option<Vm>,
}

impl Machine {
    /// Boots it.
    pub fn start(tools: &Tools, name: &str, socket: PathBuf, fashion: Fashion) -> Result<Self> {
        let builder = VmBuilder::new(tools, name)
            .memory_mib(MEMORY_MIB)
            .memory(fashion.memory)
            .iommu(fashion.iommu)
            .driver(fashion.driver)
            .device_on_port(&socket, DEVICE);
        let vm = builder.clone().start()?;
        Ok(Self {
            name: name.into(),
            fashion,
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
        let disturbed = since % 2 == 1 || course.ledger.epoch() != since;
        match verdict(kind, output, disturbed) {
            Some(ended) => {
                if matches!(ended, Ended::Again) {
                    course.ledger.excuse_said(&format!("vmgmt {kind}: {EXCUSABLE}"));
                }
                Ok(ended)
            }
            None => bail!(
                "`{}` in {} ended with {}: {}",
                shown(command),
                self.name,
                output.status,
                output.text()
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

    /// Presses the reset button on a program in the middle of its work.
    pub fn reset_under(&self, running: Running) -> Result<()> {
        self.vm()?.pause()?;
        drop(running.lost());
        self.vm()?.reset()
    }

    /// Kills QEMU under a program in the middle of its work, and starts it again on its socket.
    pub fn kill_under(&mut self, course: &Course, running: Running) -> Result<()> {
        self.vm()?.pause()?;
        drop(running.lost());
        self.kill_now(course)
    }

    /// Unplugs the device under a program in the middle of its work, which ends with an error, and plugs it in again.
    pub fn unplug_under(&self, mut running: Running) -> Result<()> {
        if self.fashion.driver == Driver::Vfio {
            // The kernel lets vfio's user keep a device that is to go until it closes it.
            running.signal("KILL")?;
        }
        self.vm()?.unplug(DEVICE)?;
        let output = running.wait(COMMAND_DEADLINE)?;
        ensure!(
            output.status != 0,
            "a program in {} whose device was unplugged ended well: {}",
            self.name,
            output.text()
        );
        println!(
            "        {} (its program: {}, {})",
            self.name,
            output.status,
            shown(&output.text().replace('\n', " "))
        );
        self.plug()
    }

    /// Kills QEMU while letters are received, and starts it again on its socket.
    pub fn kill(&mut self, course: &Course) -> Result<()> {
        let receiving = self.spawn("vmgmt --json recv --follow")?;
        self.cut_off(course, receiving)?;
        self.kill_now(course)
    }

    fn kill_now(&mut self, course: &Course) -> Result<()> {
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
        self.vm()?.unplug(DEVICE)?;
        self.plug()
    }

    fn plug(&self) -> Result<()> {
        let vm = self.vm()?;
        vm.plug(&self.socket, DEVICE, 0)?;
        wait_until("the guest to see its device", COMMAND_DEADLINE, || {
            let seen = vm.run("grep -q 0x10f0 /sys/bus/pci/devices/*/device")?;
            Ok((seen.status == 0).then_some(()))
        })?;
        let (driver, _) = self.fashion.driver();
        self.must(&format!("vmgmt bind --driver {driver} && vmgmt info"))
            .map(drop)
    }

    /// Unloads the kernel's driver and loads it again; where there is none, resets the function.
    pub fn reload(&self) -> Result<()> {
        let command = match self.fashion.driver() {
            (driver, Some(module)) => {
                format!(
                    "vmgmt bind --driver none && rmmod {module} && vmgmt bind --driver {driver} && vmgmt info"
                )
            }
            (_, None) => {
                "echo 1 > $(dirname $(grep -l 0x10f0 /sys/bus/pci/devices/*/device))/reset && vmgmt info"
                    .into()
            }
        };
        self.must(&command).map(drop)
    }

    /// What kernel and QEMU said so far must be clean.
    pub fn inspect(&self, course: &Course) -> Result<()> {
        let vm = self.vm()?;
        for line in vm.kernel_complaints() {
            course
                .ledger
                .mismatch(format!("the kernel of {} says: {line}", self.name));
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

/// What an exit code means; nothing: that it must not be.
fn verdict(kind: &str, output: &Output, disturbed: bool) -> Option<Ended> {
    let text = output.text();
    match output.status {
        0 => Some(Ended::Well(text)),
        // The same code says "busy", "not ready", "in use" and more: a guest program that meets these has seen an error.
        5 if kind == "recv" && text.contains(NOTHING_CAME) => Some(Ended::Empty),
        _ if disturbed && text.contains(EXCUSABLE) => Some(Ended::Again),
        _ => None,
    }
}

fn shown(command: &str) -> String {
    command.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: &str, status: i32, text: &str, disturbed: bool) -> Option<&'static str> {
        let bytes = text.as_bytes().to_vec();
        verdict(kind, &Output { bytes, status }, disturbed).map(|ended| match ended {
            Ended::Well(_) => "well",
            Ended::Empty => "empty",
            Ended::Again => "again",
        })
    }

    #[test]
    fn only_a_receive_may_come_back_with_nothing() {
        let nothing = "{\"code\":5,\"error\":\"no answer in time\",\"status\":null}";
        assert_eq!(of("recv", 5, nothing, false), Some("empty"));
        assert_eq!(of("get", 5, nothing, true), None);
        for text in [
            "vmgmt: work/x: READ: busy: try again later",
            "vmgmt: PUT: over a budget of this VM",
            "vmgmt: the device 0000:01:00.0 is in use by process 7",
            "vmgmt: opening a ring took longer than 10s",
        ] {
            for kind in ["recv", "get", "cp"] {
                assert_eq!(of(kind, 5, text, true), None, "{kind}: {text}");
            }
        }
    }

    #[test]
    fn an_error_is_excused_only_where_the_core_was_disturbed_and_nobody_can_tell() {
        let text = "vmgmt: work/x: COMMIT: the host daemon was replaced meanwhile and cannot tell whether it was done";
        assert_eq!(of("put", 1, text, true), Some("again"));
        assert_eq!(of("put", 1, text, false), None);
        assert_eq!(of("cp", 1, "vmgmt: vm2:x: STREAM_WRITE: cancelled", true), None);
    }
}
