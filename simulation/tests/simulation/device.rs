//! One generic vhost-user device of the appliance's VMM (QEMU's `vhost-user-test-device-pci`): the front-end of the bridge's
//! control and window devices.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::sync::{mpsc, oneshot};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{ConfigSpace, FrontEndReply, FrontEndRequest, VringAddresses, VringFile, VringState};
use vvu_socket::MessageSocket;
use vvu_socket::event;

use super::ring::{self, DriverRing};
use super::world::World;

type Reply = FrontEndReply<OwnedFd>;
type Request = FrontEndRequest<OwnedFd>;

/// The bridge has closed the connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gone;

#[derive(Debug)]
pub(crate) struct Device {
    name: &'static str,
    questions: mpsc::UnboundedSender<(Request, oneshot::Sender<Reply>)>,
    queue_count: u32,
    /// All vrings are enabled: the bridge may use the back channel.
    pub(crate) running: Cell<bool>,
    /// What the guest reads of the configuration space.
    pub(crate) config: RefCell<Vec<u8>>,
}

impl Device {
    /// Connects, and begins to serve the connection; `serve` is to run as a task. Answers the back channel, too.
    pub(crate) async fn connect(
        name: &'static str,
        path: &Path,
        queue_count: u32,
        config_len: usize,
        world: &Rc<World>,
    ) -> Result<(Rc<Self>, impl Future<Output = ()> + use<>), Gone> {
        let stream = std::os::unix::net::UnixStream::connect(path).map_err(|_| Gone)?;
        let socket = MessageSocket::new(stream).unwrap();
        let (questions, receiver) = mpsc::unbounded_channel();
        let (running, config) = (Cell::new(false), RefCell::new(vec![0; config_len]));
        let device = Rc::new(Self { name, questions, queue_count, running, config });
        Ok((device, serve(name, socket, receiver, Rc::clone(world))))
    }

