//! What each test starts with: a device set, its bridge, its window, and a back-end.

use std::fs::File;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinSet, LocalSet};
use vvu_agent::doorbell::Doorbell;
use vvu_agent::process::{BackEndProcess, BackEndProgram};
use vvu_agent::reaper::{Reaper, Scope};
use vvu_agent::session::{DeviceSet, DeviceSetError};
use vvu_agent::supervisor::Supervisor;
use vvu_agent::uuid::Uuid;
use vvu_agent::window::WindowNode;
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::carriage::OWN_PROTOCOL_FEATURES;
use vvu_protocol::control::Handle;
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{ConfigSpace, FrontEndReply, FrontEndRequest, VringAddresses, VringFile, VringState};
use vvu_protocol::window::MEMORY_OFFSET;
use vvu_socket::event::Event;

use crate::back_end::{Script, program, program_with};
use crate::bridge::{Bridge, Eventfds, Port};

pub(crate) type Request = FrontEndRequest<Handle>;
pub(crate) type Reply = FrontEndReply<Handle>;

pub(crate) const WINDOW_LEN: u64 = MEMORY_OFFSET.0 + (64 << 20);
pub(crate) const DONE: Reply = FrontEndReply::Acknowledgement(0);

/// Where the first region of driver memory lies in the file that stands for the node, in bytes.
pub(crate) const MEMORY_IN_NODE: u64 = MEMORY_OFFSET.0 - NODE_OFFSET;

/// After this, what is awaited will not come.
const LIMIT: Duration = Duration::from_secs(60);

/// What a story has to do with.
pub(crate) struct Stage {
    pub(crate) bridge: Bridge,
    pub(crate) eventfds: Eventfds,
    /// The node: the window without its header.
    pub(crate) window: File,
    /// Where the back-end has its socket and its journal.
    pub(crate) directory: PathBuf,
}

pub(crate) type Story<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Runs a device set with a back-end that keeps to `script`, until the story is over.
pub(crate) fn play(script: Script, story: impl FnOnce(&Stage) -> Story<'_>) {
    play_with(&format!("{script:?}"), |directory| program(script, directory), story);
}

/// As [`play`], until the device set ends: it has to, before the story is over.
pub(crate) fn play_to_the_end(script: Script, story: impl FnOnce(&Stage) -> Story<'_>) -> DeviceSetError {
    let ended = run(&format!("{script:?}"), |directory| program(script, directory), |stages| story(&stages[0]));
    ended.expect("the device set has not ended")
}

/// Runs a device set with a back-end program whose socket is in the directory that is given, until the story is over.
pub(crate) fn play_with(
    name: &str,
    program: impl FnOnce(&Path) -> BackEndProgram,
    story: impl FnOnce(&Stage) -> Story<'_>,
) {
    if let Some(error) = run(name, program, |stages| story(&stages[0])) {
        panic!("device set ended: {error:?}");
    }
}

/// Runs two device sets with one back-end that keeps to `script`, until the story is over or one of them ends.
pub(crate) fn play_two(script: Script, story: impl FnOnce(&[Stage]) -> Story<'_>) -> Option<DeviceSetError> {
    run(&format!("{script:?}"), |directory| program_with(script, directory, &["a.sock", "b.sock"]), story)
}

/// Runs a device set for each socket of a program.
fn run(
    name: &str,
    program: impl FnOnce(&Path) -> BackEndProgram,
    story: impl FnOnce(&[Stage]) -> Story<'_>,
) -> Option<DeviceSetError> {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let (reaper, reaper_task) = Reaper::new(Scope::OwnChildren).unwrap();
        let program = program(directory.path());
        let sockets = program.sockets.clone();
        let process = BackEndProcess::new(program, reaper);
        let (mut serving, mut stages) = (JoinSet::new(), Vec::new());
        for (index, socket) in (0..).zip(sockets) {
            let (mut set, stage) = set_up(&format!("{name}-{index}"), index, &process, socket, directory.path());
            serving.spawn_local(async move { set.serve().await.err() });
            stages.push(stage);
        }
        drop(process);
        let started = Instant::now();
        tokio::select! {
            () = story(&stages) => None,
            ended = serving.join_next() => ended.unwrap().unwrap(),
            ended = reaper_task.run() => panic!("reaper ended: {ended:?}"),
            () = past(started) => panic!("what is awaited does not come"),
        }
    })
}

fn set_up(
    name: &str,
    index: u8,
    process: &BackEndProcess,
    socket: PathBuf,
    directory: &Path,
) -> (DeviceSet<Port, Eventfds>, Stage) {
    // The window as the agent sees it starts behind its header.
    let window = rustix::fs::memfd_create(format!("window-{name}").as_str(), rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&window, WINDOW_LEN - NODE_OFFSET).unwrap();
    let file: Arc<OwnedFd> = Arc::new(window.try_clone().unwrap());
    let supervisor = Supervisor::new(process.clone(), socket, &file).unwrap();
    let (bridge, port) = Bridge::new(WINDOW_LEN);
    let eventfds = Eventfds::new();
    let window_of_set = WindowNode { file, len: WINDOW_LEN };
    let set = DeviceSet::new(Uuid([7 + index; 16]), port, eventfds.clone(), window_of_set, supervisor);
    (set, Stage { bridge, eventfds, window: window.into(), directory: directory.to_owned() })
}

