//! Chat mode: presence, messages of any length, the mailbox, all.

use super::*;
use vmgmt_driver::Status;
use vmgmt_driver::abi::chat::message_flag;
use vmgmt_driver::operations::chat::Receiver;

#[test]
fn messages_keep_their_bounds_and_order() -> Result<()> {
    let site = site(2)?;
    let pids = site.pids()?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let mut to = source.ring(Mode::CHAT)?;
    let mut at = target.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    at.post_receives(&mut receiver, 8)?;
    let mut last = 0;
    for bytes in [0, 1, 64, 4095, 60_000, 65_536, 200_000, 1_000_000] {
        let sent = pattern(bytes, 31);
        to.send("vm1", &sent, 0)
            .with_context(|| format!("sending {bytes} bytes"))?;
        let message = at
            .receive(&mut receiver, deadline())?
            .with_context(|| format!("{bytes} bytes did not come"))?;
        ensure!(
            message.source_name == "vm0" && message.bytes == sent,
            "a message of {bytes} bytes came different"
        );
        ensure!(
            message.sequence > last,
            "message {} after {last}",
            message.sequence
        );
        last = message.sequence;
        at.post_receives(&mut receiver, 8)?;
    }
    // Many, faster than they are taken.
    for number in 0..500_u32 {
        to.send("vm1", &number.to_le_bytes(), 0)?;
    }
    for number in 0..500_u32 {
        let message = at
            .receive(&mut receiver, deadline())?
            .context("a message is missing")?;
        ensure!(message.bytes == number.to_le_bytes(), "out of order at {number}");
    }
    site.check_unharmed(pids)
}

#[test]
fn messages_go_by_port_as_well() -> Result<()> {
    let site = site(2)?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let mut to = source.ports(Mode::CHAT)?;
    let mut at = target.ports(Mode::CHAT)?;
    for bytes in [0, 5, 1000, 3000] {
        let sent = pattern(bytes, 2);
        to.send("vm1", &sent, 0)?;
        let message = at
            .receive(&mut Receiver::default(), deadline())?
            .context("nothing came")?;
        ensure!(message.bytes == sent);
    }
    Ok(())
}

#[test]
fn a_mailbox_keeps_what_comes_while_the_vm_is_away() -> Result<()> {
    let site = site(2)?;
    let source = site.vm(0)?;
    let mut to = source.ring(Mode::CHAT)?;
    for number in 0..10_u8 {
        to.send("vm1", &[number; 100], 0)?;
    }
    let target = site.vm(1)?;
    let mut at = target.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    for number in 0..10_u8 {
        let message = at
            .receive(&mut receiver, deadline())?
            .context("a message is missing")?;
        ensure!(message.bytes == [number; 100]);
        ensure!(
            message.flags & message_flag::FROM_MAILBOX != 0,
            "message {number} does not say that it waited"
        );
    }
    Ok(())
}

#[test]
fn a_full_mailbox_says_so_and_a_repeated_key_is_delivered_once() -> Result<()> {
    let plan = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2).limits("mailbox-bytes-max = \"64 KiB\"");
    let site = plan.start()?;
    let source = site.vm(0)?;
    let mut to = source.ring(Mode::CHAT)?;
    for _ in 0..5 {
        to.send("vm1", b"once", 77)?;
    }
    let mut taken = 0;
    let full = loop {
        match to.send("vm1", &[0; 8000], 0) {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
        ensure!(taken < 100, "64 KiB took {taken} messages of 8,000 bytes");
    };
    ensure!(full.status() == Some(Status::OVER_BUDGET), "{full}");
    let target = site.vm(1)?;
    let mut at = target.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    ensure!(at.receive(&mut receiver, deadline())?.context("nothing")?.bytes == b"once");
    for _ in 0..taken {
        ensure!(
            at.receive(&mut receiver, deadline())?
                .context("nothing")?
                .bytes
                .len()
                == 8000
        );
    }
    Ok(())
}

