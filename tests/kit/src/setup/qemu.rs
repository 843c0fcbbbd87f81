//! Setup, the engine: a QEMU that has the vfio-user client, and whether KVM is of use.
//!
//! In: the host and the cache. Out: the path of one program and its version. It must never know what it will run.

use super::{cache::Cache, cache::CacheLock, packages::Tree, step};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// The first QEMU with `-device vfio-user-pci`.
const VERSION_NEEDED: (u32, u32) = (10, 1);

/// Names the QEMU to use, whatever is installed.
pub const QEMU_VARIABLE: &str = "VMGMT_QEMU";

const QEMU_TREE: Tree = Tree {
    name: "qemu-trixie-backports-1",
    suite: "trixie",
    preferred: &["trixie-backports"],
    packages: "qemu-system-x86,ovmf,virtiofsd",
};

/// A program that takes QEMU's arguments.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program, or a script that becomes it.
    pub program: PathBuf,
    /// Major and minor version.
    pub version: (u32, u32),
    /// OVMF's code and variables (UEFI firmware), where they were found.
    pub ovmf: Option<(PathBuf, PathBuf)>,
}

/// The QEMU named by `VMGMT_QEMU`, else the host's own if it is new enough, else the one in the cache, fetched if missing.
pub fn ensure_qemu(cache: &Cache, lock: &CacheLock) -> Result<Qemu> {
    if let Some(program) = std::env::var_os(QEMU_VARIABLE) {
        let program = PathBuf::from(program);
        let version = version_of(&program)
            .with_context(|| format!("{QEMU_VARIABLE} names {}, which does not run", program.display()))?;
        return Ok(Qemu {
            program,
            version,
            ovmf: ovmf_below(Path::new("/")),
        });
    }
    let own = Path::new("/usr/bin/qemu-system-x86_64");
    if let Some(version) = version_of(own).ok().filter(|version| *version >= VERSION_NEEDED) {
        return Ok(Qemu {
            program: own.into(),
            version,
            ovmf: ovmf_below(Path::new("/")),
        });
    }
    let tree = QEMU_TREE.ensure(cache, lock)?;
    let program = starter(cache, lock, &tree)?;
    let version = version_of(&program)?;
    if version < VERSION_NEEDED {
        bail!(
            "QEMU {}.{} in {} has no vfio-user client; 10.1 is needed",
            version.0,
            version.1,
            tree.display()
        );
    }
    Ok(Qemu {
        program,
        version,
        ovmf: ovmf_below(&tree),
    })
}

/// Asks a QEMU for its version.
fn version_of(program: &Path) -> Result<(u32, u32)> {
    let output = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1);
    let mut numbers = words.unwrap_or_default().split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("{} --version does not name a version: {text}", program.display()),
    }
}

fn ovmf_below(root: &Path) -> Option<(PathBuf, PathBuf)> {
    let file = |name: &str| Some(root.join("usr/share/OVMF").join(name)).filter(|path| path.exists());
    Some((file("OVMF_CODE_4M.fd")?, file("OVMF_VARS_4M.fd")?))
}

/// A script that runs the extracted QEMU with its own libraries and firmware. It replaces itself (`exec`), so the
/// process a caller started is QEMU.
fn starter(cache: &Cache, lock: &CacheLock, tree: &Path) -> Result<PathBuf> {
    let name = "qemu-system-x86_64";
    let tree = tree.to_str().context("the cache folder's name is not UTF-8")?;
    let script = format!(
        "#!/bin/sh\n# Written by `cargo xtask setup`: QEMU from extracted Debian packages.\ntree='{}'\n\
         exec \"$tree/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2\" \\\n    \
         --library-path \"$tree/usr/lib/x86_64-linux-gnu\" \\\n    \
         \"$tree/usr/bin/qemu-system-x86_64\" -L \"$tree/usr/share/qemu\" -L \"$tree/usr/share/seabios\" \"$@\"\n",
        tree.replace('\'', "'\\''")
    );
    let path = cache.path(name);
    if fs::read_to_string(&path).is_ok_and(|text| text == script) {
        return Ok(path);
    }
    step("write the QEMU starter", || {
        // Made executable before it gets its name; `write_file` would publish it first.
        let temporary = cache.path(&format!(".{name}.new"));
        fs::write(&temporary, &script)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))?;
        fs::rename(&temporary, &path)?;
        let _held = lock;
        Ok(path.clone())
    })
}
