//! The caretaker's measuring room, the bench with VMs: a release vmgmtd, real QEMUs, the guest's own `vmgmt bench`; virtiofs and
//! virtio-serial in the same VM, in turns with ours.
//!
//! In: how much and how often. Out: groups of figures. It must never run longer than [`BUDGET`] after the programs are built: what did not
//! fit in is named in a note.

use crate::{
    bench::{Group, Options, Row, median},
    bench_facts::Facts,
    bench_peers::{HostEcho, Port, Virtiofsd, cpu_seconds},
    build::host_programs,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};
use vmgmt_testkit::{
    process::{Daemon, DaemonBuilder},
    setup::{self, Image, Tools, Wanted},
    vm::{Driver, Iommu, Vm, VmBuilder},
};

/// All VMs together.
const BUDGET: Duration = Duration::from_secs(450);
/// One command in a guest.
const COMMAND_DEADLINE: Duration = Duration::from_secs(150);
/// With less left nothing new is begun.
const WORTH_BEGINNING: Duration = Duration::from_secs(40);
pub const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// What is moved where, by the guest's names for it.
const OPERATIONS: [&str; 5] = [
    "get to memory",
    "get to nowhere",
    "get to tmpfs",
    "put from memory",
    "put from tmpfs",
];
const CHECKS: [&str; 2] = ["no check", "with crc32"];
/// The guest's name for a peer, and its own.
const PEERS: [(&str, &str); 2] = [("directory", "virtiofs"), ("port", "virtio-serial")];

/// The beginning of the guest's names for them.
pub const ROUND_TRIP: &str = "message round trip with";
/// How long a waiting guest looks before it sleeps: always, never.
pub const SPINS_US: [u32; 2] = [1_000_000, 0];

/// One VM is measured, the second only answers.
const CONFIGURATION: &str = r#"
[server]
control = "@DIR@/control.sock"

[[share]]
name = "data"
path = "@SHARE@"

[[vm]]
name = "vm1"
socket = "@DIR@/vm1.sock"
shares = ["data"]

[[vm]]
name = "vm2"
socket = "@DIR@/vm2.sock"
shares = ["data"]
"#;

/// All samples by the guest's names.
pub type Samples = BTreeMap<String, Series>;

/// The same figure, several times.
#[derive(Default)]
pub struct Series {
    pub unit: String,
    pub values: Vec<f64>,
    /// Of each value that is a median of many: the 99th of a hundred.
    p99: Vec<f64>,
}

/// How much, how often, until when.
pub struct Plan {
    pub mib: u32,
    pub rounds: u32,
    pub count: u32,
    pub end: Instant,
}

impl Plan {
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    fn worth_beginning(&self) -> bool {
        self.left() > WORTH_BEGINNING
    }

    /// Huge pages of 2 MiB in the guest: the file once, and the pieces in flight.
    fn huge_pages(&self) -> u32 {
        self.mib / 2 + 32
    }

    /// The huge pages, the file in tmpfs, the file in a peer's memory, and the guest itself.
    fn memory_mib(&self) -> u32 {
        self.huge_pages() * 2 + self.mib * 2 + 320
    }
}

/// A daemon and the folder that it shares.
pub struct Site {
    tools: Tools,
    pub daemon: Daemon,
    pub share: tempfile::TempDir,
}

/// What VMs are made of.
pub fn tools() -> Result<Tools> {
    setup::prepare(Wanted {
        image: Image::Small,
        install: true,
    })
}

/// Boots, measures, stops.
pub fn measure(options: &Options, facts: &mut Facts, groups: &mut Vec<Group>) -> Result<()> {
    let tools = tools()?;
    let server = match &options.server {
        Some(server) => server.clone(),
        None => {
            println!("* building vmgmtd (release)");
            host_programs(&["vmgmtd"], true)?
                .pop()
                .context("cargo built no vmgmtd")?
        }
    };
    let built = options
        .server
        .as_ref()
        .map_or("release build", |_| "ready-made (--server)");
    facts.add("vmgmtd", built);
    facts.add("QEMU", version(&tools)?);
    facts.add("accelerator", format!("{:?}", tools.accelerator));
    let plan = Plan {
        mib: options.mib.unwrap_or(if options.quick { 16 } else { 256 }),
        rounds: options.rounds.unwrap_or(if options.quick { 1 } else { 3 }),
        count: if options.quick { 100 } else { 2000 },
        end: Instant::now() + BUDGET,
    };
    let site = open(options, tools, &server)?;
    let result = scenes(&site, &plan, facts, groups)
        .map_err(|error| error.context(format!("vmgmtd said:\n{}", site.daemon.log().tail())));
    let stopped = site.daemon.stop(STOP_DEADLINE).context("stopping vmgmtd");
    result?;
    stopped.map(drop)
}

