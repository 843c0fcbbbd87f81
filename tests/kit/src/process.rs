//! The kennel: programs under test as guarded processes. Nothing started here outlives its guard, nor the test process.
//!
//! In: a program, arguments, a configuration text. Out: a running process with its log, which is stopped on drop.
//! It must never know what the program does.

use crate::setup::tail;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// How much of a log stands in an error.
const LOG_TAIL_LINES: usize = 25;

/// Between looks at things that cannot be waited for (an exit with a deadline, a socket that is not bound yet).
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A slow machine multiplies every deadline by this (`VMGMT_PATIENCE`, default 1).
pub fn patience(deadline: Duration) -> Duration {
    let factor = std::env::var("VMGMT_PATIENCE")
        .ok()
        .and_then(|text| text.parse::<f64>().ok());
    deadline.mul_f64(
        factor
            .filter(|factor| factor.is_finite() && *factor > 0.0)
            .unwrap_or(1.0),
    )
}

/// Repeats `look` until it finds something or `deadline` has passed; the error names `what` was waited for.
pub fn wait_until<T>(
    what: &str,
    deadline: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    let deadline = patience(deadline);
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(
            start.elapsed() < deadline,
            "waited {:.1} s for {what}",
            deadline.as_secs_f64()
        );
        thread::sleep(LOOK_AGAIN);
    }
}

/// What a process wrote to stdout and stderr, in the order it came, also in a file.
#[derive(Clone)]
pub struct Log {
    path: PathBuf,
    shared: Arc<(Mutex<LogState>, Condvar)>,
}

#[derive(Default)]
struct LogState {
    text: String,
    closed: bool,
}

impl Log {
    fn follow(path: PathBuf, mut source: impl Read + Send + 'static) -> Result<Self> {
        let mut file =
            File::create(&path).with_context(|| format!("cannot write the log {}", path.display()))?;
        let log = Self {
            path,
            shared: Arc::default(),
        };
        let shared = Arc::clone(&log.shared);
        thread::Builder::new().name("log".into()).spawn(move || {
            let mut piece = [0; 8192];
            while let Ok(length @ 1..) = source.read(&mut piece) {
                let bytes = piece.get(..length).unwrap_or_default();
                // A full disk must not stop the process under test.
                let _ = file.write_all(bytes);
                locked(&shared.0).text.push_str(&String::from_utf8_lossy(bytes));
                shared.1.notify_all();
            }
            locked(&shared.0).closed = true;
            shared.1.notify_all();
        })?;
        Ok(log)
    }

    /// The file that holds it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of it so far.
    pub fn text(&self) -> String {
        locked(&self.shared.0).text.clone()
    }

    /// Its last lines, for an error.
    pub fn tail(&self) -> String {
        tail(&locked(&self.shared.0).text, LOG_TAIL_LINES)
    }

    /// Waits until `needle` stands in it; ends early when nobody can write any more.
    pub fn wait_for(&self, needle: &str, deadline: Duration) -> Result<()> {
        self.wait_for_count(needle, 1, deadline)
    }

    /// Waits until `needle` stands in it `count` times.
    pub fn wait_for_count(&self, needle: &str, count: usize, deadline: Duration) -> Result<()> {
        let end = Instant::now() + patience(deadline);
        let mut state = locked(&self.shared.0);
        while state.text.matches(needle).count() < count {
            let left = end.saturating_duration_since(Instant::now());
            let why = if state.closed {
                "the process ended"
            } else {
                "the deadline passed"
            };
            if state.closed || left.is_zero() {
                let shown = tail(&state.text, LOG_TAIL_LINES);
                bail!(
                    "{why} before {needle:?} stood {count} times in the log {}:\n{shown}",
                    self.path.display()
                );
            }
            state = self
                .shared
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}

/// A lock whose holder panicked is as good as any here: the state is text.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Start {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    log: PathBuf,
}

impl Start {
    /// `program`, whose output goes to the file `log`.
    pub fn new(program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            log: log.into(),
        }
    }

