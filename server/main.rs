//! `vmgmtd`: chooses the role (keeper, front, core) and runs it.
//!
//! In: flags. Out: an exit code: 0 ended as asked, 1 failed, 2 a mistake in flags or configuration. What a role does is in
//! `vmgmt-host`.

mod log;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use log::LogWriter;
use std::cell::OnceCell;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use vmgmt_host::config::{self, Config, Flags, Source};
use vmgmt_host::sandbox::{self, Account, Role, SandboxConfig};
use vmgmt_host::{core, descriptor_room, front, keeper, reader};

/// Gives many QEMU virtual machines one management device (vfio-user) for files, messages and more.
///
/// Plug it in with  -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/mgmt.sock"}}'
/// (`vmgmtctl qemu-args` prints all that QEMU needs).
#[derive(Debug, Parser)]
#[command(name = "vmgmtd", version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Socket for any number of VMs, each QEMU process a VM of its own. Can be given several times.
    #[arg(long, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// Directory that the VMs of those sockets see under this name, to read and write or (:ro) to read. Can be given several times.
    #[arg(long, value_name = "NAME=DIR[:ro]")]
    share: Vec<String>,
    /// Control socket, for vmgmtctl.
    #[arg(long, value_name = "PATH", env = "VMGMT_CONTROL")]
    control: Option<PathBuf>,
    /// error, warn, info, debug, trace, or a filter such as "vmgmt_host::front=debug,info".
    #[arg(long, value_name = "LEVEL", env = "VMGMT_LOG")]
    log: Option<String>,
    /// Reads the configuration, says what is wrong with it, and exits. (With a role: looks whether it could take that over.)
    #[arg(long)]
    check: bool,
    /// Whether the parts that guests speak with are shut in: other users, no capabilities, landlock, seccomp. On, if nothing is said.
    #[arg(long, value_name = "on|off")]
    sandbox: Option<Switch>,
    /// What this process is; given by the keeper to its children.
    #[arg(long, hide = true, requires = "parent")]
    role: Option<String>,
    #[arg(long, hide = true)]
    parent: Option<u32>,
    /// User and group of the front.
    #[arg(long, hide = true)]
    front_account: Option<Account>,
    /// Goes on as the keeper whose state is on standard input, which stopped then.
    #[arg(long, hide = true, value_name = "NANOSECONDS")]
    resume: Option<u64>,
    /// Why another program did not.
    #[arg(long, hide = true, requires = "resume")]
    failed: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match (arguments.role.as_deref(), arguments.parent) {
        (Some("front"), Some(parent)) => end(run_front(&arguments, parent)),
        (Some("core"), Some(parent)) if arguments.check => end(run_check(&arguments, parent)),
        (Some("core"), Some(parent)) => end(run_core(&arguments, parent)),
        (Some("reader"), Some(parent)) => end(run_reader(&arguments, parent)),
        (Some("namespace"), Some(_)) => end(sandbox::hold_namespace()),
        (Some(other), Some(_)) => end(Err(anyhow::anyhow!("there is no role {other:?}"))),
        _ => match arguments.resume {
            Some(_) if arguments.check => end(rehearse(&arguments)),
            Some(since_ns) => end(resume_keeper(since_ns, arguments)),
            None => run_keeper(arguments),
        },
    }
}

/// A program that is asked whether it could go on as the keeper.
fn rehearse(arguments: &Arguments) -> anyhow::Result<()> {
    let log = arguments.log.as_deref().unwrap_or("info");
    keeper::rehearse(&|| Ok(finisher(&start_log(log)?)))
}

fn resume_keeper(since_ns: u64, arguments: Arguments) -> anyhow::Result<()> {
    let log = arguments.log.unwrap_or_else(|| "info".into());
    let writer = OnceCell::new();
    let result = keeper::resume(
        &for_children(
            log.clone(),
            arguments.sandbox != Some(Switch::Off),
            arguments.front_account,
        ),
        since_ns,
        arguments.failed.as_deref(),
        &|| {
            let started = start_log(&log)?;
            Ok(finisher(writer.get_or_init(|| started)))
        },
    );
    if let Some(writer) = writer.get() {
        writer.finish();
    }
    result
}

/// Waits until the log is written.
fn finisher(writer: &LogWriter) -> Box<dyn Fn()> {
    let writer = writer.clone();
    Box::new(move || writer.finish())
}

/// What front and core are told on their command lines.
fn for_children(log: String, sandbox: bool, front: Option<Account>) -> Vec<String> {
    let mut words = vec!["--log".into(), log];
    if !sandbox {
        words.extend(["--sandbox".into(), "off".into()]);
    }
    words.extend(front.map(|account| format!("--front-account={account}")));
    words
}

