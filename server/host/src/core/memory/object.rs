//! CORE, memory objects: what the VM's process lent us, and the extents of it that are mapped.
//!
//! In: descriptors by object number, and map records that name a range of one. Out: an extent that covers the range, at most with
//! the descriptor's rights, charged to the session. Knows no guest address.
//!
//! Extents are grown in windows, so that 25,000 maps of 4 KiB in one object share one mapping. None is taken down while
//! anybody holds it (they are counted references); its charge ends with it.

use super::limits::{EXTENTS_OBJECT, PAGE_BYTES, WINDOW_BYTES_MIN};
use rustix::fd::OwnedFd;
use rustix::fs::{OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fstat};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmgmt_device::page::{MapRecord, rights};
use vmgmt_mem::{GuestMapping, MapError};

/// A mapped range of an object.
#[derive(Debug)]
pub struct Extent {
    pub mapping: GuestMapping,
    /// Where it begins in the object, in bytes.
    offset: u64,
    /// Unit in which it can be replaced: the object's page size.
    page_bytes: usize,
    charged: Arc<AtomicU64>,
}

impl Extent {
    const fn end(&self) -> u64 {
        self.offset + self.mapping.bytes() as u64
    }

    /// `offset..offset + bytes` of this extent, widened to whole pages of the object (the extent's own end counts as one).
    pub fn whole_pages(&self, offset: usize, bytes: usize) -> (usize, usize) {
        let first = offset - offset % self.page_bytes;
        let end = offset
            .saturating_add(bytes)
            .next_multiple_of(self.page_bytes)
            .min(self.mapping.bytes());
        (first, end.saturating_sub(first))
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        self.charged
            .fetch_sub(self.mapping.bytes() as u64, Ordering::Relaxed);
    }
}

/// Whether what is mapped is the memory that the VM sees. Until it is proven, memory is reached by messages, which are always right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proof {
    Unproven,
    Shared,
    /// Other memory (QEMU with `share=off` sends a descriptor all the same).
    Private,
}

/// Why a range cannot be mapped; it is reached by messages then.
#[derive(Debug, thiserror::Error)]
pub enum Unmappable {
    #[error("mapping {bytes} more bytes would exceed the session's mapped_bytes_max of {max}")]
    OverBudget { bytes: u64, max: u64 },
    #[error(transparent)]
    Map(#[from] MapError),
}

#[derive(Debug)]
struct Object {
    fd: OwnedFd,
    rights: u64,
    proof: Proof,
    /// By offset; none lies within another, so both ends are in order.
    extents: BTreeMap<u64, Arc<Extent>>,
}

/// The objects of one session.
#[derive(Debug)]
pub struct Objects {
    objects: BTreeMap<u64, Object>,
    charged: Arc<AtomicU64>,
    mapped_bytes_max: u64,
    objects_max: usize,
}

impl Objects {
    pub fn new(mapped_bytes_max: u64, objects_max: usize) -> Self {
        Self {
            objects: BTreeMap::new(),
            charged: Arc::default(),
            mapped_bytes_max,
            objects_max,
        }
    }

    /// Takes an object over; false when there are too many (it is closed then, and its maps are reached by messages).
    pub fn insert(&mut self, object: u64, fd: OwnedFd, writable: bool) -> bool {
        if self.objects.len() >= self.objects_max && !self.objects.contains_key(&object) {
            return false;
        }
        let rights = rights::READ
            | if writable && can_write(&fd) {
                rights::WRITE
            } else {
                0
            };
        let object_state = Object {
            fd,
            rights,
            proof: Proof::Unproven,
            extents: BTreeMap::new(),
        };
        self.objects.insert(object, object_state);
        true
    }

    pub fn remove(&mut self, object: u64) {
        self.objects.remove(&object);
    }

    pub fn contains(&self, object: u64) -> bool {
        self.objects.contains_key(&object)
    }

    /// Rights that its descriptor gives; all for memory without one (the VM's process checks those itself).
    pub fn rights(&self, object: u64) -> u64 {
        self.objects
            .get(&object)
            .map_or(rights::READ | rights::WRITE, |object| object.rights)
    }