    /// One more argument.
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// More arguments.
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// One more environment variable.
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Starts it, in a process group of its own, to be killed by the kernel should this process die.
    pub fn start(self) -> Result<Process> {
        let (reader, writer) = std::io::pipe()?;
        // setpriv stays the same process when it becomes the program. The shell between looks whether we died before the
        // kernel was asked to tell: then nobody would be told any more.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "/bin/sh", "-c"]);
        command.args([
            "test \"$PPID\" = \"$0\" && exec \"$@\"",
            &std::process::id().to_string(),
        ]);
        command.arg(&self.program).args(&self.arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = spawn_by_lasting_thread(command)
            .with_context(|| format!("cannot start {} (through setpriv)", self.program.display()))?;
        let log = Log::follow(self.log, reader)?;
        Ok(Process {
            child,
            log,
            ended: None,
        })
    }
}

/// Starts a command from a thread that lives as long as this process: a test's own thread ends with the test, and its
/// children would get the parent-death signal while another thread still uses them.
fn spawn_by_lasting_thread(command: Command) -> Result<Child> {
    type Errand = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Errand>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, errands) = mpsc::channel::<Errand>();
        // Should the thread not start, the send below fails and says so.
        let _ = thread::Builder::new().name("spawner".into()).spawn(move || {
            for (mut command, reply) in errands {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (reply, answer) = mpsc::channel();
    locked(spawner)
        .send((command, reply))
        .ok()
        .context("the spawning thread is gone")?;
    Ok(answer.recv().context("the spawning thread is gone")??)
}

/// A running process with its log. Dropping it kills it and what it started.
pub struct Process {
    child: Child,
    log: Log,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("process {} to end", self.pid());
        wait_until(&what, deadline, || self.ended()).with_context(|| self.log.tail())
    }

    /// Sends it a signal (not its children).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = process_id(self.pid())?;
        kill_process(pid, signal).with_context(|| format!("cannot signal process {}", self.pid()))
    }

    /// Kills it and its children, at once, and waits for its end.
    pub fn kill(&mut self) {
        if matches!(self.ended(), Ok(Some(_))) {
            return;
        }
        let below = descendants(self.pid());
        if let Ok(pid) = process_id(self.pid()) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        for process in below {
            if let Ok(pid) = process_id(process.pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        self.ended = self.child.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn process_id(pid: u32) -> Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("{pid} is no process id"))
}

/// One process as `/proc` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its process id.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its name (`comm`).
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// All living processes below `pid`: children, their children and so on; not `pid` itself, no zombies.
pub fn descendants(pid: u32) -> Vec<Seen> {
    let all: Vec<Seen> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| see(entry.file_name().to_str()?.parse().ok()?))
        .collect();
    let mut found = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        for process in all.iter().filter(|process| process.parent == parent) {
            parents.push(process.pid);
            found.push(process.clone());
        }
    }
    found
}

fn see(pid: u32) -> Option<Seen> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state parent …"; the name may hold parentheses and spaces.
    let (front, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace();
    let state = words.next()?;
    let parent = words.next()?.parse().ok()?;
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments = arguments
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned());
    let name = front.split_once('(')?.1.to_owned();
    (state != "Z").then(|| Seen {
        pid,
        parent,
        name,
        arguments: arguments.filter(|word| !word.is_empty()).collect(),
    })
}

/// When a daemon counts as started.
#[derive(Clone, Debug)]
pub enum Ready {
    /// This text stands in its log.
    LogText(String),
    /// This socket (below the daemon's folder, unless absolute) takes a connection.
    Socket(PathBuf),
}

/// What `vmgmtd` says on stderr when it serves.
pub const VMGMTD_READY: &str = "vmgmtd: ready";

/// A folder: daemons are traced by strace(1) then, each into a file there.
pub const TRACE_VARIABLE: &str = "VMGMT_TRACE_DIR";

/// How to start a daemon in a temporary folder of its own.
pub struct DaemonBuilder {
    program: PathBuf,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    configuration: Option<String>,
    folders: Vec<String>,
    ready: Ready,
    ready_deadline: Duration,
}

