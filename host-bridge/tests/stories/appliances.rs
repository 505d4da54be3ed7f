//! Appliances come and go; the front-end stays, or goes when it wants to.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStdout, Command};
use vvu_protocol::control::Status;
use vvu_protocol::doorbell::Vector;
use vvu_protocol::message::{ConfigSpace, FrontEndReply, FrontEndRequest, VringState};
use vvu_socket::event;

use crate::scripted::front_end::{DriverMemory, vring_file};
use crate::scripted::process::Bridge;
use crate::scripted::{Scene, told, within};

use FrontEndRequest as R;

const SET_OWNER: u32 = 3;
const NET_SET_MTU: u32 = 20;

/// The phases in which an appliance can die that is to be the next one.
#[derive(Debug, Clone, Copy)]
enum Phase {
    BeforeItHasAnAgent,
    BeforeItHasABackEnd,
    Ready,
    Replay,
    Request,
    Clearing,
}

/// Appliances die in one phase after the other; the front-end, whose request waits all the time, gets one answer from the last
/// one.
#[tokio::test]
async fn an_appliance_may_die_at_any_time() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let memory = DriverMemory::new(8 << 20);
    told(&mut front_end, &mut scene.agent, memory.whole()).await;
    front_end.send(R::NetSetMtu(1500), true).await;
    scene.agent.request().await;
    scene.vmm.dies();
    scene.bridge.drops(1, "closed the").await;
    use Phase as P;
    let phases = [P::BeforeItHasAnAgent, P::BeforeItHasABackEnd, P::Ready, P::Replay, P::Request, P::Clearing];
    for phase in phases {
        let (vmm, mut agent) = scene.boot_appliance().await;
        scene.number += 1;
        if !matches!(phase, Phase::BeforeItHasAnAgent | Phase::BeforeItHasABackEnd) {
            agent.set_status(Status::BACK_END_UP).await;
        }
        match phase {
            Phase::BeforeItHasAnAgent => vmm.control.stop().await,
            Phase::BeforeItHasABackEnd | Phase::Ready => {}
            Phase::Replay => {
                agent.sees_front_end().await;
                agent.request().await;
            }
            Phase::Request => {
                agent.sees_front_end().await;
                // The last one is the front-end's request itself.
                loop {
                    let request = agent.request().await;
                    match request {
                        R::NetSetMtu(_) => break,
                        R::GetFeatures | R::GetProtocolFeatures => agent.answer(FrontEndReply::Number(u64::MAX)).await,
                        _ => agent.answer(FrontEndReply::Acknowledgement(0)).await,
                    }
                }
            }
            Phase::Clearing => {
                agent.sees_front_end().await;
                agent.request().await;
                agent.set_status(Status::empty()).await;
                agent.sees_end().await;
            }
        }
        vmm.dies();
        scene.bridge.drops(scene.number, "closed the").await;
        assert!(!front_end.has_message(), "{phase:?}: the front-end has noticed");
    }
    scene.next_appliance().await;
    scene.agent.sees_front_end().await;
    scene.agent.answers_replay_until(NET_SET_MTU).await;
    assert_eq!(front_end.acknowledgement(NET_SET_MTU).await, 0);
    scene.vmm.fence().await;
    assert!(!front_end.has_message() && !scene.agent.has_frame(), "answered twice");
    assert_eq!(scene.vmm.lists(memory.identity()), 1);
    scene.end_session(front_end).await;
    scene.proves_alive().await;
}

/// A request that the front-end makes while there is no appliance is read when there is one, and answered once. So are those
/// behind it.
#[tokio::test]
async fn requests_wait_for_an_appliance() {
    let (mut scene, mut front_end) = Scene::connected().await;
    scene.vmm.dies();
    scene.bridge.notified("STATUS=front-end connected, waiting for the appliance's VMM").await;
    for _ in 0..3 {
        front_end.send(R::SetOwner, true).await;
    }
    front_end.send(R::NetSetMtu(1500), true).await;
    scene.next_appliance().await;
    scene.agent.sees_front_end().await;
    let asked = scene.agent.answers_replay_until(NET_SET_MTU).await;
    assert_eq!(asked.iter().filter(|(request, _)| *request == R::SetOwner).count(), 3, "{asked:?}");
    for _ in 0..3 {
        assert_eq!(front_end.acknowledgement(SET_OWNER).await, 0);
    }
    assert_eq!(front_end.acknowledgement(NET_SET_MTU).await, 0);
    scene.vmm.fence().await;
    assert!(!front_end.has_message() && !scene.agent.has_frame());
}

