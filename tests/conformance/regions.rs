//! REGION_READ, REGION_WRITE and REGION_WRITE_MULTI.

use super::*;
use vmgmt_abi::registers::{FEATURES_ACK_LOW, INTERRUPT_ENABLE, STATE};
use vmgmt_testkit::client::{Write, encode, flag};

fn access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    [
        &offset.to_le_bytes()[..],
        &region.to_le_bytes(),
        &count.to_le_bytes(),
        data,
    ]
    .concat()
}

#[test]
fn accesses_outside_a_region_are_refused() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let outside: &[(u32, u64, u32)] = &[
        (0, 16 * 1024, 4),
        (0, 16 * 1024 - 2, 4),
        (0, u64::MAX, 4),
        (0, u64::MAX - 3, 4),
        (2, 64, 1),
        (2, 61, 4),
        (CONFIG, 4096, 1),
        (CONFIG, 4095, 2),
        (CONFIG, 1 << 40, 4),
        (1, 0, 4),
        (3, 0, 4),
        (4, 0, 4),
        (6, 0, 4),
        (8, 0, 1),
        (9, 0, 4),
        (u32::MAX, 0, 4),
    ];
    for &(region, offset, count) in outside {
        let place = format!("region {region}, offset {offset:#x}, {count} bytes");
        let read = client.request(command::REGION_READ, &access(region, offset, count, &[]), &[]);
        refused(read, EINVAL).with_context(|| place.clone())?;
        let data = vec![0; count as usize];
        let write = client.request(command::REGION_WRITE, &access(region, offset, count, &data), &[]);
        refused(write, EINVAL).context(place)?;
    }
    alive(&mut client)?;
    scene.check()
}

#[test]
fn counts_that_contradict_are_refused() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for count in [0, (1 << 20) + 1, u32::MAX] {
        refused(
            client.request(command::REGION_READ, &access(CONFIG, 0, count, &[]), &[]),
            EINVAL,
        )
        .with_context(|| format!("a read of {count}"))?;
    }
    // Less or more data than the count says.
    refused(
        client.request(command::REGION_WRITE, &access(CONFIG, 4, 4, &[0; 3]), &[]),
        EINVAL,
    )?;
    refused(
        client.request(command::REGION_WRITE, &access(CONFIG, 4, 4, &[0; 5]), &[]),
        EINVAL,
    )?;
    refused(
        client.request(command::REGION_WRITE, &access(CONFIG, 4, 0, &[]), &[]),
        EINVAL,
    )?;
    // A read with data.
    refused(
        client.request(command::REGION_READ, &access(CONFIG, 4, 4, &[0; 4]), &[]),
        EINVAL,
    )?;
    alive(&mut client)?;
    scene.check()
}

#[test]
fn widths_and_alignments_within_a_region_are_answered() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for count in [1, 2, 3, 4, 7, 8, 64, 255, 4096] {
        ensure!(client.region_read(CONFIG, 0, count)?.len() == count as usize);
        // Registers are words: what is none reads zeros and is counted, never refused.
        ensure!(client.region_read(0, 1, count)?.len() == count as usize);
        client.region_write(0, 1, &vec![0xff; count as usize])?;
    }
    ensure!(client.read_u32(0, vmgmt_abi::registers::BAD_ACCESSES.into())? > 0);
    ensure!(client.read_u32(0, STATE.into())? == 0);
    let pair = client.region_read(0, vmgmt_abi::registers::FEATURES_LOW.into(), 8)?;
    ensure!(pair.iter().any(|byte| *byte != 0));
    scene.check()
}

#[test]
fn posted_writes_take_effect_before_the_next_read_and_are_not_answered() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for value in 1..500_u32 {
        client.region_write_posted(0, INTERRUPT_ENABLE.into(), &(value & 0xffff).to_le_bytes())?;
        if value % 50 == 0 {
            // The client would object to an answer that nobody waits for.
            ensure!(client.read_u32(0, INTERRUPT_ENABLE.into())? == value & 0xffff);
        }
    }
    // A posted mistake has no answer either, and no effect.
    client.region_write_posted(0, 1 << 40, &[0; 4])?;
    client.region_write_posted(9, 0, &[0; 4])?;
    client.post(command::REGION_WRITE, &[0; 3], &[])?;
    client.post(999, &[], &[])?;
    alive(&mut client)?;
    scene.check()
}

#[test]
fn a_posted_request_of_any_kind_is_done_and_not_answered() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    for (number, body) in [
        (command::DEVICE_GET_INFO, words(&[16, 0, 0, 0])),
        (command::DEVICE_RESET, Vec::new()),
        (command::REGION_READ, access(0, 0, 4, &[])),
    ] {
        client.send_raw(&encode(5, number, flag::NO_REPLY, &body), &[])?;
    }
    alive(&mut client)?;
    scene.check()
}

#[test]
fn write_multi_does_all_in_order() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let values: Vec<[u8; 4]> = (1..=200_u32).map(u32::to_le_bytes).collect();
    let writes: Vec<Write> = values
        .iter()
        .map(|data| Write {
            region: 0,
            offset: INTERRUPT_ENABLE.into(),
            data,
        })
        .collect();
    client.write_multi(&writes, false)?;
    ensure!(client.read_u32(0, INTERRUPT_ENABLE.into())? == 200);
    client.write_multi(writes.get(..100).context("slice")?, true)?;
    ensure!(client.read_u32(0, INTERRUPT_ENABLE.into())? == 100);
    // All widths, another region.
    let features = 1_u64.to_le_bytes();
    client.write_multi(
        &[
            Write {
                region: CONFIG,
                offset: 4,
                data: &[7, 0],
            },
            Write {
                region: 2,
                offset: 8,
                data: &[9],
            },
            Write {
                region: 0,
                offset: FEATURES_ACK_LOW.into(),
                data: &features,
            },
        ],
        false,
    )?;
    ensure!(client.read_u32(CONFIG, 4)? & 7 == 7);
    ensure!(client.read_u32(0, FEATURES_ACK_LOW.into())? == 1);
    scene.check()
}

#[test]
fn write_multi_that_contradicts_itself_is_refused() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let entry = access(0, INTERRUPT_ENABLE.into(), 4, &[5, 0, 0, 0, 0, 0, 0, 0]);
    let multi = |count: u64, entries: &[u8]| [&count.to_le_bytes()[..], entries].concat();
    for (what, body) in [
        ("no write", multi(0, &[])),
        ("fewer than it says", multi(2, &entry)),
        (
            "more than it says",
            multi(1, &[entry.clone(), entry.clone()].concat()),
        ),
        ("very many", multi(u64::MAX, &entry)),
        ("a length that overflows", multi((u64::MAX / 24) + 1, &entry)),
        ("half an entry", multi(1, entry.get(..12).unwrap_or_default())),
        ("nine bytes", multi(1, &access(0, 0, 9, &[0; 8]))),
        ("no bytes", multi(1, &access(0, 0, 0, &[0; 8]))),
        ("a region that is not there", multi(1, &access(9, 0, 4, &[0; 8]))),
        ("an offset outside", multi(1, &access(0, 16_384, 4, &[0; 8]))),
    ] {
        refused(client.request(command::REGION_WRITE_MULTI, &body, &[]), EINVAL).context(what)?;
    }
    alive(&mut client)?;
    scene.check()
}
