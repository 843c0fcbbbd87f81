//! Keeper and front stay small enough to be read: whoever lets them grow beyond these limits has to say so here, with a reason.
//!
//! Counted are lines of code: no blank lines, no comments, nothing that is built for tests only. Why these two: when one of them dies, all
//! devices end (docs/architecture.md, "How small keeper and front are").
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

/// What of the keeper runs every day: starts, deaths, admissions, ends. (80 more than before there was a reload, which is asked for by a
/// signal, by the core and by operators; 40 for a core that takes no messages, and for connections of processes that have ended;
/// 15 for a front that was killed and does not go.)
const KEEPER_DAILY_MAX: usize = 1_740;
/// What of it runs in an upgrade or a reload only; most of it packs and unpacks the keeper. (A reload is 160 of it: what a configuration means,
/// and what differs in it, stands in `config`.)
const KEEPER_UPGRADE_MAX: usize = 1_660;
/// The front without its saved form. (A hundred of these only hold a fault of its own, or a core's death, to the one VM that it is about;
/// 230 that clients' descriptors hold nobody up; 80 hold a flood of connections to its socket, and bound what waits for core and keeper.)
const FRONT_DAILY_MAX: usize = 2_645;
/// What of it packs and unpacks it for a hand-over. (Ten of it that the next front lets go of clients' descriptors as this one does.)
const FRONT_SAVED_MAX: usize = 810;

/// The keeper's files for an upgrade or a reload.
const UPGRADE: [&str; 6] = [
    "core_upgrade.rs",
    "hand_over.rs",
    "re_exec.rs",
    "reload.rs",
    "saved.rs",
    "upgrade.rs",
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            found.extend(sources(&path));
        } else if name.ends_with(".rs") && !name.ends_with("_tests.rs") {
            found.push(path);
        }
    }
    found
}

fn lines_of_code(text: &str) -> usize {
    let mut count = 0;
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]" {
            // The item that follows: to its semicolon, or to its last brace.
            let mut depth = 0_usize;
            for line in lines.by_ref() {
                depth = (depth + line.matches('{').count()).saturating_sub(line.matches('}').count());
                if depth == 0 && (line.ends_with(';') || line.ends_with('}')) {
                    break;
                }
            }
        } else if !line.is_empty() && !line.starts_with("//") {
            count += 1;
        }
    }
    count
}

/// Lines of a room in all files, in those that `of` picks and in the others.
fn room(name: &str, of: impl Fn(&Path) -> bool) -> [usize; 2] {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src").join(name);
    let mut lines = [0; 2];
    for path in sources(&folder) {
        lines[usize::from(of(&path))] += lines_of_code(&std::fs::read_to_string(&path).unwrap());
    }
    println!("{name}: {lines:?} lines of code");
    assert!(lines.iter().all(|lines| *lines > 0), "{name} is not where it was");
    lines
}

#[test]
fn keeper_and_front_are_no_longer_than_is_stated() {
    let upgrade = |path: &Path| UPGRADE.iter().any(|name| path.ends_with(name));
    let [keeper, keeper_upgrade] = room("keeper", upgrade);
    let [front, front_saved] = room("front", |path| path.parent().unwrap().ends_with("saved"));
    for (what, lines, max) in [
        ("the keeper's daily part", keeper, KEEPER_DAILY_MAX),
        ("the keeper's upgrades", keeper_upgrade, KEEPER_UPGRADE_MAX),
        ("the front's daily part", front, FRONT_DAILY_MAX),
        ("the front's saved form", front_saved, FRONT_SAVED_MAX),
    ] {
        assert!(
            lines <= max,
            "{what} has {lines} lines of code, and {max} are stated: put what can stand elsewhere elsewhere, or state more and say why"
        );
        assert!(
            lines * 10 >= max * 9,
            "{what} has become smaller ({lines} lines): state less than {max}"
        );
    }
}

#[test]
fn only_code_is_counted() {
    let text = "//! Head.\nuse a;\n\nfn b() {\n    // why\n    c(\"{}\");\n}\n#[cfg(test)]\nimpl B {\n    fn d() {\n    }\n}\n\
                #[cfg(test)]\nmod e;\nfn f() {}\n#[cfg(test)]\nmod tests {\n    fn g() {}\n}\n";
    assert_eq!(lines_of_code(text), 5);
    assert!(sources(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/keeper").as_path()).len() > 10);
}
