//! The caretaker's measuring room, the others' side: virtiofsd, the far end of a virtio-serial port, a program of the host that sends
//! messages back.
//!
//! In: a QEMU's folder, sockets. Out: running helpers that end when dropped. It must never measure: that is done in the guest.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::Duration,
};
use vmgmt_testkit::{
    process::{Process, Start, new_log_path, wait_until},
    setup::Tools,
};

const START_DEADLINE: Duration = Duration::from_secs(30);

/// The heads of the guest's requests on the port: see guest-tools/vmgmt/src/bench/peers.rs.
const SEND: u64 = 1;
const TAKE: u64 = 2;
const ECHO: u64 = 3;

const PIECE_BYTES: usize = 1 << 20;

/// Most that the guest's bench asks for at once: 1 TiB.
const REQUEST_BYTES_MAX: u64 = 1 << 40;

/// A virtiofsd for one VM.
pub struct Virtiofsd {
    process: Process,
    socket: PathBuf,
}

impl Virtiofsd {
    /// Starts the one that came with QEMU, with `cache=never`, as a server of files that others change too must run.
    pub fn start(tools: &Tools, shared: &Path, socket: PathBuf) -> Result<Self> {
        let mut words = program(tools)?;
        let program = words.remove(0);
        let process = Start::new(program, new_log_path("virtiofsd")?)
            .arguments(words)
            .argument("--socket-path")
            .argument(&socket)
            .argument("--shared-dir")
            .argument(shared)
            .arguments(["--cache", "never", "--sandbox", "none", "--log-level", "error"])
            .start()?;
        let mut fs = Self { process, socket };
        let (process, socket) = (&mut fs.process, &fs.socket);
        wait_until("virtiofsd's socket", START_DEADLINE, || {
            if let Some(status) = process.ended()? {
                bail!("virtiofsd ended ({status}): {}", process.log().tail());
            }
            Ok(socket.exists().then_some(()))
        })?;
        Ok(fs)
    }

    /// QEMU's arguments for it; the guest mounts `tag`.
    pub fn arguments(&self, tag: &str) -> Vec<String> {
        [
            "-chardev",
            &format!("socket,id=fs,path={}", self.socket.display()),
            "-device",
            &format!("vhost-user-fs-pci,chardev=fs,tag={tag}"),
        ]
        .map(str::to_owned)
        .into()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// virtiofsd with the loader it needs: the host's own, or the one from beside QEMU in the cache.
fn program(tools: &Tools) -> Result<Vec<PathBuf>> {
    for own in ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"] {
        if Path::new(own).exists() {
            return Ok(vec![own.into()]);
        }
    }
    let cache = tools.qemu.program.parent().context("QEMU has no folder")?;
    let mut trees: Vec<PathBuf> = fs::read_dir(cache)
        .with_context(|| cache.display().to_string())?
        .flatten()
        .map(|entry| entry.path())
        .filter(|tree| tree.join("usr/libexec/virtiofsd").exists())
        .collect();
    trees.sort();
    let tree = trees
        .pop()
        .context("no virtiofsd on this host or beside its QEMU: install the package virtiofsd, or run `cargo xtask setup`")?;
    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    Ok(vec![
        libraries.join("ld-linux-x86-64.so.2"),
        "--library-path".into(),
        libraries,
        tree.join("usr/libexec/virtiofsd"),
    ])
}

/// The host's end of a virtio-serial port.
pub struct Port {
    socket: PathBuf,
    server: Option<JoinHandle<Result<()>>>,
}

impl Port {
    /// Listens; QEMU connects while it starts. The thread ends with QEMU.
    pub fn open(socket: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
        let server = thread::Builder::new().name("port".into()).spawn(move || {
            let (stream, _) = listener.accept()?;
            serve(stream)
        })?;
        Ok(Self {
            socket,
            server: Some(server),
        })
    }

    /// QEMU's arguments for it: a bus of its own, away from the harness' channels.
    pub fn arguments(&self, name: &str) -> Vec<String> {
        [
            "-chardev",
            &format!("socket,id=peer,path={}", self.socket.display()),
            "-device",
            "virtio-serial-pci,id=peerbus",
            "-device",
            &format!("virtserialport,bus=peerbus.0,chardev=peer,name={name}"),
        ]
        .map(str::to_owned)
        .into()
    }

