//! DMA_MAP and DMA_UNMAP.

use super::*;
use vmgmt_testkit::client::{GuestRam, Mapping, Seal};

const EEXIST: u32 = 17;

fn map_body(flags: u32, offset: u64, iova: u64, bytes: u64) -> Vec<u8> {
    let mut body = words(&[32, flags]);
    for word in [offset, iova, bytes] {
        body.extend(word.to_le_bytes());
    }
    body
}

fn unmap_body(flags: u32, iova: u64, bytes: u64) -> Vec<u8> {
    let mut body = words(&[24, flags]);
    body.extend(iova.to_le_bytes());
    body.extend(bytes.to_le_bytes());
    body
}

#[test]
fn maps_come_and_go_as_qemu_sends_them() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let ram = GuestRam::new(16 << 20, Seal::Shrink)?;
    // The first MiB is split and put together again several times by firmware, pipelined.
    for _ in 0..10 {
        let mut ids = Vec::new();
        for part in 0..16_u64 {
            ids.push(client.start_dma_map(Mapping {
                iova: part << 16,
                bytes: 1 << 16,
                flags: if part % 3 == 0 { 1 } else { 3 },
                memory: Some((ram.fd(), part << 16)),
            })?);
        }
        for part in 0..16_u64 {
            ids.push(client.start_dma_unmap(part << 16, 1 << 16)?);
        }
        for id in ids {
            client.finish(id)?;
        }
    }
    client.dma_map(Mapping {
        iova: 0,
        bytes: 16 << 20,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    })?;
    client.dma_map(Mapping {
        iova: 0xfffc_0000,
        bytes: 0x4_0000,
        flags: 1,
        memory: None,
    })?;
    alive(&mut client)?;
    scene.check()
}

#[test]
fn bad_maps_are_refused_and_change_nothing() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let ram = GuestRam::new(64 << 20, Seal::Shrink)?;
    client.dma_map(Mapping {
        iova: 0x10_0000,
        bytes: 1 << 20,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    })?;
    for (what, body, errno) in [
        ("no bytes", map_body(3, 0, 0x100_0000, 0), EINVAL),
        (
            "a range that wraps",
            map_body(3, 0, u64::MAX - 4095, 8192),
            EINVAL,
        ),
        ("no rights", map_body(0, 0, 0x100_0000, 4096), EINVAL),
        ("unknown flags", map_body(7, 0, 0x100_0000, 4096), EINVAL),
        ("an overlap at the start", map_body(3, 0, 0xf_f000, 8192), EEXIST),
        ("an overlap at the end", map_body(3, 0, 0x1f_f000, 8192), EEXIST),
        ("an overlap around", map_body(3, 0, 0, 0x400_0000), EEXIST),
        ("an overlap inside", map_body(3, 0, 0x11_0000, 4096), EEXIST),
    ] {
        refused(client.request(command::DMA_MAP, &body, &[ram.fd()]), errno).context(what)?;
        refused(client.request(command::DMA_MAP, &body, &[]), errno).context(what)?;
    }
    let body = map_body(3, u64::MAX - 4095, 0x100_0000, 8192);
    refused(client.request(command::DMA_MAP, &body, &[ram.fd()]), EINVAL)
        .context("a file offset that wraps")?;
    let body = map_body(3, 0, 0x100_0000, 4096);
    refused(
        client.request(command::DMA_MAP, &body, &[ram.fd(), ram.fd()]),
        EINVAL,
    )
    .context("two descriptors")?;
    client.dma_unmap(0x10_0000, 1 << 20)?;
    scene.check()
}

#[test]
fn a_map_beyond_the_file_harms_nobody() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let ram = GuestRam::new(4096, Seal::Shrink)?;
    // Whether it is refused now or fails when DMA touches it is the server's choice.
    let far = client.dma_map(Mapping {
        iova: 0,
        bytes: 1 << 30,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    });
    ensure!(
        matches!(far, Ok(()) | Err(ClientError::Refused { .. })),
        "{far:?}"
    );
    alive(&mut client)?;
    scene.check()
}

