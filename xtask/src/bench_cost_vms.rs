//! The caretaker's measuring room, what crash-consistency costs in QEMU: a VM with two devices, one of a vmgmtd that writes everything down for the
//! next core and one of a vmgmtd that does not, and a second VM like it that answers.
//!
//! In: both programs. Out: pairs of figures, seconds apart, in the same VM. It must never compare two boots: one VM is a third faster than the next.

use crate::{
    bench::{Options, median},
    bench_aims::{Pair, Pairs, Subject},
    bench_vms::{self, Plan, ROUND_TRIP, SPINS_US, STOP_DEADLINE, Samples, Site},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};
use vmgmt_testkit::vm::{Driver, Vm, VmBuilder};

/// Boots and all turns of a round together; turns that do not fit in are left out, and that is said.
const BUDGET_EACH_ROUND: Duration = Duration::from_secs(80);
/// With less left no turn is begun.
const TURN_MAX: Duration = Duration::from_secs(20);
/// Files of this size fit into the page cache of any machine that can run this at all.
const FILE_MIB: u32 = 64;
const PIECES_KIB: [u32; 2] = [64, 1024];
/// So often both ways in a turn, whose figure is the middle one.
const REPEAT: u32 = 5;
/// Round trips of a turn: sleeping ones take a millisecond each.
const COUNT: u32 = 1000;
const COUNT_QUICK: u32 = 100;
/// A file of this name is in the share of each.
const NAMES: [&str; 2] = ["with", "without"];

/// Both daemons, and both VMs with words that choose a device.
struct Scene<'a> {
    sites: &'a [Site; 2],
    plan: &'a Plan,
    first: (&'a Vm, [String; 2]),
    second: (&'a Vm, [String; 2]),
}

/// What is measured once in a turn for each.
enum Step {
    Files { pieces_kib: u32 },
    Rings,
    HostTrips { spin_us: u32 },
    VmTrips { spin_us: u32 },
}

/// Measures with and without (in this order in `servers`) in `turns` turns; gives how many there was time for.
pub fn measure(
    options: &Options,
    servers: [&Path; 2],
    rounds: u32,
    turns: u32,
    pairs: &mut Pairs,
) -> Result<u32> {
    let tools = bench_vms::tools()?;
    let plan = Plan {
        mib: if options.quick { 16 } else { FILE_MIB },
        rounds: turns,
        count: if options.quick { COUNT_QUICK } else { COUNT },
        end: Instant::now() + BUDGET_EACH_ROUND * rounds,
    };
    let [with, without] = servers;
    let sites = [
        bench_vms::open(options, tools.clone(), with)?,
        bench_vms::open(options, tools.clone(), without)?,
    ];
    for (site, name) in sites.iter().zip(NAMES) {
        fs::write(site.share.path().join(name), name).context("writing into the share")?;
    }
    let [with, without] = &sites;
    println!("* two VMs, each with a device of both");
    let second = VmBuilder::new(&tools, "vm2")
        .driver(Driver::Uio)
        .device(with.daemon.path("vm2.sock"), "with")
        .device(without.daemon.path("vm2.sock"), "without")
        .start()?;
    let first = bench_vms::builder(with, &plan, "vm1", Driver::Uio)
        .device(without.daemon.path("vm1.sock"), "without")
        .start()?;
    let measured = devices(&first).and_then(|of_first| {
        let scene = Scene {
            sites: &sites,
            plan: &plan,
            first: (&first, of_first),
            second: (&second, devices(&second)?),
        };
        scene.run(turns, pairs)
    });
    let done = measured.map_err(|error| {
        let [with, without] = sites.each_ref().map(|site| site.daemon.log().tail());
        let said = format!("vmgmtd with it said:\n{with}\nand without:\n{without}");
        error.context(format!("{}\n{said}", first.evidence()))
    })?;
    drop(first);
    drop(second);
    for site in sites {
        site.daemon.stop(STOP_DEADLINE).context("stopping vmgmtd")?;
    }
    Ok(done)
}

/// The words that choose a VM's device, with and without: told by the file that is in its share.
fn devices(vm: &Vm) -> Result<[String; 2]> {
    let all = vm.ok("cd /sys/bus/pci/devices; for d in *; do [ $(cat $d/vendor)$(cat $d/device) = 0x1af40x10f0 ] && echo $d; done; true")?;
    let all: Vec<&str> = all.split_whitespace().collect();
    ensure!(
        all.len() == 2,
        "{} has the devices {all:?} instead of two",
        vm.name()
    );
    let find = |name: &str| -> Result<String> {
        for place in &all {
            let output = vm.run(&format!("vmgmt --device {place} stat data/{name}"))?;
            if output.ok().is_ok() {
                return Ok(format!("--device {place} "));
            }
        }
        anyhow::bail!("no device of {} has the share with the file {name:?}", vm.name())
    };
    let [with, without] = NAMES;
    let found = [find(with)?, find(without)?];
    ensure!(found[0] != found[1], "{} has one device twice", vm.name());
    Ok(found)
}

impl Scene<'_> {
    /// All turns; what comes first changes from turn to turn, so that it is no advantage.
    fn run(&self, turns: u32, pairs: &mut Pairs) -> Result<u32> {
        let mut steps: Vec<Step> = PIECES_KIB.map(|pieces_kib| Step::Files { pieces_kib }).into();
        steps.push(Step::Rings);
        steps.extend(SPINS_US.map(|spin_us| Step::HostTrips { spin_us }));
        steps.extend(SPINS_US.map(|spin_us| Step::VmTrips { spin_us }));
        let mut done = 0;
        while done < turns && (done == 0 || self.plan.left() > TURN_MAX) {
            println!(
                "* turn {} of {turns} in QEMU ({} s left)",
                done + 1,
                self.plan.left().as_secs()
            );
            for step in &steps {
                let mut both = [Samples::new(), Samples::new()];
                let first = (done % 2) as usize;
                for which in [first, 1 - first] {
                    if let Some(samples) = both.get_mut(which) {
                        self.step(step, which, samples)?;
                    }
                }
                note(step, &both, pairs)?;
            }
            done += 1;
        }
        Ok(done)
    }

    fn step(&self, step: &Step, which: usize, samples: &mut Samples) -> Result<()> {
        let (site, plan) = (self.sites.get(which), self.plan);
        let (first, second) = (self.first.1.get(which), self.second.1.get(which));
        let (Some(site), Some(first), Some(second)) = (site, first, second) else {
            anyhow::bail!("there are two sites, not {which}");
        };
        let (first, second) = ((self.first.0, first.as_str()), (self.second.0, second.as_str()));
        match *step {
            Step::Files { pieces_kib } => {
                let words = format!(
                    "--json {}--chunk-kib {pieces_kib} bench --skip-rings --share data --mib {} --memory-only --repeat {REPEAT}",
                    first.1, plan.mib
                );
                bench_vms::guest(plan, first.0, &words, samples)
            }
            Step::Rings => {
                let words = format!(
                    "--json --spin-us {} {}bench --count {}",
                    SPINS_US[0], first.1, plan.count
                );
                bench_vms::guest(plan, first.0, &words, samples)
            }
            Step::HostTrips { spin_us } => bench_vms::with_host(site, plan, first, spin_us, samples),
            Step::VmTrips { spin_us } => bench_vms::with_vm(plan, first, second, spin_us, samples),
        }
    }
}

