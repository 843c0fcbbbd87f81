//! virsh-frozen: what it freezes around, what it runs as it is, what it does not run. virsh is played here.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{configs, recorder, said};

/// A virsh with one domain, number 7, that writes down what it is asked and gives its standard input back.
fn virsh(folder: &std::path::Path, device: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join("virsh");
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in\n*'domname web'|*'domname 7') echo web; echo; exit ;;\n*'domname '*) exit 1 ;;\n\
         *'dumpxml web') echo '<qemu:arg value=\"{device}\"/>'; exit ;;\n\
         '-c '*' uri') echo \"$2\"; echo; exit ;;\nuri) echo \"${{LIBVIRT_DEFAULT_URI-qemu:///system}}\"; echo; exit ;;\nesac\necho \"virsh $*\" >> '{}/asked'\ncat\n",
        folder.display()
    );
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn virsh_frozen_freezes_around_what_copies_memory() -> Result<()> {
    let freezes = |device: &str, words: &str| -> Result<bool> {
        let folder = tempfile::tempdir()?;
        let mut child = Command::new(configs().join("virsh-frozen"))
            .env("VMGMTCTL", recorder(folder.path(), "")?)
            .env("VMGMT_LOCKS", folder.path())
            .env("VIRSH", virsh(folder.path(), device)?)
            .args(words.split(' '))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        std::io::Write::write_all(&mut child.stdin.take().context("stdin")?, b"typed")?;
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success() && output.stdout == b"typed",
            "{words}: {output:?}"
        );
        let asked = fs::read_to_string(folder.path().join("asked"))?;
        let run = format!("virsh {words}\n");
        let around = format!("freeze web --timeout 3600\n{run}thaw web\n");
        ensure!(asked == run || asked == around, "{words}: {asked}");
        Ok(asked == around)
    };
    for words in [
        "save web /f",
        "-c qemu:///system managedsave web",
        "--connect=qemu:///system migrate --live web qemu+ssh://other/system",
        "migrate --live --domain web qemu+ssh://other/system",
        "snapshot-create-as --domain=web s1",
        "snapshot-create 7",
        "--log /dev/null dump web /f",
        // The value of an option is no domain.
        "migrate --live --timeout 60 web qemu+ssh://other/system",
        "snapshot-create-as --name s1 --domain web",
        "snapshot-create-as s1 --new-switch --domain=web",
        "dump --memory-only --format kdump-zlib web /f",
        "save --xml new.xml web /f",
        "-qcqemu:///system save web /f",
        "--conn qemu:///system -- save -- web /f",
    ] {
        ensure!(
            freezes("{&quot;driver&quot;:&quot;vfio-user-pci&quot;}", words)?,
            "{words}"
        );
        ensure!(
            !freezes("virtio-net-pci", words)?,
            "{words}: it has no device of ours"
        );
    }
    for words in [
        "list --all",
        "start web",
        "snapshot-revert web s1",
        "managedsave-remove web",
        "save --help",
        "version",
    ] {
        ensure!(!freezes("vfio-user-pci", words)?, "{words}");
    }
    Ok(())
}

/// What would be copied without a freeze, or with another VM frozen, is not run.
#[test]
fn virsh_frozen_runs_nothing_whose_vm_it_cannot_tell() -> Result<()> {
    for (words, why) in [
        (&["save", "gone", "/f"][..], "no domain gone"),
        (
            &["save", "--new-option", "7", "web", "/f"],
            "--new-option takes a value",
        ),
        (
            &["save", "--domain", "web", "--domain", "7", "/f"],
            "more than once",
        ),
        (&["managedsave", "--verbose"], "no domain"),
        (&["save web /f"], "in one word"),
        (&["-q", "list; save 'web' /f"], "in one word"),
        (&["--new-option", "7", "save", "web", "/f"], "--new-option"),
    ] {
        let folder = tempfile::tempdir()?;
        let output = Command::new(configs().join("virsh-frozen"))
            .env("VMGMTCTL", recorder(folder.path(), "")?)
            .env("VMGMT_LOCKS", folder.path())
            .env("VIRSH", virsh(folder.path(), "vfio-user-pci")?)
            .args(words)
            .stdin(Stdio::null())
            .output()?;
        let asked = fs::read_to_string(folder.path().join("asked")).unwrap_or_default();
        let text = said(&output);
        ensure!(
            output.status.code() == Some(75) && asked.is_empty() && text.contains(why),
            "{words:?}: {asked}{text}"
        );
    }
    Ok(())
}