/// Starts this vmgmtd beside a share of its own.
pub fn open(options: &Options, tools: Tools, server: &Path) -> Result<Site> {
    let mut place = tempfile::Builder::new();
    place.prefix("vmgmt-bench-");
    let share = match &options.share_in {
        Some(folder) => place.tempdir_in(folder),
        None => place.tempdir(),
    };
    let share = share.context("making the share's folder")?;
    let path = share.path().to_str().context("the share's folder is not UTF-8")?;
    let daemon = DaemonBuilder::new(server)
        .configuration(CONFIGURATION.replace("@SHARE@", path))
        .start()?;
    Ok(Site { tools, daemon, share })
}

/// Everything that has a VM in it.
fn scenes(site: &Site, plan: &Plan, facts: &mut Facts, groups: &mut Vec<Group>) -> Result<()> {
    println!("* files, uio, with virtiofs and virtio-serial beside it");
    let virtiofsd = Virtiofsd::start(&site.tools, site.share.path(), site.daemon.path("virtiofs.sock"))?;
    let mut port = Port::open(site.daemon.path("port.sock"))?;
    let vm = builder(site, plan, "vm1", Driver::Uio)
        .extra(virtiofsd.arguments("peer"))
        .extra(port.arguments("vmgmt.bench"))
        .start()?;
    facts.add("guest kernel", vm.ok("uname -r")?.trim());
    let result = with_peers(site, plan, &vm, &virtiofsd, groups).and_then(|peers| {
        messages(site, plan, &vm, &peers, groups)?;
        alone(plan, &vm, groups)
    });
    if let Err(error) = result {
        let complaint = port.complaint().unwrap_or_default();
        return Err(error.context(format!("{}\n{complaint}", vm.evidence())));
    }
    drop(vm);
    drop(virtiofsd);

    let mut group = new_group(plan, "Files, vfio behind an Intel IOMMU");
    if plan.worth_beginning() {
        println!("* files, vfio");
        let vm = builder(site, plan, "vm1", Driver::Vfio).start()?;
        let mut samples = Samples::new();
        let rounds = rounds(plan, || ours(plan, &vm, &mut samples))?;
        group.notes.push(rounds);
        group.rows = file_rows(&samples);
    } else {
        group.notes.push("Left out: no time was left.".into());
    }
    groups.push(group);
    Ok(())
}

/// The measured VM.
pub fn builder(site: &Site, plan: &Plan, name: &str, driver: Driver) -> VmBuilder {
    let iommu = match driver {
        Driver::Vfio => Iommu::Intel,
        _ => Iommu::None,
    };
    VmBuilder::new(&site.tools, name)
        .driver(driver)
        .iommu(iommu)
        .guest_huge_pages(plan.huge_pages())
        .memory_mib(plan.memory_mib())
        .device(site.daemon.path(&format!("{name}.sock")), "mgmt")
}

/// Files, ours and the peers' in turns; gives all samples, since the port's round trip belongs to another group.
fn with_peers(
    site: &Site,
    plan: &Plan,
    vm: &Vm,
    virtiofsd: &Virtiofsd,
    groups: &mut Vec<Group>,
) -> Result<Samples> {
    vm.ok("mkdir -p /mnt/peer && mount -t virtiofs peer /mnt/peer")?;
    let port = vm.ok("for p in /sys/class/virtio-ports/*; do [ \"$(cat $p/name)\" = vmgmt.bench ] && echo /dev/${p##*/}; done; true")?;
    let port = port.trim();
    ensure!(port.starts_with("/dev/"), "the guest has no port vmgmt.bench");
    let mut samples = Samples::new();
    let mut seconds = [0.0, 0.0];
    let done = rounds(plan, || {
        let before = cpu_seconds(site.daemon.pid());
        ours(plan, vm, &mut samples)?;
        seconds[0] += cpu_seconds(site.daemon.pid()) - before;
        let before = cpu_seconds(virtiofsd.pid());
        let mib = plan.mib;
        guest(
            plan,
            vm,
            &format!("--json bench --skip-rings --mib {mib} --peer-directory /mnt/peer"),
            &mut samples,
        )?;
        seconds[1] += cpu_seconds(virtiofsd.pid()) - before;
        let count = plan.count;
        guest(
            plan,
            vm,
            &format!("--json bench --skip-rings --mib {mib} --count {count} --peer-port {port}"),
            &mut samples,
        )
    })?;
    let mut group = new_group(plan, "Files, uio with huge pages in the guest, memfd");
    group.notes.push(done);
    group.rows = file_rows(&samples);
    let moved = |what: String| {
        let runs = samples.get(&what).map_or(0, |series| series.values.len());
        runs as f64 * f64::from(plan.mib) / 1024.0 * OPERATIONS.len() as f64
    };
    let gib = [
        moved(format!("{}, no check", OPERATIONS[0])) * CHECKS.len() as f64,
        moved(format!("directory: {}", OPERATIONS[0])),
    ];
    group.rows.push(Row {
        name: "daemon's processor time per GiB".into(),
        unit: "s".into(),
        samples: vec![seconds[0] / gib[0]],
        p99: None,
        peers: vec![("virtiofs".into(), seconds[1] / gib[1])],
    });
    groups.push(group);
    Ok(samples)
}

