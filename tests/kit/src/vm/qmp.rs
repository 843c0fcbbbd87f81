//! The machine room's intercom: QEMU's monitor protocol (QMP), as far as tests need it.
//!
//! In: command names and arguments as JSON. Out: the answers, and events kept until somebody asks for them.
//! It must never know what a guest does.

use crate::process::{locked, patience};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    os::unix::net::UnixStream,
    sync::Mutex,
    time::{Duration, Instant},
};

/// An answer comes within milliseconds, except while the guest waits for a device (5 s at most) or the machine is full.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// A connection to one QEMU's monitor.
pub struct Qmp {
    inner: Mutex<Inner>,
}

struct Inner {
    reader: BufReader<UnixStream>,
    partial: Vec<u8>,
    events: Vec<Value>,
    next_id: u64,
}

impl Qmp {
    /// Greets QEMU on a fresh connection.
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        let reader = BufReader::new(stream);
        let mut inner = Inner {
            reader,
            partial: Vec::new(),
            events: Vec::new(),
            next_id: 0,
        };
        let end = Instant::now() + patience(ANSWER_DEADLINE);
        let greeting = inner.message(end)?.context("QEMU closed its monitor")?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU's monitor greets with {greeting}");
        }
        let qmp = Self {
            inner: Mutex::new(inner),
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command; gives what it returned. Events that come meanwhile are kept.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut inner = locked(&self.inner);
        inner.next_id += 1;
        let id = inner.next_id;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        inner
            .reader
            .get_mut()
            .write_all(line.as_bytes())
            .context("QEMU's monitor is closed")?;
        let end = Instant::now() + patience(ANSWER_DEADLINE);
        loop {
            let message = inner.message(end).with_context(|| format!("QMP {command}"))?;
            let message = message.with_context(|| format!("QMP {command}: no answer in time"))?;
            if message.get("event").is_some() {
                inner.events.push(message);
            } else if message.get("id").and_then(Value::as_u64) != Some(id) {
                // The late answer of a command that was given up.
            } else if let Some(error) = message.get("error") {
                let text = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given");
                bail!("QMP {command}: {text}");
            } else {
                return Ok(message.get("return").cloned().unwrap_or(Value::Null));
            }
        }
    }

    /// Waits for an event of this name; older ones that nobody took count.
    pub fn wait_event(&self, name: &str, deadline: Duration) -> Result<Value> {
        self.wait_event_where(name, deadline, |_| true)
    }

    /// Waits for an event of this name whose `data` fits.
    pub fn wait_event_where(
        &self,
        name: &str,
        deadline: Duration,
        fits: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let end = Instant::now() + patience(deadline);
        let mut inner = locked(&self.inner);
        loop {
            let wanted = |event: &Value| {
                event.get("event").and_then(Value::as_str) == Some(name)
                    && fits(event.get("data").unwrap_or(&Value::Null))
            };
            if let Some(position) = inner.events.iter().position(wanted) {
                return Ok(inner.events.remove(position));
            }
            match inner.message(end)? {
                Some(message) if message.get("event").is_some() => inner.events.push(message),
                Some(_) => {}
                None => bail!(
                    "no event {name} within {:.1} s; seen: {:?}",
                    deadline.as_secs_f64(),
                    inner.events
                ),
            }
        }
    }

    /// Forgets the events kept so far.
    pub fn clear_events(&self) {
        locked(&self.inner).events.clear();
    }
}

impl Inner {
    /// The next message, or nothing when `end` comes first. A half read line is kept.
    fn message(&mut self, end: Instant) -> Result<Option<Value>> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.reader.get_mut().set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QEMU closed its monitor: it has ended"),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(Some(
                        serde_json::from_slice(&line).context("QEMU's monitor sent no JSON")?,
                    ));
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("QEMU's monitor"),
            }
        }
    }
}
