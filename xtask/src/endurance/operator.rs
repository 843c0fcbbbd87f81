//! The endurance runs' operator: letters from and to the host, files pushed and pulled, and "how are you" all the time.
//!
//! In: the control socket, by the client that vmgmtctl is made of. Out: the ledger's entries of the party `host`; how status was answered. It
//! must never know a guest's side.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use vmgmt_ctl::protocol::{
    Call, ErrorCode, Event, Pull, Push, Receive, SendMessage, Status, Transferred, new_key,
};
use vmgmt_ctl::{Client, ClientError};
use vmgmt_driver::abi::chat::HOST_NAME;
use vmgmt_testkit::process::locked;

use super::content::{self, Paper};
use super::crew::{Course, Crew, Hand};

/// Between two questions how the daemon is.
const STATUS_PAUSE: Duration = Duration::from_millis(100);
/// A daemon that says nothing for so long does not answer.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);
/// For everything else the operator asks.
const SILENCE_MAX: Duration = Duration::from_secs(90);
const ACCEPT_MS: u64 = 60_000;
/// Bytes of a file pushed or pulled.
const FILE_BYTES_MAX: u64 = 300_000;
/// Ends the wait for letters: sent to the host by itself.
const FAREWELL: &str = "that is all";
/// Before a request that was not begun is made again.
const AGAIN: Duration = Duration::from_millis(50);

/// How often who answered, and the longest wait.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    pub by: BTreeMap<String, u64>,
    pub longest: Duration,
}

/// The operator's threads.
pub struct Operator {
    control: PathBuf,
    pub answers: Arc<Mutex<Answers>>,
}

impl Operator {
    /// Puts four threads to work. `pause`: between two letters, and four times that between two files.
    pub fn start(crew: &mut Crew, course: &Arc<Course>, control: &Path, pause: Duration) -> Result<Self> {
        let operator = Self {
            control: control.to_owned(),
            answers: Arc::default(),
        };
        let (path, answers) = (operator.control.clone(), Arc::clone(&operator.answers));
        crew.hire(course, "operator, status".into(), move |course, hand| {
            status(course, hand, &path, &answers)
        })?;
        let (path, sender) = (operator.control.clone(), course.sender());
        crew.hire(course, "operator, sending".into(), move |course, hand| {
            let sent = send(course, hand, &path, pause);
            drop(sender);
            sent
        })?;
        let path = operator.control.clone();
        crew.hire(course, "operator, receiving".into(), move |course, hand| {
            receive(course, hand, &path)
        })?;
        let path = operator.control.clone();
        crew.hire(course, "operator, files".into(), move |course, hand| {
            files(course, hand, &path, pause * 4)
        })?;
        Ok(operator)
    }

    /// Ends the wait for letters, after all have come.
    pub fn farewell(&self) -> Result<()> {
        let call = Call::Send(SendMessage {
            to: HOST_NAME.into(),
            text: Some(FAREWELL.into()),
            base64: None,
            key: Some(new_key()),
        });
        Client::connect(&self.control)?.call(&call, &[], Some(SILENCE_MAX), &mut |_| true)?;
        Ok(())
    }
}

/// Asks for the status once.
pub fn ask_status(control: &Path) -> Result<Status> {
    let mut client = Client::connect(control)?;
    let answer = client.call(&Call::Status, &[], Some(STATUS_DEADLINE), &mut |_| true)?;
    Ok(serde_json::from_value(answer)?)
}

fn status(course: &Course, hand: &Hand, control: &Path, answers: &Mutex<Answers>) -> Result<()> {
    while !course.over() {
        hand.doing("asking for the status");
        let begin = Instant::now();
        let answer = ask_status(control).context("vmgmtctl status was not answered")?;
        let waited = begin.elapsed();
        let mut answers = locked(answers);
        *answers.by.entry(answer.answered_by).or_default() += 1;
        answers.longest = answers.longest.max(waited);
        drop(answers);
        std::thread::sleep(STATUS_PAUSE);
    }
    Ok(())
}

fn random(course: &Course, hand: &Hand) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(content::mix(&[&hand.name], course.seed))
}

fn one<'a>(chance: &mut ChaCha8Rng, names: &'a [String]) -> Option<&'a str> {
    let place = chance.next_u64().checked_rem(names.len() as u64)?;
    names.get(usize::try_from(place).ok()?).map(String::as_str)
}

/// A request with a key is made again until it is answered; the client does so for some seconds by itself.
fn is_to_be_repeated(error: &ClientError) -> bool {
    match error {
        ClientError::Closed { .. } => true,
        ClientError::Failed(failure) => failure.code == ErrorCode::Restarting,
        _ => false,
    }
}

fn send(course: &Course, hand: &Hand, control: &Path, pause: Duration) -> Result<()> {
    let mut chance = random(course, hand);
    let mut client = Client::connect(control)?;
    while course.working() {
        let Some(target) = one(&mut chance, &course.addressees) else {
            return Ok(());
        };
        let sequence = course.ledger.number(HOST_NAME, target, false);
        let text = content::letter(HOST_NAME, target, sequence, false);
        let bytes = text.len();
        hand.doing(format!("sending letter {sequence} to {target}"));
        let call = Call::Send(SendMessage {
            to: target.into(),
            text: Some(text),
            base64: None,
            key: Some(new_key()),
        });
        loop {
            match client.call(&call, &[], Some(SILENCE_MAX), &mut |_| true) {
                Ok(_) => course.ledger.accepted(HOST_NAME, target, sequence, bytes),
                Err(error) if is_to_be_repeated(&error) => {
                    std::thread::sleep(AGAIN);
                    client = Client::connect(control)?;
                    continue;
                }
                Err(ClientError::Failed(failure)) if failure.code == ErrorCode::OverBudget => {
                    course.ledger.refused();
                }
                Err(error) => {
                    let what = format!("letter {sequence} to {target}");
                    return Err(anyhow::Error::new(error).context(what));
                }
            }
            break;
        }
        std::thread::sleep(pause);
    }
    Ok(())
}

