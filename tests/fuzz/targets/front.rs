#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmgmt_fuzz_bodies::run("front", bytes));
