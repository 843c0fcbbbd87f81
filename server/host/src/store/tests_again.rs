//! Every operation on names, cut between any two of its system calls, and asked for again by the next core life.

use super::*;
use vmgmt_core::effect::Identity;

const TEMPORARY: &str = ".vmgmt-put-1-once";

impl Bench {
    fn identity(&mut self, path: &str) -> Identity {
        let (share, path) = ("data".into(), path.into());
        match self.run(Effect::Identify { share, path }) {
            Outcome::Identified(identity) => identity,
            other => panic!("{other:?}"),
        }
    }

    fn rename(&mut self, policy: u64, intended: Option<Identity>) -> Outcome {
        self.run(Effect::Rename {
            share: "data".into(),
            source: "s".into(),
            target: "d/t.txt".into(),
            existing: policy,
            durable: true,
            intended,
        })
    }

    fn make(&mut self, intended: Option<Identity>) -> Outcome {
        self.run(Effect::MakeDirectory {
            share: "data".into(),
            path: "new".into(),
            temporary: TEMPORARY.into(),
            intended,
        })
    }

    fn prepare(&mut self) -> Outcome {
        self.run(Effect::PrepareDirectory {
            share: "data".into(),
            path: "new".into(),
            temporary: TEMPORARY.into(),
        })
    }

    fn reopen(&mut self, path: &str, policy: u64, identity: Identity) -> Outcome {
        self.run(Effect::Reopen {
            share: "data".into(),
            path: path.into(),
            put: Some(("t".into(), policy)),
            read: true,
            write: true,
            identity,
        })
    }

    fn commit(&mut self, slot: FileSlot, policy: u64, again: bool) -> Outcome {
        self.run(Effect::Commit {
            slot,
            share: "data".into(),
            temporary: TEMPORARY.into(),
            target: "t".into(),
            existing: policy,
            durable: true,
            bytes: 4,
            again,
        })
    }
}

fn committed(path: &str) -> Outcome {
    Outcome::Committed { path: path.into() }
}

#[test]
fn a_rename_is_done_once() {
    for policy in [existing::REFUSE, existing::REPLACE, existing::RENAME] {
        let mut bench = bench(None, None);
        std::fs::create_dir(bench.path("d")).unwrap();
        std::fs::write(bench.path("s"), "source").unwrap();
        let intended = Some(bench.identity("s"));
        // Cut before the call: it is done now.
        assert_eq!(bench.rename(policy, intended), committed("d/t.txt"));
        // Cut behind it: it is not done again, even where there is a new source meanwhile.
        std::fs::write(bench.path("s"), "another").unwrap();
        assert_eq!(bench.rename(policy, intended), committed("d/t.txt"));
        assert_eq!(std::fs::read(bench.path("s")).unwrap(), b"another");
        // Nobody can tell where it went.
        std::fs::remove_file(bench.path("d/t.txt")).unwrap();
        assert_eq!(status(&bench.rename(policy, intended)), Status::OUTCOME_UNKNOWN);
        assert_eq!(std::fs::read(bench.path("s")).unwrap(), b"another");
    }
    // It got another name than it asked for.
    let mut bench = bench(None, None);
    std::fs::create_dir(bench.path("d")).unwrap();
    std::fs::write(bench.path("d/t.txt"), "first").unwrap();
    std::fs::write(bench.path("s"), "source").unwrap();
    let intended = Some(bench.identity("s"));
    for _ in 0..2 {
        assert_eq!(bench.rename(existing::RENAME, intended), committed("d/t.1.txt"));
    }
}

#[test]
fn a_file_is_removed_once() {
    let mut bench = bench(None, None);
    std::fs::write(bench.path("f"), "file").unwrap();
    let intended = Some(bench.identity("f"));
    let remove = |bench: &mut Bench, intended| {
        let (share, path) = ("data".into(), "f".into());
        bench.run(Effect::Remove {
            share,
            path,
            intended,
        })
    };
    assert_eq!(remove(&mut bench, intended), Outcome::Done);
    assert!(!bench.path("f").exists());
    assert_eq!(remove(&mut bench, intended), Outcome::Done);
    // A new file of that name is not what was meant, be it by the same inode number.
    std::fs::write(bench.path("f"), "another").unwrap();
    assert_eq!(remove(&mut bench, intended), Outcome::Done);
    assert_eq!(std::fs::read(bench.path("f")).unwrap(), b"another");
    assert_eq!(remove(&mut bench, None), Outcome::Done);
    assert_eq!(status(&remove(&mut bench, None)), Status::NO_SUCH_NAME);
}

#[test]
fn a_directory_is_made_once_and_by_one() {
    let mut bench = bench(None, None);
    let Outcome::Identified(identity) = bench.prepare() else {
        panic!("not made")
    };
    assert_eq!(bench.make(Some(identity)), Outcome::Done);
    assert_eq!(bench.make(Some(identity)), Outcome::Done);
    assert!(!bench.path(TEMPORARY).exists());
    assert_eq!(status(&bench.prepare()), Status::EXISTS);
    // Somebody else was first.
    std::fs::remove_dir(bench.path("new")).unwrap();
    let Outcome::Identified(identity) = bench.prepare() else {
        panic!("not made")
    };
    std::fs::create_dir(bench.path("new")).unwrap();
    assert_eq!(status(&bench.make(Some(identity))), Status::EXISTS);
    assert!(!bench.path(TEMPORARY).exists());
}

