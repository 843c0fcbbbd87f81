//! The port window against FIFOs in this process: honest ones, a second user, noise, and a window that changes hands.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmgmt_driver::abi::port;
use vmgmt_driver::abi::{self, Completion, Opcode, Status, Submission};
use vmgmt_driver::backing::pci::DeviceLock;
use vmgmt_driver::backing::{Backing, Interrupts, Width};
use vmgmt_driver::channel::Request;
use vmgmt_driver::{Channel, Client, DmaMemory, DriverError, Mode, PortChannel, Result};
use zerocopy::{FromBytes, IntoBytes};

#[derive(Default)]
struct Window {
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    claim: u32,
    mode: u32,
    status: u32,
    epoch: u32,
    wrong_tag: bool,
    /// Bytes of output beyond what there is room for.
    surplus: usize,
    /// Submissions stay BUSY until this many looks at STATUS.
    looks: u32,
    ready: Option<Vec<u8>>,
}

#[derive(Default)]
struct FakePorts(Mutex<Window>);

impl Window {
    fn commit(&mut self) {
        let bytes: Vec<u8> = self.input.drain(..).collect();
        let Ok((submission, input)) = Submission::read_from_prefix(&bytes) else {
            self.status |= port::STATUS_ERROR;
            return;
        };
        assert_eq!(submission.buffer, 0);
        let mut completion = Completion {
            tag: submission.tag,
            ..Default::default()
        };
        let mut output = Vec::new();
        match Opcode(submission.opcode) {
            Opcode::ECHO => {
                assert_eq!(input.len(), submission.meta_bytes as usize);
                assert_eq!(submission.length, 2 * input.len() as u64);
                output = input.to_vec();
                completion.result = input.len() as u64;
            }
            Opcode::NOOP => assert!(input.is_empty()),
            Opcode::RECEIVE => {
                self.status |= port::STATUS_BUSY;
                return;
            }
            _ => completion.status = Status::NOT_SUPPORTED.0,
        }
        completion.tag ^= u32::from(self.wrong_tag);
        output.extend(vec![0; self.surplus]);
        let mut answer = completion.as_bytes().to_vec();
        answer.extend(output);
        self.ready = Some(answer);
        self.looks = 3;
        self.status |= port::STATUS_BUSY;
    }

    fn look(&mut self) -> u32 {
        self.looks = self.looks.saturating_sub(1);
        if self.looks == 0
            && let Some(answer) = self.ready.take()
        {
            self.output = answer.into();
            self.status = self.status & !port::STATUS_BUSY | port::STATUS_DONE;
        }
        self.status
    }
}

impl Backing for FakePorts {
    fn name(&self) -> &'static str {
        "fake ports"
    }
    fn has_registers(&self) -> bool {
        false
    }
    fn has_dma(&self) -> bool {
        false
    }
    fn read32(&self, _offset: u32) -> Result<u32> {
        Err(DriverError::NotPossible("a register", "fake ports"))
    }
    fn write32(&self, _offset: u32, _value: u32) -> Result<()> {
        Err(DriverError::NotPossible("a register", "fake ports"))
    }
    fn port_read(&self, offset: u32, width: Width) -> Result<u32> {
        let mut window = self.0.lock().unwrap();
        Ok(match offset {
            port::MAGIC => port::PORT_MAGIC,
            port::ABI_VERSION => abi::ABI_VERSION,
            port::CLAIM => window.claim,
            port::MODE => window.mode,
            port::STATUS => window.look(),
            port::READABLE => window.output.len() as u32,
            port::EPOCH => window.epoch,
            port::DATA => {
                let mut word = [0; 4];
                for byte in word.iter_mut().take(width.bytes()) {
                    *byte = window.output.pop_front().expect("DATA was read while empty");
                }
                u32::from_le_bytes(word)
            }
            _ => 0,
        })
    }
    fn port_write(&self, offset: u32, width: Width, value: u32) -> Result<()> {
        let mut window = self.0.lock().unwrap();
        match offset {
            port::CLAIM if window.claim == 0 => window.claim = value,
            port::CLAIM if window.claim == value => window.claim = 0,
            port::MODE => window.mode = value,
            port::STATUS => window.status &= !value,
            port::DATA => {
                window.status &= !port::STATUS_DONE;
                window.input.extend(&value.to_le_bytes()[..width.bytes()]);
            }
            port::COMMIT => window.commit(),
            port::ABORT => {
                window.input.clear();
                window.output.clear();
                window.ready = None;
                window.status = 0;
            }
            _ => {}
        }
        Ok(())
    }
    fn allocate(&self, bytes: usize) -> Result<DmaMemory> {
        DmaMemory::ordinary(bytes)
    }
    fn set_up_interrupts(&self, _vectors_wanted: u32) -> Result<Interrupts> {
        Ok(Interrupts::NONE)
    }
    fn interrupt_descriptor(&self, _vector: u32) -> Option<Arc<OwnedFd>> {
        None
    }
    fn take_interrupt(&self, _vector: u32) -> Result<()> {
        Ok(())
    }
    fn config_read(&self, _offset: u32, _width: Width) -> Result<u32> {
        Ok(0)
    }
    fn config_write(&self, _offset: u32, _width: Width, _value: u32) -> Result<()> {
        Ok(())
    }
}

