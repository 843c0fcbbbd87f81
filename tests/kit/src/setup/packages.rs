//! Setup, the errands: packages of the host's own distribution, and trees of Debian packages that touch nothing on the host.
//!
//! In: package names. Out: installed packages, or an extracted tree below the cache. It must never know what they are for.

use super::{cache::Cache, cache::CacheLock, mirror, step};
use anyhow::{Context, Result, bail, ensure};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What the build and the tests need from the host, by a file that proves its presence, and its Debian package.
/// A file, not dpkg's list: another distribution's package, or a hand-made one, is as good.
const HOST_NEEDS: [(&str, &[&str], &str); 5] = [
    (
        "mmdebstrap, extracts Debian packages",
        &["/usr/bin/mmdebstrap"],
        "mmdebstrap",
    ),
    (
        "strace, shows what the sandboxed processes call",
        &["/usr/bin/strace"],
        "strace",
    ),
    ("xz, unpacks kernel modules", &["/usr/bin/xz"], "xz-utils"),
    (
        "the kernel's headers, for uapi-check",
        &["/usr/include/linux/vfio.h"],
        "linux-libc-dev",
    ),
    (
        "libclang, for uapi-check's bindgen",
        &[
            "/usr/lib/llvm-14/lib/libclang.so",
            "/usr/lib/llvm-16/lib/libclang.so",
            "/usr/lib/llvm-19/lib/libclang.so",
            "/usr/lib/x86_64-linux-gnu/libclang.so",
        ],
        "libclang-dev",
    ),
];

/// The packages that are missing on this host.
pub fn missing_packages() -> Vec<&'static str> {
    let present = |paths: &[&str]| paths.iter().any(|path| Path::new(path).exists());
    HOST_NEEDS
        .iter()
        .filter(|(_, paths, _)| !present(paths))
        .map(|(_, _, package)| *package)
        .collect()
}

/// Installs what is missing through apt; needs root.
pub fn install_missing() -> Result<()> {
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    ensure!(
        rustix::process::geteuid().is_root(),
        "these packages are missing: {names}; run `apt-get install {names}` as root, then this again"
    );
    step(&format!("apt-get install {names}"), || {
        run(apt().arg("update"))?;
        run(apt()
            .args(["install", "-y", "--no-install-recommends"])
            .args(&missing))
    })?;
    let still = missing_packages();
    ensure!(
        still.is_empty(),
        "apt-get installed {names}, but what they should bring is not there: {still:?}"
    );
    Ok(())
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-qq").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// A set of Debian packages, extracted below the cache.
pub struct Tree {
    /// The folder's name in the cache; a change of the lines below wants a new one.
    pub name: &'static str,
    /// The release everything comes from.
    pub suite: &'static str,
    /// Suites that may be drawn from as well; the first is preferred.
    pub preferred: &'static [&'static str],
    /// The packages; what they depend on comes along.
    pub packages: &'static str,
}

impl Tree {
    /// The extracted tree, fetched if it is not there yet.
    pub fn ensure(&self, cache: &Cache, lock: &CacheLock) -> Result<PathBuf> {
        let folder = cache.path(self.name);
        if folder.is_dir() {
            return Ok(folder);
        }
        step(&format!("extract {} ({})", self.packages, self.suite), || {
            cache.build_folder(lock, self.name, |target| self.extract(target))
        })
    }

    fn extract(&self, target: &Path) -> Result<()> {
        ensure!(
            Path::new("/usr/bin/mmdebstrap").exists(),
            "mmdebstrap is missing: run `cargo xtask setup` as root, or `apt-get install mmdebstrap`"
        );
        let mirror = mirror::debian_mirror(Path::new("/etc/apt"))?;
        let mut command = Command::new("mmdebstrap");
        command.args(["--quiet", "--variant=extract"]);
        if let Some(preferred) = self.preferred.first() {
            command.arg(format!("--aptopt=APT::Default-Release \"{preferred}\""));
        }
        for option in apt_proxies() {
            command.arg(format!("--aptopt={option}"));
        }
        command
            .arg(format!("--include={}", self.packages))
            .arg(self.suite)
            .arg(target)
            .arg("-");
        let suites = std::iter::once(&self.suite).chain(self.preferred);
        let sources: String = suites
            .map(|suite| format!("deb {mirror} {suite} main\n"))
            .collect();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start mmdebstrap")?;
        child
            .stdin
            .take()
            .context("mmdebstrap has no input")?
            .write_all(sources.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "mmdebstrap could not extract {} from the mirror in this host's apt sources ({}): {}",
                self.packages,
                output.status,
                tail(&String::from_utf8_lossy(&output.stderr), 15)
            );
        }
        Ok(())
    }
}

/// The proxies that the host's apt uses, as apt options: mmdebstrap does not take them over by itself.
fn apt_proxies() -> Vec<String> {
    let Ok(output) = Command::new("apt-config").arg("dump").output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| line.starts_with("Acquire::http") && line.contains("::Proxy "))
        .map(|line| line.trim_end_matches(';').to_owned())
        .collect()
}

/// Runs a command to its end; an error carries the end of what it said.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {shown}"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!(
            "{shown} failed ({}): {}",
            output.status,
            tail(&String::from_utf8_lossy(&said), 30)
        );
    }
    Ok(())
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
