//! The byte stream: cut anywhere, many messages at once, replies nobody asked for, ids, lengths that lie.

use super::*;
use vmgmt_testkit::client::{encode, flag};

fn read_of_magic(id: u16) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(words(&[0, 4]));
    encode(id, command::REGION_READ, 0, &body)
}

#[test]
fn a_message_may_be_cut_at_any_byte() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let message = read_of_magic(0xabcd);
    for cut in 1..message.len() {
        client.send_split(&message, &[], &[cut])?;
        let reply = client.recv_raw()?;
        ensure!(reply.id == 0xabcd && reply.flags == flag::REPLY && reply.u32_at(16)? == vmgmt_abi::MAGIC);
    }
    // And byte by byte.
    client.send_split(&message, &[], &(1..message.len()).collect::<Vec<_>>())?;
    ensure!(client.recv_raw()?.u32_at(16)? == vmgmt_abi::MAGIC);
    scene.check()
}

#[test]
fn version_may_be_cut_at_any_byte() -> Result<()> {
    let scene = scene()?;
    let message = encode(1, command::VERSION, 0, b"\0\0\0\0{\"capabilities\":{}}\0");
    for cut in 1..message.len() {
        let answer = wait_until("VM 0's place", PATIENCE, || {
            let mut client = scene.silent()?;
            client.send_split(&message, &[], &[cut])?;
            let reply = client.recv_raw()?;
            Ok((reply.flags & flag::ERROR == 0).then_some(reply))
        })?;
        ensure!(answer.id == 1 && answer.command == command::VERSION);
    }
    scene.check()
}

#[test]
fn many_messages_in_one_write_are_answered_in_order() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let ids: Vec<u16> = (0..300).map(|n| 65_500_u16.wrapping_add(n)).collect();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| read_of_magic(*id)).collect();
    client.send_raw(&bytes, &[])?;
    for id in ids {
        let reply = client.recv_raw()?;
        ensure!(
            reply.id == id,
            "expected the answer to {id}, got that to {}",
            reply.id
        );
        ensure!(reply.u32_at(16)? == vmgmt_abi::MAGIC);
    }
    scene.check()
}

#[test]
fn an_id_may_be_used_again_at_once() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    client.send_raw(&[read_of_magic(7), read_of_magic(7)].concat(), &[])?;
    ensure!(client.recv_raw()?.id == 7 && client.recv_raw()?.id == 7);
    scene.check()
}

#[test]
fn replies_that_nobody_asked_for_are_dropped() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for number in 0..20 {
        for flags in [flag::REPLY, flag::REPLY | flag::ERROR] {
            client.send_raw(&encode(number, number, flags, &[0; 32]), &[])?;
        }
    }
    alive(&mut client)?;
    scene.check()
}

#[test]
fn bad_header_flags_are_refused() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for flags in [2, 3, 15, flag::ERROR, 1 << 6, 1 << 31] {
        let mut body = vec![0; 8];
        body.extend(words(&[0, 4]));
        client.send_raw(&encode(9, command::REGION_READ, flags, &body), &[])?;
        let reply = client.recv_raw()?;
        ensure!(
            reply.id == 9 && reply.flags & flag::ERROR != 0 && reply.error == EINVAL,
            "flags {flags:#x}: {reply:?}"
        );
    }
    alive(&mut client)?;
    scene.check()
}

#[test]
fn a_length_that_lies_ends_that_connection_only() -> Result<()> {
    let scene = scene()?;
    for bytes in [0_u32, 1, 15, (1 << 20) + 49, 1 << 24, u32::MAX] {
        let mut client = scene.client()?;
        let mut message = read_of_magic(3);
        if let Some(field) = message.get_mut(4..8) {
            field.copy_from_slice(&bytes.to_le_bytes());
        }
        client.send_raw(&message, &[])?;
        client.wait_closed().with_context(|| format!("length {bytes}"))?;
        scene.check()?;
    }
    Ok(())
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_message_leaves_nothing() -> Result<()> {
    let scene = scene()?;
    let message = read_of_magic(3);
    for cut in [1, 15, 16, 17, message.len() - 1] {
        let mut client = scene.client()?;
        client.send_raw(message.get(..cut).unwrap_or_default(), &[])?;
        drop(client);
    }
    alive(&mut scene.client()?)?;
    scene.check()
}

#[test]
fn noise_is_survived() -> Result<()> {
    let scene = scene()?;
    // A fixed generator: the same bytes each time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..40 {
        let mut client = if round % 2 == 0 {
            scene.client()?
        } else {
            scene.silent()?
        };
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u8
            })
            .collect();
        // It may hang up while we still talk.
        let _ = client.send_raw(&noise, &[]);
    }
    alive(&mut scene.client()?)?;
    scene.check()
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    client.set_timeout(Duration::from_millis(300));
    let mut body = vec![0; 8];
    body.extend(words(&[CONFIG, 4096]));
    let batch: Vec<u8> = (0..100)
        .flat_map(|id| encode(id, command::REGION_READ, 0, &body))
        .collect();
    // Until nothing more is taken: its answers fill everything there is.
    let stopped = (0..2000).find_map(|_| client.send_raw(&batch, &[]).err());
    ensure!(
        stopped.is_some(),
        "80 MB of requests without reading an answer were all taken"
    );
    scene.check()
}
