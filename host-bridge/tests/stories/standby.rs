//! A second appliance that boots while the first one serves, and takes its place.

use std::os::fd::OwnedFd;

use vvu_protocol::control::Status;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, VringAddresses, VringState};
use vvu_socket::event::{self, Event};

use crate::scripted::agent::Agent;
use crate::scripted::front_end::{DriverMemory, FrontEnd, USER_BASE, vring_file};
use crate::scripted::vmm::Vmm;
use crate::scripted::{Scene, told, within};

use FrontEndReply as A;
use FrontEndRequest as R;

const SET_OWNER: u32 = 3;
const SET_STATUS: u32 = 39;
const CALL: PeerId = PeerId(1);

const fn state(index: u32, num: u32) -> VringState {
    VringState { index, num }
}

/// A front-end with a disk at work: memory, and one vring that is started. The last request that it has made is SET_STATUS, so
/// a replay ends with it.
struct Disk {
    front_end: FrontEnd,
    memory: DriverMemory,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Disk {
    async fn start(scene: &mut Scene, mut front_end: FrontEnd) -> Self {
        let (memory, kick, call) = (DriverMemory::new(8 << 20), event::create().unwrap(), event::create().unwrap());
        let (descriptors, available, used) = (USER_BASE, USER_BASE + 0x1000, USER_BASE + 0x2000);
        let addresses = VringAddresses { index: 0, flags: 0, descriptors, used, available, log: 0 };
        for request in [
            R::SetOwner,
            memory.whole(),
            R::SetVringNum(state(0, 256)),
            R::SetVringBase(state(0, 0)),
            R::SetVringAddr(addresses),
            R::SetVringCall(vring_file(0, Some(&call))),
            R::SetVringKick(vring_file(0, Some(&kick))),
            R::SetVringEnable(state(0, 1)),
            R::SetStatus(15),
        ] {
            told(&mut front_end, &mut scene.agent, request).await;
        }
        Self { front_end, memory, kick, call }
    }

    /// Kicks and calls go between the front-end and this appliance.
    async fn works_with(&mut self, vmm: &Vmm, agent: &mut Agent) {
        assert!(!self.front_end.has_message(), "the front-end has noticed");
        vmm.fence().await;
        vmm.doorbell.has_rung(Vector(0));
        event::take(&self.call).unwrap();
        event::signal(&self.kick).unwrap();
        vmm.doorbell.rings(Vector(0)).await;
        vmm.doorbell.ring(CALL);
        let call = Event::new(self.call.try_clone().unwrap()).unwrap();
        within("a call", call.signalled()).await.unwrap();
        told(&mut self.front_end, agent, R::SetOwner).await;
        assert_eq!(vmm.lists(self.memory.identity()), 1);
    }
}

/// A scene with a disk at work, and an appliance that has booted beside the first one.
async fn disk_and_standby() -> (Scene, Disk, Vmm, Agent) {
    let (mut scene, front_end) = Scene::connected().await;
    let disk = Disk::start(&mut scene, front_end).await;
    let (vmm, agent) = scene.boot_appliance().await;
    (scene, disk, vmm, agent)
}

/// The agent answers the stop of vring 0 with this position.
async fn is_drained(agent: &mut Agent, position: u32) {
    assert_eq!(agent.request().await, R::GetVringBase(state(0, 0)));
    agent.answer(A::VringState(state(0, position))).await;
}

/// The agent answers a whole replay, and says which position of vring 0 was in it. `None` if it was to find out by itself.
async fn is_told(agent: &mut Agent) -> Option<u32> {
    agent.sees_front_end().await;
    let replayed = agent.answers_replay_until(SET_STATUS).await;
    let base = replayed.iter().find_map(|(request, is_resumed)| match request {
        R::SetVringBase(base) => Some((!is_resumed).then_some(base.num)),
        _ => None,
    });
    base.expect("SET_VRING_BASE was replayed")
}

/// Answers the number behind `key` in the next notification that has it.
async fn announced(scene: &mut Scene, key: &str) -> (String, u64) {
    loop {
        let notification = scene.bridge.notification().await;
        if let Some(value) = notification.lines().find_map(|line| line.strip_prefix(key)) {
            return (notification.clone(), value.parse().unwrap());
        }
    }
}

/// The standby takes over as soon as its back-end is up: the vrings of the first appliance are stopped before the second
/// one hears of anything, and go on there where they stood. Then the first one clears away, and is dropped.
#[tokio::test]
async fn a_standby_takes_over_without_losing_a_step() {
    let (mut scene, mut disk, vmm, mut agent) = disk_and_standby().await;
    scene.vmm.fence().await;
    assert!(!scene.agent.has_frame(), "the first appliance is told before the second one is ready");
    assert_eq!(agent.config().await.status, Status::empty());
    agent.set_status(Status::BACK_END_UP).await;

    assert_eq!(scene.agent.request().await, R::GetVringBase(state(0, 0)));
    vmm.fence().await;
    assert_eq!(agent.config().await.status, Status::BACK_END_UP, "attached before the vrings were stopped");
    assert_eq!(vmm.driver_mappings(), []);
    scene.agent.answer(A::VringState(state(0, 4711))).await;
    assert_eq!(is_told(&mut agent).await, Some(4711));
    let (notification, pause) = announced(&mut scene, "X_VVU_PAUSE_US=").await;
    assert!(notification.lines().any(|line| line == "X_VVU_APPLIANCE_ACTIVE=2"), "{notification}");
    assert!((1..30_000_000).contains(&pause), "{pause} us");
    disk.works_with(&vmm, &mut agent).await;

    // The first one has all it had until it says that nobody uses it any more.
    let config = scene.agent.sees_end().await;
    assert_eq!((config.status, config.session), (Status::empty(), 1));
    assert_eq!(scene.vmm.driver_mappings().len(), 1);
    scene.vmm.doorbell.ring(CALL);
    scene.vmm.fence().await;
    assert_eq!(event::take(&disk.call).unwrap(), None, "a call of an appliance that is not in use");
    scene.agent.set_status(Status::BACK_END_UP).await;
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 1);
    assert_eq!(scene.vmm.driver_mappings(), []);
    disk.works_with(&vmm, &mut agent).await;
    drop(disk);
    agent.sees_end().await;
}

