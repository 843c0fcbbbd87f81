//! The three resets.

use super::*;
use vmgmt_abi::registers as abi;
use vmgmt_abi::registers::DeviceState;

const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;

/// A device in use: bus master, a ring, features, a claimed port window with a submission, an interrupt pending.
fn used() -> (Bench, CorePage<PlainWords>) {
    let mut bench = Bench::new();
    let core = bench.core(1);
    bench.command_register(6);
    bench.set(CONFIG, 0x10, 0xfe00_0000);
    bench.set(0, abi::FEATURES_ACK_LOW, 1);
    bench.set(0, abi::RINGS + abi::RING_MODE, 2);
    bench.set(0, abi::RINGS + abi::RING_ENABLE, 1);
    bench.set(0, abi::INTERRUPT_ENABLE, 1);
    bench.set(2, vmgmt_abi::port::CLAIM, 4);
    for _ in 0..16 {
        bench.set(2, vmgmt_abi::port::DATA, 4);
    }
    bench.set(2, vmgmt_abi::port::COMMIT, 1);
    bench.map(0x1000, 0x1000, 0);
    core.set_raise(0, 3);
    bench.outputs.clear();
    (bench, core)
}

fn assert_blank(bench: &mut Bench) {
    assert_eq!(bench.front.generation(), 1);
    assert!(!bench.front.ring(0).unwrap().enabled);
    assert_eq!((bench.front.features(), bench.front.host_page().0), (0, 0));
    assert_eq!(bench.get(0, abi::INTERRUPT_PENDING), 0);
    assert_eq!(bench.get(0, abi::INTERRUPT_ENABLE), 0);
    assert_eq!(bench.get(0, abi::RINGS + abi::RING_MODE), 0);
    assert_eq!(bench.get(2, vmgmt_abi::port::CLAIM), 0);
    assert!(bench.front.port_submission().unwrap().bytes.is_empty());
    assert_eq!(bench.function.maps().count(), 1, "maps are the client's");
}

#[test]
fn the_reset_register_is_posted_and_shows_resetting_until_fenced() {
    let (mut bench, core) = used();
    core.set_busy(true);
    bench.set(0, abi::CONTROL, abi::CONTROL_RESET);
    assert_blank(&mut bench);
    assert_eq!(bench.get(0, abi::STATE), DeviceState::RESETTING.0);
    bench.set(0, abi::RINGS + abi::RING_ENABLE, 1);
    assert_eq!(
        bench.get(0, abi::RINGS + abi::RING_ENABLE),
        0,
        "not while resetting"
    );
    core.set_fenced(bench.front.fence());
    assert_eq!(bench.get(0, abi::STATE), DeviceState::BLANK.0);
    assert_eq!(bench.get(CONFIG, 4) & 6, 6, "configuration space stays");
}

#[test]
fn the_reset_register_shows_resetting_while_the_client_may_still_write() {
    let (mut bench, _core) = used();
    bench.function.set_messages_out(true);
    bench.set(0, abi::CONTROL, abi::CONTROL_RESET);
    assert_eq!(bench.get(0, abi::STATE), DeviceState::RESETTING.0);
    assert_eq!(
        bench.function.poll_timeout(),
        Tick::NEVER,
        "a client that never answers costs no wake-ups"
    );
    bench.set(0, abi::RINGS + abi::RING_ENABLE, 1);
    assert_eq!(bench.get(0, abi::RINGS + abi::RING_ENABLE), 0);
    bench.function.set_messages_out(false);
    assert_eq!(bench.get(0, abi::STATE), DeviceState::BLANK.0);
}

#[test]
fn device_reset_is_answered_when_fenced_and_clears_configuration_space() {
    let (mut bench, core) = used();
    core.set_busy(true);
    let handle = bench.handle_of(user::VFIO_USER_DEVICE_RESET);
    bench.input(Input::Command {
        handle,
        command: Command::DeviceReset,
    });
    assert_eq!(bench.reply(handle), None);
    core.set_busy(false);
    bench.function.handle_timeout(bench.function.poll_timeout());
    bench.poll();
    assert_eq!(bench.reply(handle), Some(Reply::Done));
    assert_blank(&mut bench);
    assert_eq!((bench.get(CONFIG, 4) & 0xffff, bench.get(CONFIG, 0x10)), (0, 0));
    assert_eq!(bench.front.control(), 0);
}

#[test]
fn the_function_level_reset_waits_too_and_reads_back_zero() {
    let (mut bench, core) = used();
    core.set_busy(true);
    let handle = bench.handle_of(user::VFIO_USER_REGION_WRITE);
    let write = RegionWrite::new(CONFIG, 0x78, vec![0x10, 0xa8]).unwrap();
    bench.input(Input::Command {
        handle,
        command: Command::RegionWrite(write),
    });
    assert_eq!(bench.reply(handle), None);
    core.set_fenced(bench.front.fence());
    bench.input(Input::Kicked);
    assert!(matches!(bench.reply(handle), Some(Reply::RegionWrite(_))));
    assert_blank(&mut bench);
    assert_eq!(bench.get(CONFIG, 0x78), 0x2810);
}

#[test]
fn freezing_moves_the_fence_once() {
    let (mut bench, _core) = used();
    let fence = bench.front.fence();
    bench.input(Input::Freeze(true));
    bench.input(Input::Freeze(true));
    bench.input(Input::Freeze(false));
    assert_eq!(bench.front.fence(), fence + 1);
}
