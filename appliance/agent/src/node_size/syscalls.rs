//! The system calls of seccomp's notifications, each as a function that cannot be called wrongly.
//!
//! Source: seccomp(2) and seccomp_unotify(2); structures and constants come from the crate `libc`.

#![expect(unsafe_code, reason = "a filter and its notifications are structures behind plain pointers")]

use std::io;
use std::mem::{MaybeUninit, offset_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_FILTER_FLAG_NEW_LISTENER,
    SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND, SECCOMP_RET_ALLOW,
    SECCOMP_RET_USER_NOTIF, SECCOMP_SET_MODE_FILTER, SECCOMP_USER_NOTIF_FLAG_CONTINUE, SEEK_END, SYS_lseek,
    seccomp_data, seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog,
};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::thread::set_no_new_privs;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `AUDIT_ARCH_X86_64` of the kernel's header `linux/audit.h`: processor, 64 bits, little-endian.
const ARCHITECTURE: u32 = 0xc000_003e;

/// A question: where is the end of a file?
#[derive(Debug, Clone, Copy)]
pub(super) struct Seek {
    /// Its number.
    pub(super) id: u64,
    /// Thread that asks.
    pub(super) task: u32,
    /// Its descriptor of the file.
    pub(super) descriptor: i32,
    /// Bytes from the end.
    pub(super) offset: i64,
}

/// What the program hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// What the kernel says by itself.
    AskTheKernel,
    /// This position.
    Position(i64),
    /// EINVAL.
    Invalid,
}

/// Asks for every `lseek` relative to the end, and lets all else pass.
const fn filter() -> [sock_filter; 8] {
    const LOAD: u16 = narrow(BPF_LD | BPF_W | BPF_ABS);
    const COMPARE: u16 = narrow(BPF_JMP | BPF_JEQ | BPF_K);
    const RETURN: u16 = narrow(BPF_RET | BPF_K);
    // The third argument is an int: its lower half counts.
    const WHENCE: usize = offset_of!(seccomp_data, args) + 2 * size_of::<u64>();
    const fn load(offset: usize) -> sock_filter {
        sock_filter { code: LOAD, jt: 0, jf: 0, k: narrow_to_u32(offset as u64) }
    }
    const fn unless_equal_skip(value: u32, instructions: u8) -> sock_filter {
        sock_filter { code: COMPARE, jt: 0, jf: instructions, k: value }
    }
    [
        load(offset_of!(seccomp_data, arch)),
        unless_equal_skip(ARCHITECTURE, 5),
        load(offset_of!(seccomp_data, nr)),
        unless_equal_skip(narrow_to_u32(SYS_lseek.unsigned_abs()), 3),
        load(WHENCE),
        unless_equal_skip(SEEK_END.unsigned_abs(), 1),
        sock_filter { code: RETURN, jt: 0, jf: 0, k: SECCOMP_RET_USER_NOTIF },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: SECCOMP_RET_ALLOW },
    ]
}

#[expect(clippy::cast_possible_truncation, reason = "checked, and `try_from` is not const")]
const fn narrow(value: u32) -> u16 {
    assert!(value <= u16::MAX as u32, "codes of BPF have 16 bits");
    value as u16
}

#[expect(clippy::cast_possible_truncation, reason = "checked, and `try_from` is not const")]
const fn narrow_to_u32(value: u64) -> u32 {
    assert!(value <= u32::MAX as u64, "constants of BPF have 32 bits");
    value as u32
}

/// Has the program that `command` starts put on the filter, and send the descriptor of its questions to `report`.
pub(super) fn filter_at_start(command: &mut Command, report: OwnedFd) {
    let put_on = move || {
        let questions = put_filter_on()?;
        send_descriptor(report.as_fd(), questions.as_fd())
    };
    // SAFETY: between fork and exec, `put_on` makes system calls only: it does not allocate, takes no lock, and what it
    // borrows is its own.
    unsafe { command.pre_exec(put_on) };
}

fn put_filter_on() -> io::Result<OwnedFd> {
    set_no_new_privs(true)?;
    let mut filter = filter();
    let len = narrow(narrow_to_u32(filter.len() as u64).min(u32::from(u16::MAX)));
    let program = sock_fprog { len, filter: filter.as_mut_ptr() };
    let flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the kernel reads `program` and the instructions that it points to, all alive during the call, and copies them.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&program)) };
    let Ok(descriptor @ 0..) = i32::try_from(descriptor) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn send_descriptor(to: BorrowedFd<'_>, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    beside.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(to, &[io::IoSlice::new(&[0])], &mut beside, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The descriptor that was sent; `None` if the other end is closed.
pub(super) fn receive_descriptor(from: impl AsFd) -> Result<Option<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(from, &mut [io::IoSliceMut::new(&mut byte)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = beside.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok(descriptors.flatten().next())
}

/// Has the runtime look at the descriptor of questions.
pub(super) fn watch(questions: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor until it is dropped.
    let registered = unsafe { AsyncFd::register_with_interest(questions, Interest::READABLE) };
    registered.map_err(|error| error.into_parts().1)
}

/// Takes a question; waits if there is none. NOENT: who has asked is gone.
pub(super) fn take_question(questions: &OwnedFd) -> Result<Seek, Errno> {
    // SAFETY: the structure consists of numbers; the kernel wants it to be zero.
    let mut question: seccomp_notif = unsafe { zeroed() };
    // SAFETY: SECCOMP_IOCTL_NOTIF_RECV writes this structure, which is alive during the call.
    let result =
        unsafe { libc::ioctl(questions.as_raw_fd(), SECCOMP_IOCTL_NOTIF_RECV, std::ptr::from_mut(&mut question)) };
    check(result)?;
    let [descriptor, offset, ..] = question.data.args;
    #[expect(clippy::cast_possible_truncation, reason = "the kernel takes the lower half of this argument, too")]
    let descriptor = descriptor as i32;
    Ok(Seek { id: question.id, task: question.pid, descriptor, offset: offset.cast_signed() })
}

/// Answers a question. NOENT: who has asked is gone.
pub(super) fn answer(questions: &OwnedFd, id: u64, answer: Answer) -> Result<(), Errno> {
    let nothing = seccomp_notif_resp { id, val: 0, error: 0, flags: 0 };
    let mut response = match answer {
        Answer::AskTheKernel => {
            seccomp_notif_resp { flags: narrow_to_u32(SECCOMP_USER_NOTIF_FLAG_CONTINUE), ..nothing }
        }
        Answer::Position(position) => seccomp_notif_resp { val: position, ..nothing },
        Answer::Invalid => seccomp_notif_resp { error: -libc::EINVAL, ..nothing },
    };
    // SAFETY: SECCOMP_IOCTL_NOTIF_SEND reads this structure, which is alive during the call.
    let result =
        unsafe { libc::ioctl(questions.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SEND, std::ptr::from_mut(&mut response)) };
    check(result)
}

fn check(result: i32) -> Result<(), Errno> {
    if result >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}
