//! What the operator can write, and what is said about mistakes.

use super::*;
use std::fmt::Write as _;

/// The mistakes in a file of this text, with `DIR` for a directory that exists and `FILE` for a file in it.
fn mistakes_in(text: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let shown = directory.path().to_str().unwrap().to_owned();
    std::fs::write(directory.path().join("file"), "").unwrap();
    let path = directory.path().join("vmgmtd.toml");
    std::fs::write(&path, text.replace("DIR", &shown)).unwrap();
    match load(Some(&path), &Flags::default()) {
        Ok(config) => format!("{config:?}"),
        Err(mistakes) => mistakes.to_string().replace(&shown, "DIR"),
    }
}

#[test]
fn the_example_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../qemu-configs/vmgmtd.toml");
    let text = std::fs::read_to_string(example).unwrap();
    // The shares are where they exist.
    let text = text.replace("/srv/vmgmt", directory.path().to_str().unwrap());
    for name in ["pub", "inbox"] {
        std::fs::create_dir(directory.path().join(name)).unwrap();
    }
    // Once as it is, once with everything that is commented out: the defaults that it shows must be the defaults that there are.
    let mut open = String::new();
    for line in text.lines() {
        let key = line
            .strip_prefix("# ")
            .filter(|line| line.split(' ').nth(1) == Some("="));
        let key = key
            .filter(|line| !line.starts_with(char::is_uppercase))
            .unwrap_or(line);
        // Groups differ from host to host, and the limits that are none by default cannot be shown as such.
        let shown = ![
            "group",
            "control-group",
            "control ",
            "bytes-per",
            "submissions-per",
            "reach",
            "bytes-max",
            "files",
            "front-user",
            "core-user",
        ]
        .iter()
        .any(|start| key.starts_with(start));
        writeln!(open, "{}", if shown || line == key { key } else { line }).unwrap();
    }
    assert!(open.contains("\nvectors = 16") && open.contains("\nlog = \"info\""));
    let [config, opened] = [text, open].map(|text| {
        let path = directory.path().join("vmgmtd.toml");
        std::fs::write(&path, text).unwrap();
        load(Some(&path), &Flags::default()).unwrap()
    });
    assert_eq!(opened.server.log.as_deref(), Some("info"));
    assert_eq!(
        Config {
            server: config.server.clone(),
            ..opened
        },
        config
    );
    assert_eq!(config.listeners.len(), 3);
    let (listener, vm) = &config.listeners[0];
    let vm = vm.as_ref().unwrap();
    assert_eq!(
        (listener.mode, listener.device.devices_max, vm.name.as_str()),
        (0o660, 1, "web")
    );
    assert_eq!(
        (vm.limits.mailbox_bytes_max, vm.limits.offers_max),
        (16 << 20, 64)
    );
    assert_eq!(
        vm.shares[0],
        ShareGrant {
            share: "pub".into(),
            access: Access::ReadOnly
        }
    );
    assert_eq!(vm.shares[1].access, Access::ReadWrite);
    assert!(matches!(&config.listeners[2].0.identity, Identity::Anonymous(vm) if vm.transient));
    assert!(config.warnings.is_empty());
}

#[test]
fn flags_alone_are_enough() {
    let directory = tempfile::tempdir().unwrap();
    let flags = Flags {
        sockets: vec!["/run/mgmt.sock".into()],
        shares: vec![
            format!("pub={}:ro", directory.path().display()),
            format!("w={}", directory.path().display()),
        ],
        control: Some("/run/c.sock".into()),
        log: Some("debug".into()),
        sandbox: None,
    };
    let config = load(None, &flags).unwrap();
    assert_eq!(config.server.control, PathBuf::from("/run/c.sock"));
    assert_eq!(config.server.log.as_deref(), Some("debug"));
    let Identity::Anonymous(vm) = &config.listeners[0].0.identity else {
        panic!()
    };
    let access: Vec<_> = vm
        .shares
        .iter()
        .map(|grant| (grant.share.as_str(), grant.access))
        .collect();
    assert_eq!(access, [("pub", Access::ReadOnly), ("w", Access::ReadWrite)]);

    let wrong = Flags {
        sockets: vec!["/run/s".into()],
        shares: vec!["pub".into(), "x=/nowhere".into()],
        ..flags
    };
    assert_eq!(
        load(None, &wrong).unwrap_err().to_string(),
        "2 mistakes in the configuration\n\
         --share pub: no NAME=DIR\n    for example: --share pub=/srv/pub, or --share pub=/srv/pub:ro\n\
         --share x=/nowhere: /nowhere does not exist\n    make it: mkdir -p /nowhere"
    );
    assert!(
        load(None, &Flags::default())
            .unwrap_err()
            .to_string()
            .contains("no VM can come in")
    );
}

