//! The command line: arguments in, calls to the daemon, words for a person or JSON out, an exit code.
//!
//! Must never know how a call is carried ([`Client`] does) or what the daemon does with it.

use crate::client::{Client, ClientError, default_control_path};
use crate::output::{self, printable};
use crate::protocol::{
    AddVm, Call, ErrorCode, Event, Failure, Freeze, Frozen, Log, Receive, Received, Release, RemoveVm,
    SendMessage, Sent, Thaw, Vms, encode_base64, new_key,
};
use crate::{doctor, qemu_args, transfer, upgrade};
use clap::{Parser, Subcommand};
use serde_json::Value;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How long the daemon may say nothing to a plain question.
pub(crate) const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Added to the time that a call itself may take.
const GRACE: Duration = Duration::from_secs(10);

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 denied by policy or over a budget, 4 the VM or name is not there, \
5 timed out or busy, 7 the daemon cannot be reached.";

/// Rules vmgmtd: its VMs, messages, files.
#[derive(Debug, Parser)]
#[command(name = "vmgmtctl", version, after_help = EXIT_CODES)]
struct Arguments {
    /// The daemon's control socket [default: /run/vmgmt/control.sock, or $XDG_RUNTIME_DIR/vmgmt/control.sock for a user's daemon]
    #[arg(long, global = true, value_name = "PATH", env = "VMGMT_CONTROL")]
    control: Option<PathBuf>,
    /// Answers as JSON, one object per line; errors too, on standard error.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How the daemon is.
    Status,
    /// All VMs.
    Vms,
    /// VMs that have published themselves.
    Peers,
    /// Shared directories and who may use them.
    Shares,
    /// Sends a message of the host.
    Send {
        /// A VM's name, "host" or "all".
        target: String,
        /// The message; "-" reads it from standard input.
        text: String,
    },
    /// Gives the next message to the host.
    Recv {
        /// All messages, until interrupted.
        #[arg(long)]
        follow: bool,
        /// How long to wait for one, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
        wait: f64,
    },
    /// Offers a file to a VM and waits until it has it.
    Push {
        file: PathBuf,
        /// The VM, and the name that it is offered.
        #[arg(value_name = "VM[:NAME]")]
        target: String,
        /// How long the VM may take to accept, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
        wait: f64,
    },
    /// Gets a file that a VM serves.
    Pull {
        #[arg(value_name = "VM:PATH")]
        source: String,
        /// Where to [default: its own name, here].
        file: Option<PathBuf>,
        /// Replace a file that is there.
        #[arg(long)]
        force: bool,
        /// How long the VM may take to answer, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
        wait: f64,
    },
    /// Adds a VM with a socket of its own, until the daemon ends.
    AddVm {
        name: String,
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Permission bits of the socket file, in octal.
        #[arg(long)]
        mode: Option<String>,
        /// Group of the socket file.
        #[arg(long)]
        group: Option<String>,
        /// A share of the configuration. Can be given several times.
        #[arg(long, value_name = "NAME[:ro]")]
        share: Vec<String>,
        /// A VM that it may reach (all, if none is given). Can be given several times.
        #[arg(long, value_name = "VM")]
        reach: Vec<String>,
        /// It may send to all VMs at once.
        #[arg(long)]
        send_to_all: bool,
        /// Devices connected at once.
        #[arg(long, value_name = "COUNT")]
        devices_max: Option<u32>,
    },
    /// Removes a VM: its device ends, its mailbox is gone.
    RemoveVm { name: String },
    /// No DMA into or out of a VM's memory, until it is thawed; returns when all is quiet. For migrate, save and snapshot.
    Freeze {
        name: String,
        /// Thaw it by itself after this time, in whole seconds [default: never]. What is still being saved then is worth nothing.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Ends a freeze. Fails where there is none (any more).
    Thaw { name: String },
    /// The daemon's last lines: refusals, deaths of the core.
    Log {
        /// And what comes, until interrupted.
        #[arg(long)]
        follow: bool,
    },
    /// Has another vmgmtd program take over, part by part, without the VMs noticing; waits for the outcome.
    Upgrade(upgrade::Options),
    /// Has the configuration read anew and carried out, without the VMs noticing; waits for the outcome.
    Reload(upgrade::ReloadOptions),
    /// Lets a VM's device work again that was quarantined for killing the core.
    Release { vm: String },
    /// Looks at this host: kernel, limits, sockets, QEMU. Works without a daemon.
    Doctor(doctor::Options),
    /// Prints the arguments that give a QEMU the device.
    QemuArgs(qemu_args::Options),
}

/// The whole program.
#[must_use]
pub fn run() -> ExitCode {
    let Arguments {
        control,
        json,
        command,
    } = Arguments::parse();
    let session = Session {
        control: control.unwrap_or_else(default_control_path),
        json,
    };
    match session.run(command) {
        Ok(code) => code,
        Err(error) => {
            session.print_error(&error);
            ExitCode::from(exit_code(&error))
        }
    }
}

/// The exit code for an error, as --help documents it.
pub(crate) fn exit_code(error: &ClientError) -> u8 {
    match error {
        ClientError::Unreachable { .. } | ClientError::Closed { .. } => 7,
        ClientError::Silent { .. } => 5,
        ClientError::Garbled(_) => 1,
        ClientError::Failed(failure) => match failure.code {
            ErrorCode::BadRequest => 2,
            ErrorCode::Denied | ErrorCode::OverBudget => 3,
            ErrorCode::Absent | ErrorCode::NoSuchName => 4,
            ErrorCode::TimedOut | ErrorCode::Busy | ErrorCode::Restarting => 5,
            _ => 1,
        },
    }
}

/// A mistake of the person at the keyboard.
pub(crate) fn usage(message: impl Into<String>, remedy: impl Into<String>) -> ClientError {
    ClientError::Failed(Failure::new(ErrorCode::BadRequest, message, remedy))
}

/// Something of this host failed.
pub(crate) fn failed(message: impl Into<String>) -> ClientError {
    ClientError::Failed(Failure::new(ErrorCode::Failed, message, ""))
}

pub(crate) struct Session {
    pub(crate) control: PathBuf,
    pub(crate) json: bool,
}

impl Session {
    fn run(&self, command: Command) -> Result<ExitCode, ClientError> {
        match command {
            Command::Status => self.show(Call::Status, output::status)?,
            Command::Vms => self.show(Call::Vms, output::vms)?,
            Command::Peers => self.show(Call::Peers, output::peers)?,
            Command::Shares => self.show(Call::Shares, output::shares)?,
            Command::Send { target, text } => return self.send(target, text),
            Command::Recv { follow, wait } => return self.receive(follow, milliseconds(wait)?),
            Command::Push { file, target, wait } => {
                transfer::push(self, &file, &target, milliseconds(wait)?)?
            }
            Command::Pull {
                source,
                file,
                force,
                wait,
            } => {
                transfer::pull(self, &source, file, force, milliseconds(wait)?)?;
            }
            Command::AddVm {
                name,
                socket,
                mode,
                group,
                share,
                reach,
                send_to_all,
                devices_max,
            } => {
                // The daemon stands elsewhere than the operator.
                let socket = std::path::absolute(&socket).unwrap_or(socket);
                let socket = socket.into_os_string().into_string();
                let socket = socket.map_err(|_| usage("the socket's path is not UTF-8", "choose another"))?;
                let shares = share;
                let call = AddVm {
                    name,
                    socket,
                    mode,
                    group,
                    shares,
                    reach,
                    send_to_all,
                    devices_max,
                };
                self.show(Call::AddVm(Box::new(call)), |_: Value| String::new())?;
            }
            Command::RemoveVm { name } => {
                self.show(Call::RemoveVm(RemoveVm { name }), |_: Value| String::new())?;
            }
            Command::Freeze { name, timeout } => {
                let call = Freeze {
                    name,
                    timeout_seconds: timeout,
                };
                self.show(Call::Freeze(call), |frozen: Frozen| match frozen.devices {
                    0 => "frozen; no device is connected\n".to_owned(),
                    _ => String::new(),
                })?;
            }
            Command::Thaw { name } => self.thaw(&name)?,
            Command::Log { follow } => {
                let wait = (!follow).then_some(ANSWER_WAIT);
                self.call(&Call::Log(Log { follow }), wait)?;
            }
            Command::Upgrade(options) => return upgrade::run(self, &options),
            Command::Reload(options) => return upgrade::reload(self, &options),
            Command::Release { vm } => self.show(Call::Release(Release { vm }), |_: Value| String::new())?,
            Command::Doctor(options) => return Ok(doctor::run(self, &options)),
            Command::QemuArgs(options) => qemu_args::run(self, &options)?,
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Thaws a VM. Asked a second time it would say "not frozen", so where the answer is lost with the core, the daemon is asked how it stands.
    fn thaw(&self, name: &str) -> Result<(), ClientError> {
        let before = self.is_frozen(name)?;
        let call = Call::Thaw(Thaw {
            name: name.to_owned(),
        });
        loop {
            match self.show(call.clone(), |_: Value| String::new()) {
                Err(ClientError::Closed { .. }) if self.is_frozen(name)? => {}
                Err(ClientError::Closed { .. }) if before => return Ok(()),
                answered => return answered,
            }
        }
    }

    fn is_frozen(&self, name: &str) -> Result<bool, ClientError> {
        let vms: Vms = parse(self.call(&Call::Vms, Some(ANSWER_WAIT))?)?;
        Ok(vms.vms.iter().any(|vm| vm.name == name && vm.frozen))
    }

    /// Asks, and prints the result by `human` unless JSON is wanted.
    fn show<T: serde::de::DeserializeOwned>(
        &self,
        call: Call,
        human: impl FnOnce(T) -> String,
    ) -> Result<(), ClientError> {
        let result = self.call(&call, Some(ANSWER_WAIT))?;
        if self.json {
            self.print(&result.to_string());
        } else {
            self.print_text(&human(parse(result)?));
        }
        Ok(())
    }

    fn send(&self, target: String, text: String) -> Result<ExitCode, ClientError> {
        let to_all = target == "all";
        let key = Some(new_key());
        let message = if text == "-" {
            let mut bytes = Vec::new();
            let limit = crate::protocol::LINE_BYTES_MAX as u64;
            let read = std::io::stdin().take(limit).read_to_end(&mut bytes);
            read.map_err(|error| failed(format!("standard input: {error}")))?;
            match String::from_utf8(bytes) {
                Ok(text) => SendMessage {
                    to: target,
                    text: Some(text),
                    base64: None,
                    key,
                },
                Err(error) => SendMessage {
                    to: target,
                    text: None,
                    base64: Some(encode_base64(error.as_bytes())),
                    key,
                },
            }
        } else {
            SendMessage {
                to: target,
                text: Some(text),
                base64: None,
                key,
            }
        };
        self.show(Call::Send(message), |sent: Sent| {
            if to_all {
                format!("accepted for {} VMs\n", sent.number)
            } else {
                String::new()
            }
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn receive(&self, follow: bool, wait_ms: u64) -> Result<ExitCode, ClientError> {
        let silence = (!follow).then(|| Duration::from_millis(wait_ms).saturating_add(GRACE));
        let result = self.call(&Call::Recv(Receive { follow, wait_ms }), silence)?;
        let received: Received = if result.is_null() {
            Received::default()
        } else {
            parse(result)?
        };
        if received.messages == 0 && !follow {
            return Err(ClientError::Failed(Failure::new(
                ErrorCode::TimedOut,
                "no message",
                "wait for one with --wait SECONDS or --follow",
            )));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Asks, printing events as they come.
    pub(crate) fn call(&self, call: &Call, silence_max: Option<Duration>) -> Result<Value, ClientError> {
        Client::connect(&self.control)?.call(call, &[], silence_max, &mut |event| {
            if self.json {
                self.print(&serde_json::to_string(&event).unwrap_or_default())
            } else {
                match event {
                    Event::Message(message) => self.print_text(&output::message(&message)),
                    Event::Log(line) => self.print_text(&output::log_line(&line)),
                    Event::Progress(_) => true,
                }
            }
        })
    }

    /// Prints a line; `false`: nobody reads any more.
    pub(crate) fn print(&self, line: &str) -> bool {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).is_ok()
    }

    /// Prints what may hold a guest's words: without control characters where a terminal would obey them.
    pub(crate) fn print_text(&self, text: &str) -> bool {
        let mut out = std::io::stdout().lock();
        let text = if out.is_terminal() {
            printable(text)
        } else {
            text.into()
        };
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
    }

    fn print_error(&self, error: &ClientError) {
        let remedy = error.remedy();
        if self.json {
            let code = match error {
                ClientError::Failed(failure) => serde_json::to_value(failure.code).unwrap_or_default(),
                ClientError::Silent { .. } => "timed-out".into(),
                ClientError::Garbled(_) => "failed".into(),
                ClientError::Unreachable { .. } | ClientError::Closed { .. } => "unreachable".into(),
            };
            let error =
                serde_json::json!({"error": {"code": code, "message": error.to_string(), "remedy": remedy}});
            complain(&error.to_string());
            return;
        }
        complain(&format!("vmgmtctl: {}", printable(&error.to_string())));
        if !remedy.is_empty() {
            complain(&format!("    {}", printable(&remedy)));
        }
    }
}

/// A line on standard error. Its reader may be gone, where `eprintln!` would panic and the exit code be lost, which still says what happened.
fn complain(text: &str) {
    let _unread = writeln!(std::io::stderr(), "{text}");
}

pub(crate) fn parse<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, ClientError> {
    serde_json::from_value(value).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn milliseconds(seconds: f64) -> Result<u64, ClientError> {
    if (0.0..=1e9).contains(&seconds) {
        return Ok((seconds * 1000.0) as u64);
    }
    Err(usage(
        format!("{seconds} is no time to wait"),
        "give seconds, for example 2.5",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Request, Response, Vm};
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    /// What a daemon does with a request.
    enum Does {
        /// Answers `vms` for one VM.
        Vms(bool),
        Thaws,
        IsNotFrozen,
        /// Closes the connection, as a core that dies.
        Dies,
    }

    /// `vmgmtctl thaw` against a daemon that does this, one request after the other: the exit code.
    fn thaw(story: Vec<Does>) -> u8 {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control");
        let listener = UnixListener::bind(&control).unwrap();
        let daemon = std::thread::spawn(move || {
            let mut story = story.into_iter().peekable();
            while story.peek().is_some() {
                let (mut stream, _) = listener.accept().unwrap();
                for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                    let Request { id, call } = Request::from_line(line.unwrap().as_bytes()).unwrap();
                    let response = match (story.next().unwrap(), call) {
                        (Does::Vms(frozen), Call::Vms) => {
                            let name = "web".to_owned();
                            let vm = Vm {
                                name,
                                frozen,
                                ..Vm::default()
                            };
                            Response::result(id, &Vms { vms: vec![vm] })
                        }
                        (Does::Thaws, Call::Thaw(_)) => Response::result(id, &()),
                        (Does::IsNotFrozen, Call::Thaw(_)) => {
                            Response::failed(Some(id), Failure::new(ErrorCode::Stale, "not frozen", ""))
                        }
                        (Does::Dies, Call::Thaw(_)) => break,
                        (_, call) => panic!("{call:?} was not expected"),
                    };
                    stream.write_all(&response.to_line()).unwrap();
                }
            }
        });
        let session = Session { control, json: false };
        let code = session.thaw("web").map_or_else(|error| exit_code(&error), |()| 0);
        daemon.join().unwrap();
        code
    }

    #[test]
    fn a_thaw_whose_answer_is_lost_is_looked_after() {
        use Does::{Dies, IsNotFrozen, Thaws, Vms};
        assert_eq!(thaw(vec![Vms(true), Thaws]), 0);
        // It was done, and nobody heard; it was not done.
        assert_eq!(thaw(vec![Vms(true), Dies, Vms(false)]), 0);
        assert_eq!(thaw(vec![Vms(true), Dies, Vms(true), Dies, Vms(true), Thaws]), 0);
        // It was not frozen any more when it was asked for.
        assert_eq!(thaw(vec![Vms(false), IsNotFrozen]), 1);
        assert_eq!(thaw(vec![Vms(true), IsNotFrozen]), 1);
        assert_eq!(thaw(vec![Vms(false), Dies, Vms(false)]), 7);
    }
}
