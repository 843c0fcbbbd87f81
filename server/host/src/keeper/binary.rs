//! A program that the keeper runs in a role: its file is held open and started by that descriptor, so that replacing or deleting what is
//! at its path harms nobody who runs it, and the old one can always be started again.
//!
//! In: a path. Out: the program, or what is wrong with the path. Never runs it.

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Access, FileType, Mode, OFlags, access, fstat, open};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

/// See the head of this file. A clone is the same open file.
#[derive(Debug, Clone)]
pub(super) struct Binary {
    pub(super) path: PathBuf,
    pub(super) file: Rc<OwnedFd>,
    /// A script is read by its interpreter from its path.
    pub(super) script: bool,
}

impl Binary {
    /// The program that this process runs.
    pub(super) fn own() -> anyhow::Result<Self> {
        let path = std::env::current_exe()?;
        let file = open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            path,
            file: Rc::new(file),
            script: false,
        })
    }

    /// A program of which only the open file is known.
    pub(super) fn held(file: OwnedFd) -> Self {
        Self {
            path: "the program before".into(),
            file: Rc::new(file),
            script: false,
        }
    }

    /// The program at `path` now.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        if !path.is_absolute() {
            return Err(format!("{shown} is no absolute path: give one, from /"));
        }
        let cannot = |errno| format!("{shown} cannot be run: {errno}; give the path of a vmgmtd program");
        let file = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(cannot)?;
        let stat = fstat(&file).map_err(cannot)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(format!("{shown} is no file: give the path of a vmgmtd program"));
        }
        access(format!("/proc/self/fd/{}", file.as_raw_fd()), Access::EXEC_OK)
            .map_err(|errno| format!("{shown} cannot be run: {errno}; chmod +x it, or name another"))?;
        // What cannot be read is no script: its interpreter could not read it either.
        let script = std::fs::File::open(path).is_ok_and(|mut file| {
            let mut begin = [0; 2];
            std::io::Read::read_exact(&mut file, &mut begin).is_ok() && &begin == b"#!"
        });
        Ok(Self {
            path: path.to_owned(),
            file: Rc::new(file),
            script,
        })
    }

    /// Where it was found.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// To run it. (The descriptor closes when it runs: the kernel has opened the file by then.)
    pub(super) fn command(&self) -> Command {
        if self.script {
            Command::new(&self.path)
        } else {
            Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_cannot_be_run_is_refused_and_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "text").unwrap();
        for (path, why) in [
            (Path::new("vmgmtd"), "no absolute path"),
            (directory.path(), "is no file"),
            (&plain, "chmod +x"),
            (&directory.path().join("none"), "No such file"),
        ] {
            let error = Binary::open(path).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn it_runs_although_its_file_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("echo");
        std::fs::copy("/bin/echo", &path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let binary = Binary::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let output = binary.clone().command().arg("here").output().unwrap();
        assert_eq!(output.stdout, b"here\n");
        assert_eq!(binary.path(), path);
        assert!(Binary::own().is_ok());
    }
}
