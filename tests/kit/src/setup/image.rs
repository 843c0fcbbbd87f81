//! Setup, the joiner: guest images, made of a Debian kernel, busybox, kernel modules, our init script and the guest tool.
//!
//! In: extracted package trees and the freshly built `vmgmt`. Out: a kernel and an initramfs per image.
//! The kernel takes several archives one after another, so what changes often (the tool) is a small archive of its own
//! behind a base that is built once.

use super::{
    cache::Cache, cache::CacheLock, cache::repository, cpio::Writer, packages, packages::Tree, step,
};
use anyhow::{Context, Result, ensure};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::UNIX_EPOCH,
};

/// Which guest image a VM boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Image {
    /// Kernel, busybox, the driver modules, `vmgmt`.
    Small,
    /// The same with dash as its shell, GNU tar, git and dropbear. Wants 768 MiB of memory.
    Large,
    /// The small one, with systemd as process 1 (kernel word `vmgmt.systemd=1`). Wants 768 MiB of memory.
    Systemd,
}

/// A kernel and its initramfs, ready for `-kernel` and `-initrd`.
#[derive(Clone, Debug)]
pub struct Images {
    /// The kernel (bzImage).
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

const GUEST_TREE: Tree = Tree {
    name: "guest-trixie-1",
    suite: "trixie",
    preferred: &[],
    packages: "busybox-static,linux-image-cloud-amd64",
};

const LARGE_TREE: Tree = Tree {
    name: "guest-large-trixie-2",
    suite: "trixie",
    preferred: &[],
    packages: "git,tar,dropbear-bin,dash",
};

const SYSTEMD_TREE: Tree = Tree {
    name: "guest-systemd-trixie-1",
    suite: "trixie",
    preferred: &[],
    packages: "systemd,libgcc-s1",
};

/// The unit of the image with systemd that serves the harness's shells.
const AGENTS_UNIT: &[u8] =
    b"[Unit]\nDescription=Shells for the test harness\n\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
ExecStart=/init agents\n";

/// Modules that init loads, by file name without `.ko.xz`.
const MODULES: [&str; 8] = [
    "uio",
    "uio_pci_generic",
    "irqbypass",
    "vfio",
    "vfio_iommu_type1",
    "vfio-pci-core",
    "vfio-pci",
    "virtio-iommu",
];

/// Folders of the large tree that the guest has no use for.
const LARGE_LEFT_OUT: [&str; 13] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/perl",
    "usr/share/perl5",
    "usr/share/bash-completion",
    "usr/share/lintian",
    "usr/share/zoneinfo",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "var",
];

/// The guest's target triple: with it named, flags for the guest tool do not reach build scripts.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Names a ready-made static `vmgmt` to put into the images instead of building one.
pub const GUEST_TOOL_VARIABLE: &str = "VMGMT_GUEST_TOOL";

/// The image, brought up to date with the repository's guest tool and init script.
pub fn ensure_image(cache: &Cache, lock: &CacheLock, image: Image) -> Result<Images> {
    let tree = GUEST_TREE.ensure(cache, lock)?;
    let kernel = find_entry(&tree.join("boot"), "vmlinuz-")?;
    let tool = guest_tool(cache)?;
    let init = repository().join("qemu-configs/guest/init");
    let name = match image {
        Image::Small => "initramfs-small",
        Image::Large => "initramfs-large",
        Image::Systemd => "initramfs-systemd",
    };
    let mut parts = vec![base_archive(cache, lock, &tree)?];
    match image {
        Image::Small => {}
        Image::Large => parts.push(large_archive(cache, lock)?),
        Image::Systemd => parts.push(systemd_archive(cache, lock)?),
    }
    let inputs: Vec<String> = parts
        .iter()
        .chain([&tool, &init])
        .map(|path| stamp(path))
        .collect::<Result<_>>()?;
    let stamp_name = format!("{name}.stamp");
    let wanted = inputs.join("\n");
    let target = cache.path(name);
    if target.exists() && fs::read_to_string(cache.path(&stamp_name)).is_ok_and(|text| text == wanted) {
        return Ok(Images {
            kernel,
            initramfs: target,
        });
    }
    step(&format!("assemble {name}"), || {
        let temporary = cache.path(&format!(".{name}.new"));
        let mut sink = BufWriter::new(File::create(&temporary)?);
        for part in &parts {
            std::io::copy(&mut File::open(part)?, &mut sink)?;
        }
        let mut overlay = Writer::new(sink);
        overlay.file("init", 0o755, &fs::read(&init)?)?;
        overlay.file("usr/bin/vmgmt", 0o755, &fs::read(&tool)?)?;
        overlay.finish()?;
        // A VM that boots right now reads the old file to its end: the name moves, the file does not change.
        fs::rename(&temporary, &target)?;
        cache.write_file(lock, &stamp_name, wanted.as_bytes())
    })?;
    Ok(Images {
        kernel,
        initramfs: target,
    })
}

