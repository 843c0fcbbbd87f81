//! From the body of a command to a typed request: every length is checked here, once.
//!
//! In: command number, body, the descriptors of that message. Out: a [`Command`] or a [`Refusal`], and
//! every descriptor that the command did not take is left in the list for the caller to close.
//! Must never know: the stream, replies, what has been negotiated (but for one flag).

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::FdSlot;
use crate::limits;
use crate::request::{
    Command, DeviceFeature, DmaMap, DmaUnmap, FeatureOperation, IovaRange, IrqAction, IrqOperation, Refusal,
    RegionAccess, RegionWrite, SetIrqs,
};
use crate::uapi::{self, user};

/// The descriptors of one message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptors {
    /// In the order they were sent.
    pub slots: Vec<FdSlot>,
    /// The kernel could not deliver all of them.
    pub lost: bool,
}

/// A decoded command and the most bytes its reply's body may have (`argsz`; `u32::MAX` where the
/// specification has none).
pub(crate) struct Decoded {
    pub command: Command,
    pub reply_bytes_max: u32,
}

/// Decodes everything but VERSION.
pub(crate) fn decode(
    command: u16,
    body: &[u8],
    descriptors: &mut Descriptors,
    write_multiple: bool,
) -> Result<Decoded, Refusal> {
    match command {
        user::VFIO_USER_DMA_MAP => return dma_map(body, descriptors),
        user::VFIO_USER_DEVICE_SET_IRQS => return set_irqs(body, descriptors),
        _ => {}
    }
    let decoded = match command {
        user::VFIO_USER_DMA_UNMAP => dma_unmap(body),
        user::VFIO_USER_DEVICE_GET_INFO => get_info(body),
        user::VFIO_USER_DEVICE_GET_REGION_INFO => get_region_info(body),
        user::VFIO_USER_DEVICE_GET_REGION_IO_FDS => get_region_io_fds(body),
        user::VFIO_USER_DEVICE_GET_IRQ_INFO => get_irq_info(body),
        user::VFIO_USER_REGION_READ => region_read(body),
        user::VFIO_USER_REGION_WRITE => region_write(body),
        user::VFIO_USER_REGION_WRITE_MULTI if write_multiple => region_write_multi(body),
        user::VFIO_USER_DEVICE_RESET => device_reset(body),
        user::VFIO_USER_DEVICE_FEATURE => device_feature(body),
        other => Err(Refusal::Command(other)),
    }?;
    if !descriptors.slots.is_empty() || descriptors.lost {
        return Err(Refusal::Descriptors {
            actual: descriptors.slots.len(),
            expected: 0,
        });
    }
    Ok(decoded)
}

fn unbounded(command: Command) -> Decoded {
    Decoded {
        command,
        reply_bytes_max: u32::MAX,
    }
}

/// The body as exactly one fixed structure.
fn exact<T: FromBytes + KnownLayout + Immutable + Unaligned>(body: &[u8]) -> Result<T, Refusal> {
    T::read_from_bytes(body).map_err(|_| Refusal::BodyLength {
        actual: body.len(),
        needed: size_of::<T>(),
    })
}

/// The body as one fixed structure and what follows it.
fn head<T: FromBytes + KnownLayout + Immutable + Unaligned>(body: &[u8]) -> Result<(T, &[u8]), Refusal> {
    T::read_from_prefix(body).map_err(|_| Refusal::BodyLength {
        actual: body.len(),
        needed: size_of::<T>(),
    })
}

fn argsz_at_least(argsz: u32, needed: usize) -> Result<(), Refusal> {
    let needed = needed as u32;
    if argsz < needed {
        Err(Refusal::Argsz {
            actual: argsz,
            needed,
        })
    } else {
        Ok(())
    }
}

fn all_zero(fields: &[u64]) -> Result<(), Refusal> {
    if fields.iter().any(|field| *field != 0) {
        Err(Refusal::Reserved)
    } else {
        Ok(())
    }
}