#[test]
fn to_all_needs_a_right() -> Result<()> {
    for (line, allowed) in [("", false), ("send-to-all = true", true)] {
        let site = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 3).vm(line).start()?;
        let vms: Vec<SimulatedVm> = (0..3).map(|number| site.vm(number)).collect::<Result<_>>()?;
        let mut rings: Vec<Client> = vms.iter().map(|vm| vm.ring(Mode::CHAT)).collect::<Result<_>>()?;
        for ring in &mut rings {
            ring.publish(Some("here"))?;
        }
        let [first, rest @ ..] = rings.as_mut_slice() else {
            anyhow::bail!("no rings")
        };
        let peers = first.peers()?;
        ensure!(
            peers
                .iter()
                .any(|peer| peer.name == "vm2" && peer.description == "here"),
            "{peers:?}"
        );
        let outcome = first.send("all", b"hear", 0);
        if !allowed {
            ensure!(
                outcome
                    .as_ref()
                    .is_err_and(|error| error.status() == Some(Status::DENIED)),
                "{outcome:?}"
            );
            continue;
        }
        ensure!(outcome? == 2);
        for ring in rest {
            let message = ring
                .receive(&mut Receiver::default(), deadline())?
                .context("nothing came")?;
            ensure!(message.bytes == b"hear" && message.flags & message_flag::TO_ALL != 0);
        }
    }
    Ok(())
}

#[test]
fn a_cancelled_receive_is_completed_once_and_loses_nothing() -> Result<()> {
    let site = site(2)?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let mut to = source.ring(Mode::CHAT)?;
    let mut at = target.ring(Mode::CHAT)?;
    let mut got = 0;
    for round in 0..50_u8 {
        let mut receiver = Receiver::default();
        at.post_receives(&mut receiver, 4)?;
        to.send("vm1", &[round], 0)?;
        got += at.withdraw_receives(&mut receiver)?.len();
    }
    let mut receiver = Receiver::default();
    while got < 50 {
        let message = at.receive(&mut receiver, deadline())?;
        ensure!(message.is_some(), "only {got} of 50 messages came");
        got += 1;
    }
    at.withdraw_receives(&mut receiver)?;
    Ok(())
}

/// What an operator got of `recv --follow` on this connection: source and sequence of each whole message, until it closes or `count` are there.
fn letters(stream: &std::os::unix::net::UnixStream, count: usize) -> Result<Vec<(String, u64)>> {
    use std::io::BufRead;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = std::io::BufReader::new(stream);
    let mut letters = Vec::new();
    while letters.len() < count {
        let mut line = String::new();
        // What a dead core had in its memory does not come; half a line is none.
        if lines.read_line(&mut line).unwrap_or(0) == 0 || !line.ends_with('\n') {
            break;
        }
        let value: serde_json::Value = serde_json::from_str(&line)?;
        let message = value.pointer("/event/message").context(line)?;
        letters.push((
            message["from"].as_str().context("no source")?.to_owned(),
            message["sequence"].as_u64().context("no number")?,
        ));
    }
    Ok(letters)
}

#[test]
fn a_message_to_the_host_that_was_not_in_the_operators_socket_is_given_again() -> Result<()> {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    const LETTERS: u64 = 30;
    let site = site(1)?;
    let vm = site.vm(0)?;
    let recv = || -> Result<UnixStream> {
        let mut stream = UnixStream::connect(site.control())?;
        stream.write_all(b"{\"vmgmt\":1,\"id\":1,\"method\":\"recv\",\"params\":{\"follow\":true}}\n")?;
        Ok(stream)
    };
    let first = recv()?;
    let mut ring = vm.ring(Mode::CHAT)?;
    // Its socket has room for a few of them, and it does not read.
    let text = "x".repeat(200_000);
    for number in 1..=LETTERS {
        ensure!(ring.send("host", text.as_bytes(), 0)? == number);
    }
    let old = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", old, PATIENCE)?;
    let before = letters(&first, usize::MAX)?;
    ensure!(before.len() < LETTERS as usize, "nothing was left to give");
    // (Until the new core serves, the keeper answers; this client waits for the one that knows VMs.)
    vmgmt_ctl::client::Client::connect(&site.control())?.call(
        &vmgmt_ctl::protocol::Call::Vms,
        &[],
        Some(PATIENCE),
        &mut |_| true,
    )?;
    let second = recv()?;
    // (A message that was written and not noted comes again, under its number.)
    let left = LETTERS as usize - before.len();
    let after = letters(&second, left)?;
    let mut all: Vec<_> = before.iter().chain(&after).map(|(_, number)| *number).collect();
    ensure!(after.is_sorted() && before.is_sorted(), "{before:?} {after:?}");
    all.sort_unstable();
    all.dedup();
    ensure!(
        all == (1..=all.len() as u64).collect::<Vec<_>>() && all.len() + 16 >= LETTERS as usize,
        "{before:?} {after:?}"
    );
    // None is left but what came a second time pushed back.
    let rest = letters(&second, LETTERS as usize - all.len())?;
    all.extend(rest.iter().map(|(_, number)| *number));
    ensure!(all == (1..=LETTERS).collect::<Vec<_>>(), "{all:?}");
    ensure!(before.iter().chain(&after).all(|(from, _)| from == "vm0"));
    Ok(())
}
