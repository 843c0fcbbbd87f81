//! The stress run's blows: a VM that is reset, killed or unplugged in the middle of a transfer, and what its partner and the host see of it.
//!
//! In: machines that nobody else uses. Out: entries in the ledger. The program that is cut off is in the middle for certain: its transfer goes on until
//! it is. Its partner must be told honestly and in time, nothing half may be left anywhere, and the next transfer between the two is like any other.

use std::time::Duration;

use anyhow::{Result, ensure};
use vmgmt_testkit::vm::{Output, Running};

use super::machine::{COMMAND_DEADLINE, Machine};
use super::work::OFFER_SECONDS;
use crate::endurance::crew::{Course, Hand};
use crate::endurance::guest::SHARE;

/// The file that no get comes to the end of; it takes no room.
pub const ENDLESS: &str = "endless";
pub const ENDLESS_BYTES: u64 = 1 << 40;
/// What the partner of one that is gone is told.
const HONEST: [&str; 3] = [": cancelled", "the peer is not there", "the stream has ended"];
/// And when, on a machine that runs several VMs under TCG: no deadline of a transfer may have to pass first.
const TOLD_DEADLINE: Duration = Duration::from_secs(60);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    Reset,
    Kill,
    Unplug,
}

/// In the middle of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum During {
    Get,
    Put,
    /// A file to another VM.
    Sending,
    /// A file from another VM.
    Taking,
}

impl Blow {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reset => "VM reset",
            Self::Kill => "QEMU killed",
            Self::Unplug => "device unplugged",
        }
    }

    fn strike(self, course: &Course, machine: &mut Machine, running: Running) -> Result<()> {
        match self {
            Self::Reset => machine.reset_under(running),
            Self::Kill => machine.kill_under(course, running),
            Self::Unplug => machine.unplug_under(running),
        }
    }
}

impl During {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "a get",
            Self::Put => "a put",
            Self::Sending => "sending a file",
            Self::Taking => "taking a file",
        }
    }
}

/// A source without an end, at a pace: it says `flowing` when several chunks were taken from it, and ends when nobody takes more.
fn source(sender: &Machine) -> String {
    // A chunk is 1 MiB, or what a window of ports takes; a pipe holds 64 KiB.
    let slow = sender.fashion.file_bytes_max() < 1 << 20;
    let (piece, first) = if slow { (1024, 100) } else { (65_536, 60) };
    format!(
        "{{ n=0; while head -c {piece} /dev/zero; do n=$((n+1)); [ $n = {first} ] && echo flowing >&2; \
         [ $n -gt $(({first} * 3)) ] && sleep 1; done; }}"
    )
}

/// A get or a put: with the share.
pub fn with_share(
    course: &Course,
    hand: &Hand,
    machine: &mut Machine,
    blow: Blow,
    during: During,
) -> Result<()> {
    hand.doing(format!("{} in {}", blow.name(), during.name()));
    let name = format!("cut.{}", machine.name);
    let command = match during {
        During::Get => {
            let first = machine.fashion.file_bytes_max().min(3_000_000) / 2;
            format!(
                "rm -f /tmp/pipe; mkfifo /tmp/pipe; {{ head -c {first} > /dev/null; echo flowing; cat > /dev/null; }} < /tmp/pipe & \
                 vmgmt get {SHARE}/{ENDLESS} - > /tmp/pipe"
            )
        }
        _ => format!("{} | vmgmt put - {SHARE}/{name}", source(machine)),
    };
    let mut running = machine.spawn(&command)?;
    running.wait_for("flowing", COMMAND_DEADLINE)?;
    blow.strike(course, machine, running)?;
    ensure!(
        !course.share.join(&name).exists(),
        "a put of {} that was cut off left {name}",
        machine.name
    );
    Ok(())
}

/// A file from VM to VM: `own` is cut off, `partner` is told.
pub fn with_partner(
    course: &Course,
    hand: &Hand,
    own: &mut Machine,
    partner: &mut Machine,
    blow: Blow,
    during: During,
) -> Result<()> {
    hand.doing(format!("{} in {}", blow.name(), during.name()));
    let sends = during == During::Sending;
    let (from, to) = if sends {
        (&*own, &*partner)
    } else {
        (&*partner, &*own)
    };
    let mut taking = to.spawn("rm -rf /tmp/in && mkdir /tmp/in && vmgmt accept --once --into /tmp/in")?;
    taking.pid(COMMAND_DEADLINE)?;
    let mut sending = from.spawn(&format!(
        "{} | vmgmt cp --timeout {OFFER_SECONDS} - {}:cut",
        source(from),
        to.name
    ))?;
    sending.wait_for("flowing", COMMAND_DEADLINE)?;
    let taker = if sends {
        partner.name.clone()
    } else {
        own.name.clone()
    };
    let (cut, left) = if sends {
        (sending, taking)
    } else {
        (taking, sending)
    };
    blow.strike(course, own, cut)?;
    hand.doing(format!("{} is told that {} is gone", partner.name, own.name));
    honest(&left.wait(TOLD_DEADLINE)?, partner, own)?;
    // The taker shows a file only when it is whole. One that was killed may leave a temporary one behind, and its VM forgot that with its memory.
    let there = if taker == partner.name { &*partner } else { &*own };
    let found = there.must("ls /tmp/in 2>/dev/null || true")?;
    ensure!(found.is_empty(), "a file that was cut off is in {taker}: {found}");
    Ok(())
}

/// The partner's program ended with an error that says what happened.
fn honest(output: &Output, partner: &Machine, gone: &Machine) -> Result<()> {
    let text = output.text();
    ensure!(
        output.status != 0 && HONEST.iter().any(|honest| text.contains(honest)),
        "{} was cut off from {} and its program ended with {}: {text}",
        partner.name,
        gone.name,
        output.status
    );
    Ok(())
}
