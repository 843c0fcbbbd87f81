//! Operations of file mode. Paths are `SHARE/relative/path`.

use vmgmt_abi::file::{DirectoryEntry, FileStat, ShareEntry, open};
use vmgmt_abi::ring::flag;
use vmgmt_abi::{NAME_BYTES_MAX, Opcode, PATH_BYTES_MAX};

use super::pair;
use crate::channel::{Finished, Request};
use crate::client::Client;
use crate::error::{DriverError, Result};
use crate::limits::CHECKSUM_BYTES;
use crate::memory::Buffer;
use crate::records::Records;

/// A share that the host grants to this VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub name: String,
    pub writable: bool,
    /// Bytes that may still be put there; none: no quota.
    pub bytes_left: Option<u64>,
}

/// One name of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub stat: FileStat,
}

/// An open file: its handle and its size at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFile {
    pub handle: u64,
    pub size: u64,
}

/// A put that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    pub handle: u64,
    /// Bytes that are there already (an earlier put that broke off).
    pub resumed_bytes: u64,
}

impl Client {
    /// Reads a listing to its end: `parse` takes one record.
    fn listing<T>(
        &mut self,
        opcode: Opcode,
        meta: &[u8],
        what: &'static str,
        parse: fn(&mut Records<'_>) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut found = Vec::new();
        let mut cursor = 0;
        loop {
            let room = self.listing_bytes();
            let finished = self.call_with(Request::new(opcode).offset(cursor), meta, room)?;
            let (more, next, count) = (finished.more(), finished.extra, finished.result_bytes(room)?);
            let bytes = self.take_data(finished, count)?;
            let mut records = Records::new(&bytes, what);
            while !records.is_empty() {
                found.push(parse(&mut records)?);
            }
            if !more {
                return Ok(found);
            }
            if next <= cursor || bytes.is_empty() {
                return Err(DriverError::contract(format!(
                    "{what}: the listing does not go on"
                )));
            }
            cursor = next;
        }
    }

    pub(crate) fn listing_of_peers<T>(&mut self, parse: fn(&mut Records<'_>) -> Result<T>) -> Result<Vec<T>> {
        self.listing(Opcode::PEERS, &[], "a list of peers", parse)
    }

    /// The shares of this VM.
    ///
    /// # Errors
    /// As [`Client::call`]; so for all operations here.
    pub fn shares(&mut self) -> Result<Vec<Share>> {
        self.listing(Opcode::SHARES, &[], "a list of shares", |records| {
            let head: ShareEntry = records.head()?;
            let name = records.text(bounded(head.name_bytes, NAME_BYTES_MAX)?)?;
            records.padding(head.name_bytes as usize)?;
            let bytes_left = Some(head.bytes_left).filter(|left| *left != u64::MAX);
            Ok(Share {
                name,
                writable: head.writable == 1,
                bytes_left,
            })
        })
    }

    /// The names in a directory.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn list(&mut self, path: &str) -> Result<Vec<Entry>> {
        self.listing(Opcode::LIST, path.as_bytes(), "a directory", |records| {
            let head: DirectoryEntry = records.head()?;
            let name = records.text(bounded(head.name_bytes, PATH_BYTES_MAX)?)?;
            records.padding(head.name_bytes as usize)?;
            Ok(Entry {
                name,
                stat: head.stat,
            })
        })
    }

    /// What a path is.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn stat(&mut self, path: &str) -> Result<FileStat> {
        let finished = self.call_with(Request::new(Opcode::STAT), path.as_bytes(), size_of::<FileStat>())?;
        Records::new(
            &self.take_data(finished, size_of::<FileStat>())?,
            "a file's state",
        )
        .head()
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn make_directory(&mut self, path: &str) -> Result<()> {
        self.call_with(Request::new(Opcode::MAKE_DIRECTORY), path.as_bytes(), 0)
            .map(drop)
    }

    /// Removes a file or an empty directory.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn remove(&mut self, path: &str) -> Result<()> {
        self.call_with(Request::new(Opcode::REMOVE), path.as_bytes(), 0)
            .map(drop)
    }

