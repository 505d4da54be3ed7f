//! The ioctls of network interfaces, each as a function that cannot be called wrongly.
//!
//! Source: netdevice(7), and Linux' headers `linux/if.h`, `linux/sockios.h`, `linux/if_tun.h`. They do what is needed here in
//! one call each, where netlink would need a message format.

#![expect(unsafe_code, reason = "an ioctl reads and writes memory by a pointer whose type only its number tells")]

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Longest name with the NUL that ends it (`IFNAMSIZ`).
const NAME_LEN: usize = 16;

const GET_FLAGS: Opcode = 0x8913;
const SET_FLAGS: Opcode = 0x8914;
const SET_MTU: Opcode = 0x8922;
const ADD_BRIDGE: Opcode = 0x89a0;
const ADD_TO_BRIDGE: Opcode = 0x89a2;

/// `_IOW('T', n, int)`, whatever the type of the argument really is.
const TUN_SET_INTERFACE: Opcode = tun_opcode(202);
const TUN_SET_PERSISTENT: Opcode = tun_opcode(203);
const TUN_SET_OWNER: Opcode = tun_opcode(204);

const fn tun_opcode(number: u8) -> Opcode {
    rustix::ioctl::opcode::write::<c_int>(b'T', number)
}

const INTERFACE_UP: c_int = libc::IFF_UP;
const TAP_FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

/// `struct ifreq` with the members of its union that are used here: numbers at its beginning. Flags are the lower half.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy)]
struct Request {
    name: [u8; NAME_LEN],
    number: c_int,
    rest: [u8; 20],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>(), "the kernel copies as much");

impl Request {
    fn new(interface: &str, number: c_int) -> io::Result<Self> {
        Ok(Self { name: name(interface)?, number, rest: [0; 20] })
    }
}

fn name(interface: &str) -> io::Result<[u8; NAME_LEN]> {
    let mut name = [0; NAME_LEN];
    let place = name.get_mut(..interface.len()).filter(|place| place.len() < NAME_LEN).ok_or(Errno::NAMETOOLONG)?;
    place.copy_from_slice(interface.as_bytes());
    Ok(name)
}

/// Changes network interfaces by name.
#[derive(Debug)]
pub(super) struct Interfaces {
    socket: OwnedFd,
}

impl Interfaces {
    /// Those of this process's network namespace.
    pub(super) fn new() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket })
    }

    pub(super) fn set_mtu(&self, interface: &str, mtu: u16) -> io::Result<()> {
        let request = Request::new(interface, mtu.into())?;
        // SAFETY: SIOCSIFMTU reads a `struct ifreq`.
        Ok(unsafe { ioctl(&self.socket, Setter::<SET_MTU, _>::new(request)) }?)
    }

    pub(super) fn set_up(&self, interface: &str) -> io::Result<()> {
        let mut request = Request::new(interface, 0)?;
        // SAFETY: SIOCGIFFLAGS reads a `struct ifreq` and writes it again.
        unsafe { ioctl(&self.socket, Updater::<GET_FLAGS, _>::new(&mut request)) }?;
        let request = Request::new(interface, request.number & 0xffff | INTERFACE_UP)?;
        // SAFETY: SIOCSIFFLAGS reads a `struct ifreq`.
        Ok(unsafe { ioctl(&self.socket, Setter::<SET_FLAGS, _>::new(request)) }?)
    }

    /// Makes a bridge, which speaks no spanning tree protocol if nobody tells it to.
    pub(super) fn add_bridge(&self, bridge: &str) -> io::Result<()> {
        let name = name(bridge)?;
        // SAFETY: SIOCBRADDBR reads a name of `IFNAMSIZ` bytes.
        Ok(unsafe { ioctl(&self.socket, Setter::<ADD_BRIDGE, _>::new(name)) }?)
    }

    pub(super) fn add_to_bridge(&self, bridge: &str, interface: &str) -> io::Result<()> {
        let index = name_to_index(&self.socket, interface)?;
        let request = Request::new(bridge, index.try_into().map_err(|_| Errno::OVERFLOW)?)?;
        // SAFETY: SIOCBRADDIF reads a `struct ifreq`.
        Ok(unsafe { ioctl(&self.socket, Setter::<ADD_TO_BRIDGE, _>::new(request)) }?)
    }
}

/// A TAP in the making.
#[derive(Debug)]
pub(super) struct Tap {
    device: File,
}

impl Tap {
    pub(super) fn open(device: &Path) -> io::Result<Self> {
        Ok(Self { device: File::options().read(true).write(true).open(device)? })
    }

    /// Makes the TAP, with virtio-net headers and room for several queues, to be opened by this user; it outlives this value.
    pub(super) fn make_persistent(self, interface: &str, owner: u32) -> io::Result<()> {
        let device = self.device.as_fd();
        let request = Request::new(interface, TAP_FLAGS)?;
        // SAFETY: TUNSETIFF reads a `struct ifreq` and writes its name and flags again; the setter's copy is writable.
        unsafe { ioctl(device, Setter::<TUN_SET_INTERFACE, _>::new(request)) }?;
        // SAFETY: TUNSETOWNER takes a number.
        unsafe { ioctl(device, IntegerSetter::<TUN_SET_OWNER>::new_usize(owner as usize)) }?;
        // SAFETY: TUNSETPERSIST takes a number.
        Ok(unsafe { ioctl(device, IntegerSetter::<TUN_SET_PERSISTENT>::new_usize(1)) }?)
    }
}
