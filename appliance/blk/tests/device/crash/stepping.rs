//! One thread of another process, instruction by instruction (ptrace), for x86-64.

#![expect(unsafe_code, reason = "ptrace is not wrapped by the crates in use")]

use std::io;
use std::mem::offset_of;
use std::ptr::without_provenance_mut;
use std::time::Instant;

use crate::process::LIMIT;

/// Debug register 7: watch the address in register 0 (bit 0) for writes (bits 16 and 17: 1) of two bytes (bits 18 and 19: 1).
const WATCH_WRITES: usize = 1 | 1 << 16 | 1 << 18;

/// A thread that was stopped and runs only as it is stepped. It goes on, or dies with its process, when the value is dropped;
/// all by the thread that has stopped it.
pub(super) struct SteppedThread {
    id: libc::pid_t,
}

/// Why a thread cannot be stepped any more.
#[derive(Debug)]
pub(super) struct Gone;

impl SteppedThread {
    /// Stops the thread with this name.
    pub(super) fn stop(process: u32, name: &str) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|task| task.unwrap().path());
        let task = tasks.into_iter().find(|task| std::fs::read_to_string(task.join("comm")).unwrap().trim() == name);
        let id = task.unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
        let thread = Self { id };
        thread.request(libc::PTRACE_SEIZE, 0, 0).unwrap();
        thread.request(libc::PTRACE_INTERRUPT, 0, 0).unwrap();
        thread.wait().unwrap();
        thread
    }

    /// Lets it run until it has written to the 16-bit number at this address of its own.
    pub(super) fn run_to_write(&self, address: usize) -> Result<(), Gone> {
        let register = |number: usize| offset_of!(libc::user, u_debugreg) + number * size_of::<u64>();
        self.request(libc::PTRACE_POKEUSER, register(0), address).unwrap();
        self.request(libc::PTRACE_POKEUSER, register(7), WATCH_WRITES).unwrap();
        self.request(libc::PTRACE_CONT, 0, 0).map_err(|_| Gone)?;
        self.wait()?;
        self.request(libc::PTRACE_POKEUSER, register(7), 0).map_err(|_| Gone)
    }

    /// Lets it execute one instruction, or one system call.
    pub(super) fn step(&self) -> Result<(), Gone> {
        self.request(libc::PTRACE_SINGLESTEP, 0, 0).map_err(|_| Gone)?;
        self.wait()
    }

    fn request(&self, request: libc::c_uint, address: usize, data: usize) -> io::Result<()> {
        let (address, data): (*mut libc::c_void, *mut libc::c_void) =
            (without_provenance_mut(address), without_provenance_mut(data));
        // SAFETY: none of the requests in use takes an address of this process.
        let outcome = unsafe { libc::ptrace(request, self.id, address, data) };
        if outcome == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until it has stopped.
    fn wait(&self) -> Result<(), Gone> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut status = 0;
            // SAFETY: the status is ours.
            let id = unsafe { libc::waitpid(self.id, &raw mut status, libc::__WALL | libc::WNOHANG) };
            match id {
                0 => assert!(Instant::now() < deadline, "the thread has not stopped within {LIMIT:?}"),
                id if id == self.id && libc::WIFSTOPPED(status) => return Ok(()),
                _ => return Err(Gone),
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for SteppedThread {
    fn drop(&mut self) {
        // A thread that was killed is reaped here; before that its process cannot be.
        if self.request(libc::PTRACE_DETACH, 0, 0).is_err() {
            while self.wait().is_ok() {}
        }
    }
}
