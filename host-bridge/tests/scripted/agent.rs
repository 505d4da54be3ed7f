//! The agent, scripted: the driver of the control device. It says what the story says, and remembers nothing but which
//! request is under way.

use std::sync::Arc;

use tokio::sync::Semaphore;
use vm_memory::GuestAddress;
use vvu_protocol::control::{Channel, ConfigSpace, Frame, Handle, Status};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest};

use super::ring::{self, DriverRing};
use super::vmm::{Device, HIGH_MEMORY, Vmm};
use super::{Journal, within};

/// Receive buffers that the agent keeps offered.
const RECEIVE_BUFFERS: u16 = 8;

/// The agent of an appliance that has booted.
#[derive(Debug)]
pub(crate) struct Agent {
    device: Arc<Device>,
    interrupts: Arc<Semaphore>,
    pub(crate) receive: DriverRing,
    pub(crate) transmit: DriverRing,
    /// Number of the session, as the configuration space has it.
    pub(crate) session: u32,
    under_way: Option<Frame>,
    journal: Journal,
}

impl Agent {
    /// The appliance boots: the agent starts the control device, virtio-pmem's driver the window device, and the header of
    /// the window shows up.
    pub(crate) async fn boot(vmm: &Vmm) -> Self {
        let agent = Self::start_control(vmm).await;
        vmm.start_window().await;
        agent.sees(|config| config.window_len != 0, "the window's header").await;
        agent
    }

    /// Starts the control device alone. One queue lies in low memory, the other in high memory.
    pub(crate) async fn start_control(vmm: &Vmm) -> Self {
        let memory = vmm.map_ram();
        let mut receive = DriverRing::new(&memory, GuestAddress(0x1_0000));
        let transmit = DriverRing::new(&memory, GuestAddress(HIGH_MEMORY + 0x3000));
        (0..RECEIVE_BUFFERS).for_each(|index| receive.offer_buffer(index));
        vmm.start_control(&[&receive, &transmit]).await;
        let (device, interrupts) = (Arc::clone(&vmm.control), Arc::clone(&vmm.config_interrupts));
        Self { device, interrupts, receive, transmit, session: 0, under_way: None, journal: vmm.journal() }
    }

    /// Reads the configuration space.
    pub(crate) async fn config(&self) -> ConfigSpace {
        ConfigSpace::decode(&self.device.read_config().await.try_into().unwrap()).unwrap()
    }

    /// Writes the status field.
    pub(crate) async fn set_status(&self, status: Status) {
        self.device.write_config(0, &status.bits().to_le_bytes()).await;
    }

    /// Reads the configuration space after each configuration interrupt until it is as `expected`. Interrupts count once:
    /// a change without one is never seen here.
    pub(crate) async fn sees(&self, expected: impl Fn(&ConfigSpace) -> bool, what: &str) -> ConfigSpace {
        loop {
            let what = format!("a configuration interrupt for {what}");
            within(&what, self.interrupts.acquire()).await.unwrap().forget();
            let config = self.config().await;
            if expected(&config) {
                return config;
            }
        }
    }

    /// Configuration interrupts that [`Agent::sees`] has not taken yet.
    pub(crate) fn unseen_interrupts(&self) -> usize {
        self.interrupts.available_permits()
    }

    /// Sees a front-end connect, and its session number.
    pub(crate) async fn sees_front_end(&mut self) -> ConfigSpace {
        let config = self.sees(|config| config.status.contains(Status::FRONT_END_UP), "a front-end").await;
        self.session = config.session;
        config
    }

    /// Sees the end of a session: both status bits are clear.
    pub(crate) async fn sees_end(&self) -> ConfigSpace {
        self.sees(|config| config.status.is_empty(), "the end of a session").await
    }

    /// Waits for the next frame, and gives its buffer back.
    pub(crate) async fn frame(&mut self) -> Frame {
        let (index, bytes) = self.receive.next_used("a frame for the agent").await;
        self.receive.offer_buffer(index);
        Frame::decode(&bytes).unwrap()
    }

    /// Whether a frame is there already.
    pub(crate) fn has_frame(&self) -> bool {
        self.receive.has_used()
    }

    /// Waits for the next request of the front-end, which every frame asks an answer to.
    pub(crate) async fn request(&mut self) -> FrontEndRequest<Handle> {
        let frame = self.frame().await;
        assert_eq!((frame.channel, frame.session), (Channel::FrontEnd, self.session), "{frame:?}");
        assert!(frame.message.header.needs_reply, "{frame:?} asks for no answer");
        self.under_way = Some(frame.clone());
        let request = FrontEndRequest::decode(frame.message).unwrap();
        self.journal.note(format!("frame {}", request.name()));
        request
    }

    /// Whether the request under way has the flag "resume".
    pub(crate) fn is_resumed(&self) -> bool {
        self.under_way.as_ref().expect("a request under way").resume
    }

    /// Answers the request under way.
    pub(crate) async fn answer(&mut self, reply: FrontEndReply<Handle>) {
        let request = self.under_way.take().expect("a request under way");
        self.journal.note(format!("answer {reply:?}"));
        let message = reply.encode(request.message.header.request);
        self.send(&Frame::new(request.channel, request.session, message)).await;
    }

    /// Waits for a request and answers it with "done".
    pub(crate) async fn obliges(&mut self) -> FrontEndRequest<Handle> {
        let request = self.request().await;
        self.answer(FrontEndReply::Acknowledgement(0)).await;
        request
    }

    /// Sends any frame, and waits until the bridge has given the buffer back.
    pub(crate) async fn send(&mut self, frame: &Frame) {
        self.post(&frame.encode().unwrap());
        self.transmit.next_used("the bridge to take a frame").await;
    }

    /// Sends any bytes, and does not wait.
    pub(crate) fn post(&mut self, bytes: &[u8]) {
        let index = self.transmit.available_index() % ring::SIZE;
        self.transmit.offer_bytes(index, bytes);
    }
}
