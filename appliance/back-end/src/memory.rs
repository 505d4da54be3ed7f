//! Memory of the driver VM: the table that the front-end announces, mapped.
//!
//! The session's [`MemoryTable`] changes; rings and requests work on a [`Memory`], a snapshot that never does. A region is
//! unmapped when the last snapshot that has it is gone; one that the next table has again stays mapped. Hence a request in flight keeps what it works on, and the session
//! can wait until nothing of a region is left before it tells the front-end so ([`Removed::wait`]).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

use rustix::fs::FileType;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion, Permissions, VolatileMemory, VolatileSlice,
};
use vvu_protocol::address::UserAddress;
use vvu_protocol::memory::{MemoryError, MemoryRegion, check_table};

use crate::view::Segment;

/// Most regions that are mapped at a time, and the answer to GET_MAX_MEM_SLOTS: as many as QEMU and the kernel's vhost have.
pub const MAX_MEMORY_SLOTS: usize = 509;

/// So many regions are looked at one after the other, which is faster than to search.
const FEW_REGIONS: usize = 4;

type Mapping = GuestRegionMmap<()>;

/// Why the front-end's memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The regions do not form a table.
    #[error(transparent)]
    Regions(#[from] MemoryError),
    /// The file ends before the region does.
    #[error("the file of the memory region at {guest_address} has {file_len:#x} bytes, the region ends at {end:#x}")]
    ShortFile {
        /// The region.
        guest_address: vvu_protocol::address::GuestAddress,
        /// Length of the file in bytes.
        file_len: u64,
        /// End of the region in the file.
        end: u64,
    },
    /// mmap(2) refuses.
    #[error("memory region at {guest_address} cannot be mapped")]
    Map {
        /// The region.
        guest_address: vvu_protocol::address::GuestAddress,
        /// Cause.
        source: io::Error,
    },
    /// The region to be removed is none of the table.
    #[error("there is no memory region of {size:#x} bytes at {guest_address}")]
    Unknown {
        /// Its guest address.
        guest_address: vvu_protocol::address::GuestAddress,
        /// Its length in bytes.
        size: u64,
    },
}

/// One region, mapped.
#[derive(Debug, Clone)]
struct Region {
    description: MemoryRegion,
    /// Device and inode of the file.
    file: (u64, u64),
    mapping: Arc<Mapping>,
    /// See [`Memory::lasting`].
    lasting: bool,
}

impl Region {
    /// Maps a region, unless `known` has it: what shows the same bytes at the same place is the same mapping.
    fn map(description: MemoryRegion, file: OwnedFd, known: &[Self]) -> Result<Self, TableError> {
        let MemoryRegion { guest_address, size, mmap_offset, .. } = description;
        let failed = |source| TableError::Map { guest_address, source };
        let stat = rustix::fs::fstat(&file).map_err(|errno| failed(errno.into()))?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if file_type == FileType::RegularFile {
            let (file_len, end) = (u64::try_from(stat.st_size).unwrap_or(0), description.file_end());
            if end > file_len {
                return Err(TableError::ShortFile { guest_address, file_len, end });
            }
        }
        let file_id = (stat.st_dev, stat.st_ino);
        if let Some(same) = known.iter().find(|region| region.description == description && region.file == file_id) {
            return Ok(same.clone());
        }
        let len = usize::try_from(size).map_err(|_too_large| failed(io::ErrorKind::OutOfMemory.into()))?;
        let mapping = MmapRegion::from_file(FileOffset::new(File::from(file), mmap_offset.0), len)
            .map_err(|error| failed(io::Error::other(error)))?;
        let mapping = Mapping::new(mapping, GuestAddress(guest_address.0))
            .ok_or(MemoryError::Overflow { guest_address, size })?;
        let lasting = file_type == FileType::CharacterDevice;
        Ok(Self { description, file: file_id, mapping: Arc::new(mapping), lasting })
    }
}

/// See the module's text. With `vm-memory`, it is a [`vm_memory::GuestMemory`] without an IOMMU.
///
/// Requests are made of many small accesses, and nearly each of them lies in one region. So its own methods do what those of
/// `vm-memory`'s traits do that have the same names, but try [`Memory::slice`] first: they are several times as fast.
#[derive(Debug)]
pub struct Memory {
    id: u64,
    guest: GuestMemoryMmap<()>,
    /// The same regions, to be found without a detour, in ascending guest addresses.
    spans: Vec<Span>,
    /// Ascending user addresses.
    by_user_address: Vec<MemoryRegion>,
    /// The last change took a region away; another one may follow that puts a larger one in its place.
    is_between_changes: bool,
    // The last field, so that the mappings are gone when it is dropped.
    _release: Release,
}

