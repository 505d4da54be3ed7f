//! The ioctls of VFIO, each as a function that cannot be called wrongly.
//!
//! Source: Linux' documentation "VFIO" (driver-api/vfio) and the comments in its header `linux/vfio.h`; structures and
//! constants come from the crate `vfio-bindings`. All opcodes are `_IO(';', 100 + n)`.

#![expect(unsafe_code, reason = "an ioctl reads and writes memory by a pointer whose type only its number tells")]

use std::ffi::{CStr, c_int, c_void};
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_IOEVENTFD_32, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_TYPE1v2_IOMMU, vfio_device_ioeventfd, vfio_group_status, vfio_iommu_type1_dma_map, vfio_irq_info,
    vfio_region_info,
};
use vm_memory::MmapRegion;

const SET_IOMMU: Opcode = vfio_opcode(2);
const GROUP_GET_STATUS: Opcode = vfio_opcode(3);
const GROUP_SET_CONTAINER: Opcode = vfio_opcode(4);
const GROUP_GET_DEVICE_FD: Opcode = vfio_opcode(6);
const DEVICE_GET_REGION_INFO: Opcode = vfio_opcode(8);
const DEVICE_GET_IRQ_INFO: Opcode = vfio_opcode(9);
const DEVICE_SET_IRQS: Opcode = vfio_opcode(10);
const IOMMU_MAP_DMA: Opcode = vfio_opcode(13);
const DEVICE_IOEVENTFD: Opcode = vfio_opcode(16);

/// What stands for "none, from now on" in the place of an eventfd.
const NO_EVENTFD: c_int = -1;

const fn vfio_opcode(number: u8) -> Opcode {
    opcode::none(b';', 100 + number)
}

/// A call whose return value counts.
struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the pointer goes to the kernel as it is and nothing is read through it here; the functions of this module see to
// it that it fits the opcode.
unsafe impl Ioctl for Call {
    type Output = c_int;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<c_int> {
        Ok(output)
    }
}

/// # Safety
/// The kernel may read and write a whole `T` for this opcode, or as much of it as its field `argsz` says, and no more.
unsafe fn call<T>(descriptor: BorrowedFd<'_>, opcode: Opcode, argument: &mut T) -> rustix::io::Result<c_int> {
    // SAFETY: the reference is valid for the whole call, and the caller vouches for the type.
    unsafe { ioctl(descriptor, Call { opcode, argument: std::ptr::from_mut(argument).cast() }) }
}

/// Length of a structure, as its field `argsz` says it.
const fn argsz<T>() -> u32 {
    let len = size_of::<T>();
    assert!(len < 4096, "structures of VFIO are small");
    #[expect(clippy::cast_possible_truncation, reason = "checked above, and `try_from` is not const")]
    let len = len as u32;
    len
}

/// Attaches a group to a container.
pub(super) fn group_set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let mut descriptor = container.as_raw_fd();
    // SAFETY: VFIO_GROUP_SET_CONTAINER reads one int.
    unsafe { call(group, GROUP_SET_CONTAINER, &mut descriptor) }.map(drop)
}

/// Whether all devices of the group are in the hands of VFIO, so that it can be used.
pub(super) fn group_is_viable(group: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    let mut status = vfio_group_status { argsz: argsz::<vfio_group_status>(), ..Default::default() };
    // SAFETY: VFIO_GROUP_GET_STATUS takes this structure.
    unsafe { call(group, GROUP_GET_STATUS, &mut status) }?;
    Ok(status.flags & VFIO_GROUP_FLAGS_VIABLE != 0)
}

/// Chooses the type 1 IOMMU for a container that has a group.
pub(super) fn set_iommu_type1(container: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let argument = std::ptr::without_provenance_mut(VFIO_TYPE1v2_IOMMU as usize);
    // SAFETY: VFIO_SET_IOMMU takes a number in place of a pointer.
    unsafe { ioctl(container, Call { opcode: SET_IOMMU, argument }) }.map(drop)
}

/// The file of a device (by its PCI address in text form) of a group.
pub(super) fn group_device(group: BorrowedFd<'_>, address: &CStr) -> rustix::io::Result<OwnedFd> {
    let argument = address.as_ptr().cast_mut().cast();
    // SAFETY: VFIO_GROUP_GET_DEVICE_FD reads a string up to its NUL, and writes nothing.
    let descriptor = unsafe { ioctl(group, Call { opcode: GROUP_GET_DEVICE_FD, argument }) }?;
    if descriptor < 0 {
        return Err(Errno::NODEV);
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Where a region lies in the device's file: offset and length in bytes; the length is 0 if the device does not have it.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> rustix::io::Result<(u64, u64)> {
    let mut info = vfio_region_info { argsz: argsz::<vfio_region_info>(), index, ..Default::default() };
    // SAFETY: VFIO_DEVICE_GET_REGION_INFO takes this structure, and writes no more than `argsz` bytes.
    unsafe { call(device, DEVICE_GET_REGION_INFO, &mut info) }?;
    Ok((info.offset, info.size))
}

/// MSI-X vectors of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsixInfo {
    /// How many the device has.
    pub(super) count: u32,
    /// Whether the kernel can add vectors to those that MSI-X was switched on with.
    can_grow: bool,
}

impl MsixInfo {
    fn new(info: &vfio_irq_info) -> Self {
        Self { count: info.count, can_grow: info.flags & VFIO_IRQ_INFO_NORESIZE == 0 }
    }