/// A request of the front-end is under way when the standby is ready: it is answered first, by the appliance that has it.
#[tokio::test]
async fn a_request_under_way_is_done_before_the_switch() {
    let (mut scene, mut disk, _vmm, mut agent) = disk_and_standby().await;
    disk.front_end.send(R::SetOwner, true).await;
    scene.agent.request().await;
    agent.set_status(Status::BACK_END_UP).await;
    scene.vmm.fence().await;
    assert!(!scene.agent.has_frame());
    scene.agent.answer(A::Acknowledgement(0)).await;
    assert_eq!(disk.front_end.acknowledgement(SET_OWNER).await, 0);
    is_drained(&mut scene.agent, 3).await;
    assert_eq!(is_told(&mut agent).await, Some(3));
    // What the front-end has sent meanwhile is for the standby.
    disk.front_end.send(R::SetOwner, true).await;
    assert_eq!(agent.obliges().await, R::SetOwner);
    assert_eq!(disk.front_end.acknowledgement(SET_OWNER).await, 0);
}

/// Without a front-end the standby takes over at once, and the next front-end gets it.
#[tokio::test]
async fn a_standby_takes_over_before_the_first_front_end() {
    let mut scene = Scene::ready().await;
    scene.next_appliance().await;
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 1);
    let (notification, number) = announced(&mut scene, "X_VVU_APPLIANCE_ACTIVE=").await;
    assert_eq!((notification.as_str(), number), ("X_VVU_APPLIANCE_ACTIVE=2\n", 2), "nobody was moved");
    scene.proves_alive().await;
}

/// Two switches, one after the other. Every appliance has eventfds and mappings of its own.
#[tokio::test]
async fn appliances_take_over_from_one_another() {
    let (mut scene, front_end) = Scene::connected().await;
    let mut disk = Disk::start(&mut scene, front_end).await;
    let mut retired = Vec::new();
    for number in 2..5 {
        let (vmm, mut agent) = scene.boot_appliance().await;
        agent.set_status(Status::BACK_END_UP).await;
        is_drained(&mut scene.agent, number * 1000).await;
        assert_eq!(is_told(&mut agent).await, Some(number * 1000));
        disk.works_with(&vmm, &mut agent).await;
        assert_eq!(agent.session, number);
        scene.agent.sees_end().await;
        scene.agent.set_status(Status::BACK_END_UP).await;
        assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, u64::from(number) - 1);
        assert_eq!(scene.vmm.driver_mappings(), []);
        retired.push(std::mem::replace(&mut scene.vmm, vmm));
        scene.agent = agent;
        for vmm in &retired {
            vmm.doorbell.ring(CALL);
        }
        disk.works_with(&scene.vmm, &mut scene.agent).await;
        assert!(retired.iter().all(|vmm| !vmm.doorbell.has_rung(Vector(0))), "a kick for an appliance that is gone");
    }
}