#[test]
fn descriptors_that_are_no_memory_are_refused_or_used_for_nothing() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let (socket, other) = std::os::unix::net::UnixStream::pair()?;
    let pipe = std::io::pipe()?;
    let directory = std::fs::File::open("/")?;
    let null = std::fs::File::open("/dev/null")?;
    let eventfd = vmgmt_testkit::client::eventfd()?;
    use std::os::fd::AsFd;
    for (at, fd) in [
        socket.as_fd(),
        other.as_fd(),
        pipe.0.as_fd(),
        directory.as_fd(),
        null.as_fd(),
        eventfd.as_fd(),
    ]
    .into_iter()
    .enumerate()
    {
        let iova = (at as u64) << 32;
        let outcome = client.dma_map(Mapping {
            iova,
            bytes: 4096,
            flags: 3,
            memory: Some((fd, 0)),
        });
        ensure!(
            matches!(outcome, Ok(()) | Err(ClientError::Refused { .. })),
            "{outcome:?}"
        );
    }
    alive(&mut client)?;
    scene.check()
}

#[test]
fn unmaps_of_what_never_was_mapped_are_answered_ok() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    client.dma_unmap(0x5000_0000, 4096)?;
    client.dma_unmap(0, 1 << 40)?;
    let ram = GuestRam::new(1 << 20, Seal::Shrink)?;
    client.dma_map(Mapping {
        iova: 0,
        bytes: 1 << 20,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    })?;
    // Part of a map: the specification forbids to split it.
    refused(
        client.request(command::DMA_UNMAP, &unmap_body(0, 0, 4096), &[]),
        EINVAL,
    )?;
    refused(
        client.request(command::DMA_UNMAP, &unmap_body(0, 4096, 4096), &[]),
        EINVAL,
    )?;
    refused(
        client.request(command::DMA_UNMAP, &unmap_body(0, 0, 0), &[]),
        EINVAL,
    )?;
    refused(
        client.request(command::DMA_UNMAP, &unmap_body(1, 0, 1 << 20), &[]),
        EINVAL,
    )
    .context("dirty pages")?;
    refused(
        client.request(command::DMA_UNMAP, &unmap_body(0xfff0, 0, 1 << 20), &[]),
        EINVAL,
    )?;
    client
        .request(command::DMA_UNMAP, &unmap_body(2, 0, 0), &[])
        .context("unmap all")?;
    client.dma_map(Mapping {
        iova: 4096,
        bytes: 4096,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    })?;
    scene.check()
}

#[test]
fn thousands_of_maps_of_one_memory_take_few_descriptors() -> Result<()> {
    let scene = scene()?;
    let mut client = scene.client()?;
    let ram = GuestRam::new(64 << 20, Seal::Shrink)?;
    let before = super::descriptors::count(scene.pids.front)?;
    let mut ids = Vec::new();
    for page in 0..4000_u64 {
        // As a virtual IOMMU's guest does it: each with a fresh duplicate of the same descriptor.
        ids.push(client.start_dma_map(Mapping {
            iova: page << 14,
            bytes: 4096,
            flags: 3,
            memory: Some((ram.fd(), page << 12)),
        })?);
        if page % 100 == 99 {
            for id in ids.drain(..) {
                client.finish(id)?;
            }
        }
    }
    let during = super::descriptors::count(scene.pids.front)?;
    ensure!(
        during <= before + 4,
        "{} descriptors more for 4,000 maps of one memory",
        during - before
    );
    for page in 0..4000_u64 {
        client.dma_unmap(page << 14, 4096)?;
    }
    scene.check()
}

#[test]
fn the_number_of_maps_is_limited_for_each_session() -> Result<()> {
    let plan = SitePlan::new(env!("CARGO_BIN_EXE_vmgmtd"), 2).device("maps-max = 64");
    let scene = scene_of(plan)?;
    let mut client = scene.client()?;
    let ram = GuestRam::new(1 << 20, Seal::Shrink)?;
    let page = |page: u64| Mapping {
        iova: page << 12,
        bytes: 4096,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    };
    for number in 0..64 {
        client.dma_map(page(number))?;
    }
    refused(client.dma_map(page(64)), 28)?;
    client.dma_unmap(0, 4096)?;
    client.dma_map(page(64))?;
    scene.check()
}
