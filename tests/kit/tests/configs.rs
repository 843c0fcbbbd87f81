//! Every file of qemu-configs is parsed, and what is meant for QEMU is shown to the real one.

#[path = "configs/virsh_frozen.rs"]
mod virsh_frozen;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
};
use vmgmt_testkit::{
    setup::{Image, Tools, repository},
    vm::tools_or_skip,
};

/// What QEMU says when it took all arguments and only the device's server is missing.
const ONLY_THE_SERVER_IS_MISSING: &str = "Failed to connect to";

fn configs() -> PathBuf {
    repository().join("qemu-configs")
}

/// Lets QEMU realize the machine without running it, and quit at once.
fn accepted(mut command: Command) -> Result<Output> {
    command.args(["-S", "-qmp", "stdio"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // A QEMU that refuses its arguments reads nothing.
    let _ = child
        .stdin
        .take()
        .context("no input")?
        .write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}");
    Ok(child.wait_with_output()?)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.clone(), output.stderr.clone()].concat()).into_owned()
}

fn script(name: &str, tools: &Tools) -> Command {
    let mut command = Command::new(configs().join(name));
    command.env("QEMU", &tools.qemu.program);
    command
}

#[test]
fn scripts_are_valid_bash() -> Result<()> {
    let mut scripts: Vec<PathBuf> = vec![
        configs().join("guest/init"),
        configs().join("hooks/qemu"),
        configs().join("virsh-frozen"),
        repository().join(".ci/run"),
    ];
    for entry in fs::read_dir(configs())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "sh") {
            scripts.push(path);
        }
    }
    ensure!(scripts.len() >= 4, "scripts are missing: {scripts:?}");
    for path in scripts {
        let output = Command::new("bash").arg("-n").arg(&path).output()?;
        ensure!(output.status.success(), "{}: {}", path.display(), said(&output));
    }
    Ok(())
}

/// A vmgmtctl that writes down what it is asked, and fails where its first word is in `fails`.
fn recorder(folder: &std::path::Path, fails: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("vmgmtctl");
    let text = format!(
        "#!/bin/sh\necho \"$@\" >> '{}/asked'\ncase ' {fails} ' in *\" $1 \"*) exit 1 ;; esac\n",
        folder.display()
    );
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// frozen.sh with that vmgmtctl and this command: (exit code, what vmgmtctl was asked).
fn frozen(fails: &str, command: &[&str]) -> Result<(i32, String)> {
    let folder = tempfile::tempdir()?;
    let output = Command::new(configs().join("frozen.sh"))
        .env("VMGMTCTL", recorder(folder.path(), fails)?)
        .env("VMGMT_LOCKS", folder.path())
        .args(["--timeout", "60", "web", "--"])
        .args(command)
        .current_dir(folder.path())
        .output()?;
    let asked = fs::read_to_string(folder.path().join("asked"))?;
    Ok((output.status.code().unwrap_or(-1), asked))
}

#[test]
fn frozen_thaws_however_the_command_ends() -> Result<()> {
    const BOTH: &str = "freeze web --timeout 60\nthaw web\n";
    ensure!(frozen("", &["true"])? == (0, BOTH.to_owned()));
    ensure!(frozen("", &["sh", "-c", "exit 9"])? == (9, BOTH.to_owned()));
    ensure!(frozen("", &["/not/there"])? == (127, BOTH.to_owned()));
    // It is not frozen: nothing is run.
    let (code, asked) = frozen("freeze", &["sh", "-c", "echo run >> asked"])?;
    ensure!(code == 75 && !asked.contains("run"), "{code}: {asked}");
    // It was thawed by itself: what was made is not to be used.
    ensure!(frozen("thaw", &["true"])?.0 == 75);
    // A signal: first the command's end, then the thaw.
    let (code, asked) = frozen(
        "",
        &[
            "sh",
            "-c",
            "trap 'echo ended >> asked; exit' TERM; kill -TERM $PPID; while :; do sleep 0.1; done",
        ],
    )?;
    ensure!(
        code == 143 && asked == "freeze web --timeout 60\nended\nthaw web\n",
        "{code}: {asked}"
    );
    Ok(())
}

/// The freeze is asked for and not answered when the signal comes: it may be there all the same.
#[test]
fn frozen_thaws_what_it_only_asked_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let control = recorder(folder.path(), "thaw")?;
    let slow = "case \"$1\" in freeze) kill -TERM $PPID; while :; do sleep 0.1; done ;; esac\n";
    let text = fs::read_to_string(&control)?.replace("case", &format!("{slow}case"));
    fs::write(&control, text)?;
    let output = Command::new(configs().join("frozen.sh"))
        .env("VMGMTCTL", control)
        .env("VMGMT_LOCKS", folder.path())
        .args(["web", "--", "sh", "-c", "echo run >> asked"])
        .current_dir(folder.path())
        .output()?;
    let asked = fs::read_to_string(folder.path().join("asked"))?;
    ensure!(
        asked == "freeze web --timeout 3600\nthaw web\n" && output.status.code() == Some(143),
        "{output:?}: {asked}"
    );
    Ok(())
}

