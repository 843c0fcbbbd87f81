//! What the device in this process answers to each operation.

use vmgmt_driver::abi::ring::flag;
use vmgmt_driver::abi::{self, Completion, Opcode, Status, Submission};

use super::{Mischief, Shared, State};

impl Shared {
    /// What it answers; `None`: it waits.
    pub(super) fn execute(
        &self,
        state: &mut State,
        index: usize,
        submission: &Submission,
    ) -> Option<Completion> {
        let buffer = self.read_buffer(submission);
        let (meta, data) = buffer.split_at(submission.meta_bytes as usize);
        let text = String::from_utf8_lossy(meta).into_owned();
        let ok = answer(submission, Status::OK);
        let name = state.handles.get(&submission.handle).cloned();
        Some(match Opcode(submission.opcode) {
            Opcode::NOOP | Opcode::CLOSE => ok,
            Opcode::ECHO => {
                self.write_data(submission, 0, meta);
                Completion {
                    result: meta.len() as u64,
                    ..ok
                }
            }
            Opcode::PROVE => {
                let same = buffer.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes))
                    == Some(submission.argument);
                Completion {
                    result: u64::from(state.shared && same),
                    ..ok
                }
            }
            Opcode::IDENTITY => {
                self.write_data(submission, 0, b"fake");
                Completion {
                    result: 42,
                    extra: 4,
                    ..ok
                }
            }
            Opcode::LIST if state.mischief == Mischief::Noise => {
                let noise: Vec<u8> = (0..data.len()).map(|i| (i * 7 + 3) as u8).collect();
                self.write_data(submission, 0, &noise);
                Completion {
                    result: noise.len() as u64,
                    ..ok
                }
            }
            Opcode::LIST if state.mischief == Mischief::EndlessListing => Completion {
                extra: submission.offset,
                flags: abi::ring::completion_flag::MORE,
                ..ok
            },
            Opcode::OPEN => match state.files.get(&text).map(Vec::len) {
                Some(size) => Completion {
                    result: handle(state, &text),
                    extra: size as u64,
                    ..ok
                },
                None => answer(submission, Status::NO_SUCH_NAME),
            },
            Opcode::PUT => {
                state.files.insert(text.clone(), Vec::new());
                Completion {
                    result: handle(state, &text),
                    ..ok
                }
            }
            Opcode::READ => {
                let Some(name) = name else {
                    return Some(answer(submission, Status::STALE));
                };
                let file = &state.files[&name];
                let start = (submission.offset as usize).min(file.len());
                let end = (start + data.len()).min(file.len());
                self.write_data(submission, 0, &file[start..end]);
                Completion {
                    result: (end - start) as u64,
                    ..ok
                }
            }
            Opcode::WRITE => {
                let Some(name) = name else {
                    return Some(answer(submission, Status::STALE));
                };
                let file = state.files.get_mut(&name).unwrap();
                let end = submission.offset as usize + data.len();
                file.resize(file.len().max(end), 0);
                file[submission.offset as usize..end].copy_from_slice(data);
                Completion {
                    result: data.len() as u64,
                    ..ok
                }
            }
            Opcode::COMMIT => {
                let file = &state.files[&name.unwrap()];
                let right = crc32fast::hash(file) == submission.argument as u32
                    && file.len() as u64 == submission.offset;
                let wrong = submission.flags & flag::CHECK != 0 && !right;
                answer(submission, if wrong { Status::INTEGRITY } else { Status::OK })
            }
            Opcode::CHECKSUM => {
                let file = &state.files[&name.unwrap()];
                let start = (submission.offset as usize).min(file.len());
                let end = (start + submission.argument as usize).min(file.len());
                Completion {
                    result: (end - start) as u64,
                    extra: crc32fast::hash(&file[start..end]).into(),
                    ..ok
                }
            }
            Opcode::RECEIVE | Opcode::NEXT_OFFER | Opcode::STREAM_READ => {
                state.receives.push_back((index, *submission));
                return None;
            }
            Opcode::CANCEL => {
                let found = state
                    .receives
                    .iter()
                    .position(|(_, waiting)| u64::from(waiting.tag) == submission.argument);
                if let Some((ring, waiting)) = found.and_then(|at| state.receives.remove(at)) {
                    self.publish(state, ring, &answer(&waiting, Status::CANCELLED));
                }
                Completion {
                    result: u64::from(found.is_some()),
                    ..ok
                }
            }
            _ => answer(submission, Status::NOT_SUPPORTED),
        })
    }
}

pub(super) fn answer(submission: &Submission, status: Status) -> Completion {
    Completion {
        tag: submission.tag,
        status: status.0,
        ..Default::default()
    }
}

fn handle(state: &mut State, name: &str) -> u64 {
    let number = state.next_handle;
    state.next_handle += 1;
    state.handles.insert(number, name.to_owned());
    number
}
