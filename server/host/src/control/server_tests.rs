//! The control server against real sockets and a real event loop.

use super::super::limits::PENDING_FDS_MAX;
use super::super::protocol::{Body, LogLine, Push, Status};
use super::*;
use mio::{Events, Poll};
use proptest::prelude::*;
use rustix::fd::AsFd;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{BufRead, BufReader, IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::time::Duration;

struct Bench {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
    poll: Poll,
    server: ControlServer,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let mut server = ControlServer::new(StdUnixListener::bind(&path).unwrap().into()).unwrap();
        let poll = Poll::new().unwrap();
        server.register(poll.registry(), 100).unwrap();
        Self {
            _directory: directory,
            path,
            poll,
            server,
        }
    }
    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }
    /// Runs the loop until something comes in.
    fn next(&mut self) -> Incoming {
        let mut events = Events::with_capacity(16);
        loop {
            if let Some(incoming) = self.server.poll_request() {
                return incoming;
            }
            self.poll
                .poll(&mut events, Some(Duration::from_secs(60)))
                .unwrap();
            assert!(!events.is_empty(), "nothing came in");
            for event in &events {
                assert!(self.server.handle_ready(event.token()));
            }
        }
    }
    fn next_request(&mut self) -> Asked {
        match self.next() {
            Incoming::Request(asked) => asked,
            other => panic!("{other:?}"),
        }
    }
}

fn lines_of(stream: &UnixStream) -> BufReader<UnixStream> {
    BufReader::new(stream.try_clone().unwrap())
}

fn response(lines: &mut BufReader<UnixStream>) -> Response {
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[&std::fs::File]) -> usize {
    let fds: Vec<_> = fds.iter().map(|file| file.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(&fds).size()];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap()
}

fn push(id: u64, name: &str) -> Request {
    Request {
        id,
        call: Call::Push(Push {
            key: None,
            to: "web".into(),
            name: name.into(),
            wait_ms: 1,
        }),
    }
}

#[test]
fn requests_are_answered_in_any_order_with_events_before() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    for id in [7, 8] {
        stream
            .write_all(
                &Request {
                    id,
                    call: Call::Status,
                }
                .to_line(),
            )
            .unwrap();
    }
    let (first, second) = (bench.next_request(), bench.next_request());
    assert_eq!((first.id, second.id), (7, 8));
    assert!(
        bench
            .server
            .event(first.client, 7, Event::Log(LogLine::default()))
    );
    bench.server.reply(
        second.client,
        8,
        &Status {
            life: 3,
            ..Status::default()
        },
    );
    bench
        .server
        .fail(first.client, 7, Failure::new(ErrorCode::Denied, "no", "ask"));
    // Ended requests take nothing more.
    assert!(
        !bench
            .server
            .event(first.client, 7, Event::Log(LogLine::default()))
    );
    bench.server.reply(second.client, 8, &0);
    let mut lines = lines_of(&stream);
    assert!(matches!(
        response(&mut lines),
        Response {
            id: Some(7),
            body: Body::Event(Event::Log(_))
        }
    ));
    assert!(matches!(
        response(&mut lines),
        Response {
            id: Some(8),
            body: Body::Result(_)
        }
    ));
    assert!(matches!(
        response(&mut lines),
        Response {
            id: Some(7),
            body: Body::Error(_)
        }
    ));
    let client = first.client;
    drop((stream, lines));
    assert!(matches!(bench.next(), Incoming::Gone { client: gone } if gone == client));
    assert_eq!(bench.server.clients(), 0);
}

