//! `vmgmt selftest`: each check does the real thing and compares what came back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;
use vmgmt_driver::channel::Request;
use vmgmt_driver::{Client, Device, Mode, Opcode, abi::feature};

use crate::ending::{self, ending};
use crate::output::say;
use crate::session::Session;

/// Bytes of an echo: around words, pages and the largest there is.
const ECHO_BYTES: [usize; 9] = [1, 3, 8, 63, 64, 1000, 2048, 4095, 4096];
/// Submissions for latencies and interrupts.
const ROUNDS: usize = 200;

/// Prints each check as it ends.
struct Report {
    json: bool,
    failed: u32,
}

impl Report {
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String>) -> Result<()> {
        let (passed, text) = match check() {
            Ok(text) => (true, text),
            Err(error) if ending::code(&error) == ending::INTERRUPTED => return Err(error),
            Err(error) => (false, format!("{error:#}")),
        };
        self.failed += u32::from(!passed);
        if self.json {
            say!("{}", json!({"check": name, "passed": passed, "text": text}));
        } else {
            say!("{} {name}: {text}", if passed { "ok    " } else { "FAILED" });
        }
        Ok(())
    }
}

/// Bytes that differ at each place and each time.
fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index.wrapping_mul(31).wrapping_add(seed.wrapping_mul(17)) >> 2) as u8 ^ seed as u8)
        .collect()
}

/// Runs every check that the backing allows.
pub fn selftest(session: &Session) -> Result<()> {
    let mut report = Report {
        json: session.general.json,
        failed: 0,
    };
    report.check("port window: identity and echo", || {
        let mut client = session.port(Mode::COMMON)?;
        let identity = client.identity()?;
        for bytes in ECHO_BYTES {
            let sent = pattern(bytes, bytes);
            ensure!(client.echo(&sent)? == sent, "{bytes} bytes came back changed");
        }
        Ok(format!(
            "{} (number {}), echo of {} sizes",
            identity.name,
            identity.number,
            ECHO_BYTES.len()
        ))
    })?;
    if let Some(device) = &session.device {
        rings(session, device, &mut report)?;
    }
    if report.failed > 0 {
        return Err(ending(ending::FAILED, format!("{} checks failed", report.failed)));
    }
    Ok(())
}

fn rings(session: &Session, device: &Arc<Device>, report: &mut Report) -> Result<()> {
    let spin = Duration::from_micros(session.general.spin_us);
    report.check("ring: identity is that of the port window", || {
        let by_port = session.port(Mode::COMMON)?.identity()?;
        let by_ring = session.ring(device, Mode::COMMON, spin)?.identity()?;
        ensure!(by_port == by_ring, "{by_port:?} and {by_ring:?}");
        Ok(by_ring.name)
    })?;
    report.check("ring: one in each mode at once", || {
        let modes = [(Mode::FILE, feature::MODE_FILE), (Mode::CHAT, feature::MODE_CHAT)];
        let offered: Vec<Mode> = modes
            .iter()
            .filter(|(_, bit)| device.facts().features & bit != 0)
            .map(|(mode, _)| *mode)
            .collect();
        let mut open = offered
            .iter()
            .map(|mode| session.ring(device, *mode, spin))
            .collect::<Result<Vec<Client>>>()?;
        open.iter_mut().try_for_each(Client::noop)?;
        Ok(format!("{offered:?}"))
    })?;
    report.check("memory: shared with the host", || {
        let mut client = session.ring(device, Mode::COMMON, spin)?;
        let buffer = client.allocate(4096)?;
        let shared = client.prove(&buffer, 0x5a5a_1234_8765_a5a5)?;
        Ok(if shared {
            "yes".into()
        } else {
            "no: the host goes by messages, which is slow (memory-backend-memfd,share=on helps)".to_owned()
        })
    })?;
    report.check("ring: echo at every alignment", || {
        let mut client = session.ring(device, Mode::COMMON, spin)?;
        let buffer = client.allocate(64 * 1024)?;
        let mut count = 0;
        for bytes in ECHO_BYTES {
            for start in [0, 1, 7, 64, 4093, 4096] {
                echo_within(&mut client, &buffer, start, bytes, 0)?;
                count += 1;
            }
        }
        Ok(format!("{count} echoes"))
    })?;
    report.check("ring: buffer lists", || {
        let mut client = session.ring(device, Mode::COMMON, spin)?;
        let buffer = client.allocate(64 * 1024)?;
        let mut entries_most = 0;
        for piece in [4096, 1000, 100, 32, 2] {
            for start in [0, 5, 4090] {
                match echo_within(&mut client, &buffer, start, 4096, piece) {
                    // Without huge pages a list longer than a page has no room in one piece.
                    Err(error) if is_too_scattered(&error) => continue,
                    done => done?,
                }
                entries_most = entries_most.max(2 * 4096 / piece);
            }
        }
        ensure!(
            entries_most >= 256,
            "only lists of {entries_most} entries are possible"
        );
        Ok(format!("lists of 2 to {entries_most} entries"))
    })?;
    report.check("ring: a full ring", || {
        let mut client = session.ring(device, Mode::COMMON, spin)?;
        let tags = (0..client.depth() * 3)
            .map(|_| client.start(Request::new(Opcode::NOOP)))
            .collect::<vmgmt_driver::Result<Vec<_>>>()?;
        let count = tags.len();
        for tag in tags {
            client.await_ok(tag)?;
        }
        Ok(format!("{count} submissions, each answered once"))
    })?;
    report.check("interrupts", || interrupts(session, device))?;
    report.check("latency of a no-op", || {
        let mut client = session.ring(device, Mode::COMMON, spin)?;
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let started = Instant::now();
            client.noop()?;
            times.push(started.elapsed());
        }
        times.sort_unstable();
        let at = |part: usize| {
            times
                .get(times.len() * part / 100)
                .copied()
                .unwrap_or_default()
                .as_secs_f64()
                * 1e6
        };
        Ok(format!("p50 {:.1} us, p99 {:.1} us", at(50), at(99)))
    })
}

