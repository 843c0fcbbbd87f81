//! `vmgmtctl`: see `vmgmt-ctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmgmt_ctl::run()
}
