//! VERSION: what is agreed, what is refused, and that nothing goes before it.

use super::*;
use vmgmt_testkit::client::QEMU_CAPABILITIES;

fn proposal(major: u16, minor: u16, json: &[u8]) -> Vec<u8> {
    [&major.to_le_bytes()[..], &minor.to_le_bytes(), json].concat()
}

/// Sends a VERSION that must be answered with an error, after which the connection is closed.
fn turned_away(scene: &Scene, body: &[u8], errno: u32) -> Result<()> {
    let mut client = scene.silent()?;
    let shown = String::from_utf8_lossy(body.get(..body.len().min(80)).unwrap_or_default()).into_owned();
    refused(client.request(command::VERSION, body, &[]), errno).context(shown)?;
    let more = client.wait_closed()?;
    ensure!(more.is_empty(), "after the refusal came {more:?}");
    Ok(())
}

#[test]
fn the_answer_fits_what_qemu_takes() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.silent()?;
    // `negotiate` checks version 0.0, the NUL and 214 bytes.
    let answer = client.negotiate()?;
    let capabilities = answer.get("capabilities").context("no capabilities")?;
    let number = |key: &str| capabilities.get(key).and_then(serde_json::Value::as_u64);
    ensure!(
        number("max_msg_fds").is_some_and(|fds| (1..=16).contains(&fds)),
        "{answer}"
    );
    ensure!(number("max_data_xfer_size") == Some(1 << 20), "{answer}");
    ensure!(number("pgsizes") == Some(4096), "{answer}");
    ensure!(
        number("max_dma_maps").is_some_and(|maps| maps <= 65535),
        "{answer}"
    );
    ensure!(
        capabilities.get("write_multiple") == Some(&true.into()),
        "{answer}"
    );
    // "The capability list must be a subset of those proposed."
    ensure!(capabilities.get("migration").is_none() && capabilities.get("twin_socket").is_none());
    scene.check()
}

#[test]
fn less_is_proposed_less_is_agreed() -> Result<()> {
    let scene = scene()?;
    for json in [
        &b""[..],
        b"{}\0",
        b"{\"capabilities\":{}}\0",
        b"{\"capabilities\":{\"unknown\":[1,{}]},\"more\":null}\0",
    ] {
        let mut client = scene.client_of_body(&proposal(0, 0, json))?;
        alive(&mut client)?;
        // What was not agreed is not taken.
        refused(client.write_multi(&[], false), EOPNOTSUPP)?;
        drop(client);
    }
    scene.check()
}

#[test]
fn a_later_minor_version_is_answered_with_ours() -> Result<()> {
    let scene = scene()?;
    let json = [QEMU_CAPABILITIES.as_bytes(), b"\0"].concat();
    let mut client = scene.client_of_body(&proposal(0, 7, &json))?;
    alive(&mut client)?;
    scene.check()
}

#[test]
fn bad_proposals_are_turned_away() -> Result<()> {
    let scene = scene()?;
    let capabilities = QEMU_CAPABILITIES.as_bytes();
    let bad: &[&[u8]] = &[
        b"{",
        b"{\0",
        b"\0",
        b"[]\0",
        b"null\0",
        b"{\"capabilities\": 7}\0",
        b"{\"capabilities\": []}\0",
        b"{\"capabilities\": {\"max_msg_fds\": \"many\"}}\0",
        b"{\"capabilities\": {\"max_msg_fds\": -1}}\0",
        b"{\"capabilities\": {\"write_multiple\": 1}}\0",
        b"{\"capabilities\": {\"max_data_xfer_size\": 1e99}}\0",
        b"{}\0{}\0",
        b"\xff\xfe\0",
        capabilities, // no NUL
    ];
    for json in bad {
        turned_away(&scene, &proposal(0, 0, json), EINVAL)?;
    }
    // Deep, and long.
    turned_away(
        &scene,
        &proposal(0, 0, &[vec![b'['; 4000], vec![0]].concat()),
        EINVAL,
    )?;
    turned_away(
        &scene,
        &proposal(0, 0, &[vec![b' '; 8000], b"{}\0".to_vec()].concat()),
        EINVAL,
    )?;
    turned_away(&scene, &proposal(1, 0, b"{}\0"), EOPNOTSUPP)?;
    turned_away(&scene, &proposal(u16::MAX, u16::MAX, b"{}\0"), EOPNOTSUPP)?;
    for bytes in 0..4 {
        turned_away(&scene, &vec![0; bytes], EINVAL)?;
    }
    scene.check()
}

#[test]
fn a_proposal_beyond_any_sense_ends_the_connection() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.silent()?;
    client.send_raw(
        &vmgmt_testkit::client::encode(0, command::VERSION, 0, &vec![b' '; 20_000]),
        &[],
    )?;
    let said = client.wait_closed()?;
    ensure!(said.iter().all(|message| message.flags & 0x20 != 0), "{said:?}");
    scene.check()
}

#[test]
fn nothing_goes_before_version() -> Result<()> {
    let scene = scene()?;
    for number in [
        command::DEVICE_GET_INFO,
        command::DMA_MAP,
        command::REGION_READ,
        command::DEVICE_RESET,
        77,
    ] {
        let mut client = scene.silent()?;
        // Refused; whether the connection goes on is the server's choice, that it never serves is not.
        refused(client.request(number, &[0; 16], &[]), EINVAL)
            .with_context(|| format!("command {number}"))?;
    }
    scene.check()
}

#[test]
fn version_comes_once() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let again = client.request(command::VERSION, &proposal(0, 0, b"{}\0"), &[]);
    ensure!(
        matches!(&again, Err(ClientError::Refused { .. })),
        "a second VERSION gave {again:?}"
    );
    alive(&mut client)?;
    scene.check()
}

#[test]
fn a_client_that_says_nothing_keeps_nobody_from_anything() -> Result<()> {
    let scene = scene()?;
    let idle: Vec<Client> = (0..50).map(|_| scene.silent()).collect::<Result<_>>()?;
    scene.check()?;
    drop(idle);
    alive(&mut scene.client()?)?;
    scene.check()
}

impl Scene {
    /// A client with a proposal of its own, once the place is free.
    fn client_of_body(&self, body: &[u8]) -> Result<Client> {
        wait_until("VM 0's place", PATIENCE, || {
            let mut client = self.silent()?;
            match client.negotiate_with(body) {
                Ok(_) => Ok(Some(client)),
                Err(ClientError::Refused { errno, .. }) if errno != EINVAL => Ok(None),
                Err(ClientError::Closed) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }
}