fn open(fake: &Arc<FakePorts>) -> Result<PortChannel> {
    PortChannel::open(&(Arc::clone(fake) as Arc<dyn Backing>), Mode::COMMON, None)
}

#[test]
fn echoes_of_every_size_come_back_and_the_claim_is_returned() {
    let fake = Arc::new(FakePorts::default());
    let mut client = Client::new(open(&fake).unwrap());
    for bytes in [1_usize, 2, 3, 4, 5, 63, 4096] {
        let sent: Vec<u8> = (0..bytes).map(|index| index as u8 ^ 0x3c).collect();
        assert_eq!(client.echo(&sent).unwrap(), sent);
    }
    client.noop().unwrap();
    assert_eq!(
        client.call(Request::new(Opcode(0xfff))).unwrap_err().status(),
        Some(Status::NOT_SUPPORTED)
    );
    let large = client.allocate(8192).unwrap();
    assert!(matches!(
        client.read_at(1, 0, &large, 0, 4097),
        Err(DriverError::BadArgument(_))
    ));
    drop(client);
    assert_eq!(fake.0.lock().unwrap().claim, 0);
}

#[test]
fn a_second_user_is_told_who_holds_the_window() {
    let fake = Arc::new(FakePorts::default());
    fake.0.lock().unwrap().claim = 4711;
    let error = open(&fake).unwrap_err();
    assert!(
        matches!(&error, DriverError::InUse { holder, .. } if holder == "4711"),
        "{error}"
    );
    assert_eq!(fake.0.lock().unwrap().claim, 4711);
}

#[test]
fn who_holds_the_lock_takes_the_window_from_the_dead() {
    let fake = Arc::new(FakePorts::default());
    fake.0.lock().unwrap().claim = 4711;
    let directory = tempfile::tempdir().unwrap();
    let lock = DeviceLock::take_file(directory.path(), "device", Duration::ZERO).unwrap();
    let backing = Arc::clone(&fake) as Arc<dyn Backing>;
    let channel = PortChannel::open_locked(&backing, Mode::COMMON, None, &lock).unwrap();
    assert_eq!(fake.0.lock().unwrap().claim, std::process::id());
    Client::new(channel).noop().unwrap();
    assert_eq!(fake.0.lock().unwrap().claim, 0);
}

#[test]
fn a_window_that_lies_ends_as_an_error() {
    for (wrong_tag, surplus) in [(true, 0), (false, 1), (false, 100_000)] {
        let fake = Arc::new(FakePorts::default());
        let mut client = Client::new(open(&fake).unwrap());
        fake.0.lock().unwrap().wrong_tag = wrong_tag;
        fake.0.lock().unwrap().surplus = surplus;
        let error = client.echo(b"hello").unwrap_err();
        assert!(matches!(error, DriverError::DeviceContract(_)), "{error}");
    }
}

#[test]
fn a_wait_can_end_and_be_cancelled_and_a_reset_is_noticed() {
    let fake = Arc::new(FakePorts::default());
    let mut channel = open(&fake).unwrap();
    let buffer = channel.allocate(4096).unwrap();
    let receive = || Request::new(Opcode::RECEIVE).output(&buffer, 0, 4096, 0);
    let tag = channel.submit(receive()).unwrap();
    assert!(matches!(channel.submit(receive()), Err(DriverError::Full(1))));
    assert!(
        !channel
            .wait(Some(Instant::now() + Duration::from_millis(5)))
            .unwrap()
    );
    channel.cancel(tag).unwrap();
    let finished = channel.reap().unwrap().unwrap();
    assert_eq!((finished.tag, finished.status), (tag, Status::CANCELLED));

    channel.submit(receive()).unwrap();
    {
        let mut window = fake.0.lock().unwrap();
        window.status = 0;
        window.epoch += 1;
    }
    assert!(matches!(channel.wait(None), Err(DriverError::DeviceReplaced)));
    channel.reopen().unwrap();
    Client::new(channel).noop().unwrap();
}
