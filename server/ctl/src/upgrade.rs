//! `vmgmtctl upgrade` and `vmgmtctl reload`: ask for it, then look at the status, over as many connections as it takes, until it is over.
//!
//! In: the program and the parts. Out: the report, an exit code. Must never know how a part is replaced.

use crate::cli::{ANSWER_WAIT, Session, parse, usage};
use crate::client::ClientError;
use crate::output;
use crate::protocol::{
    Call, ErrorCode, Failure, Part, Status, Upgrade, UpgradeReport, UpgradeState, Upgrading,
};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Between two looks at the status.
const LOOK_STEP: Duration = Duration::from_millis(50);

/// What to upgrade, and to what.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The new vmgmtd [default: what is now at the path that the daemon was started from]
    #[arg(long, value_name = "PROGRAM")]
    to: Option<PathBuf>,
    /// Only this part. Can be given several times.
    #[arg(long, value_enum, value_name = "PART")]
    part: Vec<PartName>,
    /// How long to wait for the end, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum PartName {
    Core,
    Front,
    Keeper,
}

/// Runs it. Only an upgrade that was done is a success.
pub(crate) fn run(session: &Session, options: &Options) -> Result<ExitCode, ClientError> {
    let to = match &options.to {
        None => None,
        Some(path) => {
            // The daemon stands elsewhere than the operator.
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let path = path.into_os_string().into_string();
            Some(path.map_err(|_| usage("the program's path is not UTF-8", "choose another"))?)
        }
    };
    let parts = options.part.iter().map(|part| match part {
        PartName::Core => Part::Core,
        PartName::Front => Part::Front,
        PartName::Keeper => Part::Keeper,
    });
    let upgrade = Upgrade {
        to,
        parts: parts.collect(),
    };
    carry_out(session, &Call::Upgrade(upgrade), options.wait)
}

/// How long `vmgmtctl reload` waits.
#[derive(Debug, clap::Args)]
pub(crate) struct ReloadOptions {
    /// How long to wait for the end, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,
}

/// Has the configuration read anew. Only a reload that was done is a success.
pub(crate) fn reload(session: &Session, options: &ReloadOptions) -> Result<ExitCode, ClientError> {
    carry_out(session, &Call::Reload, options.wait)
}

/// Asks for it, waits for its end, and prints the report.
fn carry_out(session: &Session, call: &Call, wait_s: u64) -> Result<ExitCode, ClientError> {
    let pid = parse::<Status>(session.call(&Call::Status, Some(ANSWER_WAIT))?)?.pid;
    let Upgrading { number } = parse(session.call(call, Some(ANSWER_WAIT))?)?;
    let report = wait(session, number, pid, Duration::from_secs(wait_s))?;
    if session.json {
        session.print(&serde_json::to_string(&report).unwrap_or_default());
    } else {
        session.print_text(&output::upgrade(&report));
    }
    Ok(match report.state {
        UpgradeState::Done => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// The report of upgrade `number` once it is over. `pid`: of the daemon that was asked for it.
fn wait(session: &Session, number: u64, pid: u32, patience: Duration) -> Result<UpgradeReport, ClientError> {
    let begin = Instant::now();
    loop {
        // Connections end with the core that served them.
        let error = match session
            .call(&Call::Status, Some(ANSWER_WAIT))
            .and_then(parse::<Status>)
        {
            Ok(Status {
                upgrade: Some(report),
                ..
            }) if report.number == number => {
                if report.is_over() {
                    return Ok(report);
                }
                None
            }
            // Who answers is told of its beginning a moment after the request was: this is the one before.
            Ok(Status {
                upgrade: Some(report),
                ..
            }) if report.number < number => None,
            // Or it knows of none yet; a daemon that was started anew never will.
            Ok(Status {
                upgrade: None,
                pid: its,
                ..
            }) if its == pid => None,
            Ok(status) => {
                let message = match status.upgrade {
                    Some(other) => format!("upgrade {} has begun meanwhile", other.number),
                    None => "the daemon knows nothing of the upgrade: it was started anew meanwhile".into(),
                };
                let remedy = "look at `vmgmtctl status` and the daemon's log";
                return Err(ClientError::Failed(Failure::new(
                    ErrorCode::Failed,
                    message,
                    remedy,
                )));
            }
            Err(error @ (ClientError::Unreachable { .. } | ClientError::Closed { .. })) => Some(error),
            Err(error) => return Err(error),
        };
        if begin.elapsed() > patience {
            return Err(error.unwrap_or_else(|| {
                ClientError::Failed(Failure::new(
                    ErrorCode::TimedOut,
                    format!("upgrade {number} is not over after {} s", patience.as_secs()),
                    "it goes on; `vmgmtctl status` shows it",
                ))
            }));
        }
        std::thread::sleep(LOOK_STEP);
    }
}
