//! The form of a submission: what every opcode may carry. Pure: the same bytes in the same mode get the same verdict in any core life,
//! which is what lets the rings answer such submissions without a record of them (fetch.rs).

use super::interface::Modes;
use vmgmt_abi::ring::{LIST_ENTRIES_MAX, META_BYTES_MAX, TRANSFER_BYTES_MAX, flag};
use vmgmt_abi::{Mode, Opcode, Status, Submission};

/// Who answers a submission of good form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// Nothing is to be done: it is answered at once.
    Noop,
    Echo,
    Prove,
    Cancel,
    Hub,
}

/// What the rings know of an opcode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub who: Who,
    /// Flags that mean something to it, beside LIST.
    pub flags: u16,
    /// Its data area is input.
    pub data_is_input: bool,
    /// Small input is fetched with the submission.
    pub prefetch: bool,
}

/// The shape of `opcode`; `None`: this version does not know it.
#[must_use]
pub const fn shape(opcode: Opcode) -> Option<Shape> {
    const HUB: Shape = Shape {
        who: Who::Hub,
        flags: 0,
        data_is_input: false,
        prefetch: false,
    };
    const INPUT: Shape = Shape {
        data_is_input: true,
        ..HUB
    };
    Some(match opcode {
        Opcode::NOOP => Shape {
            who: Who::Noop,
            ..HUB
        },
        Opcode::ECHO => Shape {
            who: Who::Echo,
            ..HUB
        },
        Opcode::PROVE => Shape {
            who: Who::Prove,
            ..HUB
        },
        Opcode::CANCEL => Shape {
            who: Who::Cancel,
            ..HUB
        },
        Opcode::COMMIT => Shape {
            flags: flag::CHECK | flag::DURABLE,
            ..HUB
        },
        Opcode::RENAME => Shape {
            flags: flag::DURABLE,
            ..HUB
        },
        Opcode::STREAM_END => Shape {
            flags: flag::CHECK,
            ..HUB
        },
        Opcode::WRITE | Opcode::STREAM_WRITE => INPUT,
        Opcode::PUBLISH | Opcode::SEND => Shape {
            prefetch: true,
            ..INPUT
        },
        Opcode::IDENTITY
        | Opcode::SHARES
        | Opcode::LIST
        | Opcode::STAT
        | Opcode::MAKE_DIRECTORY
        | Opcode::REMOVE
        | Opcode::OPEN
        | Opcode::READ
        | Opcode::TRUNCATE
        | Opcode::FSYNC
        | Opcode::CLOSE
        | Opcode::PUT
        | Opcode::CHECKSUM
        | Opcode::OFFER
        | Opcode::NEXT_OFFER
        | Opcode::ACCEPT
        | Opcode::REFUSE
        | Opcode::STREAM_READ
        | Opcode::STREAM_CONFIRM
        | Opcode::PEERS
        | Opcode::RECEIVE => HUB,
        _ => return None,
    })
}

/// Judges a submission that came by a ring of `mode`.
pub fn judge(submission: &Submission, mode: Mode) -> Result<Shape, Status> {
    let shape = judge_common(submission, mode)?;
    let list = submission.flags & flag::LIST != 0;
    if submission.length > u64::from(TRANSFER_BYTES_MAX) {
        return Err(Status::TOO_LARGE);
    }
    if list {
        let entries = submission.list_entries;
        let bytes = u64::from(entries) * LIST_ENTRY_BYTES_U64;
        if entries == 0
            || entries > LIST_ENTRIES_MAX
            || submission.length < u64::from(entries)
            || !submission.buffer.is_multiple_of(LIST_ENTRY_BYTES_U64)
            || submission.buffer.checked_add(bytes).is_none()
        {
            return Err(Status::BAD_ARGUMENT);
        }
    } else if submission.list_entries != 0 || submission.buffer.checked_add(submission.length).is_none() {
        return Err(Status::BAD_ARGUMENT);
    }
    Ok(shape)
}

const LIST_ENTRY_BYTES_U64: u64 = vmgmt_abi::ring::LIST_ENTRY_BYTES as u64;

/// Judges a submission that came by the port window, whose buffer is the FIFO; `input_bytes` followed it there.
pub fn judge_port(
    submission: &Submission,
    mode: Mode,
    modes: Modes,
    input_bytes: usize,
) -> Result<Shape, Status> {
    match modes.judge(mode) {
        Status::OK => {}
        status => return Err(status),
    }
    let shape = judge_common(submission, mode)?;
    let room = vmgmt_abi::port::INPUT_BYTES_MAX + vmgmt_abi::port::OUTPUT_BYTES_MAX;
    if submission.length > room as u64 {
        return Err(Status::TOO_LARGE);
    }
    if submission.buffer != 0 || submission.list_entries != 0 || submission.flags & flag::LIST != 0 {
        return Err(Status::BAD_ARGUMENT);
    }
    // Input is meta, and with operations whose data is input all of the buffer.
    let expected = if shape.data_is_input {
        submission.length
    } else {
        u64::from(submission.meta_bytes)
    };
    if input_bytes as u64 != expected {
        return Err(Status::BAD_ARGUMENT);
    }
    // There is no memory whose sharing could be proven.
    if shape.who == Who::Prove {
        return Err(Status::NOT_SUPPORTED);
    }
    Ok(shape)
}

