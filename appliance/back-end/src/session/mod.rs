//! One connection of a front-end, from the first message to the last.
//!
//! # Theory of operation
//! The *control thread*, which calls [`Connection::serve`], takes one message after the other, does what it says and answers
//! it. It waits for the front-end (between messages) and for the queues' threads (while it handles one), never for both. The
//! back channel, on which the front-end is asked for something, is a task of its own: a front-end that does not answer
//! there delays nothing here.
//!
//! A message that cannot be decoded ends the connection. One that can but is not done is answered with a failure if the
//! front-end asked for an answer, and ends the connection if it did not: it would go on as if it had been done.
//!
//! When `serve` returns, no request is in flight, and nothing of the front-end's is mapped or open any more.

mod back_channel;
mod requests;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::task::AbortHandle;
use vvu_protocol::DecodeError;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, RawMessage, ReplyPayload};
use vvu_socket::{MessageSocket, SocketError};

pub use self::requests::Refusal;
use crate::cpus;
use crate::device::Device;
use crate::dirty_log::DirtyLog;
use crate::inflight::InflightBuffer;
use crate::iommu::Iommu;
use crate::log_limit::LogLimit;
use crate::memory::MemoryTable;
use crate::notices::Notices;
use crate::view::View;
use crate::vring::Vring;

/// What a front-end can cause to be logged in this module, over all connections.
static LOG: LogLimit = LogLimit::new();

/// The answer to a request that was refused. Any number but 0 only means "failed".
const FAILURE: u64 = 1;

/// Device features that the session has by itself.
const OWN_FEATURES: Features = Features::PROTOCOL_FEATURES.union(Features::LOG_ALL).union(Features::ACCESS_PLATFORM);

/// Protocol features that the session has by itself. Not among them, though they may look useful:
/// - GET_VRING_BASE_INFLIGHT lets a stopped ring leave requests in flight. What the kernel has handed to storage cannot be
///   taken back, so nearly all of them would be waited for as they are today.
/// - STATUS tells what the messages about rings tell, too; and a device that needs a reset is told by the err events.
const OWN_PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Protocol features that are the device's to offer.
const DEVICE_PROTOCOL_FEATURES: ProtocolFeatures =
    ProtocolFeatures::CONFIG.union(ProtocolFeatures::RARP).union(ProtocolFeatures::MTU);

/// Why a connection ended before the front-end closed it.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No thread or descriptor for another connection.
    #[error("cannot prepare for a front-end")]
    Prepare(#[source] io::Error),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A message that is none.
    #[error("front-end sent a malformed message")]
    Malformed(#[from] DecodeError),
    /// A request that is not done, without a way to say so.
    #[error("request {request} was refused")]
    Refused {
        /// Name as in the specification.
        request: &'static str,
        /// Why.
        source: Refusal,
    },
}

/// How a connection ended in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The front-end closed it.
    Closed,
    /// [`Handle::end`] was called.
    Ended,
}

/// A connected front-end and the device for it.
#[derive(Debug)]
pub struct Connection<D: Device> {
    stream: UnixStream,
    device: Arc<D>,
    notices: Arc<Notices>,
}

/// Reaches into a connection from other threads. Outlives it without effect.
#[derive(Debug, Clone)]
pub struct Handle {
    notices: Arc<Notices>,
}

impl Handle {
    /// Ends the connection. Requests in flight are completed.
    pub fn end(&self) {
        self.notices.end();
    }

    /// Tells the front-end that the configuration space has changed, if it wants to know (CONFIG_CHANGE).
    pub fn config_changed(&self) {
        self.notices.note_config_change();
    }
}

impl<D: Device> Connection<D> {
    /// A connection on a connected stream; nothing is read from it yet.
    pub fn new(stream: UnixStream, device: Arc<D>) -> Self {
        Self { stream, device, notices: Arc::default() }
    }

    /// For other threads.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { notices: Arc::clone(&self.notices) }
    }

    /// Serves the front-end on this thread until it is gone.
    ///
    /// # Errors
    /// [`SessionError`] if the connection ended for a reason that is worth a line in the log.
    pub fn serve(self) -> Result<Ending, SessionError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = runtime.map_err(SessionError::Prepare)?;
        // Dropped in the reverse order: the front-end sees the end when nothing of its own is in use any more.
        let mut socket = {
            let _context = runtime.enter();
            MessageSocket::new(self.stream).map_err(SessionError::Prepare)?
        };
        let mut session = Session::new(self.device, Arc::clone(&self.notices)).map_err(SessionError::Prepare)?;
        runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.notices.ended() => Ok(Ending::Ended),
                outcome = session.run(&mut socket) => outcome.map(|()| Ending::Closed),
            }
        })
    }
}

