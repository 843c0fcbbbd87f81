//! What a share is charged is what lies in it, whatever a guest does to its files.

use super::*;
use crate::store::walk::ENTRIES_PER_TURN;
use crate::store::walk::tests::{make_deep, remove_deep};

impl Bench {
    fn left(&mut self) -> u64 {
        self.store.bytes_left("data").unwrap()
    }

    fn open_to_write(&mut self, path: &str, truncate: bool) -> FileSlot {
        let opened = self.run(Effect::Open {
            share: "data".into(),
            path: path.into(),
            read: true,
            write: true,
            create: true,
            exclusive: false,
            truncate,
        });
        match opened {
            Outcome::Opened { slot, .. } => slot,
            other => panic!("{other:?}"),
        }
    }

    fn close(&mut self, slot: FileSlot) {
        assert_eq!(self.run(Effect::Close { slot }), Outcome::Done);
        while !self.store.is_idle() {
            std::thread::yield_now();
        }
    }

    fn truncate(&mut self, slot: FileSlot, bytes: u64) -> Outcome {
        self.run(Effect::Truncate { slot, bytes })
    }

    fn sweep(&mut self) -> Outcome {
        self.run(Effect::Sweep {
            share: "data".into(),
            older_than_seconds: 3600,
            keep: Vec::new(),
            adoption: false,
        })
    }

    /// A share beside the bench's store, of the same directory.
    fn share(&self, bytes_max: u64, files_max: u64) -> Arc<Share> {
        Arc::new(Share {
            index: 1,
            began_ns: wall_ns(),
            root: std::fs::File::open(self.path("")).unwrap().into(),
            quota: Arc::new(Quota::new(Some(bytes_max), Some(files_max))),
            masked: 0o022,
            told_missed: AtomicBool::new(false),
        })
    }
}

fn remove_of(path: &str) -> Effect {
    Effect::Remove {
        share: "data".into(),
        path: path.into(),
        intended: None,
    }
}

fn rename_of(source: &str, target: &str) -> Effect {
    Effect::Rename {
        share: "data".into(),
        source: source.into(),
        target: target.into(),
        existing: existing::REPLACE,
        durable: false,
        intended: None,
    }
}

/// Makes a file old, for the sweep.
fn write_old(path: &std::path::Path) {
    std::fs::write(path, "x").unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(1 << 20);
    std::fs::File::open(path).unwrap().set_modified(long_ago).unwrap();
}

#[test]
fn a_file_that_gets_its_own_name_or_anothers_is_charged_once() {
    let mut bench = bench(Some(10), Some(2));
    bench.put("a", b"1234", existing::REFUSE);
    bench.put("b", b"12", existing::REFUSE);
    assert_eq!(
        bench.run(rename_of("a", "a")),
        Outcome::Committed { path: "a".into() }
    );
    assert_eq!(bench.left(), 4);
    assert_eq!(
        bench.run(rename_of("a", "b")),
        Outcome::Committed { path: "b".into() }
    );
    assert_eq!(bench.left(), 6);
    bench.put("a", b"1", existing::REFUSE);
    assert_eq!(
        status(&bench.put("c", b"", existing::REFUSE)),
        Status::OVER_BUDGET
    );
}

#[test]
fn a_commit_is_charged_for_the_length_that_it_gives_its_file() {
    let mut bench = bench(Some(10), None);
    for (bytes, expected) in [(11, Status::OVER_BUDGET), (8, Status::OK)] {
        let created = bench.run(Effect::CreateTemporary {
            share: "data".into(),
            target: "t".into(),
            temporary: ".vmgmt-put-t".into(),
            resume: false,
            permissions: None,
        });
        let Outcome::Opened { slot, .. } = created else {
            panic!("{created:?}")
        };
        let committed = bench.run(Effect::Commit {
            slot,
            share: "data".into(),
            temporary: ".vmgmt-put-t".into(),
            target: "t".into(),
            existing: existing::REFUSE,
            durable: false,
            bytes,
            again: false,
        });
        assert_eq!(status(&committed), expected);
    }
    assert_eq!(bench.left(), 2);
}

#[test]
fn several_handles_of_a_file_are_charged_for_one_file() {
    let mut bench = bench(Some(10), None);
    bench.put("a", b"1234", existing::REFUSE);
    bench.put("b", b"1234", existing::REFUSE);
    let slots = [(); 3].map(|()| bench.open_to_write("a", false));
    for (bytes, left) in [(0, 6), (5, 1), (0, 6)] {
        for slot in slots {
            assert_eq!(bench.truncate(slot, bytes), Outcome::Done);
            assert_eq!(bench.left(), left);
        }
    }
    // By the file's own length, not by what it was when it was opened.
    assert_eq!(bench.truncate(slots[0], 6), Outcome::Done);
    let file = bench.store.file(slots[1]).unwrap();
    assert_eq!(file.resize(6, || ()), Ok(()));
    bench.open_to_write("a", true);
    assert_eq!(bench.left(), 6);
}

#[test]
fn a_write_that_fails_is_not_charged() {
    let mut bench = bench(Some(10), None);
    let slot = bench.open_to_write("a", false);
    let file = bench.store.file(slot).unwrap();
    assert_eq!(file.resize(10, || "no space"), Ok("no space"));
    assert_eq!(
        file.resize(10, || rustix::io::pwrite(file.fd(), b"12", 0)),
        Ok(Ok(2))
    );
    assert_eq!(bench.left(), 8);
    assert_eq!(
        status(&file.resize(11, || panic!("it is refused before")).unwrap_err()),
        Status::OVER_BUDGET
    );
}

