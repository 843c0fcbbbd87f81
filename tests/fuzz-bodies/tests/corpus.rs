//! Every input of the committed corpus, and a few of a fixed seed, through every fuzz target with the ordinary compiler: what was found
//! stays fixed. (New inputs: `cargo xtask fuzz`.)

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test's own helper may fail the test

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// One target at a time: the front's counts the descriptors of this process.
static TURN: Mutex<()> = Mutex::new(());
/// Panics of any thread, also those that somebody catches.
static PANICS: AtomicUsize = AtomicUsize::new(0);
static HOOK: Once = Once::new();

fn corpus(name: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}

fn check(name: &str, what: &str, bytes: &[u8]) {
    let before = PANICS.load(Ordering::SeqCst);
    let done = catch_unwind(AssertUnwindSafe(|| vmgmt_fuzz_bodies::run(name, bytes)));
    let panics = PANICS.load(Ordering::SeqCst) - before;
    assert!(
        done.is_ok() && panics == 0,
        "{name}: {what}: {panics} panics, the first is printed above"
    );
}

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// In a thread of its own whose end is waited for: what a target keeps for its thread (listeners) is closed before the next has its turn.
fn all(name: &'static str, random: usize) {
    let _turn = turn();
    let thread = std::thread::spawn(move || all_of(name, random));
    if let Err(panic) = thread.join() {
        resume_unwind(panic);
    }
}

fn all_of(name: &str, random: usize) {
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
    for file in corpus(name) {
        check(name, &file.display().to_string(), &std::fs::read(&file).unwrap());
    }
    let mut dice = ChaCha8Rng::seed_from_u64(7);
    for n in 0..random {
        let mut bytes = vec![0; dice.next_u32() as usize % 600];
        dice.fill_bytes(&mut bytes);
        check(name, &format!("random input {n}: {bytes:?}"), &bytes);
    }
}

#[test]
fn every_target_has_a_test_here() {
    let names: Vec<&str> = vmgmt_fuzz_bodies::TARGETS
        .iter()
        .map(|target| target.name)
        .collect();
    let tested = [
        "wire",
        "registers",
        "rings",
        "pages",
        "saved",
        "config",
        "control",
        "front",
        "driver",
    ];
    assert_eq!(names, tested);
}

#[test]
fn the_corpus_is_small() {
    let _turn = turn();
    let files = vmgmt_fuzz_bodies::TARGETS
        .iter()
        .flat_map(|target| corpus(target.name));
    let bytes: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
    assert!(
        bytes < 1 << 20,
        "{bytes} bytes: keep fewer inputs, those of `.cache/fuzz-corpus` are used all the same"
    );
}

macro_rules! targets {
    ($($name:ident: $random:expr),* $(,)?) => {$(
        #[test]
        fn $name() {
            all(stringify!($name), $random);
        }
    )*};
}

targets! {
    wire: 300,
    registers: 300,
    rings: 100,
    pages: 100,
    saved: 300,
    config: 100,
    control: 100,
    front: 30,
    driver: 30,
}
