//! Guests that lie: with their rings, with their memory, by leaving. Each fails by itself; its neighbour's transfer goes on, nothing
//! panics, and front and core stay the processes they were.

#[path = "hostile_guest/failing_disk.rs"]
mod failing_disk;
#[path = "hostile_guest/leaving.rs"]
mod leaving;
#[path = "hostile_guest/memory.rs"]
mod memory;
#[path = "hostile_guest/rings.rs"]
mod rings;
#[path = "hostile_guest/slow_disk.rs"]
mod slow_disk;
#[path = "hostile_guest/undead.rs"]
mod undead;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmgmt_driver::backing::Backing;
use vmgmt_driver::{Mode, TransferOptions};
use vmgmt_testkit::guest::{GuestOptions, Pids, SimulatedVm, Site, SitePlan, SocketBacking};
use vmgmt_testkit::process::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);

/// A `vmgmtd` with a neighbour (vm1) that moves a file again and again while vm0 misbehaves.
struct Street {
    site: Site,
    pids: Pids,
    neighbour: SimulatedVm,
    /// What it gets, and what is in it.
    file: &'static str,
    data: Vec<u8>,
}

fn street() -> Result<Street> {
    let site = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2).start()?;
    let data = pattern(4 << 20);
    std::fs::write(site.share().join("neighbour"), &data)?;
    street_in(site, "work/neighbour", data)
}

fn pattern(bytes: u32) -> Vec<u8> {
    (0..bytes).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect()
}

fn street_in(site: Site, file: &'static str, data: Vec<u8>) -> Result<Street> {
    let neighbour = site.vm(1)?;
    let pids = site.pids()?;
    Ok(Street {
        site,
        pids,
        neighbour,
        file,
        data,
    })
}

impl Street {
    /// Runs the mischief while the neighbour works, and looks at everything afterwards.
    fn during(&self, mischief: impl FnOnce() -> Result<()>) -> Result<()> {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let neighbour = scope.spawn(|| {
                let mut rounds = 0;
                while !over.load(Ordering::Relaxed) || rounds < 3 {
                    self.transfer()?;
                    rounds += 1;
                }
                Ok::<_, anyhow::Error>(rounds)
            });
            let outcome = mischief();
            over.store(true, Ordering::Relaxed);
            let rounds = neighbour
                .join()
                .map_err(|_| anyhow::anyhow!("the neighbour panicked"))?;
            outcome?;
            ensure!(rounds.context("the neighbour's transfer")? >= 3);
            Ok(())
        })?;
        self.site.check_unharmed(self.pids)
    }

    fn transfer(&self) -> Result<()> {
        let mut files = self.neighbour.ring(Mode::FILE)?;
        let (memory, _) = files.get_to_memory(self.file, &TransferOptions::default())?;
        ensure!(
            memory.to_vec(0, self.data.len())? == self.data,
            "the neighbour's bytes are not the same"
        );
        Ok(())
    }

    /// The hostile machine; waits for the place where one before has just left it.
    fn machine(&self, options: GuestOptions) -> Result<Arc<SocketBacking>> {
        wait_until("vm0's place", PATIENCE, || {
            Ok(SimulatedVm::plug(self.site.socket(0), options).ok())
        })
    }

    /// That an honest driver works on that machine now (a reset heals).
    fn heals(&self, machine: &Arc<SocketBacking>) -> Result<()> {
        let device = vmgmt_driver::Device::open(machine.clone()).context("the device after the mischief")?;
        let ring = vmgmt_driver::Ring::open(&device, vmgmt_driver::RingOptions::new(Mode::COMMON))?;
        let mut client = vmgmt_driver::Client::new(ring);
        ensure!(client.echo(b"healed")? == b"healed");
        Ok(())
    }
}

/// A generator of numbers that are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
