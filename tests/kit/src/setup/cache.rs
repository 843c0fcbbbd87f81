//! Setup, the store room: the cache folder, its lock, and how a thing gets into it whole or not at all.
//!
//! In: names. Out: paths below one folder. It must never know what is stored.

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

/// Names another cache folder than `.cache` at the top of the repository.
pub const CACHE_VARIABLE: &str = "VMGMT_CACHE";

/// The top of the repository that this test kit was built from.
pub fn repository() -> PathBuf {
    let kit = Path::new(env!("CARGO_MANIFEST_DIR"));
    kit.ancestors().nth(2).unwrap_or(kit).to_path_buf()
}

/// The folder that holds what setup fetched and built.
pub struct Cache {
    root: PathBuf,
}

/// Held while something is put into the cache; a second process waits for it.
pub struct CacheLock {
    _file: File,
}

impl Cache {
    /// Opens (and makes) the folder named by `VMGMT_CACHE`, or `.cache` in the repository.
    pub fn open() -> Result<Self> {
        let root = match std::env::var_os(CACHE_VARIABLE) {
            Some(folder) => std::path::absolute(folder)?,
            None => repository().join(".cache"),
        };
        fs::create_dir_all(&root).with_context(|| {
            format!(
                "cannot make the cache folder {}: set {CACHE_VARIABLE} to a writable one",
                root.display()
            )
        })?;
        Ok(Self { root })
    }

    /// The path of `name` in the cache, whether it is there or not.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Waits until no other process changes the cache, and keeps them out.
    pub fn lock(&self) -> Result<CacheLock> {
        let path = self.path(".lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open the lock file {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!(
                "setup: another process is using {}; waiting for it",
                self.root.display()
            );
            flock(&file, FlockOperation::LockExclusive).context("waiting for the cache lock")?;
        }
        Ok(CacheLock { _file: file })
    }

    /// Builds folder `name` through `build` in a temporary folder beside it and renames it into place.
    /// What an interrupted run left behind is cleared first. The caller holds the lock.
    pub fn build_folder(
        &self,
        _lock: &CacheLock,
        name: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let target = self.path(name);
        let temporary = self.path(&format!(".{name}.new"));
        remove_all(&temporary)?;
        fs::create_dir_all(&temporary)?;
        build(&temporary)?;
        remove_all(&target)?;
        fs::rename(&temporary, &target)
            .with_context(|| format!("cannot put {} into place", target.display()))?;
        Ok(target)
    }

    /// Writes file `name` through a temporary file and a rename. The caller holds the lock.
    pub fn write_file(&self, _lock: &CacheLock, name: &str, contents: &[u8]) -> Result<PathBuf> {
        let target = self.path(name);
        let temporary = self.path(&format!(".{name}.new"));
        fs::write(&temporary, contents).with_context(|| format!("cannot write {}", temporary.display()))?;
        fs::rename(&temporary, &target)
            .with_context(|| format!("cannot put {} into place", target.display()))?;
        Ok(target)
    }
}

/// Removes a folder or nothing.
fn remove_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
