//! The speaking tube: runs shell commands inside a guest, through its virtio-serial ports.
//!
//! In: a script. Out: what it said (stdout and stderr in one) and its exit status. The other end is the agent in
//! qemu-configs/guest/init. Each command is framed by a marker of its own, so neither output of any kind nor what an
//! older background program still writes is taken for its end.

use crate::{
    process::{locked, patience},
    setup::tail,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// What the agent says when it begins to serve a port.
const AGENT_READY: &[u8] = b"VMGMT-AGENT-READY\n";

/// A command that says more than this is broken, or wants a file.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Nothing came for so long: all has come.
const SETTLED: Duration = Duration::from_millis(50);

/// How long a killed command may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// stdout and stderr, in the order written.
    pub bytes: Vec<u8>,
    /// Its exit status; 128 + signal when a signal ended it.
    pub status: i32,
}

impl Output {
    /// The output as text, without the last newline.
    pub fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }

    /// The text, if the status is 0, else an error with status and text.
    pub fn ok(self) -> Result<String> {
        ensure!(self.status == 0, "status {}: {}", self.status, self.text());
        Ok(self.text())
    }
}

/// Where the other signs of life of a VM are, for errors.
pub(super) struct Evidence {
    pub vm: String,
    pub console: PathBuf,
    pub qemu: crate::process::Log,
}

impl Evidence {
    /// The ends of console and QEMU's own messages.
    pub fn text(&self) -> String {
        let console = std::fs::read(&self.console).unwrap_or_default();
        let console = tail(&String::from_utf8_lossy(&console), 25);
        format!(
            "VM {}: QEMU said:\n{}\nend of its console:\n{console}",
            self.vm,
            self.qemu.tail()
        )
    }
}

/// One port with its agent; one command at a time.
pub(super) struct Channel {
    number: usize,
    writer: Mutex<UnixStream>,
    received: Mutex<Received>,
    changed: Condvar,
    busy: AtomicBool,
    evidence: Arc<Evidence>,
}

#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    closed: bool,
}

impl Channel {
    /// Begins to listen on the host's end of port `number`.
    pub fn new(number: usize, stream: UnixStream, evidence: Arc<Evidence>) -> Result<Arc<Self>> {
        let mut source = stream.try_clone()?;
        let channel = Arc::new(Self {
            number,
            writer: Mutex::new(stream),
            received: Mutex::default(),
            changed: Condvar::new(),
            busy: AtomicBool::new(false),
            evidence,
        });
        let listener = Arc::clone(&channel);
        thread::Builder::new().name("channel".into()).spawn(move || {
            let mut piece = vec![0; 65_536];
            while let Ok(length @ 1..) = source.read(&mut piece) {
                let mut received = locked(&listener.received);
                let free = OUTPUT_BYTES_MAX.saturating_sub(received.bytes.len());
                received
                    .bytes
                    .extend_from_slice(piece.get(..length.min(free)).unwrap_or_default());
                listener.changed.notify_all();
            }
            locked(&listener.received).closed = true;
            listener.changed.notify_all();
        })?;
        Ok(channel)
    }

    /// Lets the listening thread end.
    pub fn close(&self) {
        let _ = locked(&self.writer).shutdown(std::net::Shutdown::Both);
    }

    /// Forgets all that came: the guest is about to boot anew.
    pub fn forget(&self) {
        locked(&self.received).bytes.clear();
        self.busy.store(false, Ordering::SeqCst);
    }

