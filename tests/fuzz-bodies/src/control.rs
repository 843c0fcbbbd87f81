//! The operators' socket: the daemon's server reading any lines cut anywhere, and `vmgmtctl`'s client reading any answers. A good request in
//! between is still answered, whatever the others write; a request that is read says the same when it is written.

use crate::edits::edit;
use arbitrary::{Result, Unstructured};
use mio::{Events, Poll};
use std::cell::OnceCell;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;
use vmgmt_ctl::client::Client;
use vmgmt_ctl::protocol::{Call, ErrorCode, Event, Failure, Message, Request, Response};
use vmgmt_host::control::{ControlServer, Incoming, limits};

const LINES: [&str; 16] = [
    r#"{"vmgmt":1,"id":1,"method":"status"}"#,
    r#"{"vmgmt":1,"id":2,"method":"vms"}"#,
    r#"{"vmgmt":1,"id":3,"method":"peers"}"#,
    r#"{"vmgmt":1,"id":4,"method":"shares"}"#,
    r#"{"vmgmt":1,"id":5,"method":"hello"}"#,
    r#"{"vmgmt":1,"id":6,"method":"send","params":{"to":"vm1","text":"hello"}}"#,
    r#"{"vmgmt":1,"id":6,"method":"send","params":{"to":"vm1","base64":"aGVsbG8="}}"#,
    r#"{"vmgmt":1,"id":7,"method":"recv","params":{"follow":true}}"#,
    r#"{"vmgmt":1,"id":8,"method":"push","params":{"to":"vm1","name":"file"}}"#,
    r#"{"vmgmt":1,"id":9,"method":"pull","params":{"from":"vm1","path":"file"}}"#,
    r#"{"vmgmt":1,"id":10,"method":"add-vm","params":{"name":"vm9","socket":"/run/x.sock","shares":["a:rw"]}}"#,
    r#"{"vmgmt":1,"id":11,"method":"remove-vm","params":{"name":"vm9"}}"#,
    r#"{"vmgmt":1,"id":12,"method":"log","params":{"follow":false}}"#,
    r#"{"vmgmt":2,"id":13,"method":"status"}"#,
    r#"{"id":14}"#,
    r#"[[[[[[[[[[{"a":"#,
];

pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let _ = choose(&mut u);
}

fn choose(u: &mut Unstructured<'_>) -> Result<()> {
    match u.int_in_range(0..=3u8)? {
        0 => lines(u),
        1 => client(u),
        _ => server(u),
    }
}

fn line(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut line = u.choose(&LINES)?.as_bytes().to_vec();
    if u.ratio(1, 2)? {
        edit(u, &mut line)?;
    }
    if u.ratio(1, 64)? {
        let deep = u.int_in_range(0..=100_000usize)?;
        line.extend(std::iter::repeat_n(b'[', deep));
    }
    Ok(line)
}

fn lines(u: &mut Unstructured<'_>) -> Result<()> {
    let line = line(u)?;
    match Request::from_line(&line) {
        Ok(request) => {
            let written = request.to_line();
            let again = Request::from_line(written.strip_suffix(b"\n").unwrap()).expect("our own line");
            assert_eq!(again.to_line(), written);
        }
        Err(response) => assert!(response.to_line().ends_with(b"\n")),
    }
    Ok(())
}

/// A listening socket that lies nowhere in the file system.
fn listener(name: &str) -> UnixListener {
    let address = address(name);
    UnixListener::bind_addr(&address).unwrap()
}