/// Our files, once, with and without checksum.
fn ours(plan: &Plan, vm: &Vm, samples: &mut Samples) -> Result<()> {
    let words = format!("--json bench --skip-rings --share data --mib {}", plan.mib);
    guest(plan, vm, &words, samples)
}

/// Repeats a round as long as there is time; says how often.
fn rounds(plan: &Plan, mut round: impl FnMut() -> Result<()>) -> Result<String> {
    let mut done = 0;
    while done < plan.rounds && (done == 0 || plan.worth_beginning()) {
        round()?;
        done += 1;
    }
    let short = if done < plan.rounds {
        format!(" of {} (no time was left)", plan.rounds)
    } else {
        String::new()
    };
    Ok(format!("{} MiB, {done} rounds{short}.", plan.mib))
}

/// Round trips with a program of the host and with a second VM, polling and sleeping.
fn messages(site: &Site, plan: &Plan, vm: &Vm, peers: &Samples, groups: &mut Vec<Group>) -> Result<()> {
    println!("* messages");
    let mut group = new_group(plan, "Messages of 64 bytes");
    let mut samples = Samples::new();
    let second = VmBuilder::new(&site.tools, "vm2")
        .driver(Driver::Uio)
        .device(site.daemon.path("vm2.sock"), "mgmt")
        .start()?;
    for spin_us in SPINS_US {
        with_host(site, plan, (vm, ""), spin_us, &mut samples)?;
        with_vm(plan, (vm, ""), (&second, ""), spin_us, &mut samples)?;
    }
    let port = peers.get(&format!("port: {ROUND_TRIP} host"));
    for how in ["polling", "sleeping"] {
        for with in ["host", "VM"] {
            let name = format!("{ROUND_TRIP} {with}, {how}");
            let mut row = row(&samples, &name);
            if let Some(port) = port.filter(|_| with == "host") {
                row.peers.push(("virtio-serial".into(), median(&port.values)));
            }
            group.rows.push(row);
        }
    }
    group.notes.push(
        "One message at a time; *sleeping*: every wait of both ends is for an interrupt. The host's program speaks JSON over the operators' \
         socket; virtio-serial's end is a bare loop that reads and writes."
            .into(),
    );
    groups.push(group);
    Ok(())
}

/// Round trips with a program of the host. A VM comes with the words that choose its device.
pub fn with_host(
    site: &Site,
    plan: &Plan,
    (vm, device): (&Vm, &str),
    spin_us: u32,
    samples: &mut Samples,
) -> Result<()> {
    let echo = HostEcho::start(&site.daemon.path("control.sock"))?;
    let count = plan.count;
    let words =
        format!("--json --spin-us {spin_us} {device}bench --skip-rings --partner host --count {count}");
    let result = guest(plan, vm, &words, samples);
    // What the host's end met is why the guest waited in vain.
    echo.stop()?;
    result
}

/// Round trips with a second VM.
pub fn with_vm(
    plan: &Plan,
    (vm, device): (&Vm, &str),
    (second, its_device): (&Vm, &str),
    spin_us: u32,
    samples: &mut Samples,
) -> Result<()> {
    let count = plan.count;
    let words =
        format!("--json --spin-us {spin_us} {device}bench --skip-rings --partner vm2 --count {count}");
    let mut answer = second.spawn(&format!("vmgmt --spin-us {spin_us} {its_device}bench --answer"))?;
    answer.pid(COMMAND_DEADLINE)?;
    let result = guest(plan, vm, &words, samples);
    let answered = answer.wait(COMMAND_DEADLINE.min(plan.left()));
    if let (Err(error), Ok(output)) = (&result, &answered) {
        bail!("{error:#}; vm2 said: {}", output.text());
    }
    result?;
    answered?.ok().context("vm2")?;
    Ok(())
}