fn judge_common(submission: &Submission, mode: Mode) -> Result<Shape, Status> {
    let opcode = Opcode(submission.opcode);
    let Some(shape) = shape(opcode) else {
        return Err(Status::NOT_SUPPORTED);
    };
    if opcode.mode() != Mode::COMMON && opcode.mode() != mode {
        return Err(Status::WRONG_MODE);
    }
    if submission.flags & !(shape.flags | flag::LIST) != 0
        || submission.meta_bytes > META_BYTES_MAX
        || u64::from(submission.meta_bytes) > submission.length
    {
        return Err(Status::BAD_ARGUMENT);
    }
    let Submission {
        handle,
        offset,
        argument,
        length,
        meta_bytes,
        ..
    } = *submission;
    let plain = handle == 0 && offset == 0;
    let good = match shape.who {
        Who::Noop => plain && argument == 0 && length == 0,
        // The input must fit the data area.
        Who::Echo if u64::from(meta_bytes) > length - u64::from(meta_bytes) => {
            return Err(Status::TOO_LARGE);
        }
        Who::Echo => plain && argument == 0,
        Who::Prove => {
            plain
                && length >= 8
                && meta_bytes == 0
                && submission.flags & flag::LIST == 0
                && submission.buffer.is_multiple_of(8)
        }
        Who::Cancel => plain && length == 0 && argument <= u64::from(u32::MAX),
        Who::Hub => true,
    };
    if good {
        Ok(shape)
    } else {
        Err(Status::BAD_ARGUMENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(opcode: Opcode) -> Submission {
        Submission {
            opcode: opcode.0,
            ..Submission::default()
        }
    }

    #[test]
    fn every_named_opcode_has_a_shape_and_no_other() {
        for number in 0..=u16::MAX {
            let named = Opcode(number).name().is_some();
            assert_eq!(shape(Opcode(number)).is_some(), named, "{:?}", Opcode(number));
        }
    }

    #[test]
    fn forms_are_refused_with_their_cause() {
        let noop = of(Opcode::NOOP);
        assert!(judge(&noop, Mode::COMMON).is_ok());
        let cases = [
            (
                Submission {
                    opcode: 0x7777,
                    ..noop
                },
                Status::NOT_SUPPORTED,
            ),
            (of(Opcode::READ), Status::WRONG_MODE),
            (
                Submission {
                    flags: 0x8000,
                    ..noop
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    flags: flag::CHECK,
                    ..noop
                },
                Status::BAD_ARGUMENT,
            ),
            (Submission { handle: 1, ..noop }, Status::BAD_ARGUMENT),
            (
                Submission {
                    list_entries: 1,
                    ..noop
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    length: 16,
                    meta_bytes: 17,
                    ..of(Opcode::IDENTITY)
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    length: 4097,
                    meta_bytes: 4097,
                    ..of(Opcode::IDENTITY)
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    length: (16 << 20) + 1,
                    ..of(Opcode::IDENTITY)
                },
                Status::TOO_LARGE,
            ),
            (
                Submission {
                    length: 2,
                    buffer: u64::MAX - 1,
                    ..of(Opcode::IDENTITY)
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    length: 2,
                    flags: flag::LIST,
                    ..of(Opcode::IDENTITY)
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    length: 2,
                    flags: flag::LIST,
                    list_entries: 1,
                    buffer: 8,
                    ..of(Opcode::IDENTITY)
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    length: 9000,
                    flags: flag::LIST,
                    list_entries: 4097,
                    ..of(Opcode::IDENTITY)
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    length: 7,
                    meta_bytes: 4,
                    ..of(Opcode::ECHO)
                },
                Status::TOO_LARGE,
            ),
            (
                Submission {
                    length: 4,
                    ..of(Opcode::PROVE)
                },
                Status::BAD_ARGUMENT,
            ),
            (
                Submission {
                    argument: 1 << 32,
                    ..of(Opcode::CANCEL)
                },
                Status::BAD_ARGUMENT,
            ),
        ];
        for (submission, status) in cases {
            assert_eq!(judge(&submission, Mode::COMMON), Err(status), "{submission:?}");
        }
    }

    #[test]
    fn a_port_submission_brings_exactly_its_input() {
        let write = Submission {
            length: 5,
            ..of(Opcode::WRITE)
        };
        let judge =
            |submission: &Submission, bytes| judge_port(submission, Mode::FILE, Modes::default(), bytes);
        assert!(judge(&write, 5).is_ok());
        assert_eq!(judge(&write, 4), Err(Status::BAD_ARGUMENT));
        let read = Submission {
            length: 5,
            ..of(Opcode::READ)
        };
        assert!(judge(&read, 0).is_ok());
        assert_eq!(judge(&read, 1), Err(Status::BAD_ARGUMENT));
        assert_eq!(
            judge(&Submission { buffer: 16, ..read }, 0),
            Err(Status::BAD_ARGUMENT)
        );
        assert_eq!(
            judge(&Submission { length: 9000, ..read }, 0),
            Err(Status::TOO_LARGE)
        );
        let mode = |mode| judge_port(&of(Opcode::NOOP), mode, Modes::default(), 0);
        assert_eq!(mode(Mode::STATISTICS), Err(Status::NOT_SUPPORTED));
        assert_eq!(mode(Mode(9)), Err(Status::BAD_ARGUMENT));
    }
}