#[test]
fn several_mistakes_are_named_at_once_each_with_its_line() {
    let text = r#"
[server]
control-mode = "abc"
typo = 1
[device]
vectors = 3
maps-max = 0
[[share]]
name = "host"
path = "DIR/nowhere"
[[share]]
name = "f"
path = "DIR/file"
[[vm]]
name = "web"
socket = "/run/a.sock"
group = "no such group"
shares = ["g", "f:rx"]
devices-max = 0
[[vm]]
name = "web"
socket = "/run/a.sock"
mode = "0999"
[vm.limits]
bytes-in-flight-max = 0
mailbox-bytes-max = 10
[[vm]]
name = "a/b"
socket = "relative.sock"
[[vm]]
name = "c"
[[socket]]
path = "/run/s.sock"
identity = "name"
[[socket]]
path = "/run/t.sock"
limits = { message-bytes-max = "1 MB" }
[volume]
"#;
    let long = format!(
        "[[vm]]\nname = \"{}\"\nsocket = \"/{}\"\n",
        "n".repeat(64),
        "s".repeat(107)
    );
    let found = mistakes_in(&format!("{text}{long}"));
    let expected = [
        "DIR/vmgmtd.toml:4, [server]: unknown field `typo`, expected one of",
        "DIR/vmgmtd.toml:6, [device] vectors: 3 vectors\n    1, 2, 4, 8 or 16",
        "DIR/vmgmtd.toml:7, [device] maps-max: 0 is out of range\n    1 to 65536",
        "DIR/vmgmtd.toml:9, [[share]] name: \"host\" is no name for a share: it is reserved",
        "DIR/vmgmtd.toml:10, [[share]] path: DIR/nowhere does not exist\n    make it: mkdir -p DIR/nowhere",
        "DIR/vmgmtd.toml:13, [[share]] path: DIR/file is no directory",
        "DIR/vmgmtd.toml:17, [[vm]] group: no group \"no such group\" on this host",
        "DIR/vmgmtd.toml:18, [[vm]] shares: no share \"g\"\n    there are: host, f",
        "DIR/vmgmtd.toml:18, [[vm]] shares: no access \"rx\" in \"f:rx\"\n    NAME:ro or NAME:rw",
        "DIR/vmgmtd.toml:19, [[vm]] devices-max: 0 devices",
        "DIR/vmgmtd.toml:21, [[vm]] name: there is a VM \"web\" already, at DIR/vmgmtd.toml:15",
        "DIR/vmgmtd.toml:22, [[vm]] socket: /run/a.sock is used already, at DIR/vmgmtd.toml:16",
        "DIR/vmgmtd.toml:23, [[vm]] mode: \"0999\" is no file mode\n    write it in octal and quotes: \"0660\"",
        "[[vm]] limits: bytes-in-flight-max is 0",
        "DIR/vmgmtd.toml:28, [[vm]] name: \"a/b\" is no name for a VM: it has '/' or ':'",
        "DIR/vmgmtd.toml:29, [[vm]] socket: relative.sock is not absolute",
        "[[vm]]: missing field `socket`",
        "DIR/vmgmtd.toml:34, [[socket]] identity: identity = \"name\" is not supported yet",
        "DIR/vmgmtd.toml:37, [[socket]]: \"1 MB\" is no number of bytes",
        "DIR/vmgmtd.toml:38: no section \"volume\"",
        "it has more than 63 bytes",
        "has 108 bytes\n    the kernel takes 107 at most",
    ];
    for text in expected {
        assert!(found.contains(text), "not found: {text}\nin: {found}");
    }
    assert!(
        found.starts_with(&format!("{} mistakes", expected.len())),
        "{found}"
    );
}

