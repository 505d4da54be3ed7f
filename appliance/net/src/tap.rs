//! TAP interfaces: the network that the switch is connected to (kernel: Documentation/networking/tuntap.rst).

#![expect(unsafe_code, reason = "the ioctls of TAP interfaces are wrapped by no crate in use")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use crate::net_header;

/// Where TAP interfaces come from.
const DEVICE: &str = "/dev/net/tun";

/// An interface, ready for packets.
#[derive(Debug)]
pub(crate) struct Tap {
    /// Its queues. Each is read and written without waiting: a packet with its header at a time.
    pub(crate) lanes: Vec<OwnedFd>,
    /// The kernel takes UDP packets that are to be cut, and gives some.
    pub(crate) cuts_udp: bool,
}

impl Tap {
    /// Opens an interface that is there, with `lanes` queues. An interface without multiple queues has one.
    ///
    /// # Errors
    /// If there is no such interface, it is no TAP or used by others, or the system refuses.
    pub(crate) fn open(name: &str, lanes: u16) -> io::Result<Self> {
        let text = CString::new(name)?;
        // SAFETY: a string with an end; the kernel only reads it.
        if name.len() >= libc::IFNAMSIZ || unsafe { libc::if_nametoindex(text.as_ptr()) } == 0 {
            return Err(io::Error::new(io::ErrorKind::NotFound, "there is no such interface"));
        }
        let opened = (0..lanes.max(1)).map(|_| open_lane(name, libc::IFF_MULTI_QUEUE)).collect::<io::Result<Vec<_>>>();
        let lanes = match opened {
            // It was made without this flag.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => vec![open_lane(name, 0)?],
            opened => opened?,
        };
        let cuts_udp = lanes.iter().map(prepare).collect::<io::Result<Vec<_>>>()?.into_iter().all(|cuts| cuts);
        Ok(Self { lanes, cuts_udp })
    }
}

fn open_lane(name: &str, multi_queue: libc::c_int) -> io::Result<OwnedFd> {
    let lane = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi_queue;
    // SAFETY: all-zero is a valid ifreq: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
    // SAFETY: the descriptor is open, and the kernel reads and writes one ifreq.
    check(unsafe { libc::ioctl(lane.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(lane)
}

/// Headers as long as those of modern drivers, and every offload: what a receiver does not do is done by the switch. Whether
/// the kernel knows that of UDP, which came with Linux 6.2.
fn prepare(lane: &OwnedFd) -> io::Result<bool> {
    let len = libc::c_int::try_from(net_header::LEN).unwrap_or(12);
    // SAFETY: the descriptor is open, and the kernel reads one number.
    check(unsafe { libc::ioctl(lane.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })?;
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    let all = tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6;
    // SAFETY: the descriptor is open, and the argument is a number.
    if check(unsafe { libc::ioctl(lane.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(all)) }).is_ok() {
        return Ok(true);
    }
    // SAFETY: as above.
    check(unsafe { libc::ioctl(lane.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(tcp)) })?;
    Ok(false)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
