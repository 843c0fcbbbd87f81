//! The store against real directories: what leads out of a share, what appears when, what a quota refuses.

use super::*;
use crate::config::ShareConfig;
use vmgmt_abi::file::existing;

#[path = "tests_again.rs"]
mod again;
#[path = "tests_quota.rs"]
mod quotas;

struct Bench {
    directory: tempfile::TempDir,
    store: Store,
    next: u64,
}

fn bench(bytes_max: Option<u64>, files_max: Option<u64>) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let share = ShareConfig {
        name: "data".into(),
        path: directory.path().join("share"),
        bytes_max,
        files_max,
    };
    std::fs::create_dir(&share.path).unwrap();
    let root = crate::sandbox::open_directory(&share).unwrap();
    let store = Store::new(&[share], vec![root], 2, 0o022).unwrap();
    Bench {
        directory,
        store,
        next: 0,
    }
}

impl Bench {
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join("share").join(name)
    }

    fn run(&mut self, effect: Effect) -> Outcome {
        self.next += 1;
        let id = EffectId(self.next);
        if let Err(outcome) = self.store.submit(1, id, effect) {
            return outcome;
        }
        loop {
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                self.store.wake_fd(),
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).unwrap();
            if let Some(finished) = self.store.take_finished().pop() {
                assert_eq!(finished.effect, id);
                return match finished.done {
                    Done::Outcome(outcome) => outcome,
                    Done::Opened { file, stat, identity } => {
                        let slot = self.store.insert(Arc::new(*file));
                        Outcome::Opened { slot, stat, identity }
                    }
                    other => panic!("{other:?}"),
                };
            }
        }
    }

    fn open(&mut self, path: &str) -> Outcome {
        self.run(Effect::Open {
            share: "data".into(),
            path: path.into(),
            read: true,
            write: false,
            create: false,
            exclusive: false,
            truncate: false,
        })
    }

    fn put(&mut self, target: &str, contents: &[u8], policy: u64) -> Outcome {
        let temporary = format!(
            "{}.vmgmt-put-1",
            target
                .rsplit_once('/')
                .map_or(String::new(), |(above, _)| format!("{above}/"))
        );
        let share = "data".to_string();
        let created = Effect::CreateTemporary {
            share: share.clone(),
            target: target.into(),
            temporary: temporary.clone(),
            resume: false,
            permissions: None,
        };
        let slot = match self.run(created) {
            Outcome::Opened { slot, .. } => slot,
            failed => return failed,
        };
        let file = self.store.file(slot).unwrap();
        let write = || rustix::io::pwrite(file.fd(), contents, 0).unwrap();
        if let Err(outcome) = file.resize(contents.len() as u64, write) {
            self.run(Effect::Discard {
                slot,
                share,
                temporary,
            });
            return outcome;
        }
        drop(file);
        let commit = Effect::Commit {
            slot,
            share: share.clone(),
            temporary: temporary.clone(),
            target: target.into(),
            existing: policy,
            durable: true,
            bytes: contents.len() as u64,
            again: false,
        };
        let outcome = self.run(commit);
        if matches!(outcome, Outcome::Failed { .. }) {
            self.run(Effect::Discard {
                slot,
                share,
                temporary,
            });
        }
        outcome
    }
}

fn status(outcome: &Outcome) -> Status {
    match outcome {
        Outcome::Failed { status, .. } => Status(*status),
        _ => Status::OK,
    }
}

#[test]
fn a_file_appears_whole_under_its_name() {
    let mut bench = bench(None, None);
    assert_eq!(
        bench.put("a.txt", b"first", existing::REFUSE),
        Outcome::Committed { path: "a.txt".into() }
    );
    assert_eq!(
        status(&bench.put("a.txt", b"second", existing::REFUSE)),
        Status::EXISTS
    );
    assert_eq!(std::fs::read(bench.path("a.txt")).unwrap(), b"first");
    assert_eq!(
        bench.put("a.txt", b"second", existing::RENAME),
        Outcome::Committed {
            path: "a.1.txt".into()
        }
    );
    assert_eq!(
        bench.put("a.txt", b"third", existing::REPLACE),
        Outcome::Committed { path: "a.txt".into() }
    );
    assert_eq!(std::fs::read(bench.path("a.txt")).unwrap(), b"third");
    let names: Vec<_> = std::fs::read_dir(bench.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "temporary names are left over: {names:?}");
}