    /// Waits until the agent serves this port.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        self.wait("the guest to boot", deadline, |received| {
            let position = find(&received.bytes, AGENT_READY, 0)?;
            received.bytes.drain(..position + AGENT_READY.len());
            Some(())
        })
    }

    /// Takes the channel for one command, unless it is in use.
    pub fn begin(self: &Arc<Self>, script: &str) -> Result<Option<Running>> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        if self.busy.swap(true, Ordering::SeqCst) {
            return Ok(None);
        }
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        let marker = format!("vmgmt-{now:x}-{:x}-{count:x}", std::process::id());
        let request = format!("{marker}\n{}\n", base64(script.as_bytes()));
        let sent = locked(&self.writer).write_all(request.as_bytes());
        sent.with_context(|| format!("cannot reach the guest\n{}", self.evidence.text()))?;
        let channel = Arc::clone(self);
        Ok(Some(Running {
            channel,
            control: None,
            marker,
            script: script.to_owned(),
            pid: None,
            scanned: 0,
            done: false,
        }))
    }

    /// Waits until `look` finds something in what came.
    fn wait<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut look: impl FnMut(&mut Received) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + patience(deadline);
        let mut received: MutexGuard<'_, Received> = locked(&self.received);
        loop {
            if let Some(found) = look(&mut received) {
                return Ok(found);
            }
            let said = || tail(&String::from_utf8_lossy(&received.bytes), 15);
            if received.closed {
                bail!(
                    "the VM ended while waiting for {what}; it had said:\n{}\n{}",
                    said(),
                    self.evidence.text()
                );
            }
            if received.bytes.len() >= OUTPUT_BYTES_MAX {
                bail!(
                    "{what}: over {OUTPUT_BYTES_MAX} bytes of output on channel {}",
                    self.number
                );
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "waited {:.1} s for {what}; it had said:\n{}\n{}",
                    deadline.as_secs_f64(),
                    said(),
                    self.evidence.text()
                );
            }
            received = self
                .changed
                .wait_timeout(received, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A command under way in a guest. Dropping it unfinished kills it there.
pub struct Running {
    channel: Arc<Channel>,
    /// The channel by which it is killed.
    pub(super) control: Option<Arc<Channel>>,
    marker: String,
    script: String,
    pid: Option<u32>,
    scanned: usize,
    done: bool,
}

impl Running {
    /// Its process id in the guest, which is also its process group.
    pub fn pid(&mut self, deadline: Duration) -> Result<u32> {
        let channel = Arc::clone(&self.channel);
        let what = self.name("to begin");
        channel.wait(&what, deadline, |received| self.begun(received))
    }

    /// Waits for its end.
    pub fn wait(mut self, deadline: Duration) -> Result<Output> {
        self.finish(deadline)
    }

    /// Waits until its output so far holds `needle`; gives that output.
    pub fn wait_for(&mut self, needle: &str, deadline: Duration) -> Result<String> {
        let channel = Arc::clone(&self.channel);
        let what = format!("{} to say {needle:?}", self.name(""));
        let (output, ended) = channel.wait(&what, deadline, |received| {
            self.begun(received)?;
            let end = find(&received.bytes, format!("{} end ", self.marker).as_bytes(), 0);
            let output = received.bytes.get(..end.unwrap_or(received.bytes.len()))?;
            let seen = find(output, needle.as_bytes(), 0).is_some();
            (seen || end.is_some()).then(|| (String::from_utf8_lossy(output).into_owned(), !seen))
        })?;
        ensure!(
            !ended,
            "{} ended without saying {needle:?}; it said: {output}",
            self.name("")
        );
        Ok(output)
    }

    /// Sends a signal (`INT`, `TERM`, `KILL`, `STOP`, …) to it and what it started.
    pub fn signal(&mut self, name: &str) -> Result<()> {
        let pid = self.pid(KILL_DEADLINE)?;
        let control = self
            .control
            .clone()
            .context("a command on the control channel cannot be signalled")?;
        // Several users may want the control channel at once; each holds it for a moment.
        let script = format!("kill -{name} -{pid}");
        let mut kill =
            crate::process::wait_until("the control channel", KILL_DEADLINE, || control.begin(&script))?;
        kill.finish(KILL_DEADLINE)?.ok().map(drop)
    }

    /// The guest that it runs in is about to be gone: gives what it has said, and nothing more is expected of it. Its processors should
    /// stand still ([`super::Vm::pause`]), so that all is said.
    pub fn lost(mut self) -> Vec<u8> {
        self.done = true;
        let channel = Arc::clone(&self.channel);
        let mut length = usize::MAX;
        loop {
            // What QEMU has written to its socket is in the reader's hands a moment later.
            thread::sleep(SETTLED);
            let mut received = locked(&channel.received);
            self.begun(&mut received);
            if received.bytes.len() == length {
                return std::mem::take(&mut received.bytes);
            }
            length = received.bytes.len();
        }
    }

    fn name(&self, what: &str) -> String {
        format!("`{}` in VM {} {what}", self.script, self.channel.evidence.vm)
            .trim_end()
            .to_owned()
    }

    /// Drops what came before this command's own begin mark; gives its pid.
    fn begun(&mut self, received: &mut Received) -> Option<u32> {
        if self.pid.is_none() {
            let mark = format!("{} begin ", self.marker);
            let start = find(&received.bytes, mark.as_bytes(), 0)?;
            let (number, end) = number_line(&received.bytes, start + mark.len())?;
            received.bytes.drain(..end);
            self.pid = u32::try_from(number).ok();
        }
        self.pid
    }

    fn finish(&mut self, deadline: Duration) -> Result<Output> {
        let channel = Arc::clone(&self.channel);
        let what = self.name("to end");
        let mark = format!("{} end ", self.marker);
        let output = channel.wait(&what, deadline, |received| {
            self.begun(received)?;
            let Some(start) = find(&received.bytes, mark.as_bytes(), self.scanned) else {
                // The mark may be half here.
                self.scanned = received.bytes.len().saturating_sub(mark.len());
                return None;
            };
            let (status, end) = number_line(&received.bytes, start + mark.len())?;
            let mut bytes: Vec<u8> = received.bytes.drain(..end).collect();
            bytes.truncate(start);
            Some(Output { bytes, status })
        })?;
        self.done = true;
        self.channel.busy.store(false, Ordering::SeqCst);
        Ok(output)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A channel whose command does not end stays busy: nobody may use it.
        if !self.done && !locked(&self.channel.received).closed && self.signal("KILL").is_ok() {
            let _ = self.finish(KILL_DEADLINE);
        }
    }
}

/// Where `needle` begins in `bytes`, not before `from`.
fn find(bytes: &[u8], needle: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    rest.windows(needle.len())
        .position(|window| window == needle)
        .map(|position| from + position)
}

/// The number at `from` and the position after the newline that ends it.
fn number_line(bytes: &[u8], from: usize) -> Option<(i32, usize)> {
    let end = find(bytes, b"\n", from)?;
    let number = std::str::from_utf8(bytes.get(from..end)?)
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some((number, end + 1))
}

/// Base64 of RFC 4648, section 4, in one line.
pub(super) fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let letter = LETTERS[(group >> (18 - 6 * place) & 63) as usize];
            text.push(if place > chunk.len() {
                '='
            } else {
                char::from(letter)
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_gives_the_vectors_of_the_rfc() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, coded) in cases {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn marks_are_found_only_when_whole() {
        assert_eq!(find(b"abcabc", b"bc", 2), Some(4));
        assert_eq!(find(b"abc", b"bc", 9), None);
        assert_eq!(number_line(b"x 42\nrest", 2), Some((42, 5)));
        assert_eq!(number_line(b"x 42", 2), None);
    }
}