fn address(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!(
        "vmgmt-fuzz-{name}-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ))
    .unwrap()
}

struct Served {
    server: ControlServer,
    poll: Poll,
    name: SocketAddr,
}

fn server(u: &mut Unstructured<'_>) -> Result<()> {
    let listener = listener("control");
    let mut served = Served {
        name: listener.local_addr().unwrap(),
        server: ControlServer::new(listener.into()).unwrap(),
        poll: Poll::new().unwrap(),
    };
    served.server.register(served.poll.registry(), 1).unwrap();
    let mut honest = UnixStream::connect_addr(&served.name).unwrap();
    honest.set_nonblocking(true).unwrap();
    let mut others: Vec<UnixStream> = Vec::new();
    let mut open = Vec::new();
    while !u.is_empty() {
        match u.int_in_range(0..=7u8)? {
            0 if others.len() < 6 => {
                let other = UnixStream::connect_addr(&served.name).unwrap();
                other.set_nonblocking(true).unwrap();
                others.push(other);
            }
            1 if !others.is_empty() => drop(others.swap_remove(u.int_in_range(0..=others.len() - 1)?)),
            2 if !others.is_empty() => {
                let n = u.int_in_range(0..=others.len() - 1)?;
                let _ = others[n].read(&mut [0; 4096]);
            }
            _ if !others.is_empty() => {
                let mut bytes = line(u)?;
                if u.ratio(7, 8)? {
                    bytes.push(b'\n');
                }
                let (first, rest) = bytes.split_at(u.int_in_range(0..=bytes.len())?);
                let n = u.int_in_range(0..=others.len() - 1)?;
                let _ = others[n].write(first);
                serve(u, &mut served, &mut open)?;
                if let Some(other) = others.get_mut(n) {
                    let _ = other.write(rest);
                }
            }
            _ => {}
        }
        serve(u, &mut served, &mut open)?;
    }
    // Answers to requests of clients that may be gone.
    for (client, id) in open.drain(..) {
        served
            .server
            .fail(client, id, Failure::new(ErrorCode::Restarting, "late", ""));
    }
    honest
        .write_all(b"{\"vmgmt\":1,\"id\":77,\"method\":\"status\"}\n")
        .unwrap();
    let mut answer = Vec::new();
    for _ in 0..200 {
        serve(u, &mut served, &mut open)?;
        for (client, id) in open.drain(..) {
            served.server.reply(client, id, &"fine");
        }
        let mut buffer = [0; 4096];
        if let Ok(bytes) = honest.read(&mut buffer) {
            assert_ne!(bytes, 0, "the honest client was dropped");
            answer.extend_from_slice(&buffer[..bytes]);
        }
        if answer.ends_with(b"\n") {
            let text = String::from_utf8(answer).unwrap();
            assert!(text.contains("\"id\":77") && text.contains("fine"), "{text}");
            return Ok(());
        }
    }
    panic!("the honest client got no answer");
}

fn serve(
    u: &mut Unstructured<'_>,
    served: &mut Served,
    open: &mut Vec<(vmgmt_host::control::ClientId, u64)>,
) -> Result<()> {
    let mut events = Events::with_capacity(64);
    served.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
    for event in &events {
        assert!((1..=limits::TOKENS).contains(&event.token().0));
        served.server.handle_ready(event.token());
    }
    for _ in 0..64 {
        match served.server.poll_request() {
            Some(Incoming::Request(asked)) if asked.id == 77 => open.push((asked.client, asked.id)),
            Some(Incoming::Request(asked)) => match u.int_in_range(0..=3u8).unwrap_or(0) {
                0 => open.push((asked.client, asked.id)),
                1 => {
                    let event = Event::Message(Message::default().with_bytes(vec![b'x'; 100]));
                    let _ = served.server.event(asked.client, asked.id, event);
                    served.server.reply(asked.client, asked.id, &"done");
                }
                _ => served.server.fail(
                    asked.client,
                    asked.id,
                    Failure::new(ErrorCode::BadRequest, "no", ""),
                ),
            },
            Some(_) => {}
            None => break,
        }
    }
    Ok(())
}

thread_local! {
    /// The client connects to a path: one for all runs.
    static DAEMON: OnceCell<(tempfile::TempDir, UnixListener)> = const { OnceCell::new() };
}

/// `vmgmtctl`'s side: any bytes come back instead of an answer.
fn client(u: &mut Unstructured<'_>) -> Result<()> {
    DAEMON.with(|daemon| {
        let (directory, listener) = daemon.get_or_init(|| {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("control.sock")).unwrap();
            (directory, listener)
        });
        let mut client = Client::connect(&directory.path().join("control.sock")).unwrap();
        let (mut daemon, _) = listener.accept().unwrap();
        let mut answers = Vec::new();
        for _ in 0..u.int_in_range(0..=4u8)? {
            let mut answer = match u.int_in_range(0..=4u8)? {
                0 => Response::result(1, &"fine").to_line(),
                1 => Response::failed(Some(1), Failure::new(ErrorCode::BadRequest, "no", "do")).to_line(),
                2 => Response::event(1, Event::Message(Message::default().with_bytes(vec![255, 0, 7])))
                    .to_line(),
                3 => Response::failed(None, Failure::new(ErrorCode::NotSupported, "no", "")).to_line(),
                _ => line(u)?,
            };
            if u.ratio(1, 2)? {
                edit(u, &mut answer)?;
            }
            // A daemon that restarts for ever is asked again for five seconds, by the clock: not here.
            if String::from_utf8_lossy(&answer).contains("restarting") {
                continue;
            }
            answers.extend(answer);
        }
        let _ = daemon.write_all(&answers);
        // The end of the stream is the end of this call: it is none of those that are asked again.
        drop(daemon);
        let mut events = 0;
        let call = Call::Recv(vmgmt_ctl::protocol::Receive::default());
        let result = client.call(&call, &[], Some(Duration::from_millis(100)), &mut |event| {
            if let Event::Message(message) = &event {
                let _ = message.bytes();
            }
            events += 1;
            events < 100
        });
        if let Err(error) = result {
            assert!(!error.to_string().is_empty());
            let _ = error.remedy();
        }
        Ok(())
    })
}