/// The front-end hangs up while there is nobody to serve it: the session ends at once, and the next front-end finds the device as
/// good as new.
#[tokio::test]
async fn a_front_end_may_end_while_it_waits() {
    // Without an appliance, then with one that boots.
    for boots in [false, true] {
        let (mut scene, mut front_end) = Scene::connected().await;
        told(&mut front_end, &mut scene.agent, DriverMemory::new(8 << 20).whole()).await;
        scene.vmm.dies();
        scene.bridge.drops(1, "closed the").await;
        if boots {
            (scene.vmm, scene.agent) = scene.boot_appliance().await;
        }
        // Requests that nobody has read do not hide it.
        front_end.send(R::SetOwner, false).await;
        drop(front_end);
        scene.bridge.says(&["front-end disconnected"]).await;
        if !boots {
            (scene.vmm, scene.agent) = scene.boot_appliance().await;
        }
        scene.agent.set_status(Status::BACK_END_UP).await;
        scene.bridge.notified("STATUS=ready for a front-end").await;
        scene.proves_alive().await;
    }
}

/// The same while the appliance clears the last session away: what the back-end was told of stays mapped until it has.
#[tokio::test]
async fn a_front_end_may_end_while_its_session_is_cleared_away() {
    let (mut scene, mut front_end) = Scene::connected().await;
    told(&mut front_end, &mut scene.agent, DriverMemory::new(8 << 20).whole()).await;
    scene.agent.set_status(Status::empty()).await;
    scene.agent.sees_end().await;
    drop(front_end);
    scene.bridge.says(&["front-end disconnected"]).await;
    scene.vmm.fence().await;
    assert_eq!(scene.vmm.driver_mappings().len(), 1);
    scene.agent.set_status(Status::BACK_END_UP).await;
    scene.bridge.notified("STATUS=ready for a front-end").await;
    assert_eq!(scene.vmm.driver_mappings(), []);
    scene.proves_alive().await;
}

/// The same in the middle of a replay.
#[tokio::test]
async fn a_front_end_may_end_in_a_replay() {
    let (mut scene, mut front_end) = Scene::connected().await;
    told(&mut front_end, &mut scene.agent, DriverMemory::new(8 << 20).whole()).await;
    told(&mut front_end, &mut scene.agent, R::NetSetMtu(1500)).await;
    scene.appliance_is_replaced().await;
    scene.agent.request().await;
    drop(front_end);
    scene.agent.answer(FrontEndReply::Number(u64::MAX)).await;
    scene.agent.answers_replay_until(NET_SET_MTU).await;
    scene.clear_away().await;
    assert_eq!(scene.vmm.driver_mappings(), []);
    scene.proves_alive().await;
}

/// A front-end that comes while there is no appliance waits until there is one. Others are turned away while one has the device,
/// whether that one is served or waits.
#[tokio::test]
async fn only_one_front_end_waits() {
    let mut scene = Scene::ready().await;
    scene.vmm.dies();
    scene.bridge.drops(1, "closed the").await;
    let front_end = scene.new_front_end();
    scene.next_appliance().await;
    scene.agent.sees_front_end().await;
    scene.vmm.dies();
    scene.bridge.notified("STATUS=front-end connected, waiting for the appliance's VMM").await;
    for _ in 0..3 {
        scene.new_front_end().sees_end().await;
    }
    scene.next_appliance().await;
    scene.agent.sees_front_end().await;
    assert!(!front_end.has_message());
    scene.end_session(front_end).await;
}

/// Two appliances at the most. A third one is turned away, as often as it tries, and nobody else notices.
#[tokio::test]
async fn a_third_appliance_is_turned_away() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (standby, agent) = scene.boot_appliance().await;
    let descriptor_count = scene.bridge.descriptor_count();
    for name in ["control.sock", "window.sock", "doorbell.sock"].repeat(20) {
        let mut third = UnixStream::connect(scene.bridge.directory().join(name)).unwrap();
        assert_eq!(third.read(&mut [0; 8]).unwrap_or(0), 0, "{name}: the bridge speaks to it");
    }
    assert_eq!(scene.bridge.descriptor_count(), descriptor_count);
    told(&mut front_end, &mut scene.agent, R::SetOwner).await;
    // The place is free again when the second one is gone.
    standby.dies();
    drop(agent);
    scene.bridge.drops(2, "closed the").await;
    scene.boot_appliance().await;
}

/// Connections that make no device set are closed after 30 seconds; one to a device that is connected already is at once. Neither
/// keeps an appliance away.
#[tokio::test]
async fn a_device_set_is_complete_in_time() {
    let bridge = Bridge::start().await;
    let since = Instant::now();
    let stranger = Stranger::connect(&bridge, "window.sock").await;
    let connect = |name| UnixStream::connect(bridge.directory().join(name)).unwrap();
    let (control, mut again) = (connect("control.sock"), connect("control.sock"));
    tokio::task::spawn_blocking(move || assert_eq!(again.read(&mut [0; 8]).unwrap_or(0), 0)).await.unwrap();
    bridge.says(&["second connection", "Control"]).await;
    drop(control);
    bridge.says(&["gone before it was there"]).await;
    let mut scene = Scene::around(bridge).await;
    assert_eq!(scene.number, 1, "only what is complete is counted");
    scene.proves_alive().await;

    scene.bridge.says_within(Duration::from_secs(60), &["not all devices have connected in 30 s"]).await;
    assert!(since.elapsed() > Duration::from_secs(29), "closed after {:?}", since.elapsed());
    stranger.sees_end().await;
    scene.proves_alive().await;
}

