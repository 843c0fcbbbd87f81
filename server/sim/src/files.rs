//! GARDEN, a guest's programs that use files: puts and gets, piece by piece, and what stands around them.
//!
//! In: chance, completions. Out: requests; what is known of each put goes to the shadow; what was read is judged by it. Must never know rings.

use crate::chance::Chance;
use crate::shadow::{Fate, HEAD_BYTES, Shadow};
use vmgmt_abi::file::{SIZE_UNKNOWN, existing, open, put};
use vmgmt_abi::{Opcode, Status, ring::flag};

/// Jobs at once.
const JOBS_MAX: usize = 4;
/// Pieces of one job in flight.
const PIECES_MAX: u32 = 4;
/// Bytes of a piece at most.
const PIECE_BYTES_MAX: u64 = 1024;
/// File names per share.
const NAMES: u64 = 3;

/// What is asked of the device.
#[derive(Clone, Debug)]
pub struct Request {
    pub opcode: Opcode,
    pub flags: u16,
    pub handle: u64,
    pub offset: u64,
    pub argument: u64,
    pub meta: Vec<u8>,
    pub data: Vec<u8>,
    /// The data area is filled by the device.
    pub into_guest: bool,
}

/// A submission of a job, or one by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    PutOpen(u64),
    PutCheck(u64, u64),
    PutWrite(u64, u64, u64),
    PutCommit(u64),
    PutClose(u64),
    GetOpen(u64),
    GetRead(u64, u64),
    GetClose(u64),
    Other(u16),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    New,
    Waiting,
    Moving,
    /// What is there already is to be compared, so many bytes.
    Comparing(u64),
    Closing,
}

#[derive(Clone, Debug)]
struct Job {
    id: u64,
    /// The put's number; `None`: a get.
    put: Option<u64>,
    path: String,
    bytes: u64,
    at: u64,
    handle: u64,
    stage: Stage,
    in_flight: u32,
    resume: bool,
    existing: u64,
    check: bool,
    failed: bool,
    /// Its handle is of an earlier core life.
    stale: bool,
    got: Vec<u8>,
}

/// All programs of one guest.
#[derive(Debug)]
pub struct Files {
    vm: u64,
    jobs: Vec<Job>,
    next_job: u64,
    /// No new work is begun any more.
    pub winding_down: bool,
    pub puts_done: u64,
    pub gets_done: u64,
}

fn request(opcode: Opcode) -> Request {
    Request {
        opcode,
        flags: 0,
        handle: 0,
        offset: 0,
        argument: 0,
        meta: Vec::new(),
        data: Vec::new(),
        into_guest: false,
    }
}

impl Files {
    pub const fn new(vm: u64) -> Self {
        Self {
            vm,
            jobs: Vec::new(),
            next_job: 0,
            winding_down: false,
            puts_done: 0,
            gets_done: 0,
        }
    }

    /// Jobs that have not ended.
    #[must_use]
    pub fn open(&self) -> usize {
        self.jobs.len()
    }

    /// The next submission of some job.
    pub fn next(&mut self, shadow: &mut Shadow, chance: &mut Chance) -> Option<(Step, Request)> {
        if self.jobs.len() < JOBS_MAX && !self.winding_down && chance.permille(400) {
            return self.begin(shadow, chance);
        }
        let first = chance.below(self.jobs.len().max(1) as u64) as usize;
        for turn in 0..self.jobs.len() {
            let index = (first + turn) % self.jobs.len();
            if let Some(next) = self.advance(index, shadow) {
                return Some(next);
            }
        }
        None
    }

    fn path(&self, chance: &mut Chance) -> String {
        let name = chance.below(NAMES);
        if chance.permille(600) {
            format!("own{}/f{name}", self.vm)
        } else {
            format!("common/f{name}")
        }
    }

