//! The caretaker: `cargo xtask …`, what a person or CI runs at the top of the repository.
//!
//! In: a subcommand. Out: a prepared machine, built images, tested code, a running demo. It must never hold anything that
//! the product itself needs.

mod bench;
mod bench_aims;
mod bench_cost;
mod bench_cost_vms;
mod bench_facts;
mod bench_host;
mod bench_peers;
mod bench_table;
mod bench_vms;
mod build;
mod demo;
mod endurance;
mod fuzz;
mod parts;
mod sim;
mod soak;
mod stress;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};
use vmgmt_testkit::setup::{self, Image, Wanted};

/// Everything around the code: setting up, testing, showing.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing and fetch QEMU and the guest's packages (as root where apt has to install).
    Setup,
    /// Build the guest image: kernel, busybox, driver modules, the static `vmgmt`.
    GuestImage {
        /// The image with git, GNU tar and dropbear.
        #[arg(long)]
        large: bool,
    },
    /// Set up, then run every part of the tests; a table of all parts stands at the end.
    Test(parts::Options),
    /// Two VMs, one file through all stations, messages each way.
    Demo(demo::Options),
    /// Measure: the parts by themselves, release builds in real VMs, and virtiofs and virtio-serial beside them.
    Bench(bench::Options),
    /// Simulated guests without rest while the core is killed and parts are replaced; ends with a ledger.
    Soak(soak::Options),
    /// Real VMs and simulated ones on one vmgmtd, everything at once, with resets and kills of both; ends with a ledger.
    Stress(stress::Options),
    /// Fuzz every way in with libFuzzer (needs the nightly compiler).
    Fuzz(fuzz::Options),
    /// Simulate: the rooms under virtual time and faults, seed by seed; a failure prints the command that shows it again.
    Sim(sim::Options),
    /// One VM on this terminal (leave it with Ctrl-A X).
    Vm(vm::Options),
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Setup => {
            for image in [Image::Small, Image::Large, Image::Systemd] {
                let tools = setup::prepare(Wanted { image, install: true })?;
                if image == Image::Small {
                    println!(
                        "QEMU {}.{}: {}",
                        tools.qemu.version.0,
                        tools.qemu.version.1,
                        tools.qemu.program.display()
                    );
                    println!("accelerator: {:?}", tools.accelerator);
                    println!("kernel: {}", tools.images.kernel.display());
                }
                println!("{image:?} image: {}", tools.images.initramfs.display());
            }
            Ok(())
        }
        Task::GuestImage { large } => {
            let image = if large { Image::Large } else { Image::Small };
            let tools = setup::prepare(Wanted { image, install: true })?;
            println!(
                "kernel: {}\ninitramfs: {}",
                tools.images.kernel.display(),
                tools.images.initramfs.display()
            );
            Ok(())
        }
        Task::Test(options) => parts::test(&options),
        Task::Demo(options) => demo::demo(&options),
        Task::Bench(options) => bench::bench(&options),
        Task::Soak(options) => soak::soak(&options),
        Task::Stress(options) => stress::stress(&options),
        Task::Fuzz(options) => fuzz::fuzz(&options),
        Task::Sim(options) => sim::sim(&options),
        Task::Vm(options) => vm::vm(&options),
    }
}