    /// What went wrong at this end, if it is over.
    pub fn complaint(&mut self) -> Option<String> {
        if !self.server.as_ref().is_some_and(JoinHandle::is_finished) {
            return None;
        }
        match self.server.take()?.join() {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("the port's host end: {error:#}")),
            Err(_) => Some("the port's host end panicked".into()),
        }
    }
}

/// Answers the guest's requests until QEMU goes.
fn serve(mut stream: UnixStream) -> Result<()> {
    let mut piece = vec![0x5a_u8; PIECE_BYTES];
    let mut head = [0; 16];
    // The end, or QEMU's death, is how it ends.
    while stream.read_exact(&mut head).is_ok() {
        let word = |place: usize| -> u64 {
            let bytes = head.get(place..).and_then(<[u8]>::first_chunk::<8>);
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let (what, mut bytes) = (word(0), word(8));
        ensure!(bytes <= REQUEST_BYTES_MAX, "the guest asked for {bytes} bytes");
        ensure!((SEND..=ECHO).contains(&what), "the guest asked for {what}");
        while bytes > 0 {
            let length = PIECE_BYTES.min(usize::try_from(bytes).unwrap_or(PIECE_BYTES));
            let part = piece.get_mut(..length).unwrap_or_default();
            if what != SEND {
                stream.read_exact(part)?;
            }
            if what != TAKE {
                stream.write_all(part)?;
            }
            bytes -= length as u64;
        }
        if what == TAKE {
            stream.write_all(&[1])?;
        }
    }
    Ok(())
}

/// A program of the host that sends every message back to its VM, through the operators' socket.
pub struct HostEcho {
    stream: UnixStream,
    server: Option<JoinHandle<Result<()>>>,
}

impl HostEcho {
    /// Begins to follow the host's messages.
    pub fn start(control: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(control).with_context(|| control.display().to_string())?;
        let follow = json!({"vmgmt": 1, "id": 1, "method": "recv", "params": {"follow": true}});
        writeln!(stream, "{follow}")?;
        let reader = stream.try_clone()?;
        let mut writer = stream.try_clone()?;
        let server = thread::Builder::new().name("host echo".into()).spawn(move || {
            let mut id = 1_u64;
            for line in BufReader::new(reader).lines() {
                let answer: Value = serde_json::from_str(&line?)?;
                if let Some(error) = answer.get("error") {
                    bail!("vmgmtd answered: {error}");
                }
                let Some(message) = answer.pointer("/event/message") else {
                    continue;
                };
                let (from, text) = (message.get("from"), message.get("text").and_then(Value::as_str));
                // The guest's last word wants no answer.
                let (Some(from), Some(text)) = (from, text.filter(|text| *text != "end")) else {
                    continue;
                };
                id += 1;
                let send =
                    json!({"vmgmt": 1, "id": id, "method": "send", "params": {"to": from, "text": text}});
                writer.write_all(format!("{send}\n").as_bytes())?;
            }
            Ok(())
        })?;
        Ok(Self {
            stream,
            server: Some(server),
        })
    }

    /// Ends it; an error is one that it met.
    pub fn stop(mut self) -> Result<()> {
        let _ = self.stream.shutdown(Shutdown::Both);
        match self.server.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.context("the host's program"),
            Some(Err(_)) => bail!("the host's program panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for HostEcho {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Processor seconds that a process and all below it have used.
pub fn cpu_seconds(pid: u32) -> f64 {
    let below = vmgmt_testkit::process::descendants(pid);
    let pids = std::iter::once(pid).chain(below.iter().map(|process| process.pid));
    // Linux counts in hundredths of a second towards programs, on every machine.
    pids.filter_map(ticks).sum::<u64>() as f64 / 100.0
}

/// User and system time of one process, all its threads.
fn ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces; utime and stime are fields 14 and 15, the state after the name is field 3.
    let mut words = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(words.next()?.parse::<u64>().ok()? + words.next()?.parse::<u64>().ok()?)
}
