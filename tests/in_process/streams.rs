//! VM to VM: an offer, its answer, and the bytes from one memory to the other.

use super::*;
use std::os::fd::AsFd;
use vmgmt_driver::transfer::Descriptor;
use vmgmt_driver::{DriverError, Status};

fn file_of(data: &[u8]) -> Result<std::fs::File> {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile()?;
    file.write_all(data)?;
    file.rewind()?;
    Ok(file)
}

/// Offers and sends; what the receiver said in the end.
pub(crate) fn send(vm: &SimulatedVm, target: &str, name: &str, data: &[u8]) -> Result<()> {
    let mut files = vm.ring(Mode::FILE)?;
    let stream = files.offer(target, name, Some(data.len() as u64), 0, Some(PATIENCE))?;
    pour(&mut files, stream, data)
}

/// Gives the host what it asked for.
pub(crate) fn answer(files: &mut Client, request: u64, data: &[u8]) -> Result<()> {
    let stream = files.offer("host", "answer", Some(data.len() as u64), request, Some(PATIENCE))?;
    pour(files, stream, data)
}

fn pour(files: &mut Client, stream: u64, data: &[u8]) -> Result<()> {
    let file = file_of(data)?;
    let mut source = Descriptor::new(file.as_fd(), "source");
    files.stream_send(stream, &mut source, &TransferOptions::default(), &mut |_| {})?;
    Ok(())
}

/// Waits for an offer and takes it in.
pub(crate) fn receive(vm: &SimulatedVm) -> Result<(String, String, Vec<u8>)> {
    receive_on(&mut vm.ring(Mode::FILE)?)
}

fn receive_on(files: &mut Client) -> Result<(String, String, Vec<u8>)> {
    let posted = files.post_next_offer()?;
    let offer = files.next_offer(posted, deadline())?.context("no offer came")?;
    let stream = files.accept(offer.handle)?;
    let file = tempfile::tempfile()?;
    let mut sink = Descriptor::new(file.as_fd(), "target");
    let (done, theirs) = files.stream_receive(stream, &mut sink, &TransferOptions::default(), &mut |_| {})?;
    ensure!(theirs.is_some() && done.matches(theirs), "checksums differ");
    files.stream_confirm(stream, Status::OK)?;
    let mut data = vec![0; usize::try_from(done.bytes)?];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut data, 0)?;
    Ok((offer.source_name, offer.file_name, data))
}

#[test]
fn a_file_goes_from_vm_to_vm() -> Result<()> {
    let site = site(2)?;
    let pids = site.pids()?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    for bytes in [0, 1, 4096, (7 << 20) + 5] {
        let data = pattern(bytes, 21);
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| receive(&target));
            send(&source, "vm1", "a file", &data)?;
            let (from, name, got) = receiver
                .join()
                .map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
            ensure!(from == "vm0" && name == "a file", "{name} from {from}");
            ensure!(got == data, "{bytes} bytes came different");
            Ok(())
        })
        .with_context(|| format!("{bytes} bytes"))?;
    }
    site.check_unharmed(pids)
}

/// `vmgmt cp` waits; then the receiver's program opens its device, which resets it, as vfio does at each open.
#[test]
fn an_offer_without_a_deadline_waits_for_a_receiver_that_opens_its_device() -> Result<()> {
    let site = site(2)?;
    let pids = site.pids()?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let data = pattern(3 << 20, 5);
    let backing = target.backing().clone();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<()> {
            let mut files = source.ring(Mode::FILE)?;
            let stream = files.offer("vm1", "patient", Some(data.len() as u64), 0, None)?;
            pour(&mut files, stream, &data)
        });
        // That it is offered is known by one that sees it, and ends without a word.
        let mut files = target.ring(Mode::FILE)?;
        let posted = files.post_next_offer()?;
        files.next_offer(posted, deadline())?.context("no offer came")?;
        drop(files);
        drop(target);
        let device = vmgmt_driver::Device::open(backing)?;
        let ring = vmgmt_driver::Ring::open(&device, vmgmt_driver::RingOptions::new(Mode::FILE))?;
        let received = receive_on(&mut Client::new(ring));
        sender
            .join()
            .map_err(|_| anyhow::anyhow!("the sender panicked"))?
            .context("the sender")?;
        let (from, name, got) = received?;
        ensure!(
            from == "vm0" && name == "patient" && got == data,
            "{name} from {from} came different"
        );
        Ok(())
    })?;
    site.check_unharmed(pids)
}

#[test]
fn an_offer_may_be_refused() -> Result<()> {
    let site = site(2)?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    std::thread::scope(|scope| {
        let refuser = scope.spawn(|| {
            let mut files = target.ring(Mode::FILE)?;
            let posted = files.post_next_offer()?;
            let offer = files.next_offer(posted, deadline())?.context("no offer came")?;
            Ok::<_, anyhow::Error>(files.refuse(offer.handle, Status::NO_SPACE)?)
        });
        let outcome = source
            .ring(Mode::FILE)?
            .offer("vm1", "unwanted", Some(5), 0, Some(PATIENCE));
        refuser
            .join()
            .map_err(|_| anyhow::anyhow!("the refuser panicked"))??;
        ensure!(
            outcome
                .as_ref()
                .is_err_and(|error| error.status() == Some(Status::NO_SPACE)),
            "{outcome:?}"
        );
        Ok(())
    })
}

#[test]
fn an_offer_to_nobody_is_refused_and_one_unanswered_times_out() -> Result<()> {
    let site = site(2)?;
    let (source, _target) = (site.vm(0)?, site.vm(1)?);
    let mut files = source.ring(Mode::FILE)?;
    let nobody = files.offer("nobody", "x", None, 0, Some(PATIENCE));
    ensure!(
        nobody
            .as_ref()
            .is_err_and(|error| error.status() == Some(Status::PEER_ABSENT)),
        "{nobody:?}"
    );
    let silent = files.offer("vm1", "x", None, 0, Some(Duration::from_millis(200)));
    ensure!(
        silent
            .as_ref()
            .is_err_and(|error| error.status() == Some(Status::TIMED_OUT)),
        "{silent:?}"
    );
    Ok(())
}

#[test]
fn a_receiver_that_vanishes_fails_the_sender_only() -> Result<()> {
    let site = site(3)?;
    let pids = site.pids()?;
    let (source, target) = (site.vm(0)?, site.vm(1)?);
    let data = pattern(32 << 20, 4);
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut files = target.ring(Mode::FILE)?;
            let posted = files.post_next_offer()?;
            let offer = files.next_offer(posted, deadline())?.context("no offer came")?;
            let stream = files.accept(offer.handle)?;
            let buffer = files.allocate(4096)?;
            let request = vmgmt_driver::channel::Request::new(vmgmt_driver::Opcode::STREAM_READ)
                .handle(stream)
                .output(&buffer, 0, 4096, 0);
            files.call(request)?;
            target.backing().vanish();
            Ok::<_, anyhow::Error>(())
        });
        let outcome = send(&source, "vm1", "lost", &data);
        receiver
            .join()
            .map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        ensure!(
            outcome.as_ref().is_err_and(
                |error| error.downcast_ref().and_then(DriverError::status) == Some(Status::PEER_ABSENT)
            ),
            "the sender was told {outcome:?}"
        );
        Ok(())
    })?;
    echoes(&mut source.ring(Mode::COMMON)?)?;
    site.check_unharmed(pids)
}