/// Guest addresses of a region.
#[derive(Debug)]
struct Span {
    start: u64,
    len: u64,
    mapping: Arc<Mapping>,
    lasting: bool,
}

impl Span {
    fn of(mapping: Arc<Mapping>, lasting: bool) -> Self {
        Self { start: mapping.start_addr().0, len: mapping.len(), mapping, lasting }
    }
}

/// A number for each snapshot of this process, from 1.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl GuestMemoryBackend for Memory {
    type R = Mapping;

    fn num_regions(&self) -> usize {
        self.guest.num_regions()
    }

    fn find_region(&self, address: GuestAddress) -> Option<&Mapping> {
        self.guest.find_region(address)
    }

    fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.guest.iter()
    }
}

impl Memory {
    /// Memory of this process alone, at these guest addresses: for tests of what works on memory.
    ///
    /// # Errors
    /// If the ranges overlap, do not ascend, or cannot be had.
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<Self, FromRangesError> {
        let mapping = |(start, len): &(GuestAddress, usize)| Mapping::from_range(*start, *len, None).map(Arc::new);
        let mappings = ranges.iter().map(mapping).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            id: next_id(),
            // Nobody else has it.
            spans: mappings.iter().cloned().map(|mapping| Span::of(mapping, true)).collect(),
            guest: GuestMemoryMmap::from_arc_regions(mappings)?,
            by_user_address: Vec::new(),
            is_between_changes: false,
            _release: Release(Arc::default()),
        })
    }

    fn new(regions: &[Region], is_between_changes: bool, releases: &Arc<Releases>) -> Self {
        let mut sorted = regions.to_vec();
        sorted.sort_by_key(|region| region.description.guest_address);
        let spans = sorted.iter().map(|region| Span::of(Arc::clone(&region.mapping), region.lasting)).collect();
        let mappings = sorted.into_iter().map(|region| region.mapping).collect();
        let mut by_user_address = regions.iter().map(|region| region.description).collect::<Vec<_>>();
        by_user_address.sort_by_key(|region| region.user_address);
        Self {
            id: next_id(),
            spans,
            // Fails for no regions only: order and overlap were checked.
            guest: GuestMemoryMmap::from_arc_regions(mappings).unwrap_or_default(),
            by_user_address,
            is_between_changes,
            _release: Release(Arc::clone(releases)),
        }
    }

    /// Tells this snapshot from all others of the process; never 0.
    #[inline]
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The regions whose pages stay what they are while they are mapped, so that the kernel may be told to keep them: those of
    /// a device, which is what an appliance's window is (device-DAX). A file in memory gives pages away while it is
    /// mapped, and gets others in their place: a VMM with a balloon does that.
    pub fn lasting(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.spans.iter().filter(|span| span.lasting).filter_map(|span| span.mapping.as_volatile_slice().ok())
    }

    /// A ring that does not lie in this memory may lie in that of the next change, which is to come soon.
    pub(crate) fn is_between_changes(&self) -> bool {
        self.is_between_changes
    }

    /// Appends the guest-physical pieces of a range of the front-end's addresses. False if it is not all in the table.
    pub(crate) fn resolve_user_address(&self, start: UserAddress, len: u32, pieces: &mut Vec<Segment>) -> bool {
        let (mut next, mut left) = (start.0, len);
        while left > 0 {
            let index = self.by_user_address.partition_point(|region| region.user_address.0 <= next);
            let Some(region) = index.checked_sub(1).and_then(|index| self.by_user_address.get(index)) else {
                return false;
            };
            // Not negative by the search, and no sum overflows in a checked region.
            let position = next - region.user_address.0;
            let Some(room) = region.size.checked_sub(position).filter(|room| *room > 0) else { return false };
            let take = u32::try_from(room).map_or(left, |room| room.min(left));
            pieces.push(Segment { address: GuestAddress(region.guest_address.0 + position), len: take });
            left -= take;
            let Some(further) = next.checked_add(u64::from(take)) else { return left == 0 };
            next = further;
        }
        true
    }

    /// First guest address behind all regions.
    pub(crate) fn guest_end(&self) -> u64 {
        self.by_user_address.iter().map(MemoryRegion::guest_end).max().unwrap_or(0)
    }
}

