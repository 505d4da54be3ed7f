//! The kernel's word that a block device has changed its size.
//!
//! The block layer sends a uevent with `RESIZE=1` then (kernel: block/genhd.c, `set_capacity_and_notify`), for a virtio or
//! NVMe disk as for a loop device. Any user may listen. What comes is only a hint to look at the device again: nothing of
//! it is believed, so a forged or repeated one does no harm, and one that was lost for lack of room counts as a hint, too.
//!
//! Regular files have no such events; for them there is SIGHUP.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// The multicast group of the kernel's own events; the other one is udev's.
const KERNEL_GROUP: u32 = 1;

/// Room for one event: a header with a path, and at most 2 KiB of variables (kernel: `UEVENT_BUFFER_SIZE`).
const EVENT_LEN: usize = 8192;

/// Most events that are taken at a time, so that a burst of them cannot hold up the thread.
const EVENTS_AT_A_TIME: usize = 64;

/// The events of one device. Readable when there are some.
#[derive(Debug)]
pub(crate) struct SizeEvents {
    socket: OwnedFd,
    device: DeviceNumber,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DeviceNumber {
    major: u32,
    minor: u32,
}

impl SizeEvents {
    /// For the block device that `file` is.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let number = rustix::fs::fstat(file)?.st_rdev;
        let device = DeviceNumber { major: rustix::fs::major(number), minor: rustix::fs::minor(number) };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        // Number 0: the kernel chooses one for the socket.
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self { socket, device })
    }

    /// Takes what has come. True if the device may have changed its size.
    pub(crate) fn take(&self) -> bool {
        let mut resized = false;
        let mut event = [0; EVENT_LEN];
        for _ in 0..EVENTS_AT_A_TIME {
            match recv(&self.socket, &mut event, RecvFlags::empty()) {
                Ok((len, _)) => resized |= event.get(..len).is_some_and(|event| tells_resize(event, self.device)),
                Err(Errno::INTR) => {}
                // Events were lost.
                Err(Errno::NOBUFS) => resized = true,
                Err(_) => break,
            }
        }
        resized
    }
}

impl AsFd for SizeEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// An event is a header and then variables, `NAME=value`, each ended by a zero byte.
fn tells_resize(event: &[u8], device: DeviceNumber) -> bool {
    let value = |name: &str| {
        let mut variables = event.split(|byte| *byte == 0).filter_map(|variable| str::from_utf8(variable).ok());
        variables.find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
    };
    let number = |name| value(name).and_then(|text| text.parse().ok());
    value("RESIZE") == Some("1")
        && value("SUBSYSTEM") == Some("block")
        && number("MAJOR") == Some(device.major)
        && number("MINOR") == Some(device.minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: &str = "change@/devices/virtual/block/loop0\0ACTION=change\0DEVPATH=/devices/virtual/block/loop0\0\
                         SUBSYSTEM=block\0RESIZE=1\0MAJOR=7\0MINOR=16\0DEVNAME=loop0\0DEVTYPE=disk\0SEQNUM=884\0";

    #[test]
    fn only_a_resize_of_the_device_counts() {
        let device = DeviceNumber { major: 7, minor: 16 };
        let tells = |event: &str| tells_resize(event.as_bytes(), device);
        assert!(tells(EVENT));
        assert!(!tells_resize(EVENT.as_bytes(), DeviceNumber { minor: 1, ..device }));
        assert!(!tells_resize(EVENT.as_bytes(), DeviceNumber { major: 8, ..device }));
        for (this, that) in [
            ("RESIZE=1\0", ""),
            ("RESIZE=1", "RESIZE=0"),
            ("SUBSYSTEM=block", "SUBSYSTEM=net"),
            ("MAJOR=7", "MAJOR=x"),
            ("RESIZE=1", "NO_RESIZE=1"),
        ] {
            assert!(!tells(&EVENT.replace(this, that)), "{that}");
        }
        assert!(!tells("") && !tells("\0\0\0") && !tells_resize(&[0xff; 100], device));
    }
}
