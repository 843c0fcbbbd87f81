//! A new core that fails between "go" and READY, when it has sessions in hand: the old program goes on from where it stopped.

use super::*;
use vmgmt_testkit::guest::GuestOptions;

/// Bytes of the file that is put again and again.
const PUT_BYTES: usize = (1 << 20) + 13;

/// Puts a file over and over; how often. Each is whole, and what the last one put is there.
fn put_files(site: &Site, vm: &SimulatedVm, stop: &AtomicBool) -> Result<u64> {
    let mut files = vm.ring(Mode::FILE)?;
    let memory = files.allocate(PUT_BYTES)?;
    let options = TransferOptions::default();
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) || count == 0 {
        count += 1;
        let data = pattern(PUT_BYTES, count as usize);
        memory.write(0, &data)?;
        let name = format!("put-{count}");
        files.put_from_memory(&format!("work/{name}"), &memory, PUT_BYTES, 0, &options)?;
        ensure!(
            std::fs::read(site.share().join(&name))? == data,
            "{name} is not whole"
        );
        std::fs::remove_file(site.share().join(&name))?;
    }
    Ok(count)
}

#[test]
fn a_core_that_fails_before_it_serves_has_touched_nothing() -> Result<()> {
    const WHERE: [&str; 3] = ["adopt-1", "adopt-3", "ready"];
    let folder = tempfile::tempdir()?;
    let mut faults = Vec::new();
    let mut programs = Vec::new();
    for place in WHERE {
        for (what, why) in [
            ("abort", "SIGABRT"),
            ("hang", "not able to take over within 10 s"),
        ] {
            let name = format!("{place}-{what}");
            // Any state that it writes is one that the old program cannot read.
            faults.push(format!("{place}@{name}={what},snapshot@{name}=of another kind"));
            programs.push((program(folder.path(), &name)?, why));
        }
    }
    let site = SitePlan::new(DAEMON, 4)
        .variable("VMGMT_FAULT", &faults.join(","))
        .start()?;
    let data = pattern(8 << 20, 3);
    std::fs::write(site.share().join("big"), &data)?;
    let large = || GuestOptions::default().ram_bytes(64 << 20);
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let (reader, writer) = (site.vm_with(2, large())?, site.vm_with(3, large())?);
    let stop = AtomicBool::new(false);
    let results = std::thread::scope(|scope| {
        let threads = [
            scope.spawn(|| receive_messages(&target)),
            scope.spawn(|| send_messages(&source, &stop)),
            scope.spawn(|| read_files(&reader, &data, &stop)),
            scope.spawn(|| put_files(&site, &writer, &stop)),
        ];
        let tried = programs.iter().try_for_each(|(path, why)| {
            let before = site.daemon.role("core")?;
            let report = upgrade(&site, path)?;
            ensure!(
                report.state == UpgradeState::RolledBack,
                "{}: {report:?}",
                path.display()
            );
            // One that hangs is killed by whoever is the first to have waited for too long.
            let stuck = report.reason.contains("it stood still");
            ensure!(
                report.reason.contains("before it served")
                    && (report.reason.contains(why) || (stuck && why.contains("10 s"))),
                "{report:?}"
            );
            ensure!(program_of_core(&site)? == Path::new(DAEMON) && site.daemon.role("core")? != before);
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let results: Result<Vec<_>> = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
            .collect();
        tried.and(results)
    })
    .with_context(|| site.daemon.log().tail())?;
    let [received, sent, read, put] = results[..] else {
        anyhow::bail!("{results:?}");
    };
    println!("{sent} messages, {read} files read, {put} put");
    ensure!(sent == received && sent > 0, "{sent} sent, {received} received");
    let text = site.daemon.log().text();
    ensure!(!text.contains("quarantined") && !text.contains("died"), "{text}");
    Ok(())
}

#[test]
fn an_upgrade_whose_old_program_does_not_come_back_either_ends_and_another_helps() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let broken = folder.path().join("broken");
    let faults = format!("ready@bad=abort,start@vmgmtd?{}=abort", broken.display());
    let site = SitePlan::new(DAEMON, 1)
        .variable("VMGMT_FAULT", &faults)
        .start()?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::COMMON)?;
    ring.noop()?;
    // From now on the old program cannot be started any more.
    std::fs::write(&broken, "")?;
    let report = upgrade(&site, &program(folder.path(), "bad")?)?;
    ensure!(report.state == UpgradeState::RolledBack, "{report:?}");
    for why in ["before it served", "the old program does not serve", "SIGABRT"] {
        ensure!(report.reason.contains(why), "{report:?}");
    }
    let report = upgrade(&site, &program(folder.path(), "good")?)?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    ring.noop()?;
    Ok(())
}

