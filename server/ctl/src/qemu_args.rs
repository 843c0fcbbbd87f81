//! The arguments that give a QEMU the device, and why others do not.

use crate::cli::{Session, parse, usage};
use crate::client::ClientError;
use crate::protocol::{Call, ErrorCode, Failure, Vms};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Options of `qemu-args`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A VM with a socket of its own; the daemon is asked for it.
    #[arg(conflicts_with = "socket")]
    vm: Option<String>,
    /// The socket, without asking a daemon.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Memory of the VM, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// The guest program uses vfio: adds an IOMMU.
    #[arg(long)]
    iommu: bool,
    /// Says why these, and why the shorter forms fail.
    #[arg(long)]
    explain: bool,
}

const EXPLANATION: &str = "\
-device in its JSON form
    The property `socket` is a structure. QEMU takes those only as JSON: `-device vfio-user-pci,socket=/run/mgmt.sock` and
    `socket.path=…` are refused. In QMP, device_add takes it as an object. Needs QEMU 10.1 or later. \"abstract\":true is ignored silently.
memory-backend=… with share=on
    vmgmtd reaches the VM's memory through a file descriptor, with one copy. Plain -m sends none: all goes by messages then, correct but
    slow. share=off is a trap: a descriptor is sent, but it is other memory than the guest's (vmgmtd notices and uses messages).
no hot-plug of memory, no migration with the device in use
    QEMU does not know which pages the device writes: keep the guest's vmgmt program stopped during savevm and migrate.
--iommu
    A guest program that uses vfio-pci needs a virtual IOMMU, and intel-iommu needs caching-mode=on (without it QEMU ends when the guest
    boots). With uio_pci_generic or the I/O ports none is needed.
";

/// The arguments for one VM.
fn arguments(socket: &str, options: &Options) -> Vec<String> {
    let device = json!({"driver": "vfio-user-pci", "id": "mgmt", "socket": {"type": "unix", "path": socket}});
    let memory = options.memory;
    let mut arguments = vec![
        "-machine".to_owned(),
        "q35,memory-backend=ram".to_owned(),
        "-m".to_owned(),
        format!("{memory}M"),
        "-object".to_owned(),
        format!("memory-backend-memfd,id=ram,size={memory}M,share=on"),
    ];
    if options.iommu {
        arguments.extend(["-device".to_owned(), "intel-iommu,caching-mode=on".to_owned()]);
    }
    arguments.extend(["-device".to_owned(), device.to_string()]);
    arguments
}

pub(crate) fn run(session: &Session, options: &Options) -> Result<(), ClientError> {
    let socket = match (&options.socket, &options.vm) {
        (Some(path), _) => std::path::absolute(path)
            .unwrap_or_else(|_| path.clone())
            .display()
            .to_string(),
        (None, Some(vm)) => socket_of(session, vm)?,
        (None, None) => "/run/mgmt.sock".to_owned(),
    };
    if options.memory == 0 {
        return Err(usage(
            "--memory 0: a VM needs memory",
            "give MiB, for example --memory 2048",
        ));
    }
    let arguments = arguments(&socket, options);
    if session.json {
        session.print(&json!({"arguments": arguments, "socket": socket}).to_string());
        return Ok(());
    }
    let pairs: Vec<String> = arguments
        .chunks(2)
        .map(|pair| pair.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "))
        .collect();
    session.print(&pairs.join(" \\\n"));
    if options.explain {
        session.print(&format!("\n{EXPLANATION}"));
    }
    Ok(())
}

fn socket_of(session: &Session, name: &str) -> Result<String, ClientError> {
    let vms: Vms = parse(session.call(&Call::Vms, Some(Duration::from_secs(10)))?)?;
    let Some(vm) = vms.vms.into_iter().find(|vm| vm.name == name) else {
        let message = format!("no VM {name:?}");
        return Err(ClientError::Failed(Failure::new(
            ErrorCode::NoSuchName,
            message,
            "vmgmtctl vms lists them",
        )));
    };
    vm.socket.ok_or_else(|| {
        usage(
            format!("{name} came in by a shared socket"),
            "name that socket: vmgmtctl qemu-args --socket PATH",
        )
    })
}

/// For a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./".contains(c);
    if word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_those_that_work() {
        let options = Options {
            vm: None,
            socket: None,
            memory: 64,
            iommu: false,
            explain: false,
        };
        let given = arguments("/run/it's.sock", &options);
        assert_eq!(
            given[1..6],
            [
                "q35,memory-backend=ram",
                "-m",
                "64M",
                "-object",
                "memory-backend-memfd,id=ram,size=64M,share=on"
            ]
        );
        let device: serde_json::Value = serde_json::from_str(given.last().unwrap()).unwrap();
        assert_eq!(
            device["socket"],
            json!({"type": "unix", "path": "/run/it's.sock"})
        );
        assert_eq!(quoted("it's"), r"'it'\''s'");
        let iommu = arguments(
            "/x",
            &Options {
                iommu: true,
                ..options
            },
        );
        assert!(iommu.iter().any(|word| word.contains("caching-mode=on")));
    }
}
