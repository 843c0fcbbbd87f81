//! A frozen VM: not a byte of its memory moves, everybody waits, and after the thaw nothing is missing.

use super::*;
use anyhow::bail;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use vmgmt_ctl::protocol::{Call, Freeze, Thaw};
use vmgmt_driver::abi::chat::PEER_BY_NAME;
use vmgmt_driver::abi::file::open;
use vmgmt_driver::abi::registers::{RING_STATUS, RINGS, RingState};
use vmgmt_driver::backing::Backing;
use vmgmt_driver::channel::{Request, Tag};
use vmgmt_driver::operations::chat::Receiver;
use vmgmt_driver::{Buffer, Opcode};
use vmgmt_testkit::guest::Sharing;

const PAGE_BYTES: usize = 4096;

/// vmgmtctl: (exit code, what it says on both outputs).
pub(super) fn operator(site: &Site, words: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(env!("CARGO_BIN_EXE_vmgmtctl"))
        .arg("--control")
        .arg(site.control())
        .args(words)
        .stdin(Stdio::null())
        .output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

pub(super) fn done(site: &Site, words: &[&str]) -> Result<String> {
    let (code, text) = operator(site, words)?;
    ensure!(code == 0, "vmgmtctl {words:?} ended with {code}: {text}");
    Ok(text)
}

fn memory_of(vm: &SimulatedVm) -> Result<Vec<u8>> {
    let memory = vm.backing().memory();
    Ok(memory.ram().read(0, usize::try_from(memory.bytes())?)?)
}

/// A VM's memory from the moment on in which it is frozen. Whoever makes one knows that the guest's own program writes nothing until the
/// thaw: every change is the device's.
struct Quiet<'a> {
    vm: &'a SimulatedVm,
    /// A word of each page, taken at once: what still came while the rest was copied differs from it.
    words: Vec<u64>,
    memory: Vec<u8>,
    messages: usize,
}

impl<'a> Quiet<'a> {
    fn now(vm: &'a SimulatedVm) -> Result<Self> {
        let ram = vm.backing().memory().ram();
        let words = (0..ram.bytes())
            .step_by(PAGE_BYTES)
            .map(|at| ram.load_u64(at))
            .collect();
        Ok(Self {
            vm,
            words,
            messages: messages_served(vm),
            memory: memory_of(vm)?,
        })
    }

    /// Not a byte is another one, and not a byte was asked for by message.
    fn check(&self) -> Result<()> {
        for (page, word) in self.memory.chunks(PAGE_BYTES).zip(&self.words) {
            ensure!(
                page.starts_with(&word.to_le_bytes()),
                "memory has changed just after the freeze"
            );
        }
        let now = memory_of(self.vm)?;
        // (Slices are compared fast, one byte after the other is not.)
        if now != self.memory {
            let differs = |(before, now): (&u8, &u8)| before != now;
            let at = self.memory.iter().zip(&now).position(differs).unwrap_or(0);
            let end = now.len().min(at + 16);
            bail!(
                "a frozen VM's memory has changed at {at:#x}: {:02x?} was {:02x?}",
                &now[at..end],
                &self.memory[at..end]
            );
        }
        let messages = messages_served(self.vm);
        ensure!(
            messages == self.messages,
            "{} messages reached a frozen VM's memory",
            messages - self.messages
        );
        Ok(())
    }
}

/// Messages by which the device read or wrote the VM's memory so far.
fn messages_served(vm: &SimulatedVm) -> usize {
    vm.backing().with_client(|client| client.dma_served().len())
}

/// Reads, writes and receives that a guest has asked for, all at once, and a neighbour's letters. It looks after none of them: nothing here runs
/// but the test's own thread, so that after [`Errands::begin`] the memory of both VMs is the device's alone.
struct Errands {
    files: Client,
    chat: Client,
    neighbour: Client,
    receiver: Receiver,
    data: Vec<u8>,
    piece_bytes: usize,
    down: u64,
    up: u64,
    into: Vec<Buffer>,
    from: Buffer,
    letters: Buffer,
    tags: Vec<Tag>,
    sends: Vec<Tag>,
}

const READS: usize = 28;
const LETTERS: usize = 16;
const LETTER_BYTES: usize = 20_000;