/// Access, each range checked once.
impl Memory {
    /// The bytes of a range that lies in one region. None if it does not.
    #[inline]
    #[must_use]
    pub fn slice(&self, address: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        let candidates = match self.spans.len() {
            ..=FEW_REGIONS => &*self.spans,
            // The last one that does not begin behind the address.
            _ => self.spans.get(self.spans.partition_point(|span| span.start <= address.0).checked_sub(1)?..)?,
        };
        let holds = |span: &&Span| address.0.wrapping_sub(span.start) < span.len;
        let span = candidates.iter().take(FEW_REGIONS).find(holds)?;
        let offset = usize::try_from(address.0.wrapping_sub(span.start)).ok()?;
        VolatileMemory::get_slice(&**span.mapping, offset, len).ok()
    }

    /// Whether all of a range is memory.
    #[must_use]
    pub fn check_range(&self, address: GuestAddress, len: usize) -> bool {
        self.slice(address, len).is_some() || GuestMemory::check_range(self, address, len, Permissions::ReadWrite)
    }

    /// Copies what begins at `address`, which may change meanwhile.
    ///
    /// # Errors
    /// If not all of it is memory.
    pub fn read_slice(&self, bytes: &mut [u8], address: GuestAddress) -> Result<(), GuestMemoryError> {
        match self.slice(address, bytes.len()) {
            Some(slice) => {
                slice.copy_to(bytes);
                Ok(())
            }
            None => Bytes::read_slice(self, bytes, address),
        }
    }

    /// Copies to what begins at `address`.
    ///
    /// # Errors
    /// If not all of it is memory.
    pub fn write_slice(&self, bytes: &[u8], address: GuestAddress) -> Result<(), GuestMemoryError> {
        match self.slice(address, bytes.len()) {
            Some(slice) => {
                slice.copy_from(bytes);
                Ok(())
            }
            None => Bytes::write_slice(self, bytes, address),
        }
    }

    /// Reads a number at once.
    ///
    /// # Errors
    /// If it is not aligned, or not all of it lies in one region.
    pub fn load<T: AtomicAccess>(&self, address: GuestAddress, order: Ordering) -> Result<T, GuestMemoryError> {
        match self.slice(address, size_of::<T>()) {
            Some(slice) => Ok(slice.load(0, order)?),
            None => Bytes::load(self, address, order),
        }
    }

    /// Writes a number at once.
    ///
    /// # Errors
    /// If it is not aligned, or not all of it lies in one region.
    pub fn store<T: AtomicAccess>(
        &self,
        value: T,
        address: GuestAddress,
        order: Ordering,
    ) -> Result<(), GuestMemoryError> {
        match self.slice(address, size_of::<T>()) {
            Some(slice) => Ok(slice.store(value, 0, order)?),
            None => Bytes::store(self, value, address, order),
        }
    }
}

/// The table as the front-end has made it.
#[derive(Debug)]
pub(crate) struct MemoryTable {
    regions: Vec<Region>,
    snapshot: Arc<Memory>,
    releases: Arc<Releases>,
}

impl MemoryTable {
    pub(crate) fn new() -> Self {
        let releases = Arc::new(Releases::default());
        Self { regions: Vec::new(), snapshot: Arc::new(Memory::new(&[], false, &releases)), releases }
    }

    pub(crate) fn snapshot(&self) -> &Arc<Memory> {
        &self.snapshot
    }

