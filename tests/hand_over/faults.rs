//! A fault of the front's own in one session ends that session alone; and a VM that comes again finds its mail, whoever serves now.
//!
//! The front really panics, by `VMGMT_FAULT`, which debug builds honour.

use super::*;
use std::time::SystemTime;
use vmgmt_ctl::protocol::{SendMessage, Sent, VmState, new_key};
use vmgmt_driver::abi::registers::DOORBELLS;
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_testkit::client::ClientError as DeviceError;
use vmgmt_testkit::guest::SimulatedVm;

/// The host's mail for vm0.
fn mail(site: &Site, text: &str) -> Result<()> {
    let send = SendMessage {
        to: "vm0".into(),
        text: Some(text.into()),
        key: Some(new_key()),
        ..SendMessage::default()
    };
    call::<Sent>(site, &Call::Send(send))?;
    Ok(())
}

/// That a VM finds its mail, in order.
fn finds(vm: &SimulatedVm, texts: &[&str]) -> Result<()> {
    let mut chat = vm.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    for text in texts {
        chat.post_receives(&mut receiver, 4)?;
        let deadline = Some(Instant::now() + PATIENCE);
        let message = chat.receive(&mut receiver, deadline)?.context("no mail")?;
        ensure!(message.bytes == text.as_bytes(), "{message:?} instead of {text}");
    }
    Ok(())
}

/// vm1 gets a file and sends vm2 messages, all the time; `act` has some of it before, and more after.
fn under_traffic(site: &Site, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let (one, other) = (site.vm(1)?, site.vm(2)?);
    let data: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(site.share().join("down"), &data)?;
    let (over, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| -> Result<()> {
            let (mut files, mut to, mut at) = (
                one.ring(Mode::FILE)?,
                one.ring(Mode::CHAT)?,
                other.ring(Mode::CHAT)?,
            );
            let mut receiver = Receiver::default();
            while !over.load(Ordering::Relaxed) {
                let round = rounds.load(Ordering::Relaxed);
                let (memory, _) = files.get_to_memory("work/down", &TransferOptions::default())?;
                ensure!(memory.to_vec(0, data.len())? == data, "another file came back");
                at.post_receives(&mut receiver, 4)?;
                to.send("vm2", &round.to_le_bytes(), round + 1)?;
                let deadline = Some(Instant::now() + PATIENCE);
                let message = at.receive(&mut receiver, deadline)?.context("no message")?;
                ensure!(
                    message.bytes == round.to_le_bytes(),
                    "{message:?} in round {round}"
                );
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let more = || {
            let before = rounds.load(Ordering::Relaxed);
            wait_until("more rounds", PATIENCE, || {
                let enough = rounds.load(Ordering::Relaxed) > before + 1 || worker.is_finished();
                Ok(enough.then_some(()))
            })
        };
        let acted = more().and_then(|()| act()).and_then(|()| more());
        over.store(true, Ordering::Relaxed);
        let worked = worker.join().map_err(|_| anyhow::anyhow!("a guest panicked"))?;
        worked.with_context(|| site.daemon.log().tail())?;
        acted
    })
}

/// Writes the value at which the front panics (`VMGMT_FAULT`); the device ends.
fn hit(vm: &SimulatedVm) -> Result<()> {
    let said = vm.backing().with_client(|client| {
        client.region_write_posted(0, DOORBELLS.into(), b"boom")?;
        client.read_u32(0, 0)
    });
    ensure!(matches!(said, Err(DeviceError::Closed)), "{said:?}");
    Ok(())
}

/// Waits until a process uses no processor time from one look to the next, many times.
fn comes_to_rest(pid: u32) -> Result<()> {
    let (mut before, mut times) = (String::new(), 0);
    wait_until("a process at rest", PATIENCE, || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields = stat.rsplit_once(") ").context("no stat")?.1.split(' ');
        let used = fields.skip(11).take(2).collect::<Vec<_>>().join(" ");
        times = if used == before { times + 1 } else { 0 };
        before = used;
        Ok((times == 3 * LOOKS_AT_REST).then_some(()))
    })
}

/// What the status says of a VM, as soon as a core says anything.
fn vm_state(site: &Site, name: &str) -> Result<VmState> {
    let status = wait_until("a core's status", PATIENCE, || {
        let status: Option<Status> = call(site, &Call::Status).ok();
        Ok(status.filter(|status| status.answered_by == "core"))
    })?;
    let mut states = status.vm_states.into_iter();
    states.find(|vm| vm.name == name).context("no such VM")
}

