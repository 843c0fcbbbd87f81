//! Operators while one core follows another.

use super::*;
use crate::control::protocol::{Release, Request};
use crate::keeper::saved_tests::scene;
use mio::Events;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

fn line(id: u64, call: Call) -> Vec<u8> {
    Request { id, call }.to_line()
}

#[test]
fn what_came_in_before_a_core_was_ready_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let mut keeper = scene();
    keeper.control.fd = UnixListener::bind(&path).unwrap().into();
    keeper.core.as_mut().unwrap().ready = None;
    let mut operator = UnixStream::connect(&path).unwrap();
    operator.write_all(&line(1, Call::Hello)).unwrap();
    keeper.serve_fallback();
    assert_eq!(keeper.fallback.as_ref().unwrap().clients(), 1);

    // It asks for what must not be asked for twice, and in the same turn the core says that it is there.
    let release = Call::Release(Release { vm: "nobody".into() });
    operator.write_all(&line(2, release)).unwrap();
    let mut events = Events::with_capacity(8);
    keeper.poll.poll(&mut events, None).unwrap();
    for event in &events {
        keeper.fallback.as_mut().unwrap().handle_ready(event.token());
    }
    keeper.core.as_mut().unwrap().ready = Some(Instant::now());
    keeper.serve_fallback();
    assert!(keeper.fallback.is_none(), "the core answers from now on");

    let mut answers = String::new();
    operator.read_to_string(&mut answers).unwrap();
    let answers: Vec<&str> = answers.lines().collect();
    assert_eq!(answers.len(), 2, "{answers:?}");
    assert!(
        answers[1].contains("\"id\":2") && answers[1].contains("nobody"),
        "{answers:?}"
    );
    // Who comes now finds no keeper that listens.
    keeper.serve_fallback();
    assert!(keeper.fallback.is_none());
}
