//! `kill -9` of the core: the guest notices nothing but a pause.

use super::*;
use rustix::process::{Pid, Signal, kill_process};
use std::os::fd::AsFd;
use vmgmt_ctl::Client as Operator;
use vmgmt_ctl::protocol::{Call, Peers, Pull, Push, Transferred, Vms, new_key};
use vmgmt_driver::abi::registers;
use vmgmt_driver::backing::Backing;
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_testkit::deaths::while_cores_die;

fn signal(process: u32, signal: Signal) -> Result<()> {
    let process = Pid::from_raw(process.cast_signed()).context("a pid")?;
    Ok(kill_process(process, signal)?)
}

/// Gone, or dead and not yet collected.
fn is_dead(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

#[test]
fn registers_answer_while_the_core_is_dead_and_work_goes_on_after() -> Result<()> {
    let site = site(2)?;
    let before = site.pids()?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::FILE)?;
    let mut ports = vm.ports(Mode::COMMON)?;
    echoes(&mut ring)?;
    echoes(&mut ports)?;
    for round in 0..3 {
        // A keeper that stands still starts no other core: the front answers by itself.
        signal(site.daemon.pid(), Signal::STOP)?;
        let old = site.daemon.kill_role("core")?;
        let answered = (|| {
            wait_until("the core's death", PATIENCE, || Ok(is_dead(old).then_some(())))?;
            for _ in 0..50 {
                ensure!(vm.backing().read32(registers::MAGIC)? == vmgmt_abi::MAGIC);
            }
            Ok(())
        })();
        signal(site.daemon.pid(), Signal::CONT)?;
        answered?;
        // Nothing is done by the guest: what it submits now is answered by the next core.
        echoes(&mut ring).with_context(|| format!("round {round}: the ring after the core's death"))?;
        echoes(&mut ports).with_context(|| format!("round {round}: the ports after the core's death"))?;
        let data = pattern(1_000_000, round);
        std::fs::write(site.share().join("f"), &data)?;
        let (memory, _) = ring.get_to_memory("work/f", &TransferOptions::default())?;
        ensure!(memory.to_vec(0, data.len())? == data);
        ensure!(site.daemon.role("core")? != old);
    }
    let after = site.pids()?;
    ensure!(
        (after.keeper, after.front) == (before.keeper, before.front),
        "{before:?} became {after:?}"
    );
    ensure!(vm.device().check_health().is_ok(), "the guest saw another device");
    Ok(())
}

/// The core dies, and before another one is started `meanwhile` happens.
pub(super) fn without_a_core(site: &Site, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    signal(site.daemon.pid(), Signal::STOP)?;
    let done: Result<u32> = (|| {
        let old = site.daemon.kill_role("core")?;
        wait_until("the core's death", PATIENCE, || Ok(is_dead(old).then_some(())))?;
        meanwhile()?;
        Ok(old)
    })();
    signal(site.daemon.pid(), Signal::CONT)?;
    site.daemon.wait_for_new("core", done?, PATIENCE)?;
    Ok(())
}

#[test]
fn handles_go_on_or_say_that_their_file_is_another_or_gone() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let at = |name: &str| site.share().join(name);
    for name in ["same", "replaced", "removed"] {
        std::fs::write(at(name), name)?;
    }
    let buffer = files.allocate(64)?;
    let mut open = |name: &str| Ok(files.open_for_reading(&format!("work/{name}"))?.handle);
    let handles: Vec<u64> = ["same", "replaced", "removed"]
        .into_iter()
        .map(&mut open)
        .collect::<Result<_>>()?;
    for round in 0..2 {
        without_a_core(&site, || {
            if round == 0 {
                std::fs::write(at("new"), "replaced")?;
                std::fs::rename(at("new"), at("replaced"))?;
                std::fs::remove_file(at("removed"))?;
            }
            Ok(())
        })?;
        let mut read = |handle: u64| files.read_at(handle, 0, &buffer, 0, 64);
        ensure!(read(handles[0])? == 4, "round {round}");
        for handle in &handles[1..] {
            let error = read(*handle).err().context("a stale handle reads")?;
            ensure!(
                error.status() == Some(vmgmt_driver::Status::STALE),
                "round {round}: {error}"
            );
        }
    }
    ensure!(buffer.to_vec(0, 4)? == b"same");
    // The name is another file's, which is opened as any.
    let again = files.open_for_reading("work/replaced")?.handle;
    ensure!(files.read_at(again, 0, &buffer, 0, 64)? == 8);
    Ok(())
}