fn dma_map(body: &[u8], descriptors: &mut Descriptors) -> Result<Decoded, Refusal> {
    let map: uapi::DmaMapBody = exact(body)?;
    argsz_at_least(map.argsz.get(), size_of::<uapi::DmaMapBody>())?;
    let flags = map.flags.get();
    let known = uapi::VFIO_DMA_MAP_FLAG_READ | uapi::VFIO_DMA_MAP_FLAG_WRITE;
    // A range that may be neither read nor written is no mapping; the kernel's VFIO refuses it too.
    if flags & !known != 0 || flags == 0 {
        return Err(Refusal::Flags(flags));
    }
    let (iova, bytes) = (map.iova.get(), map.size.get());
    let range = IovaRange::new(iova, bytes).ok_or(Refusal::DmaRange { iova, bytes })?;
    let file_offset = map.offset.get();
    let file_end = file_offset
        .checked_add(bytes)
        .filter(|end| *end <= i64::MAX as u64);
    if !descriptors.slots.is_empty() && file_end.is_none() {
        return Err(Refusal::FileOffset(file_offset));
    }
    if descriptors.slots.len() > 1 {
        return Err(Refusal::Descriptors {
            actual: descriptors.slots.len(),
            expected: 1,
        });
    }
    Ok(unbounded(Command::DmaMap(DmaMap {
        range,
        readable: flags & uapi::VFIO_DMA_MAP_FLAG_READ != 0,
        writable: flags & uapi::VFIO_DMA_MAP_FLAG_WRITE != 0,
        descriptor: descriptors.slots.pop(),
        file_offset,
        descriptor_lost: descriptors.lost,
    })))
}

fn dma_unmap(body: &[u8]) -> Result<Decoded, Refusal> {
    let unmap: uapi::DmaUnmapBody = exact(body)?;
    argsz_at_least(unmap.argsz.get(), size_of::<uapi::DmaUnmapBody>())?;
    let (iova, bytes) = (unmap.iova.get(), unmap.size.get());
    let unmap = match unmap.flags.get() {
        0 => DmaUnmap::Range(IovaRange::new(iova, bytes).ok_or(Refusal::DmaRange { iova, bytes })?),
        uapi::VFIO_DMA_UNMAP_FLAG_ALL => {
            all_zero(&[iova, bytes])?;
            DmaUnmap::All
        }
        other => return Err(Refusal::Flags(other)),
    };
    Ok(unbounded(Command::DmaUnmap(unmap)))
}

fn get_info(body: &[u8]) -> Result<Decoded, Refusal> {
    let info: uapi::DeviceInfoBody = exact(body)?;
    argsz_at_least(info.argsz.get(), size_of::<uapi::DeviceInfoBody>())?;
    all_zero(&[
        info.flags.get().into(),
        info.num_regions.get().into(),
        info.num_irqs.get().into(),
    ])?;
    Ok(Decoded {
        command: Command::DeviceGetInfo,
        reply_bytes_max: info.argsz.get(),
    })
}

fn get_region_info(body: &[u8]) -> Result<Decoded, Refusal> {
    let info: uapi::RegionInfoBody = exact(body)?;
    argsz_at_least(info.argsz.get(), size_of::<uapi::RegionInfoBody>())?;
    all_zero(&[
        info.flags.get().into(),
        info.cap_offset.get().into(),
        info.size.get(),
        info.offset.get(),
    ])?;
    let command = Command::DeviceGetRegionInfo {
        region: info.index.get(),
    };
    Ok(Decoded {
        command,
        reply_bytes_max: info.argsz.get(),
    })
}

fn get_region_io_fds(body: &[u8]) -> Result<Decoded, Refusal> {
    let query: uapi::RegionIoFdsBody = exact(body)?;
    argsz_at_least(query.argsz.get(), size_of::<uapi::RegionIoFdsBody>())?;
    all_zero(&[query.flags.get().into(), query.count.get().into()])?;
    let command = Command::DeviceGetRegionIoFds {
        region: query.index.get(),
    };
    Ok(Decoded {
        command,
        reply_bytes_max: query.argsz.get(),
    })
}