#[test]
fn what_is_no_toml_is_named_with_its_line() {
    let found = mistakes_in("[server]\nlog = info\n");
    assert!(found.contains("DIR/vmgmtd.toml:2: "), "{found}");
    let found = mistakes_in("vm = 3\n");
    assert!(found.contains("write [[vm]] with two brackets"), "{found}");
    let error = load(Some(Path::new("/nowhere.toml")), &Flags::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nowhere.toml: No such file"), "{error}");
}

#[test]
fn names_nobody_could_mean_are_warned_of() {
    let found = mistakes_in("[[vm]]\nname = \"a\"\nsocket = \"/run/a\"\nreach = [\"b\", \"host\", \"a\"]\n");
    assert!(
        found.contains("no VM \\\"b\\\" in this configuration") && !found.contains("no VM \\\"a"),
        "{found}"
    );
}

#[test]
fn a_vm_added_at_run_time_keeps_the_same_rules() {
    let core = load(
        None,
        &Flags {
            sockets: vec!["/run/s".into()],
            ..Flags::default()
        },
    )
    .unwrap()
    .core;
    let request = vmgmt_ctl::protocol::AddVm {
        name: "new".into(),
        socket: "/run/new.sock".into(),
        mode: Some("0600".into()),
        devices_max: Some(2),
        ..Default::default()
    };
    let (vm, listener) = added_vm(&request, &core).unwrap();
    assert_eq!(
        (vm.name.as_str(), listener.mode, listener.device.devices_max),
        ("new", 0o600, 2)
    );
    let wrong = vmgmt_ctl::protocol::AddVm {
        shares: vec!["x".into()],
        ..request
    };
    assert_eq!(
        added_vm(&wrong, &core).unwrap_err().message,
        "shares: no share \"x\""
    );
}

#[test]
fn the_sandbox_is_on_and_its_accounts_are_checked() {
    let vm = "[[vm]]\nname = \"web\"\nsocket = \"/run/web.sock\"\n";
    let config = |text: &str| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmgmtd.toml");
        std::fs::write(&path, format!("{vm}{text}")).unwrap();
        load(Some(&path), &Flags::default())
    };
    let is_root = rustix::process::geteuid().is_root();
    let default = config("").unwrap();
    assert!(default.core.sandbox.enabled && default.warnings.is_empty());
    assert_eq!(default.core.sandbox.front.is_some(), is_root);
    assert!(!is_root || default.core.sandbox.front != default.core.sandbox.core);
    let off = config("[sandbox]\nenabled = false\n").unwrap();
    assert!(
        !off.core.sandbox.enabled
            && off
                .warnings
                .iter()
                .any(|warning| warning.what.contains("not sandboxed"))
    );
    let mistake = |text: &str| config(text).unwrap_err().to_string();
    if is_root {
        for (text, expected) in [
            ("front-user = \"root\"", "is root"),
            ("core-user = \"nobody-is-called-so\"", "no user"),
            (
                "front-user = \"5000\"\ncore-user = \"5000:7\"",
                "would both be user 5000",
            ),
        ] {
            let found = mistake(&format!("[sandbox]\n{text}\n"));
            assert!(
                found.contains(expected) && found.contains("vmgmtd.toml:"),
                "{found}"
            );
        }
    } else {
        assert!(mistake("[sandbox]\nfront-user = \"5000\"\n").contains("does not run as root"));
    }
    let many: String = (0..=limits::SHARES_MAX)
        .map(|number| format!("[[share]]\nname = \"s{number}\"\npath = \"/\"\n"))
        .collect();
    assert!(mistake(&many).contains("this is share 201"));
}
