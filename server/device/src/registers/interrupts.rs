//! Interrupts as the client set them up: which eventfd belongs to what, and INTx's mask.
//!
//! In: SET_IRQS. Out: eventfds to signal and to close, and how interrupts go to the guest now. Must never know: whether an interrupt is
//! pending (the function knows), and what an eventfd is.

use crate::page::Interrupts as Kind;
use serde::{Deserialize, Serialize};
use vmgmt_wire::uapi::*;
use vmgmt_wire::{Errno, FdSlot, IrqAction, IrqInfo, IrqOperation, SetIrqs};

/// All that SET_IRQS set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interrupts {
    /// The index of the message interrupts offered: MSI or MSI-X.
    message_index: u32,
    /// INTx is masked: by the client, or by itself when it was signalled (AUTOMASKED).
    pub intx_masked: bool,
    /// INTx was signalled and the client has not unmasked it since: its line to the guest is up, or will be as soon as it reads the eventfd.
    intx_signalled: bool,
    intx: Vec<Option<FdSlot>>,
    /// An eventfd of the client's by which INTx is unmasked.
    intx_unmask: Vec<Option<FdSlot>>,
    message: Vec<Option<FdSlot>>,
    error: Vec<Option<FdSlot>>,
    request: Vec<Option<FdSlot>>,
}

/// The eventfds in a form that can be saved.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedInterrupts {
    pub intx_masked: bool,
    #[serde(default)]
    pub intx_signalled: bool,
    pub intx: Option<FdSlot>,
    pub intx_unmask: Option<FdSlot>,
    pub message: Vec<Option<FdSlot>>,
    pub error: Option<FdSlot>,
    pub request: Option<FdSlot>,
}

/// What is to be done after SET_IRQS.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IrqEffects {
    /// Nobody's any more.
    pub close: Vec<FdSlot>,
    /// To be signalled now.
    pub signal: Vec<FdSlot>,
    /// The set of message vectors is another one.
    pub vectors_changed: bool,
    /// The eventfd by which INTx is unmasked is another one.
    pub unmask_changed: bool,
}

impl Interrupts {
    pub fn new(msix: bool, vectors: u8) -> Self {
        let message_index = if msix {
            VFIO_PCI_MSIX_IRQ_INDEX
        } else {
            VFIO_PCI_MSI_IRQ_INDEX
        };
        Self {
            message_index,
            intx_masked: false,
            intx_signalled: false,
            intx: vec![None],
            intx_unmask: vec![None],
            message: vec![None; usize::from(vectors)],
            error: vec![None],
            request: vec![None],
        }
    }

    /// Answer to DEVICE_GET_IRQ_INFO.
    ///
    /// # Errors
    /// EINVAL: no such index.
    pub fn info(&self, index: u32) -> Result<IrqInfo, Errno> {
        let count = self.count(index).ok_or(Errno::EINVAL)?;
        let flags = match index {
            VFIO_PCI_INTX_IRQ_INDEX => {
                VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED
            }
            _ => VFIO_IRQ_INFO_EVENTFD,
        };
        Ok(IrqInfo { flags, index, count })
    }

    /// How interrupts go to the guest now.
    pub fn kind(&self) -> Kind {
        if let Some(highest) = self.message.iter().rposition(Option::is_some) {
            return Kind::Message {
                vectors: highest as u8 + 1,
            };
        }
        if self.intx().is_some() {
            Kind::Intx
        } else {
            Kind::None
        }
    }

    /// INTx's eventfd.
    pub fn intx(&self) -> Option<FdSlot> {
        self.intx.first().copied().flatten()
    }

    /// Whether the client's line to the guest is up, or about to be.
    ///
    /// An acknowledgement can overtake the eventfd: the guest acknowledges, then the client reads the eventfd and raises the line with
    /// nothing pending behind it. The line stays up until the guest's next access, so STATUS must own up to it until then: else no
    /// driver feels meant, and Linux disables the line after 100,000 interrupts that nobody cared for.
    pub fn intx_signalled(&self) -> bool {
        self.intx_signalled
    }

