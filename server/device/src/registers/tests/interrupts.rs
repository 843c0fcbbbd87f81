//! SET_IRQS, INTx as a level, message vectors.

use super::*;
use crate::page::Interrupts;
use vmgmt_abi::registers as abi;
use vmgmt_wire::uapi::*;
use vmgmt_wire::{Errno, IrqAction, IrqOperation, SetIrqs};

fn set(bench: &mut Bench, index: u32, operation: IrqOperation) -> Option<Reply> {
    bench.command(Command::DeviceSetIrqs(SetIrqs { index, operation }))
}

fn assign(start: u32, slots: std::ops::Range<u32>) -> IrqOperation {
    IrqOperation::Assign {
        action: IrqAction::Trigger,
        start,
        eventfds: slots.map(FdSlot).collect(),
    }
}

fn act(action: IrqAction) -> IrqOperation {
    IrqOperation::Act {
        action,
        start: 0,
        count: 1,
    }
}

/// A device with INTx set up on slot 9, vector 2 enabled, and a core.
fn intx() -> (Bench, CorePage<PlainWords>) {
    let mut bench = Bench::new();
    let core = bench.core(1);
    assert_eq!(
        set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, assign(0, 9..10)),
        Some(Reply::Done)
    );
    bench.set(0, abi::INTERRUPT_ENABLE, 1 << 2);
    bench.signals();
    (bench, core)
}

#[test]
fn intx_is_a_level_masks_itself_and_comes_back_on_unmask() {
    let (mut bench, core) = intx();
    assert_eq!(bench.front.interrupts(), Interrupts::Intx);
    core.set_raise(2, 1);
    bench.input(Input::Kicked);
    assert_eq!(bench.signals(), [FdSlot(9)]);
    assert_eq!(bench.get(VFIO_PCI_CONFIG_REGION_INDEX, 4) >> 16 & 8, 8);
    assert_eq!(bench.get(0, abi::INTERRUPT_PENDING), 4);
    core.set_raise(2, 2);
    bench.input(Input::Kicked);
    assert_eq!(bench.signals(), [], "masked by itself");
    set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, act(IrqAction::Unmask));
    assert_eq!(bench.signals(), [FdSlot(9)], "still asserted");
    bench.set(0, abi::INTERRUPT_ACK, 4);
    bench.input(Input::UnmaskSignalled);
    assert_eq!(bench.signals(), []);
    assert_eq!(bench.get(VFIO_PCI_CONFIG_REGION_INDEX, 4) >> 16 & 8, 0);
    core.set_raise(2, 3);
    bench.input(Input::Kicked);
    assert_eq!(bench.signals(), [FdSlot(9)]);
}

#[test]
fn intx_waits_for_enable_and_for_the_command_bit() {
    let (mut bench, core) = intx();
    core.set_raise(3, 1);
    bench.input(Input::Kicked);
    assert_eq!(bench.signals(), [], "vector 3 is not enabled");
    bench.command_register(0x400);
    bench.set(0, abi::INTERRUPT_ENABLE, 1 << 3);
    assert_eq!(bench.signals(), []);
    assert_eq!(
        bench.get(VFIO_PCI_CONFIG_REGION_INDEX, 4) >> 16 & 8,
        8,
        "status tells all the same"
    );
    bench.command_register(0);
    assert_eq!(bench.signals(), [FdSlot(9)]);
}

#[test]
fn status_owns_up_to_a_line_that_an_acknowledgement_overtook() {
    let (mut bench, core) = intx();
    core.set_raise(2, 1);
    bench.input(Input::Kicked);
    assert_eq!(bench.signals(), [FdSlot(9)]);
    // The guest polled, saw the work and acknowledges; the client reads the eventfd only now and raises the line.
    bench.set(0, abi::INTERRUPT_ACK, 4);
    assert_eq!(bench.get(0, abi::INTERRUPT_PENDING), 0);
    assert_eq!(
        bench.get(VFIO_PCI_CONFIG_REGION_INDEX, 4) >> 16 & 8,
        8,
        "else nobody cares for this interrupt"
    );
    set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, act(IrqAction::Unmask));
    assert_eq!(bench.get(VFIO_PCI_CONFIG_REGION_INDEX, 4) >> 16 & 8, 0);
    assert_eq!(bench.signals(), [], "and it is not signalled again");
    // Set up anew while it was up: the line begins low.
    core.set_raise(2, 2);
    bench.input(Input::Kicked);
    bench.set(0, abi::INTERRUPT_ACK, 4);
    set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, IrqOperation::DisableAll);
    assert_eq!(bench.get(VFIO_PCI_CONFIG_REGION_INDEX, 4) >> 16 & 8, 0);
    // Masked by the client is not signalled.
    let (mut bench, _core) = intx();
    set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, act(IrqAction::Mask));
    assert_eq!(bench.get(VFIO_PCI_CONFIG_REGION_INDEX, 4) >> 16 & 8, 0);
}

