//! The front-end: a connection with the `vhost` crate's messages.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::memory::Memory;
use crate::ring::Place;

/// Device feature INDIRECT_DESC (virtio 1.3, section 6).
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Device feature EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// Device feature VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// That there are protocol features (vhost-user, section "Feature negotiation").
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Most queues of a device.
const MAX_QUEUES: u64 = 64;

/// A connected front-end.
pub struct Connection {
    frontend: Frontend,
    features: u64,
    acknowledges: bool,
    tracks: bool,
}

impl Connection {
    /// Connects and negotiates: VERSION_1, which has to be offered, and what is offered of `wanted`.
    ///
    /// # Errors
    /// If nobody listens, or the back-end is too old.
    pub fn open(socket: &Path, wanted: u64) -> Result<Self, Error> {
        let stream =
            UnixStream::connect(socket).map_err(|source| Error::Connect { path: socket.to_owned(), source })?;
        let mut frontend = Frontend::from_stream(stream, MAX_QUEUES);
        accepted("SET_OWNER", frontend.set_owner())?;
        let offered = accepted("GET_FEATURES", frontend.get_features())?;
        let must = [(VERSION_1, "VERSION_1"), (PROTOCOL_FEATURES, "protocol features")];
        if let Some((_, name)) = must.iter().find(|(bit, _)| offered & bit == 0) {
            return Err(Error::NotOffered(name));
        }
        let protocol = accepted("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())?;
        let protocol = protocol
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::REPLY_ACK);
        accepted("SET_PROTOCOL_FEATURES", frontend.set_protocol_features(protocol))?;
        let acknowledges = protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        if acknowledges {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let tracks = protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        let features = offered & (wanted | VERSION_1 | PROTOCOL_FEATURES);
        accepted("SET_FEATURES", frontend.set_features(features))?;
        Ok(Self { frontend, features, acknowledges, tracks })
    }

    /// Device features in force.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether each request is acknowledged before the next one is sent.
    #[must_use]
    pub fn acknowledges(&self) -> bool {
        self.acknowledges
    }

    /// Asks for the device's features: a message with an answer that changes nothing.
    ///
    /// # Errors
    /// If the back-end has gone.
    pub fn ask_features(&self) -> Result<u64, Error> {
        accepted("GET_FEATURES", self.frontend.get_features())
    }

    /// Announces driver memory.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn announce_memory(&self, memory: &Memory) -> Result<(), Error> {
        accepted("SET_MEM_TABLE", self.frontend.set_mem_table(&[memory.announcement()])).map(drop)
    }

    /// Has the back-end note which requests are in flight, if it can, as QEMU has it: a request costs a little more then.
    ///
    /// # Errors
    /// If the back-end refuses what it has offered.
    pub fn share_inflight_buffer(&mut self, queues: u16, ring: u16) -> Result<(), Error> {
        if !self.tracks {
            return Ok(());
        }
        let wanted = VhostUserInflight::new(0, 0, queues, ring);
        let (buffer, file) = accepted("GET_INFLIGHT_FD", self.frontend.get_inflight_fd(&wanted))?;
        accepted("SET_INFLIGHT_FD", self.frontend.set_inflight_fd(&buffer, file.as_raw_fd()))
    }