/// That the status tells of vm0's fault, when it was and what it cost, and of no other VM's.
fn is_told(site: &Site, ends: bool, since: SystemTime) -> Result<()> {
    let vm0 = wait_until("the fault in the status", PATIENCE, || {
        Ok(Some(vm_state(site, "vm0")?).filter(|vm| vm.last_fault.is_some()))
    })?;
    let fault = vm0.last_fault.clone().context("no fault")?;
    ensure!(
        fault.text.contains("VM \"vm0\"") && fault.text.contains("device_del"),
        "{fault:?}"
    );
    ensure!(fault.text.contains("its end failed too") == ends, "{fault:?}");
    let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(fault.time_ns);
    ensure!(since <= at && at <= SystemTime::now(), "{fault:?}");
    let other = vm_state(site, "vm1")?;
    ensure!(
        (other.state.as_str(), &other.last_fault) == ("connected", &None),
        "{other:?}"
    );
    Ok(())
}

/// The front has a fault of its own in vm0's session: `ends`: in its end, too.
fn a_fault_of_the_front(ends: bool) -> Result<()> {
    let faults = if ends {
        "register=boom,end=vm0"
    } else {
        "register=boom"
    };
    let site = SitePlan::new(DAEMON, 3).variable("VMGMT_FAULT", faults).start()?;
    let before = site.pids()?;
    let begin = SystemTime::now();
    let again = || wait_until("the VM's return", PATIENCE, || Ok(site.vm(0).ok()));
    under_traffic(&site, || {
        let vm0 = site.vm(0)?;
        vm0.ring(Mode::CHAT)?.noop()?;
        mail(&site, "one")?;
        hit(&vm0)?;
        mail(&site, "two")?;
        let vm0 = again()?;
        finds(&vm0, &["one", "two"])?;
        let core = match ends {
            // Its death is what tells that nobody reaches the VM's memory any more.
            true => site.daemon.wait_for_new("core", before.core, PATIENCE)?,
            false => before.core,
        };
        let after = site.pids()?;
        ensure!((after.keeper, after.front, after.core) == (before.keeper, before.front, core));
        is_told(&site, ends, begin)?;
        // And all of it goes on: a hand-over, a death of the core, another fault.
        done(&site, None, Part::Front)?;
        done(&site, None, Part::Keeper)?;
        let core = site.daemon.kill_role("core")?;
        site.daemon.wait_for_new("core", core, PATIENCE)?;
        vm0.ring(Mode::COMMON)?.noop()?;
        // Whoever serves now knows of the fault of before, and then of the next.
        is_told(&site, ends, begin)?;
        let next = SystemTime::now();
        hit(&vm0)?;
        let vm0 = again()?;
        vm0.ring(Mode::COMMON)?.noop().context("the VM that came again")?;
        wait_until("the next fault in the status", PATIENCE, || {
            Ok(is_told(&site, ends, next).ok())
        })?;
        ensure!(vm_state(&site, "vm0")?.state == "connected");
        Ok(())
    })?;
    let log = site.daemon.log();
    let told = "a fault of ours in the device of vm0: the device ends";
    log.wait_for_count(told, 2 + usize::from(ends), PATIENCE)?;
    ensure!(log.text().contains("device_del and device_add"));
    comes_to_rest(site.daemon.role("front")?)?;
    // Each was said once. (With a fault in its end: two panics at each hit, and one when the VM leaves at last.)
    let text = log.text();
    let (panics, lines) = (text.matches("panicked at").count(), text.matches(told).count());
    ensure!(lines == 2 + usize::from(ends), "{lines} lines:\n{text}");
    ensure!(panics == if ends { 5 } else { 2 }, "{panics} panics:\n{text}");
    // No core is blamed, nor whoever it worked for at that time.
    ensure!(
        !text.contains("it stood still") && !text.contains("quarantined"),
        "{text}"
    );
    ensure!(!text.contains("vm1: the device") && !text.contains("vm2: the device"));
    Ok(())
}

#[test]
fn a_fault_of_the_front_in_one_session_ends_that_session_alone() -> Result<()> {
    a_fault_of_the_front(false)
}

#[test]
fn so_does_a_fault_in_its_end_at_the_price_of_a_core() -> Result<()> {
    a_fault_of_the_front(true)
}

#[test]
fn a_vm_that_comes_again_finds_its_mail_though_core_and_front_are_others() -> Result<()> {
    let site = SitePlan::new(DAEMON, 1).start()?;
    let vm = site.vm(0)?;
    vm.ring(Mode::CHAT)?.noop()?;
    mail(&site, "while it was there")?;
    drop(vm);
    mail(&site, "while it was away")?;
    let core = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", core, PATIENCE)?;
    mail(&site, "to another core")?;
    done(&site, None, Part::Front)?;
    mail(&site, "behind another front")?;
    let core = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", core, PATIENCE)?;
    let texts = [
        "while it was there",
        "while it was away",
        "to another core",
        "behind another front",
    ];
    finds(&site.vm(0)?, &texts)
}
