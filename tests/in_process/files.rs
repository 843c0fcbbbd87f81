//! File mode: put, get, list, stat, rename, remove, resume; whole, or not there.

use super::*;
use std::os::fd::AsFd;
use vmgmt_driver::abi::file::{existing, kind, put};
use vmgmt_driver::transfer::Descriptor;
use vmgmt_driver::{Status, abi::file::SIZE_UNKNOWN};

/// A file of this process with these bytes, read from its start.
fn source(data: &[u8]) -> Result<std::fs::File> {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile()?;
    file.write_all(data)?;
    file.rewind()?;
    Ok(file)
}

fn names(site: &Site) -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(site.share())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// Puts, from a descriptor as the guest's tool does.
pub(crate) fn put_bytes(
    client: &mut Client,
    path: &str,
    data: &[u8],
    how: u64,
    announce: bool,
) -> Result<String> {
    let file = source(data)?;
    let size = if announce { data.len() as u64 } else { SIZE_UNKNOWN };
    let begun = client.put(path, size, how)?;
    let mut input = Descriptor::new(file.as_fd(), "source");
    let done = client.write_all(
        begun.handle,
        None,
        &mut input,
        &TransferOptions::default(),
        &mut |_| {},
    )?;
    let committed = client.commit(begun.handle, done.bytes, done.checksum, false);
    if committed.is_err() {
        // A put whose commit was refused can be committed otherwise; it is given up here.
        client.close(begun.handle)?;
    }
    Ok(committed?)
}

#[test]
fn what_is_put_is_there_and_what_is_got_is_the_same() -> Result<()> {
    let site = site(1)?;
    let pids = site.pids()?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    for (number, bytes) in [0, 1, 4095, 4096, 4097, 1 << 20, (3 << 20) + 17, 20 << 20]
        .into_iter()
        .enumerate()
    {
        for announce in [true, false] {
            let name = format!("file-{number}-{announce}");
            let data = pattern(bytes, number as u64);
            let got = put_bytes(
                &mut files,
                &format!("work/{name}"),
                &data,
                existing::REFUSE,
                announce,
            )
            .with_context(|| format!("putting {bytes} bytes"))?;
            ensure!(got.ends_with(&name), "it got the name {got}");
            ensure!(
                std::fs::read(site.share().join(&name))? == data,
                "{bytes} bytes are not the same on the host"
            );
            let (memory, done) = files.get_to_memory(&format!("work/{name}"), &TransferOptions::default())?;
            ensure!(
                done.bytes == bytes as u64 && memory.to_vec(0, bytes)? == data,
                "{bytes} bytes came back different"
            );
        }
    }
    ensure!(
        names(&site)?.iter().all(|name| name.starts_with("file-")),
        "{:?}",
        names(&site)?
    );
    site.check_unharmed(pids)
}

#[test]
fn scattered_memory_carries_the_same_files() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm_with(0, GuestOptions::default().scattered())?;
    let mut files = vm.ring(Mode::FILE)?;
    let data = pattern((5 << 20) + 4099, 9);
    put_bytes(&mut files, "work/a", &data, existing::REFUSE, true)?;
    ensure!(std::fs::read(site.share().join("a"))? == data);
    let (memory, _) = files.get_to_memory("work/a", &TransferOptions::default())?;
    ensure!(memory.to_vec(0, data.len())? == data);
    Ok(())
}

#[test]
fn names_are_made_listed_renamed_and_removed() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    for (way, mut files) in [("ring", vm.ring(Mode::FILE)?), ("ports", vm.ports(Mode::FILE)?)] {
        let at = |name: &str| format!("work/{way}/{name}");
        files.make_directory(&format!("work/{way}"))?;
        for number in 0..30 {
            put_bytes(
                &mut files,
                &at(&format!("f{number:02}")),
                b"some bytes",
                existing::REFUSE,
                true,
            )?;
        }
        let mut listed: Vec<String> = files
            .list(&format!("work/{way}"))?
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        listed.sort();
        ensure!(
            listed == (0..30).map(|n| format!("f{n:02}")).collect::<Vec<_>>(),
            "{way}: {listed:?}"
        );
        let stat = files.stat(&at("f07"))?;
        ensure!(stat.size == 10 && stat.kind == kind::FILE, "{way}: {stat:?}");
        ensure!(files.stat(&format!("work/{way}"))?.kind == kind::DIRECTORY);
        files.rename(&at("f07"), &at("seven"), existing::REFUSE, false)?;
        let refused = files.rename(&at("f08"), &at("seven"), existing::REFUSE, false);
        ensure!(refused.is_err_and(|error| error.status() == Some(Status::EXISTS)));
        files.rename(&at("f08"), &at("seven"), existing::REPLACE, true)?;
        for name in (0..30)
            .filter(|n| !(7..9).contains(n))
            .map(|n| format!("f{n:02}"))
        {
            files.remove(&at(&name))?;
        }
        let full = files.remove(&format!("work/{way}"));
        ensure!(full.is_err_and(|error| error.status() == Some(Status::NOT_EMPTY)));
        files.remove(&at("seven"))?;
        files.remove(&format!("work/{way}"))?;
        let gone = files.stat(&at("seven"));
        ensure!(gone.is_err_and(|error| error.status() == Some(Status::NO_SUCH_NAME)));
    }
    Ok(())
}