/// A VM of that name on this host would be frozen while the other host copies its own under DMA.
#[test]
fn what_another_hosts_libvirt_copies_is_not_run() -> Result<()> {
    let run = |script: &str, before: &[&str], words: &str, default: &str| -> Result<(Output, String)> {
        let folder = tempfile::tempdir()?;
        let output = Command::new(configs().join(script))
            .env("VMGMTCTL", recorder(folder.path(), "")?)
            .env("VMGMT_LOCKS", folder.path())
            .env("VIRSH", virsh(folder.path(), "vfio-user-pci")?)
            .env("VMGMT_FROZEN", "db")
            .env("LIBVIRT_DEFAULT_URI", default)
            .args(before)
            .args(words.split(' '))
            .stdin(Stdio::null())
            .output()?;
        let asked = fs::read_to_string(folder.path().join("asked")).unwrap_or_default();
        Ok((output, asked))
    };
    let inner = configs().join("virsh-frozen").display().to_string();
    let scripts = [
        ("virsh-frozen", vec![]),
        ("frozen.sh", vec!["web", "--", inner.as_str()]),
    ];
    let refused = "on the host where it runs";
    for (words, default, why) in [
        ("-c qemu+ssh://B/system save web /f", "qemu:///system", refused),
        (
            "--connect=qemu+ext:///system?command=/b managedsave web",
            "qemu:///system",
            refused,
        ),
        (
            "-c qemu://localhost/system dump web /f",
            "qemu:///system",
            refused,
        ),
        ("migrate web qemu:///system", "qemu+ssh://root@B/system", refused),
        ("save web /f", "", "does not tell to which libvirt"),
    ] {
        for (script, before) in &scripts {
            let (output, asked) = run(script, before, words, default)?;
            let text = said(&output);
            ensure!(
                output.status.code() == Some(75) && asked.is_empty() && text.contains(why),
                "{script} {words}: {asked}{text}"
            );
        }
    }
    for (words, default) in [
        (
            "-c qemu+unix:///system?socket=a://b save web /f",
            "qemu+ssh://B/system",
        ),
        ("migrate web qemu+ssh://B/system", "qemu:///session"),
        ("save web /f", "test:///default"),
    ] {
        for (script, before) in &scripts {
            let (output, asked) = run(script, before, words, default)?;
            ensure!(
                output.status.success()
                    && asked == format!("freeze web --timeout 3600\nvirsh {words}\nthaw web\n"),
                "{script} {words}: {asked}{}",
                said(&output)
            );
        }
    }
    // No DMA of ours is in its copy.
    let words = "-c qemu+ssh://B/system list";
    let (output, asked) = run("virsh-frozen", &[], words, "qemu:///system")?;
    ensure!(
        output.status.success() && asked == format!("virsh {words}\n"),
        "{asked}"
    );
    Ok(())
}

/// Somebody's script around virsh is frozen for this host's VM, and virsh-frozen in it must not take that for the other host's.
#[test]
fn a_freeze_of_this_host_is_none_of_another_ones() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let script = format!(
        "{} -c qemu+ssh://B/system save web /f",
        configs().join("virsh-frozen").display()
    );
    let output = Command::new(configs().join("frozen.sh"))
        .env("VMGMTCTL", recorder(folder.path(), "")?)
        .env("VMGMT_LOCKS", folder.path())
        .env("VIRSH", virsh(folder.path(), "vfio-user-pci")?)
        .args(["web", "--", "sh", "-c", &script])
        .stdin(Stdio::null())
        .output()?;
    let asked = fs::read_to_string(folder.path().join("asked"))?;
    ensure!(
        output.status.code() == Some(75) && asked == "freeze web --timeout 3600\nthaw web\n",
        "{asked}{}",
        said(&output)
    );
    Ok(())
}

/// virsh-frozen in the PATH as virsh, and frozen.sh by hand around it.
#[test]
fn virsh_frozen_freezes_nothing_that_is_frozen_around_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = Command::new(configs().join("frozen.sh"))
        .env("VMGMTCTL", recorder(folder.path(), "")?)
        .env("VMGMT_LOCKS", folder.path())
        .env("VIRSH", virsh(folder.path(), "vfio-user-pci")?)
        .args(["web", "--"])
        .arg(configs().join("virsh-frozen"))
        .args(["save", "web", "/f"])
        .stdin(Stdio::null())
        .output()?;
    let asked = fs::read_to_string(folder.path().join("asked"))?;
    ensure!(
        output.status.success() && asked == "freeze web --timeout 3600\nvirsh save web /f\nthaw web\n",
        "{asked}{}",
        said(&output)
    );
    Ok(())
}