/// A save ends the domain, and libvirt tells the hook so before frozen.sh asks whether it was frozen to the end.
#[test]
fn the_hook_leaves_a_freeze_to_who_asked_for_it() -> Result<()> {
    let hook = configs().join("hooks/qemu").display().to_string();
    let save = format!("for at in stopped/end release/end; do {hook} web ${{at%/*}} ${{at#*/}} -; done");
    let (code, asked) = frozen("", &["sh", "-c", &save])?;
    ensure!(
        code == 0 && asked == "freeze web --timeout 60\nthaw web\n",
        "{code}: {asked}"
    );
    Ok(())
}

#[test]
fn libvirts_hook_thaws_and_says_nothing() -> Result<()> {
    for (operation, expected) in [
        (["prepare", "begin"], true),
        (["migrate", "begin"], true),
        (["restore", "begin"], true),
        (["release", "end"], false),
        (["started", "begin"], false),
        (["stopped", "end"], false),
    ] {
        // A failing vmgmtctl (not frozen, no daemon) must not keep a domain from starting.
        let folder = tempfile::tempdir()?;
        let output = Command::new(configs().join("hooks/qemu"))
            .env("VMGMTCTL", recorder(folder.path(), "thaw")?)
            .arg("web")
            .args(operation)
            .arg("-")
            .stdin(Stdio::null())
            .output()?;
        ensure!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        let asked = fs::read_to_string(folder.path().join("asked")).unwrap_or_default();
        ensure!((asked == "thaw web\n") == expected, "{operation:?}: {asked}");
    }
    Ok(())
}

#[test]
fn the_index_names_every_file() -> Result<()> {
    let index = fs::read_to_string(configs().join("README.md"))?;
    let mut folders = vec![configs()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(configs())?.display().to_string();
            ensure!(
                name == "README.md" || index.contains(&format!("`{name}`")),
                "README.md does not name {name}"
            );
        }
    }
    Ok(())
}