// Both make room for descriptors and enter the sandbox while they have one thread; the log is the second.

fn run_front(arguments: &Arguments, parent: u32) -> anyhow::Result<()> {
    let channel = keeper::enter_role("front", parent)?;
    descriptor_room::make();
    let config = SandboxConfig {
        enabled: arguments.sandbox != Some(Switch::Off),
        front: arguments.front_account,
        core: None,
    };
    let entered = sandbox::enter(Role::Front, &config, parent, &[])?;
    with_log(arguments, || front::run(channel, entered))
}

fn run_core(arguments: &Arguments, parent: u32) -> anyhow::Result<()> {
    let channel = keeper::enter_role("core", parent)?;
    descriptor_room::make();
    let Some(start) = core::Start::receive(channel)? else {
        return Ok(());
    };
    let ahead = core::Ahead::begin();
    let entered = sandbox::enter(Role::Core, start.sandbox(), parent, &start.share_roots())?;
    with_log(arguments, || core::run(start, entered, ahead))
}

/// A program that is asked whether it could be the core: it reads the same state, so it is shut in as well.
fn run_check(arguments: &Arguments, parent: u32) -> anyhow::Result<()> {
    let channel = keeper::enter_role("core", parent)?;
    let Some(question) = core::Question::receive(channel)? else {
        return Ok(());
    };
    let entered = sandbox::enter(Role::Core, question.sandbox(), parent, &[])?;
    with_log(arguments, || core::check(question, entered))
}

/// Not shut in: it does what the keeper does at its start, and reads what the operator wrote.
fn run_reader(arguments: &Arguments, parent: u32) -> anyhow::Result<()> {
    let channel = keeper::enter_role("reader", parent)?;
    with_log(arguments, || reader::run(channel))
}

fn with_log(arguments: &Arguments, run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let log = start_log(arguments.log.as_deref().unwrap_or("info"))?;
    let result = run();
    log.finish();
    result
}

fn run_keeper(arguments: Arguments) -> ExitCode {
    let Arguments {
        config,
        socket,
        share,
        control,
        log,
        check,
        sandbox,
        role: _,
        parent: _,
        front_account: _,
        resume: _,
        failed: _,
    } = arguments;
    let flags = Flags {
        sockets: socket,
        shares: share,
        control,
        log,
        sandbox: sandbox.map(|switch| switch == Switch::On),
    };
    if config.is_none() && flags.sockets.is_empty() {
        eprintln!(
            "vmgmtd: no VM could come in\n    give --socket /run/mgmt.sock, or --config FILE; vmgmtd --help says more"
        );
        return ExitCode::from(2);
    }
    // Read again at each reload, wherever vmgmtd stands then.
    let source = Source {
        file: config.map(|path| std::path::absolute(&path).unwrap_or(path)),
        flags,
    };
    let loaded = config::load(source.file.as_deref(), &source.flags).map_err(|mistakes| mistakes.to_string());
    let started = loaded.and_then(|config| {
        let log = config.server.log.clone().unwrap_or_else(|| "info".into());
        let writer = start_log(&log).map_err(|error| format!("{error:#}"))?;
        Ok((config, log, writer))
    });
    let (config, log, writer) = match started {
        Ok(started) => started,
        Err(text) => {
            eprintln!("vmgmtd: {text}");
            return ExitCode::from(2);
        }
    };
    if check {
        print_summary(&config);
        return ExitCode::SUCCESS;
    }
    let SandboxConfig { enabled, front, .. } = config.core.sandbox;
    let result = keeper::run(
        config,
        source,
        for_children(log, enabled, front),
        finisher(&writer),
    );
    writer.finish();
    end(result)
}

fn print_summary(config: &Config) {
    for warning in &config.warnings {
        eprintln!("warning: {warning}");
    }
    let vms = config.listeners.iter().filter(|(_, vm)| vm.is_some()).count();
    let shared = config.listeners.len() - vms;
    let shares = config.core.shares.len();
    println!("the configuration is good: {vms} VMs, {shared} shared sockets, {shares} shares");
}

fn start_log(filter: &str) -> anyhow::Result<LogWriter> {
    let filter = EnvFilter::builder().parse(filter).map_err(|error| {
        anyhow::anyhow!(
            "log filter {filter:?}: {error}\n    use error, warn, info, debug, trace or TARGET=LEVEL,…"
        )
    })?;
    let writer = LogWriter::start(std::io::stderr()).context("a thread for the log")?;
    let lines = writer.clone();
    // A journal has times of its own; who else reads our lines wants them.
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || lines.clone())
        .with_ansi(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().init()
    } else {
        log.init()
    }
    Ok(writer)
}

fn end(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmgmtd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