/// A turn's figures, both or none.
fn note(step: &Step, both: &[Samples; 2], pairs: &mut Pairs) -> Result<()> {
    let [with, without] = both;
    for (name, series) in with {
        let other = without
            .get(name)
            .with_context(|| format!("without crash-consistency there is no figure {name:?}"))?;
        let (words, subject) = match step {
            Step::Files { pieces_kib } => {
                let name = name.trim_end_matches(", no check");
                (
                    format!("in QEMU: {name}, {pieces_kib} KiB pieces"),
                    Subject::Transfer,
                )
            }
            Step::HostTrips { .. } | Step::VmTrips { .. } => {
                ensure!(name.starts_with(ROUND_TRIP), "the guest measured {name:?}");
                (format!("in QEMU: {name}"), Subject::MessageTrip)
            }
            Step::Rings if series.unit == "us" => (format!("in QEMU: {name}"), Subject::DeviceTrip),
            Step::Rings => (format!("in QEMU: {name}"), Subject::Other),
        };
        let pair = pairs.entry(words.clone()).or_insert_with(|| Pair {
            words,
            unit: series.unit.clone(),
            subject,
            with: Vec::new(),
            without: Vec::new(),
        });
        pair.with.push(median(&series.values));
        pair.without.push(median(&other.values));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_vms::Series;

    fn samples(name: &str, unit: &str, values: &[f64]) -> Samples {
        let mut series = Series::default();
        series.unit = unit.into();
        series.values = values.to_vec();
        Samples::from([(name.into(), series)])
    }

    #[test]
    fn a_turn_gives_the_middle_of_each() -> Result<()> {
        let mut pairs = Pairs::new();
        let step = Step::Files { pieces_kib: 64 };
        let put = "put from memory, no check";
        for (with, without) in [([7.0, 1.0, 9.0], [8.0, 2.0, 10.0]), ([5.0; 3], [6.0; 3])] {
            note(
                &step,
                &[samples(put, "MB/s", &with), samples(put, "MB/s", &without)],
                &mut pairs,
            )?;
        }
        let pair = pairs
            .get("in QEMU: put from memory, 64 KiB pieces")
            .context("no pair")?;
        assert_eq!(
            (pair.with.as_slice(), pair.without.as_slice()),
            ([7.0, 5.0].as_slice(), [8.0, 6.0].as_slice())
        );
        assert_eq!((pair.unit.as_str(), pair.subject), ("MB/s", Subject::Transfer));
        Ok(())
    }

    #[test]
    fn a_figure_that_only_one_has_is_an_error() {
        let both = [samples("ring, no-op", "us", &[1.0]), Samples::new()];
        assert!(note(&Step::Rings, &both, &mut Pairs::new()).is_err());
    }

    #[test]
    fn a_rate_of_the_rings_is_no_round_trip() -> Result<()> {
        let mut pairs = Pairs::new();
        for (name, unit) in [("ring, no-op", "us"), ("ring, no-ops with a full ring", "/s")] {
            note(
                &Step::Rings,
                &[samples(name, unit, &[1.0]), samples(name, unit, &[1.0])],
                &mut pairs,
            )?;
        }
        let subjects: Vec<Subject> = pairs.values().map(|pair| pair.subject).collect();
        assert_eq!(subjects, [Subject::DeviceTrip, Subject::Other]);
        Ok(())
    }
}
