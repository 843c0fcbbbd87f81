//! Configuration space.

use super::*;

const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;

fn dump(bench: &mut Bench) -> String {
    let bytes = bench.read(CONFIG, 0, 0xb0);
    let lines = bytes.chunks(16).enumerate().map(|(line, bytes)| {
        let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{:02x}: {}\n", line * 16, bytes.join(" "))
    });
    lines.collect()
}

#[test]
fn the_bytes_after_power_on_are_the_golden_ones() {
    let golden = "\
00: f4 1a f0 10 00 00 10 00 00 00 80 08 00 00 00 00
10: 00 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
20: 00 00 00 00 00 00 00 00 00 00 00 00 f4 1a f0 10
30: 00 00 00 00 40 00 00 00 00 00 00 00 00 01 00 00
40: 01 50 03 00 08 00 00 00 00 00 00 00 00 00 00 00
50: 05 70 88 01 00 00 00 00 00 00 00 00 00 00 00 00
60: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
70: 10 00 02 00 00 80 00 10 10 28 00 00 11 00 00 00
80: 00 00 11 00 00 00 00 00 00 00 00 00 00 00 00 00
90: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
a0: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
";
    assert_eq!(dump(&mut Bench::new()), golden);
    let msix = dump(&mut Bench::with(Settings {
        msix: true,
        ..settings()
    }));
    assert!(msix.contains("50: 11 70 0f 00 04 00 00 00 04 08 00 00"), "{msix}");
}

#[test]
fn bars_tell_their_sizes_and_keep_their_addresses() {
    let mut bench = Bench::with(Settings {
        msix: true,
        ..settings()
    });
    for bar in 0..6 {
        bench.set(CONFIG, 0x10 + 4 * bar, u32::MAX);
    }
    let sizes: Vec<u32> = (0..6).map(|bar| bench.get(CONFIG, 0x10 + 4 * bar)).collect();
    assert_eq!(sizes, [0xffff_c000, 0, 0xffff_ffc1, 0, 0xffff_f000, 0]);
    bench.set(CONFIG, 0x10, 0xfebf_1234);
    assert_eq!(bench.get(CONFIG, 0x10), 0xfebf_0000);
    bench.set(CONFIG, 0x30, u32::MAX);
    assert_eq!(bench.get(CONFIG, 0x30), 0, "there is no expansion ROM");
}

#[test]
fn read_only_bits_stay_and_the_space_behind_is_empty() {
    let mut bench = Bench::new();
    bench.write(CONFIG, 0, &[0xff; 64]);
    assert_eq!(bench.read(CONFIG, 0, 4), [0xf4, 0x1a, 0xf0, 0x10]);
    assert_eq!(bench.get(CONFIG, 4), 0x0010_0547);
    assert_eq!(bench.get(CONFIG, 0x100), 0);
    assert_eq!(bench.read(CONFIG, 0xfff, 1), [0]);
    let past = RegionAccess::new(CONFIG, 0xffe, 4).unwrap();
    assert_eq!(
        bench.command(Command::RegionRead(past)),
        Some(Reply::Error(vmgmt_wire::Errno::EINVAL))
    );
}

#[test]
fn only_d0_and_d3_exist_and_d3_ends_dma() {
    let mut bench = Bench::new();
    bench.command_register(0x4);
    assert_eq!(bench.front.control() & 1, 1);
    for (written, read) in [(1u8, 0), (2, 0), (3, 3), (0, 0)] {
        let fence = bench.front.fence();
        bench.write(CONFIG, 0x44, &[written]);
        assert_eq!(bench.read(CONFIG, 0x44, 1)[0] & 3, read);
        assert_eq!(bench.front.control() & 1, u64::from(read == 0));
        assert_eq!(bench.front.fence() - fence, u64::from(read == 3));
    }
}

#[test]
fn clearing_bus_master_waits_for_dma_in_flight() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    assert!(bench.command_register(0x6).is_some());
    core.set_busy(true);
    let handle = bench.handle_of(user::VFIO_USER_REGION_WRITE);
    let write = RegionWrite::new(CONFIG, 4, vec![2, 0]).unwrap();
    bench.input(Input::Command {
        handle,
        command: Command::RegionWrite(write),
    });
    assert_eq!(bench.reply(handle), None);
    // Other register accesses go on.
    assert_eq!(bench.get(CONFIG, 4) & 4, 0);
    core.set_fenced(bench.front.fence());
    bench.input(Input::Kicked);
    assert!(matches!(bench.reply(handle), Some(Reply::RegionWrite(_))));
}