/// The device alone, without a partner.
fn alone(plan: &Plan, vm: &Vm, groups: &mut Vec<Group>) -> Result<()> {
    println!("* rings");
    let mut samples = Samples::new();
    let words = format!("--json --spin-us 1000000 bench --count {}", plan.count);
    guest(plan, vm, &words, &mut samples)?;
    let mut group = new_group(plan, "The device alone (polling where not said)");
    group.rows = samples.keys().map(|name| row(&samples, name)).collect();
    groups.push(group);
    Ok(())
}

fn new_group(plan: &Plan, title: &str) -> Group {
    let left = plan.left().as_secs();
    println!("  ({left} s left)");
    Group {
        title: title.into(),
        rows: Vec::new(),
        notes: Vec::new(),
    }
}

/// Runs `vmgmt WORDS` in the guest and takes its figures.
pub fn guest(plan: &Plan, vm: &Vm, words: &str, samples: &mut Samples) -> Result<()> {
    println!("  {}$ vmgmt {words}", vm.name());
    let said = vm.ok_for(&format!("vmgmt {words}"), COMMAND_DEADLINE.min(plan.left()))?;
    let found = take(&said, samples)?;
    ensure!(found > 0, "`vmgmt {words}` gave no figures: {said}");
    Ok(())
}

/// The figures in what the guest said.
fn take(said: &str, samples: &mut Samples) -> Result<usize> {
    let mut found = 0;
    for line in said.lines().filter(|line| line.starts_with('{')) {
        let figure: Value =
            serde_json::from_str(line).with_context(|| format!("the guest's bench said {line:?}"))?;
        let name = figure.get("figure").and_then(Value::as_str);
        let value = figure.get("value").and_then(Value::as_f64);
        let unit = figure.get("unit").and_then(Value::as_str);
        let (Some(name), Some(value), Some(unit)) = (name, value, unit) else {
            bail!("the guest's bench said {line:?}, which is no figure");
        };
        let series = samples.entry(name.to_owned()).or_default();
        unit.clone_into(&mut series.unit);
        series.values.push(value);
        series
            .p99
            .extend(figure.pointer("/detail/p99").and_then(Value::as_f64));
        found += 1;
    }
    Ok(found)
}

/// A row of one series; one that is missing shows as no number.
fn row(samples: &Samples, series: &str) -> Row {
    let found = samples.get(series);
    Row {
        name: series.to_owned(),
        unit: found.map_or_else(String::new, |series| series.unit.clone()),
        samples: found.map_or_else(Vec::new, |series| series.values.clone()),
        p99: found
            .filter(|series| !series.p99.is_empty())
            .map(|series| median(&series.p99)),
        peers: Vec::new(),
    }
}

/// All that is known about files; the peers stand beside both ways, since neither has a checksum of its own.
fn file_rows(samples: &Samples) -> Vec<Row> {
    let mut rows = Vec::new();
    for operation in OPERATIONS {
        for check in CHECKS {
            let mut row = row(samples, &format!("{operation}, {check}"));
            for (told, name) in PEERS {
                if let Some(series) = samples.get(&format!("{told}: {operation}")) {
                    row.peers.push((name.to_owned(), median(&series.values)));
                }
            }
            rows.push(row);
        }
    }
    rows
}

/// The first line of QEMU's own words.
fn version(tools: &Tools) -> Result<String> {
    let output = Command::new(&tools.qemu.program).arg("--version").output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = said.lines().next().unwrap_or_default();
    Ok(line.trim_start_matches("QEMU emulator version ").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_several_rounds_become_rows() -> Result<()> {
        let mut samples = Samples::new();
        for (ours, theirs) in [(300.5, 100.0), (400.5, 200.0), (500.5, 150.0)] {
            let said = format!(
                "noise\n{{\"figure\":\"get to tmpfs, no check\",\"value\":{ours},\"unit\":\"MB/s\",\"detail\":{{}}}}\n\
                 {{\"figure\":\"directory: get to tmpfs\",\"value\":{theirs},\"unit\":\"MB/s\",\"detail\":{{}}}}\n"
            );
            assert_eq!(take(&said, &mut samples)?, 2);
        }
        let rows = file_rows(&samples);
        let row = rows.iter().find(|row| row.name == "get to tmpfs, no check");
        let row = row.context("no row")?;
        assert_eq!((row.median(), row.unit.as_str()), (400.5, "MB/s"));
        assert_eq!(row.peers, [("virtiofs".to_owned(), 150.0)]);
        assert!(take("{\"figure\":\"x\"}", &mut samples).is_err());
        Ok(())
    }
}