/// Connections of two processes are not mixed up: what one has begun is not completed by the other.
#[tokio::test]
async fn a_device_set_belongs_to_one_process() {
    let bridge = Bridge::start().await;
    let stranger = Stranger::connect(&bridge, "doorbell.sock").await;
    let mut scene = Scene::around(bridge).await;
    let mut front_end = scene.connect_front_end().await;
    let kick = event::create().unwrap();
    told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(0, Some(&kick)))).await;
    event::signal(&kick).unwrap();
    scene.vmm.doorbell.rings(Vector(0)).await;
    drop(stranger);
    scene.bridge.says(&["gone before it was there", "doorbell"]).await;
    scene.end_session(front_end).await;
    scene.proves_alive().await;
}

/// Somebody else in another process, who has connected to one socket.
struct Stranger {
    process: Child,
    output: ChildStdout,
}

impl Stranger {
    async fn connect(bridge: &Bridge, name: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "stories::appliances::stranger", "--ignored", "--nocapture"]);
        command.env("STRANGERS_SOCKET", bridge.directory().join(name));
        let mut process = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut output = process.stdout.take().unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"connected\n") {
            said.push(within("the stranger to connect", output.read_u8()).await.unwrap());
        }
        Self { process, output }
    }

    /// Its connection was closed.
    async fn sees_end(mut self) {
        within("the stranger's end", self.output.read_to_end(&mut Vec::new())).await.unwrap();
        assert!(self.process.wait().await.unwrap().success());
    }
}

#[test]
#[ignore = "another process of other stories"]
fn stranger() {
    let Some(path) = std::env::var_os("STRANGERS_SOCKET") else { return };
    let mut socket = UnixStream::connect(path).unwrap();
    println!("connected");
    let mut bytes = [0; 64];
    while socket.read(&mut bytes).unwrap_or(0) != 0 {}
}

/// A VMM that asks and reads no answers is given up after 10 seconds.
#[tokio::test]
async fn a_vmm_that_reads_nothing_is_given_up() {
    let (mut scene, front_end) = Scene::connected().await;
    let question = R::GetConfig(ConfigSpace { offset: 0, flags: 0, bytes: vec![0; 64] });
    scene.vmm.control.floods(&question.encode(false)).await;
    scene.is_dropped("takes no messages", &front_end).await;
}

/// A hundred appliances leave nothing behind in the bridge, one died at work and one replaced while it was.
#[tokio::test]
async fn a_hundred_appliances_leave_nothing_behind() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let memory = DriverMemory::new(8 << 20);
    told(&mut front_end, &mut scene.agent, memory.whole()).await;
    let (kick, call) = (event::create().unwrap(), event::create().unwrap());
    for request in [
        R::SetVringNum(VringState { index: 0, num: 256 }),
        R::SetVringCall(vring_file(0, Some(&call))),
        R::SetVringKick(vring_file(0, Some(&kick))),
    ] {
        told(&mut front_end, &mut scene.agent, request).await;
    }
    let mut counts = Vec::new();
    for _ in 0..50 {
        scene.appliance_is_replaced().await;
        scene.replay(&front_end).await;
        scene.bridge.notified(&format!("X_VVU_APPLIANCE_LOST={}", scene.number - 1)).await;
        scene.vmm.fence().await;
        counts.push((scene.bridge.descriptor_count(), scene.bridge.mapped_files().len()));

        let (vmm, mut agent) = scene.boot_appliance().await;
        agent.set_status(Status::BACK_END_UP).await;
        assert!(matches!(scene.agent.request().await, R::GetVringBase(_)));
        scene.agent.answer(FrontEndReply::VringState(VringState { index: 0, num: 1 })).await;
        agent.sees_front_end().await;
        std::mem::swap(&mut scene.agent, &mut agent);
        scene.replay(&front_end).await;
        agent.sees_end().await;
        agent.set_status(Status::BACK_END_UP).await;
        scene.bridge.notified(&format!("X_VVU_APPLIANCE_LOST={}", scene.number)).await;
        (scene.vmm, scene.number) = (vmm, scene.number + 1);
        scene.vmm.fence().await;
        counts.push((scene.bridge.descriptor_count(), scene.bridge.mapped_files().len()));
    }
    assert_eq!(scene.number, 101);
    assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");
}

/// The bridge ends when it is told to, whether there is an appliance or not, and leaves no socket.
#[tokio::test]
async fn it_ends_in_order_without_an_appliance() {
    let (mut scene, mut front_end) = Scene::connected().await;
    scene.vmm.dies();
    scene.bridge.drops(1, "closed the").await;
    scene.bridge.signal(rustix::process::Signal::TERM);
    front_end.sees_end().await;
    let (ended, directory) = scene.bridge.ended_with_directory().await;
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    assert_eq!(Bridge::files(directory.path()), ["notify.sock"]);
}
