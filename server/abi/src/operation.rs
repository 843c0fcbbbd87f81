//! Modes and opcodes. An opcode's upper byte is its mode; those of [`Mode::COMMON`] work in every mode.

use crate::status::open_enum;

open_enum! {
    /// What a ring (or the port window) was opened for (32 bits).
    Mode(u32) {
        COMMON = 0, "only the operations that every mode has";
        FILE = 1, "files";
        CHAT = 2, "messages and calls";
        STATISTICS = 3, "statistics";
        CALCULATION = 4, "calculation";
    }
}

open_enum! {
    /// What a submission asks for (16 bits). "meta" is the input at the buffer's start, "data" the rest of the buffer.
    Opcode(u16) {
        NOOP = 0x0000, "nothing, at once";
        ECHO = 0x0001, "meta is copied into data; result: bytes";
        PROVE = 0x0002, "is memory at `buffer` shared? its first 8 bytes hold `argument`, a nonce; result: 1 shared, 0 by messages";
        CANCEL = 0x0003, "cancels the submission of this ring whose tag is `argument`; result: 1 when it was found in flight";
        IDENTITY = 0x0004, "who am I: the number of this VM in result, its name into data (extra: bytes of it)";

        SHARES = 0x0100, "data: file::ShareEntry records from cursor `offset`; result: bytes, extra: next cursor, MORE when there is more";
        LIST = 0x0101, "meta: path of a directory; data: file::DirectoryEntry records from cursor `offset`; result, extra, MORE as in SHARES";
        STAT = 0x0102, "meta: path; data: file::FileStat";
        MAKE_DIRECTORY = 0x0103, "meta: path";
        REMOVE = 0x0104, "meta: path of a file or an empty directory";
        RENAME = 0x0105, "meta: source path, NUL, target path; argument: file::existing; flag DURABLE";
        OPEN = 0x0106, "meta: path; argument: file::open bits; result: handle, extra: size in bytes";
        READ = 0x0107, "handle, offset; data is filled; result: bytes, fewer than asked only at the end of the file";
        WRITE = 0x0108, "handle, offset; data is written; result: bytes";
        TRUNCATE = 0x0109, "handle; offset: new length";
        FSYNC = 0x010a, "handle";
        CLOSE = 0x010b, "handle of a file, a put (which leaves nothing unless it is resumable) or a stream (which aborts it)";
        PUT = 0x010c, "meta: path; offset: size, or UNKNOWN; argument: file::existing | file::put bits; result: handle, extra: bytes that are there already (resume)";
        COMMIT = 0x010d, "handle of a put; offset: length in bytes; argument: crc32 with CHECK; DURABLE; data: name it got (result: bytes of it). A mismatch leaves no file";
        CHECKSUM = 0x010e, "handle, offset; argument: bytes; result: bytes looked at, extra: crc32";
        OFFER = 0x0110, "meta: target VM, NUL, file name; handle: 0, or the request that this answers; offset: size, or UNKNOWN; completes when answered; result: stream handle";
        NEXT_OFFER = 0x0111, "a receive submission; data: file::OfferHeader, then source and file name; result: bytes";
        ACCEPT = 0x0112, "handle: offer; result: stream handle";
        REFUSE = 0x0113, "handle: offer or request; argument: a status for the other side, 0: REFUSED";
        STREAM_WRITE = 0x0114, "handle; data goes to the receiver; result: bytes, all of them";
        STREAM_READ = 0x0115, "handle; data is filled with what is there, at least one byte, or END; result: bytes";
        STREAM_END = 0x0116, "handle; offset: bytes sent in all; argument: crc32 with CHECK; completes when the receiver has confirmed";
        STREAM_CONFIRM = 0x0117, "handle; argument: a status: OK (all is there), INTEGRITY or another";

        PUBLISH = 0x0200, "data: description (UTF-8, at most chat::DESCRIPTION_BYTES_MAX); argument: 1 publish, 0 withdraw";
        PEERS = 0x0201, "data: chat::PeerEntry records from cursor `offset`; result, extra, MORE as in SHARES";
        SEND = 0x0202, "handle: a peer's number, or chat::PEER_BY_NAME with its name in meta; data: the message; argument: idempotency key, 0: none; result: the message's number (to all: how many took it)";
        RECEIVE = 0x0203, "a receive submission; data: chat::MessageHeader, source name, message; result: bytes, extra: bytes of the message that are left, with MORE: the next RECEIVE of this ring goes on";
    }
}

impl Opcode {
    /// The mode an opcode belongs to.
    #[must_use]
    pub const fn mode(self) -> Mode {
        Mode((self.0 >> 8) as u32)
    }

    /// Whether it waits for something from outside and so may stay in flight for long.
    #[must_use]
    pub const fn is_receive(self) -> bool {
        matches!(self, Self::NEXT_OFFER | Self::RECEIVE)
    }
}
