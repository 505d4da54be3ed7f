//! The memory of the machine that there is not: one file for the queues of both devices.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};
use vvu_agent::control::CONTROL_PAGES;
use vvu_agent::dma::{DmaPages, PAGE_LEN};
use vvu_protocol::address::{GuestAddress, UserAddress};
use vvu_protocol::memory::MemoryRegion;

/// Guest-physical address of the memory.
const START: u64 = 0x1000_0000;

/// What is added to it for the address in the VMM: far, so that a missed translation fails.
const USER: u64 = 0x7e00_0000_0000;

/// Pages of the window device's queue, which is never used.
const WINDOW_PAGES: usize = 3;

const LEN: u64 = ((CONTROL_PAGES + WINDOW_PAGES) * PAGE_LEN) as u64;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No memory file can be made.
    #[error("memory file")]
    Io(#[from] io::Error),
    /// It cannot be mapped.
    #[error("memory file cannot be mapped")]
    Map(#[from] MmapRegionError),
}

/// Makes the memory: a file that cannot shrink, as QEMU's `memory-backend-memfd`.
///
/// # Errors
/// [`MemoryError::Io`].
pub fn create() -> Result<OwnedFd, MemoryError> {
    let file =
        memfd_create("loopback-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(io::Error::from)?;
    ftruncate(&file, LEN).map_err(io::Error::from)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(io::Error::from)?;
    Ok(file)
}

/// The memory as it stands in the memory table of a device.
#[must_use]
pub const fn region() -> MemoryRegion {
    MemoryRegion {
        guest_address: GuestAddress(START),
        size: LEN,
        user_address: UserAddress(USER + START),
        mmap_offset: vvu_protocol::address::FileOffset(0),
    }
}

/// Where the VMM sees what the guest sees at an address.
#[must_use]
pub const fn user_address(guest_address: u64) -> u64 {
    USER + guest_address
}

/// Pages for the queues of the control device.
///
/// # Errors
/// [`MemoryError`].
pub fn control_pages(file: &OwnedFd) -> Result<Rc<DmaPages>, MemoryError> {
    let place = FileOffset::new(File::from(file.try_clone()?), 0);
    let region = MmapRegion::from_file(place, CONTROL_PAGES * PAGE_LEN)?;
    let addresses = (START..).step_by(PAGE_LEN).take(CONTROL_PAGES).collect();
    Ok(DmaPages::with_addresses(region, addresses))
}

/// Guest-physical addresses of descriptor table, available ring and used ring of the window device's queue.
#[must_use]
pub fn window_queue() -> [u64; 3] {
    let page = |index: usize| START + ((CONTROL_PAGES + index) * PAGE_LEN) as u64;
    [page(0), page(1), page(2)]
}
