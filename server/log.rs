//! The log's way out: lines in, standard error out, and nobody ever waits for it.
//!
//! In: lines of any thread. Out: the same lines on standard error, written by a thread of their own. Standard error can block for ever (a pipe
//! that nobody reads, a stopped terminal, a disk under write-back), and the front has 5 seconds before QEMU gives its device up. So there is a
//! queue, and where it is full lines are counted instead of kept. It must never know what a line says.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// Lines that wait: a burst at a slow disk, some hundred bytes each, so below 1 MiB.
const LINES_MAX: usize = 2048;
/// How long the end of a process waits for its last lines.
const FLUSH_WAIT: Duration = Duration::from_millis(500);

enum Message {
    Line(Vec<u8>),
    /// Everything before this was written.
    Flush(SyncSender<()>),
}

/// Takes lines; each write is one line. A copy is as good as the first.
#[derive(Clone)]
pub struct LogWriter {
    queue: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl LogWriter {
    /// Starts the thread that writes to `sink`; it runs when this returns, so that a filter of system calls may be put on.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(sink: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel(LINES_MAX);
        let (runs, running) = sync_channel(1);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        std::thread::Builder::new().name("log".into()).spawn(move || {
            // Its starter waits for this.
            let _ = runs.send(());
            write_lines(sink, &lines, &counted);
        })?;
        let _ = running.recv();
        Ok(Self { queue, lost })
    }

    /// Waits a moment until what was logged so far is written.
    pub fn finish(&self) {
        let (done, written) = sync_channel(1);
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            // Late or never: then the sink blocks, and the lines are lost with the process.
            let _ = written.recv_timeout(FLUSH_WAIT);
        }
    }
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Message::Line(line.to_vec())) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn write_lines(mut sink: impl Write, lines: &Receiver<Message>, lost: &AtomicU64) {
    while let Ok(message) = lines.recv() {
        // An error of the sink has nobody to be told to; the next line may get through.
        match message {
            Message::Line(line) => {
                let _ = sink.write_all(&line);
            }
            Message::Flush(done) => {
                let _ = sink.flush();
                let _ = done.try_send(());
            }
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(
                sink,
                "vmgmtd: {lost} lines of the log were lost: its reader was too slow"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_reader_that_stands_still_holds_nobody_up() {
        let (mut reader, sink) = std::io::pipe().expect("a pipe");
        let mut log = LogWriter::start(sink).expect("a thread");
        let line = [b"x".repeat(199), b"\n".to_vec()].concat();
        // More than pipe and queue hold: this returns only because nothing waits.
        let lines = LINES_MAX * 3;
        for _ in 0..lines {
            log.write_all(&line).expect("never fails");
        }
        drop(log);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("text");
        let (kept, told): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.starts_with('x'));
        let lost: usize = told
            .iter()
            .filter_map(|line| line.split(' ').nth(1))
            .filter_map(|number| number.parse::<usize>().ok())
            .sum();
        assert!(lost > 0 && kept.len() >= LINES_MAX);
        assert_eq!(kept.len() + lost, lines, "each line is written or counted");
    }

    #[test]
    fn the_last_lines_are_written_before_the_end() {
        let (mut reader, sink) = std::io::pipe().expect("a pipe");
        let mut log = LogWriter::start(sink).expect("a thread");
        log.write_all(b"last words\n").expect("never fails");
        log.finish();
        let mut text = [0; 11];
        reader.read_exact(&mut text).expect("they are there");
        assert_eq!(&text, b"last words\n");
    }
}
