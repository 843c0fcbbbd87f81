//! A progress bar on standard error: only on a terminal, and only for work that lasts.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Work shorter than this shows nothing.
const QUIET: Duration = Duration::from_millis(700);

/// A bar that appears when it is worth it.
pub struct Progress {
    started: Instant,
    size: Option<u64>,
    bar: Option<ProgressBar>,
    wanted: bool,
    /// Bytes so far.
    pub bytes: u64,
}

impl Progress {
    /// For `size` bytes, if known.
    pub fn new(size: Option<u64>, json: bool) -> Self {
        Self {
            started: Instant::now(),
            size,
            bar: None,
            wanted: !json && std::io::stderr().is_terminal(),
            bytes: 0,
        }
    }

    /// So many bytes are done.
    pub fn at(&mut self, bytes: u64) {
        self.bytes = bytes;
        if !self.wanted || self.started.elapsed() < QUIET {
            return;
        }
        let size = self.size;
        let bar = self.bar.get_or_insert_with(|| {
            let bar = size.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            let style = if size.is_some() {
                "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"
            } else {
                "{spinner} {bytes} {bytes_per_sec}"
            };
            bar.set_style(
                ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar
        });
        bar.set_position(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
