//! What the front-end says and hears beside the work of the device: requests of the back-end, the device's state, its
//! configuration, and IOTLB messages.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep};
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{
    BackEndReply, BackEndRequest, ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FrontEndReply, FrontEndRequest,
    StateDirection,
};
use vvu_socket::MessageSocket;

use super::super::back_end::{CONFIG_LEN, CONFIG_VERSION};
use super::super::checks;
use super::super::device_state;
use super::super::task::OwnedTask;
use super::super::world::World;
use super::{Ended, FrontEnd, LOOK, PATIENCE};

/// Kinds of IOTLB messages: `VHOST_IOTLB_UPDATE`, `VHOST_IOTLB_INVALIDATE`.
const KINDS: [u8; 2] = [2, 3];

/// What the front-end says to a request of the back-end: done, or one of its own failures.
const ANSWERS: [u64; 3] = [0, 0, 7];

/// A front-end that is busy takes this long for an answer: longer than the bridge waits.
const BUSY: Duration = Duration::from_secs(40);

/// Bits of the answer to SET_DEVICE_STATE_FD that say that it has failed.
const STATE_FAILURE: u64 = 0xff;

/// Bytes of the configuration space that the driver writes.
const WRITTEN: usize = CONFIG_VERSION.end;

/// Takes requests of the back-end until it is dropped.
#[derive(Debug)]
pub(super) struct BackChannel {
    world: Rc<World>,
    /// The configuration has changed since it was read.
    pub(super) stale: Rc<Cell<bool>>,
    _task: OwnedTask,
}

impl BackChannel {
    fn new(world: &Rc<World>, socket: MessageSocket) -> Self {
        let stale = Rc::new(Cell::new(false));
        let task = OwnedTask::spawn(serve(Rc::clone(world), socket, Rc::clone(&stale)));
        world.questions.heard.set(true);
        Self { world: Rc::clone(world), stale, _task: task }
    }
}

impl Drop for BackChannel {
    fn drop(&mut self) {
        self.world.questions.heard.set(false);
    }
}

async fn serve(world: Rc<World>, mut socket: MessageSocket, stale: Rc<Cell<bool>>) {
    while let Ok(Some(message)) = socket.recv().await {
        let asks = message.header.needs_reply;
        let request = BackEndRequest::decode(message).unwrap();
        world.note(format!("front-end: hears {}", request.name()));
        let answer = *world.random.one_of(&ANSWERS).unwrap();
        match &request {
            BackEndRequest::ConfigChange => stale.set(true),
            BackEndRequest::Iotlb(question) => {
                assert_eq!(world.questions.arrives(question), 1, "times that {question:?} has come");
                world.questions.answers(question, answer);
            }
            other => panic!("{} must not come through", other.name()),
        }
        if !asks {
            continue;
        }
        assert!(world.questions.answers.get(), "the bridge asks for an answer, and REPLY_ACK was not negotiated");
        world.hesitate().await;
        if world.random.percent(2) {
            sleep(BUSY).await;
        }
        let _ = socket.send(&BackEndReply::<OwnedFd>::Acknowledgement(answer).encode(request.code())).await;
    }
    panic!("the bridge has closed the back channel");
}

