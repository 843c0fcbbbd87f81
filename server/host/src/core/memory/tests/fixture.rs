//! The other side of a session: its front page, its memory objects, and a front that serves message DMA from what the VM sees.

use crate::core::memory::{DmaRequest, MemoryLimits, SessionMemory};
use crate::messages::CoreToFront;
use crate::words::{MappedWords, create_page};
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use vmgmt_device::page::{CorePage, FrontPage, MapRecord, control, rights};
use vmgmt_device::{GuestMemory, MemoryError, Tick};

pub const PAGE: u64 = 4096;
pub const BOTH: u64 = rights::READ | rights::WRITE;
pub const NONCE: u64 = 0x1234_5678_9abc_def1;

/// A memory object as QEMU makes it; the test reaches it by file calls.
pub fn object(name: &str, bytes: u64, sealed: bool) -> OwnedFd {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    if sealed {
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    }
    fd
}

pub fn peek(fd: &OwnedFd, offset: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    assert_eq!(pread(fd, &mut data, offset).unwrap(), bytes);
    data
}

pub fn poke(fd: &OwnedFd, offset: u64, data: &[u8]) {
    assert_eq!(pwrite(fd, data, offset).unwrap(), data.len());
}

pub struct Session {
    pub front: FrontPage<MappedWords>,
    pub memory: SessionMemory,
    numbers: u64,
    pub now: Tick,
}

impl Session {
    pub fn new() -> Self {
        Self::with(
            MemoryLimits {
                mapped_bytes_max: 1 << 40,
                objects_max: 64,
            },
            64,
        )
    }

    pub fn with(limits: MemoryLimits, maps_max: usize) -> Self {
        let words = FrontPage::<MappedWords>::words_needed(maps_max);
        let (writable, read_only) = create_page("front page", words).unwrap();
        let (core, _) = create_page("core page", CorePage::<MappedWords>::WORDS).unwrap();
        let front = FrontPage::new(MappedWords::writable(&writable).unwrap());
        front.init(1, 1);
        front.set_control(control::BUS_MASTER);
        let core = CorePage::new(MappedWords::writable(&core).unwrap());
        core.init(1, 1);
        let view = FrontPage::new(MappedWords::read_only(&read_only).unwrap());
        Self {
            front,
            memory: SessionMemory::new(1, view, core, limits),
            numbers: 0,
            now: Tick(1),
        }
    }

    /// The VM maps a range; gives the map's number.
    pub fn map(&mut self, slot: usize, iova: u64, bytes: u64, object: u64, offset: u64, rights: u64) -> u64 {
        self.numbers += 1;
        let record = MapRecord {
            number: self.numbers,
            iova,
            bytes,
            object,
            offset,
            rights,
        };
        self.front.set_map(slot, Some(&record));
        self.numbers
    }

    /// The VM unmaps: the map goes, then the fence moves, as the front does it.
    pub fn unmap(&mut self, slot: usize) -> u64 {
        self.front.set_map(slot, None);
        self.front.move_fence()
    }

    pub fn lend(&mut self, object: u64, fd: &OwnedFd) {
        self.memory.object(object, rustix::io::dup(fd).unwrap(), true);
        self.memory.drained();
    }

    /// One object of `bytes` bytes at address 0, shared and proven.
    pub fn with_ram(bytes: u64, sealed: bool) -> (Self, OwnedFd) {
        let mut session = Self::new();
        let fd = object("ram", bytes, sealed);
        session.lend(1, &fd);
        session.map(0, 0, bytes, 1, 0, BOTH);
        session.prove(&fd, 0, 0);
        (session, fd)
    }

    /// Proves the object behind `iova` by a nonce at its `offset`.
    pub fn prove(&mut self, fd: &OwnedFd, iova: u64, offset: u64) {
        let before = peek(fd, offset, 8);
        poke(fd, offset, &NONCE.to_le_bytes());
        assert_eq!(self.turn(|memory| memory.prove(iova, NONCE)), Ok(true));
        poke(fd, offset, &before);
    }

    pub fn turn<T>(
        &mut self,
        work: impl FnOnce(&mut SessionMemory) -> Result<T, MemoryError>,
    ) -> Result<T, MemoryError> {
        self.memory.begin_dma(self.now);
        let done = work(&mut self.memory);
        self.memory.end_dma(self.now);
        done
    }

    /// All requests that may go out now.
    pub fn requests(&mut self) -> Vec<DmaRequest> {
        std::iter::from_fn(|| self.memory.poll_output(self.now)).collect()
    }

    /// Answers one request from what the VM sees.
    pub fn serve(&mut self, request: &DmaRequest, ram: &mut Ram) {
        match request.message {
            CoreToFront::DmaRead {
                session,
                request,
                iova,
                bytes,
                ..
            } => {
                assert_eq!(session, 1);
                let data = ram.read(iova, bytes as usize);
                self.memory.handle_dma_answer(self.now, request, 0, data);
            }
            CoreToFront::DmaWrite {
                session,
                request: number,
                iova,
                ..
            } => {
                assert_eq!(session, 1);
                ram.write(iova, &request.payload);
                self.memory.handle_dma_answer(self.now, number, 0, Vec::new());
            }
            CoreToFront::Freeze { .. } => panic!("memory asks for no freeze"),
        }
    }

    /// Runs `work` in turns until it is not pending, serving messages in between; gives how many turns it took.
    pub fn until_done<T>(
        &mut self,
        ram: &mut Ram,
        mut work: impl FnMut(&mut SessionMemory) -> Result<T, MemoryError>,
    ) -> (Result<T, MemoryError>, usize) {
        for turns in 1..100_000 {
            let done = self.turn(&mut work);
            if !matches!(done, Err(MemoryError::Pending)) {
                return (done, turns);
            }
            let requests = self.requests();
            assert!(!requests.is_empty(), "pending, and nothing is asked for");
            requests.iter().for_each(|request| self.serve(request, ram));
        }
        panic!("never done");
    }
}

/// What the VM sees as its memory: the object itself, or other memory (share=off).
pub enum Ram {
    Shared(OwnedFd),
    Private(Vec<u8>),
}

impl Ram {
    pub fn read(&self, iova: u64, bytes: usize) -> Vec<u8> {
        match self {
            Self::Shared(fd) => peek(fd, iova, bytes),
            Self::Private(ram) => ram[iova as usize..iova as usize + bytes].to_vec(),
        }
    }
    pub fn write(&mut self, iova: u64, data: &[u8]) {
        match self {
            Self::Shared(fd) => poke(fd, iova, data),
            Self::Private(ram) => ram[iova as usize..iova as usize + data.len()].copy_from_slice(data),
        }
    }
}
