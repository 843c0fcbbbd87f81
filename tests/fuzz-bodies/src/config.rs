//! The configuration: any text gives a configuration or mistakes that say something, each with a remedy.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use vmgmt_host::config::{Flags, load};

thread_local! {
    /// One file for all runs: it lies nowhere.
    static FILE: OnceCell<File> = const { OnceCell::new() };
}

pub fn run(bytes: &[u8]) {
    FILE.with(|file| {
        let mut file = file.get_or_init(|| tempfile::tempfile().unwrap());
        file.set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(bytes).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        match load(Some(&path), &Flags::default()) {
            Ok(config) => {
                // What passed is within what the roles promise to take.
                for (listener, _) in &config.listeners {
                    let device = &listener.device;
                    assert!(device.vectors.is_power_of_two() && device.vectors <= 16);
                    assert!((1..=16).contains(&device.rings) && device.maps_max > 0);
                }
            }
            Err(mistakes) => assert!(!mistakes.to_string().is_empty()),
        }
    });
}
