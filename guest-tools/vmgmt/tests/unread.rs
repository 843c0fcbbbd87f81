//! What the program does when nobody reads its output: it ends with the code of what it did, without a panic.

use std::process::{Command, Stdio};

#[test]
fn a_reader_that_has_gone_is_no_panic() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    // No such device: its error is one JSON line, which cannot be written.
    let output = Command::new(env!("CARGO_BIN_EXE_vmgmt"))
        .args(["--json", "--device", "ffff:1f:1f.7", "info"])
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(
        output.status.code(),
        Some(7),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
