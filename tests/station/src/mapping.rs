//! Memory that a device sees: its registers, and a page of this machine's memory that does not move.

#![expect(unsafe_code, reason = "maps registers and memory that a device reads and writes at the same time")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

/// Length of a huge page of x86 in bytes.
const HUGE_PAGE_LEN: usize = 2 << 20;

/// How many huge pages this machine keeps.
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// A mapping, which lasts as long as the process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapping {
    start: *mut u8,
    len: usize,
}

/// A number that registers hold.
pub(crate) trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

impl Mapping {
    /// All of a device's memory region (a `resourceN` of sysfs).
    pub(crate) fn of_file(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        let len = usize::try_from(file.metadata()?.len())?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start =
            unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0) };
        Ok(Self { start: start.with_context(|| format!("cannot map {}", path.display()))?.cast(), len })
    }

    /// A huge page and its physical address. The kernel keeps it for such pages when this process ends, so that what a
    /// device still writes there hits nobody.
    pub(crate) fn of_huge_page() -> Result<(Self, u64)> {
        fs::write(HUGE_PAGES, "1").context("no huge page")?;
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::POPULATE;
        // SAFETY: as above.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), HUGE_PAGE_LEN, ProtFlags::READ | ProtFlags::WRITE, flags) };
        let mapping = Self { start: start.context("cannot map a huge page")?.cast(), len: HUGE_PAGE_LEN };
        mapping.write(0, 0_u8)?;
        let address = physical_address(mapping.start.addr())?;
        Ok((mapping, address))
    }

    /// Reads a number.
    pub(crate) fn read<T: Word>(&self, offset: usize) -> Result<T> {
        let place = self.place::<T>(offset)?;
        // SAFETY: the place is inside of the mapping and aligned; every pattern of bits is such a number.
        Ok(unsafe { place.read_volatile() })
    }

    /// Writes a number.
    pub(crate) fn write<T: Word>(&self, offset: usize, value: T) -> Result<()> {
        let place = self.place::<T>(offset)?;
        // SAFETY: as above; no reference into the mapping exists.
        unsafe { place.write_volatile(value) };
        Ok(())
    }

    /// Writes bytes one after the other.
    pub(crate) fn write_bytes(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        (offset..).zip(bytes).try_for_each(|(offset, byte)| self.write(offset, *byte))
    }

    fn place<T>(&self, offset: usize) -> Result<*mut T> {
        let end = offset.checked_add(size_of::<T>());
        ensure!(end.is_some_and(|end| end <= self.len), "{offset} is outside of {} bytes", self.len);
        ensure!(offset.is_multiple_of(align_of::<T>()), "{offset} is not aligned");
        Ok(self.start.wrapping_add(offset).cast())
    }
}

/// Looks a virtual address up in this process's page map (the kernel's document pagemap.rst).
fn physical_address(address: usize) -> Result<u64> {
    const PAGE_LEN: u64 = 4096;
    let mut entry = [0; 8];
    let page = u64::try_from(address)? / PAGE_LEN;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8).context("cannot read the page map")?;
    let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
    ensure!(frame != 0, "the page map tells no addresses");
    Ok(frame * PAGE_LEN)
}