fn receive(course: &Course, hand: &Hand, control: &Path) -> Result<()> {
    let call = Call::Recv(Receive {
        follow: true,
        wait_ms: 0,
    });
    // A letter that was on its way to a connection that ended may come again: told apart by sender and number, as the protocol says.
    let mut seen: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    loop {
        hand.doing("waiting for letters to the host");
        let mut client = Client::connect(control)?;
        let mut last = false;
        let mut broken = None;
        let ended = client.call(&call, &[], None, &mut |event| {
            let Event::Message(message) = event else {
                return true;
            };
            match message.bytes() {
                Ok(bytes) if bytes == FAREWELL.as_bytes() => last = true,
                Ok(bytes) => {
                    let numbers = seen.entry(message.from.clone()).or_default();
                    if numbers.insert(message.sequence) {
                        course.ledger.received(HOST_NAME, &message.from, &bytes);
                    }
                }
                Err(failure) => broken = Some(failure.message),
            }
            !last && broken.is_none()
        });
        ensure!(broken.is_none(), "a message that cannot be read: {broken:?}");
        if last {
            return Ok(());
        }
        match ended {
            Ok(_) => anyhow::bail!("`recv --follow` ended by itself"),
            Err(error) if is_to_be_repeated(&error) => std::thread::sleep(AGAIN),
            Err(error) => return Err(error.into()),
        }
    }
}

fn files(course: &Course, hand: &Hand, control: &Path, pause: Duration) -> Result<()> {
    let mut chance = random(course, hand);
    let mut number = 0;
    while course.working() {
        let Some(peer) = one(&mut chance, &course.acceptors) else {
            return Ok(());
        };
        number += 1;
        let length = usize::try_from(chance.next_u64() % FILE_BYTES_MAX).unwrap_or(0);
        let seed = content::mix(&[HOST_NAME, peer], number);
        match number.is_multiple_of(2) {
            true => push(
                course,
                hand,
                control,
                peer,
                &Paper::new("push", number, seed, length),
            )?,
            false => pull(
                course,
                hand,
                control,
                peer,
                &Paper::new("pull", number, seed, length),
            )?,
        }
        std::thread::sleep(pause);
    }
    Ok(())
}

/// Makes a request with a file until it is done: with its key it goes on over all disruptions.
fn insist(control: &Path, call: &Call, file: &mut std::fs::File, what: &str) -> Result<Transferred> {
    loop {
        let mut client = Client::connect(control)?;
        let error = match client.call(call, &[file.as_fd()], Some(SILENCE_MAX), &mut |_| true) {
            Ok(answer) => return Ok(serde_json::from_value(answer)?),
            Err(error) => error,
        };
        if is_to_be_repeated(&error) {
            std::thread::sleep(AGAIN);
            continue;
        }
        return Err(anyhow::Error::new(error).context(what.to_owned()));
    }
}

/// Pushes a file to a VM, until it is there.
pub fn push(course: &Course, hand: &Hand, control: &Path, peer: &str, paper: &Paper) -> Result<()> {
    let what = format!("push of {} to {peer}", paper.name);
    hand.doing(what.clone());
    let mut file = tempfile::tempfile()?;
    file.write_all(&paper.bytes())?;
    let call = Call::Push(Push {
        to: peer.into(),
        name: paper.name.clone(),
        wait_ms: ACCEPT_MS,
        key: Some(new_key()),
    });
    let done = insist(control, &call, &mut file, &what)?;
    checksum(paper, &done)?;
    course.ledger.sent(HOST_NAME, peer, &paper.name, paper.length);
    Ok(())
}

/// Pulls a file of a VM, until it is here and right.
pub fn pull(course: &Course, hand: &Hand, control: &Path, peer: &str, paper: &Paper) -> Result<()> {
    let what = format!("pull of {} from {peer}", paper.name);
    hand.doing(what.clone());
    let mut file = tempfile::tempfile()?;
    let call = Call::Pull(Pull {
        from: peer.into(),
        path: paper.name.clone(),
        wait_ms: ACCEPT_MS,
        key: Some(new_key()),
    });
    let done = insist(control, &call, &mut file, &what)?;
    checksum(paper, &done)?;
    let mut found = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut found)?;
    paper.check(&found).context(what)?;
    course.ledger.took(peer, HOST_NAME, &paper.name, found.len());
    Ok(())
}

fn checksum(paper: &Paper, done: &Transferred) -> Result<()> {
    let meant = format!("{:08x}", crc32fast::hash(&paper.bytes()));
    ensure!(
        (done.bytes, &done.crc32) == (paper.length as u64, &meant),
        "{}: the daemon tells of {} bytes with crc32 {} instead of {meant}",
        paper.name,
        done.bytes,
        done.crc32
    );
    Ok(())
}