#[test]
fn a_commit_is_done_once_under_whatever_name_it_got() {
    for policy in [existing::REFUSE, existing::REPLACE, existing::RENAME] {
        let mut bench = bench(None, None);
        if policy == existing::RENAME {
            std::fs::write(bench.path("t"), "first").unwrap();
        }
        let name = if policy == existing::RENAME { "t.1" } else { "t" };
        // As long as it needs to be, or longer: the cut comes first.
        std::fs::write(bench.path(TEMPORARY), "file, too long").unwrap();
        let identity = bench.identity(TEMPORARY);
        let open = |bench: &mut Bench| match bench.reopen(TEMPORARY, policy, identity) {
            Outcome::Opened { slot, .. } => slot,
            other => panic!("{other:?}"),
        };
        let slot = open(&mut bench);
        assert_eq!(bench.commit(slot, policy, false), committed(name));
        assert!(bench.store.file(slot).is_none(), "its slot is closed");
        // Cut behind the rename: found under its name, and not named again.
        let slot = open(&mut bench);
        assert_eq!(bench.commit(slot, policy, true), committed(name));
        assert_eq!(std::fs::read(bench.path(name)).unwrap(), b"file");
        // Nobody can tell what became of it.
        let slot = open(&mut bench);
        std::fs::remove_file(bench.path(name)).unwrap();
        assert_eq!(status(&bench.commit(slot, policy, true)), Status::OUTCOME_UNKNOWN);
        assert_eq!(status(&bench.reopen(TEMPORARY, policy, identity)), Status::STALE);
    }
}

#[test]
fn what_nobody_owns_is_swept_at_adoption() {
    let mut first = bench(None, None);
    for name in [
        ".vmgmt-put-a-once",
        ".vmgmt-put-kept-once",
        ".vmgmt-put-resumable",
    ] {
        std::fs::write(first.path(name), "x").unwrap();
    }
    std::fs::create_dir(first.path(".vmgmt-put-d-once")).unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    for name in [
        ".vmgmt-put-a-once",
        ".vmgmt-put-kept-once",
        ".vmgmt-put-resumable",
        ".vmgmt-put-d-once",
    ] {
        std::fs::File::open(first.path(name))
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
    }
    // Of this life.
    std::fs::write(first.path(".vmgmt-put-new-once"), "x").unwrap();
    let swept = first.run(Effect::Sweep {
        share: "data".into(),
        older_than_seconds: 3600,
        keep: vec![".vmgmt-put-kept-once".into()],
        adoption: true,
    });
    assert_eq!(swept, Outcome::Done);
    let mut left: Vec<String> = std::fs::read_dir(first.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            ".vmgmt-put-kept-once",
            ".vmgmt-put-new-once",
            ".vmgmt-put-resumable"
        ]
    );
}

/// Who cannot look does not know that it is not there. A directory that this thread may not enter stands for a broken disk.
#[test]
fn where_nobody_can_look_nothing_is_said_to_be_done_or_not_done() {
    if !rustix::process::geteuid().is_root() {
        vmgmt_testkit::skipped("only root can lose the right to look");
        return;
    }
    let mut bench = bench(None, None);
    std::fs::create_dir(bench.path("d")).unwrap();
    std::fs::write(bench.path("d/f"), "file").unwrap();
    let intended = Some(bench.identity("d/f"));
    let of = |path: &str| path.to_owned();
    let remove = |intended| Effect::Remove {
        share: of("data"),
        path: of("d/f"),
        intended,
    };
    let rename = |intended| Effect::Rename {
        share: of("data"),
        source: of("d/f"),
        target: of("d/g"),
        existing: existing::REFUSE,
        durable: false,
        intended,
    };
    let make = |intended| Effect::MakeDirectory {
        share: of("data"),
        path: of("d/new"),
        temporary: of("d/.vmgmt-put-1-once"),
        intended,
    };
    let commit = |again| Effect::Commit {
        slot: FileSlot {
            index: 0,
            generation: 0,
        },
        share: of("data"),
        temporary: of("d/f"),
        target: of("d/g"),
        existing: existing::REFUSE,
        durable: false,
        bytes: 4,
        again,
    };
    let file = match bench.open("d/f") {
        Outcome::Opened { slot, .. } => bench.store.file(slot).unwrap(),
        other => panic!("{other:?}"),
    };
    let closed = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(bench.path("d"), closed).unwrap();
    let share = &bench.store.shares["data"];
    let said: Vec<(Status, Status)> = std::thread::scope(|scope| {
        let nobody = scope.spawn(|| {
            rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(65534)).unwrap();
            let of = |effect: Effect| match names::run(share, Some(&*file), &effect) {
                Done::Outcome(outcome) => status(&outcome),
                _ => panic!("nothing was opened"),
            };
            vec![
                (of(remove(intended)), of(remove(None))),
                (of(rename(intended)), of(rename(None))),
                (of(make(intended)), of(make(None))),
                (of(commit(true)), of(commit(false))),
            ]
        });
        nobody.join().unwrap()
    });
    // What is begun in this life has done nothing, and says why.
    let expected = (Status::OUTCOME_UNKNOWN, Status::DENIED);
    assert_eq!(said, [expected; 4]);
    assert_eq!(std::fs::read(bench.path("d/f")).unwrap(), b"file");
}