#[test]
fn a_file_that_has_lost_its_name_is_charged_until_it_is_closed() {
    let mut bench = bench(Some(10), Some(1));
    bench.put("a", b"1234", existing::REFUSE);
    let slots = [(); 2].map(|()| bench.open_to_write("a", false));
    assert_eq!(bench.run(remove_of("a")), Outcome::Done);
    assert_eq!(bench.left(), 6);
    assert_eq!(bench.truncate(slots[0], 8), Outcome::Done);
    assert_eq!(bench.left(), 2);
    bench.close(slots[0]);
    assert_eq!(bench.left(), 2);
    bench.close(slots[1]);
    assert_eq!(bench.left(), 10);
    assert_eq!(
        bench.put("b", b"12", existing::REFUSE),
        Outcome::Committed { path: "b".into() }
    );
}

/// A core begins, and guests go on while its count has not come anywhere yet.
#[test]
fn what_is_changed_before_it_is_counted_is_counted_all_the_same() {
    let bench = bench(None, None);
    for name in ["removed", "replaced", "moved", "grown", "left"] {
        std::fs::write(bench.path(name), "12345").unwrap();
    }
    std::fs::create_dir(bench.path("directory")).unwrap();
    std::fs::write(bench.path("directory/file"), "12345").unwrap();
    let share = bench.share(100, 10);
    let mut count = Count::new(Arc::clone(&share));
    for effect in [
        remove_of("removed"),
        rename_of("moved", "replaced"),
        rename_of("directory", "renamed"),
    ] {
        let done = names::run(&share, None, &effect);
        assert!(
            matches!(&done, Done::Outcome(outcome) if status(outcome) == Status::OK),
            "{done:?}"
        );
    }
    let grown = std::fs::OpenOptions::new()
        .write(true)
        .open(bench.path("grown"))
        .unwrap();
    let grown = share.opened(grown.into()).unwrap();
    let grow = || rustix::fs::ftruncate(grown.fd(), 10).unwrap();
    grown.resize(10, grow).unwrap();
    while !count.turn() {}
    assert_eq!(share.quota.bytes_left(), 100 - 5 - 10 - 5 - 5);
    assert_eq!(
        (share.quota.charge(0, 6), share.quota.charge(0, 1)),
        (Ok(()), Err(quota::Exceeded::Files))
    );
}

#[test]
fn a_wide_tree_is_counted_wholly() {
    let bench = bench(None, None);
    for number in 0..ENTRIES_PER_TURN + 100 {
        std::fs::create_dir(bench.path(&number.to_string())).unwrap();
        std::fs::write(bench.path(&format!("{number}/file")), "1").unwrap();
    }
    let share = bench.share(1 << 20, 1 << 20);
    let mut count = Count::new(Arc::clone(&share));
    assert!(!count.turn(), "others have their turn in between");
    while !count.turn() {}
    assert_eq!(
        share.quota.bytes_left(),
        (1 << 20) - ENTRIES_PER_TURN as u64 - 100
    );
}

#[test]
fn a_tree_that_no_path_can_name_does_not_end_a_sweep() {
    let mut bench = bench(None, None);
    for number in 0..20 {
        std::fs::create_dir(bench.path(&format!("beside-{number}"))).unwrap();
        write_old(&bench.path(&format!("beside-{number}/.vmgmt-put-old")));
        if number == 10 {
            let root = std::fs::File::open(bench.path("")).unwrap();
            make_deep(root.as_fd(), 3000);
        }
    }
    let swept = bench.sweep();
    remove_deep(std::fs::File::open(bench.path("")).unwrap().as_fd());
    assert_eq!(swept, Outcome::Done);
    for number in 0..20 {
        assert!(!bench.path(&format!("beside-{number}/.vmgmt-put-old")).exists());
    }
}

#[test]
fn a_put_that_is_resumed_while_a_sweep_is_under_way_stays() {
    for quota in [None, Some(1 << 20)] {
        let mut bench = bench(quota, None);
        write_old(&bench.path(".vmgmt-put-old"));
        let before = std::fs::read(bench.path(".vmgmt-put-old")).unwrap();
        // It was asked for before anybody wanted the put again.
        let mut sweep = Sweep::new(bench.share(1, 1), 3600, Vec::new(), false);
        let resumed = bench.run(Effect::CreateTemporary {
            share: "data".into(),
            target: "file".into(),
            temporary: ".vmgmt-put-old".into(),
            resume: true,
            permissions: None,
        });
        assert!(matches!(resumed, Outcome::Opened { .. }), "{resumed:?}");
        while sweep.turn().is_none() {}
        assert_eq!(std::fs::read(bench.path(".vmgmt-put-old")).unwrap(), before);
    }
}

#[test]
fn a_sweep_of_a_large_tree_lets_others_have_their_turn() {
    let bench = bench(None, None);
    for number in 0..ENTRIES_PER_TURN + 100 {
        std::fs::create_dir(bench.path(&number.to_string())).unwrap();
    }
    write_old(&bench.path(".vmgmt-put-old"));
    let mut sweep = Sweep::new(bench.share(1, 1), 3600, Vec::new(), false);
    assert_eq!(sweep.turn(), None);
    while sweep.turn().is_none() {}
    assert!(!bench.path(".vmgmt-put-old").exists());
}
