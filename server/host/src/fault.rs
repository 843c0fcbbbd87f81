//! Faults on demand, for the tests of survival: in debug builds only, and only where `VMGMT_FAULT` asks for them.
//!
//! `VMGMT_FAULT=PLACE[@PROGRAM][?PATH]=WHAT,…`. PROGRAM is the file name of the program that it is for (all, if left out), so that one daemon
//! can have a good old and a bad new program; with PATH the fault is there in processes that find that file when they start.
//!
//! * `start`, `check`, `trial`, `go`, `adopt-N` (N sessions are taken over), `ready` (all are), `rehearse`, `read` (the configuration,
//!   anew), `serve` (a front that takes over): WHAT is `abort`, `hang` or `exit`.
//! * `resume`: WHAT is `refuse` or `panic`.
//! * `reads`: with `version 1` the program takes only a hub's state that one of version 1 could read.
//! * `speaks`: the program speaks these versions of the roles' words (`1-2`).
//! * `snapshot`: WHAT is written in the place of any snapshot of the hub.
//! * `worker`, `outcome`: the process aborts when the names that a worker is given, or the number of the VM whose bulk work has ended, contain WHAT.
//! * `submission` (aborts), `submission-panics`, `submission-hangs`, `submission-waits` (hangs, and goes on to beat): the core does so when a
//!   submission's data contain WHAT.
//! * `register`, `end`: the front panics when a register is written with a value that contains WHAT, or in the middle of the end of a session
//!   of the VM WHAT.

#[cfg(debug_assertions)]
mod on_demand {
    use std::sync::OnceLock;

    /// Place and what is to happen there, for this program.
    fn faults() -> &'static [(String, String)] {
        static FAULTS: OnceLock<Vec<(String, String)>> = OnceLock::new();
        FAULTS.get_or_init(|| {
            let wanted = std::env::var("VMGMT_FAULT").unwrap_or_default();
            let program = std::env::current_exe().unwrap_or_default();
            let program = program.file_name().unwrap_or_default().to_string_lossy();
            wanted
                .split(',')
                .filter_map(|fault| fault.split_once('='))
                .filter_map(|(place, what)| match place.split_once('?') {
                    Some((place, path)) => std::path::Path::new(path).exists().then_some((place, what)),
                    None => Some((place, what)),
                })
                .filter_map(|(place, what)| match place.split_once('@') {
                    Some((place, of)) => (of == program).then_some((place, what)),
                    None => Some((place, what)),
                })
                .map(|(place, what)| (place.to_owned(), what.to_owned()))
                .collect()
        })
    }

    /// Finds out what is wanted, while the program's file can still be seen: in the sandbox it cannot.
    pub(crate) fn read() {
        faults();
    }

    fn wanted(place: &str) -> Option<&'static str> {
        let mut faults = faults().iter();
        faults.find(|(at, _)| at == place).map(|(_, what)| what.as_str())
    }

    pub(crate) fn at(place: &str) {
        match wanted(place) {
            Some("abort") => std::process::abort(),
            Some("exit") => std::process::exit(1),
            Some("hang") => loop {
                std::thread::park();
            },
            _ => {}
        }
    }

    /// At a place that is passed for the `number`th time.
    pub(crate) fn nth(place: &str, number: usize) {
        if !faults().is_empty() {
            at(&format!("{place}-{number}"));
        }
    }

    /// Whether just this is wanted.
    pub(crate) fn is(place: &str, what: &str) -> bool {
        wanted(place) == Some(what)
    }

    /// Two numbers.
    pub(crate) fn range(place: &str) -> Option<std::ops::RangeInclusive<u32>> {
        let (from, to) = wanted(place)?.split_once('-')?;
        Some(from.parse().ok()?..=to.parse().ok()?)
    }

    /// Bytes to be written in the place of others.
    pub(crate) fn replaced(place: &str) -> Option<&'static [u8]> {
        wanted(place).map(str::as_bytes)
    }

    /// An error or a panic.
    pub(crate) fn fails(place: &str) -> anyhow::Result<()> {
        let wanted = |what: &str| faults().iter().any(|(at, wanted)| at == place && wanted == what);
        assert!(!wanted("panic"), "a fault was asked for");
        anyhow::ensure!(!wanted("refuse"), "a fault was asked for");
        Ok(())
    }

    fn hits(place: &str, bytes: &[u8]) -> bool {
        let hit = |what: &str| {
            bytes
                .windows(what.len().max(1))
                .any(|part| part == what.as_bytes())
        };
        faults().iter().any(|(at, what)| at == place && hit(what))
    }

    fn on(place: &str, bytes: &[u8]) {
        if hits(place, bytes) {
            std::process::abort();
        }
    }

    pub(crate) fn panic_on(place: &str, bytes: &[u8]) {
        assert!(!hits(place, bytes), "a fault was asked for");
    }

    /// While a submission with these bytes is handled.
    pub(crate) fn on_submission(bytes: &[u8], beat: impl Fn()) {
        if faults().is_empty() {
            return;
        }
        on("submission", bytes);
        panic_on("submission-panics", bytes);
        let hangs = hits("submission-hangs", bytes);
        let waits = hits("submission-waits", bytes);
        if !hangs && !waits {
            return;
        }
        tracing::warn!("a fault was asked for: this core stands still in a submission");
        loop {
            if waits {
                beat();
            }
            std::thread::park_timeout(std::time::Duration::from_millis(10));
        }
    }

    pub(crate) fn on_any(place: &str, value: &impl std::fmt::Debug) {
        if faults().iter().any(|(at, _)| at == place) {
            on(place, format!("{value:?}").as_bytes());
        }
    }
}

#[cfg(not(debug_assertions))]
mod on_demand {
    pub(crate) const fn read() {}
    pub(crate) const fn at(_: &str) {}
    pub(crate) const fn nth(_: &str, _: usize) {}
    pub(crate) const fn range(_: &str) -> Option<std::ops::RangeInclusive<u32>> {
        None
    }
    pub(crate) const fn is(_: &str, _: &str) -> bool {
        false
    }
    pub(crate) const fn replaced(_: &str) -> Option<&'static [u8]> {
        None
    }
    pub(crate) fn on_submission(_: &[u8], _: impl Fn()) {}
    #[allow(clippy::unnecessary_wraps)] // as the other
    pub(crate) const fn fails(_: &str) -> anyhow::Result<()> {
        Ok(())
    }
    pub(crate) const fn panic_on(_: &str, _: &[u8]) {}
    pub(crate) const fn on_any<T: std::fmt::Debug>(_: &str, _: &T) {}
}

pub(crate) use on_demand::{at, fails, is, nth, on_any, on_submission, panic_on, range, read, replaced};
