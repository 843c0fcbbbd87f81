//! Interrupts: INTx by the front, message vectors handed on.

use super::*;
use crate::front::closer::Closer;
use crate::front::session::{Outside, Session};
use crate::messages::FrontToCore;
use rustix::fd::AsFd;
use vmgmt_abi::registers as abi;
use vmgmt_testkit::client::command;
use vmgmt_wire::Errno;

#[test]
fn intx_is_signalled_on_a_kick_and_again_on_unmask() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let core = bench.core(1);
    let told = core.session();
    core.adopted();
    let (line, unmask) = (eventfd().unwrap(), eventfd().unwrap());
    client.assign_irqs(irq::INTX, 0, &[line.as_fd()]).unwrap();
    client
        .set_irqs(
            irq::INTX,
            irq::DATA_EVENTFD | irq::UNMASK,
            0,
            1,
            &[],
            &[unmask.as_fd()],
        )
        .unwrap();
    client
        .write_u32(BAR0, u64::from(abi::INTERRUPT_ENABLE), 1)
        .unwrap();
    told.page.set_raise(0, 1);
    core.kick(told.slot);
    assert_eq!(client.wait_event(&line).unwrap(), 1);
    assert_eq!(client.region_read(CONFIG, 6, 1).unwrap()[0] & 8, 8);
    // Not acknowledged: it comes again when it is unmasked, by message or by eventfd.
    client
        .set_irqs(irq::INTX, irq::DATA_NONE | irq::UNMASK, 0, 1, &[], &[])
        .unwrap();
    assert_eq!(client.wait_event(&line).unwrap(), 1);
    rustix::io::write(&unmask, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(client.wait_event(&line).unwrap(), 1);
    client.write_u32(BAR0, u64::from(abi::INTERRUPT_ACK), 1).unwrap();
    client
        .set_irqs(irq::INTX, irq::DATA_NONE | irq::UNMASK, 0, 1, &[], &[])
        .unwrap();
    let mut count = [0; 8];
    assert_eq!(
        rustix::io::read(&line, &mut count),
        Err(rustix::io::Errno::AGAIN),
        "acknowledged"
    );
    // Off: the eventfd is not watched any more, and nothing is signalled.
    client.disable_irqs(irq::INTX).unwrap();
    told.page.set_raise(0, 2);
    core.kick(told.slot);
    client.get_info().unwrap();
    assert_eq!(rustix::io::read(&line, &mut count), Err(rustix::io::Errno::AGAIN));
    bench.stop();
}

#[test]
fn message_vectors_go_to_the_core_whole_each_time() {
    let mut bench = Bench::new();
    let (mut client, admitted) = bench.client();
    let core = bench.core(1);
    core.session();
    core.adopted();
    let (one, two) = (eventfd().unwrap(), eventfd().unwrap());
    client.assign_irqs(irq::MSI, 0, &[one.as_fd()]).unwrap();
    client.assign_irqs(irq::MSI, 3, &[two.as_fd()]).unwrap();
    assert!(matches!(
        core.next().header,
        FrontToCore::Vectors { present: 1, .. }
    ));
    let vectors = core.next();
    assert!(matches!(vectors.header, FrontToCore::Vectors { present: 9, .. }));
    rustix::io::write(&vectors.fds[1], &1u64.to_ne_bytes()).unwrap();
    assert_eq!(client.wait_event(&two).unwrap(), 1);
    client.disable_irqs(irq::MSI).unwrap();
    assert!(matches!(
        core.next().header,
        FrontToCore::Vectors { present: 0, .. }
    ));
    assert_eq!(admitted.page.vectors_changed(), 3);
    bench.stop();
}

#[test]
fn what_is_no_eventfd_is_refused() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let pipe = rustix::pipe::pipe().unwrap();
    let refused = client.assign_irqs(irq::INTX, 0, &[pipe.1.as_fd()]).unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EINVAL.0));
    drop(pipe.1);
    // The front holds no copy: the reader sees the end.
    let mut byte = [0];
    assert_eq!(rustix::io::read(&pipe.0, &mut byte), Ok(0));
    bench.stop();
}

/// Has an eventfd block, as whoever shares it can at any time.
fn make_blocking(fd: &rustix::fd::OwnedFd) {
    let flags = rustix::fs::fcntl_getfl(fd).unwrap();
    rustix::fs::fcntl_setfl(fd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
}

#[test]
fn a_full_eventfd_that_its_client_made_block_holds_nobody_up() {
    let mut bench = Bench::new();
    let (mut client, _) = bench.client();
    let (mut other, _) = bench.client();
    let (line, message) = (eventfd().unwrap(), eventfd().unwrap());
    client.assign_irqs(irq::INTX, 0, &[line.as_fd()]).unwrap();
    client.assign_irqs(irq::MSI, 0, &[message.as_fd()]).unwrap();
    for (index, fd) in [(irq::INTX, &line), (irq::MSI, &message)] {
        rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        make_blocking(fd);
        let trigger = irq::DATA_NONE | irq::TRIGGER;
        let body: Vec<u8> = [20, trigger, index, 0, 1]
            .iter()
            .flat_map(|word: &u32| word.to_le_bytes())
            .collect();
        client.start(command::DEVICE_SET_IRQS, &body, &[]).unwrap();
    }
    other.get_info().unwrap();
    client.get_info().unwrap();
    bench.stop();
}

#[test]
fn an_unmask_eventfd_that_its_client_has_emptied_and_made_block_holds_nobody_up() {
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let now = vmgmt_device::Tick(1);
    let mut session = Session::new(now, 1, 0, 1, "one".into(), socket.into());
    let fd = eventfd().unwrap();
    make_blocking(&fd);
    let signals = vmgmt_mem::Signals::new().unwrap();
    let mut outside = Outside {
        now,
        core: None,
        buffer: &mut [],
        signals: &signals,
        closer: &mut Closer::new().unwrap(),
    };
    // Where the front waited, this would never end.
    session.unmask_signalled(&mut outside, &fd);
    rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
    session.unmask_signalled(&mut outside, &fd);
    let nowait = rustix::io::ReadWriteFlags::NOWAIT;
    let mut count = [0; 8];
    let left = rustix::io::preadv2(&fd, &mut [std::io::IoSliceMut::new(&mut count)], u64::MAX, nowait);
    assert_eq!(left, Err(rustix::io::Errno::AGAIN), "it was emptied");
}
