//! The caretaker's workshop: builds this repository's programs and says where they are.
//!
//! In: names of binaries. Out: their paths. It must never guess a target folder: cargo tells.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    path::PathBuf,
    process::{Command, Stdio},
};
use vmgmt_testkit::setup::repository;

/// A cargo command at the top of the repository.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repository());
    command
}

/// What `timeout` ends with when it had to send SIGTERM, and when SIGKILL was needed.
pub const ENDED_BY_DEADLINE: [i32; 2] = [124, 137];

/// [`cargo`], ended with all that it started after `seconds`: a test that hangs must say so, not take the whole run with it.
pub fn cargo_within(seconds: u32) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", &seconds.to_string()])
        .arg(cargo().get_program())
        .current_dir(repository());
    command
}

/// Builds the binaries `names` of package `vmgmtd`; gives their paths in the same order.
pub fn host_programs(names: &[&str], release: bool) -> Result<Vec<PathBuf>> {
    host_programs_with(names, release, None)
}

/// The same with a feature, in a target folder of its own, so that both stay.
pub fn host_programs_with(names: &[&str], release: bool, feature: Option<&str>) -> Result<Vec<PathBuf>> {
    let mut command = cargo();
    command.args([
        "build",
        "--quiet",
        "--package",
        "vmgmtd",
        "--message-format=json-render-diagnostics",
    ]);
    for name in names {
        command.args(["--bin", name]);
    }
    if release {
        command.arg("--release");
    }
    if let Some(feature) = feature {
        let folder = repository().join("target").join(feature);
        command.args(["--features", feature, "--target-dir"]).arg(folder);
    }
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "building {} failed", names.join(" and "));
    let text = String::from_utf8(output.stdout)?;
    let messages: Vec<Value> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    names
        .iter()
        .map(|name| {
            let built = messages.iter().find(|message| {
                message.pointer("/target/name").and_then(Value::as_str) == Some(name)
                    && message.get("executable").is_some_and(Value::is_string)
            });
            let path = built
                .and_then(|message| message.get("executable"))
                .and_then(Value::as_str);
            path.map(PathBuf::from)
                .with_context(|| format!("cargo built no program {name}"))
        })
        .collect()
}
