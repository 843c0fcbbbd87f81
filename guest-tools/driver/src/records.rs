//! Records that the device puts into a buffer: a fixed head, names behind it, padding to 8 bytes.
//!
//! Comes in: a private copy of the bytes. Goes out: heads and names that are whole. Lengths are the peer's and are checked.

use zerocopy::FromBytes;

use crate::error::{DriverError, Result};

/// Walks over records.
pub struct Records<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Records<'a> {
    /// Over a copy of what the device gave.
    pub const fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    /// Whether all is read.
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn cut(&self) -> DriverError {
        DriverError::contract(format!("{} is cut off or names an impossible length", self.what))
    }

    /// A fixed head.
    pub fn head<T: FromBytes>(&mut self) -> Result<T> {
        let (head, rest) = T::read_from_prefix(self.bytes).map_err(|_| self.cut())?;
        self.bytes = rest;
        Ok(head)
    }

    /// Some bytes.
    pub fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or_else(|| self.cut())?;
        self.bytes = rest;
        Ok(taken)
    }

    /// A name, made printable.
    pub fn text(&mut self, length: usize) -> Result<String> {
        self.take(length)
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// The zeros behind `length` bytes of names.
    pub fn padding(&mut self, length: usize) -> Result<()> {
        self.take(length.next_multiple_of(8).saturating_sub(length))
            .map(drop)
    }

    /// All that is left.
    pub const fn rest(self) -> &'a [u8] {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmgmt_abi::file::ShareEntry;
    use zerocopy::IntoBytes;

    #[test]
    fn lengths_of_the_peer_are_checked() {
        let mut bytes = ShareEntry {
            bytes_left: 1,
            writable: 1,
            name_bytes: 3,
        }
        .as_bytes()
        .to_vec();
        bytes.extend(b"abc\0\0\0\0\0");
        let mut records = Records::new(&bytes, "a share");
        let head: ShareEntry = records.head().unwrap();
        assert_eq!(records.text(head.name_bytes as usize).unwrap(), "abc");
        records.padding(3).unwrap();
        assert!(records.is_empty());
        assert!(records.head::<ShareEntry>().is_err());
        assert!(Records::new(&bytes, "a share").take(usize::MAX).is_err());
    }
}