fn get_irq_info(body: &[u8]) -> Result<Decoded, Refusal> {
    let info: uapi::IrqInfoBody = exact(body)?;
    argsz_at_least(info.argsz.get(), size_of::<uapi::IrqInfoBody>())?;
    all_zero(&[info.flags.get().into(), info.count.get().into()])?;
    let command = Command::DeviceGetIrqInfo {
        index: info.index.get(),
    };
    Ok(Decoded {
        command,
        reply_bytes_max: info.argsz.get(),
    })
}

fn set_irqs(body: &[u8], descriptors: &mut Descriptors) -> Result<Decoded, Refusal> {
    let (set, rest): (uapi::IrqSetHead, &[u8]) = head(body)?;
    argsz_at_least(set.argsz.get(), size_of::<uapi::IrqSetHead>())?;
    // A message whose eventfds were lost would otherwise read as "take the eventfds away".
    if descriptors.lost {
        return Err(Refusal::DescriptorsLost);
    }
    let flags = set.flags.get();
    let action = match flags & !uapi::VFIO_IRQ_SET_DATA_TYPE_MASK {
        uapi::VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
        uapi::VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
        uapi::VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(Refusal::Flags(flags)),
    };
    let data = flags & uapi::VFIO_IRQ_SET_DATA_TYPE_MASK;
    let (start, count) = (set.start.get(), set.count.get());
    let disable_all = count == 0 && start == 0;
    if disable_all && data == uapi::VFIO_IRQ_SET_DATA_NONE && action == IrqAction::Trigger {
        no_more_bytes(body, rest)?;
        no_descriptors(descriptors)?;
        return Ok(irqs(set.index.get(), IrqOperation::DisableAll));
    }
    let in_range = start
        .checked_add(count)
        .is_some_and(|end| end <= limits::IRQ_COUNT_MAX);
    if count == 0 || !in_range {
        return Err(Refusal::IrqRange { start, count });
    }
    let operation = match data {
        uapi::VFIO_IRQ_SET_DATA_NONE => {
            no_more_bytes(body, rest)?;
            no_descriptors(descriptors)?;
            IrqOperation::Act { action, start, count }
        }
        uapi::VFIO_IRQ_SET_DATA_BOOL => {
            if rest.len() != count as usize {
                let needed = size_of::<uapi::IrqSetHead>() + count as usize;
                return Err(Refusal::BodyLength {
                    actual: body.len(),
                    needed,
                });
            }
            no_descriptors(descriptors)?;
            IrqOperation::ActWhere {
                action,
                start,
                selected: rest.iter().map(|byte| *byte != 0).collect(),
            }
        }
        uapi::VFIO_IRQ_SET_DATA_EVENTFD => {
            no_more_bytes(body, rest)?;
            if descriptors.slots.is_empty() {
                IrqOperation::Deassign { action, start, count }
            } else if descriptors.slots.len() == count as usize {
                IrqOperation::Assign {
                    action,
                    start,
                    eventfds: std::mem::take(&mut descriptors.slots),
                }
            } else {
                let actual = descriptors.slots.len();
                return Err(Refusal::Descriptors {
                    actual,
                    expected: count as usize,
                });
            }
        }
        _ => return Err(Refusal::Flags(flags)),
    };
    Ok(irqs(set.index.get(), operation))
}

fn irqs(index: u32, operation: IrqOperation) -> Decoded {
    unbounded(Command::DeviceSetIrqs(SetIrqs { index, operation }))
}

fn no_more_bytes(body: &[u8], rest: &[u8]) -> Result<(), Refusal> {
    if rest.is_empty() {
        return Ok(());
    }
    Err(Refusal::BodyLength {
        actual: body.len(),
        needed: body.len() - rest.len(),
    })
}

fn no_descriptors(descriptors: &Descriptors) -> Result<(), Refusal> {
    if descriptors.slots.is_empty() && !descriptors.lost {
        return Ok(());
    }
    Err(Refusal::Descriptors {
        actual: descriptors.slots.len(),
        expected: 0,
    })
}