#[test]
fn presence_is_as_before() -> Result<()> {
    let site = site(4)?;
    let vms: Vec<SimulatedVm> = (0..3).map(|number| site.vm(number)).collect::<Result<_>>()?;
    let mut chats: Vec<Client> = vms.iter().map(|vm| vm.ring(Mode::CHAT)).collect::<Result<_>>()?;
    let mut receiver = Receiver::default();
    chats[0].publish(Some("listens"))?;
    chats[0].post_receives(&mut receiver, 4)?;
    chats[1].publish(Some("does not"))?;
    chats[2].publish(Some("is not there any more"))?;
    chats[2].publish(None)?;
    let mut operator = Operator::connect(&site.control())?;
    let mut seen = |chats: &mut Vec<Client>| -> Result<_> {
        let mut ask = |call: &Call| operator.call(call, &[], Some(PATIENCE), &mut |_| true);
        let peers: Peers = serde_json::from_value(ask(&Call::Peers)?)?;
        let mut vms: Vms = serde_json::from_value(ask(&Call::Vms)?)?;
        // (What was counted since this core's start is another matter.)
        vms.vms.iter_mut().for_each(|vm| vm.counters.clear());
        let of_guests: Vec<_> = chats.iter_mut().map(Client::peers).collect::<Result<_, _>>()?;
        let of_guests: Vec<Vec<_>> = of_guests
            .into_iter()
            .map(|peers| {
                peers
                    .into_iter()
                    .map(|peer| (peer.number, peer.name, peer.description, peer.presence))
                    .collect()
            })
            .collect();
        Ok((peers, vms, of_guests))
    };
    let before = seen(&mut chats)?;
    ensure!(
        before.0.peers.len() == 2 && before.0.peers.iter().filter(|peer| peer.listening).count() == 1,
        "{before:?}"
    );
    for round in 0..3 {
        let old = site.daemon.kill_role("core")?;
        site.daemon.wait_for_new("core", old, PATIENCE)?;
        let after = seen(&mut chats)?;
        ensure!(after == before, "round {round}: {before:?} became {after:?}");
    }
    Ok(())
}

#[test]
fn submissions_in_flight_are_answered_once_by_the_next_core() -> Result<()> {
    let site = site(2)?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let mut to = source.ring(Mode::CHAT)?;
    let mut at = target.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    at.post_receives(&mut receiver, 16)?;
    let mut expected = Vec::new();
    for round in 0..5_u32 {
        for number in 0..20_u32 {
            let key = u64::from(round * 1000 + number + 1);
            to.send("vm1", &key.to_le_bytes(), key)?;
            expected.push(key);
            if number == 10 {
                let old = site.daemon.kill_role("core")?;
                site.daemon.wait_for_new("core", old, PATIENCE)?;
            }
        }
    }
    let mut got = Vec::new();
    while got.len() < expected.len() {
        let message = at
            .receive(&mut receiver, deadline())?
            .with_context(|| format!("only {} of {} messages came", got.len(), expected.len()))?;
        got.push(u64::from_le_bytes(message.bytes.as_slice().try_into()?));
        at.post_receives(&mut receiver, 16)?;
    }
    ensure!(
        got == expected,
        "messages were lost, repeated or out of order: {got:?}"
    );
    // And none comes twice.
    to.send("vm1", b"the last", 0)?;
    let last = at
        .receive(&mut receiver, deadline())?
        .context("the last did not come")?;
    ensure!(last.bytes == b"the last", "a message came twice: {last:?}");
    Ok(())
}