    pub fn proof(&self, object: u64) -> Proof {
        self.objects
            .get(&object)
            .map_or(Proof::Unproven, |object| object.proof)
    }

    pub fn set_proof(&mut self, object: u64, proof: Proof) {
        if let Some(object) = self.objects.get_mut(&object) {
            object.proof = proof;
        }
    }

    /// Bytes of address space that the session's extents take now.
    pub fn mapped_bytes(&self) -> u64 {
        self.charged.load(Ordering::Relaxed)
    }

    /// An extent that covers the range of `record`, and where the range begins in it. `None`: the object is not here.
    pub fn extent(&mut self, record: &MapRecord) -> Option<Result<(Arc<Extent>, usize), Unmappable>> {
        let object = self.objects.get_mut(&record.object)?;
        Some(object.extent(record.offset, record.bytes, &self.charged, self.mapped_bytes_max))
    }

    /// Lets go of an extent: maps get a fresh one from now on.
    pub fn retire(&mut self, extent: &Arc<Extent>) {
        for object in self.objects.values_mut() {
            object.extents.retain(|_, held| !Arc::ptr_eq(held, extent));
        }
    }
}

impl Object {
    fn extent(
        &mut self,
        offset: u64,
        bytes: u64,
        charged: &Arc<AtomicU64>,
        max: u64,
    ) -> Result<(Arc<Extent>, usize), Unmappable> {
        let end = offset.saturating_add(bytes);
        if let Some((start, extent)) = self.extents.range(..=offset).next_back()
            && end <= extent.end()
        {
            return Ok((extent.clone(), (offset - start) as usize));
        }
        let status = fstat(&self.fd).map_err(MapError::from)?;
        let object_bytes = u64::try_from(status.st_size).unwrap_or(0);
        if object_bytes < end {
            return Err(MapError::TooSmall {
                object_bytes,
                needed_bytes: end,
            }
            .into());
        }
        let page_bytes = page_bytes(status.st_blksize as u64);
        let window_bytes = (object_bytes / EXTENTS_OBJECT)
            .next_power_of_two()
            .max(WINDOW_BYTES_MIN)
            .max(page_bytes);
        let widened = |unit: u64| {
            let first = offset - offset % unit;
            (
                first,
                end.checked_next_multiple_of(unit)
                    .unwrap_or(object_bytes)
                    .min(object_bytes)
                    - first,
            )
        };
        let room = max.saturating_sub(charged.load(Ordering::Relaxed));
        let (first, extent_bytes) = [widened(window_bytes), widened(page_bytes)]
            .into_iter()
            .find(|(_, extent_bytes)| *extent_bytes <= room)
            .ok_or(Unmappable::OverBudget { bytes, max })?;
        let mapping = GuestMapping::map(
            &self.fd,
            first,
            extent_bytes as usize,
            self.rights & rights::WRITE != 0,
        )?;
        charged.fetch_add(extent_bytes, Ordering::Relaxed);
        let page_bytes = page_bytes as usize;
        let extent = Arc::new(Extent {
            mapping,
            offset: first,
            page_bytes,
            charged: charged.clone(),
        });
        let extent_end = extent.end();
        self.extents
            .retain(|start, held| *start < first || held.end() > extent_end);
        self.extents.insert(first, extent.clone());
        Ok((extent, (offset - first) as usize))
    }
}

/// The unit of offsets of an object: its block size where that is a power of two above a page (huge pages), else a page.
const fn page_bytes(block_bytes: u64) -> u64 {
    if block_bytes.is_power_of_two() && block_bytes > PAGE_BYTES {
        block_bytes
    } else {
        PAGE_BYTES
    }
}

/// Whether a shared writable mapping of it is allowed.
fn can_write(fd: &OwnedFd) -> bool {
    let open_for_both = fcntl_getfl(fd).is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDWR);
    // No seals at all (EINVAL) on what is not a memfd.
    let sealed =
        fcntl_get_seals(fd).is_ok_and(|seals| seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE));
    open_for_both && !sealed
}