impl DaemonBuilder {
    /// `vmgmtd` at this path: in a test of the root package `env!("CARGO_BIN_EXE_vmgmtd")`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            variables: Vec::new(),
            configuration: None,
            folders: Vec::new(),
            ready: Ready::LogText(VMGMTD_READY.into()),
            ready_deadline: Duration::from_secs(60),
        }
    }

    /// One more argument; `@DIR@` stands for the daemon's folder.
    pub fn argument(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// One more environment variable.
    pub fn variable(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// The text of the configuration file, passed with `--config`; `@DIR@` stands for the daemon's folder.
    pub fn configuration(mut self, text: impl Into<String>) -> Self {
        self.configuration = Some(text.into());
        self
    }

    /// A folder to make in the daemon's folder before it starts (a share, say).
    pub fn folder(mut self, name: impl Into<String>) -> Self {
        self.folders.push(name.into());
        self
    }

    /// Another sign of being ready than the line `vmgmtd: ready` in its log.
    pub fn ready(mut self, ready: Ready) -> Self {
        self.ready = ready;
        self
    }

    /// How long it may take until it is ready.
    pub fn ready_deadline(mut self, deadline: Duration) -> Self {
        self.ready_deadline = deadline;
        self
    }

    /// Starts it and waits until it is ready.
    pub fn start(self) -> Result<Daemon> {
        let folder = tempfile::Builder::new().prefix("vmgmtd-").tempdir()?;
        let place = folder
            .path()
            .to_str()
            .context("the temporary folder's name is not UTF-8")?
            .to_owned();
        let here = |text: &str| text.replace("@DIR@", &place);
        for name in &self.folders {
            fs::create_dir_all(folder.path().join(name))?;
        }
        let log = new_log_path("vmgmtd")?;
        let mut start = match std::env::var_os(TRACE_VARIABLE) {
            None => Start::new(&self.program, &log),
            Some(traces) => {
                let name = folder
                    .path()
                    .file_name()
                    .context("the temporary folder has no name")?;
                let trace = Path::new(&traces).join(name).with_extension("trace");
                // The tracer stays behind (-D): the daemon is still our own child.
                Start::new("strace", &log)
                    .arguments(["-D", "-f", "-qq", "-s", "64", "--signal=none", "-o"])
                    .argument(trace)
                    .argument(&self.program)
            }
        };
        if let Some(text) = &self.configuration {
            let path = folder.path().join("vmgmtd.toml");
            fs::write(&path, here(text))?;
            start = start.argument("--config").argument(path);
        }
        start = start.arguments(self.arguments.iter().map(|argument| here(argument)));
        for (name, value) in &self.variables {
            start = start.variable(name, here(value));
        }
        let process = start.start()?;
        let mut daemon = Daemon { process, folder };
        daemon.wait_ready(&self.ready, self.ready_deadline)?;
        Ok(daemon)
    }
}

/// A running `vmgmtd` with its folder. Dropping it stops it.
pub struct Daemon {
    process: Process,
    folder: tempfile::TempDir,
}

impl Daemon {
    fn wait_ready(&mut self, ready: &Ready, deadline: Duration) -> Result<()> {
        match ready {
            Ready::LogText(text) => self.process.log.wait_for(text, deadline),
            Ready::Socket(path) => {
                let path = self.folder.path().join(path);
                let what = format!("{} to take a connection", path.display());
                wait_until(&what, deadline, || {
                    if let Some(status) = self.process.ended()? {
                        bail!("it ended at once ({status}):\n{}", self.process.log.tail());
                    }
                    Ok(std::os::unix::net::UnixStream::connect(&path).ok())
                })
                .map(drop)
            }
        }
        .context("the daemon did not become ready")
    }

    /// Its folder, where `@DIR@` pointed.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The path of `name` in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The main process's id (the keeper).
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it and its roles said.
    pub fn log(&self) -> &Log {
        self.process.log()
    }

    /// The process itself: to signal it, wait for it, kill it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The living processes of its tree below the main one.
    pub fn children(&self) -> Vec<Seen> {
        descendants(self.pid())
    }

    /// The id of the child that plays `role` (`front`, `core`, `runner`): its process name ends with the role, or the
    /// role is one of its arguments.
    pub fn role(&self, role: &str) -> Result<u32> {
        let children = self.children();
        let plays = |seen: &&Seen| {
            let by_name = seen.name.rsplit([' ', '-', ':', '/']).next() == Some(role);
            by_name
                || seen
                    .arguments
                    .iter()
                    .skip(1)
                    .any(|word| word.trim_start_matches("--role=") == role)
        };
        let found = children.iter().find(plays).map(|seen| seen.pid);
        found.with_context(|| {
            format!(
                "vmgmtd (process {}) has no child {role}: {children:?}",
                self.pid()
            )
        })
    }

    /// Kills the child that plays `role`, as a crash would; gives its process id.
    pub fn kill_role(&self, role: &str) -> Result<u32> {
        self.signal_role(role, Signal::KILL)
    }

    /// Sends a signal to the child that plays `role` (SIGSTOP: it hangs); gives its process id.
    pub fn signal_role(&self, role: &str, signal: Signal) -> Result<u32> {
        let pid = self.role(role)?;
        kill_process(process_id(pid)?, signal)?;
        Ok(pid)
    }

    /// Waits until `role` is played by another process than `old`; gives the new one's id.
    pub fn wait_for_new(&self, role: &str, old: u32, deadline: Duration) -> Result<u32> {
        wait_until(&format!("a new {role} after process {old}"), deadline, || {
            Ok(self.role(role).ok().filter(|pid| *pid != old))
        })
        .with_context(|| self.log().tail())
    }

    /// Asks it to end (SIGTERM) and waits; after the deadline it is killed and that is an error.
    pub fn stop(mut self, deadline: Duration) -> Result<ExitStatus> {
        self.process.signal(Signal::TERM)?;
        self.process.wait(deadline)
    }
}

/// Logs older than the newest of this many are removed.
const LOGS_KEPT: usize = 300;

/// A new file name for a log that outlives its process: logs of failed tests are wanted later. The oldest go.
pub fn new_log_path(name: &str) -> Result<PathBuf> {
    static COUNTER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let folder = crate::setup::Cache::open()?.path("logs");
    fs::create_dir_all(&folder)?;
    let count = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    if count == 0 {
        prune(&folder);
    }
    let test = thread::current().name().unwrap_or("main").replace("::", ".");
    Ok(folder.join(format!("{test}-{name}-{}-{count}.log", std::process::id())))
}

/// Removes all but the newest logs. Another test process may do the same at this moment, so what fails is left alone.
fn prune(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut logs: Vec<_> = entries
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    logs.sort();
    for (_, path) in logs.iter().rev().skip(LOGS_KEPT) {
        let _ = fs::remove_file(path);
    }
}