#[test]
fn nothing_leads_out_of_a_share() {
    let mut bench = bench(None, None);
    std::fs::write(bench.directory.path().join("secret"), b"secret").unwrap();
    std::os::unix::fs::symlink("../secret", bench.path("link")).unwrap();
    std::os::unix::fs::symlink("..", bench.path("up")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", bench.path("absolute")).unwrap();
    std::fs::create_dir(bench.path("sub")).unwrap();
    for path in [
        "link",
        "up/secret",
        "absolute",
        "../secret",
        "/etc/passwd",
        "sub/../../secret",
    ] {
        let outcome = bench.open(path);
        assert!(matches!(status(&outcome), Status::DENIED), "{path}: {outcome:?}");
        match bench.run(Effect::Stat {
            share: "data".into(),
            path: path.into(),
        }) {
            Outcome::Stat(stat) => assert_eq!(
                stat.kind,
                vmgmt_abi::file::kind::OTHER,
                "stat {path} followed the link"
            ),
            outcome => assert_eq!(status(&outcome), Status::DENIED, "stat {path}: {outcome:?}"),
        }
    }
    for target in ["up/new", "../new"] {
        let refused = status(&bench.put(target, b"x", existing::REPLACE));
        assert!(
            matches!(refused, Status::DENIED | Status::NOT_A_DIRECTORY),
            "{target}: {refused:?}"
        );
        assert!(!bench.directory.path().join("new").exists());
    }
    // A link as the target of a put is replaced, never written through.
    assert_eq!(
        bench.put("link", b"x", existing::REPLACE),
        Outcome::Committed { path: "link".into() }
    );
    assert_eq!(
        std::fs::read(bench.directory.path().join("secret")).unwrap(),
        b"secret"
    );
}

#[test]
fn what_is_no_file_is_not_opened() {
    let mut bench = bench(None, None);
    std::fs::create_dir(bench.path("sub")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        bench.path("fifo"),
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert_eq!(status(&bench.open("sub")), Status::IS_A_DIRECTORY);
    assert_eq!(status(&bench.open("fifo")), Status::NOT_SUPPORTED);
    assert_eq!(status(&bench.open("absent")), Status::NO_SUCH_NAME);
    assert_eq!(
        status(&bench.put("sub", b"x", existing::REPLACE)),
        Status::IS_A_DIRECTORY
    );
    assert_eq!(
        status(&bench.put("absent/x", b"x", existing::REPLACE)),
        Status::NO_SUCH_NAME
    );
}

#[test]
fn a_listing_goes_on_where_the_buffer_ended() {
    let mut bench = bench(None, None);
    for number in 0..300 {
        std::fs::write(bench.path(&format!("file-{number:03}")), b"x").unwrap();
    }
    std::fs::write(bench.path(".vmgmt-put-7"), b"x").unwrap();
    let (mut names, mut cursor) = (Vec::new(), 0);
    loop {
        match bench.run(Effect::List {
            share: "data".into(),
            path: String::new(),
            cursor,
            bytes_max: 1000,
        }) {
            Outcome::Listed { entries, next } => {
                assert!(
                    entries
                        .iter()
                        .map(|(name, _)| vmgmt_core::effect::entry_bytes(name))
                        .sum::<usize>()
                        <= 1000
                );
                names.extend(entries.into_iter().map(|(name, _)| name));
                cursor = next;
            }
            other => panic!("{other:?}"),
        }
        if cursor == 0 {
            break;
        }
    }
    names.sort();
    assert_eq!(
        names,
        (0..300)
            .map(|number| format!("file-{number:03}"))
            .collect::<Vec<_>>()
    );
    let too_small = bench.run(Effect::List {
        share: "data".into(),
        path: String::new(),
        cursor: 0,
        bytes_max: 8,
    });
    assert_eq!(status(&too_small), Status::TOO_LARGE);
}

#[test]
fn a_quota_refuses_by_name_and_gives_back() {
    let mut bench = bench(Some(10), Some(2));
    assert_eq!(
        bench.put("a", b"12345678", existing::REFUSE),
        Outcome::Committed { path: "a".into() }
    );
    let over = bench.put("b", b"123", existing::REFUSE);
    assert_eq!(
        over,
        Outcome::Failed {
            status: Status::OVER_BUDGET.0,
            budget: Budget::SHARE_BYTES.0,
            at: FailedAt::File
        }
    );
    assert_eq!(
        bench.put("b", b"12", existing::REFUSE),
        Outcome::Committed { path: "b".into() }
    );
    let over = bench.put("c", b"", existing::REFUSE);
    assert_eq!(
        over,
        Outcome::Failed {
            status: Status::OVER_BUDGET.0,
            budget: Budget::SHARE_FILES.0,
            at: FailedAt::File
        }
    );
    assert_eq!(
        bench.run(Effect::Remove {
            share: "data".into(),
            path: "a".into(),
            intended: None,
        }),
        Outcome::Done
    );
    assert_eq!(
        bench.put("c", b"12345678", existing::REFUSE),
        Outcome::Committed { path: "c".into() }
    );
}

#[test]
fn a_broken_put_goes_on_where_it_was() {
    let mut bench = bench(None, None);
    let create = |resume| Effect::CreateTemporary {
        share: "data".into(),
        target: "t".into(),
        temporary: ".vmgmt-put-t".into(),
        resume,
        permissions: Some(0o600),
    };
    let Outcome::Opened { slot, .. } = bench.run(create(true)) else {
        panic!("not opened")
    };
    rustix::io::pwrite(bench.store.file(slot).unwrap().fd(), b"half", 0).unwrap();
    assert_eq!(bench.run(Effect::Close { slot }), Outcome::Done);
    assert_eq!(status(&bench.run(Effect::Sync { slot })), Status::STALE);
    let Outcome::Opened { slot, stat, .. } = bench.run(create(true)) else {
        panic!("not opened")
    };
    assert_eq!((stat.size, stat.permissions), (4, 0o600));
    let crc = crc32fast::hash(b"half");
    assert_eq!(
        bench.run(Effect::Checksum {
            slot,
            offset: 0,
            bytes: 100
        }),
        Outcome::Checksum { bytes: 4, crc32: crc }
    );
    let Outcome::Opened { stat, .. } = bench.run(create(false)) else {
        panic!("not opened")
    };
    assert_eq!(stat.size, 0);
    assert_eq!(
        bench.run(Effect::Sweep {
            share: "data".into(),
            older_than_seconds: 3600,
            keep: Vec::new(),
            adoption: true,
        }),
        Outcome::Done
    );
    assert!(bench.path(".vmgmt-put-t").exists());
}

#[test]
fn a_commit_under_a_name_that_was_taken_away_is_refused() {
    let mut bench = bench(None, None);
    let create = Effect::CreateTemporary {
        share: "data".into(),
        target: "t".into(),
        temporary: ".vmgmt-put-t".into(),
        resume: false,
        permissions: None,
    };
    let Outcome::Opened { slot, .. } = bench.run(create) else {
        panic!("not opened")
    };
    std::fs::remove_file(bench.path(".vmgmt-put-t")).unwrap();
    std::fs::write(bench.path(".vmgmt-put-t"), b"other").unwrap();
    let commit = Effect::Commit {
        slot,
        share: "data".into(),
        temporary: ".vmgmt-put-t".into(),
        target: "t".into(),
        existing: 0,
        durable: false,
        bytes: 0,
        again: false,
    };
    assert_eq!(status(&bench.run(commit)), Status::STALE);
    assert!(!bench.path("t").exists());
}