    /// The last vector that is set aside when MSI-X is switched on; `None` if there is no vector. A kernel that can add vectors
    /// later (Linux 6.5, for devices of the usual interrupt domains) sets one aside for now; any other one needs to set all
    /// aside at once.
    pub(super) fn last_at_first(self) -> Option<u32> {
        let last = self.count.checked_sub(1)?;
        Some(if self.can_grow { 0 } else { last })
    }
}

/// What the device has of MSI-X vectors.
pub(super) fn msix_info(device: BorrowedFd<'_>) -> rustix::io::Result<MsixInfo> {
    let index = VFIO_PCI_MSIX_IRQ_INDEX;
    let mut info = vfio_irq_info { argsz: argsz::<vfio_irq_info>(), index, ..Default::default() };
    // SAFETY: VFIO_DEVICE_GET_IRQ_INFO takes this structure.
    unsafe { call(device, DEVICE_GET_IRQ_INFO, &mut info) }?;
    Ok(MsixInfo::new(&info))
}

/// `struct vfio_irq_set` followed by its data: one eventfd.
#[repr(C)]
struct IrqEventfd {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfd: c_int,
}

/// An MSI-X vector signals this eventfd from now on, or none. The kernel holds the eventfd by itself. The first call switches
/// MSI-X on, for all vectors up to this one; if it cannot have as many, the kernel answers how many it can have.
pub(super) fn set_msix_eventfd(
    device: BorrowedFd<'_>,
    vector: u32,
    eventfd: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<()> {
    let mut set = IrqEventfd {
        argsz: argsz::<IrqEventfd>(),
        flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index: VFIO_PCI_MSIX_IRQ_INDEX,
        start: vector,
        count: 1,
        eventfd: eventfd.map_or(NO_EVENTFD, |eventfd| eventfd.as_raw_fd()),
    };
    // SAFETY: VFIO_DEVICE_SET_IRQS reads `argsz` bytes: the header and `count` ints, which are the structure.
    let fewer = unsafe { call(device, DEVICE_SET_IRQS, &mut set) }?;
    if fewer == 0 { Ok(()) } else { Err(Errno::NOSPC) }
}

/// Makes a memory region known to the container's IOMMU at address `iova`, and so pins its pages until the container is
/// closed.
///
/// The region must be shared memory that is looked at by volatile or atomic accesses only, because a device writes to it;
/// `MmapRegion` offers no others.
pub(super) fn map_dma(container: BorrowedFd<'_>, iova: u64, memory: &MmapRegion) -> rustix::io::Result<()> {
    let mut map = vfio_iommu_type1_dma_map {
        argsz: argsz::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: memory.as_ptr() as u64,
        iova,
        size: memory.size() as u64,
    };
    // SAFETY: VFIO_IOMMU_MAP_DMA takes this structure. The kernel writes nothing to the pages itself; it lets devices of the
    // container do so, and Rust never has a reference into an `MmapRegion`.
    unsafe { call(container, IOMMU_MAP_DMA, &mut map) }.map(drop)
}

/// From now on each signal of `eventfd` makes the kernel write the 32-bit `data` at `offset` of the device's file; without one,
/// what was set for the same write before does so no longer. The kernel holds the eventfd by itself.
pub(super) fn write_on_event(
    device: BorrowedFd<'_>,
    offset: u64,
    data: u32,
    eventfd: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<()> {
    let mut link = vfio_device_ioeventfd {
        argsz: argsz::<vfio_device_ioeventfd>(),
        flags: VFIO_DEVICE_IOEVENTFD_32,
        offset,
        data: u64::from(data),
        fd: eventfd.map_or(NO_EVENTFD, |eventfd| eventfd.as_raw_fd()),
        reserved: 0,
    };
    // SAFETY: VFIO_DEVICE_IOEVENTFD takes this structure.
    unsafe { call(device, DEVICE_IOEVENTFD, &mut link) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's side of MSI-X, as VFIO_DEVICE_SET_IRQS knows it.
    struct Kernel {
        info: vfio_irq_info,
        set_aside: Option<u32>,
    }

    impl Kernel {
        fn set(&mut self, vector: u32) -> Result<(), Errno> {
            let grows = self.info.flags & VFIO_IRQ_INFO_NORESIZE == 0;
            match self.set_aside {
                None => self.set_aside = Some(vector + 1),
                Some(count) if vector < count || grows => {}
                Some(_) => return Err(Errno::INVAL),
            }
            if vector < self.info.count { Ok(()) } else { Err(Errno::INVAL) }
        }
    }

    #[test]
    fn every_vector_can_be_switched_on_whether_the_kernel_adds_some_or_not() {
        for (flags, at_first) in [(0, 1), (VFIO_IRQ_INFO_NORESIZE, 259)] {
            let info = vfio_irq_info { count: 259, flags, ..Default::default() };
            let mut kernel = Kernel { info, set_aside: None };
            kernel.set(MsixInfo::new(&info).last_at_first().unwrap()).unwrap();
            assert_eq!(kernel.set_aside, Some(at_first));
            assert!([258, 0, 7].iter().all(|vector| kernel.set(*vector).is_ok()));
        }
        assert_eq!(MsixInfo::new(&vfio_irq_info::default()).last_at_first(), None);
    }
}