/// Waits for the limit by a clock that stories cannot wind forward.
async fn past(started: Instant) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        std::thread::sleep(LIMIT.saturating_sub(started.elapsed()));
        sender.send(())
    });
    receiver.await.unwrap();
}

impl Stage {
    pub(crate) async fn ask(&self, request: Request) -> Reply {
        self.bridge.ask(request).await
    }

    /// Asks, and insists on success.
    pub(crate) async fn done(&self, request: Request) {
        let name = request.name();
        assert_eq!(self.ask(request).await, DONE, "{name}");
    }

    /// Asks, and insists on the agent's refusal; the session goes on.
    pub(crate) async fn refused(&self, request: Request) {
        let (code, name) = (request.code(), request.name());
        self.bridge.send(request);
        let answer = self.bridge.frame().await.message;
        assert_eq!(answer, Reply::refusal(code).encode(code), "{name}");
    }

    /// A front-end comes, and features are negotiated: all that the back-end offers, and what the bridge offers by itself.
    pub(crate) async fn connect_and_negotiate(&self) -> ProtocolFeatures {
        self.bridge.connect().await;
        let FrontEndReply::Number(features) = self.ask(Request::GetFeatures).await else { panic!("no features") };
        let offered = self.ask(Request::GetProtocolFeatures).await;
        let FrontEndReply::Number(bits) = offered else { panic!("{offered:?}") };
        let offered = ProtocolFeatures::from_bits_retain(bits);
        self.done(Request::SetProtocolFeatures(offered | OWN_PROTOCOL_FEATURES)).await;
        self.done(Request::SetOwner).await;
        let features = Features::from_bits_retain(features).difference(Features::LOG_ALL);
        self.done(Request::SetFeatures(features)).await;
        offered
    }

    /// What the back-end has been told since the last call: one line for each message.
    pub(crate) fn journal(&self) -> Vec<String> {
        let journal = self.directory.join("journal");
        let lines = std::fs::read_to_string(&journal).unwrap_or_default();
        std::fs::write(journal, "").unwrap();
        lines.lines().map(str::to_owned).collect()
    }

    /// What the back-end signals by the call eventfd of [`start_sequence`].
    pub(crate) fn called(&self) -> Event {
        let eventfd = self.eventfds.clone().peer(PeerId(2)).unwrap();
        Event::new(eventfd.try_clone().unwrap()).unwrap()
    }
}

pub(crate) fn region(guest: u64, size: u64, user: u64, window: u64) -> (MemoryRegion, Handle) {
    let region = MemoryRegion {
        guest_address: GuestAddress(guest),
        size,
        user_address: UserAddress(user),
        mmap_offset: FileOffset(window),
    };
    (region, Handle::Window)
}

pub(crate) fn state(num: u32) -> VringState {
    VringState { index: 0, num }
}

pub(crate) fn file(handle: Handle) -> VringFile<Handle> {
    VringFile { index: 0, descriptor: Some(handle) }
}

pub(crate) const ADDRESSES: VringAddresses =
    VringAddresses { index: 0, flags: 0, descriptors: 0x1000, used: 0x3000, available: 0x2000, log: 0 };

/// As QEMU starts a device, with a hole in driver memory, and the answer to each request.
pub(crate) fn start_sequence() -> Vec<(Request, Reply)> {
    use FrontEndRequest as R;
    let features = Features::VERSION_1 | Features::PROTOCOL_FEATURES;
    let config = ConfigSpace { offset: 0, flags: 0, bytes: vec![5; 60] };
    let start = MEMORY_OFFSET.0;
    let table = vec![
        region(0, 0xa_0000, 0x7f00_0000_0000, start),
        region(0xc_0000, (8 << 20) - 0xc_0000, 0x7f00_000c_0000, start + 0xc_0000),
        region(0x1_0000_0000, 4 << 20, 0x7f00_0080_0000, start + (8 << 20)),
    ];
    vec![
        (R::SetProtocolFeatures(ProtocolFeatures::empty()), DONE),
        (R::SetOwner, DONE),
        (R::SetVringCall(file(Handle::Peer(PeerId(2)))), DONE),
        (R::SetVringErr(file(Handle::Peer(PeerId(3)))), DONE),
        (R::GetConfig(config.clone()), FrontEndReply::Config(Some(config))),
        (R::SetFeatures(features), DONE),
        (R::SetMemTable(table), DONE),
        (R::SetVringNum(state(128)), DONE),
        (R::SetVringBase(state(0)), DONE),
        (R::SetVringAddr(ADDRESSES), DONE),
        (R::SetVringKick(file(Handle::Vector(Vector(1)))), DONE),
        (R::SetVringCall(VringFile { index: 0, descriptor: None }), DONE),
        (R::SetVringCall(file(Handle::Peer(PeerId(2)))), DONE),
        (R::SetVringEnable(state(1)), DONE),
    ]
}

pub(crate) async fn start(stage: &Stage) {
    // The answers are the back-end's own.
    for request in [Request::GetFeatures, Request::GetProtocolFeatures] {
        assert!(matches!(stage.ask(request).await, FrontEndReply::Number(_)));
    }
    for (request, answer) in start_sequence() {
        let name = request.name();
        assert_eq!(stage.ask(request).await, answer, "{name}");
    }
}

pub(crate) async fn process_id(stage: &Stage) -> u64 {
    match stage.ask(Request::GetQueueNum).await {
        FrontEndReply::Number(id) => id,
        other => panic!("{other:?}"),
    }
}
