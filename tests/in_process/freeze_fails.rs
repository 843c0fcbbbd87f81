//! Freezes that cannot be had: clients that answer no message, cores that die before they answer. A VM stays frozen only for somebody who
//! was told that it is.

use super::freeze::{done, operator};
use super::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use vmgmt_driver::Device;
use vmgmt_testkit::client::Client as VfioClient;
use vmgmt_testkit::guest::Sharing;

fn by_messages(site: &Site, number: usize) -> Result<SimulatedVm> {
    site.vm_with(number, GuestOptions::default().sharing(Sharing::Messages))
}

/// The guest rings a doorbell, and nobody answers the message to which that leads.
fn leave_unanswered(client: &mut VfioClient) -> Result<()> {
    let doorbell = u64::from(vmgmt_driver::abi::registers::DOORBELLS);
    client.region_write_posted(0, doorbell, &[9, 0, 0, 0])?;
    wait_until("a message is under way", PATIENCE, || {
        let mut polled = [PollFd::new(client.socket(), PollFlags::IN)];
        Ok((poll(&mut polled, Some(&Timespec::default()))? > 0).then_some(()))
    })
}

#[test]
fn a_vm_that_does_not_become_quiet_is_named_and_let_go() -> Result<()> {
    let site = site(1)?;
    let vm = by_messages(&site, 0)?;
    let mut ring = vm.ring(Mode::COMMON)?;
    echoes(&mut ring)?;
    let refused = vm.backing().with_client(|client| -> Result<_> {
        leave_unanswered(client)?;
        operator(&site, &["freeze", "vm0"])
    })?;
    ensure!(
        refused.0 == 5 && refused.1.contains("QEMU has not answered a message"),
        "{refused:?}"
    );
    ensure!(!done(&site, &["vms"])?.contains("frozen"));
    echoes(&mut ring)
}

/// Asks for freezes and goes on without waiting for their answers; when this returns, the front has them.
fn ask_for_freezes(site: &Site, names: &[&str], not_frozen: &str) -> Result<UnixStream> {
    let mut control = UnixStream::connect(site.control())?;
    for (id, name) in (1..).zip(names) {
        writeln!(
            control,
            r#"{{"vmgmt":1,"id":{id},"method":"freeze","params":{{"name":"{name}"}}}}"#
        )?;
    }
    // Behind them on the same way to the front and back.
    writeln!(
        control,
        r#"{{"vmgmt":1,"id":99,"method":"thaw","params":{{"name":"{not_frozen}"}}}}"#
    )?;
    let mut answer = String::new();
    BufReader::new(&control).read_line(&mut answer)?;
    ensure!(
        answer.contains(r#""id":99"#) && answer.contains("stale"),
        "{answer}"
    );
    Ok(control)
}

#[test]
fn a_freeze_whose_core_dies_before_it_answers_is_kept_by_nobody() -> Result<()> {
    let site = site(4)?;
    let (gone, asks_again) = (by_messages(&site, 0)?, by_messages(&site, 1)?);
    let mut rings = [gone.ring(Mode::COMMON)?, asks_again.ring(Mode::COMMON)?];
    for ring in &mut rings {
        echoes(ring)?;
    }
    // This one is answered, and counts whatever happens.
    done(&site, &["freeze", "vm2"])?;
    let frozen = |vms: &str| vms.matches("(frozen)").count();
    gone.backing().with_client(|one| {
        asks_again.backing().with_client(|other| -> Result<()> {
            leave_unanswered(one)?;
            leave_unanswered(other)?;
            let asker = ask_for_freezes(&site, &["vm0", "vm1"], "vm3")?;
            let old = site.daemon.kill_role("core")?;
            drop(asker);
            site.daemon.wait_for_new("core", old, PATIENCE)?;
            let vms = done(&site, &["vms"])?;
            ensure!(frozen(&vms) == 3, "{vms}");
            // The front that remembers is another one than the one that was asked.
            let program = env!("CARGO_BIN_EXE_vmgmtd");
            done(&site, &["upgrade", "--part", "front", "--to", program])?;
            // Who asks again is told how it is, and fails as if there had been no first time.
            let (code, text) = operator(&site, &["freeze", "vm1"])?;
            ensure!(
                code == 5 && text.contains("does not become quiet"),
                "{code}: {text}"
            );
            let vms = done(&site, &["vms"])?;
            let of_vm1 = vms.lines().find(|line| line.starts_with("vm1"));
            ensure!(of_vm1.is_some_and(|line| !line.contains("frozen")), "{vms}");
            // For the other nobody asks again.
            wait_until("the end of a freeze that nobody knows of", PATIENCE, || {
                Ok((frozen(&done(&site, &["vms"])?) == 1).then_some(()))
            })?;
            let log = done(&site, &["log"])?;
            ensure!(log.contains("nobody asked again"), "{log}");
            Ok(())
        })
    })?;
    for ring in &mut rings {
        echoes(ring)?;
    }
    let vms = done(&site, &["vms"])?;
    let of_vm2 = vms.lines().find(|line| line.starts_with("vm2"));
    ensure!(of_vm2.is_some_and(|line| line.contains("(frozen)")), "{vms}");
    done(&site, &["thaw", "vm2"]).map(drop)
}

#[test]
fn messages_that_are_never_answered_are_counted_and_said() -> Result<()> {
    let site = site(1)?;
    let vm = by_messages(&site, 0)?;
    let mut rings: Vec<Client> = (0..8).map(|_| vm.ring(Mode::COMMON)).collect::<Result<_>>()?;
    for ring in &mut rings {
        echoes(ring)?;
    }
    vm.backing().with_client(|client| -> Result<()> {
        let ring_all = |client: &mut VfioClient| -> Result<()> {
            for ring in 0..8 {
                let doorbell = u64::from(vmgmt_driver::abi::registers::DOORBELLS) + 4 * ring;
                client.region_write_posted(0, doorbell, &[9, 0, 0, 0])?;
            }
            Ok(())
        };
        ring_all(client)?;
        let given_up = || -> Result<Option<()>> {
            Ok(done(&site, &["vms"])?.contains("messages given up").then_some(()))
        };
        wait_until("messages that are given up", PATIENCE, given_up)?;
        let (code, text) = operator(&site, &["freeze", "vm0"])?;
        ensure!(
            code == 5 && text.contains("given up after 10 s each"),
            "{code}: {text}"
        );
        ensure!(done(&site, &["log"])?.contains("is it stopped?"));
        client.get_info()?;
        Ok(())
    })?;
    // It goes on, and answers all: what was given up has freed its place, and the VM can be frozen.
    done(&site, &["freeze", "vm0"])?;
    done(&site, &["thaw", "vm0"])?;
    drop(rings);
    let device = Device::open(vm.backing().clone())?;
    let options = vmgmt_driver::RingOptions::new(Mode::COMMON);
    echoes(&mut Client::new(vmgmt_driver::Ring::open(&device, options)?))
}