    /// INTx goes out: it is masked until the client unmasks it. Gives its eventfd.
    pub fn signal_intx(&mut self) -> Option<FdSlot> {
        self.intx_masked = true;
        self.intx_signalled = self.intx().is_some();
        self.intx()
    }

    /// The client has taken the line down and wants the next one.
    pub fn unmask_intx(&mut self) {
        self.intx_masked = false;
        self.intx_signalled = false;
    }

    /// The eventfd by which the client unmasks INTx.
    pub fn intx_unmask(&self) -> Option<FdSlot> {
        self.intx_unmask.first().copied().flatten()
    }

    /// Message vectors that have an eventfd, as a mask, and those eventfds in order.
    pub fn vectors(&self) -> (u32, Vec<FdSlot>) {
        let present = self.message.iter().enumerate();
        let present = present.fold(0, |mask, (vector, slot)| {
            mask | (u32::from(slot.is_some()) << vector)
        });
        (present, self.message.iter().copied().flatten().collect())
    }

    /// Every eventfd held.
    pub fn all(&self) -> impl Iterator<Item = FdSlot> {
        let lists = [
            &self.intx,
            &self.intx_unmask,
            &self.message,
            &self.error,
            &self.request,
        ];
        lists.into_iter().flatten().copied().flatten()
    }

    /// Does what the client asks.
    ///
    /// # Errors
    /// EINVAL: no such interrupt; EOPNOTSUPP: an action that this kind of interrupt does not have. Nothing has changed; the request's eventfds
    /// are the caller's to close.
    pub fn set(&mut self, request: &SetIrqs) -> Result<IrqEffects, Errno> {
        let count = self.count(request.index).ok_or(Errno::EINVAL)?;
        let index = request.index;
        let check = |start: u32, number: usize| {
            let end = u64::from(start) + number as u64;
            if end <= u64::from(count) {
                Ok(start as usize..end as usize)
            } else {
                Err(Errno::EINVAL)
            }
        };
        let mut effects = IrqEffects::default();
        match &request.operation {
            IrqOperation::DisableAll => self.disable_all(index, &mut effects),
            IrqOperation::Assign {
                action,
                start,
                eventfds,
            } => {
                let range = check(*start, eventfds.len())?;
                let new: Vec<_> = eventfds.iter().copied().map(Some).collect();
                self.replace(index, *action, range, &new, &mut effects)?;
            }
            IrqOperation::Deassign { action, start, count } => {
                let range = check(*start, *count as usize)?;
                let none = vec![None; range.len()];
                self.replace(index, *action, range, &none, &mut effects)?;
            }
            IrqOperation::Act { action, start, count } => {
                let range = check(*start, *count as usize)?;
                self.act(index, *action, range, &mut effects)?;
            }
            IrqOperation::ActWhere {
                action,
                start,
                selected,
            } => {
                let range = check(*start, selected.len())?;
                for (interrupt, _) in range.zip(selected).filter(|(_, selected)| **selected) {
                    self.act(index, *action, interrupt..interrupt + 1, &mut effects)?;
                }
            }
        }
        Ok(effects)
    }

    pub fn save(&self) -> SavedInterrupts {
        let Self {
            message_index: _,
            intx_masked,
            intx_signalled,
            intx,
            intx_unmask,
            message,
            error,
            request,
        } = self;
        let first = |list: &Vec<Option<FdSlot>>| list.first().copied().flatten();
        SavedInterrupts {
            intx_masked: *intx_masked,
            intx_signalled: *intx_signalled,
            intx: first(intx),
            intx_unmask: first(intx_unmask),
            message: message.clone(),
            error: first(error),
            request: first(request),
        }
    }

