//! The configuration's meaning: sections in, what the roles need out, each mistake with its place and a remedy.

use super::fields::{check_group, check_identity, check_mode, check_name, check_socket_path};
use super::file::{DeviceSection, LimitsSection, Section, Sections, ShareSection};
use super::limits::{
    DEVICES_MAX, DRAIN_DEADLINE_MS_DEFAULT, DRAIN_DEADLINE_MS_MAX, MAPS_MAX, OBJECTS_MAX, POLL_US_DEFAULT,
    POLL_US_MAX, SHARES_MAX, WORKERS_DEFAULT, WORKERS_MAX,
};
use super::sandbox;
use super::{
    Access, Config, CoreConfig, DeviceConfig, Flags, Identity, ListenerConfig, Mistake, Mistakes,
    ServerConfig, ShareConfig, ShareGrant, VmConfig, VmLimits,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use vmgmt_abi::chat::HOST_NAME;
use vmgmt_abi::registers::{RINGS_MAX, VECTORS_MAX};
use vmgmt_ctl::protocol::{AddVm, ErrorCode, Failure};

/// Permission bits of a VM's socket, if nothing is said: the owner and the group that is named.
const SOCKET_MODE: u32 = 0o660;
/// Permission bits of the control socket: who may write there rules over all VMs.
const CONTROL_MODE: u32 = 0o600;

/// Checks all sections. Where there are mistakes, what is returned is not to be used.
pub(super) fn check(sections: Sections, flags: &Flags, mistakes: &mut Mistakes) -> Config {
    let server = check_server(&sections, flags, mistakes);
    let device = check_device(&sections.device, mistakes);
    let limits = check_limits(
        &sections.limits,
        &sections.limits.value,
        &VmLimits::default(),
        mistakes,
    );
    let shares = check_shares(&sections.shares, mistakes);
    let mut config = Config {
        core: CoreConfig {
            shares,
            poll_ns: sections
                .server
                .value
                .poll_us
                .unwrap_or(POLL_US_DEFAULT)
                .saturating_mul(1000),
            workers: sections.server.value.workers.unwrap_or(WORKERS_DEFAULT),
            sockets: Vec::new(),
            device: device.clone(),
            vm_limits: limits.clone(),
            sandbox: sandbox::check(&sections.sandbox, flags, mistakes),
        },
        server,
        listeners: Vec::new(),
        warnings: Vec::new(),
    };
    config
        .warnings
        .extend(sandbox::warning(&config.core.sandbox, &sections.sandbox));
    let mut names = BTreeMap::new();
    let mut paths = BTreeMap::from([(config.server.control.clone(), "the control socket".to_owned())]);
    for section in &sections.vms {
        let vm = &section.value;
        check_name(&vm.name, "VM", &section.place("name"), &mut names, mistakes);
        check_socket_path(&vm.socket, &section.place("socket"), &mut paths, mistakes);
        let listener = ListenerConfig {
            listener: 0,
            path: vm.socket.clone(),
            mode: check_mode(vm.mode.as_deref(), SOCKET_MODE, &section.place("mode"), mistakes),
            group: check_group(vm.group.as_deref(), &section.place("group"), mistakes),
            identity: Identity::Vm { vm: 0 },
            device: with_devices_max(&device, vm.devices_max, &section.place("devices-max"), mistakes),
        };
        let vm = VmConfig {
            vm: 0,
            name: vm.name.clone(),
            shares: check_grants(
                &vm.shares,
                &config.core.shares,
                &section.place("shares"),
                mistakes,
            ),
            reach: vm.reach.clone(),
            send_to_all: vm.send_to_all,
            limits: check_limits(section, &vm.limits, &limits, mistakes),
            transient: false,
        };
        config
            .core
            .sockets
            .push((Some(vm.name.clone()), listener.path.clone()));
        config.listeners.push((listener, Some(vm)));
    }
    for section in &sections.sockets {
        let socket = &section.value;
        check_socket_path(&socket.path, &section.place("path"), &mut paths, mistakes);
        check_identity(socket.identity.as_deref(), &section.place("identity"), mistakes);
        let template = VmConfig {
            vm: 0,
            name: String::new(),
            shares: check_grants(
                &socket.shares,
                &config.core.shares,
                &section.place("shares"),
                mistakes,
            ),
            reach: socket.reach.clone(),
            send_to_all: socket.send_to_all,
            limits: check_limits(section, &socket.limits, &limits, mistakes),
            transient: true,
        };
        let listener = ListenerConfig {
            listener: 0,
            path: socket.path.clone(),
            mode: check_mode(
                socket.mode.as_deref(),
                SOCKET_MODE,
                &section.place("mode"),
                mistakes,
            ),
            group: check_group(socket.group.as_deref(), &section.place("group"), mistakes),
            identity: Identity::Anonymous(Box::new(template)),
            device: with_devices_max(
                &device,
                socket.devices_max,
                &section.place("devices-max"),
                mistakes,
            ),
        };
        config.core.sockets.push((None, listener.path.clone()));
        config.listeners.push((listener, None));
    }
    let reached = sections
        .vms
        .iter()
        .map(|section| (section.place("reach"), &section.value.reach));
    let reached = reached.chain(
        sections
            .sockets
            .iter()
            .map(|s| (s.place("reach"), &s.value.reach)),
    );
    for (place, reach) in reached {
        for name in reach
            .iter()
            .filter(|name| !names.contains_key(*name) && *name != HOST_NAME)
        {
            let what = format!("no VM {name:?} in this configuration");
            let remedy = "correct the name, unless it is added at run time".to_owned();
            config.warnings.push(Mistake {
                place: place.clone(),
                what,
                remedy,
            });
        }
    }
    if sections.vms.is_empty() && sections.sockets.is_empty() && mistakes.0.is_empty() {
        mistakes.push(
            "the configuration",
            "there is no socket, so no VM can come in",
            "add [[vm]] with name and socket to the file, or give --socket /run/mgmt.sock",
        );
    }
    config
}

fn check_server(sections: &Sections, flags: &Flags, mistakes: &mut Mistakes) -> ServerConfig {
    let section = &sections.server;
    let server = &section.value;
    let control = flags.control.clone().or_else(|| server.control.clone());
    let control = control.unwrap_or_else(vmgmt_ctl::default_control_path);
    let place = if flags.control.is_some() {
        "--control".into()
    } else {
        section.place("control")
    };
    check_socket_path(&control, &place, &mut BTreeMap::new(), mistakes);
    if let Some(poll_us) = server.poll_us.filter(|poll_us| *poll_us > POLL_US_MAX) {
        let remedy = format!("0 to {POLL_US_MAX}; {POLL_US_DEFAULT} suits most hosts");
        mistakes.push(
            section.place("poll-us"),
            format!("{poll_us} µs is too long"),
            remedy,
        );
    }
    if let Some(workers) = server
        .workers
        .filter(|workers| !(1..=WORKERS_MAX).contains(workers))
    {
        mistakes.push(
            section.place("workers"),
            format!("{workers} workers"),
            format!("1 to {WORKERS_MAX}"),
        );
    }
    if let Some(drain) = (server.drain_deadline_ms).filter(|drain| *drain > DRAIN_DEADLINE_MS_MAX) {
        let remedy =
            format!("0 to {DRAIN_DEADLINE_MS_MAX}; what is not done by then goes on with the next core");
        mistakes.push(
            section.place("drain-deadline-ms"),
            format!("{drain} ms is too long"),
            remedy,
        );
    }
    ServerConfig {
        drain_deadline_ms: server.drain_deadline_ms.unwrap_or(DRAIN_DEADLINE_MS_DEFAULT),
        control,
        control_mode: check_mode(
            server.control_mode.as_deref(),
            CONTROL_MODE,
            &section.place("control-mode"),
            mistakes,
        ),
        control_group: check_group(
            server.control_group.as_deref(),
            &section.place("control-group"),
            mistakes,
        ),
        log: flags.log.clone().or_else(|| server.log.clone()),
    }
}

fn check_device(section: &Section<DeviceSection>, mistakes: &mut Mistakes) -> DeviceConfig {
    let given = &section.value;
    let default = DeviceConfig::default();
    let device = DeviceConfig {
        pci_vendor: given.pci_vendor.unwrap_or(default.pci_vendor),
        pci_device: given.pci_device.unwrap_or(default.pci_device),
        msix: given.msix.unwrap_or(default.msix),
        vectors: given.vectors.unwrap_or(default.vectors),
        rings: given.rings.unwrap_or(default.rings),
        devices_max: given.devices_max.unwrap_or(default.devices_max),
        maps_max: given.maps_max.unwrap_or(default.maps_max),
        mapped_bytes_max: given
            .mapped_bytes_max
            .map_or(default.mapped_bytes_max, |bytes| bytes.0),
        objects_max: given.objects_max.unwrap_or(default.objects_max),
    };
    for (key, id) in [
        ("pci-vendor", device.pci_vendor),
        ("pci-device", device.pci_device),
    ] {
        if id == 0xffff || (key == "pci-vendor" && id == 0) {
            let what = format!("{id:#06x} means that there is no device");
            mistakes.push(section.place(key), what, "leave it out for 1af4:10f0");
        }
    }
    let vectors = usize::from(device.vectors);
    if !vectors.is_power_of_two() || vectors > VECTORS_MAX {
        mistakes.push(
            section.place("vectors"),
            format!("{vectors} vectors"),
            "1, 2, 4, 8 or 16",
        );
    }
    if !(1..=RINGS_MAX).contains(&usize::from(device.rings)) {
        mistakes.push(
            section.place("rings"),
            format!("{} rings", device.rings),
            format!("1 to {RINGS_MAX}"),
        );
    }
    for (key, number, max) in [
        ("maps-max", device.maps_max, MAPS_MAX),
        ("objects-max", device.objects_max, OBJECTS_MAX),
    ] {
        if !(1..=max).contains(&number) {
            mistakes.push(
                section.place(key),
                format!("{number} is out of range"),
                format!("1 to {max}"),
            );
        }
    }
    with_devices_max(&device, None, &section.place("devices-max"), mistakes)
}

fn with_devices_max(
    device: &DeviceConfig,
    devices_max: Option<u32>,
    place: &str,
    mistakes: &mut Mistakes,
) -> DeviceConfig {
    let device = DeviceConfig {
        devices_max: devices_max.unwrap_or(device.devices_max),
        ..device.clone()
    };
    if !(1..=DEVICES_MAX).contains(&device.devices_max) {
        mistakes.push(
            place,
            format!("{} devices", device.devices_max),
            format!("1 to {DEVICES_MAX}"),
        );
    }
    device
}

fn check_limits<T>(
    section: &Section<T>,
    given: &LimitsSection,
    default: &VmLimits,
    mistakes: &mut Mistakes,
) -> VmLimits {
    let limits = VmLimits {
        submissions_per_second_max: given
            .submissions_per_second_max
            .unwrap_or(default.submissions_per_second_max),
        bytes_per_second_max: given
            .bytes_per_second_max
            .map_or(default.bytes_per_second_max, |bytes| bytes.0),
        bytes_in_flight_max: given
            .bytes_in_flight_max
            .map_or(default.bytes_in_flight_max, |bytes| bytes.0),
        submissions_in_flight_max: given
            .submissions_in_flight_max
            .unwrap_or(default.submissions_in_flight_max),
        open_files_max: given.open_files_max.unwrap_or(default.open_files_max),
        mailbox_bytes_max: given
            .mailbox_bytes_max
            .map_or(default.mailbox_bytes_max, |bytes| bytes.0),
        mailbox_seconds_max: given.mailbox_seconds_max.unwrap_or(default.mailbox_seconds_max),
        message_bytes_max: given
            .message_bytes_max
            .map_or(default.message_bytes_max, |bytes| bytes.0),
        offers_max: given.offers_max.unwrap_or(default.offers_max),
        receives_max: given.receives_max.unwrap_or(default.receives_max),
    };
    // The others may be 0: then the VM cannot do that at all.
    let needed = [
        ("submissions-per-second-max", limits.submissions_per_second_max),
        ("bytes-per-second-max", limits.bytes_per_second_max),
        ("bytes-in-flight-max", limits.bytes_in_flight_max),
        (
            "submissions-in-flight-max",
            u64::from(limits.submissions_in_flight_max),
        ),
    ];
    for (key, _) in needed.iter().filter(|(_, number)| *number == 0) {
        mistakes.push(
            section.place("limits"),
            format!("{key} is 0: the VM could do nothing at all"),
            "leave it out for no limit",
        );
    }
    limits
}

fn check_shares(sections: &[Section<ShareSection>], mistakes: &mut Mistakes) -> Vec<ShareConfig> {
    let mut names = BTreeMap::new();
    let mut shares = Vec::new();
    for section in sections {
        let ShareSection {
            name,
            path,
            bytes_max,
            files_max,
        } = section.value.clone();
        check_name(&name, "share", &section.place("name"), &mut names, mistakes);
        let place = section.place("path");
        let shown = path.display();
        match std::fs::metadata(&path) {
            _ if !path.is_absolute() => {
                mistakes.push(
                    place,
                    format!("{shown} is not absolute"),
                    "write the whole path, from / on",
                );
            }
            Ok(metadata) if !metadata.is_dir() => {
                mistakes.push(
                    place,
                    format!("{shown} is no directory"),
                    "name the directory that is to be shared",
                );
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                mistakes.push(
                    place,
                    format!("{shown} does not exist"),
                    format!("make it: mkdir -p {shown}"),
                );
            }
            Err(error) => mistakes.push(
                place,
                format!("{shown}: {error}"),
                "let vmgmtd's user look into it",
            ),
        }
        if shares.len() == SHARES_MAX {
            let what = format!("this is share {}", SHARES_MAX + 1);
            mistakes.push(
                section.place("name"),
                what,
                format!("{SHARES_MAX} at most: share a directory above"),
            );
        }
        shares.push(ShareConfig {
            name,
            path,
            bytes_max: bytes_max.map(|bytes| bytes.0),
            files_max,
        });
    }
    shares
}

fn check_grants(
    grants: &[String],
    shares: &[ShareConfig],
    place: &str,
    mistakes: &mut Mistakes,
) -> Vec<ShareGrant> {
    let mut granted: Vec<ShareGrant> = Vec::new();
    for text in grants {
        match parse_grant(text, shares) {
            Err((what, remedy)) => mistakes.push(place, what, remedy),
            Ok(grant) if granted.iter().any(|other| other.share == grant.share) => {
                mistakes.push(
                    place,
                    format!("{:?} is granted twice", grant.share),
                    "keep one of both",
                );
            }
            Ok(grant) => granted.push(grant),
        }
    }
    granted
}

fn parse_grant(text: &str, shares: &[ShareConfig]) -> Result<ShareGrant, (String, String)> {
    let (name, access) = match text.split_once(':') {
        None => (text, Access::ReadWrite),
        Some((name, "rw")) => (name, Access::ReadWrite),
        Some((name, "ro")) => (name, Access::ReadOnly),
        Some((_, other)) => {
            return Err((
                format!("no access {other:?} in {text:?}"),
                "NAME:ro or NAME:rw".into(),
            ));
        }
    };
    if shares.iter().any(|share| share.name == name) {
        return Ok(ShareGrant {
            share: name.to_owned(),
            access,
        });
    }
    let known = shares
        .iter()
        .map(|share| share.name.as_str())
        .collect::<Vec<_>>()
        .join(", ");
    let remedy = if known.is_empty() {
        "there is none: add a [[share]]".into()
    } else {
        format!("there are: {known}")
    };
    Err((format!("no share {name:?}"), remedy))
}

/// A VM that is added at run time, by the same rules as the configuration's. Numbers are given by the keeper, which also knows
/// which names and sockets are taken.
///
/// # Errors
/// The first mistake, for the operator.
pub fn added_vm(request: &AddVm, core: &CoreConfig) -> Result<(VmConfig, ListenerConfig), Failure> {
    let mut mistakes = Mistakes::default();
    let path = PathBuf::from(&request.socket);
    check_name(&request.name, "VM", "name", &mut BTreeMap::new(), &mut mistakes);
    check_socket_path(&path, "socket", &mut BTreeMap::new(), &mut mistakes);
    let listener = ListenerConfig {
        listener: 0,
        path,
        mode: check_mode(request.mode.as_deref(), SOCKET_MODE, "mode", &mut mistakes),
        group: check_group(request.group.as_deref(), "group", &mut mistakes),
        identity: Identity::Vm { vm: 0 },
        device: with_devices_max(&core.device, request.devices_max, "devices_max", &mut mistakes),
    };
    let vm = VmConfig {
        vm: 0,
        name: request.name.clone(),
        shares: check_grants(&request.shares, &core.shares, "shares", &mut mistakes),
        reach: request.reach.clone(),
        send_to_all: request.send_to_all,
        limits: core.vm_limits.clone(),
        transient: false,
    };
    match mistakes.0.into_iter().next() {
        None => Ok((vm, listener)),
        Some(Mistake { place, what, remedy }) => Err(Failure::new(
            ErrorCode::BadRequest,
            format!("{place}: {what}"),
            remedy,
        )),
    }
}