    /// SET_MEM_TABLE: puts a new table in place of this one.
    pub(crate) fn replace(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> Result<Removed, TableError> {
        let descriptions = table.iter().map(|(description, _)| *description).collect::<Vec<_>>();
        check_table(&descriptions, MAX_MEMORY_SLOTS)?;
        let map = |(description, file)| Region::map(description, file, &self.regions);
        let regions = table.into_iter().map(map).collect::<Result<_, _>>()?;
        Ok(self.change(regions, false))
    }

    /// ADD_MEM_REG.
    pub(crate) fn add(&mut self, description: MemoryRegion, file: OwnedFd) -> Result<Removed, TableError> {
        let mut descriptions = self.regions.iter().map(|region| region.description).collect::<Vec<_>>();
        descriptions.push(description);
        check_table(&descriptions, MAX_MEMORY_SLOTS)?;
        let mut regions = self.regions.clone();
        regions.push(Region::map(description, file, &[])?);
        Ok(self.change(regions, false))
    }

    /// REM_MEM_REG. The region is the one with these addresses and size; its place in its file does not count (vhost-user
    /// specification, `VHOST_USER_REM_MEM_REG`).
    pub(crate) fn remove(&mut self, gone: &MemoryRegion) -> Result<Removed, TableError> {
        let is_gone = |region: &Region| {
            let MemoryRegion { guest_address, size, user_address, .. } = region.description;
            (guest_address, size, user_address) == (gone.guest_address, gone.size, gone.user_address)
        };
        let regions = self.regions.iter().filter(|region| !is_gone(region)).cloned().collect::<Vec<_>>();
        if regions.len() == self.regions.len() {
            return Err(TableError::Unknown { guest_address: gone.guest_address, size: gone.size });
        }
        Ok(self.change(regions, true))
    }

    fn change(&mut self, regions: Vec<Region>, is_between_changes: bool) -> Removed {
        let former = std::mem::replace(&mut self.regions, regions);
        let gone = former
            .iter()
            .filter(|region| !self.regions.iter().any(|kept| Arc::ptr_eq(&kept.mapping, &region.mapping)))
            .map(|region| Arc::downgrade(&region.mapping))
            .collect();
        self.snapshot = Arc::new(Memory::new(&self.regions, is_between_changes, &self.releases));
        Removed { gone, releases: Arc::clone(&self.releases) }
    }
}

/// Regions that are no longer in the table.
#[must_use]
#[derive(Debug)]
pub(crate) struct Removed {
    gone: Vec<Weak<Mapping>>,
    releases: Arc<Releases>,
}

impl Removed {
    /// Waits until none of them is mapped any more. Whoever works on a snapshot has to let go of it without further help
    /// of this thread.
    pub(crate) fn wait(self) {
        let mut guard = self.releases.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.gone.iter().any(|region| region.strong_count() > 0) {
            guard = self.releases.released.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Tells that a snapshot is gone.
#[derive(Debug, Default)]
struct Releases {
    lock: Mutex<()>,
    released: Condvar,
}

#[derive(Debug)]
struct Release(Arc<Releases>);

impl Drop for Release {
    fn drop(&mut self) {
        let _guard = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More regions than are looked at one after the other, the first two of which adjoin, and less.
    const RANGES: [(GuestAddress, usize); 7] = [
        (GuestAddress(0x1000), 0x1000),
        (GuestAddress(0x2000), 0x2000),
        (GuestAddress(0x8000), 0x1000),
        (GuestAddress(0xa000), 0x3000),
        (GuestAddress(0x10000), 0x1000),
        (GuestAddress(0x20000), 0x1000),
        (GuestAddress(u64::MAX - 0x1fff), 0x1000),
    ];

    #[test]
    fn a_slice_is_what_the_general_way_finds_if_that_is_one_piece() {
        let edges = RANGES.iter().flat_map(|(start, len)| [start.0, start.0 + *len as u64]);
        let edges: Vec<_> = edges.chain([0, u64::MAX]).collect();
        for count in 1..=RANGES.len() {
            let memory = Memory::from_ranges(&RANGES[..count]).unwrap();
            let addresses = edges.iter().flat_map(|edge| (0..5).map(|near| edge.wrapping_add(near).wrapping_sub(2)));
            for address in addresses.map(GuestAddress) {
                for len in [1, 2, 3, 0xfff, 0x1000, 0x1001, 0x2000, usize::MAX] {
                    let general: Result<Vec<_>, _> = GuestMemoryBackend::get_slices(&memory, address, len).collect();
                    let expected = general.as_deref().ok().and_then(|pieces| match pieces {
                        [piece] => Some((piece.ptr_guard().as_ptr(), piece.len())),
                        _ => None,
                    });
                    let slice = memory.slice(address, len);
                    assert_eq!(slice.map(|slice| (slice.ptr_guard().as_ptr(), slice.len())), expected);
                    assert_eq!(memory.check_range(address, len), general.is_ok());
                }
            }
        }
    }

    #[test]
    fn what_spans_two_regions_is_copied_whole() {
        let memory = Memory::from_ranges(&RANGES).unwrap();
        memory.write_slice(&[1, 2, 3, 4], GuestAddress(0x1ffe)).unwrap();
        let mut bytes = [0; 4];
        memory.read_slice(&mut bytes, GuestAddress(0x1ffe)).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert!(memory.write_slice(&[0; 2], GuestAddress(0x3fff)).is_err());
        assert!(memory.load::<u16>(GuestAddress(0x3ffe), Ordering::Relaxed).is_ok());
        assert!(memory.load::<u32>(GuestAddress(0x3ffe), Ordering::Relaxed).is_err());
        assert!(memory.store(0u16, GuestAddress(0x3fff), Ordering::Relaxed).is_err());
    }
}
