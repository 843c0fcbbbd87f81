//! GARDEN, memory of VMs: bytes, and who may write where at this moment.
//!
//! In: accesses of the guest, and of the device (by mapping or by message). Out: bytes; a complaint for each write of the device that it
//! had no right to. Must never know: rings, operations.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// What went wrong so far; looked at after every step.
#[derive(Clone, Debug, Default)]
pub struct Complaints(Rc<RefCell<Vec<String>>>);

impl Complaints {
    /// Something that must never be.
    pub fn add(&self, text: String) {
        self.0.borrow_mut().push(text);
    }
    /// The first, if there is one.
    #[must_use]
    pub fn first(&self) -> Option<String> {
        self.0.borrow().first().cloned()
    }
}

/// One memory object: what a descriptor names.
#[derive(Debug)]
pub struct Ram {
    /// Its name as a descriptor.
    pub key: u32,
    /// Whose it is.
    pub vm: u64,
    bytes: RefCell<Vec<u8>>,
    /// Ranges that the client has mapped for the device: from before its request is sent until the answer to its unmap has come.
    mapped: RefCell<BTreeMap<u64, (u64, u64)>>,
    /// Ranges that an honest guest expects to be written: completion slots, the device's event words, buffers of receives in flight.
    expected: RefCell<BTreeMap<u64, u64>>,
    /// An honest guest's: `expected` is held against each write.
    pub honest: Cell<bool>,
    /// No write at all: the reason.
    pub quiet: Cell<Option<&'static str>>,
    /// An operator was told that no byte of it is read or written; whatever the guest does.
    pub frozen: Cell<bool>,
    complaints: Complaints,
}

impl Ram {
    /// Memory filled with its owner's mark.
    #[must_use]
    pub fn new(key: u32, vm: u64, bytes: usize, complaints: &Complaints) -> Rc<Self> {
        Rc::new(Self {
            key,
            vm,
            bytes: RefCell::new(vec![mark(vm); bytes]),
            mapped: RefCell::default(),
            expected: RefCell::default(),
            honest: Cell::new(true),
            quiet: Cell::new(Some("nothing was set up yet")),
            frozen: Cell::new(false),
            complaints: complaints.clone(),
        })
    }

    /// The guest (or the device) reads. Outside there are zeros.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        if let Some(from) = self.bytes.borrow().get(offset as usize..) {
            let bytes = from.len().min(into.len());
            into[..bytes].copy_from_slice(&from[..bytes]);
        }
    }

    /// The device reads.
    pub fn device_read(&self, offset: u64, into: &mut [u8]) {
        if self.frozen.get() {
            self.complaints.add(format!(
                "the device read {} bytes at {offset:#x} of memory {} of VM {}: the VM is frozen",
                into.len(),
                self.key,
                self.vm
            ));
        }
        self.read(offset, into);
    }

    /// The guest writes.
    pub fn write(&self, offset: u64, from: &[u8]) {
        if let Some(into) = self
            .bytes
            .borrow_mut()
            .get_mut(offset as usize..offset as usize + from.len())
        {
            into.copy_from_slice(from);
        }
    }

    /// The guest (or the device) reads a word.
    #[must_use]
    pub fn load_u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The guest writes a word.
    pub fn store_u32(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// The device writes, in the name of the map with this number (0: by message).
    pub fn device_write(&self, offset: u64, from: &[u8], map: u64) {
        self.judge(offset, from.len() as u64, map);
        self.write(offset, from);
    }

    /// A worker reads it for a file: never behind a fence. (One that outlives its core in disk sleep may.)
    pub fn judge_read(&self, offset: u64, bytes: u64) {
        let within = |(start, end): &(u64, u64)| *start <= offset && offset + bytes <= *end;
        let why = match self.quiet.get() {
            _ if self.frozen.get() => "the VM is frozen",
            Some(reason) => reason,
            None if self.mapped.borrow().values().any(within) => return,
            None => "it is not mapped for the device any more",
        };
        self.complaints.add(format!(
            "a worker read {bytes} bytes at {offset:#x} of memory {} of VM {}: {why}",
            self.key, self.vm
        ));
    }

    fn judge(&self, offset: u64, bytes: u64, map: u64) {
        let complain = |why: &str| {
            self.complaints.add(format!(
                "the device wrote {bytes} bytes at {offset:#x} of memory {} of VM {} (map {map}): {why}",
                self.key, self.vm
            ));
        };
        if self.frozen.get() {
            return complain("the VM is frozen");
        }
        if let Some(reason) = self.quiet.get() {
            return complain(reason);
        }
        let within = |start: u64, end: u64| start <= offset && offset + bytes <= end;
        if !self
            .mapped
            .borrow()
            .values()
            .any(|(start, end)| within(*start, *end))
        {
            return complain("it is not mapped for the device any more, or never was");
        }
        let expected = self.expected.borrow();
        let found = expected.range(..=offset).next_back();
        if self.honest.get() && !found.is_some_and(|(start, end)| within(*start, *end)) {
            complain("nothing was to be written there");
        }
    }

    /// The client is about to map (`id` names the map for [`Ram::unmapped`]).
    pub fn map(&self, id: u64, start: u64, bytes: u64) {
        self.mapped.borrow_mut().insert(id, (start, start + bytes));
    }
    /// The answer to an unmap came.
    pub fn unmapped(&self, id: u64) {
        self.mapped.borrow_mut().remove(&id);
    }
    /// The client is gone.
    pub fn unmapped_all(&self) {
        self.mapped.borrow_mut().clear();
    }
    /// The guest expects the device to write there.
    pub fn expect(&self, start: u64, bytes: u64) {
        self.expected.borrow_mut().insert(start, start + bytes);
    }
    /// And does not any more.
    pub fn forbid(&self, start: u64) {
        self.expected.borrow_mut().remove(&start);
    }
    /// Nothing is expected any more.
    pub fn forbid_all(&self) {
        self.expected.borrow_mut().clear();
    }
}

/// The byte that a VM's memory is full of.
#[must_use]
pub const fn mark(vm: u64) -> u8 {
    0x80 | (vm as u8 & 0x7f)
}
