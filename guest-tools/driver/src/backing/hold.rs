//! Pages that outlive the program's memory: a device without an IOMMU writes to them until the bus is taken from it.
//!
//! Comes in: locked pages. Goes out: a descriptor; while it is open nobody else gets the pages, and the kernel does not move them. Never: a
//! physical address.
//!
//! A program that is killed loses its memory first and its descriptors after it, the uio node among them, whose release takes the bus from the
//! device. So the pages are referred to by pipes, which a descriptor keeps (`vmsplice`). The kernel closes the descriptors of a dead program in an
//! order that it does not promise; but what lies in the queue of a socket is let go of only by the socket's own release, and when that runs the
//! release of the node is due already and comes first. So the pipes lie in a queue.
//!
//! References that the kernel cannot account for also keep compaction, khugepaged and NUMA balancing from moving a page.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::pipe::PipeFlags;

use super::pages::Pages;
use crate::error::{DriverError, Result};

/// Bytes that one pipe refers to, one page in a slot: more needs another right than CAP_SYS_ADMIN (`fs.pipe-max-size`).
const PIPE_BYTES: usize = 1 << 20;
/// Pipes in one message (at most 253 descriptors fit): so many are open at once while memory is taken.
const PIPES_IN_MESSAGE: usize = 64;

/// Holds pages until the descriptor is closed.
pub fn hold(pages: &Pages) -> Result<OwnedFd> {
    hold_in_pipes(pages).map_err(|errno| {
        DriverError::system(
            format!(
                "holding {} bytes of memory for the device (is the limit of open files reached, ulimit -n?)",
                pages.length
            ),
            errno,
        )
    })
}

fn hold_in_pipes(pages: &Pages) -> rustix::io::Result<OwnedFd> {
    let queue = Queue::new()?;
    let mut pipes = Vec::new();
    for start in (0..pages.length).step_by(PIPE_BYTES) {
        pipes.push(pipe(pages, start, PIPE_BYTES.min(pages.length - start))?);
        if pipes.len() == PIPES_IN_MESSAGE {
            queue.keep(&pipes)?;
            pipes.clear();
        }
    }
    queue.keep(&pipes)?;
    Ok(queue.reader)
}

/// The reading end of a pipe that refers to a stretch of the pages.
fn pipe(pages: &Pages, mut start: usize, length: usize) -> rustix::io::Result<OwnedFd> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::pipe::fcntl_setpipe_size(&writer, length)?;
    let end = start + length;
    while start < end {
        // SAFETY: start < end <= length of the mapping.
        let pointer = unsafe { pages.pointer.as_ptr().add(start) };
        let stretch = libc::iovec {
            iov_base: pointer.cast(),
            iov_len: end - start,
        };
        // SAFETY: the range stays mapped during the call. The pages are not given to the pipe (no GIFT): to write to them goes on to be ours.
        let spliced =
            unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const stretch, 1, libc::SPLICE_F_NONBLOCK) };
        match usize::try_from(spliced) {
            Ok(0) => return Err(Errno::NOSPC),
            Ok(bytes) => start += bytes,
            Err(_) => match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                code => return Err(code.map_or(Errno::IO, Errno::from_raw_os_error)),
            },
        }
    }
    Ok(reader)
}

/// A socket that descriptors are sent to and that nobody reads.
struct Queue {
    writer: OwnedFd,
    reader: OwnedFd,
}

impl Queue {
    fn new() -> rustix::io::Result<Self> {
        let (writer, reader) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok(Self { writer, reader })
    }

    fn keep(&self, descriptors: &[OwnedFd]) -> rustix::io::Result<()> {
        if descriptors.is_empty() {
            return Ok(());
        }
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let message = SendAncillaryMessage::ScmRights(&descriptors);
        let mut space = vec![MaybeUninit::uninit(); message.size()];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(message) {
            return Err(Errno::NOBUFS);
        }
        let sent = rustix::net::sendmsg(
            &self.writer,
            &[IoSlice::new(&[0])],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        );
        sent.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::pages;
    use crate::limits::{HUGE_PAGE_BYTES, PAGE_BYTES};
    use crate::memory::{DmaMemory, unmap};
    use rustix::fs::inotify;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    use std::fs::File;
    use std::io::{BufRead, BufReader, IoSliceMut, Read};
    use std::path::Path;
    use std::process::{Command, Stdio};

    fn received(queue: &OwnedFd) -> Vec<OwnedFd> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PIPES_IN_MESSAGE))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        rustix::net::recvmsg(
            queue,
            &mut [IoSliceMut::new(&mut byte)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .unwrap();
        let messages = ancillary.drain();
        messages
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
                _ => Vec::new(),
            })
            .collect()
    }

    #[test]
    fn held_pages_are_there_after_their_mapping() {
        for bytes in [PAGE_BYTES, HUGE_PAGE_BYTES, 2 * PIPE_BYTES + HUGE_PAGE_BYTES] {
            let pages = pages::take(bytes).unwrap();
            let (address, length) = (pages.pointer.as_ptr() as usize, pages.length);
            let queue = hold(&pages).unwrap();
            let memory = DmaMemory::owning(pages.pointer, length, Vec::new()).unwrap();
            // Written after: it is the pages that are held, not what was in them.
            let content: Vec<u8> = (0..length)
                .map(|index| (index >> 7) as u8 ^ index as u8)
                .collect();
            memory.write(0, &content).unwrap();
            memory.leak();
            unmap(address, length);
            let mut held = Vec::new();
            for pipe in received(&queue) {
                File::from(pipe).read_to_end(&mut held).unwrap();
            }
            assert!(held == content, "{bytes} bytes");
        }
    }

    /// A program that has a node open, and in a queue another file: it says so and waits to be killed. Run by the test below.
    #[test]
    fn program_to_be_killed() {
        let Some(directory) = std::env::var_os("VMGMT_TEST_HELD") else {
            return;
        };
        let open = |name| File::open(Path::new(&directory).join(name)).unwrap();
        // Around the node's number: the order of descriptors must not matter.
        let queued = |name, number| {
            let queue = Queue::new().unwrap();
            queue.keep(&[open(name).into()]).unwrap();
            rustix::io::fcntl_dupfd_cloexec(queue.reader, number).unwrap()
        };
        let _below = queued("below", 100);
        let _node = rustix::io::fcntl_dupfd_cloexec(open("node"), 200).unwrap();
        let _above = queued("above", 300);
        eprintln!("ready");
        loop {
            std::thread::park();
        }
    }

    #[test]
    fn what_is_held_is_let_go_after_the_node_when_the_program_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["node", "below", "above"];
        for name in names {
            std::fs::write(directory.path().join(name), name).unwrap();
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "backing::hold::tests::program_to_be_killed",
                "--nocapture",
            ])
            .env("VMGMT_TEST_HELD", directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "ready"));
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, directory.path(), inotify::WatchFlags::CLOSE_NOWRITE).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        let mut closed = Vec::new();
        while closed.len() < names.len() {
            let event = events.next().unwrap();
            closed.push(event.file_name().unwrap().to_str().unwrap().to_owned());
        }
        assert_eq!(closed.first().map(String::as_str), Some("node"), "{closed:?}");
    }
}