#[test]
fn qemu_takes_what_one_vm_says() -> Result<()> {
    let Some(tools) = tools_or_skip(Image::Small)? else {
        return Ok(());
    };
    let kernel = tools.images.kernel.to_str().context("path")?;
    let initramfs = tools.images.initramfs.to_str().context("path")?;
    let boot = ["--kernel", kernel, "--initrd", initramfs, "--serial", "null"];
    let kinds: [&[&str]; 5] = [
        &[],
        &["--driver", "vfio"],
        &["--driver", "vfio", "--iommu", "virtio"],
        &["--plain-memory", "--memory", "300"],
        &["--append", "quiet panic=1"],
    ];
    for kind in kinds {
        let mut plain = script("one-vm.sh", &tools);
        plain.args(boot).args(kind).arg("--");
        let output = accepted(plain)?;
        let text = said(&output);
        ensure!(
            output.status.success() && text.contains("SHUTDOWN"),
            "{kind:?}: {text}"
        );
    }
    // With devices: the printed line is what a person may paste into a shell, so a shell runs it.
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vm 1.sock").display().to_string();
    let printed = script("one-vm.sh", &tools)
        .args(boot)
        .args([
            "--dry-run",
            "--name",
            "vm7",
            "--socket",
            &socket,
            "--socket",
            &socket,
        ])
        .output()?;
    ensure!(printed.status.success(), "{}", said(&printed));
    let line = String::from_utf8(printed.stdout)?;
    ensure!(
        line.contains("vm7") && line.matches("vfio-user-pci").count() == 2,
        "{line}"
    );
    let mut pasted = Command::new("bash");
    pasted.args(["-c", &format!("exec {} \"$@\"", line.trim_end()), "bash"]);
    let text = said(&accepted(pasted)?);
    ensure!(
        text.contains(ONLY_THE_SERVER_IS_MISSING) && text.contains(&socket),
        "{text}"
    );

    // Without --dry-run a missing socket is named before QEMU starts; a wrong word as well.
    let refused = script("one-vm.sh", &tools).args(["--socket", &socket]).output()?;
    ensure!(
        refused.status.code() == Some(2) && said(&refused).contains("is vmgmtd running"),
        "{}",
        said(&refused)
    );
    let refused = script("one-vm.sh", &tools).args(["--iommu", "amd"]).output()?;
    ensure!(
        refused.status.code() == Some(2) && said(&refused).contains("none, intel or virtio"),
        "{}",
        said(&refused)
    );
    Ok(())
}

#[test]
fn many_vms_get_their_own_or_one_socket() -> Result<()> {
    let Some(tools) = tools_or_skip(Image::Small)? else {
        return Ok(());
    };
    let lines = |words: &[&str]| -> Result<Vec<String>> {
        let output = script("many-vms.sh", &tools).args(words).output()?;
        ensure!(output.status.success(), "{}", said(&output));
        Ok(String::from_utf8(output.stdout)?
            .lines()
            .map(str::to_owned)
            .collect())
    };
    let own = lines(&[
        "3",
        "--own",
        "/run/x/vm%d.sock",
        "--dry-run",
        "--",
        "--driver",
        "vfio",
    ])?;
    ensure!(own.len() == 3);
    for (index, line) in own.iter().enumerate() {
        let socket = format!("/run/x/vm{}.sock", index + 1);
        ensure!(line.contains(&socket) && line.contains("intel-iommu"), "{line}");
    }
    let shared = lines(&["2", "--shared", "/run/x/all.sock", "--dry-run"])?;
    ensure!(
        shared.len() == 2 && shared.iter().all(|line| line.contains("/run/x/all.sock")),
        "{shared:?}"
    );
    let refused = script("many-vms.sh", &tools)
        .args(["2", "--own", "/run/x/vm.sock"])
        .output()?;
    ensure!(
        refused.status.code() == Some(2) && said(&refused).contains("%d"),
        "{}",
        said(&refused)
    );
    Ok(())
}

#[test]
fn qemu_reads_the_readconfig_files() -> Result<()> {
    let Some(tools) = tools_or_skip(Image::Small)? else {
        return Ok(());
    };
    for files in [
        &["machine.conf"][..],
        &["machine.conf", "iommu-intel.conf"],
        &["machine.conf", "iommu-virtio.conf"],
    ] {
        let mut command = Command::new(&tools.qemu.program);
        command.args(["-nodefaults", "-display", "none"]);
        for file in files {
            command.arg("-readconfig").arg(configs().join(file));
        }
        let output = accepted(command)?;
        ensure!(
            output.status.success() && said(&output).contains("SHUTDOWN"),
            "{files:?}: {}",
            said(&output)
        );
    }
    // Why the device itself is not in such a file: the day this fails, it can be.
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("device.conf");
    fs::write(
        &file,
        "[device]\n driver = \"vfio-user-pci\"\n socket.type = \"unix\"\n socket.path = \"/nonexistent\"\n",
    )?;
    let mut command = Command::new(&tools.qemu.program);
    command
        .args(["-M", "q35", "-nodefaults", "-display", "none", "-readconfig"])
        .arg(&file);
    let text = said(&accepted(command)?);
    ensure!(
        text.contains("not found"),
        "README.md says that no -readconfig file takes a socket, but: {text}"
    );
    Ok(())
}

