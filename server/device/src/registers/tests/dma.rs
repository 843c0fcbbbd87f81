//! DMA maps and their fences.

use super::*;
use vmgmt_wire::Errno;

#[test]
fn a_map_appears_on_the_page_and_an_unmap_takes_it_away() {
    let mut bench = Bench::new();
    assert_eq!(bench.map(0x1000, 0x2000, 5), Some(Reply::Done));
    let record = bench.front.map(0).unwrap();
    assert_eq!(
        (
            record.number,
            record.iova,
            record.bytes,
            record.object,
            record.offset,
            record.rights
        ),
        (1, 0x1000, 0x2000, 5, 0x1000, 3)
    );
    assert!(matches!(bench.unmap(0x1000, 0x2000), Some(Reply::DmaUnmap(_))));
    assert_eq!(
        (bench.front.map(0), bench.front.events(), bench.front.fence()),
        (None, 2, 1)
    );
    assert!(bench.outputs.contains(&Output::ObjectGone(5)));
    // The slot is used again, the number is not.
    bench.map(0x1000, 0x1000, 0);
    assert_eq!(bench.front.map(0).unwrap().number, 2);
}

#[test]
fn overlaps_and_limits_are_refused() {
    let mut bench = Bench::new();
    bench.map(0x10000, 0x1000, 1);
    for (iova, bytes) in [(0x10000, 1), (0xf000, 0x1001), (0x10fff, 1), (0, 1 << 30)] {
        assert_eq!(
            bench.map(iova, bytes, 1),
            Some(Reply::Error(Errno::EEXIST)),
            "{iova:#x}"
        );
    }
    for object in 2..5 {
        assert_eq!(bench.map(object << 20, 0x1000, object), Some(Reply::Done));
    }
    assert_eq!(bench.map(9 << 20, 0x1000, 9), Some(Reply::Error(Errno::ENOSPC)));
    assert_eq!(bench.map(1 << 40, 1 << 32, 1), Some(Reply::Error(Errno::ENOMEM)));
    assert_eq!(bench.map(u64::MAX - 0xfff, 0x1000, 0), Some(Reply::Done));
    for page in 0..100 {
        bench.map((1 << 50) + page * 0x1000, 0x1000, 0);
    }
    assert_eq!(bench.function.maps().count(), MAPS);
}

#[test]
fn an_unmap_takes_whole_maps_only_and_what_was_never_mapped_is_fine() {
    let mut bench = Bench::new();
    bench.map(0x1000, 0x1000, 0);
    bench.map(0x2000, 0x1000, 0);
    assert_eq!(bench.unmap(0x1800, 0x1000), Some(Reply::Error(Errno::EINVAL)));
    assert_eq!(bench.function.maps().count(), 2);
    assert!(matches!(bench.unmap(0x8000, 0x1000), Some(Reply::DmaUnmap(_))));
    assert_eq!(bench.front.fence(), 0, "nothing was unmapped");
    assert!(matches!(bench.unmap(0, 0x8000), Some(Reply::DmaUnmap(_))));
    assert_eq!(bench.function.maps().count(), 0);
    bench.map(0x1000, 0x1000, 0);
    bench.command(Command::DmaUnmap(DmaUnmap::All)).unwrap();
    assert_eq!(bench.function.maps().count(), 0);
}

#[test]
fn unmaps_wait_in_order_for_every_core_life_that_is_not_dead() {
    let mut bench = Bench::new();
    let old = bench.core(1);
    bench.map(0x1000, 0x1000, 0);
    bench.map(0x2000, 0x1000, 0);
    old.set_busy(true);
    assert_eq!(bench.unmap(0x1000, 0x1000), None);
    let young = bench.core(2);
    young.set_busy(true);
    assert_eq!(bench.unmap(0x2000, 0x1000), None);
    old.set_fenced(2);
    bench.input(Input::Kicked);
    // The life that began after the first unmap never saw that map, but holds back the second.
    assert_eq!(replies(&mut bench), 1);
    young.set_fenced(u64::MAX);
    bench.function.handle_timeout(bench.now);
    bench.poll();
    assert_eq!(replies(&mut bench), 1);
    // A core that lies about fences to come does not get ahead.
    bench.map(0x1000, 0x1000, 0);
    assert!(bench.unmap(0x1000, 0x1000).is_none());
    bench.input(Input::CoreDead { life: 1 });
    assert_eq!(replies(&mut bench), 1);
    assert_eq!(bench.function.poll_timeout(), Tick::NEVER);
}

#[test]
fn without_a_core_nothing_waits_and_late_replies_are_given_up() {
    let mut bench = Bench::new();
    bench.map(0x1000, 0x1000, 0);
    assert!(bench.unmap(0x1000, 0x1000).is_some());
    let core = bench.core(1);
    bench.map(0x1000, 0x1000, 0);
    core.set_busy(true);
    assert!(bench.unmap(0x1000, 0x1000).is_none());
    assert_eq!(bench.function.poll_timeout(), Tick(limits::FENCE_POLL_NS));
    bench.now = Tick(limits::REPLY_HELD_NS_MAX);
    bench.function.handle_timeout(bench.now);
    bench.poll();
    assert!(
        bench
            .outputs
            .iter()
            .any(|output| matches!(output, Output::GiveUp { .. }))
    );
    core.set_busy(false);
    bench.input(Input::Kicked);
    assert_eq!(replies(&mut bench), 0);
}

#[test]
fn the_end_waits_for_its_fence() {
    let mut bench = Bench::new();
    let core = bench.core(1);
    core.set_busy(true);
    bench.input(Input::Gone);
    assert!(!bench.outputs.contains(&Output::Gone));
    assert_eq!(
        bench.front.control() & crate::page::control::GONE,
        crate::page::control::GONE
    );
    bench.input(Input::CoreDead { life: 1 });
    assert!(bench.outputs.contains(&Output::Gone));
    assert_eq!(bench.map(0x1000, 0x1000, 0), Some(Reply::Error(Errno::ENODEV)));
}

/// Replies to unmaps said so far.
fn replies(bench: &mut Bench) -> usize {
    let before = bench.outputs.len();
    bench.outputs.retain(|output| {
        !matches!(
            output,
            Output::Reply {
                reply: Reply::DmaUnmap(_),
                ..
            }
        )
    });
    before - bench.outputs.len()
}