#[test]
fn a_transfer_under_way_goes_on_with_the_next_core() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm_with(0, GuestOptions::default().ram_bytes(256 << 20))?;
    let data = pattern(96 << 20, 8);
    std::fs::write(site.share().join("big"), &data)?;
    let mut files = vm.ring(Mode::FILE)?;
    let file = files.open_for_reading("work/big")?;
    let memory = files.allocate(data.len())?;
    let options = TransferOptions {
        check: false,
        ..TransferOptions::default()
    };
    let outcome = std::thread::scope(|scope| {
        let transfer = scope.spawn(|| files.get_into(file.handle, &memory, data.len(), &options));
        for _ in 0..3 {
            let Ok(old) = site.daemon.kill_role("core") else {
                break;
            };
            site.daemon.wait_for_new("core", old, PATIENCE)?;
        }
        transfer
            .join()
            .map_err(|_| anyhow::anyhow!("the transfer panicked"))
    })?;
    ensure!(outcome?.bytes == data.len() as u64);
    ensure!(
        memory.to_vec(0, data.len())? == data,
        "the bytes are not the same"
    );
    let (again, done) = files.get_to_memory("work/big", &TransferOptions::default())?;
    ensure!(done.bytes == data.len() as u64 && again.to_vec(0, data.len())? == data);
    Ok(())
}

#[test]
fn a_ring_opened_while_there_is_no_core_opens_when_there_is() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    for _ in 0..3 {
        site.daemon.kill_role("core")?;
        echoes(&mut vm.ring(Mode::COMMON)?)?;
    }
    Ok(())
}

/// Cores die at most so far apart.
const APART: Duration = Duration::from_millis(40);

#[test]
fn a_guest_that_puts_and_names_files_sees_no_error_however_often_cores_die() -> Result<()> {
    let site = site(1)?;
    let pids = site.pids()?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let mut deaths = 0;
    for round in 0..6_u64 {
        let data = pattern((4 << 20) + 77, round);
        let (_, died) = while_cores_die(&site.daemon, round * 77 + 5, APART, PATIENCE, || {
            let at = |name: &str| format!("work/{name}-{round}");
            for number in 0..4 {
                let name = at(&format!("f{number}"));
                let got = super::files::put_bytes(&mut files, &name, &data, 0, true).context("put")?;
                ensure!(got == name, "it got the name {got}");
            }
            files.make_directory(&at("d")).context("make directory")?;
            files
                .rename(&at("f0"), &format!("{}/moved", at("d")), 0, true)
                .context("rename")?;
            files.remove(&at("f1")).context("remove")?;
            let name = at("f2");
            let (memory, done) = files
                .get_to_memory(&name, &TransferOptions::default())
                .context("get")?;
            ensure!(done.bytes == data.len() as u64 && memory.to_vec(0, data.len())? == data);
            Ok(())
        })
        .with_context(|| format!("round {round}"))?;
        deaths += died;
        for name in [
            format!("d-{round}/moved"),
            format!("f2-{round}"),
            format!("f3-{round}"),
        ] {
            ensure!(
                std::fs::read(site.share().join(&name))? == data,
                "{name} is different"
            );
        }
        ensure!(!site.share().join(format!("f0-{round}")).exists());
        ensure!(!site.share().join(format!("f1-{round}")).exists());
    }
    ensure!(deaths >= 6, "only {deaths} cores died");
    let (keeper, front) = (site.pids()?.keeper, site.pids()?.front);
    ensure!((keeper, front) == (pids.keeper, pids.front));
    Ok(())
}

