//! Lines on standard output and standard error.
//!
//! Comes in: finished text. Goes out: the line, or, on standard output, the error of writing it. `println!` would panic when the reader has gone
//! (`vmgmt ls | head -1`); here that is an error like any other, and [`crate::ending`] ends the program without a word about it.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use vmgmt_driver::DriverError;

/// Writes one line.
pub fn line(text: Arguments<'_>) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_fmt(text)?;
    output.write_all(b"\n")
}

/// Writes one line on standard error. Who reads it may have gone, in the middle of work that goes on: `eprintln!` would panic there, and
/// nobody is left to be told.
pub fn complain(text: Arguments<'_>) {
    let _unread = writeln!(std::io::stderr(), "{text}");
}

/// Whether it failed because nobody reads what is written.
pub fn is_unread(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| match cause.downcast_ref() {
            // Its text contains the cause, so it names none as its source.
            Some(DriverError::File { cause, .. }) => Some(cause),
            _ => cause.downcast_ref::<std::io::Error>(),
        })
        .any(|cause| cause.kind() == ErrorKind::BrokenPipe)
}

/// `println!` that returns its error to the caller.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::output::line(format_args!($($text)*))?
    };
}
pub(crate) use say;
