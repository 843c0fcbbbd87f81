//! The caretaker's measuring room, its label: on what machine, when, with what.
//!
//! In: `/proc`, the repository, the tools. Out: facts, for people and programs. It must never name the machine or its user.

use serde_json::{Value, json};
use std::{fs, process::Command};
use vmgmt_testkit::setup::repository;

/// What has to be known of a figure.
pub struct Facts {
    list: Vec<(&'static str, String)>,
}

impl Facts {
    /// The host, before anything is measured.
    pub fn of_host() -> Self {
        let unknown = || "unknown".to_owned();
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        let model = line_of("/proc/cpuinfo", "model name").unwrap_or_else(unknown);
        let memory = line_of("/proc/meminfo", "MemTotal").unwrap_or_else(unknown);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let list = vec![
            ("date", output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
            ("commit", commit()),
            ("cores", format!("{processors} ({model})")),
            ("memory", memory),
            ("host kernel", kernel.trim().to_owned()),
            ("load before (1, 5, 15 minutes)", Self::load()),
            ("compiler", output("rustc", &["--version"])),
        ];
        Self { list }
    }

    /// One more.
    pub fn add(&mut self, name: &'static str, value: impl Into<String>) {
        self.list.push((name, value.into()));
    }

    /// All, in order.
    pub fn all(&self) -> &[(&'static str, String)] {
        &self.list
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let map: serde_json::Map<String, Value> = self
            .list
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json!(value)))
            .collect();
        map.into()
    }

    /// How busy the machine is.
    pub fn load() -> String {
        let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
    }
}

/// The value of the first line of a file that begins with `name`.
fn line_of(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim().to_owned())
}

/// The commit that was measured, and whether files were changed since.
fn commit() -> String {
    let git = |words: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(repository()).args(words);
        first_words(&mut command)
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let with = if changed.is_empty() || changed == "unknown" {
        ""
    } else {
        " and uncommitted changes"
    };
    format!("{}{with}", git(&["rev-parse", "--short", "HEAD"]))
}

fn output(program: &str, words: &[&str]) -> String {
    first_words(Command::new(program).args(words))
}

/// What a command says; `unknown` when it cannot be run.
fn first_words(command: &mut Command) -> String {
    match command.output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}