impl Errands {
    fn new(site: &Site, vm: &SimulatedVm, neighbour: &SimulatedVm, piece_bytes: usize) -> Result<Self> {
        let data = pattern(READS * piece_bytes, 5);
        std::fs::write(site.share().join("down"), &data)?;
        let (mut files, chat, neighbour) = (
            vm.ring(Mode::FILE)?,
            vm.ring(Mode::CHAT)?,
            neighbour.ring(Mode::CHAT)?,
        );
        let down = files.open_for_reading("work/down")?.handle;
        let up = files
            .open_file("work/up", open::CREATE | open::READ | open::WRITE)?
            .handle;
        let into = (0..READS)
            .map(|_| files.allocate(piece_bytes))
            .collect::<Result<_, _>>()?;
        let from = files.allocate(piece_bytes)?;
        let letters = neighbour.allocate(LETTERS * (3 + LETTER_BYTES))?;
        Ok(Self {
            into,
            from,
            letters,
            files,
            chat,
            neighbour,
            receiver: Receiver::default(),
            data,
            piece_bytes,
            down,
            up,
            tags: Vec::new(),
            sends: Vec::new(),
        })
    }

    /// Asks for everything.
    fn begin(&mut self, round: u64) -> Result<()> {
        let bytes = self.piece_bytes;
        self.from.write(0, &pattern(bytes, round))?;
        for buffer in &self.into {
            // Enough to tell what is new: a word of each page, the last of the buffer among them.
            for page in (PAGE_BYTES..=bytes).step_by(PAGE_BYTES) {
                buffer.store64(page - 8, 0)?;
            }
        }
        for letter in 0..LETTERS {
            let at = letter * (3 + LETTER_BYTES);
            self.letters.write(at, b"vm0")?;
            self.letters
                .write(at + 3, &pattern(LETTER_BYTES, round + letter as u64))?;
        }
        self.chat.post_receives(&mut self.receiver, LETTERS)?;
        self.send(0..LETTERS / 2)?;
        for (number, buffer) in self.into.iter().enumerate() {
            let at = (number * bytes) as u64;
            let read = Request::new(Opcode::READ).handle(self.down).offset(at);
            self.tags
                .push(self.files.start(read.output(buffer, 0, bytes, 0))?);
            if number % 8 == 0 {
                let write = Request::new(Opcode::WRITE).handle(self.up).offset(at);
                self.tags
                    .push(self.files.start(write.input(&self.from, 0, bytes, 0))?);
            }
        }
        Ok(())
    }

    /// The neighbour sends some of its letters.
    fn send(&mut self, letters: std::ops::Range<usize>) -> Result<()> {
        for letter in letters {
            let at = letter * (3 + LETTER_BYTES);
            let request = Request::new(Opcode::SEND).handle(PEER_BY_NAME);
            let request = request.input(&self.letters, at, 3 + LETTER_BYTES, 3);
            self.sends.push(self.neighbour.start(request)?);
        }
        Ok(())
    }

    /// Letters that come while their target is frozen: they are accepted, and there are receives that wait for them.
    fn send_to_the_frozen(&mut self) -> Result<()> {
        self.send(LETTERS / 2..LETTERS)?;
        for tag in self.sends.drain(..) {
            self.neighbour
                .finish(tag, deadline())?
                .context("not sent")?
                .ok()?;
        }
        Ok(())
    }

    /// Whether a read's last bytes have come.
    fn has_come(&self, read: usize) -> Result<bool> {
        Ok(self.into[read].load64(self.piece_bytes - 8)? != 0)
    }