/// The next switch comes before the last one's appliance has cleared away: that one is dropped at once.
#[tokio::test]
async fn an_appliance_that_retires_slowly_holds_nobody_up() {
    let (mut scene, front_end) = Scene::connected().await;
    let _disk = Disk::start(&mut scene, front_end).await;
    let mut retiring = Vec::new();
    for (key, number) in [("X_VVU_APPLIANCE_ACTIVE=", 2), ("X_VVU_APPLIANCE_LOST=", 1)] {
        let (vmm, mut agent) = scene.boot_appliance().await;
        agent.set_status(Status::BACK_END_UP).await;
        is_drained(&mut scene.agent, 1).await;
        is_told(&mut agent).await;
        retiring.push((std::mem::replace(&mut scene.vmm, vmm), std::mem::replace(&mut scene.agent, agent)));
        assert_eq!(announced(&mut scene, key).await.1, number);
    }
    let (_, agent) = &retiring[1];
    agent.sees_end().await;
    agent.set_status(Status::BACK_END_UP).await;
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 2);
}

/// How a standby fails in the middle of its replay.
#[derive(Debug, Clone, Copy)]
enum Failure {
    Dies,
    LosesItsBackEnd,
    Refuses,
    OffersLess,
}

/// A standby that cannot take over is dropped; the first appliance, which was drained for it, serves on. The front-end notices
/// nothing.
#[tokio::test]
async fn a_standby_that_fails_changes_nothing() {
    for failure in [Failure::Dies, Failure::LosesItsBackEnd, Failure::Refuses, Failure::OffersLess] {
        let (mut scene, mut disk, vmm, mut agent) = disk_and_standby().await;
        agent.set_status(Status::BACK_END_UP).await;
        is_drained(&mut scene.agent, 77).await;
        agent.sees_front_end().await;
        assert_eq!(agent.request().await, R::GetFeatures);
        match failure {
            Failure::Dies => vmm.dies(),
            Failure::LosesItsBackEnd => agent.set_status(Status::empty()).await,
            Failure::Refuses => {
                for answer in [A::Number(u64::MAX), A::Number(u64::MAX), A::Acknowledgement(0)] {
                    agent.answer(answer).await;
                    agent.request().await;
                }
                agent.answer(A::Acknowledgement(1)).await;
            }
            Failure::OffersLess => {
                agent.answer(A::Number(u64::MAX)).await;
                agent.request().await;
                agent.answer(A::Number(0)).await;
            }
        }
        assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 2, "{failure:?}");
        let config = scene.agent.sees_end().await;
        assert_eq!((config.status, config.session), (Status::empty(), 1));
        scene.agent.set_status(Status::BACK_END_UP).await;
        is_told(&mut scene.agent).await;
        let (notification, _) = announced(&mut scene, "X_VVU_PAUSE_US=").await;
        assert!(notification.contains("X_VVU_APPLIANCE_ACTIVE=1\n"), "{failure:?}: {notification}");
        disk.works_with(&scene.vmm, &mut scene.agent).await;
    }
}

/// A standby that fails before the first appliance is drained costs nothing at all.
#[tokio::test]
async fn a_standby_that_does_not_boot_is_not_noticed() {
    let (mut scene, mut disk, vmm, agent) = disk_and_standby().await;
    vmm.dies();
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 2);
    drop(agent);
    disk.works_with(&scene.vmm, &mut scene.agent).await;
    assert_eq!(scene.agent.session, 1, "the front-end was moved");
}

/// A standby dies while the first appliance is busy with a request: there is room for the next one at once.
#[tokio::test]
async fn a_standby_may_be_replaced_during_a_request() {
    let (mut scene, mut disk, vmm, agent) = disk_and_standby().await;
    disk.front_end.send(R::SetOwner, true).await;
    scene.agent.request().await;
    vmm.dies();
    drop(agent);
    scene.vmm.fence().await;
    let (vmm, mut agent) = scene.boot_appliance().await;
    agent.set_status(Status::BACK_END_UP).await;
    scene.agent.answer(A::Acknowledgement(0)).await;
    assert_eq!(disk.front_end.acknowledgement(SET_OWNER).await, 0);
    is_drained(&mut scene.agent, 8).await;
    assert_eq!(is_told(&mut agent).await, Some(8));
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 2);
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_ACTIVE=").await.1, 3);
    disk.works_with(&vmm, &mut agent).await;
}

