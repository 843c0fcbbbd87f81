//! The specification's commands against the real `vmgmtd`, one test for each rule, by a client that can lie.
//!
//! The client is the test kit's own, written from the specification apart from `server/wire`. Most tests share one `vmgmtd`: a wrong
//! client must never disturb a neighbour, so a neighbour session is open all the time and looked at after each test.

#[path = "conformance/attach.rs"]
mod attach;
#[path = "conformance/descriptors.rs"]
mod descriptors;
#[path = "conformance/irqs.rs"]
mod irqs;
#[path = "conformance/maps.rs"]
mod maps;
#[path = "conformance/regions.rs"]
mod regions;
#[path = "conformance/stream.rs"]
mod stream;
#[path = "conformance/version.rs"]
mod version;

use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use vmgmt_testkit::client::{Client, ClientError, command};
use vmgmt_testkit::guest::{Pids, Site, SitePlan};
use vmgmt_testkit::process::wait_until;

/// Region index of configuration space.
const CONFIG: u32 = 7;
const EINVAL: u32 = 22;
const EOPNOTSUPP: u32 = 95;
/// Long enough for a loaded machine; nothing here waits for its end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A `vmgmtd` of the test's own, with a neighbour that must not notice anything.
struct Scene {
    site: Site,
    neighbour: Mutex<Client>,
    pids: Pids,
}

fn scene() -> Result<Scene> {
    scene_of(SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2))
}

fn scene_of(plan: SitePlan) -> Result<Scene> {
    let site = plan.start()?;
    let neighbour = Mutex::new(Client::connect_ready(site.socket(1))?);
    let pids = site.pids()?;
    Ok(Scene {
        site,
        neighbour,
        pids,
    })
}

impl Scene {
    /// A client of VM 0 that has not said anything yet.
    fn silent(&self) -> Result<Client> {
        Ok(Client::connect(self.site.socket(0))?)
    }

    /// A client of VM 0, VERSION agreed. Waits for the place where one before has just left it.
    fn client(&self) -> Result<Client> {
        wait_until("VM 0's place", PATIENCE, || {
            match Client::connect_ready(self.site.socket(0)) {
                Ok(client) => Ok(Some(client)),
                Err(ClientError::Refused { .. } | ClientError::Closed) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// That the neighbour is served and all processes are the same.
    fn check(&self) -> Result<()> {
        let mut neighbour = self.neighbour.lock().map_err(|_| anyhow::anyhow!("neighbour"))?;
        ensure!(neighbour.read_u32(0, 0).context("the neighbour's register")? == vmgmt_abi::MAGIC);
        self.site.check_unharmed(self.pids)
    }
}

/// That a result is a refusal with this errno.
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, errno: u32) -> Result<()> {
    match result {
        Err(ClientError::Refused { errno: found, .. }) if found == errno => Ok(()),
        other => bail!("expected errno {errno}, got {other:?}"),
    }
}

/// That the client's session is in order.
fn alive(client: &mut Client) -> Result<()> {
    ensure!(client.read_u32(0, 0).context("a register after the mistake")? == vmgmt_abi::MAGIC);
    Ok(())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn every_command_of_a_wrong_length_is_refused_and_the_next_is_served() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    // The bodies of the specification's tables; what may follow some of them is tested where they are.
    let commands: &[(u16, usize)] = &[
        (command::DMA_MAP, 32),
        (command::DMA_UNMAP, 24),
        (command::DEVICE_GET_INFO, 16),
        (command::DEVICE_GET_REGION_INFO, 32),
        (command::DEVICE_GET_REGION_IO_FDS, 16),
        (command::DEVICE_GET_IRQ_INFO, 16),
        (command::DEVICE_SET_IRQS, 20),
        (command::REGION_READ, 16),
        (command::REGION_WRITE, 16),
        (command::DEVICE_RESET, 0),
        (command::REGION_WRITE_MULTI, 8),
        (command::DEVICE_FEATURE, 8),
    ];
    for &(number, right) in commands {
        for bytes in [0, 1, 3, right.saturating_sub(1), right + 1, right + 4096] {
            if bytes == right {
                continue;
            }
            // All ones: also every flag, size and offset is wrong.
            let outcome = client.request(number, &vec![0xff; bytes], &[]);
            refused(outcome, EINVAL).with_context(|| format!("command {number} with {bytes} bytes"))?;
        }
        alive(&mut client).with_context(|| format!("after command {number}"))?;
    }
    scene.check()
}

#[test]
fn argsz_below_the_structure_is_refused() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for argsz in [0, 1, 15] {
        refused(
            client.request(command::DEVICE_GET_INFO, &words(&[argsz, 0, 0, 0]), &[]),
            EINVAL,
        )?;
        refused(
            client.request(command::DEVICE_GET_IRQ_INFO, &words(&[argsz, 0, 0, 0]), &[]),
            EINVAL,
        )?;
        refused(
            client.request(
                command::DEVICE_GET_REGION_INFO,
                &words(&[argsz, 0, 0, 0, 0, 0, 0, 0]),
                &[],
            ),
            EINVAL,
        )?;
        refused(
            client.request(command::DMA_UNMAP, &words(&[argsz, 0, 0, 0, 4096, 0]), &[]),
            EINVAL,
        )?;
        refused(
            client.request(command::DEVICE_SET_IRQS, &words(&[argsz, 0x21, 1, 0, 0]), &[]),
            EINVAL,
        )?;
    }
    // More room than needed is fine, and the answer fits what was asked.
    let info = client.request(command::DEVICE_GET_INFO, &words(&[4096, 0, 0, 0]), &[])?;
    ensure!(info.body.len() == 16);
    alive(&mut client)?;
    scene.check()
}

#[test]
fn reserved_fields_must_be_zero() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for at in 1..4 {
        let mut body = [16, 0, 0, 0];
        if let Some(field) = body.get_mut(at) {
            *field = 1;
        }
        refused(
            client.request(command::DEVICE_GET_INFO, &words(&body), &[]),
            EINVAL,
        )?;
    }
    refused(
        client.request(command::DEVICE_GET_IRQ_INFO, &words(&[16, 1, 0, 0]), &[]),
        EINVAL,
    )?;
    refused(
        client.request(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, 0, 1]), &[]),
        EINVAL,
    )?;
    alive(&mut client)?;
    scene.check()
}

