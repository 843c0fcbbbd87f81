//! The simulator's key: builds it and hands everything over.
//!
//! In: what the simulator takes. Out: its words and its exit status.

use crate::build::cargo;
use anyhow::{Result, ensure};
use clap::Args;

/// Cargo's words that start it.
pub const COMMAND: [&str; 5] = ["run", "--quiet", "--package", "vmgmt-sim", "--"];

/// Steps of each seed in a sweep: as many as the committed seeds have.
pub const STEPS: &str = "1500";

#[derive(Args)]
pub struct Options {
    /// --seed, --seeds, --steps, --seconds, --aloud, --keep-going: see --help of the simulator itself (`cargo xtask sim -- --help`).
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Runs it.
pub fn sim(options: &Options) -> Result<()> {
    let status = cargo().args(COMMAND).args(&options.arguments).status()?;
    ensure!(status.success(), "the simulator ended with {status}");
    Ok(())
}