    fn wait_for(&self, read: usize) -> Result<()> {
        let start = Instant::now();
        while !self.has_come(read)? {
            ensure!(start.elapsed() < PATIENCE, "read {read} does not come");
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Reads that are not done.
    fn left(&self) -> Result<usize> {
        let mut left = 0;
        for read in 0..READS {
            left += usize::from(!self.has_come(read)?);
        }
        Ok(left)
    }

    /// Takes all answers, and looks whether each is what was asked for.
    fn finish(&mut self, site: &Site, vm: &SimulatedVm, round: u64) -> Result<()> {
        for tag in self.tags.drain(..) {
            let finished = self.files.finish(tag, deadline())?.context("no answer")?.ok()?;
            ensure!(finished.result == self.piece_bytes as u64, "{finished:?}");
        }
        for (buffer, wanted) in self.into.iter().zip(self.data.chunks(self.piece_bytes)) {
            let piece = buffer.pieces().first().context("no memory")?;
            let memory = vm.backing().memory();
            let found = memory
                .ram()
                .read(piece.address - memory.base(), self.piece_bytes)?;
            ensure!(found == wanted, "another piece");
        }
        let up = std::fs::read(site.share().join("up"))?;
        let wanted = pattern(self.piece_bytes, round);
        for piece in up.chunks(self.piece_bytes).step_by(8) {
            ensure!(piece == wanted, "something else was written");
        }
        for tag in self.sends.drain(..) {
            self.neighbour
                .finish(tag, deadline())?
                .context("not sent")?
                .ok()?;
        }
        for letter in 0..LETTERS {
            let received = self.chat.receive(&mut self.receiver, deadline())?;
            let message = received.context("a letter did not come")?;
            ensure!(
                message.bytes == pattern(LETTER_BYTES, round + letter as u64),
                "another letter than number {letter}"
            );
        }
        Ok(())
    }
}

/// The operator's connection: no process is started between the answer and the first look.
struct Control(vmgmt_ctl::client::Client);

impl Control {
    fn new(site: &Site) -> Result<Self> {
        Ok(Self(vmgmt_ctl::client::Client::connect(&site.control())?))
    }

    fn ask(&mut self, call: &Call) -> Result<()> {
        self.0.call(call, &[], Some(PATIENCE), &mut |_| true)?;
        Ok(())
    }

    fn freeze(&mut self) -> Result<()> {
        let name = "vm0".into();
        self.ask(&Call::Freeze(Freeze {
            name,
            timeout_seconds: None,
        }))
    }

    fn thaw(&mut self) -> Result<()> {
        self.ask(&Call::Thaw(Thaw { name: "vm0".into() }))
    }
}

/// Freezes that hit a VM while much is under way for it.
const HITS: u32 = 3;

/// The guest has asked for much and rests; it is frozen in the middle of that. `meanwhile`: what happens while it is.
fn is_quiet(
    sharing: Sharing,
    piece_bytes: usize,
    hits: u32,
    meanwhile: impl Fn(&Site, &Quiet<'_>) -> Result<()>,
) -> Result<()> {
    let site = site(2)?;
    let options = GuestOptions::default().ram_bytes(40 << 20).sharing(sharing);
    let (vm0, vm1) = (site.vm_with(0, options)?, site.vm(1)?);
    let mut errands = Errands::new(&site, &vm0, &vm1, piece_bytes)?;
    let mut hit = 0;
    for round in 0.. {
        ensure!(round < 100, "no freeze came before the work was done");
        // (Each time: the core of before may be gone.)
        let mut control = Control::new(&site)?;
        errands.begin(round)?;
        errands.wait_for(round as usize % 8)?;
        control.freeze()?;
        let quiet = Quiet::now(&vm0)?;
        let left = errands.left()?;
        errands.send_to_the_frozen()?;
        meanwhile(&site, &quiet)?;
        quiet.check()?;
        vm0.device().check_health()?;
        ensure!(errands.left()? == left, "work of a frozen VM went on");
        Control::new(&site)?.thaw()?;
        errands.finish(&site, &vm0, round)?;
        hit += u32::from(left > 0);
        if hit == hits {
            break;
        }
    }
    Ok(())
}

fn is_quiet_under_work(sharing: Sharing, piece_bytes: usize) -> Result<()> {
    is_quiet(sharing, piece_bytes, HITS, |_, quiet| {
        for _ in 0..3 {
            quiet.check()?;
        }
        Ok(())
    })
}

#[test]
fn a_frozen_vms_memory_is_quiet_under_work() -> Result<()> {
    is_quiet_under_work(Sharing::Sealed, 1 << 20)
}

#[test]
fn it_is_quiet_under_work_where_memory_may_shrink() -> Result<()> {
    is_quiet_under_work(Sharing::Unsealed, 1 << 20)
}

#[test]
fn it_is_quiet_under_work_where_dma_goes_by_messages() -> Result<()> {
    is_quiet_under_work(Sharing::Messages, 128 << 10)
}

/// Cores die and are replaced, and so is the front, while a VM is frozen in the middle of its work.
fn stays_quiet(sharing: Sharing, piece_bytes: usize) -> Result<()> {
    is_quiet(sharing, piece_bytes, 1, |site, quiet| {
        let kill = || -> Result<()> {
            let old = site.daemon.kill_role("core")?;
            site.daemon.wait_for_new("core", old, PATIENCE)?;
            // The new one serves, and has told all sessions: it is asked.
            ensure!(done(site, &["vms"])?.contains("(frozen)"));
            quiet.check()
        };
        let upgrade = |part: &str| -> Result<()> {
            let program = env!("CARGO_BIN_EXE_vmgmtd");
            done(site, &["upgrade", "--part", part, "--to", program])?;
            ensure!(done(site, &["vms"])?.contains("(frozen)"));
            quiet.check()
        };
        kill()?;
        upgrade("core")?;
        upgrade("front")?;
        kill()?;
        upgrade("core")
    })
}

#[test]
fn it_stays_quiet_while_cores_die_and_are_replaced() -> Result<()> {
    stays_quiet(Sharing::Sealed, 1 << 20)
}

#[test]
fn it_stays_quiet_by_messages_while_cores_die_and_are_replaced() -> Result<()> {
    stays_quiet(Sharing::Messages, 128 << 10)
}

/// Gets, puts, and what others send, all the time; frozen again and again. (A guest's program that runs writes into its memory whenever it
/// likes, so this looks at what it gets in the end, and at the device's messages; for the memory itself see [`is_quiet`].)
fn freezes_under_load(sharing: Sharing) -> Result<()> {
    let site = site(2)?;
    let (vm0, vm1) = (
        site.vm_with(0, GuestOptions::default().ram_bytes(24 << 20).sharing(sharing))?,
        site.vm(1)?,
    );
    let pids = site.pids()?;
    let data = pattern(3_000_000, 5);
    std::fs::write(site.share().join("down"), &data)?;
    let enough = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| -> Result<(u32, u32)> {
        let files = scope.spawn(|| -> Result<u32> {
            let mut files = vm0.ring(Mode::FILE)?;
            let mut rounds = 0;
            while !enough.load(Ordering::Relaxed) || rounds == 0 {
                let (memory, _) = files.get_to_memory("work/down", &TransferOptions::default())?;
                ensure!(
                    memory.to_vec(0, data.len())? == data,
                    "round {rounds}: another file"
                );
                let options = TransferOptions::default();
                files.put_from_memory(&format!("work/up{rounds}"), &memory, data.len(), 1, &options)?;
                ensure!(std::fs::read(site.share().join(format!("up{rounds}")))? == data);
                std::fs::remove_file(site.share().join(format!("up{rounds}")))?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let messages = scope.spawn(|| -> Result<u32> {
            let mut at = vm0.ring(Mode::CHAT)?;
            let mut to = vm1.ring(Mode::CHAT)?;
            let mut receiver = Receiver::default();
            let mut number = 0;
            while !enough.load(Ordering::Relaxed) || number == 0 {
                at.post_receives(&mut receiver, 4)?;
                to.send("vm0", &pattern(20_000, number.into()), 0)?;
                let message = at
                    .receive(&mut receiver, deadline())?
                    .context("it did not come")?;
                ensure!(
                    message.bytes == pattern(20_000, number.into()),
                    "message {number}"
                );
                number += 1;
            }
            Ok(number)
        });
        let frozen = (|| {
            let mut neighbour = vm1.ring(Mode::COMMON)?;
            for round in 0..6_u64 {
                std::thread::sleep(Duration::from_millis(20 * round));
                done(&site, &["freeze", "vm0"])?;
                ensure!(done(&site, &["vms"])?.contains("(frozen)"));
                let messages = messages_served(&vm0);
                for _ in 0..10 {
                    echoes(&mut neighbour)?;
                }
                vm0.device().check_health()?;
                ensure!(
                    messages_served(&vm0) == messages,
                    "messages reached a frozen VM's memory"
                );
                done(&site, &["thaw", "vm0"])?;
            }
            Ok(())
        })();
        enough.store(true, Ordering::Relaxed);
        let thawed = operator(&site, &["thaw", "vm0"]);
        let joined = |thread: std::thread::ScopedJoinHandle<'_, Result<u32>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a guest panicked"))?
        };
        let (files, messages) = (joined(files), joined(messages));
        frozen?;
        ensure!(thawed?.0 == 1, "a VM that is not frozen was thawed");
        Ok((files?, messages?))
    })?;
    ensure!(rounds.0 > 0 && rounds.1 > 0, "{rounds:?}");
    site.check_unharmed(pids)
}

#[test]
fn nothing_is_missing_after_freezes_under_load() -> Result<()> {
    freezes_under_load(Sharing::Sealed)
}

#[test]
fn nothing_is_missing_after_freezes_where_dma_goes_by_messages() -> Result<()> {
    freezes_under_load(Sharing::Messages)
}

#[test]
fn a_freeze_outlives_the_core_and_the_connection() -> Result<()> {
    let site = site(2)?;
    let vm1 = site.vm(1)?;
    done(&site, &["freeze", "vm0"])?;
    let old = site.daemon.kill_role("core")?;
    site.daemon.wait_for_new("core", old, PATIENCE)?;
    ensure!(done(&site, &["vms"])?.contains("0 (frozen)"));
    // A VM that connects while it is frozen: its registers answer, its ring opens when it is thawed.
    let vm0 = site.vm(0)?;
    std::thread::scope(|scope| -> Result<()> {
        let opening = scope.spawn(|| -> Result<()> { echoes(&mut vm0.ring(Mode::COMMON)?) });
        let mut to = vm1.ring(Mode::CHAT)?;
        // Mail goes to the mailbox meanwhile.
        to.send("vm0", b"while it was frozen", 0)?;
        // From here on the guest only asks for this register, until it says something else.
        wait_until("a ring is being opened", PATIENCE, || {
            let status = vm0.backing().read32(RINGS + RING_STATUS)?;
            Ok((RingState(status & 0xff) == RingState::OPENING).then_some(()))
        })?;
        let quiet = Quiet::now(&vm0)?;
        let old = site.daemon.kill_role("core")?;
        site.daemon.wait_for_new("core", old, PATIENCE)?;
        ensure!(done(&site, &["vms"])?.contains("1 (frozen)"));
        quiet.check()?;
        ensure!(!opening.is_finished(), "a ring was opened in a frozen VM");
        done(&site, &["thaw", "vm0"])?;
        opening.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    let mut at = vm0.ring(Mode::CHAT)?;
    let mut receiver = Receiver::default();
    at.post_receives(&mut receiver, 1)?;
    let message = at.receive(&mut receiver, deadline())?.context("no mail")?;
    ensure!(message.bytes == b"while it was frozen");
    Ok(())
}

#[test]
fn a_forgotten_freeze_ends_by_itself_and_the_thaw_says_so() -> Result<()> {
    let site = site(1)?;
    let vm = site.vm(0)?;
    let mut ring = vm.ring(Mode::COMMON)?;
    done(&site, &["freeze", "vm0", "--timeout", "3600"])?;
    ensure!(done(&site, &["vms"])?.contains("(frozen, 3")); // 3600 s, or less by now
    done(&site, &["freeze", "vm0", "--timeout", "1"])?;
    // Answered when the second is over.
    echoes(&mut ring)?;
    let (code, text) = operator(&site, &["thaw", "vm0"])?;
    ensure!(
        code == 1 && text.contains("not any more") && text.contains("--timeout"),
        "{code}: {text}"
    );
    // Freezing again makes it longer.
    done(&site, &["freeze", "vm0", "--timeout", "1"])?;
    done(&site, &["freeze", "vm0"])?;
    ensure!(done(&site, &["vms"])?.contains("(frozen)"));
    done(&site, &["thaw", "vm0"])?;
    let (code, text) = operator(&site, &["freeze", "vm7"])?;
    ensure!(code == 4 && text.contains("vmgmtctl vms"), "{code}: {text}");
    Ok(())
}
