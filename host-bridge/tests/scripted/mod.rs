//! What stands around the bridge, scripted.
//!
//! - [`process`]: the bridge itself, started as its users start it;
//! - [`vmm`] and [`doorbell`]: the appliance's VMM, as QEMU's generic vhost-user devices and its doorbell device behave;
//! - [`agent`]: the driver of the control device in the appliance, on the rings of [`ring`];
//! - [`front_end`]: the driver VM's VMM;
//! - [`channels`]: the channels beside the main one, and what a back-end is told that takes over.
//!
//! A [`Scene`] has all of them but the front-end, up to the point where a front-end may connect.

pub(crate) mod agent;
pub(crate) mod channels;
pub(crate) mod doorbell;
pub(crate) mod front_end;
pub(crate) mod process;
pub(crate) mod ring;
pub(crate) mod vmm;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vvu_protocol::control::{Handle, Status};
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest};

use agent::Agent;
use front_end::FrontEnd;
use process::Bridge;
use vmm::Vmm;

/// How long any event may take. Nothing here takes longer than milliseconds unless the machine is very busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Number of queues of the device in a scene.
pub(crate) const QUEUES: u16 = 2;

/// Driver memory that the window of a scene is made for, in bytes.
pub(crate) const WINDOW_LEN: u64 = 64 << 20;

/// What the protocol features of a session are in most stories.
pub(crate) const PROTOCOL: ProtocolFeatures =
    ProtocolFeatures::REPLY_ACK.union(ProtocolFeatures::MQ).union(ProtocolFeatures::CONFIG);

/// Waits for `event`; `what` says in the failure what did not come.
pub(crate) async fn within<T>(what: &str, event: impl Future<Output = T>) -> T {
    within_limit(PATIENCE, what, event).await
}

/// Waits for `event` for as long as `limit`.
pub(crate) async fn within_limit<T>(limit: Duration, what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, event).await {
        Ok(value) => value,
        Err(_) => panic!("waited {limit:?} for {what}"),
    }
}

/// What happened around the bridge, in the order in which it happened.
#[derive(Debug, Clone, Default)]
pub(crate) struct Journal(Arc<Mutex<Vec<String>>>);

impl Journal {
    pub(crate) fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    /// All notes since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A memory file as VMMs make them: a memfd that cannot shrink.
pub(crate) fn memory_file(len: u64) -> OwnedFd {
    let file = unsealed_memory_file(len);
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    file
}

pub(crate) fn unsealed_memory_file(len: u64) -> OwnedFd {
    let file = memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, len).unwrap();
    file
}

/// Device and inode of a file.
pub(crate) fn identity(file: impl AsFd) -> (u64, u64) {
    let status = rustix::fs::fstat(file).unwrap();
    (status.st_dev, status.st_ino)
}

/// A bridge with its appliance.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) bridge: Bridge,
    pub(crate) vmm: Vmm,
    pub(crate) agent: Agent,
    /// Number of the appliance, as the bridge counts them.
    pub(crate) number: u32,
    pub(crate) journal: Journal,
}

impl Scene {
    /// The appliance has booted, and its back-end is up.
    pub(crate) async fn ready() -> Self {
        let bridge = Bridge::start().await;
        Self::around(bridge).await
    }

    /// The same around a bridge with options of its own.
    pub(crate) async fn around(mut bridge: Bridge) -> Self {
        let journal = Journal::default();
        let vmm = Vmm::connect(bridge.directory(), journal.clone()).await;
        let agent = Agent::boot(&vmm).await;
        agent.set_status(Status::BACK_END_UP).await;
        bridge.notified("READY=1").await;
        bridge.notified("STATUS=ready for a front-end").await;
        Self { bridge, vmm, agent, number: 1, journal }
    }

    /// An appliance boots as far as its agent; it is the last that the bridge has counted.
    pub(crate) async fn boot_appliance(&self) -> (Vmm, Agent) {
        let vmm = Vmm::connect(self.bridge.directory(), self.journal.clone()).await;
        let agent = Agent::boot(&vmm).await;
        (vmm, agent)
    }

    /// The next appliance is the one at work from now on. It has booted, and its back-end is up.
    pub(crate) async fn next_appliance(&mut self) {
        let (vmm, agent) = self.boot_appliance().await;
        self.agent = agent;
        self.vmm = vmm;
        self.number += 1;
        self.agent.set_status(Status::BACK_END_UP).await;
    }

    /// The appliance is dropped for this reason. The front-end notices nothing, and has the next appliance.
    pub(crate) async fn is_dropped(&mut self, reason: &str, front_end: &FrontEnd) {
        self.bridge.drops(self.number, reason).await;
        self.next_appliance().await;
        self.agent.sees_front_end().await;
        assert!(!front_end.has_message(), "the front-end has noticed");
    }