#[test]
fn mistakes_are_answered_and_the_connection_lives_but_not_with_an_endless_line() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    let mut lines = lines_of(&stream);
    stream
        .write_all(b"nonsense\n\n{\"vmgmt\":1,\"id\":5,\"method\":\"fly\"}\n")
        .unwrap();
    stream
        .write_all(
            &Request {
                id: 6,
                call: Call::Vms,
            }
            .to_line(),
        )
        .unwrap();
    stream
        .write_all(
            &Request {
                id: 6,
                call: Call::Vms,
            }
            .to_line(),
        )
        .unwrap();
    assert_eq!(bench.next_request().id, 6);
    assert!(bench.server.poll_request().is_none());
    assert_eq!(
        [(); 3].map(|()| response(&mut lines).id),
        [None, Some(5), Some(6)]
    );

    let writer = std::thread::spawn(move || {
        let piece = [b'x'; 1 << 16];
        while stream.write_all(&piece).is_ok() {}
    });
    assert!(matches!(bench.next(), Incoming::Gone { .. }));
    let Body::Error(failure) = response(&mut lines).body else {
        panic!()
    };
    assert!(failure.message.contains("more than"), "{}", failure.message);
    writer.join().unwrap();
}

#[test]
fn descriptors_come_with_the_request_that_they_were_sent_with() {
    let mut bench = Bench::new();
    let stream = bench.connect();
    let mut files: Vec<std::fs::File> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
    for (number, file) in files.iter_mut().enumerate() {
        write!(file, "{number}").unwrap();
        file.rewind().unwrap();
    }
    // A request without descriptors before and after; a line cut into three; a long one that takes several packets.
    (&stream)
        .write_all(
            &Request {
                id: 1,
                call: Call::Status,
            }
            .to_line(),
        )
        .unwrap();
    let line = push(2, "a").to_line();
    send_with_fds(&stream, &line[..5], &[&files[0]]);
    (&stream).write_all(&line[5..]).unwrap();
    send_with_fds(&stream, &push(3, "b").to_line(), &[&files[1], &files[2]]);
    (&stream)
        .write_all(
            &Request {
                id: 4,
                call: Call::Status,
            }
            .to_line(),
        )
        .unwrap();
    let found: Vec<(u64, Vec<String>)> = (0..4)
        .map(|_| {
            let asked = bench.next_request();
            let contents = asked.fds.into_iter().map(|fd| {
                let mut text = String::new();
                std::fs::File::from(fd).read_to_string(&mut text).unwrap();
                text
            });
            (asked.id, contents.collect())
        })
        .collect();
    let expected = [(1, vec![]), (2, vec!["0"]), (3, vec!["1", "2"]), (4, vec![])];
    assert_eq!(
        found,
        expected.map(|(id, texts)| (id, texts.into_iter().map(String::from).collect()))
    );
}

#[test]
fn hoarded_descriptors_end_the_connection() {
    let mut bench = Bench::new();
    let stream = bench.connect();
    let file = tempfile::tempfile().unwrap();
    for _ in 0..=PENDING_FDS_MAX {
        send_with_fds(&stream, b"x", &[&file]);
    }
    assert!(matches!(bench.next(), Incoming::Gone { .. }));
}

#[test]
fn a_client_that_does_not_read_gets_no_more_events_and_hears_of_room() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    stream
        .write_all(
            &Request {
                id: 1,
                call: Call::Log(super::super::protocol::Log { follow: true }),
            }
            .to_line(),
        )
        .unwrap();
    let client = bench.next_request().client;
    let line = || {
        Event::Log(LogLine {
            text: "x".repeat(4096),
            ..LogLine::default()
        })
    };
    let mut queued = 0;
    while bench.server.event(client, 1, line()) {
        queued += 1;
        assert!(queued < 10_000, "no bound");
    }
    // Its requests wait as well.
    stream
        .write_all(
            &Request {
                id: 2,
                call: Call::Status,
            }
            .to_line(),
        )
        .unwrap();
    assert!(bench.server.poll_request().is_none());
    let (leave, may_leave) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut lines = lines_of(&stream);
        for _ in 0..queued {
            response(&mut lines);
        }
        // An event to a closed connection would end it before what it still asked is read.
        may_leave.recv().unwrap();
        drop(stream);
    });
    assert!(matches!(bench.next(), Incoming::Room { client: roomy } if roomy == client));
    assert!(bench.server.event(client, 1, line()));
    assert_eq!(bench.next_request().id, 2);
    leave.send(()).unwrap();
    assert!(matches!(bench.next(), Incoming::Gone { .. }));
    reader.join().unwrap();
}