    /// Takes saved eventfds in.
    ///
    /// # Errors
    /// What contradicts this device.
    pub fn restore(mut self, saved: &SavedInterrupts) -> Result<Self, &'static str> {
        let SavedInterrupts {
            intx_masked,
            intx_signalled,
            intx,
            intx_unmask,
            message,
            error,
            request,
        } = saved;
        if message.len() != self.message.len() {
            return Err("another number of interrupt vectors");
        }
        self.intx_masked = *intx_masked;
        self.intx_signalled = *intx_signalled;
        self.intx = vec![*intx];
        self.intx_unmask = vec![*intx_unmask];
        self.message.clone_from(message);
        self.error = vec![*error];
        self.request = vec![*request];
        Ok(self)
    }

    /// Interrupts of an index; `None` where PCI has no such index.
    fn count(&self, index: u32) -> Option<u32> {
        match index {
            VFIO_PCI_INTX_IRQ_INDEX | VFIO_PCI_ERR_IRQ_INDEX | VFIO_PCI_REQ_IRQ_INDEX => Some(1),
            _ if index == self.message_index => Some(self.message.len() as u32),
            VFIO_PCI_MSI_IRQ_INDEX | VFIO_PCI_MSIX_IRQ_INDEX => Some(0),
            _ => None,
        }
    }

    /// The eventfds that an action on an index uses.
    fn list(&mut self, index: u32, action: IrqAction) -> Result<&mut Vec<Option<FdSlot>>, Errno> {
        match (index, action) {
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Trigger) => Ok(&mut self.intx),
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Unmask) => Ok(&mut self.intx_unmask),
            (VFIO_PCI_ERR_IRQ_INDEX, IrqAction::Trigger) => Ok(&mut self.error),
            (VFIO_PCI_REQ_IRQ_INDEX, IrqAction::Trigger) => Ok(&mut self.request),
            (index, IrqAction::Trigger) if index == self.message_index => Ok(&mut self.message),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn replace(
        &mut self,
        index: u32,
        action: IrqAction,
        range: std::ops::Range<usize>,
        new: &[Option<FdSlot>],
        effects: &mut IrqEffects,
    ) -> Result<(), Errno> {
        let list = self.list(index, action)?;
        let places = list.get_mut(range).ok_or(Errno::EINVAL)?;
        for (place, new) in places.iter_mut().zip(new) {
            effects.close.extend(std::mem::replace(place, *new));
        }
        effects.vectors_changed |= index == self.message_index;
        if index == VFIO_PCI_INTX_IRQ_INDEX {
            effects.unmask_changed |= action == IrqAction::Unmask;
            // A line that is set up anew starts unmasked.
            if action == IrqAction::Trigger {
                self.unmask_intx();
            }
        }
        Ok(())
    }

    fn disable_all(&mut self, index: u32, effects: &mut IrqEffects) {
        for action in [IrqAction::Trigger, IrqAction::Unmask] {
            let Ok(list) = self.list(index, action) else {
                continue;
            };
            let before = effects.close.len();
            effects.close.extend(list.iter_mut().filter_map(Option::take));
            let changed = effects.close.len() > before;
            effects.vectors_changed |= changed && index == self.message_index;
            effects.unmask_changed |= changed && action == IrqAction::Unmask;
        }
        if index == VFIO_PCI_INTX_IRQ_INDEX {
            self.unmask_intx();
        }
    }

    fn act(
        &mut self,
        index: u32,
        action: IrqAction,
        range: std::ops::Range<usize>,
        effects: &mut IrqEffects,
    ) -> Result<(), Errno> {
        match (index, action) {
            (_, IrqAction::Trigger) => {
                let list = self.list(index, action)?;
                let places = list.get(range).ok_or(Errno::EINVAL)?;
                effects.signal.extend(places.iter().copied().flatten());
            }
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Mask) => self.intx_masked = true,
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Unmask) => self.unmask_intx(),
            _ => return Err(Errno::EOPNOTSUPP),
        }
        Ok(())
    }
}
