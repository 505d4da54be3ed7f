//! Whether the peer of a unix socket has read what was sent to it.

#![expect(unsafe_code, reason = "an ioctl writes memory by a pointer whose type only its number tells")]

use std::ffi::c_int;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Getter, Opcode, ioctl};

/// unix(7), "Ioctls"; the number is that of TIOCOUTQ.
const SIOCOUTQ: Opcode = 0x5411;

/// What of the data sent is still in the peer's queue, as the kernel counts it: with its own overhead.
pub(crate) fn unread(stream: impl AsFd) -> io::Result<usize> {
    // SAFETY: SIOCOUTQ writes one int, and reads nothing.
    let len = unsafe { ioctl(stream, Getter::<SIOCOUTQ, c_int>::new()) }?;
    Ok(usize::try_from(len).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn data_counts_until_it_is_read() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(unread(&ours).unwrap(), 0);
        ours.write_all(&[1; 8]).unwrap();
        ours.write_all(&[2; 8]).unwrap();
        let mut message = [0; 8];
        theirs.read_exact(&mut message).unwrap();
        assert_ne!(unread(&ours).unwrap(), 0, "one message was read, one was not");
        theirs.read_exact(&mut message).unwrap();
        assert_eq!(unread(&ours).unwrap(), 0);
    }
}
