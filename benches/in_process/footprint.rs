//! What it takes to be there: memory and processor time of each process, idle, at 1 and 256 sessions.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmgmt_driver::Mode;
use vmgmt_testkit::guest::{GuestInterrupts, GuestOptions};

use super::{Figures, site};

const IDLE: Duration = Duration::from_secs(3);

/// KiB of a field of `/proc/PID/status`.
fn status_kib(pid: u32, field: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text
        .lines()
        .find(|line| line.starts_with(field))
        .context("no such field")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
}

/// Nanoseconds on a processor, all threads.
fn busy_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        sum += text
            .split_whitespace()
            .next()
            .context("no time")?
            .parse::<u64>()?;
    }
    Ok(sum)
}

pub fn run(figures: &mut Figures) -> Result<()> {
    // 256 guests in this one process need about 20 descriptors each.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )?;
    for sessions in [1, 256] {
        figures.title(&format!(
            "Footprint with {sessions} sessions, one open ring each, idle"
        ));
        let site = site(sessions)?;
        let options = GuestOptions::default()
            .ram_bytes(1 << 20)
            .interrupts(GuestInterrupts::Msi(1));
        let vms: Vec<_> = (0..sessions)
            .map(|number| site.vm_with(number, options))
            .collect::<Result<_>>()?;
        let mut rings: Vec<_> = vms.iter().map(|vm| vm.ring(Mode::CHAT)).collect::<Result<_>>()?;
        for ring in &mut rings {
            ring.noop()?;
        }
        let pids = site.pids()?;
        let roles = [
            ("keeper", pids.keeper),
            ("front", pids.front),
            ("core", pids.core),
        ];
        // The measured time itself, not a wait for something: half a second first for the last poll to end.
        std::thread::sleep(Duration::from_millis(500));
        let before: Vec<u64> = roles
            .iter()
            .map(|(_, pid)| busy_ns(*pid))
            .collect::<Result<_>>()?;
        // Else every share below would be zero and mean nothing.
        ensure!(
            before.iter().all(|ns| *ns > 0),
            "this kernel counts no processor time in schedstat"
        );
        std::thread::sleep(IDLE);
        for ((role, pid), before) in roles.into_iter().zip(before) {
            let resident = status_kib(pid, "VmRSS:")?;
            let own = status_kib(pid, "RssAnon:")?;
            let share = (busy_ns(pid)? - before) as f64 / IDLE.as_nanos() as f64 * 100.0;
            figures.add(
                &format!("{role}_rss_kib_{sessions}"),
                resident,
                "KiB",
                format!("{role}: resident, all"),
            );
            figures.add(
                &format!("{role}_own_kib_{sessions}"),
                own,
                "KiB",
                format!("{role}: resident, its own"),
            );
            figures.add(
                &format!("{role}_idle_percent_{sessions}"),
                share,
                "% of a CPU",
                format!("{role}: idle"),
            );
        }
    }
    Ok(())
}
