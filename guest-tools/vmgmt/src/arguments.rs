//! What can be typed. Comes in: the command line. Goes out: checked choices. Never: a device.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// The exit codes, as `--help` shows them.
const EXIT_CODES: &str = "Exit codes:\n  0  done\n  1  failed\n  2  wrong use of the command line\n  3  denied by the host's policy, read-only, or a missing right\n  4  no such name, or the peer is absent\n  5  busy, timed out, or over a budget\n  6  a checksum does not match\n  7  no device, or the machine lacks something the device needs\n  130  interrupted\n  141  nobody reads the output any more";

/// The guest's command line for its management device.
#[derive(Debug, Parser)]
#[command(name = "vmgmt", version, about, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Arguments {
    #[command(flatten)]
    pub general: General,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct General {
    /// One JSON document a line on standard output, instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// How to reach the device
    #[arg(long, global = true, value_enum, default_value_t = Backing::Auto, env = "VMGMT_BACKING")]
    pub backing: Backing,
    /// The device's PCI address (0000:00:03.0), or vendor:device in hexadecimal; default: 1af4:10f0
    #[arg(long, global = true, value_name = "BDF", env = "VMGMT_DEVICE")]
    pub device: Option<String>,
    /// Wait so long for another program to let go of the device
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 0.0)]
    pub wait_device: f64,
    /// Look at the ring so long before sleeping
    #[arg(long, global = true, value_name = "MICROSECONDS", default_value_t = 50)]
    pub spin_us: u64,
    /// Submissions of a transfer in flight
    #[arg(long, global = true, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub depth: u16,
    /// Bytes of one submission of a transfer, in KiB
    #[arg(long, global = true, value_name = "KIB", default_value_t = 1024, value_parser = clap::value_parser!(u16).range(4..=16384))]
    pub chunk_kib: u16,
}

/// Ways to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backing {
    /// What the kernel driver it is bound to allows
    Auto,
    Vfio,
    Uio,
    /// The port window alone
    Ports,
}

/// Kernel drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    Vfio,
    Uio,
    /// No kernel driver: only the port window works then
    None,
}

/// What to do with an existing target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Existing {
    Refuse,
    Replace,
    /// Find a free name: name.1.ext, …
    Rename,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bind the device to a kernel driver, loading its module where possible
    Bind {
        #[arg(long, value_enum)]
        driver: Option<Driver>,
    },
    /// Show the device, this VM's name, its shares
    Info,
    /// Try everything: identity, echo through ports and rings, lists, interrupts, shared memory
    Selftest,
    /// Put a file into a share
    Put {
        /// A file, or - for standard input
        local: PathBuf,
        /// SHARE/path; a trailing / keeps the file's name
        target: String,
        #[arg(long, value_enum, default_value_t = Existing::Refuse)]
        existing: Existing,
        /// Go on where an earlier put of the same file broke off
        #[arg(long)]
        resume: bool,
        /// Done only when it is on the host's disk
        #[arg(long)]
        durable: bool,
        /// Give the file these permission bits (octal)
        #[arg(long, value_parser = permissions)]
        mode: Option<u32>,
        /// No checksum
        #[arg(long)]
        no_check: bool,
    },
    /// Get a file of a share
    Get {
        /// SHARE/path
        source: String,
        /// A file or directory, or - for standard output; default: the same name here
        local: Option<PathBuf>,
        /// Replace an existing file
        #[arg(long)]
        force: bool,
        /// No checksum
        #[arg(long)]
        no_check: bool,
    },
    /// List shares, or a directory
    Ls { path: Option<String> },
    /// Remove a file or an empty directory
    Rm {
        #[arg(required = true)]
        paths: Vec<String>,
    },
    /// Show what a path is
    Stat { path: String },
    /// Make a directory
    Mkdir { path: String },
    /// Rename within a share
    Mv {
        source: String,
        target: String,
        #[arg(long, value_enum, default_value_t = Existing::Refuse)]
        existing: Existing,
        #[arg(long)]
        durable: bool,
    },
    /// Send a file to another VM, which must accept it (the host takes files in its shares: put)
    Cp {
        /// A file, or - for standard input
        local: PathBuf,
        /// VM:[name]
        target: String,
        /// Give up when nobody accepts in so many seconds; until then wait for a VM that is away, too. While the host has this VM
        /// frozen the command does not begin, and the time not either
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<f64>,
        #[arg(long)]
        no_check: bool,
    },
    /// Wait for files that others offer, and write them here
    Accept {
        /// Only from this VM (or host)
        #[arg(long, value_name = "VM")]
        from: Option<String>,
        /// End after one file
        #[arg(long)]
        once: bool,
        /// Where offered files go
        #[arg(long, value_name = "DIR", default_value = ".")]
        into: PathBuf,
        /// Answer the host's requests for files beneath this directory
        #[arg(long, value_name = "DIR")]
        serve: Option<PathBuf>,
        #[arg(long)]
        no_check: bool,
    },
    /// Send a message to a VM, to host or to all
    Send {
        target: String,
        /// The text, or - for standard input
        text: String,
        /// A number with which a repeated send is delivered once
        #[arg(long, default_value_t = 0)]
        key: u64,
    },
    /// Receive messages
    Recv {
        /// End after so many
        #[arg(long, default_value_t = 1)]
        count: u64,
        /// End after so many seconds without one (exit code 5 when none came). While the host has this VM frozen the command does
        /// not begin, and the time not either
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<f64>,
        /// Go on for ever
        #[arg(long)]
        follow: bool,
        /// Only the message's bytes, each with a line end
        #[arg(long)]
        raw: bool,
    },
    /// List who can be reached
    Peers,
    /// Publish this VM with a description (without one: withdraw it)
    Publish {
        description: Option<String>,
        /// Publish without a description
        #[arg(long, conflicts_with = "description")]
        plain: bool,
        /// Stay until interrupted: presence ends with the device's use
        #[arg(long)]
        stay: bool,
    },
    /// Measure: submissions a second, round trips, get and put
    Bench {
        /// A share that may be written, for get and put
        #[arg(long)]
        share: Option<String>,
        /// Size of the file for get and put, in MiB
        #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
        mib: u32,
        /// Of get and put only those from and to the program's memory, without checksum
        #[arg(long, requires = "share")]
        memory_only: bool,
        /// Get and put so often; each time gives its figures
        #[arg(long, default_value_t = 1, requires = "share", value_parser = clap::value_parser!(u32).range(1..=1000))]
        repeat: u32,
        /// Repetitions of small operations
        #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(10..=10_000_000))]
        count: u32,
        /// A directory in memory for get and put to a file
        #[arg(long, default_value = "/dev/shm")]
        tmpfs: PathBuf,
        /// No figures of the device alone
        #[arg(long)]
        skip_rings: bool,
        /// Message round trips with this VM (which runs vmgmt bench --answer), or with host; --spin-us 0 sleeps, anything else polls
        #[arg(long, value_name = "NAME")]
        partner: Option<String>,
        /// Measure nothing: send every message back until the partner is done
        #[arg(long, conflicts_with_all = ["share", "partner", "peer_directory", "peer_port"])]
        answer: bool,
        /// To compare: the same get and put with a file in this directory (a mounted virtiofs)
        #[arg(long, value_name = "DIR")]
        peer_directory: Option<PathBuf>,
        /// To compare: the same through this character device (cargo xtask bench is at its other end)
        #[arg(long, value_name = "DEVICE")]
        peer_port: Option<PathBuf>,
    },
}

fn permissions(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|bits| *bits <= 0o777)
        .ok_or_else(|| format!("{text:?} is not an octal number up to 777"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
