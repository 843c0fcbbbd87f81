//! A frozen VM: not a byte of its memory moves, everybody waits, and after the thaw nothing is missing.

use super::*;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_testkit::guest::Sharing;
use vmgmt_testkit::process::wait_until;

/// vmgmtctl: (exit code, what it says on both outputs).
fn operator(site: &Site, words: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
        .arg("--control")
        .arg(site.control())
        .args(words)
        .stdin(Stdio::null())
        .output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

fn done(site: &Site, words: &[&str]) -> Result<String> {
    let (code, text) = operator(site, words)?;
    ensure!(code == 0, "vmgmtctl {words:?} ended with {code}: {text}");
    Ok(text)
}

fn memory_of(vm: &SimulatedVm) -> Result<Vec<u8>> {
    let memory = vm.backing().memory();
    Ok(memory.ram().read(0, usize::try_from(memory.bytes())?)?)
}

/// Its whole RAM stays the same while others go on. The guest's own program stops by itself when nothing is answered.
fn stays_the_same(vm: &SimulatedVm, meanwhile: impl Fn() -> Result<()>) -> Result<()> {
    let mut before = memory_of(vm)?;
    let mut same = 0;
    // Often in a row: on a busy machine the guest's program itself may be kept from its last write for a while.
    wait_until("the guest has nothing left to do", PATIENCE, || {
        meanwhile()?;
        let now = memory_of(vm)?;
        same = if now == before { same + 1 } else { 0 };
        before = now;
        Ok((same >= 10).then_some(()))
    })?;
    for _ in 0..5 {
        meanwhile()?;
        ensure!(memory_of(vm)? == before, "a frozen VM's memory has changed");
    }
    Ok(())
}

/// Gets, puts, and what others send, all the time; frozen again and again.
fn freezes_under_load(sharing: Sharing) -> Result<()> {
    let site = site(2)?;
    let (vm0, vm1) = (
        site.vm_with(0, GuestOptions::default().ram_bytes(24 << 20).sharing(sharing))?,
        site.vm(1)?,
    );
    let pids = site.pids()?;
    let data = pattern(3_000_000, 5);
    std::fs::write(site.share().join("down"), &data)?;
    let enough = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| -> Result<(u32, u32)> {
        let files = scope.spawn(|| -> Result<u32> {
            let mut files = vm0.ring(Mode::FILE)?;
            let mut rounds = 0;
            while !enough.load(Ordering::Relaxed) || rounds == 0 {
                let (memory, _) = files.get_to_memory("work/down", &TransferOptions::default())?;
                ensure!(
                    memory.to_vec(0, data.len())? == data,
                    "round {rounds}: another file"
                );
                let options = TransferOptions::default();
                files.put_from_memory(&format!("work/up{rounds}"), &memory, data.len(), 1, &options)?;
                ensure!(std::fs::read(site.share().join(format!("up{rounds}")))? == data);
                std::fs::remove_file(site.share().join(format!("up{rounds}")))?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let messages = scope.spawn(|| -> Result<u32> {
            let mut at = vm0.ring(Mode::CHAT)?;
            let mut to = vm1.ring(Mode::CHAT)?;
            let mut receiver = Receiver::default();
            let mut number = 0;
            while !enough.load(Ordering::Relaxed) || number == 0 {
                at.post_receives(&mut receiver, 4)?;
                to.send("vm0", &pattern(20_000, number.into()), 0)?;
                let message = at
                    .receive(&mut receiver, deadline())?
                    .context("it did not come")?;
                ensure!(
                    message.bytes == pattern(20_000, number.into()),
                    "message {number}"
                );
                number += 1;
            }
            Ok(number)
        });
        let frozen = (|| {
            let mut neighbour = vm1.ring(Mode::COMMON)?;
            for round in 0..6_u64 {
                std::thread::sleep(Duration::from_millis(20 * round));
                done(&site, &["freeze", "vm0"])?;
                ensure!(done(&site, &["vms"])?.contains("(frozen)"));
                let neighbour = std::cell::RefCell::new(&mut neighbour);
                stays_the_same(&vm0, || echoes(&mut neighbour.borrow_mut()))?;
                vm0.device().check_health()?;
                done(&site, &["thaw", "vm0"])?;
            }
            Ok(())
        })();
        enough.store(true, Ordering::Relaxed);
        let thawed = operator(&site, &["thaw", "vm0"]);
        let joined = |thread: std::thread::ScopedJoinHandle<'_, Result<u32>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a guest panicked"))?
        };
        let (files, messages) = (joined(files), joined(messages));
        frozen?;
        ensure!(thawed?.0 == 1, "a VM that is not frozen was thawed");
        Ok((files?, messages?))
    })?;
    ensure!(rounds.0 > 0 && rounds.1 > 0, "{rounds:?}");
    site.check_unharmed(pids)
}

#[test]
fn a_frozen_vms_memory_is_quiet_under_load() -> Result<()> {
    freezes_under_load(Sharing::Sealed)
}

#[test]
fn it_is_quiet_where_dma_goes_by_messages() -> Result<()> {
    freezes_under_load(Sharing::Messages)
}

#[test]
fn a_freeze_outlives_the_core_and_the_connection() -> Result<()> {
    let site = site(2)?;
    let vm1 = site.vm(1)?;
    done(&site, &["freeze", "vm0"])?;
    let old = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", old, PATIENCE)?;
    ensure!(done(&site, &["vms"])?.contains("0 (frozen)"));
    // A VM that connects while it is frozen: its registers answer, its ring opens when it is thawed.
    let vm0 = site.vm(0)?;
    std::thread::scope(|scope| -> Result<()> {
        let opening = scope.spawn(|| -> Result<()> { echoes(&mut vm0.ring(Mode::COMMON)?) });
        let mut to = vm1.ring(Mode::CHAT)?;
        // Mail goes to the mailbox meanwhile.
        to.send("vm0", b"while it was frozen", 0)?;
        stays_the_same(&vm0, || Ok(()))?;
        let old = site.daemon.kill_role("core")?;
        site.daemon.wait_for_new("core", old, PATIENCE)?;
        ensure!(done(&site, &["vms"])?.contains("1 (frozen)"));
        stays_the_same(&vm0, || Ok(()))?;
        ensure!(!opening.is_finished(), "a ring was opened in a frozen VM");
        done(&site, &["thaw", "vm0"])?;
        opening.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    let mut at = vm0.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    at.post_receives(&mut receiver, 1)?;
    let message = at.receive(&mut receiver, deadline())?.context("no mail")?;
    ensure!(message.bytes == b"while it was frozen");
    Ok(())
}

#[test]
fn a_forgotten_freeze_ends_by_itself_and_the_thaw_says_so() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::COMMON)?;
    done(&site, &["freeze", "vm0", "--timeout", "1"])?;
    ensure!(done(&site, &["vms"])?.contains("(frozen, 1 s)"));
    // Answered when the second is over.
    echoes(&mut ring)?;
    let (code, text) = operator(&site, &["thaw", "vm0"])?;
    ensure!(
        code == 1 && text.contains("not any more") && text.contains("--timeout"),
        "{code}: {text}"
    );
    // Freezing again makes it longer.
    done(&site, &["freeze", "vm0", "--timeout", "1"])?;
    done(&site, &["freeze", "vm0"])?;
    ensure!(done(&site, &["vms"])?.contains("(frozen)"));
    done(&site, &["thaw", "vm0"])?;
    let (code, text) = operator(&site, &["freeze", "vm7"])?;
    ensure!(code == 4 && text.contains("vmgmtctl vms"), "{code}: {text}");
    Ok(())
}

#[test]
fn a_vm_that_does_not_become_quiet_is_named_and_let_go() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm_with(0, GuestOptions::default().sharing(Sharing::Messages))?;
    let mut ring = vm.ring(Mode::COMMON)?;
    echoes(&mut ring)?;
    // A client that does not answer the message to which the doorbell leads.
    let refused = vm.backing().with_client(|client| -> Result<_> {
        let doorbell = u64::from(vmgmt_driver::abi::registers::DOORBELLS);
        client.region_write_posted(0, doorbell, &[9, 0, 0, 0])?;
        wait_until("a message is under way", PATIENCE, || {
            use rustix::event::{PollFd, PollFlags, Timespec, poll};
            let mut polled = [PollFd::new(client.socket(), PollFlags::IN)];
            let none = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            Ok((poll(&mut polled, Some(&none))? > 0).then_some(()))
        })?;
        operator(&site, &["freeze", "vm0"])
    })?;
    ensure!(
        refused.0 == 5 && refused.1.contains("QEMU has not answered a message"),
        "{refused:?}"
    );
    ensure!(!done(&site, &["vms"])?.contains("frozen"));
    echoes(&mut ring)
}
