//! How many: no-ops of one ring, messages from VM to VM.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmgmt_driver::channel::Request;
use vmgmt_driver::{Client, Mode, Opcode, RingOptions};
use vmgmt_testkit::guest::{GuestOptions, SimulatedVm};

use super::{Figures, median, site};

/// Each run is so long; the median of three counts.
const RUN: Duration = Duration::from_secs(1);
const RUNS: usize = 3;

/// A ring whose user never sleeps, with room for `entries` in flight.
pub fn spinning(vm: &SimulatedVm, mode: Mode, entries: u32) -> Result<Client> {
    let mut options = RingOptions::new(mode);
    options.submission_entries = entries;
    options.completion_entries = entries * 2;
    options.spin = Duration::from_secs(3600);
    vm.ring_with(options)
}

pub fn no_ops(figures: &mut Figures) -> Result<()> {
    figures.title("Rates (guest and core poll; one ring)");
    let site = site(1)?;
    let vm = site.vm_with(0, GuestOptions::spinning())?;
    for depth in [1_u32, 32, 256] {
        let mut ring = spinning(&vm, Mode::COMMON, depth.max(2).next_power_of_two() * 2)?;
        let channel = ring.channel();
        let mut rates = Vec::new();
        let mut doorbells = 0.0;
        for _ in 0..RUNS {
            let before = channel.counters();
            let start = Instant::now();
            let mut done = 0_u64;
            let mut flying = 0;
            while start.elapsed() < RUN {
                while flying < depth {
                    channel.submit(Request::new(Opcode::NOOP))?;
                    flying += 1;
                }
                while channel.reap()?.is_some() {
                    flying -= 1;
                    done += 1;
                }
            }
            rates.push(done as f64 / start.elapsed().as_secs_f64());
            let after = channel.counters();
            doorbells =
                (after.doorbells - before.doorbells) as f64 / (after.submissions - before.submissions) as f64;
            while flying > 0 {
                channel.wait(None)?;
                while channel.reap()?.is_some() {
                    flying -= 1;
                }
            }
        }
        figures.add(
            &format!("noop_per_second_depth_{depth}"),
            median(rates),
            "/s",
            format!("no-ops, {depth} in flight ({doorbells:.4} doorbells each)"),
        );
    }
    Ok(())
}

pub fn messages(figures: &mut Figures) -> Result<()> {
    figures.title("Rate of messages (guests and core poll)");
    const BYTES: usize = 64;
    const IN_FLIGHT: usize = 128;
    let site = site(2)?;
    let (source, target) = (
        site.vm_with(0, GuestOptions::spinning())?,
        site.vm_with(1, GuestOptions::spinning())?,
    );
    let mut to = spinning(&source, Mode::CHAT, 512)?;
    let mut at = spinning(&target, Mode::CHAT, 512)?;
    to.publish(Some("bench"))?;
    at.publish(Some("bench"))?;
    let peers = to.peers()?;
    let peer = peers
        .iter()
        .find(|peer| peer.name == "vm1")
        .context("vm1 is not listed")?
        .number;
    let out = to.allocate(4096)?;
    let buffers: Vec<_> = (0..IN_FLIGHT * 2)
        .map(|_| at.allocate(512))
        .collect::<Result<_, _>>()?;
    let receive = |buffer: &vmgmt_driver::Buffer| Request::new(Opcode::RECEIVE).output(buffer, 0, 512, 0);
    for buffer in &buffers {
        at.channel().submit(receive(buffer))?;
    }
    let mut rates = Vec::new();
    for _ in 0..RUNS {
        // One thread plays both guests: two processors are the core and this.
        let start = Instant::now();
        let (mut received, mut sent, mut flying) = (0_u64, 0_u64, 0_usize);
        while start.elapsed() < RUN || received < sent {
            let running = start.elapsed() < RUN;
            while running && flying < IN_FLIGHT && sent - received < 2 * IN_FLIGHT as u64 {
                to.channel()
                    .submit(Request::new(Opcode::SEND).handle(peer).input(&out, 0, BYTES, 0))?;
                flying += 1;
                sent += 1;
            }
            while let Some(finished) = to.channel().reap()? {
                finished.ok()?;
                flying -= 1;
            }
            while let Some(finished) = at.channel().reap()? {
                let finished = finished.ok()?;
                received += 1;
                let span = finished.span.context("a receive without its buffer")?;
                at.channel().submit(receive(&span.memory))?;
            }
        }
        rates.push(received as f64 / start.elapsed().as_secs_f64());
    }
    figures.add(
        "messages_64_bytes_per_second",
        median(rates),
        "/s",
        format!("64-byte messages VM -> VM, journaled, {IN_FLIGHT} in flight, both guests on one processor"),
    );
    Ok(())
}