#[test]
fn an_existing_target_is_refused_replaced_or_renamed() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    put_bytes(&mut files, "work/a.txt", b"first", existing::REFUSE, true)?;
    let refused = put_bytes(&mut files, "work/a.txt", b"second", existing::REFUSE, true);
    ensure!(refused.is_err(), "an existing file was overwritten");
    ensure!(std::fs::read(site.share().join("a.txt"))? == b"first");
    let name = put_bytes(&mut files, "work/a.txt", b"second", existing::RENAME, true)?;
    ensure!(name.ends_with("a.1.txt"), "{name}");
    put_bytes(&mut files, "work/a.txt", b"third", existing::REPLACE, true)?;
    ensure!(std::fs::read(site.share().join("a.txt"))? == b"third");
    ensure!(names(&site)? == ["a.1.txt", "a.txt"], "{:?}", names(&site)?);
    Ok(())
}

#[test]
fn a_wrong_checksum_leaves_no_file() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let data = pattern(100_000, 5);
    let begun = files.put("work/x", 100_000, 0)?;
    let file = source(&data)?;
    let mut input = Descriptor::new(file.as_fd(), "source");
    let done = files.write_all(
        begun.handle,
        None,
        &mut input,
        &TransferOptions::default(),
        &mut |_| {},
    )?;
    let outcome = files.commit(
        begun.handle,
        done.bytes,
        done.checksum.map(|checksum| checksum ^ 1),
        false,
    );
    ensure!(
        outcome
            .as_ref()
            .is_err_and(|error| error.status() == Some(Status::INTEGRITY)),
        "{outcome:?}"
    );
    ensure!(names(&site)?.is_empty(), "{:?}", names(&site)?);
    Ok(())
}

#[test]
fn a_put_that_broke_off_resumes_where_it_was() -> Result<()> {
    let site = site(1)?;
    let data = pattern(6 << 20, 11);
    let half = 3 << 20;
    {
        let vm = site.vm(0)?;
        let mut files = vm.ring(Mode::FILE)?;
        let begun = files.put("work/big", data.len() as u64, put::RESUME)?;
        ensure!(begun.resumed_bytes == 0);
        let file = source(data.get(..half).context("slice")?)?;
        let mut input = Descriptor::new(file.as_fd(), "source");
        files.write_all(
            begun.handle,
            None,
            &mut input,
            &TransferOptions::default(),
            &mut |_| {},
        )?;
        // The guest dies here.
        vm.backing().vanish();
    }
    ensure!(!site.share().join("big").exists(), "half a file became visible");
    let vm =
        vmgmt_testkit::process::wait_until("the VM's place to be free", PATIENCE, || Ok(site.vm(0).ok()))?;
    let mut files = vm.ring(Mode::FILE)?;
    let begun = files.put("work/big", data.len() as u64, put::RESUME)?;
    ensure!(
        begun.resumed_bytes == half as u64,
        "it goes on at {}",
        begun.resumed_bytes
    );
    // The prefix is compared before anything is added to it.
    let (_, theirs) = files.checksum(begun.handle, 0, half as u64)?;
    let mut file = source(&data)?;
    let mine = files.skip(
        &mut Descriptor::new(file.as_fd(), "source"),
        half as u64,
        &TransferOptions::default(),
    )?;
    ensure!(mine == theirs);
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(half as u64))?;
    let mut input = Descriptor::new(file.as_fd(), "source");
    let prefix = Some((half as u64, mine));
    let done = files.write_all(
        begun.handle,
        prefix,
        &mut input,
        &TransferOptions::default(),
        &mut |_| {},
    )?;
    ensure!(done.checksum == Some(crc32fast::hash(&data)));
    files.commit(begun.handle, done.bytes, done.checksum, true)?;
    ensure!(std::fs::read(site.share().join("big"))? == data);
    Ok(())
}

#[test]
fn no_name_leads_out_of_the_share() -> Result<()> {
    let site = site(1)?;
    std::fs::write(site.daemon.path("secret"), "secret")?;
    std::os::unix::fs::symlink(site.daemon.path("secret"), site.share().join("link"))?;
    std::os::unix::fs::symlink("/etc", site.share().join("etc"))?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    for path in [
        "work/../secret",
        "work/link",
        "work/etc/passwd",
        "work//etc/passwd",
        "/etc/passwd",
        "work/./link",
        "../work/x",
        "other/x",
        "work/a\0b",
        "",
        "work/\u{0}",
    ] {
        for how in [1, 3] {
            let outcome = files.open_file(path, how);
            ensure!(outcome.is_err(), "{path:?} was opened: {outcome:?}");
        }
        ensure!(
            files
                .put(path, 1, existing::REPLACE)
                .and_then(|put| files.commit(put.handle, 0, None, false))
                .is_err()
                || path == "work/link",
            "{path:?} was put"
        );
    }
    ensure!(std::fs::read(site.daemon.path("secret"))? == b"secret");
    Ok(())
}

#[test]
fn a_guest_sees_what_the_quota_of_a_share_leaves() -> Result<()> {
    let site = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 1)
        .share_line("bytes-max = \"1 MiB\"")
        .start()?;
    let vm = site.vm(0)?;
    let mut files = vm.ring(Mode::FILE)?;
    let left = |files: &mut Client| -> Result<Option<u64>> { Ok(files.shares()?[0].bytes_left) };
    assert_eq!(left(&mut files)?, Some(1 << 20));
    put_bytes(
        &mut files,
        "work/some",
        &pattern(300_000, 1),
        existing::REFUSE,
        true,
    )?;
    assert_eq!(left(&mut files)?, Some((1 << 20) - 300_000));
    let refused = put_bytes(
        &mut files,
        "work/more",
        &pattern(1 << 20, 2),
        existing::REFUSE,
        true,
    )
    .unwrap_err();
    assert!(format!("{refused:#}").contains("share"), "{refused:#}");
    files.remove("work/some")?;
    assert_eq!(left(&mut files)?, Some(1 << 20));
    Ok(())
}