    fn begin(&mut self, shadow: &mut Shadow, chance: &mut Chance) -> Option<(Step, Request)> {
        let path = self.path(chance);
        let kind = chance.below(10);
        if kind < 4 || kind == 9 {
            self.next_job += 1;
            let bytes = chance.between(HEAD_BYTES as u64, 4000);
            let is_put = kind < 4;
            self.jobs.push(Job {
                id: self.next_job,
                put: is_put.then(|| shadow.put(self.vm, bytes)),
                path,
                bytes,
                at: 0,
                handle: 0,
                stage: Stage::New,
                in_flight: 0,
                resume: chance.permille(500),
                existing: [
                    existing::REPLACE,
                    existing::REPLACE,
                    existing::REFUSE,
                    existing::RENAME,
                ][chance.below(4) as usize],
                check: chance.permille(500),
                failed: false,
                stale: false,
                got: Vec::new(),
            });
            return self.advance(self.jobs.len() - 1, shadow);
        }
        let request = match kind {
            4 => Request {
                meta: path.into_bytes(),
                data: vec![0; 32],
                into_guest: true,
                ..request(Opcode::STAT)
            },
            5 => Request {
                meta: path.split('/').next().unwrap_or_default().into(),
                data: vec![0; 512],
                into_guest: true,
                ..request(Opcode::LIST)
            },
            6 => Request {
                data: vec![0; 256],
                into_guest: true,
                ..request(Opcode::SHARES)
            },
            7 => Request {
                meta: path.into_bytes(),
                ..request(Opcode::REMOVE)
            },
            _ => {
                let (share, _) = path.split_once('/')?;
                let target = format!("{share}/f{}", chance.below(NAMES));
                Request {
                    meta: format!("{path}\0{target}").into_bytes(),
                    argument: existing::REPLACE,
                    ..request(Opcode::RENAME)
                }
            }
        };
        Some((Step::Other(request.opcode.0), request))
    }

    fn advance(&mut self, index: usize, shadow: &mut Shadow) -> Option<(Step, Request)> {
        let vm = self.vm;
        let job = self.jobs.get_mut(index)?;
        let id = job.id;
        let handle = job.handle;
        match (job.put, job.stage) {
            (_, Stage::Waiting) => None,
            (Some(_), Stage::New) => {
                job.stage = Stage::Waiting;
                job.in_flight = 1;
                let resume = if job.resume { put::RESUME } else { 0 };
                Some((
                    Step::PutOpen(id),
                    Request {
                        meta: job.path.clone().into_bytes(),
                        offset: if job.check { SIZE_UNKNOWN } else { job.bytes },
                        argument: job.existing | resume,
                        ..request(Opcode::PUT)
                    },
                ))
            }
            (Some(_), Stage::Comparing(bytes)) => {
                job.stage = Stage::Waiting;
                job.in_flight = 1;
                Some((
                    Step::PutCheck(id, bytes),
                    Request {
                        handle,
                        argument: bytes,
                        ..request(Opcode::CHECKSUM)
                    },
                ))
            }
            (_, _) if job.failed && job.in_flight > 0 => None,
            (Some(_), Stage::Moving) if job.failed => {
                (job.stage, job.in_flight) = (Stage::Closing, 1);
                Some((
                    Step::PutClose(id),
                    Request {
                        handle,
                        ..request(Opcode::CLOSE)
                    },
                ))
            }
            (Some(number), Stage::Moving) if job.at < job.bytes => {
                if job.in_flight >= PIECES_MAX {
                    return None;
                }
                let bytes = (job.bytes - job.at).min(PIECE_BYTES_MAX - (id * 37 % 200));
                let at = job.at;
                job.at += bytes;
                job.in_flight += 1;
                let data =
                    Shadow::contents(vm, number, job.bytes)[at as usize..(at + bytes) as usize].to_vec();
                Some((
                    Step::PutWrite(id, at, bytes),
                    Request {
                        handle,
                        offset: at,
                        data,
                        ..request(Opcode::WRITE)
                    },
                ))
            }
            (Some(_), Stage::Moving) if job.in_flight > 0 => None,
            (Some(number), Stage::Moving) => {
                job.stage = Stage::Waiting;
                job.in_flight = 1;
                shadow.commit(vm, number);
                let crc32 = crc32fast::hash(&Shadow::contents(vm, number, job.bytes));
                Some((
                    Step::PutCommit(id),
                    Request {
                        handle,
                        offset: job.bytes,
                        flags: if job.check { flag::CHECK } else { 0 },
                        argument: if job.check { u64::from(crc32) } else { 0 },
                        data: vec![0; 64],
                        into_guest: true,
                        ..request(Opcode::COMMIT)
                    },
                ))
            }
            (None, Stage::New) => {
                job.stage = Stage::Waiting;
                job.in_flight = 1;
                Some((
                    Step::GetOpen(id),
                    Request {
                        meta: job.path.clone().into_bytes(),
                        argument: open::READ,
                        ..request(Opcode::OPEN)
                    },
                ))
            }
            (None, Stage::Moving) if !job.failed && (job.got.len() as u64) < job.bytes => {
                if job.in_flight > 0 {
                    return None;
                }
                job.in_flight = 1;
                let at = job.got.len() as u64;
                let bytes = (job.bytes - at).min(PIECE_BYTES_MAX);
                Some((
                    Step::GetRead(id, at),
                    Request {
                        handle,
                        offset: at,
                        data: vec![0; bytes as usize],
                        into_guest: true,
                        ..request(Opcode::READ)
                    },
                ))
            }
            (None, Stage::Moving) => {
                (job.stage, job.in_flight) = (Stage::Closing, 1);
                Some((
                    Step::GetClose(id),
                    Request {
                        handle,
                        ..request(Opcode::CLOSE)
                    },
                ))
            }
            (_, Stage::Closing | Stage::Comparing(_)) => None,
        }
    }