/// The first appliance dies instead of draining, or right after it. The standby takes over, as after any crash, or where the
/// vrings stood.
#[tokio::test]
async fn an_appliance_may_die_in_the_switch() {
    for drained in [false, true] {
        let (mut scene, mut disk, vmm, mut agent) = disk_and_standby().await;
        agent.set_status(Status::BACK_END_UP).await;
        if drained {
            is_drained(&mut scene.agent, 500).await;
            agent.sees_front_end().await;
            scene.vmm.dies();
            let replayed = agent.answers_replay_until(SET_STATUS).await;
            let is_exact = replayed.contains(&(R::SetVringBase(state(0, 500)), false));
            assert!(is_exact, "{replayed:?}");
        } else {
            scene.agent.request().await;
            scene.vmm.dies();
            assert_eq!(is_told(&mut agent).await, None);
        }
        disk.works_with(&vmm, &mut agent).await;
        scene.bridge.drops(1, "closed the").await;
    }
}

/// The back-end of the first appliance goes down instead of draining: the appliance counts as lost.
#[tokio::test]
async fn an_appliance_that_does_not_drain_is_dropped() {
    let (mut scene, mut disk, vmm, mut agent) = disk_and_standby().await;
    agent.set_status(Status::BACK_END_UP).await;
    scene.agent.request().await;
    scene.agent.set_status(Status::empty()).await;
    assert_eq!(is_told(&mut agent).await, None);
    disk.works_with(&vmm, &mut agent).await;
    scene.bridge.drops(1, "the back-end in the appliance went down").await;
    assert_eq!(scene.vmm.driver_mappings(), [], "it may still run");
}

/// The active appliance dies while the standby boots: the standby is the next one, and takes over when it is ready.
#[tokio::test]
async fn a_standby_that_boots_is_the_next_one() {
    let (mut scene, mut disk, vmm, mut agent) = disk_and_standby().await;
    scene.vmm.dies();
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 1);
    agent.set_status(Status::BACK_END_UP).await;
    assert_eq!(is_told(&mut agent).await, None);
    let (notification, _) = announced(&mut scene, "X_VVU_PAUSE_US=").await;
    assert!(notification.contains("X_VVU_APPLIANCE_ACTIVE=2\n"), "{notification}");
    disk.works_with(&vmm, &mut agent).await;
}

/// The active appliance's back-end is lost while a standby is ready. It may still be at work on the same memory and the same disk:
/// the standby waits for the agent's word that it is not.
#[tokio::test]
async fn a_standby_waits_until_nobody_works_on_the_memory() {
    let (mut scene, mut disk, vmm, mut agent) = disk_and_standby().await;
    scene.agent.set_status(Status::empty()).await;
    scene.agent.sees_end().await;
    agent.set_status(Status::BACK_END_UP).await;
    vmm.fence().await;
    scene.vmm.fence().await;
    assert_eq!(agent.config().await.status, Status::BACK_END_UP, "the standby was attached too early");
    scene.agent.set_status(Status::BACK_END_UP).await;
    assert_eq!(is_told(&mut agent).await, None);
    disk.works_with(&vmm, &mut agent).await;
    assert_eq!(scene.vmm.driver_mappings(), []);
    assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 1);
}

/// The front-end disconnects in the middle of a switch: while the first appliance is drained, and while the second one is
/// told. The device is as good as new afterwards, at one of the two.
#[tokio::test]
async fn a_front_end_may_end_in_the_switch() {
    for told_until in [None, Some(())] {
        let (mut scene, disk, vmm, mut agent) = disk_and_standby().await;
        agent.set_status(Status::BACK_END_UP).await;
        assert_eq!(scene.agent.request().await, R::GetVringBase(state(0, 0)));
        if told_until.is_none() {
            drop(disk);
            scene.agent.answer(A::VringState(state(0, 1))).await;
            is_told(&mut agent).await;
        } else {
            scene.agent.answer(A::VringState(state(0, 1))).await;
            agent.sees_front_end().await;
            drop(disk);
            agent.answers_replay_until(SET_STATUS).await;
        }
        for agent in [&agent, &scene.agent] {
            agent.sees_end().await;
            agent.set_status(Status::BACK_END_UP).await;
        }
        assert_eq!(announced(&mut scene, "X_VVU_APPLIANCE_LOST=").await.1, 1);
        (scene.vmm, scene.agent) = (vmm, agent);
        scene.proves_alive().await;
    }
}
