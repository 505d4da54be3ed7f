//! A front-end: sends what a test wants, and nothing by itself.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use vvu_back_end::{Connection, Ending, Handle, SessionError};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, RawMessage, VringFile, VringState};
use vvu_socket::MessageSocket;
use vvu_test_driver::event::{LIMIT, wait_readable};

use crate::echo::Echo;

/// All that a session offers and a test may need.
pub(crate) const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// What most tests negotiate.
pub(crate) const FEATURES: Features =
    Features::PROTOCOL_FEATURES.union(Features::VERSION_1).union(Features::INDIRECT_DESC);

pub(crate) type Request = FrontEndRequest<OwnedFd>;
pub(crate) type Reply = FrontEndReply<OwnedFd>;
type Outcome = Result<Ending, SessionError>;

/// A front-end and the session that it talks to.
pub(crate) struct FrontEnd {
    runtime: Runtime,
    /// None after the end.
    socket: Option<MessageSocket>,
    pub(crate) device: Arc<Echo>,
    pub(crate) handle: Handle,
    session: Option<JoinHandle<Outcome>>,
}

/// The runtime has to go on while a message is answered.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

impl FrontEnd {
    /// Connected, with nothing negotiated.
    pub(crate) fn connect() -> Self {
        let device = Arc::new(Echo::default());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(theirs, Arc::clone(&device));
        let handle = connection.handle();
        let session = Some(std::thread::spawn(move || connection.serve()));
        let runtime = runtime();
        let socket = {
            let _context = runtime.enter();
            Some(MessageSocket::new(ours).unwrap())
        };
        Self { runtime, socket, device, handle, session }
    }

    /// Connected, with everything but IOMMU, log and EVENT_IDX negotiated.
    pub(crate) fn negotiated() -> Self {
        let mut front_end = Self::connect();
        front_end.negotiate(FEATURES);
        front_end
    }

    pub(crate) fn negotiate(&mut self, features: Features) {
        self.send(Request::SetProtocolFeatures(PROTOCOL), false);
        self.done(Request::SetOwner);
        self.done(Request::SetFeatures(features));
    }

    pub(crate) fn send(&mut self, request: Request, needs_reply: bool) {
        self.send_raw(&request.encode(needs_reply));
    }

    pub(crate) fn send_raw(&mut self, message: &RawMessage<OwnedFd>) {
        let socket = self.socket.as_ref().unwrap();
        self.runtime.block_on(socket.send(message)).unwrap();
    }

    /// The next message. None at the end of the connection, or when it is cut.
    pub(crate) fn receive(&mut self) -> Option<RawMessage<OwnedFd>> {
        let socket = self.socket.as_mut().unwrap();
        self.runtime.block_on(async { timeout(LIMIT, socket.recv()).await.unwrap() }).ok().flatten()
    }

    /// Whether a message or the end is there within a moment: for what must not come.
    pub(crate) fn hears_something(&mut self) -> bool {
        let socket = self.socket.as_mut().unwrap();
        self.runtime.block_on(async { timeout(Duration::from_millis(50), socket.recv()).await.is_ok() })
    }

    /// Asks and takes the reply.
    pub(crate) fn ask(&mut self, request: Request) -> Reply {
        let (code, name) = (request.code(), request.name());
        self.send(request, true);
        let reply = self.receive().unwrap_or_else(|| panic!("{name} has ended the connection"));
        Reply::decode(code, reply).unwrap()
    }

    /// A request that is to be done.
    pub(crate) fn done(&mut self, request: Request) {
        let name = request.name();
        match self.ask(request) {
            Reply::Acknowledgement(0) | Reply::Number(0) | Reply::LogBase => {}
            other => panic!("{name}: {other:?}"),
        }
    }

    /// A request that is to be refused.
    pub(crate) fn refused(&mut self, request: Request) {
        let name = request.name();
        match self.ask(request) {
            Reply::Acknowledgement(1..) | Reply::Number(1..) => {}
            other => panic!("{name}: {other:?}"),
        }
    }

