//! How long: one submission and its completion, one message and its answer; and what a sleeping core adds.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_driver::{Client, Mode, RingOptions};
use vmgmt_testkit::guest::{GuestInterrupts, GuestOptions};

use super::{Figures, percentiles, rate, site, vm_again};

pub const SAMPLES: usize = 2000;
/// Longer than the core polls after its last work (50 µs): it sleeps when the next submission comes.
pub const CORE_FALLS_ASLEEP: Duration = Duration::from_micros(500);

/// Times `once`, with a pause before each; the pause does not count.
pub fn samples(count: usize, pause: Duration, mut once: impl FnMut() -> Result<()>) -> Result<Vec<Duration>> {
    for _ in 0..count / 10 {
        once()?;
    }
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        let start = Instant::now();
        once()?;
        times.push(start.elapsed());
    }
    Ok(times)
}

pub fn run(figures: &mut Figures) -> Result<()> {
    figures.title("Latency of one no-op: submission to completion");
    let site = site(2)?;
    {
        let vm = site.vm_with(0, GuestOptions::spinning())?;
        let mut ring = rate::spinning(&vm, Mode::COMMON, 64)?;
        let mut report = |key: &str, pause, words: &str| -> Result<f64> {
            let (median, p99) = percentiles(samples(SAMPLES, pause, || Ok(ring.noop()?))?);
            figures.add(&format!("{key}_median"), median, "us", format!("{words}, median"));
            figures.add(&format!("{key}_p99"), p99, "us", format!("{words}, p99"));
            Ok(median)
        };
        let polling = report("noop_core_polls", Duration::ZERO, "core and guest poll")?;
        let asleep = report(
            "noop_core_sleeps",
            CORE_FALLS_ASLEEP,
            "core sleeps, guest polls (doorbell, front, wake-up)",
        )?;
        figures.add(
            "wake_up_cost",
            asleep - polling,
            "us",
            "what the front's wake-up of the core adds",
        );
        let backing = vm.backing();
        use vmgmt_driver::backing::Backing;
        let (median, p99) = percentiles(samples(SAMPLES, Duration::ZERO, || {
            backing.read32(vmgmt_abi::registers::MAGIC)?;
            Ok(())
        })?);
        figures.add(
            "register_read_median",
            median,
            "us",
            "a register read by itself (socket there and back), median",
        );
        figures.add("register_read_p99", p99, "us", "a register read by itself, p99");
    }
    {
        let vm = vm_again(
            &site,
            0,
            GuestOptions::default().interrupts(GuestInterrupts::Msi(1)),
        )?;
        let mut options = RingOptions::new(Mode::COMMON);
        options.spin = Duration::ZERO;
        let mut ring = vm.ring_with(options)?;
        let (median, p99) = percentiles(samples(SAMPLES, CORE_FALLS_ASLEEP, || Ok(ring.noop()?))?);
        figures.add(
            "noop_both_sleep_median",
            median,
            "us",
            "core and guest sleep (doorbell and interrupt), median",
        );
        figures.add("noop_both_sleep_p99", p99, "us", "core and guest sleep, p99");
    }
    figures.title("Latency of a 64-byte message and its answer (VM -> VM -> VM, journaled)");
    for (key, words, options, spin, pause) in [
        (
            "message_round_trip_polling",
            "everybody polls",
            GuestOptions::spinning(),
            Duration::from_secs(3600),
            Duration::ZERO,
        ),
        (
            "message_round_trip_sleeping",
            "everybody sleeps",
            GuestOptions::default().interrupts(GuestInterrupts::Msi(1)),
            Duration::ZERO,
            CORE_FALLS_ASLEEP,
        ),
    ] {
        let (a, b) = (vm_again(&site, 0, options)?, vm_again(&site, 1, options)?);
        let mut ring_options = RingOptions::new(Mode::CHAT);
        ring_options.spin = spin;
        let (mut to, mut at) = (a.ring_with(ring_options)?, b.ring_with(ring_options)?);
        let (mut here, mut there) = (Receiver::default(), Receiver::default());
        let message = [7; 64];
        let hop = |from: &mut Client, name: &str, into: &mut Client, receiver: &mut Receiver| -> Result<()> {
            into.post_receives(receiver, 4)?;
            from.send(name, &message, 0)?;
            into.receive(receiver, None)?.context("no message")?;
            Ok(())
        };
        let (median, p99) = percentiles(samples(SAMPLES / 2, pause, || {
            hop(&mut to, "vm1", &mut at, &mut there)?;
            hop(&mut at, "vm0", &mut to, &mut here)
        })?);
        figures.add(&format!("{key}_median"), median, "us", format!("{words}, median"));
        figures.add(&format!("{key}_p99"), p99, "us", format!("{words}, p99"));
    }
    Ok(())
}