fn access(head: &uapi::RegionAccessHead) -> Result<RegionAccess, Refusal> {
    let (offset, bytes) = (head.offset.get(), head.count.get());
    RegionAccess::new(head.region.get(), offset, bytes).ok_or(Refusal::Access { offset, bytes })
}

fn region_read(body: &[u8]) -> Result<Decoded, Refusal> {
    let read: uapi::RegionAccessHead = exact(body)?;
    Ok(unbounded(Command::RegionRead(access(&read)?)))
}

fn region_write(body: &[u8]) -> Result<Decoded, Refusal> {
    let (write, data): (uapi::RegionAccessHead, &[u8]) = head(body)?;
    let access = access(&write)?;
    if data.len() != access.bytes() as usize {
        let needed = size_of::<uapi::RegionAccessHead>() + access.bytes() as usize;
        return Err(Refusal::BodyLength {
            actual: body.len(),
            needed,
        });
    }
    Ok(unbounded(Command::RegionWrite(RegionWrite {
        access,
        data: data.to_vec(),
    })))
}

fn region_write_multi(body: &[u8]) -> Result<Decoded, Refusal> {
    let (count, entries): (zerocopy::little_endian::U64, &[u8]) = head(body)?;
    let count = count.get();
    if count == 0 || count > limits::MULTI_WRITES_MAX {
        return Err(Refusal::WriteCount(count));
    }
    let needed = count as usize * size_of::<uapi::MultiWrite>();
    if entries.len() != needed {
        return Err(Refusal::BodyLength {
            actual: body.len(),
            needed: needed + size_of::<u64>(),
        });
    }
    let mut writes = Vec::with_capacity(count as usize);
    for entry in entries.chunks_exact(size_of::<uapi::MultiWrite>()) {
        let entry: uapi::MultiWrite = exact(entry)?;
        let access = access(&entry.head)?;
        let data = entry.data.get(..access.bytes() as usize).ok_or(Refusal::Access {
            offset: access.offset(),
            bytes: access.bytes(),
        })?;
        writes.push(RegionWrite {
            access,
            data: data.to_vec(),
        });
    }
    Ok(unbounded(Command::RegionWriteMulti(writes)))
}

fn device_reset(body: &[u8]) -> Result<Decoded, Refusal> {
    no_more_bytes(body, body)?;
    Ok(unbounded(Command::DeviceReset))
}

fn device_feature(body: &[u8]) -> Result<Decoded, Refusal> {
    let (feature, data): (uapi::DeviceFeatureHead, &[u8]) = head(body)?;
    argsz_at_least(feature.argsz.get(), size_of::<uapi::DeviceFeatureHead>())?;
    let flags = feature.flags.get();
    let get = flags & uapi::VFIO_DEVICE_FEATURE_GET != 0;
    let set = flags & uapi::VFIO_DEVICE_FEATURE_SET != 0;
    let probe = flags & uapi::VFIO_DEVICE_FEATURE_PROBE != 0;
    let known = uapi::VFIO_DEVICE_FEATURE_MASK
        | uapi::VFIO_DEVICE_FEATURE_GET
        | uapi::VFIO_DEVICE_FEATURE_SET
        | uapi::VFIO_DEVICE_FEATURE_PROBE;
    if flags & !known != 0 {
        return Err(Refusal::Flags(flags));
    }
    let operation = match (probe, get, set) {
        (true, get, set) => FeatureOperation::Probe { get, set },
        (false, true, false) => FeatureOperation::Get,
        (false, false, true) => FeatureOperation::Set,
        _ => return Err(Refusal::Flags(flags)),
    };
    if data.len() > limits::DATA_BYTES_MAX as usize {
        return Err(Refusal::BodyLength {
            actual: body.len(),
            needed: limits::DATA_BYTES_MAX as usize,
        });
    }
    let feature_index = (flags & uapi::VFIO_DEVICE_FEATURE_MASK) as u16;
    let command = Command::DeviceFeature(DeviceFeature {
        feature: feature_index,
        operation,
        data: data.to_vec(),
        flags,
    });
    Ok(Decoded {
        command,
        reply_bytes_max: feature.argsz.get(),
    })
}