/// A file's identity for the up-to-date check: path, length and time of change.
fn stamp(path: &Path) -> Result<String> {
    let metadata = fs::metadata(path).with_context(|| format!("{} is missing", path.display()))?;
    let changed_ns = metadata.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
    Ok(format!("{} {} {changed_ns}", path.display(), metadata.len()))
}

/// The static guest tool: the one `VMGMT_GUEST_TOOL` names, or built from this repository in a target folder of its own.
fn guest_tool(cache: &Cache) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(GUEST_TOOL_VARIABLE) {
        return Ok(path.into());
    }
    let target_folder = cache.path("guest-target");
    let tool = target_folder.join(GUEST_TARGET).join("release/vmgmt");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(repository())
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "vmgmt",
            "--target",
            GUEST_TARGET,
            "--target-dir",
        ])
        .arg(&target_folder)
        // An outer cargo's flags and wrappers are for the host programs.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        // It is built again after each change and looked at by nobody's debugger.
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_INCREMENTAL", "true")
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    step("bring the static guest tool up to date", || {
        packages::run(&mut cargo)
    })?;
    ensure!(
        tool.exists(),
        "cargo built vmgmt, but {} is not there",
        tool.display()
    );
    Ok(tool)
}

/// busybox, its applets, the modules and the folders that init mounts on.
fn base_archive(cache: &Cache, lock: &CacheLock, tree: &Path) -> Result<PathBuf> {
    const NAME: &str = "initramfs-base-3";
    let target = cache.path(NAME);
    if target.exists() {
        return Ok(target);
    }
    step("pack the base of the guest images", || {
        let mut archive = Writer::new(Vec::new());
        for folder in [
            "dev", "proc", "sys", "tmp", "run", "root", "mnt", "etc", "usr", "usr/bin", "usr/sbin",
        ] {
            archive.directory(folder)?;
        }
        let release = find_entry(&tree.join("usr/lib/modules"), "")?;
        let release = release
            .file_name()
            .and_then(|name| name.to_str())
            .context("a kernel release is not UTF-8")?;
        let modules_folder = format!("usr/lib/modules/{release}");
        for folder in [
            "usr/lib",
            "usr/lib64",
            "usr/lib/modules",
            &modules_folder,
            "var",
            "var/log",
            "etc/modprobe.d",
        ] {
            archive.directory(folder)?;
        }
        // The paravirtual IOMMU does not remap interrupts, and the test guest trusts its devices.
        let options = b"options vfio_iommu_type1 allow_unsafe_interrupts=1\n";
        archive.file("etc/modprobe.d/vmgmt.conf", 0o644, options)?;
        for folder in ["bin", "sbin", "lib", "lib64"] {
            archive.link(folder, &format!("usr/{folder}"))?;
        }
        archive.character_device("dev/console", 5, 1)?;
        archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
        archive.file("etc/group", 0o644, b"root:x:0:\n")?;
        archive.file("etc/shells", 0o644, b"/bin/sh\n")?;
        let busybox = tree.join("usr/bin/busybox");
        archive.file("usr/bin/busybox", 0o755, &fs::read(&busybox)?)?;
        let applets = Command::new(&busybox)
            .arg("--list")
            .output()
            .context("cannot run the guest's busybox")?;
        for applet in String::from_utf8(applets.stdout)?
            .lines()
            .filter(|applet| *applet != "busybox")
        {
            archive.link(&format!("usr/bin/{applet}"), "busybox")?;
        }
        let modules = module_files(&tree.join("usr/lib/modules"))?;
        let mut needs = Vec::new();
        for module in MODULES {
            let packed = modules
                .get(module)
                .with_context(|| format!("the guest kernel has no module {module}"))?;
            let unpacked = Command::new("xz")
                .arg("-dc")
                .arg(packed)
                .output()
                .context("cannot run xz")?;
            ensure!(
                unpacked.status.success(),
                "xz could not unpack {}",
                packed.display()
            );
            let contents = unpacked.stdout;
            needs.push(direct_needs(module, &contents));
            archive.file(&format!("{modules_folder}/{module}.ko"), 0o644, &contents)?;
        }
        archive.file(
            &format!("{modules_folder}/modules.dep"),
            0o644,
            needs_file(&needs).as_bytes(),
        )?;
        cache.write_file(lock, NAME, &archive.finish()?)
    })
}

