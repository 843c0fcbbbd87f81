//! What a guest asks, in a test's words.

use vmgmt_abi::Opcode;

/// A submission, as a guest's program thinks of it.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    pub opcode: u16,
    pub handle: u64,
    pub offset: u64,
    pub argument: u64,
    pub flags: u16,
    pub meta: Vec<u8>,
    /// The data area.
    pub data: Vec<u8>,
    pub deadline_ns: u64,
    pub tag: u32,
    pub again: bool,
}

impl Ask {
    pub fn new(opcode: Opcode) -> Self {
        Self {
            opcode: opcode.0,
            ..Self::default()
        }
    }
    pub fn handle(self, handle: u64) -> Self {
        Self { handle, ..self }
    }
    pub fn offset(self, offset: u64) -> Self {
        Self { offset, ..self }
    }
    pub fn argument(self, argument: u64) -> Self {
        Self { argument, ..self }
    }
    pub fn flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }
    pub fn meta(self, meta: impl AsRef<[u8]>) -> Self {
        Self {
            meta: meta.as_ref().to_vec(),
            ..self
        }
    }
    pub fn data(self, data: impl AsRef<[u8]>) -> Self {
        Self {
            data: data.as_ref().to_vec(),
            ..self
        }
    }
    pub fn room(self, bytes: usize) -> Self {
        Self {
            data: vec![0; bytes],
            ..self
        }
    }
    pub fn deadline_ns(self, deadline_ns: u64) -> Self {
        Self { deadline_ns, ..self }
    }
    pub fn tag(self, tag: u32) -> Self {
        Self { tag, ..self }
    }
    pub fn again(self) -> Self {
        Self { again: true, ..self }
    }
}