    /// A submission could not be made after all (no buffer was free): as before it.
    pub fn put_back(&mut self, step: Step) {
        let (id, stage) = match step {
            Step::PutOpen(id) | Step::GetOpen(id) => (id, Stage::New),
            Step::PutCheck(id, bytes) => (id, Stage::Comparing(bytes)),
            Step::PutWrite(id, at, _) => {
                if let Some(job) = self.job(id) {
                    job.at = at;
                }
                (id, Stage::Moving)
            }
            Step::PutCommit(id) | Step::PutClose(id) | Step::GetRead(id, _) | Step::GetClose(id) => {
                (id, Stage::Moving)
            }
            Step::Other(_) => return,
        };
        if let Some(job) = self.job(id) {
            job.stage = stage;
            job.in_flight -= 1;
        }
    }

    fn job(&mut self, id: u64) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.id == id)
    }

    /// A submission was cancelled by a reset.
    pub fn lost(&mut self, shadow: &mut Shadow, step: Step) {
        let vm = self.vm;
        if let Step::PutCommit(id) = step
            && let Some(job) = self.job(id)
            && let Some(number) = job.put.take()
        {
            shadow.ended(vm, number, Fate::Unknown);
        }
    }

    /// The channel was reset: handles are gone. Some puts are taken up again.
    pub fn reset(&mut self, shadow: &mut Shadow) {
        for mut job in std::mem::take(&mut self.jobs) {
            let Some(number) = job.put else { continue };
            if job.resume && job.stage != Stage::Closing && !job.failed && !self.winding_down {
                (job.stage, job.in_flight, job.at) = (Stage::New, 0, 0);
                self.jobs.push(job);
            } else {
                shadow.ended(self.vm, number, Fate::Refused);
            }
        }
    }

    /// A completion: (status, result, extra, MORE). A text: what must not be.
    pub fn completed(
        &mut self,
        shadow: &mut Shadow,
        step: &Step,
        (status, result, extra, _more): (Status, u64, u64, bool),
        data: &[u8],
        plugged: bool,
    ) -> Option<String> {
        let vm = self.vm;
        let impossible = [
            Status::WRONG_MODE,
            Status::NOT_SUPPORTED,
            Status::BAD_ARGUMENT,
            Status::INTEGRITY,
            Status::DENIED,
            Status::PEER_ABSENT,
            Status::CANCELLED,
            Status::TIMED_OUT,
        ];
        if impossible.contains(&status) || status == Status::BAD_ADDRESS && !plugged {
            return Some("no such end".into());
        }
        let (Step::PutOpen(id)
        | Step::PutCheck(id, _)
        | Step::PutWrite(id, ..)
        | Step::PutCommit(id)
        | Step::PutClose(id)
        | Step::GetOpen(id)
        | Step::GetRead(id, _)
        | Step::GetClose(id)) = *step
        else {
            return None;
        };
        let index = self.jobs.iter().position(|job| job.id == id)?;
        let job = &mut self.jobs[index];
        job.in_flight = job.in_flight.saturating_sub(1);
        let number = job.put.unwrap_or_default();
        let ok = status == Status::OK;
        let mut end = None;
        match *step {
            Step::PutOpen(_) if ok => {
                job.handle = result;
                let there = extra.min(job.bytes);
                job.stage = if there > 0 {
                    Stage::Comparing(there)
                } else {
                    Stage::Moving
                };
                if extra > 0 && !job.resume {
                    return Some("a new put has contents already".into());
                }
            }
            Step::PutOpen(_) => end = Some(Fate::Refused),
            Step::PutCheck(_, bytes) => {
                job.stage = Stage::Moving;
                let wanted = crc32fast::hash(&Shadow::contents(vm, number, job.bytes)[..bytes as usize]);
                if ok && result == bytes && extra == u64::from(wanted) {
                    job.at = bytes;
                } else if status == Status::STALE {
                    end = Some(Fate::Refused);
                }
            }
            Step::PutWrite(_, _, bytes) if ok => {
                if result != bytes {
                    return Some(format!("{result} of {bytes} bytes were written"));
                }
            }
            Step::PutWrite(..) => {
                job.failed = true;
                job.stale |= status == Status::STALE;
            }
            Step::PutCommit(_) => {
                self.puts_done += u64::from(ok);
                end = Some(match status {
                    Status::OK => Fate::Done,
                    Status::OUTCOME_UNKNOWN => Fate::Unknown,
                    _ => Fate::Refused,
                });
            }
            Step::PutClose(_) => end = Some(Fate::Refused),
            Step::GetOpen(_) if ok => {
                (job.handle, job.bytes, job.stage) = (result, extra, Stage::Moving);
            }
            Step::GetOpen(_) => end = Some(Fate::Refused),
            Step::GetRead(_, at) if ok => {
                if result > data.len() as u64 || at != job.got.len() as u64 {
                    return Some("more than was asked for".into());
                }
                job.got.extend_from_slice(&data[..result as usize]);
                if result == 0 {
                    return Some(format!("the file ends at {at} of {}", job.bytes));
                }
            }
            Step::GetRead(..) => job.failed = true,
            Step::GetClose(_) => end = Some(Fate::Refused),
            Step::Other(_) => {}
        }
        let taken_up =
            job.put.is_some() && job.resume && !matches!(step, Step::PutCommit(_) | Step::PutOpen(_));
        if end == Some(Fate::Refused) && taken_up && (job.stale || status == Status::STALE) {
            (job.stage, job.in_flight, job.at) = (Stage::New, 0, 0);
            (job.failed, job.stale) = (false, false);
            return None;
        }
        let fate = end?;
        let job = self.jobs.remove(index);
        match job.put {
            Some(number) => shadow.ended(vm, number, fate),
            None if !job.failed && job.got.len() as u64 == job.bytes && ok => {
                self.gets_done += 1;
                shadow.judge(&job.path, &job.got);
            }
            None => {}
        }
        None
    }
}