    /// What QEMU does before the guest runs. Answers the back channel.
    pub(crate) async fn realize(&self) -> Result<MessageSocket, Gone> {
        use FrontEndRequest as R;
        let features = Features::from_bits_retain(self.number(R::GetFeatures).await?);
        assert!(features.contains(Features::VERSION_1 | Features::PROTOCOL_FEATURES), "{features:?}");
        let protocol = ProtocolFeatures::from_bits_retain(self.number(R::GetProtocolFeatures).await?);
        // With it, a reset of the appliance would kill QEMU 11.
        assert!(!protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS), "{protocol:?}");
        self.done(R::SetProtocolFeatures(protocol)).await?;
        assert_eq!(self.number(R::GetQueueNum).await?, u64::from(self.queue_count));
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        self.done(R::SetBackendReqFd(theirs)).await?;
        self.done(R::SetOwner).await?;
        if protocol.contains(ProtocolFeatures::SHMEM) {
            let FrontEndReply::ShmemConfig(config) = self.ask(R::GetShmemConfig).await? else {
                panic!("expected the sizes of the shared memory regions");
            };
            assert!(config.regions.iter().map(|(_, len)| len).sum::<u64>().is_power_of_two(), "{config:?}");
        }
        self.read_config().await?;
        Ok(MessageSocket::new(ours.into()).unwrap())
    }

    /// The guest has set DRIVER_OK.
    pub(crate) async fn start(&self, table: Vec<(MemoryRegion, OwnedFd)>, rings: &[Vring]) -> Result<(), Gone> {
        use FrontEndRequest as R;
        self.done(R::SetFeatures(Features::VERSION_1 | Features::PROTOCOL_FEATURES)).await?;
        self.done(R::SetMemTable(table)).await?;
        for (index, ring) in (0_u8..).zip(rings) {
            let state = |num| VringState { index: u32::from(index), num };
            self.done(R::SetVringNum(state(u32::from(ring::SIZE)))).await?;
            self.done(R::SetVringBase(state(0))).await?;
            let [descriptors, available, used] = ring.addresses;
            let addresses = VringAddresses { index: u32::from(index), flags: 0, descriptors, used, available, log: 0 };
            self.done(R::SetVringAddr(addresses)).await?;
            let file = |file: &OwnedFd| VringFile { index, descriptor: Some(file.try_clone().unwrap()) };
            self.done(R::SetVringKick(file(&ring.kick))).await?;
            self.done(R::SetVringCall(file(&ring.call))).await?;
        }
        self.running.set(true);
        for index in 0..self.queue_count {
            self.done(R::SetVringEnable(VringState { index, num: 1 })).await?;
        }
        Ok(())
    }

    /// The guest resets the device.
    pub(crate) async fn stop(&self) -> Result<(), Gone> {
        use FrontEndRequest as R;
        for index in 0..self.queue_count {
            self.done(R::SetVringEnable(VringState { index, num: 0 })).await?;
        }
        for index in 0..self.queue_count {
            self.ask(R::GetVringBase(VringState { index, num: 0 })).await?;
        }
        Ok(())
    }

    /// Reads the whole configuration space.
    pub(crate) async fn read_config(&self) -> Result<Vec<u8>, Gone> {
        let bytes = vec![0; self.config.borrow().len()];
        match self.ask(FrontEndRequest::GetConfig(ConfigSpace { offset: 0, flags: 0, bytes })).await? {
            FrontEndReply::Config(Some(config)) => Ok(config.bytes),
            other => panic!("expected the configuration space, {other:?} came"),
        }
    }

    pub(crate) async fn done(&self, request: Request) -> Result<(), Gone> {
        let name = request.name();
        let reply = self.ask(request).await?;
        assert!(matches!(reply, FrontEndReply::Acknowledgement(0)), "{}: {name} is answered with {reply:?}", self.name);
        Ok(())
    }

    async fn number(&self, request: Request) -> Result<u64, Gone> {
        match self.ask(request).await? {
            FrontEndReply::Number(value) => Ok(value),
            other => panic!("expected a number, {other:?} came"),
        }
    }

    /// Asks the bridge. Questions are asked in the order of the calls, even of those that nobody waits for any more.
    pub(crate) fn ask(&self, request: Request) -> impl Future<Output = Result<Reply, Gone>> + use<> {
        let (sender, answer) = oneshot::channel();
        let asked = self.questions.send((request, sender));
        async move {
            asked.map_err(|_| Gone)?;
            answer.await.map_err(|_| Gone)
        }
    }
}

/// A ring, as the VMM hands it to the bridge.
#[derive(Debug)]
pub(crate) struct Vring {
    /// User addresses of the VMM's process.
    addresses: [u64; 3],
    kick: OwnedFd,
    call: OwnedFd,
}

impl Vring {
    pub(crate) fn new(addresses: [u64; 3], ring: Option<&DriverRing>) -> Self {
        use std::os::fd::AsFd;
        match ring {
            Some(ring) => {
                let call = ring.call.as_fd().try_clone_to_owned().unwrap();
                Self { addresses, kick: ring.kick.try_clone().unwrap(), call }
            }
            None => Self { addresses, kick: event::create().unwrap(), call: event::create().unwrap() },
        }
    }
}

/// One question after the other, as QEMU's main loop asks them.
async fn serve(
    name: &'static str,
    mut socket: MessageSocket,
    mut questions: mpsc::UnboundedReceiver<(Request, oneshot::Sender<Reply>)>,
    world: Rc<World>,
) {
    loop {
        let (request, answer) = tokio::select! {
            question = questions.recv() => match question {
                Some(question) => question,
                None => return,
            },
            message = socket.recv() => match message {
                Ok(Some(message)) => panic!("{name}: the bridge sends {message:?}, which nobody has asked for"),
                Ok(None) | Err(_) => return,
            },
        };
        let code = request.code();
        world.hesitate().await;
        if socket.send(&request.encode(true)).await.is_err() {
            return;
        }
        let Ok(Some(message)) = socket.recv().await else { return };
        let _ = answer.send(FrontEndReply::decode(code, message).unwrap());
    }
}