    /// The first 8 bytes of the configuration space, as a number.
    ///
    /// # Errors
    /// If the back-end has none.
    pub fn first_config_field(&mut self) -> Result<u64, Error> {
        let answer = self.frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]);
        let (_, bytes) = accepted("GET_CONFIG", answer)?;
        let bytes = bytes.first_chunk().ok_or(Error::NotOffered("a configuration space"))?;
        Ok(u64::from_le_bytes(*bytes))
    }

    /// Starts a queue whose ring is empty and at position 0.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn start_queue(&mut self, index: usize, ring: Place, signals: &Signals) -> Result<(), Error> {
        let frontend = &mut self.frontend;
        let addresses = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: Memory::user_address(ring.descriptors),
            used_ring_addr: Memory::user_address(ring.used),
            avail_ring_addr: Memory::user_address(ring.available),
            log_addr: None,
        };
        accepted("SET_VRING_NUM", frontend.set_vring_num(index, ring.size))?;
        accepted("SET_VRING_ADDR", frontend.set_vring_addr(index, &addresses))?;
        accepted("SET_VRING_BASE", frontend.set_vring_base(index, 0))?;
        accepted("SET_VRING_CALL", frontend.set_vring_call(index, &signals.call))?;
        accepted("SET_VRING_KICK", frontend.set_vring_kick(index, &signals.kick))?;
        accepted("SET_VRING_ENABLE", frontend.set_vring_enable(index, true))
    }

    /// Stops a queue; the position that the device has reached.
    ///
    /// # Errors
    /// If the back-end refuses.
    pub fn stop_queue(&self, index: usize) -> Result<u32, Error> {
        accepted("GET_VRING_BASE", self.frontend.get_vring_base(index))
    }
}

fn accepted<T>(request: &'static str, answer: vhost::Result<T>) -> Result<T, Error> {
    answer.map_err(|source| Error::Message { request, source })
}

/// Kick and call of a queue.
///
/// The call is waited for edge by edge and never read while the load runs, as an interrupt is not read either: a wait costs one
/// system call, and what has come together in the end is how often the device has called.
#[derive(Debug)]
pub struct Signals {
    kick: EventFd,
    call: EventFd,
    waiter: rustix::fd::OwnedFd,
}

impl Signals {
    /// Fresh ones.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub fn new() -> Result<Self, Error> {
        let system = |what| move |source| Error::System { what, source };
        let event = || {
            EventFd::new(EFD_NONBLOCK).map_err(|error| Error::System {
                what: "make an eventfd",
                source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
            })
        };
        let (kick, call) = (event()?, event()?);
        let waiter = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system("make an epoll"))?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&waiter, descriptor(&call), epoll::EventData::new_u64(0), flags)
            .map_err(system("watch an eventfd"))?;
        Ok(Self { kick, call, waiter })
    }

    /// Kicks the device.
    #[inline]
    pub fn kick(&self) {
        // It fails only with 2^64 - 2 kicks that nobody has read: the device has one to read then.
        let _full = self.kick.write(1);
    }

    /// Calls the driver, as the device does.
    pub fn call(&self) {
        // As with a kick.
        let _full = self.call.write(1);
    }

    /// Whether the device was kicked since the last time this was asked.
    #[must_use]
    pub fn has_kick(&self) -> bool {
        self.kick.read().is_ok()
    }

    /// Waits for a call that came since the last wait; false if none came in time.
    ///
    /// # Errors
    /// If the system refuses to wait.
    pub fn wait(&self, patience: Duration) -> Result<bool, Error> {
        let timeout =
            Timespec::try_from(patience).map_err(|_| Error::Usage("a time limit is out of range".to_owned()))?;
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let count = rustix::io::retry_on_intr(|| epoll::wait(&self.waiter, &mut events, Some(&timeout)))
            .map_err(|source| Error::System { what: "wait for a call", source })?;
        Ok(count > 0)
    }

    /// Calls since the last time this was asked.
    #[must_use]
    pub fn calls(&self) -> u64 {
        // An error says that there were none.
        self.call.read().unwrap_or(0)
    }
}

#[expect(unsafe_code, reason = "vmm_sys_util's EventFd lends its descriptor as a number only")]
fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: open as long as the event is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_wake_once_each_and_are_counted_without_being_read() {
        let signals = Signals::new().unwrap();
        assert!(!signals.wait(Duration::ZERO).unwrap());
        for _ in 0..3 {
            signals.call.write(1).unwrap();
            assert!(signals.wait(Duration::ZERO).unwrap());
            assert!(!signals.wait(Duration::ZERO).unwrap());
        }
        assert_eq!((signals.calls(), signals.calls()), (3, 0));
    }
}