fn is_too_scattered(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(vmgmt_driver::DriverError::TooScattered { .. })
    )
}

/// Echoes `bytes` bytes at a place in a buffer and looks at what is behind them, and at what must not have changed.
fn echo_within(
    client: &mut Client,
    buffer: &vmgmt_driver::Buffer,
    start: usize,
    bytes: usize,
    piece: u64,
) -> Result<()> {
    let sent = pattern(bytes, start + bytes);
    let guard = [0xa5; 16];
    buffer.write(start, &sent)?;
    buffer.write(start + bytes, &vec![0; bytes])?;
    buffer.write(start + 2 * bytes, &guard)?;
    let mut request = Request::new(Opcode::ECHO).output(buffer, start, 2 * bytes, bytes);
    request.piece_bytes_max = piece;
    let count = client.call(request)?.result_bytes(bytes)?;
    ensure!(count == bytes, "{bytes} bytes at {start}: {count} came back");
    ensure!(
        buffer.to_vec(start, bytes)? == sent,
        "{bytes} bytes at {start}: the input was written over"
    );
    ensure!(
        buffer.to_vec(start + bytes, bytes)? == sent,
        "{bytes} bytes at {start}: they came back changed"
    );
    ensure!(
        buffer.to_vec(start + 2 * bytes, 16)? == guard,
        "{bytes} bytes at {start}: bytes behind the buffer were written"
    );
    Ok(())
}

/// Sleeps for each answer, so that only an interrupt ends the wait in good time.
fn interrupts(session: &Session, device: &Arc<Device>) -> Result<String> {
    let mut client = session.ring(device, Mode::COMMON, Duration::ZERO)?;
    let before = client.channel().counters();
    let started = Instant::now();
    for round in 0..ROUNDS {
        client.noop()?;
        if started.elapsed() > Duration::from_secs(30) {
            bail!("{round} no-ops took 30 s: interrupts do not arrive");
        }
    }
    let after = client.channel().counters();
    let (sleeps, woken) = (after.sleeps - before.sleeps, after.interrupts - before.interrupts);
    // An answer may come before the sleep, and a sleeper looks by itself now and then (a slow VM takes long enough for that); but when it
    // slept until the answer, an interrupt must have ended that. One look may fall between an answer and its interrupt.
    let unannounced = after.unannounced - before.unannounced;
    ensure!(
        unannounced <= 1,
        "{sleeps} sleeps, {woken} of them ended by an interrupt; {unannounced} answers came without one"
    );
    let again = after.doorbells_again - before.doorbells_again;
    ensure!(
        again == 0,
        "{again} doorbells had to be rung twice: they got lost, or the device was frozen"
    );
    let kind = device.interrupts();
    Ok(format!(
        "{:?} with {} vectors: {woken} interrupts for {ROUNDS} no-ops, {again} doorbells rung twice",
        kind.kind, kind.vectors
    ))
}