#[test]
fn message_vectors_come_in_chunks_and_go() {
    let mut bench = Bench::new();
    set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, assign(0, 0..2));
    set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, assign(4, 4..6));
    assert_eq!(bench.front.interrupts(), Interrupts::Message { vectors: 6 });
    let vectors = Output::Vectors {
        present: 0b11_0011,
        eventfds: [0, 1, 4, 5].map(FdSlot).to_vec(),
    };
    assert_eq!(
        bench
            .outputs
            .iter()
            .filter(|output| matches!(output, Output::Vectors { .. }))
            .nth(1),
        Some(&vectors)
    );
    assert_eq!(bench.front.vectors_changed(), 2);
    bench.outputs.clear();
    // A new eventfd for a vector closes the one before, after the core has been told.
    set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, assign(1, 7..8));
    assert!(matches!(bench.outputs.last(), Some(Output::Close(FdSlot(1)))));
    let deassign = IrqOperation::Deassign {
        action: IrqAction::Trigger,
        start: 4,
        count: 2,
    };
    set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, deassign);
    assert_eq!(bench.front.interrupts(), Interrupts::Message { vectors: 2 });
    let trigger = IrqOperation::ActWhere {
        action: IrqAction::Trigger,
        start: 0,
        selected: vec![false, true],
    };
    bench.outputs.clear();
    set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, trigger);
    assert_eq!(bench.signals(), [FdSlot(7)]);
    set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, IrqOperation::DisableAll);
    assert_eq!(bench.front.interrupts(), Interrupts::None);
    assert_eq!(bench.function.eventfds(), []);
}

#[test]
fn wrong_requests_change_nothing_and_give_their_eventfds_back() {
    let mut bench = Bench::new();
    assert_eq!(
        set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, assign(15, 0..2)),
        Some(Reply::Error(Errno::EINVAL))
    );
    assert_eq!(
        bench.outputs,
        [Output::Close(FdSlot(0)), Output::Close(FdSlot(1))]
    );
    for (index, operation, errno) in [
        (VFIO_PCI_MSIX_IRQ_INDEX, assign(0, 0..1), Errno::EINVAL),
        (9, assign(0, 0..1), Errno::EINVAL),
        (VFIO_PCI_MSI_IRQ_INDEX, act(IrqAction::Mask), Errno::EOPNOTSUPP),
    ] {
        assert_eq!(
            set(&mut bench, index, operation),
            Some(Reply::Error(errno)),
            "{index}"
        );
    }
    // Indexes that are empty, or only kept: QEMU turns them off and on.
    for index in 0..VFIO_PCI_NUM_IRQS {
        assert_eq!(
            set(&mut bench, index, IrqOperation::DisableAll),
            Some(Reply::Done)
        );
    }
    assert_eq!(
        set(&mut bench, VFIO_PCI_ERR_IRQ_INDEX, assign(0, 3..4)),
        Some(Reply::Done)
    );
    assert_eq!(
        set(&mut bench, VFIO_PCI_REQ_IRQ_INDEX, assign(0, 4..5)),
        Some(Reply::Done)
    );
}

#[test]
fn the_unmask_eventfd_is_watched() {
    let mut bench = Bench::new();
    let unmask = IrqOperation::Assign {
        action: IrqAction::Unmask,
        start: 0,
        eventfds: vec![FdSlot(2)],
    };
    set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, unmask);
    assert!(bench.outputs.contains(&Output::WatchUnmask(Some(FdSlot(2)))));
    set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, IrqOperation::DisableAll);
    assert!(
        bench.outputs.contains(&Output::WatchUnmask(None))
            && bench.outputs.contains(&Output::Close(FdSlot(2)))
    );
}

#[test]
fn infos_name_what_there_is() {
    let mut bench = Bench::new();
    let counts: Vec<u32> = (0..5)
        .map(|index| match bench.command(Command::DeviceGetIrqInfo { index }) {
            Some(Reply::IrqInfo(info)) => info.count,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(counts, [1, 16, 0, 1, 1]);
    let sizes: Vec<u64> = (0..9)
        .map(
            |region| match bench.command(Command::DeviceGetRegionInfo { region }) {
                Some(Reply::RegionInfo(info)) => {
                    assert_eq!(info.flags & VFIO_REGION_INFO_FLAG_MMAP, 0);
                    info.bytes
                }
                other => panic!("{other:?}"),
            },
        )
        .collect();
    assert_eq!(sizes, [16384, 0, 64, 0, 0, 0, 0, 4096, 0]);
    assert_eq!(
        bench.command(Command::DeviceGetRegionInfo { region: 9 }),
        Some(Reply::Error(Errno::EINVAL))
    );
}

/// What a guest's kernel and QEMU do at each INTx interrupt.
#[test]
fn an_interrupt_does_not_wake_the_core() {
    // Command register: memory and bus master are 6.
    const INTX_DISABLE: u16 = 1 << 10;
    let (mut bench, core) = intx();
    bench.command_register(6);
    let touched = |bench: &mut Bench| {
        let touched = bench.outputs.contains(&Output::Touched);
        bench.outputs.retain(|output| !matches!(output, Output::Touched));
        touched
    };
    assert!(touched(&mut bench), "bus mastering is the core's affair");
    core.set_raise(2, 1);
    bench.input(Input::Kicked);
    assert_eq!(bench.signals(), [FdSlot(9)]);
    bench.command_register(6 | INTX_DISABLE);
    set(&mut bench, VFIO_PCI_INTX_IRQ_INDEX, act(IrqAction::Unmask));
    bench.set(0, abi::INTERRUPT_ACK, 4);
    bench.get(0, abi::INTERRUPT_PENDING);
    bench.command_register(6);
    assert!(!touched(&mut bench));
    core.set_raise(2, 2);
    bench.input(Input::Kicked);
    assert_eq!(bench.signals(), [FdSlot(9)], "the next one comes all the same");
    set(&mut bench, VFIO_PCI_MSI_IRQ_INDEX, assign(0, 4..6));
    assert!(touched(&mut bench), "vectors are the core's affair");
}