/// The modules that a module names itself (`depends=` in its .modinfo section), as places in [`MODULES`].
fn direct_needs(module: &str, contents: &[u8]) -> Vec<usize> {
    const KEY: &[u8] = b"\0depends=";
    let start = contents
        .windows(KEY.len())
        .position(|window| window == KEY)
        .map(|start| start + KEY.len());
    let rest = start.and_then(|start| contents.get(start..)).unwrap_or_default();
    let value = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value).into_owned();
    // vfio names its IOMMU back end only as something to load afterwards, which busybox does not look at.
    let back_end = if module == "vfio-pci" {
        "vfio_iommu_type1"
    } else {
        ""
    };
    // A module's own name has underscores where its file may have dashes.
    let plain = |name: &str| name.replace('-', "_");
    let names = value.split(',').chain([back_end]);
    names
        .filter_map(|name| MODULES.iter().position(|file| plain(file) == plain(name)))
        .collect()
}

/// modules.dep for busybox's modprobe: each module, then all that it needs, what is needed most last. [`MODULES`] is in loading
/// order, so what a module needs stands before it.
fn needs_file(direct: &[Vec<usize>]) -> String {
    let mut all: Vec<BTreeSet<usize>> = Vec::new();
    let mut text = String::new();
    for (module, needs) in MODULES.iter().zip(direct) {
        let mut closure: BTreeSet<usize> = needs.iter().copied().collect();
        for need in needs {
            closure.extend(all.get(*need).into_iter().flatten());
        }
        text.push_str(&format!("{module}.ko:"));
        for need in closure.iter().rev().filter_map(|index| MODULES.get(*index)) {
            text.push_str(&format!(" {need}.ko"));
        }
        text.push('\n');
        all.push(closure);
    }
    text
}

/// Every module below `folder` by its name without `.ko.xz`.
fn module_files(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for (path, _) in walk(folder)? {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if let Some(module) = name.strip_suffix(".ko.xz") {
            found.insert(module.to_owned(), path);
        }
    }
    Ok(found)
}

/// git, tar, dropbear and the libraries they need.
fn large_archive(cache: &Cache, lock: &CacheLock) -> Result<PathBuf> {
    tree_archive(cache, lock, &LARGE_TREE, "initramfs-large-part-2", |archive| {
        // Busybox's shell prefers its own applets to any program: here GNU tar is to be found.
        archive.link("usr/bin/sh", "dash")
    })
}

/// systemd, and what it is to begin: the shells that serve the harness.
fn systemd_archive(cache: &Cache, lock: &CacheLock) -> Result<PathBuf> {
    tree_archive(
        cache,
        lock,
        &SYSTEMD_TREE,
        "initramfs-systemd-part-1",
        |archive| {
            for folder in [
                "etc/systemd",
                "etc/systemd/system",
                "etc/systemd/system/multi-user.target.wants",
            ] {
                archive.directory(folder)?;
            }
            archive.file("etc/machine-id", 0o444, b"")?;
            archive.link(
                "etc/systemd/system/default.target",
                "/usr/lib/systemd/system/multi-user.target",
            )?;
            archive.file("etc/systemd/system/vmgmt-agents.service", 0o644, AGENTS_UNIT)?;
            archive.link(
                "etc/systemd/system/multi-user.target.wants/vmgmt-agents.service",
                "../vmgmt-agents.service",
            )
        },
    )
}