#[test]
fn the_libvirt_domain_is_well_formed_and_qemu_takes_its_device() -> Result<()> {
    let text = fs::read_to_string(configs().join("libvirt/domain.xml"))?;
    let document = roxmltree::Document::parse(&text)?;
    let namespace = "http://libvirt.org/schemas/domain/qemu/1.0";
    let arguments: Vec<&str> = document
        .descendants()
        .filter(|node| node.has_tag_name((namespace, "arg")))
        .filter_map(|node| node.attribute("value"))
        .collect();
    let ["-device", device] = arguments.as_slice() else {
        anyhow::bail!("not one -device: {arguments:?}")
    };
    let device: Value = serde_json::from_str(device)?;
    ensure!(
        device["driver"] == "vfio-user-pci" && device["socket"]["type"] == "unix",
        "{device}"
    );
    let memory = document
        .descendants()
        .find(|node| node.has_tag_name("memoryBacking"))
        .context("no memoryBacking")?;
    let shared = memory
        .children()
        .any(|node| node.has_tag_name("access") && node.attribute("mode") == Some("shared"));
    ensure!(shared, "the domain's memory is not shared");

    let Some(tools) = tools_or_skip(Image::Small)? else {
        return Ok(());
    };
    let mut device = device;
    device["socket"]["path"] = "/nonexistent/vm1.sock".into();
    let mut command = Command::new(&tools.qemu.program);
    command.args([
        "-M",
        "q35",
        "-nodefaults",
        "-display",
        "none",
        "-device",
        &device.to_string(),
    ]);
    let text = said(&accepted(command)?);
    ensure!(text.contains(ONLY_THE_SERVER_IS_MISSING), "{text}");
    Ok(())
}

#[test]
fn the_systemd_unit_says_what_survival_needs() -> Result<()> {
    let text = fs::read_to_string(configs().join("systemd/vmgmtd.service"))?;
    let mut settings: BTreeMap<(String, String), String> = BTreeMap::new();
    let mut section = String::new();
    for line in text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.to_owned();
        } else {
            let (key, value) = line
                .split_once('=')
                .with_context(|| format!("{line} is no setting"))?;
            settings.insert((section.clone(), key.to_owned()), value.to_owned());
        }
    }
    let setting = |section: &str, key: &str| {
        settings
            .get(&(section.to_owned(), key.to_owned()))
            .map(String::as_str)
    };
    for (section, key, value) in [
        ("Service", "Type", "notify"),
        ("Service", "Restart", "always"),
        ("Service", "RestartSec", "0"),
        ("Unit", "StartLimitIntervalSec", "0"),
        ("Service", "OOMScoreAdjust", "-1000"),
        ("Service", "OOMPolicy", "continue"),
    ] {
        ensure!(
            setting(section, key) == Some(value),
            "[{section}] {key} is {:?}",
            setting(section, key)
        );
    }
    ensure!(setting("Unit", "Before").is_some_and(|units| units.contains("libvirtd.service")));

    // systemd's own opinion, where it is there; the programs are not installed on a machine that only tests.
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("vmgmtd.service");
    let text = text.replace("/usr/local/bin/vmgmtd", "/bin/true");
    fs::write(&copy, text.replace("/usr/local/bin/vmgmtctl", "/bin/true"))?;
    match Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&copy)
        .output()
    {
        Ok(output) => {
            let complaints: Vec<String> = said(&output)
                .lines()
                .filter(|line| line.contains("vmgmtd.service"))
                .map(str::to_owned)
                .collect();
            ensure!(complaints.is_empty(), "{complaints:?}");
        }
        Err(_) => vmgmt_testkit::skipped("no systemd-analyze here to verify the unit"),
    }
    Ok(())
}
