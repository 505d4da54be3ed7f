//! Memory that the control device reads and writes: pages at known guest-physical addresses that stay there.
//!
//! The device bypasses the appliance's IOMMU, so it takes guest-physical addresses. The pages are shared anonymous memory
//! (a fork of this process does not copy them), pinned by VFIO before their addresses are asked for. Every access is
//! volatile, since the device changes the pages at any time.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use vm_memory::bitmap::BS;
use vm_memory::mmap::MmapRegionError;
use vm_memory::volatile_memory::Error as VolatileError;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::vfio::{VfioDevice, VfioError};

/// Length of a page in bytes.
pub const PAGE_LEN: usize = 4096;

/// Layout of an entry of `/proc/self/pagemap` (Linux' documentation, admin-guide/mm/pagemap): bit 63 says that the page is
/// present, bits 0 to 54 are its frame number.
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_FRAME: u64 = (1 << 55) - 1;

/// Why there is no memory for the device.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// Memory could not be mapped.
    #[error("cannot map memory for the control device")]
    Map(#[from] MmapRegionError),
    /// Memory could not be pinned.
    #[error("cannot pin memory for the control device")]
    Pin(#[from] VfioError),
    /// The page map cannot be read.
    #[error("cannot read /proc/self/pagemap")]
    Pagemap(#[from] io::Error),
    /// A page has no address.
    #[error("page {page} of the control device's memory has no physical address")]
    NotPresent {
        /// Index of the page.
        page: usize,
    },
    /// An access beyond the pages.
    #[error("access beyond the control device's memory")]
    Bounds(#[from] VolatileError),
}

/// Pages that stay where they are.
#[derive(Debug)]
pub struct DmaPages {
    region: MmapRegion,
    addresses: Vec<u64>,
}

impl DmaPages {
    /// `count` pages, pinned for `device`.
    ///
    /// # Errors
    /// [`DmaError`].
    pub fn pinned(device: &VfioDevice, count: usize) -> Result<Rc<Self>, DmaError> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let region = MmapRegion::build(None, count * PAGE_LEN, libc::PROT_READ | libc::PROT_WRITE, flags)?;
        device.pin(&region)?;
        let addresses = physical_addresses(&region, count)?;
        Ok(Rc::new(Self { region, addresses }))
    }

    /// Pages of `region` that a device finds at these addresses, by what the caller has told it.
    #[must_use]
    pub fn with_addresses(region: MmapRegion, addresses: Vec<u64>) -> Rc<Self> {
        Rc::new(Self { region, addresses })
    }

    /// The pages, one by one.
    pub fn split(self: Rc<Self>) -> impl Iterator<Item = Page> {
        let addresses = self.addresses.clone();
        addresses.into_iter().enumerate().map(move |(index, address)| Page {
            pages: Rc::clone(&self),
            start: index * PAGE_LEN,
            address,
        })
    }
}

fn physical_addresses(region: &MmapRegion, count: usize) -> Result<Vec<u64>, DmaError> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let first_page = region.as_ptr() as usize / PAGE_LEN;
    let mut addresses = Vec::with_capacity(count);
    for page in 0..count {
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, (first_page + page) as u64 * 8)?;
        let entry = u64::from_ne_bytes(entry);
        let frame = entry & PAGEMAP_FRAME;
        // The frame number reads as 0 without CAP_SYS_ADMIN.
        if entry & PAGEMAP_PRESENT == 0 || frame == 0 {
            return Err(DmaError::NotPresent { page });
        }
        addresses.push(frame * PAGE_LEN as u64);
    }
    Ok(addresses)
}

/// One page.
#[derive(Debug, Clone)]
pub struct Page {
    pages: Rc<DmaPages>,
    start: usize,
    address: u64,
}

impl Page {
    /// Guest-physical address of its first byte.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Its bytes.
    ///
    /// # Errors
    /// [`DmaError::Bounds`]; does not happen, as pages are made within their region.
    pub fn bytes(&self) -> Result<VolatileSlice<'_, BS<'_, ()>>, DmaError> {
        Ok(self.pages.region.get_slice(self.start, PAGE_LEN)?)
    }
}