/// What of a tree lies below `usr`, without what a guest has no use for; `more` adds to it.
fn tree_archive(
    cache: &Cache,
    lock: &CacheLock,
    tree: &Tree,
    name: &str,
    more: impl FnOnce(&mut Writer<BufWriter<File>>) -> std::io::Result<()>,
) -> Result<PathBuf> {
    let target = cache.path(name);
    if target.exists() {
        return Ok(target);
    }
    let tree = tree.ensure(cache, lock)?;
    step(&format!("pack {name}"), || {
        let temporary = cache.path(&format!(".{name}.new"));
        let mut archive = Writer::new(BufWriter::new(File::create(&temporary)?));
        // Hard links (git has a hundred) become symbolic ones: the archive then holds the bytes once.
        let mut first_names: BTreeMap<u64, String> = BTreeMap::new();
        for (path, metadata) in walk(&tree)? {
            let name = path
                .strip_prefix(&tree)?
                .to_str()
                .context("a file name is not UTF-8")?
                .to_owned();
            let left_out = LARGE_LEFT_OUT.iter().any(|folder| {
                name.strip_prefix(folder)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            });
            // Packages bring their own /dev and /etc files; the image has what it needs of these.
            if left_out || !name.starts_with("usr/") {
                continue;
            }
            if metadata.is_dir() {
                archive.directory(&name)?;
            } else if metadata.is_symlink() {
                let link = fs::read_link(&path)?;
                archive.link(&name, link.to_str().context("a link's target is not UTF-8")?)?;
            } else if metadata.is_file() {
                match first_names.get(&metadata.ino()) {
                    Some(first) => archive.link(&name, &format!("/{first}"))?,
                    None => {
                        archive.file(&name, metadata.permissions().mode(), &fs::read(&path)?)?;
                        if metadata.nlink() > 1 {
                            first_names.insert(metadata.ino(), name);
                        }
                    }
                }
            }
        }
        more(&mut archive)?;
        archive.finish()?.flush()?;
        fs::rename(&temporary, &target)?;
        Ok(target.clone())
    })
}

impl Images {
    /// The same image with more files (name, permission bits, contents), as `target`: the kernel takes archives one after another.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn with_files(&self, target: &Path, files: &[(&str, u32, Vec<u8>)]) -> Result<Self> {
        let mut sink = BufWriter::new(File::create(target)?);
        std::io::copy(&mut File::open(&self.initramfs)?, &mut sink)?;
        let mut archive = Writer::new(sink);
        let mut folders = BTreeSet::new();
        for (name, mode, contents) in files {
            let mut parents: Vec<&str> = Path::new(name)
                .ancestors()
                .skip(1)
                .filter_map(Path::to_str)
                .filter(|parent| !parent.is_empty())
                .collect();
            parents.reverse();
            for parent in parents {
                if folders.insert(parent) {
                    archive.directory(parent)?;
                }
            }
            archive.file(name, *mode, contents)?;
        }
        archive.finish()?.flush()?;
        Ok(Self {
            kernel: self.kernel.clone(),
            initramfs: target.to_path_buf(),
        })
    }
}

/// All entries below `folder`, parents first, in a fixed order.
fn walk(folder: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>> {
    let mut all = Vec::new();
    let mut waiting = vec![folder.to_path_buf()];
    while let Some(next) = waiting.pop() {
        let mut entries: Vec<PathBuf> = fs::read_dir(&next)
            .with_context(|| format!("cannot list {}", next.display()))?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()?;
        entries.sort();
        for path in entries {
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                waiting.push(path.clone());
            }
            all.push((path, metadata));
        }
    }
    Ok(all)
}

/// The first entry of `folder` whose name begins with `prefix`.
fn find_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()?;
    entries.sort();
    let fits = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|n| n.starts_with(prefix))
    };
    entries
        .into_iter()
        .find(fits)
        .with_context(|| format!("no {prefix}* in {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_name_all_they_need_in_unloading_order() {
        let place = |name: &str| MODULES.iter().position(|module| *module == name).unwrap();
        let said = |module: &str, depends: &str| {
            direct_needs(module, format!("a=b\0depends={depends}\0x").as_bytes())
        };
        let mut direct = vec![Vec::new(); MODULES.len()];
        direct[place("vfio_iommu_type1")] = said("vfio_iommu_type1", "vfio");
        direct[place("vfio-pci-core")] = said("vfio-pci-core", "vfio,irqbypass");
        direct[place("vfio-pci")] = said("vfio-pci", "vfio-pci-core");
        let text = needs_file(&direct);
        let line = text
            .lines()
            .find(|line| line.starts_with("vfio-pci.ko:"))
            .unwrap();
        assert_eq!(
            line,
            "vfio-pci.ko: vfio-pci-core.ko vfio_iommu_type1.ko vfio.ko irqbypass.ko"
        );
    }
}
