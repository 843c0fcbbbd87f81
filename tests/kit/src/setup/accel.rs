//! Setup, the test bench: whether KVM really runs our guest here.
//!
//! In: a QEMU and a guest image. Out: KVM or TCG, remembered in the cache. `/dev/kvm` being there proves nothing (it may
//! belong to a hypervisor that cannot run a stock kernel), so the guest is booted once.

use super::{cache::Cache, cache::CacheLock, image::Images, qemu::Qemu, step};
use anyhow::{Result, bail};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// Overrides the probe: `kvm` or `tcg`.
pub const ACCELERATOR_VARIABLE: &str = "VMGMT_ACCEL";

/// With KVM the small guest is up in about two seconds; what needs ten times that is not worth having.
const PROBE_DEADLINE_S: u32 = 20;

/// Leaves out what makes TCG 4 to 5 times slower in the guest's copies (SMAP, the fast `rep movs` promises), and 5-level paging.
const TCG_CPU: &str = "max,-erms,-fsrm,-fsrs,-fsrc,-fzrm,-smap,-la57";

/// How the guest's instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor, through `/dev/kvm`.
    Kvm,
    /// By QEMU's translator: works everywhere.
    Tcg,
}

impl Accelerator {
    /// QEMU's arguments for it.
    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // A smaller translation buffer than the default 1 GiB: many VMs share this machine.
            Self::Tcg => ["-accel", "tcg,thread=multi,tb-size=128", "-cpu", TCG_CPU],
        }
    }
}

/// KVM where it was seen to boot the guest, else TCG.
pub fn choose(cache: &Cache, lock: &CacheLock, qemu: &Qemu, images: &Images) -> Result<Accelerator> {
    match std::env::var(ACCELERATOR_VARIABLE).as_deref() {
        Ok("kvm") => return Ok(Accelerator::Kvm),
        Ok("tcg") => return Ok(Accelerator::Tcg),
        Ok(other) => bail!("{ACCELERATOR_VARIABLE}={other}: it takes kvm or tcg"),
        Err(_) => {}
    }
    if !Path::new("/dev/kvm").exists() {
        return Ok(Accelerator::Tcg);
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    let key = format!("{release} {:?}", qemu.version);
    let remembered = fs::read_to_string(cache.path("kvm-probe")).unwrap_or_default();
    let works = match remembered.rsplit_once('\n') {
        Some((known, answer)) if known == key => answer == "works",
        _ => {
            let works = step("try whether KVM runs the guest", || probe(qemu, images))?;
            let answer = if works {
                "works"
            } else {
                "does not work: TCG is used"
            };
            eprintln!("setup: KVM {answer}");
            cache.write_file(lock, "kvm-probe", format!("{key}\n{answer}").as_bytes())?;
            works
        }
    };
    Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
}

/// Boots the guest with KVM and lets it switch itself off.
fn probe(qemu: &Qemu, images: &Images) -> Result<bool> {
    let output = Command::new("timeout")
        .args(["--signal=KILL", &PROBE_DEADLINE_S.to_string()])
        .arg(&qemu.program)
        .args(Accelerator::Kvm.arguments())
        .args([
            "-M",
            "q35",
            "-m",
            "256M",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .arg("-kernel")
        .arg(&images.kernel)
        .arg("-initrd")
        .arg(&images.initramfs)
        .args(["-append", "console=ttyS0 quiet panic=-1 vmgmt.poweroff=1"])
        .stdin(Stdio::null())
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout).contains("init: ready"))
}