    /// Renames within a share; `existing` of `vmgmt_abi::file::existing`.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn rename(&mut self, source: &str, target: &str, existing: u64, durable: bool) -> Result<()> {
        let request =
            Request::new(Opcode::RENAME)
                .argument(existing)
                .flags(if durable { flag::DURABLE } else { 0 });
        self.call_with(request, &pair(source, target)?, 0).map(drop)
    }

    /// Opens a file; `how` of `vmgmt_abi::file::open`.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn open_file(&mut self, path: &str, how: u64) -> Result<OpenFile> {
        let finished = self.call_with(Request::new(Opcode::OPEN).argument(how), path.as_bytes(), 0)?;
        Ok(OpenFile {
            handle: finished.result,
            size: finished.extra,
        })
    }

    /// Opens a file for reading.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn open_for_reading(&mut self, path: &str) -> Result<OpenFile> {
        self.open_file(path, open::READ)
    }

    /// Reads at a position into a buffer; fewer bytes than asked only at the end.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn read_at(
        &mut self,
        handle: u64,
        offset: u64,
        buffer: &Buffer,
        start: usize,
        length: usize,
    ) -> Result<usize> {
        let request = Request::new(Opcode::READ)
            .handle(handle)
            .offset(offset)
            .output(buffer, start, length, 0);
        self.call(request)?.result_bytes(length)
    }

    /// Writes at a position from a buffer.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn write_at(
        &mut self,
        handle: u64,
        offset: u64,
        buffer: &Buffer,
        start: usize,
        length: usize,
    ) -> Result<usize> {
        let request = Request::new(Opcode::WRITE)
            .handle(handle)
            .offset(offset)
            .input(buffer, start, length, 0);
        self.call(request)?.result_bytes(length)
    }

    /// Sets the length of an open file.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn truncate(&mut self, handle: u64, bytes: u64) -> Result<()> {
        self.call(Request::new(Opcode::TRUNCATE).handle(handle).offset(bytes))
            .map(drop)
    }

    /// Makes an open file's data durable.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn fsync(&mut self, handle: u64) -> Result<()> {
        self.call(Request::new(Opcode::FSYNC).handle(handle)).map(drop)
    }

    /// Closes a file, gives up a put, or aborts a stream.
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn close(&mut self, handle: u64) -> Result<()> {
        self.call(Request::new(Opcode::CLOSE).handle(handle)).map(drop)
    }

    /// Begins a put; `how`: bits of `vmgmt_abi::file::{existing, put}`. Nothing is visible before [`Client::commit`].
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn put(&mut self, path: &str, size: u64, how: u64) -> Result<Put> {
        let request = Request::new(Opcode::PUT).offset(size).argument(how);
        let finished = self.call_with(request, path.as_bytes(), 0)?;
        Ok(Put {
            handle: finished.result,
            resumed_bytes: finished.extra,
        })
    }

    /// Ends a put: the file appears, whole, under the name that this gives. With a checksum it must match.
    ///
    /// # Errors
    /// As [`Client::shares`]; INTEGRITY when the checksum does not match.
    pub fn commit(
        &mut self,
        handle: u64,
        bytes: u64,
        checksum: Option<u32>,
        durable: bool,
    ) -> Result<String> {
        let mut flags = if durable { flag::DURABLE } else { 0 };
        if checksum.is_some() {
            flags |= flag::CHECK;
        }
        let request = Request::new(Opcode::COMMIT)
            .handle(handle)
            .offset(bytes)
            .argument(checksum.unwrap_or(0).into())
            .flags(flags);
        let room = PATH_BYTES_MAX.min(self.data_bytes_max());
        let finished = self.call_with(request, &[], room)?;
        let count = finished.result_bytes(room)?;
        let name = self.take_data(finished, count)?;
        Ok(String::from_utf8_lossy(&name).into_owned())
    }

    /// The host's checksum of a stretch of an open file or a put: (bytes looked at, crc32).
    ///
    /// # Errors
    /// As [`Client::shares`].
    pub fn checksum(&mut self, handle: u64, offset: u64, bytes: u64) -> Result<(u64, u32)> {
        let mut all = crc32fast::Hasher::new();
        let mut done = 0;
        while done < bytes {
            let asked = (bytes - done).min(CHECKSUM_BYTES);
            let request = Request::new(Opcode::CHECKSUM)
                .handle(handle)
                .offset(offset + done)
                .argument(asked);
            let finished = self.call(request)?;
            let looked = checked_checksum(&finished, asked)?;
            if looked == 0 {
                break;
            }
            all.combine(&crc32fast::Hasher::new_with_initial_len(
                finished.extra as u32,
                looked,
            ));
            done += looked;
        }
        Ok((done, all.finalize()))
    }
}

fn checked_checksum(finished: &Finished, asked: u64) -> Result<u64> {
    if finished.result > asked || finished.extra > u64::from(u32::MAX) {
        return Err(DriverError::contract("CHECKSUM looked at more than it was asked"));
    }
    Ok(finished.result)
}

pub(crate) fn bounded(length: u32, most: usize) -> Result<usize> {
    let length = length as usize;
    if length > most {
        return Err(DriverError::contract(format!("a name of {length} bytes")));
    }
    Ok(length)
}