#[test]
fn unknown_commands_and_those_of_the_server_are_refused() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for number in [
        0,
        14,
        17,
        18,
        255,
        u16::MAX,
        command::DMA_READ,
        command::DMA_WRITE,
    ] {
        refused(client.request(number, &[0; 64], &[]), EOPNOTSUPP)
            .with_context(|| format!("command {number}"))?;
    }
    alive(&mut client)?;
    scene.check()
}

#[test]
fn device_features_are_not_supported_and_say_so() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    // Migration, DMA logging and what may come: get, set and probe.
    for feature in 0..20 {
        for operation in [1 << 16, 1 << 17, (1 << 16) | (1 << 18), (1 << 17) | (1 << 18)] {
            let body = words(&[24, feature | operation, 0, 0, 0, 0]);
            let body = body
                .get(..if operation & (1 << 17) != 0 { 24 } else { 8 })
                .unwrap_or(&body);
            let outcome = client.request(command::DEVICE_FEATURE, body, &[]);
            refused(outcome, EOPNOTSUPP).with_context(|| format!("feature {feature}, {operation:#x}"))?;
        }
    }
    alive(&mut client)?;
    scene.check()
}

#[test]
fn a_reset_empties_the_device_and_keeps_the_connection() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let generation = u64::from(vmgmt_abi::registers::GENERATION);
    let before = client.read_u32(0, generation)?;
    client.region_write(CONFIG, 4, &7_u16.to_le_bytes())?;
    client.write_u32(0, vmgmt_abi::registers::INTERRUPT_ENABLE.into(), 0xff)?;
    for round in 1..=3 {
        client.reset()?;
        ensure!(client.read_u32(0, generation)? == before + round);
    }
    ensure!(client.read_u32(CONFIG, 4)? & 7 == 0);
    ensure!(client.read_u32(0, vmgmt_abi::registers::INTERRUPT_ENABLE.into())? == 0);
    refused(client.request(command::DEVICE_RESET, &[0; 4], &[]), EINVAL)?;
    scene.check()
}

#[test]
fn device_and_region_and_interrupt_information_is_that_of_pci() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let info = client.get_info()?;
    ensure!(
        (info.argsz, info.flags, info.regions, info.irqs) == (16, 3, 9, 5),
        "{info:?}"
    );
    for region in 0..9 {
        let info = client.region_info(region)?;
        let bytes = match region {
            0 => 16 * 1024,
            2 => 64,
            7 => 4096,
            _ => 0,
        };
        // Never mappable: one such region makes QEMU wait for every write of the device.
        ensure!(
            info.bytes == bytes && info.flags == if bytes > 0 { 3 } else { 0 },
            "region {region}: {info:?}"
        );
        ensure!(info.raw.fds.is_empty() && info.argsz == 32);
    }
    for region in [9, 100, u32::MAX] {
        refused(client.region_info(region), EINVAL)?;
    }
    let counts: Vec<u32> = (0..5)
        .map(|index| client.irq_info(index).map(|info| info.count))
        .collect::<Result<_, _>>()?;
    ensure!(counts == [1, 16, 0, 1, 1]);
    for index in [5, 6, u32::MAX] {
        refused(client.irq_info(index), EINVAL)?;
    }
    let fds = client.request(command::DEVICE_GET_REGION_IO_FDS, &words(&[16, 0, 2, 0]), &[])?;
    ensure!(fds.u32_at(12)? == 0 && fds.fds.is_empty());
    scene.check()
}
