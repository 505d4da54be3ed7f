//! Socket options that no library wraps.

#![expect(unsafe_code, reason = "UDP_SEGMENT and SO_INCOMING_NAPI_ID have no safe wrapper")]

use std::ffi::c_int;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Has the kernel cut each datagram that is sent into ones of `len` bytes, or leave that to the card (udp(7),
/// `UDP_SEGMENT`).
pub(crate) fn cut_into(socket: &UdpSocket, len: u16) -> io::Result<()> {
    let value = c_int::from(len);
    let size = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `size` bytes at the pointer, which is that of a value of that size.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const value).cast(), size)
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What stands for the card's receive queue through which the last datagram has come (`SO_INCOMING_NAPI_ID`).
pub(crate) fn receive_queue(socket: &UdpSocket) -> io::Result<u32> {
    let mut value: u32 = 0;
    let mut size = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `size` bytes at the pointer, which is that of a value of that size.
    let outcome = unsafe {
        let place = (&raw mut value).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_INCOMING_NAPI_ID, place, &raw mut size)
    };
    if outcome == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
