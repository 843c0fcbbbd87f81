//! The endurance runs' ground: one vmgmtd with a socket for every VM, a share, and descriptors enough.
//!
//! In: names. Out: a daemon, the simulated guests connected to it. It must never know what they do.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmgmt_testkit::guest::SimulatedVm;
use vmgmt_testkit::process::{Daemon, DaemonBuilder};

use super::content::{self, Paper};
use super::crew::Course;
use super::guest;

/// A guest's socket, memory, mappings' descriptors, vectors; and some for everything else.
const DESCRIPTORS_PER_GUEST: u64 = 16;
const DESCRIPTORS_BESIDES: u64 = 256;
/// Files for reading: lengths around pages and chunks.
const LIBRARY: [usize; 6] = [0, 1, 4095, 65_537, 500_000, 2_500_001];
/// What no put leaves behind: names of puts under way begin so.
const TEMPORARY_PREFIX: &str = ".vmgmt-put-";
/// Threads that stay come to rest within this.
const REST: Duration = Duration::from_millis(20);

/// Nothing more comes in a run that has failed when nothing came for so long: somebody who gave up receives no letters.
const FAILED_PATIENCE: Duration = Duration::from_secs(10);

/// Starts vmgmtd for VMs of these names, with the share `work`.
pub fn open(program: &Path, names: &[String]) -> Result<Daemon> {
    let mut text = String::from(
        "[server]\ncontrol = \"@DIR@/control.sock\"\n\n[[share]]\nname = \"work\"\npath = \"@DIR@/share\"\n",
    );
    for name in names {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n[[vm]]\nname = \"{name}\"\nsocket = \"@DIR@/{name}.sock\"\nshares = [\"work:rw\"]\n"
        );
    }
    DaemonBuilder::new(program)
        .configuration(text)
        .folder("share")
        .start()
        .context("starting vmgmtd")
}

/// Lets this process have descriptors for so many guests.
pub fn allow_guests(guests: u64) -> Result<()> {
    let wanted = guests * DESCRIPTORS_PER_GUEST + DESCRIPTORS_BESIDES;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    ensure!(
        limit.maximum.is_none_or(|maximum| maximum >= wanted),
        "{guests} guests need {wanted} descriptors and the hard limit is {:?}: raise it (ulimit -Hn)",
        limit.maximum
    );
    let raised = Rlimit {
        current: Some(wanted),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).context("raising the limit of descriptors")
}

/// Connects a simulated guest.
pub fn connect(daemon: &Daemon, name: &str) -> Result<Arc<SimulatedVm>> {
    let socket = daemon.path(&format!("{name}.sock"));
    let vm = SimulatedVm::connect_with(socket, guest::options());
    vm.map(Arc::new)
        .with_context(|| format!("{name}; vmgmtd said:\n{}", daemon.log().tail()))
}

/// Fills the share with files to read.
pub fn stock(course: &mut Course) -> Result<()> {
    for (number, length) in LIBRARY.into_iter().enumerate() {
        let seed = content::mix(&["library"], course.seed ^ number as u64);
        let paper = Paper::new("library", number as u64, seed, length);
        std::fs::write(course.share.join(&paper.name), paper.bytes())?;
        course.library.push(paper);
    }
    Ok(())
}

/// Waits until every accepted letter was received, or nothing moves any more for `patience`.
pub fn settle(course: &Course, patience: Duration) {
    let patience = || match course.ledger.has_mismatch() {
        true => patience.min(FAILED_PATIENCE),
        false => patience,
    };
    let mut last = (course.ledger.progress(), Instant::now());
    while (course.sending() || course.ledger.outstanding() > 0) && last.1.elapsed() < patience() {
        std::thread::sleep(REST);
        let progress = course.ledger.progress();
        if progress != last.0 {
            last = (progress, Instant::now());
        }
    }
}

/// At the end: no file in the share that nobody knows, no half one.
pub fn inspect(course: &Course) -> Result<()> {
    for entry in std::fs::read_dir(&course.share)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        match course.library.iter().find(|paper| paper.name == name) {
            Some(paper) => {
                if let Err(error) = paper.check(&std::fs::read(course.share.join(&name))?) {
                    course.ledger.mismatch(format!("the share: {error:#}"));
                }
            }
            None if name.starts_with(TEMPORARY_PREFIX) => course
                .ledger
                .mismatch(format!("the share: {name} was left over by a put")),
            None => course.ledger.mismatch(format!(
                "the share: {name} is there and was removed, or never put"
            )),
        }
    }
    Ok(())
}