/// State of one connection.
struct Session<D: Device> {
    device: Arc<D>,
    notices: Arc<Notices>,
    vrings: Vec<Vring>,
    threads: Vec<JoinHandle<()>>,
    features: Features,
    protocol_features: ProtocolFeatures,
    memory: MemoryTable,
    iommu: Arc<Iommu>,
    log: Option<Arc<DirtyLog>>,
    /// SET_LOG_FD. The specification leaves it to the back-end to signal it, and no front-end waits for it.
    log_event: Option<OwnedFd>,
    inflight: Option<Arc<InflightBuffer>>,
    back_channel: Option<AbortHandle>,
}

impl<D: Device> Session<D> {
    fn new(device: Arc<D>, notices: Arc<Notices>) -> io::Result<Self> {
        device.reset();
        let memory = MemoryTable::new();
        let view = View { memory: Arc::clone(memory.snapshot()), iommu: None, log: None, used_ring_log: None };
        let mut session = Self {
            device,
            notices,
            vrings: Vec::new(),
            threads: Vec::new(),
            features: Features::empty(),
            protocol_features: ProtocolFeatures::empty(),
            memory,
            iommu: Arc::default(),
            log: None,
            log_event: None,
            inflight: None,
            back_channel: None,
        };
        for index in 0..session.device.queue_count() {
            let vring = Vring::new(index, session.device.max_queue_size(), view.clone(), &session.notices)?;
            session.vrings.push(vring.clone());
            let device = Arc::clone(&session.device);
            let thread = std::thread::Builder::new().name(format!("queue {index}")).spawn(move || {
                pin(&*device, index);
                while let Some(service) = vring.next_service() {
                    device.serve(service);
                }
            })?;
            session.threads.push(thread);
        }
        Ok(session)
    }

    async fn run(&mut self, socket: &mut MessageSocket) -> Result<(), SessionError> {
        while let Some(message) = socket.recv().await? {
            if let Some(reply) = self.answer(message)? {
                socket.send(&reply).await?;
            }
        }
        Ok(())
    }

    /// Does what a message says. The reply, if there is to be one.
    fn answer(&mut self, message: RawMessage<OwnedFd>) -> Result<Option<RawMessage<OwnedFd>>, SessionError> {
        let needs_reply = message.header.needs_reply;
        let request = FrontEndRequest::decode(message)?;
        let (code, name) = (request.code(), request.name());
        let own_reply = request.row().map_or(ReplyPayload::None, |row| row.reply);
        let is_iotlb = matches!(request, FrontEndRequest::Iotlb(_));
        let outcome = self.handle(request);
        // Asked for after the request: it may be the one that negotiates it.
        let acknowledges = needs_reply && self.protocol_features.contains(ProtocolFeatures::REPLY_ACK);
        let reply = match outcome {
            Ok(Some(reply)) => reply,
            Ok(None) if acknowledges => FrontEndReply::Acknowledgement(0),
            Ok(None) => return Ok(None),
            Err(refusal) => {
                let failure = match own_reply {
                    ReplyPayload::None if acknowledges => FrontEndReply::Acknowledgement(FAILURE),
                    ReplyPayload::Number if is_iotlb => FrontEndReply::Number(FAILURE),
                    ReplyPayload::Config => FrontEndReply::Config(None),
                    _ => return Err(SessionError::Refused { request: name, source: refusal }),
                };
                if let Some(suppressed) = LOG.admit(Instant::now()) {
                    tracing::warn!(request = name, error = crate::in_one_line(&refusal), suppressed, "request refused");
                }
                failure
            }
        };
        Ok(Some(reply.encode(code)))
    }

    /// What rings see from now on.
    fn view(&self) -> View {
        View {
            memory: Arc::clone(self.memory.snapshot()),
            iommu: self.features.contains(Features::ACCESS_PLATFORM).then(|| Arc::clone(&self.iommu)),
            log: self.log.clone().filter(|_| self.features.contains(Features::LOG_ALL)),
            used_ring_log: None,
        }
    }

    /// Lets all rings work on what has changed, and waits until they do.
    fn renew_views(&self) {
        let view = self.view();
        for vring in &self.vrings {
            vring.set_view(view.clone());
        }
        drop(view);
        for vring in &self.vrings {
            vring.wait_for_view();
        }
    }

    fn is_idle(&self) -> bool {
        self.vrings.iter().all(Vring::is_idle)
    }
}

/// Puts the thread of a queue where the device wants it. One that cannot be there works elsewhere.
fn pin(device: &impl Device, index: u16) {
    let Some(cpu) = device.cpu_of_queue(index) else { return };
    if let (Err(error), Some(suppressed)) = (cpus::pin_to(cpu), LOG.admit(Instant::now())) {
        tracing::warn!(index, cpu, %error, suppressed, "queue's thread cannot be pinned");
    }
}

impl<D: Device> Drop for Session<D> {
    fn drop(&mut self) {
        if let Some(task) = &self.back_channel {
            task.abort();
        }
        for vring in &self.vrings {
            vring.close();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a queue's thread has panicked");
            }
        }
    }
}