    /// The reply to GET_VRING_BASE.
    pub(crate) fn stop(&mut self, index: u32) -> u32 {
        match self.ask(Request::GetVringBase(VringState { index, num: 0 })) {
            Reply::VringState(state) if state.index == index => state.num,
            other => panic!("{other:?}"),
        }
    }

    /// Sends the eventfds of a ring and enables it.
    pub(crate) fn start(&mut self, index: u8, events: &Events) {
        let file = |event: &OwnedFd| VringFile { index, descriptor: Some(event.try_clone().unwrap()) };
        self.done(Request::SetVringErr(file(&events.error)));
        self.done(Request::SetVringCall(file(&events.call)));
        self.done(Request::SetVringKick(file(&events.kick)));
        self.done(Request::SetVringEnable(VringState { index: u32::from(index), num: 1 }));
    }

    /// Hands over a back channel and returns the other end.
    pub(crate) fn open_back_channel(&mut self) -> BackChannel {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.done(Request::SetBackendReqFd(theirs.into()));
        let runtime = runtime();
        let socket = {
            let _context = runtime.enter();
            MessageSocket::new(ours).unwrap()
        };
        BackChannel { runtime, socket }
    }

    /// Closes the connection.
    pub(crate) fn close(&mut self) {
        self.socket = None;
    }

    /// Waits for the end of the session.
    pub(crate) fn outcome(&mut self) -> Outcome {
        self.session.take().unwrap().join().unwrap()
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.device.release();
        self.close();
        if let Some(session) = self.session.take()
            && !std::thread::panicking()
        {
            let _outcome = session.join().unwrap();
        }
    }
}

/// The front-end's end of the back channel.
pub(crate) struct BackChannel {
    runtime: Runtime,
    socket: MessageSocket,
}

impl BackChannel {
    pub(crate) fn receive(&mut self) -> RawMessage<OwnedFd> {
        let socket = &mut self.socket;
        self.runtime.block_on(async { timeout(LIMIT, socket.recv()).await.unwrap() }).unwrap().unwrap()
    }

    pub(crate) fn hears_something(&mut self) -> bool {
        let socket = &mut self.socket;
        self.runtime.block_on(async { timeout(Duration::from_millis(50), socket.recv()).await.is_ok() })
    }

    pub(crate) fn reply(&self, code: u32, value: u64) {
        let reply = vvu_protocol::message::BackEndReply::<OwnedFd>::Acknowledgement(value).encode(code);
        self.runtime.block_on(self.socket.send(&reply)).unwrap();
    }
}

/// The three events of a ring.
pub(crate) struct Events {
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) error: OwnedFd,
}

impl Events {
    pub(crate) fn new() -> Self {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        Self { kick: event(), call: event(), error: event() }
    }
}

/// Waits for an event and takes it.
pub(crate) fn wait_for(event: &OwnedFd, what: &str) {
    wait_readable(event, what);
    rustix::io::read(event.as_fd(), &mut [0; 8]).unwrap();
}

static NEXT_NAME: AtomicU32 = AtomicU32::new(0);

/// Memory with a name of its own, by which its descriptors and mappings can be counted.
pub(crate) struct NamedMemory {
    pub(crate) file: File,
    name: String,
}

impl NamedMemory {
    pub(crate) fn new(len: u64) -> Self {
        let name = format!("session-test-{}-end", NEXT_NAME.fetch_add(1, Ordering::SeqCst));
        let file = File::from(rustix::fs::memfd_create(&name, rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        Self { file, name }
    }

    pub(crate) fn fd(&self) -> OwnedFd {
        self.file.try_clone().unwrap().into()
    }

    /// Mappings of it in this process, in which the session is, too.
    pub(crate) fn mappings(&self) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains(&self.name)).count()
    }

    pub(crate) fn descriptors(&self) -> usize {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = links.filter_map(|link| std::fs::read_link(link.ok()?.path()).ok());
        targets.filter(|target| target.to_string_lossy().contains(&self.name)).count()
    }
}