#[test]
fn a_file_goes_from_vm_to_vm_while_cores_die() -> Result<()> {
    let site = site(2)?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    for round in 0..5_u64 {
        let data = pattern((12 << 20) + 5, round + 40);
        let (got, _) = while_cores_die(&site.daemon, round * 131 + 7, APART, PATIENCE, || {
            std::thread::scope(|scope| {
                let receiver = scope.spawn(|| super::streams::receive(&target));
                super::streams::send(&source, "vm1", "a file", &data).context("the sender")?;
                receiver
                    .join()
                    .map_err(|_| anyhow::anyhow!("the receiver panicked"))?
                    .context("the receiver")
            })
        })
        .with_context(|| format!("round {round}"))?;
        ensure!(got.2 == data, "round {round}: the bytes are different");
    }
    Ok(())
}

/// An operator asks again every 50 ms: most lives are to be long enough that it comes.
const OPERATORS_APART: Duration = Duration::from_millis(400);

/// What `vmgmtctl push` and `pull` do: one request with a key, made again by the client when the core is gone.
fn operate(site: &Site, call: Call, file: &std::fs::File) -> Result<Transferred> {
    let mut client = Operator::connect(&site.control())?;
    let answer = client.call(&call, &[file.as_fd()], Some(PATIENCE), &mut |_| true)?;
    Ok(serde_json::from_value(answer)?)
}

#[test]
fn files_of_the_operator_go_both_ways_while_cores_die() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let wait_ms = u64::try_from(PATIENCE.as_millis())?;
    for round in 0..3_u64 {
        let data = pattern((12 << 20) + 5, round + 60);
        let crc32 = format!("{:08x}", crc32fast::hash(&data));
        let file = tempfile::tempfile()?;
        std::os::unix::fs::FileExt::write_all_at(&file, &data, 0)?;
        let push = Call::Push(Push {
            to: "vm0".into(),
            name: "pushed".into(),
            wait_ms,
            key: Some(new_key()),
        });
        let work = || {
            std::thread::scope(|scope| {
                let receiver = scope.spawn(|| super::streams::receive(&vm));
                let done = operate(&site, push, &file).context("push")?;
                let got = receiver.join().map_err(|_| anyhow::anyhow!("the VM panicked"))?;
                Ok((done, got.context("the VM")?))
            })
        };
        let ((done, got), _) = while_cores_die(&site.daemon, round * 57 + 3, OPERATORS_APART, PATIENCE, work)
            .with_context(|| format!("round {round}"))?;
        ensure!(got.2 == data, "round {round}: the bytes are different");
        ensure!(
            (done.bytes, &done.crc32) == (data.len() as u64, &crc32),
            "{done:?}"
        );

        let file = tempfile::tempfile()?;
        let pull = Call::Pull(Pull {
            from: "vm0".into(),
            path: "pulled".into(),
            wait_ms,
            key: Some(new_key()),
        });
        let work = || {
            std::thread::scope(|scope| {
                let served = scope.spawn(|| -> Result<()> {
                    let mut files = vm.ring(Mode::FILE)?;
                    let posted = files.post_next_offer()?;
                    let offer = files.next_offer(posted, deadline())?.context("no request came")?;
                    ensure!(offer.is_request && offer.file_name == "pulled", "{offer:?}");
                    super::streams::answer(&mut files, offer.handle, &data)
                });
                let done = operate(&site, pull, &file).context("pull")?;
                served.join().map_err(|_| anyhow::anyhow!("the VM panicked"))??;
                Ok(done)
            })
        };
        let (done, _) = while_cores_die(&site.daemon, round * 91 + 5, OPERATORS_APART, PATIENCE, work)
            .with_context(|| format!("round {round}"))?;
        ensure!(
            (done.bytes, &done.crc32) == (data.len() as u64, &crc32),
            "{done:?}"
        );
        let mut got = vec![0; data.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, 0)?;
        ensure!(got == data, "round {round}: the pulled bytes are different");
    }
    Ok(())
}
