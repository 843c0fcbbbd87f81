//! Faults on demand, for the tests of survival: in debug builds only, and only where `VMGMT_FAULT` asks for them.
//!
//! `VMGMT_FAULT=PLACE[@PROGRAM]=WHAT,…`. PROGRAM is the file name of the program that it is for (all, if left out), so that one daemon
//! can have a good old and a bad new program. PLACE `check`, `trial`, `go`, `rehearse`, `serve` (a front that takes over; it
//! cannot see its program's name): WHAT is `abort`, `hang` or `exit`. PLACE `resume`:
//! WHAT is `refuse` or `panic`. PLACE `submission`,
//! `worker`: the process aborts when a submission's data, or the names that a worker is given, contain WHAT. PLACE `register`, `end`: the
//! front panics when a register is written with a value that contains WHAT, or in the middle of the end of a session of the VM WHAT.

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

    pub(crate) fn at(place: &str) {
        match faults()
            .iter()
            .find(|(at, _)| at == place)
            .map(|(_, what)| what.as_str())
        {
            Some("abort") => std::process::abort(),
            Some("exit") => std::process::exit(1),
            Some("hang") => loop {
                std::thread::park();
            },
            _ => {}
        }
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

    pub(crate) fn on(place: &str, bytes: &[u8]) {
        if hits(place, bytes) {
            std::process::abort();
        }
    }

    pub(crate) fn panic_on(place: &str, bytes: &[u8]) {
        assert!(!hits(place, bytes), "a fault was asked for");
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
    #[allow(clippy::unnecessary_wraps)] // as the other
    pub(crate) const fn fails(_: &str) -> anyhow::Result<()> {
        Ok(())
    }
    pub(crate) const fn on(_: &str, _: &[u8]) {}
    pub(crate) const fn panic_on(_: &str, _: &[u8]) {}
    pub(crate) const fn on_any<T: std::fmt::Debug>(_: &str, _: &T) {}
}

pub(crate) use on_demand::{at, fails, on, on_any, panic_on, read};