#[test]
fn more_requests_than_may_be_in_flight_wait_in_the_socket() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    let count = REQUESTS_IN_FLIGHT_MAX as u64 + 5;
    for id in 0..count {
        stream
            .write_all(
                &Request {
                    id,
                    call: Call::Status,
                }
                .to_line(),
            )
            .unwrap();
    }
    let begun: Vec<Asked> = (0..REQUESTS_IN_FLIGHT_MAX)
        .map(|_| bench.next_request())
        .collect();
    assert!(bench.server.poll_request().is_none());
    for asked in &begun {
        bench.server.reply(asked.client, asked.id, &Status::default());
    }
    assert_eq!((0..5).map(|_| bench.next_request().id).last(), Some(count - 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However the lines are cut into packets, and with whatever descriptors, the same requests come out in their order.
    #[test]
    fn any_split_gives_the_same_requests(
        requests in prop::collection::vec((0usize..3, "[a-zäß\"\\\\\n]{0,40}"), 1..12),
        cuts in prop::collection::vec(1usize..64, 1..40),
    ) {
        let mut bench = Bench::new();
        let stream = bench.connect();
        let file = tempfile::tempfile().unwrap();
        let sent = requests.clone();
        // Many small packets are more than the socket holds: the server reads meanwhile.
        let sender = std::thread::spawn(move || {
            let mut cuts = cuts.iter().copied().cycle();
            for (id, (fds, name)) in sent.iter().enumerate() {
                let line = push(id as u64, name).to_line();
                let mut rest = line.as_slice();
                let mut fds = vec![&file; *fds];
                while !rest.is_empty() {
                    let bytes = cuts.next().unwrap().min(rest.len());
                    let sent = send_with_fds(&stream, &rest[..bytes], &std::mem::take(&mut fds));
                    rest = &rest[sent..];
                }
            }
            stream
        });
        for (id, (fds, name)) in requests.iter().enumerate() {
            let asked = bench.next_request();
            prop_assert_eq!(asked.fds.len(), *fds);
            prop_assert_eq!(Request { id: asked.id, call: asked.call }, push(id as u64, name));
            bench.server.reply(asked.client, asked.id, &Status::default());
        }
        sender.join().unwrap();
    }
}

#[test]
fn a_delivery_is_told_of_when_its_last_byte_is_in_the_socket() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    let call = Call::Recv(super::super::protocol::Receive::default());
    stream.write_all(&Request { id: 7, call }.to_line()).unwrap();
    let asked = bench.next_request();
    let line = |text: &str| {
        Event::Log(LogLine {
            time_ns: 1,
            vm: None,
            text: text.into(),
        })
    };
    assert!(bench.server.deliver(asked.client, 7, line("small")));
    // (What is no delivery is not told of.)
    assert!(bench.server.event(asked.client, 7, line("an event")));
    assert_eq!(bench.server.take_written(), [(asked.client, 7)]);
    let long = "x".repeat(100_000);
    let mut given = 0;
    while bench.server.deliver(asked.client, 7, line(&long)) {
        given += 1;
    }
    let mut written = bench.server.take_written().len();
    assert!(
        written < given,
        "{given} lines are all in a socket that nobody reads"
    );
    let mut lines = lines_of(&stream);
    let reader = std::thread::spawn(move || {
        for _ in 0..2 + given {
            response(&mut lines);
        }
        lines
    });
    let mut events = Events::with_capacity(16);
    while written < given {
        bench
            .poll
            .poll(&mut events, Some(Duration::from_secs(60)))
            .unwrap();
        assert!(!events.is_empty(), "{written} of {given} lines were written");
        for event in &events {
            bench.server.handle_ready(event.token());
        }
        written += bench.server.take_written().len();
    }
    let lines = reader.join().unwrap();
    assert_eq!(written, given);
    // Of what is not whole in the socket when the connection breaks, nothing is told.
    while bench.server.deliver(asked.client, 7, line(&long)) {}
    bench.server.take_written();
    drop((stream, lines));
    while !matches!(bench.next(), Incoming::Gone { .. }) {}
    assert_eq!(bench.server.take_written(), []);
}
