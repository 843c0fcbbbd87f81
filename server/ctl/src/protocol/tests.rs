//! Every line of the protocol goes out and comes back as it was; what is none is refused with what to do.

use super::*;

fn calls() -> Vec<Call> {
    vec![
        Call::Hello,
        Call::Status,
        Call::Vms,
        Call::Peers,
        Call::Shares,
        Call::Send(SendMessage {
            key: Some(7),
            to: "web".into(),
            text: Some("hello\n".into()),
            base64: None,
        }),
        Call::Recv(Receive {
            follow: true,
            wait_ms: 5,
        }),
        Call::Push(Push {
            key: Some(7),
            to: "web".into(),
            name: "a.txt".into(),
            wait_ms: 7,
        }),
        Call::Pull(Pull {
            key: Some(7),
            from: "web".into(),
            path: "b".into(),
            wait_ms: 8,
        }),
        Call::AddVm(Box::new(AddVm {
            name: "web".into(),
            socket: "/run/web".into(),
            ..AddVm::default()
        })),
        Call::RemoveVm(RemoveVm { name: "web".into() }),
        Call::Freeze(Freeze {
            name: "web".into(),
            timeout_seconds: Some(9),
        }),
        Call::Thaw(Thaw { name: "web".into() }),
        Call::Log(Log { follow: true }),
        Call::Upgrade(Upgrade {
            to: Some("/usr/sbin/vmgmtd".into()),
            parts: vec![Part::Core, Part::Front],
        }),
        Call::Reload,
        Call::Release(Release { vm: "web".into() }),
    ]
}

#[test]
fn every_request_is_read_as_it_was_written() {
    for (id, call) in calls().into_iter().enumerate() {
        let request = Request { id: id as u64, call };
        let line = request.to_line();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert_eq!(Request::from_line(line.trim_ascii_end()), Ok(request));
    }
    assert_eq!(calls().iter().map(Call::method).collect::<Vec<_>>(), METHODS);
}

#[test]
fn what_is_wrong_with_a_request_is_named_and_its_id_kept() {
    let mistakes: [(&[u8], Option<u64>, &str); 6] = [
        (b"{", None, "not a line of JSON"),
        (br#"{"id":4}"#, Some(4), "missing field `vmgmt`"),
        (br#"{"vmgmt":2,"id":4,"method":"status"}"#, Some(4), "version 2"),
        (
            br#"{"vmgmt":1,"id":4,"method":"reboot"}"#,
            Some(4),
            "no method \"reboot\"",
        ),
        (
            br#"{"vmgmt":1,"id":4,"method":"send","params":{"two":1}}"#,
            Some(4),
            "unknown field `two`",
        ),
        (
            br#"{"vmgmt":1,"id":4,"method":"remove-vm"}"#,
            Some(4),
            "missing field `name`",
        ),
    ];
    for (line, id, text) in mistakes {
        let response = Request::from_line(line).unwrap_err();
        assert_eq!(response.id, id);
        let Body::Error(failure) = response.body else {
            panic!("{text}")
        };
        assert!(failure.message.contains(text), "{} / {text}", failure.message);
        assert!(!failure.remedy.is_empty());
    }
}

#[test]
fn answers_look_as_documented() {
    let lines = [
        (
            Response::result(1, &Sent { number: 7 }),
            r#"{"id":1,"result":{"number":7}}"#,
        ),
        (
            Response::failed(None, Failure::new(ErrorCode::TimedOut, "m", "r")),
            r#"{"id":null,"error":{"code":"timed-out","message":"m","remedy":"r"}}"#,
        ),
        (
            Response::event(
                2,
                Event::Progress(Progress {
                    bytes: 1,
                    total: None,
                }),
            ),
            r#"{"id":2,"event":{"progress":{"bytes":1}}}"#,
        ),
    ];
    for (response, text) in lines {
        let line = response.to_line();
        assert_eq!(std::str::from_utf8(line.trim_ascii_end()).unwrap(), text);
        assert_eq!(serde_json::from_slice::<Response>(&line).unwrap(), response);
    }
    let newer = br#"{"id":1,"error":{"code":"eaten-by-a-bear","message":"m"}}"#;
    let Body::Error(failure) = serde_json::from_slice::<Response>(newer).unwrap().body else {
        panic!()
    };
    assert_eq!(failure.code, ErrorCode::Unknown);
}

#[test]
fn messages_keep_their_bytes() {
    for bytes in [b"text".to_vec(), vec![0xff, 0, 7], Vec::new()] {
        assert_eq!(Message::default().with_bytes(bytes.clone()).bytes(), Ok(bytes));
    }
    assert!(SendMessage::default().bytes().is_err());
}
