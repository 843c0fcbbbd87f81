//! How the program ends: one table from error to exit code.

use std::process::ExitCode;

use vmgmt_driver::{DriverError, Status};

use crate::output::{complain, is_unread, line};

/// A plain reason to end with a certain code.
#[derive(Debug)]
pub struct Ending {
    pub code: u8,
    pub text: String,
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Ending {}

/// An error with one of the codes below.
pub fn ending(code: u8, text: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Ending {
        code,
        text: text.into(),
    })
}

pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const DENIED: u8 = 3;
pub const ABSENT: u8 = 4;
pub const BUSY: u8 = 5;
pub const INTEGRITY: u8 = 6;
pub const NO_DEVICE: u8 = 7;
/// 128 + SIGINT, as shells count.
pub const INTERRUPTED: u8 = 130;
/// 128 + SIGPIPE, as shells count: nobody reads what is written.
pub const UNREAD: u8 = 141;

fn of_status(status: Status) -> u8 {
    match status {
        Status::DENIED | Status::READ_ONLY | Status::REFUSED => DENIED,
        Status::NO_SUCH_NAME | Status::PEER_ABSENT => ABSENT,
        Status::BUSY | Status::TIMED_OUT | Status::OVER_BUDGET | Status::NOT_READY => BUSY,
        Status::INTEGRITY => INTEGRITY,
        _ => FAILED,
    }
}

/// The exit code of an error.
pub fn code(error: &anyhow::Error) -> u8 {
    if let Some(ending) = error.downcast_ref::<Ending>() {
        return ending.code;
    }
    if is_unread(error) {
        return UNREAD;
    }
    match error
        .chain()
        .find_map(|cause| cause.downcast_ref::<DriverError>())
    {
        Some(DriverError::Interrupted) => INTERRUPTED,
        Some(DriverError::TimedOut | DriverError::InUse { .. } | DriverError::DeviceTimeout { .. }) => BUSY,
        Some(DriverError::Integrity { .. }) => INTEGRITY,
        Some(DriverError::BadArgument(_)) => USAGE,
        Some(
            DriverError::NoDevice(_)
            | DriverError::SetUp(_)
            | DriverError::DeviceAbsent
            | DriverError::DeviceMagic { .. }
            | DriverError::DeviceVersion { .. }
            | DriverError::DeviceQuarantined
            | DriverError::NotPossible(..),
        ) => NO_DEVICE,
        Some(error) => error.status().map_or(FAILED, of_status),
        None => FAILED,
    }
}

/// Prints the error and gives the exit code.
pub fn report(error: &anyhow::Error, json: bool) -> ExitCode {
    let code = code(error);
    if is_unread(error) {
        // Whoever read it has seen enough.
        return ExitCode::from(code);
    }
    if json {
        let status = error
            .chain()
            .find_map(|cause| cause.downcast_ref::<DriverError>())
            .and_then(DriverError::status);
        let status = status.and_then(Status::name);
        // If it cannot be written either, the exit code says it alone.
        let _written = line(format_args!(
            "{}",
            serde_json::json!({"error": format!("{error:#}"), "code": code, "status": status})
        ));
    } else {
        complain(format_args!("vmgmt: {error:#}"));
    }
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmgmt_driver::{Opcode, Refusal};

    #[test]
    fn each_refusal_has_its_code() {
        let refused = |status| {
            anyhow::Error::new(DriverError::Refused(Refusal {
                opcode: Opcode::OPEN,
                status,
                detail: 0,
            }))
            .context("share/x")
        };
        assert_eq!(code(&refused(Status::DENIED)), DENIED);
        assert_eq!(code(&refused(Status::NO_SUCH_NAME)), ABSENT);
        assert_eq!(code(&refused(Status::OVER_BUDGET)), BUSY);
        assert_eq!(code(&refused(Status::INTEGRITY)), INTEGRITY);
        assert_eq!(code(&refused(Status(999))), FAILED);
        assert_eq!(code(&anyhow::anyhow!("x")), FAILED);
        assert_eq!(code(&DriverError::Interrupted.into()), INTERRUPTED);
        let unread = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!(code(&anyhow::Error::from(unread()).context("writing")), UNREAD);
        let file = DriverError::file("writing standard output", unread());
        assert_eq!(code(&anyhow::Error::from(file).context("share/x")), UNREAD);
    }
}