impl FrontEnd {
    pub(super) async fn set_back_channel(&mut self) -> Result<(), Ended> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        self.world.questions.answers.set(self.has(ProtocolFeatures::REPLY_ACK));
        let socket = MessageSocket::new(ours.into()).unwrap();
        self.back_channel = Some(BackChannel::new(&self.world, socket));
        self.tell(FrontEndRequest::SetBackendReqFd(theirs)).await
    }

    /// Reads the configuration if it was told that it has changed.
    pub(super) async fn heed_config(&mut self) -> Result<(), Ended> {
        match &self.back_channel {
            Some(channel) if channel.stale.take() => self.read_config().await,
            _ => Ok(()),
        }
    }

    /// A change of the configuration is heard of sooner or later, whoever was lost meanwhile.
    pub(crate) async fn await_config(&mut self) -> Result<(), Ended> {
        if self.back_channel.is_none() {
            return Ok(());
        }
        let since = Instant::now();
        while self.config_read != self.world.config.get() {
            self.heed_config().await?;
            let what = || format!("change {} of the configuration", self.world.config.get());
            checks::patience(&self.world, since, PATIENCE, what);
            sleep(LOOK / 50).await;
        }
        Ok(())
    }

    pub(super) async fn read_config(&mut self) -> Result<(), Ended> {
        let offset = u32::try_from(CONFIG_VERSION.start).unwrap();
        let wanted = ConfigSpace { offset, flags: 0, bytes: vec![0; CONFIG_VERSION.len()] };
        match self.ask(FrontEndRequest::GetConfig(wanted)).await? {
            FrontEndReply::Config(Some(config)) => {
                assert_eq!((config.offset, config.bytes.len()), (offset, CONFIG_VERSION.len()));
                self.config_read = u64::from_le_bytes(config.bytes.try_into().unwrap());
            }
            other => panic!("expected the configuration space, {other:?} came"),
        }
        Ok(())
    }

    pub(super) async fn write_config(&mut self) -> Result<(), Ended> {
        let start = WRITTEN + self.world.random.below(CONFIG_LEN - WRITTEN);
        let bytes = vec![self.world.random.next().to_le_bytes()[0]; 1 + self.world.random.below(CONFIG_LEN - start)];
        let offset = u32::try_from(start).unwrap();
        self.tell(FrontEndRequest::SetConfig(ConfigSpace { offset, flags: 0, bytes: bytes.clone() })).await?;
        self.acknowledged.config[start..start + bytes.len()].copy_from_slice(&bytes);
        self.settle().await
    }

    /// The IOMMU of the driver VM has something to say. It is not said again to another back-end.
    pub(super) async fn tell_iotlb(&mut self) -> Result<(), Ended> {
        let message = self.world.questions.ask(*self.world.random.one_of(&KINDS).unwrap());
        let before = checks::moment(&self.world);
        let reply = self.ask(FrontEndRequest::Iotlb(message)).await?;
        assert!(matches!(reply, FrontEndReply::Number(0)), "IOTLB_MSG is answered with {reply:?}");
        let arrivals = self.world.questions.of(&message).arrivals;
        let disturbed = checks::moment(&self.world) != before;
        assert!(arrivals == 1 || arrivals > 1 && disturbed, "{message:?} has come {arrivals} times");
        Ok(())
    }

    /// The device's state is saved or loaded: whole, or it is said to have failed.
    pub(super) async fn move_state(&mut self) -> Result<(), Ended> {
        if !self.has(ProtocolFeatures::DEVICE_STATE) {
            return Ok(());
        }
        self.world.session.set("moving the state");
        let direction = if self.world.random.percent(50) { StateDirection::Save } else { StateDirection::Load };
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (theirs, ours) = match direction {
            StateDirection::Save => (write, read),
            StateDirection::Load => (read, write),
        };
        let before = checks::moment(&self.world);
        let transfer = DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped };
        let reply = self.ask(FrontEndRequest::SetDeviceStateFd(transfer, theirs)).await?;
        let FrontEndReply::DeviceState(value, None) = reply else { panic!("state: {reply:?}") };
        assert_eq!(value & STATE_FAILURE, 0, "SET_DEVICE_STATE_FD is refused");
        let state = match direction {
            StateDirection::Save => self.receive_state(ours).await,
            StateDirection::Load => self.send_state(ours).await,
        };
        let reply = self.ask(FrontEndRequest::CheckDeviceState).await?;
        let FrontEndReply::Number(value) = reply else { panic!("state: {reply:?}") };
        self.world.note(format!("front-end: {direction:?} of {} bytes is answered: {value}", state.len()));
        checks::state_has_moved(&self.world, before, direction, &state, value);
        Ok(())
    }

    async fn receive_state(&self, ours: OwnedFd) -> Vec<u8> {
        let (mut pipe, mut state) = (pipe::Receiver::from_owned_fd(ours).unwrap(), Vec::new());
        let since = Instant::now();
        loop {
            tokio::select! {
                biased;
                read = pipe.read_buf(&mut state) => if read.unwrap() == 0 {
                    return state;
                },
                () = sleep(LOOK) => checks::patience(&self.world, since, PATIENCE, || "the end of a state".to_owned()),
            }
        }
    }

    /// Nobody reads what the bridge or the back-end does not want any more.
    async fn send_state(&self, ours: OwnedFd) -> Vec<u8> {
        let (mut pipe, state) = (pipe::Sender::from_owned_fd(ours).unwrap(), device_state::some(&self.world.random));
        let since = Instant::now();
        for part in state.chunks(5000) {
            self.world.hesitate().await;
            let written = pipe.write_all(part);
            tokio::pin!(written);
            loop {
                tokio::select! {
                    biased;
                    written = &mut written => match written {
                        Ok(()) => break,
                        Err(_) => return state,
                    },
                    () = sleep(LOOK) => {
                        checks::patience(&self.world, since, PATIENCE, || "a reader of the state".to_owned());
                    }
                }
            }
        }
        state
    }
}
