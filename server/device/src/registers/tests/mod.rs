//! Tests of the register side: a function on plain words, driven as a client drives it, with a core page that the test writes.

mod config;
mod dma;
mod interrupts;
mod memory_bar;
mod ports;
mod properties;
mod resets;

use super::*;
use crate::page::{CorePage, FrontPage, PlainWords};
use crate::tick::Tick;
use vmgmt_wire::uapi::{VFIO_PCI_CONFIG_REGION_INDEX, user};
use vmgmt_wire::{
    Command, DmaMap, DmaUnmap, FdSlot, IovaRange, RegionAccess, RegionWrite, Reply, ReplyHandle,
};

pub const MAPS: usize = 64;

pub fn settings() -> Settings {
    Settings {
        session: 7,
        vm: 3,
        pci_vendor: vmgmt_abi::PCI_VENDOR,
        pci_device: vmgmt_abi::PCI_DEVICE,
        msix: false,
        vectors: 16,
        rings: 4,
        maps_max: MAPS as u32,
        mapped_bytes_max: 1 << 32,
        objects_max: 4,
        features: 0x0103,
    }
}

/// A function, both its pages, and what it said.
pub struct Bench {
    pub function: Function<PlainWords>,
    pub front: FrontPage<PlainWords>,
    pub words: PlainWords,
    pub core: Option<CorePage<PlainWords>>,
    pub now: Tick,
    pub outputs: Vec<Output>,
    sequence: u64,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(settings())
    }

    pub fn with(settings: Settings) -> Self {
        let words = PlainWords::new(FrontPage::<PlainWords>::words_needed(MAPS));
        let function = Function::new(settings, words.clone()).unwrap();
        Self {
            function,
            front: FrontPage::new(words.clone()),
            words,
            core: None,
            now: Tick(0),
            outputs: vec![],
            sequence: 0,
        }
    }

    pub fn input(&mut self, input: Input<PlainWords>) {
        self.function.handle(self.now, input);
        self.poll();
    }

    pub fn poll(&mut self) {
        while let Some(output) = self.function.poll_output() {
            self.outputs.push(output);
        }
    }

    /// A core life begins; its page.
    pub fn core(&mut self, life: u64) -> CorePage<PlainWords> {
        let words = PlainWords::new(CorePage::<PlainWords>::WORDS);
        self.input(Input::CoreBegins {
            life,
            page: words.clone(),
        });
        let page = CorePage::new(words);
        self.core = Some(page.clone());
        page
    }

    pub fn handle_of(&mut self, command: u16) -> ReplyHandle {
        self.sequence += 1;
        ReplyHandle {
            sequence: self.sequence,
            message_id: self.sequence as u16,
            command,
            no_reply: false,
            reply_bytes_max: u32::MAX,
        }
    }

    /// Sends a command; its reply, when it was given at once.
    pub fn command(&mut self, command: Command) -> Option<Reply> {
        let handle = self.handle_of(user::VFIO_USER_DEVICE_RESET);
        self.input(Input::Command { handle, command });
        self.reply(handle)
    }

    /// Takes the reply to a handle out of what was said.
    pub fn reply(&mut self, wanted: ReplyHandle) -> Option<Reply> {
        let is = |output: &Output| matches!(output, Output::Reply { handle, .. } if *handle == wanted);
        let index = self.outputs.iter().position(is)?;
        match self.outputs.remove(index) {
            Output::Reply { reply, .. } => Some(reply),
            _ => None,
        }
    }

    pub fn read(&mut self, region: u32, offset: u64, bytes: u32) -> Vec<u8> {
        let access = RegionAccess::new(region, offset, bytes).unwrap();
        match self.command(Command::RegionRead(access)) {
            Some(Reply::RegionRead { data, .. }) => data,
            other => panic!("read {region} {offset:#x}: {other:?}"),
        }
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Option<Reply> {
        let write = RegionWrite::new(region, offset, data.to_vec()).unwrap();
        self.command(Command::RegionWrite(write))
    }

    pub fn get(&mut self, region: u32, offset: u32) -> u32 {
        u32::from_le_bytes(self.read(region, u64::from(offset), 4).try_into().unwrap())
    }

    pub fn set(&mut self, region: u32, offset: u32, value: u32) {
        assert!(matches!(
            self.write(region, u64::from(offset), &value.to_le_bytes()),
            Some(Reply::RegionWrite(_))
        ));
    }

    pub fn command_register(&mut self, value: u16) -> Option<Reply> {
        self.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &value.to_le_bytes())
    }

    pub fn map(&mut self, iova: u64, bytes: u64, object: u64) -> Option<Reply> {
        let handle = self.handle_of(user::VFIO_USER_DMA_MAP);
        let map = DmaMap {
            range: IovaRange::new(iova, bytes).unwrap(),
            readable: true,
            writable: true,
            descriptor: None,
            file_offset: iova,
            descriptor_lost: false,
        };
        let object = (object != 0).then_some(MapObject {
            number: object,
            rights: 3,
        });
        self.input(Input::Map { handle, map, object });
        self.reply(handle)
    }

    pub fn unmap(&mut self, iova: u64, bytes: u64) -> Option<Reply> {
        let range = IovaRange::new(iova, bytes).unwrap();
        self.command(Command::DmaUnmap(DmaUnmap::Range(range)))
    }

    /// Eventfds signalled since the last call.
    pub fn signals(&mut self) -> Vec<FdSlot> {
        let signals = self.outputs.iter().filter_map(|output| match output {
            Output::Signal(slot) => Some(*slot),
            _ => None,
        });
        let signals = signals.collect();
        self.outputs.clear();
        signals
    }
}