    /// A scene with a front-end that has negotiated [`PROTOCOL`].
    pub(crate) async fn connected() -> (Self, FrontEnd) {
        let mut scene = Self::ready().await;
        let front_end = scene.connect_front_end().await;
        (scene, front_end)
    }

    /// The next front-end connects, and negotiates [`PROTOCOL`] with a back-end that has every feature.
    pub(crate) async fn connect_front_end(&mut self) -> FrontEnd {
        let mut front_end = self.new_front_end();
        self.agent.sees_front_end().await;
        // What was said of earlier ones is out of the way.
        self.bridge.notified("STATUS=front-end connected").await;
        self.negotiate(&mut front_end).await;
        self.journal.take();
        front_end
    }

    /// A front-end connects; whether it is taken on remains to be seen.
    pub(crate) fn new_front_end(&self) -> FrontEnd {
        FrontEnd::connect(&self.bridge.front_end_path(), self.journal.clone())
    }

    pub(crate) async fn negotiate(&mut self, front_end: &mut FrontEnd) {
        let agent = &mut self.agent;
        exchange(front_end, agent, FrontEndRequest::GetFeatures, FrontEndReply::Number(u64::MAX)).await;
        // Without INFLIGHT_SHMFD, which the bridge would use by itself.
        let protocol = ProtocolFeatures::all().difference(ProtocolFeatures::INFLIGHT_SHMFD).bits();
        exchange(front_end, agent, FrontEndRequest::GetProtocolFeatures, FrontEndReply::Number(protocol)).await;
        front_end.send(FrontEndRequest::SetProtocolFeatures(PROTOCOL), false).await;
        agent.request().await;
        agent.answer(FrontEndReply::Acknowledgement(0)).await;
    }

    /// A front-end can use the device from beginning to end: nothing that was before has left a trace. Answers how many
    /// descriptors the bridge has open meanwhile.
    pub(crate) async fn proves_alive(&mut self) -> usize {
        let mut front_end = self.connect_front_end().await;
        let memory = front_end::DriverMemory::new(8 << 20);
        told(&mut front_end, &mut self.agent, memory.pc_table()).await;
        let descriptor_count = self.bridge.descriptor_count();
        self.end_session(front_end).await;
        assert!(self.vmm.driver_mappings().is_empty(), "driver memory is still mapped");
        descriptor_count
    }

    /// The front-end closes its socket; the agent clears the session away, and has a back-end again.
    pub(crate) async fn end_session(&mut self, front_end: FrontEnd) {
        drop(front_end);
        self.clear_away().await;
    }

    /// The appliance's control device starts again after a reset, with an agent that knows nothing but the configuration
    /// space; the last front-end is gone from it.
    pub(crate) async fn reboot_agent(&mut self) {
        let session = self.agent.session;
        self.agent = Agent::start_control(&self.vmm).await;
        self.agent.session = session;
        if !self.agent.config().await.status.is_empty() {
            self.agent.sees_end().await;
        }
    }

    /// The agent sees the end of the session, and has a back-end again; the bridge is ready for a front-end.
    pub(crate) async fn clear_away(&mut self) {
        self.agent.sees_end().await;
        self.agent.set_status(Status::BACK_END_UP).await;
        self.bridge.notified("STATUS=ready for a front-end").await;
    }
}

/// The front-end asks, with the flag "need reply"; the agent answers. What the agent saw, and what the front-end got.
pub(crate) async fn exchange(
    front_end: &mut FrontEnd,
    agent: &mut Agent,
    request: FrontEndRequest<OwnedFd>,
    answer: FrontEndReply<Handle>,
) -> (FrontEndRequest<Handle>, FrontEndReply<OwnedFd>) {
    let code = request.code();
    front_end.send(request, true).await;
    let seen = agent.request().await;
    assert_eq!(seen.code(), code, "the agent was asked something else");
    agent.answer(answer).await;
    (seen, front_end.reply(code).await)
}

/// [`exchange`] of a request that the agent answers with "done", and so does the bridge.
pub(crate) async fn told(
    front_end: &mut FrontEnd,
    agent: &mut Agent,
    request: FrontEndRequest<OwnedFd>,
) -> FrontEndRequest<Handle> {
    let (seen, reply) = exchange(front_end, agent, request, FrontEndReply::Acknowledgement(0)).await;
    assert!(matches!(reply, FrontEndReply::Acknowledgement(0)), "{seen:?} was answered with {reply:?}");
    seen
}