/// A program that reads only what version 1 could: see `reads` in the table of faults.
#[test]
fn going_back_is_possible_while_nothing_new_is_in_use_and_refused_by_name_else() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let site = SitePlan::new(DAEMON, 2)
        .variable("VMGMT_FAULT", "reads@before=version 1")
        .start()?;
    std::fs::write(site.share().join("file"), b"contents")?;
    let before = program(folder.path(), "before")?;
    let (vm, other) = (site.vm(0)?, site.vm(1)?);
    let mut chat = vm.ring(Mode::CHAT)?;
    chat.send("vm1", b"kept", 1)?;
    let mut files = vm.ring(Mode::FILE)?;
    let file = files.open_for_reading("work/file")?;
    let report = upgrade(&site, &before)?;
    ensure!(
        report.state == UpgradeState::Denied && report.reason.contains("\"open-files\""),
        "{report:?}"
    );
    files.close(file.handle)?;
    let report = upgrade(&site, &before)?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    ensure!(program_of_core(&site)? == before);
    // And forward again, with what the old program has done.
    chat.send("vm1", b"more", 2)?;
    let report = upgrade(&site, Path::new(DAEMON))?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    let mut at = other.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    at.post_receives(&mut receiver, 4)?;
    for expected in [&b"kept"[..], b"more"] {
        let message = at.receive(&mut receiver, deadline())?.context("no message")?;
        ensure!(message.bytes == expected, "{message:?}");
    }
    files.open_for_reading("work/file").map(drop)?;
    Ok(())
}

#[test]
fn the_newest_words_that_both_programs_speak_are_spoken_there_and_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let faults = "speaks@next=1-2,speaks@far=3-4";
    let site = SitePlan::new(DAEMON, 1).variable("VMGMT_FAULT", faults).start()?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::COMMON)?;
    let (next, far) = (program(folder.path(), "next")?, program(folder.path(), "far")?);
    let spoken = |site: &Site, life: u64, version: u32| {
        let line = format!("core life {life} speaks version {version} of the roles' words");
        site.daemon.log().wait_for(&line, PATIENCE)
    };
    spoken(&site, 1, 1)?;
    // Under a keeper that does not speak the new words, the new core speaks the old ones.
    let report = upgrade_parts(&site, &next, vec![])?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    spoken(&site, 2, 1)?;
    // The keeper is new, too, now.
    let old = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", old, PATIENCE)?;
    spoken(&site, 3, 2)?;
    ring.noop()?;
    // (Whom the keeper has answered until then it lets go when it hears that the core is ready.)
    wait_until("the core to answer operators", PATIENCE, || {
        Ok((status(&site)?.answered_by == "core").then_some(()))
    })?;
    // What has left the old words behind cannot follow a keeper that speaks no others than the first two.
    let report = upgrade(&site, &far)?;
    let why = "the keeper speaks versions 1 to 2 of the roles' words, this program 3 to 4";
    ensure!(
        report.state == UpgradeState::Denied && report.reason.contains(why),
        "{report:?}"
    );
    // And back: the old core under the new keeper.
    let report = upgrade_parts(&site, Path::new(DAEMON), vec![])?;
    ensure!(report.state == UpgradeState::Done, "{report:?}");
    spoken(&site, 4, 1)?;
    ring.noop()?;
    Ok(())
}
