//! How long: a message to a program of the host and its answer, when everybody sleeps; and what so many wake-ups cost by themselves.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_driver::{Mode, RingOptions};
use vmgmt_testkit::guest::{GuestInterrupts, GuestOptions};

use super::latency::{CORE_FALLS_ASLEEP, SAMPLES, samples};
use super::{Figures, percentiles, rate, site, vm_again};

/// One after another: guest to front, front to core, core to program, program to core, core to guest.
const WAKE_UPS: usize = 5;

/// A program of the host that sends each message back.
struct Echo {
    stream: UnixStream,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Echo {
    fn start(control: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(control).context("the control socket")?;
        let follow = json!({"vmgmt": 1, "id": 1, "method": "recv", "params": {"follow": true}});
        writeln!(stream, "{follow}")?;
        let (reader, mut writer) = (stream.try_clone()?, stream.try_clone()?);
        let thread = thread::spawn(move || {
            let mut id = 1_u64;
            for line in BufReader::new(reader).lines() {
                let answer: Value = serde_json::from_str(&line?)?;
                if let Some(error) = answer.get("error") {
                    bail!("vmgmtd answered: {error}");
                }
                let Some(message) = answer.pointer("/event/message") else {
                    continue;
                };
                id += 1;
                let params = json!({"to": message.get("from"), "text": message.get("text")});
                let send = json!({"vmgmt": 1, "id": id, "method": "send", "params": params});
                writer.write_all(format!("{send}\n").as_bytes())?;
            }
            Ok(())
        });
        Ok(Self {
            stream,
            thread: Some(thread),
        })
    }

    fn stop(mut self) -> Result<()> {
        let _ = self.stream.shutdown(Shutdown::Both);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.context("the host's program"),
            _ => bail!("the host's program panicked"),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

pub fn run(figures: &mut Figures) -> Result<()> {
    figures.title("Latency of a 64-byte message to a program of the host and its answer (JSON lines on the operators' socket)");
    let site = site(1)?;
    let ways = [
        (
            "host_round_trip_polling",
            "guest polls",
            GuestOptions::spinning(),
            Duration::ZERO,
        ),
        (
            "host_round_trip_msi",
            "everybody sleeps, MSI",
            GuestOptions::default().interrupts(GuestInterrupts::Msi(1)),
            CORE_FALLS_ASLEEP,
        ),
        (
            "host_round_trip_intx",
            "everybody sleeps, INTx as uio_pci_generic has it",
            GuestOptions::default().interrupts(GuestInterrupts::IntX),
            CORE_FALLS_ASLEEP,
        ),
    ];
    for (key, words, options, pause) in ways {
        let vm = vm_again(&site, 0, options)?;
        let mut ring = if pause.is_zero() {
            rate::spinning(&vm, Mode::CHAT, 64)?
        } else {
            let mut options = RingOptions::new(Mode::CHAT);
            options.spin = Duration::ZERO;
            vm.ring_with(options)?
        };
        let echo = Echo::start(&site.control())?;
        let mut receiver = Receiver::default();
        let text = [b'7'; 64];
        let times = samples(SAMPLES / 2, pause, || {
            ring.post_receives(&mut receiver, 4)?;
            ring.send("host", &text, 0)?;
            let answer = ring.receive(&mut receiver, None)?.context("no answer")?;
            anyhow::ensure!(answer.bytes == text, "another message came back");
            Ok(())
        })?;
        echo.stop()?;
        let (median, p99) = percentiles(times);
        figures.add(&format!("{key}_median"), median, "us", format!("{words}, median"));
        figures.add(&format!("{key}_p99"), p99, "us", format!("{words}, p99"));
    }
    let (median, p99) = percentiles(wake_ups()?);
    figures.add(
        "wake_ups_median",
        median,
        "us",
        format!("{WAKE_UPS} wake-ups one after another, a byte by UNIX socket each, nothing else: median"),
    );
    figures.add("wake_ups_p99", p99, "us", "the same, p99");
    Ok(())
}

/// A byte goes round so many sleeping threads and comes back.
fn wake_ups() -> Result<Vec<Duration>> {
    let (mut first, mut input) = UnixStream::pair()?;
    let mut threads = Vec::new();
    for _ in 1..WAKE_UPS {
        let (mut output, next) = UnixStream::pair()?;
        let mut from = std::mem::replace(&mut input, next);
        threads.push(thread::spawn(move || {
            let mut byte = [0];
            // Until the one before ends.
            while from.read_exact(&mut byte).is_ok() && output.write_all(&byte).is_ok() {}
        }));
    }
    let times = samples(SAMPLES / 2, CORE_FALLS_ASLEEP, || {
        first.write_all(&[1])?;
        Ok(input.read_exact(&mut [0])?)
    });
    drop(first);
    for thread in threads {
        let _ = thread.join();
    }
    times
}
