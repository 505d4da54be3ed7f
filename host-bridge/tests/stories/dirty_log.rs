//! The dirty log: where it is mapped, when it is replaced, and the bits of a file that ends within a page.

use std::os::fd::OwnedFd;

use rustix::io::{pread, pwrite};
use vvu_protocol::address::FileOffset;
use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::PeerId;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, LogArea, VringState};
use vvu_protocol::window::{LOG_LEN, LOG_OFFSET};
use vvu_socket::event;

use crate::scripted::front_end::FrontEnd;
use crate::scripted::{PROTOCOL, QUEUES, Scene, exchange, identity, memory_file, told, unsealed_memory_file, within};

use FrontEndReply as A;
use FrontEndRequest as R;

const MIB: u64 = 1 << 20;
const SET_LOG_BASE: u32 = 6;
const GET_VRING_BASE: u32 = 11;
const WITH_LOG: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::LOG_SHMFD);
const LOG_PEER: PeerId = PeerId(1 + 2 * QUEUES);
const STATE: VringState = VringState { index: 0, num: 0 };

async fn connected() -> (Scene, FrontEnd) {
    Scene::connected_with(WITH_LOG, WITH_LOG).await
}

fn set_log(file: &OwnedFd, size: u64, offset: u64) -> R<OwnedFd> {
    R::SetLogBase(LogArea { size, mmap_offset: FileOffset(offset) }, file.try_clone().unwrap())
}

/// The front-end sets a log, and everybody agrees. Answers where in the window it begins.
async fn logs(scene: &mut Scene, front_end: &mut FrontEnd, file: &OwnedFd, size: u64, offset: u64) -> u64 {
    let (seen, reply) = exchange(front_end, &mut scene.agent, set_log(file, size, offset), A::LogBase).await;
    assert!(matches!(reply, A::LogBase), "{reply:?}");
    let R::SetLogBase(LogArea { size: seen, mmap_offset }, Handle::Window) = seen else { panic!("{seen:?}") };
    assert_eq!(seen, size);
    mmap_offset.0
}

fn byte(file: &OwnedFd, offset: u64) -> u8 {
    let mut byte = [0];
    pread(file, &mut byte[..], offset).unwrap();
    byte[0]
}

/// The log is mapped before the back-end hears of it, the one before is unmapped when the back-end has let go of it, and both
/// have their place meanwhile. The same log again changes nothing.
#[tokio::test]
async fn a_new_log_replaces_the_old_one_in_order() {
    let (mut scene, mut front_end) = connected().await;
    let (old, new) = (memory_file(LOG_LEN / 2), memory_file(LOG_LEN / 2));
    let map = ["SHMEM_MAP asked", "SHMEM_MAP answered 0"];
    let frame = ["frame SET_LOG_BASE", "answer LogBase"];
    let unmap = ["SHMEM_UNMAP asked", "SHMEM_UNMAP answered 0"];
    let reply = ["reply LogBase"];
    let (start, end) = (LOG_OFFSET.0, LOG_OFFSET.0 + LOG_LEN / 2);
    assert_eq!(logs(&mut scene, &mut front_end, &old, LOG_LEN / 2, 0).await, start);
    assert_eq!(scene.journal.take(), [&map[..], &frame, &reply].concat());
    for (file, place) in [(&new, end), (&old, start), (&new, end)] {
        assert_eq!(logs(&mut scene, &mut front_end, file, LOG_LEN / 2, 0).await, place);
        assert_eq!(scene.journal.take(), [&map[..], &frame, &unmap, &reply].concat());
        assert_eq!(scene.vmm.driver_mappings().len(), 1);
    }
    assert_eq!(logs(&mut scene, &mut front_end, &new, LOG_LEN / 2, 0).await, end);
    assert_eq!(scene.journal.take(), [&frame[..], &reply].concat(), "the same log again");
    scene.end_session(front_end).await;
    assert_eq!(scene.vmm.driver_mappings(), [], "the log is still mapped");
}

/// A log may lie anywhere in its file: its bytes stay its bytes.
#[tokio::test]
async fn an_offset_within_the_file_is_respected() {
    let (mut scene, mut front_end) = connected().await;
    let file = memory_file(MIB);
    for (offset, page) in [(0x3000, 0x3000), (0x5208, 0x5000)] {
        let place = logs(&mut scene, &mut front_end, &file, 0x2000, offset).await;
        let maps = scene.vmm.driver_mappings();
        let [map] = maps.as_slice() else { panic!("{maps:?}") };
        assert_eq!(map.file_offset.0, page);
        assert_eq!(place - map.region_offset, offset - page);
        assert!(map.len >= 0x2000 + offset - page);
        assert_eq!(identity(scene.vmm.file_at(map.region_offset)), identity(&file));
    }
}

/// LOG_ALL is switched on and off while vrings run.
#[tokio::test]
async fn log_all_is_switched_on_and_off() {
    let (mut scene, mut front_end) = connected().await;
    let kick = event::create().unwrap();
    let file = crate::scripted::front_end::vring_file(0, Some(&kick));
    told(&mut front_end, &mut scene.agent, R::SetVringKick(file)).await;
    let log = memory_file(0x2000);
    logs(&mut scene, &mut front_end, &log, 0x2000, 0).await;
    for features in [Features::VERSION_1 | Features::LOG_ALL, Features::VERSION_1] {
        let seen = told(&mut front_end, &mut scene.agent, R::SetFeatures(features)).await;
        assert_eq!(seen, R::SetFeatures(features));
    }
}

/// QEMU maps whole pages only. Of a file that ends within one, the last bytes are a page of the bridge's in the window; what
/// back-ends set there is in the file before the front-end may look: with the answer to GET_VRING_BASE, to the end of logging and
/// to the next log. A bit that the front-end has taken does not come again.
#[tokio::test]
async fn bits_in_the_last_page_arrive_in_time() {
    let (mut scene, mut front_end) = connected().await;
    let log = memory_file(0x2abc);
    let start = logs(&mut scene, &mut front_end, &log, 0x2ab8, 0).await;
    assert_eq!(start, LOG_OFFSET.0);
    let window = |offset: u64| (start + 0x2000, offset - 0x2000);
    let set = |scene: &Scene, offset, bits: u8| {
        let (page, within) = window(offset);
        pwrite(scene.vmm.file_at(page), &[bits], within).unwrap();
    };
    assert_eq!(identity(scene.vmm.file_at(start)), identity(&log), "whole pages are the file's own");
    assert_ne!(identity(scene.vmm.file_at(start + 0x2000)), identity(&log));

    pwrite(&log, &[0b1000], 0x2010).unwrap();
    front_end.send(R::GetVringBase(STATE), false).await;
    scene.agent.request().await;
    set(&scene, 0x2010, 0b1);
    set(&scene, 0x2ab7, 0b10);
    // Behind the log.
    set(&scene, 0x2ab8, 0b111);
    scene.agent.answer(A::VringState(STATE)).await;
    front_end.reply(GET_VRING_BASE).await;
    assert_eq!([0x2010, 0x2ab7, 0x2ab8].map(|offset| byte(&log, offset)), [0b1001, 0b10, 0]);

    pwrite(&log, &[0], 0x2010).unwrap();
    set(&scene, 0x2020, 0b100);
    told(&mut front_end, &mut scene.agent, R::SetFeatures(Features::VERSION_1 | Features::LOG_ALL)).await;
    assert_eq!(byte(&log, 0x2020), 0, "logging goes on");
    told(&mut front_end, &mut scene.agent, R::SetFeatures(Features::VERSION_1)).await;
    assert_eq!([0x2010, 0x2020].map(|offset| byte(&log, offset)), [0, 0b100]);

    front_end.send(set_log(&memory_file(0x1000), 0x1000, 0), false).await;
    scene.agent.request().await;
    set(&scene, 0x2030, 0b1000);
    scene.agent.answer(A::LogBase).await;
    front_end.reply(SET_LOG_BASE).await;
    assert_eq!(byte(&log, 0x2030), 0b1000);
}

/// The same file again with another end of the log: the page for its end is another one, and the log moves with it.
#[tokio::test]
async fn a_log_that_grows_within_its_last_page_moves() {
    let (mut scene, mut front_end) = connected().await;
    let log = memory_file(0x1800);
    let first = logs(&mut scene, &mut front_end, &log, 0x1400, 0).await;
    let second = logs(&mut scene, &mut front_end, &log, 0x1800, 0).await;
    assert_ne!(first, second);
    assert_eq!(scene.vmm.driver_mappings().len(), 2);
    pwrite(scene.vmm.file_at(second + 0x1000), &[1], 0x700).unwrap();
    exchange(&mut front_end, &mut scene.agent, R::GetVringBase(STATE), A::VringState(STATE)).await;
    assert_eq!(byte(&log, 0x1700), 1);
}

/// What was set before an appliance died is in the file with the next stop, and the next appliance has the same page.
#[tokio::test]
async fn bits_in_the_last_page_survive_the_appliance() {
    let (mut scene, mut front_end) = connected().await;
    let log = memory_file(0x1100);
    let start = logs(&mut scene, &mut front_end, &log, 0x1100, 0).await;
    let page = scene.vmm.file_at(start + 0x1000);
    pwrite(&page, &[1], 5).unwrap();
    scene.appliance_is_replaced().await;
    scene.replay(&front_end).await;
    assert_eq!(identity(scene.vmm.file_at(start + 0x1000)), identity(&page));
    exchange(&mut front_end, &mut scene.agent, R::GetVringBase(STATE), A::VringState(STATE)).await;
    assert_eq!(byte(&log, 0x1005), 1);
}

/// The back-end goes while it is told of a new log: the next one is told of the old one, then of the new one, and there is room
/// for both, even if they are shorter than a page.
#[tokio::test]
async fn a_log_that_was_under_way_leaves_room() {
    for len in [0x80, 0x1100] {
        let (mut scene, mut front_end) = connected().await;
        logs(&mut scene, &mut front_end, &memory_file(len), len, 0).await;
        let new = memory_file(len);
        front_end.send(set_log(&new, len, 0), false).await;
        scene.agent.request().await;
        for _ in 0..2 {
            scene.back_end_restarts().await;
            scene.agent.answers_replay_until(SET_LOG_BASE).await;
            let under_way = scene.agent.request().await;
            assert!(matches!(under_way, R::SetLogBase(..)), "{under_way:?}");
        }
        scene.agent.answer(A::LogBase).await;
        front_end.reply(SET_LOG_BASE).await;
        let page = scene.vmm.driver_mappings().last().map(|map| map.region_offset).unwrap();
        pwrite(scene.vmm.file_at(page), &[1], 5).unwrap();
        exchange(&mut front_end, &mut scene.agent, R::GetVringBase(STATE), A::VringState(STATE)).await;
        assert_eq!(byte(&new, len / 0x1000 * 0x1000 + 5), 1);
    }
}

/// A log that cannot be served ends the session, since SET_LOG_BASE cannot be refused: before anything is mapped or the agent is
/// told. (hardening, CVE-2020-10722: offset and size overflow, the map is too short. truncated memfd: a file that may shrink.)
#[tokio::test]
async fn broken_logs_end_the_session() {
    let mut scene = Scene::ready().await;
    let before = scene.proves_alive().await;
    let (file, large) = (memory_file(0x4000), memory_file(LOG_LEN + MIB));
    let (_read, pipe) = rustix::pipe::pipe().unwrap();
    let rows = [
        ("offset plus size overflows", &file, u64::MAX, 0x1000),
        ("the other way round", &file, 0x1000, u64::MAX - 0xfff),
        ("longer than its file", &file, 0x4001, 0),
        ("longer than its file from there", &file, 0x1001, 0x3000),
        ("no bytes", &file, 0, 0),
        ("larger than the area", &large, LOG_LEN + 1, 0),
        ("no file", &pipe, 0x1000, 0),
        ("a file that may shrink under its last page", &unsealed_memory_file(0x1100), 0x1100, 0),
    ];
    for (name, file, size, offset) in rows {
        let mut front_end = scene.connect_front_end_with(WITH_LOG, WITH_LOG).await;
        front_end.send(set_log(file, size, offset), false).await;
        front_end.sees_end().await;
        assert!(!scene.agent.has_frame(), "{name}: the agent was told");
        assert_eq!(scene.vmm.driver_mappings(), [], "{name}");
        scene.clear_away().await;
    }
    // Not negotiated: nobody waits for its reply.
    let mut front_end = scene.connect_front_end_with(WITH_LOG, PROTOCOL).await;
    front_end.send(set_log(&file, 0x1000, 0), false).await;
    front_end.sees_end().await;
    scene.clear_away().await;
    assert_eq!(scene.proves_alive().await, before, "descriptors leak");
}

/// The back-end refuses a log, by a reply without payload: the session ends, and nothing of the log stays.
#[tokio::test]
async fn a_log_that_the_back_end_refuses_ends_the_session() {
    let (mut scene, mut front_end) = connected().await;
    front_end.send(set_log(&memory_file(0x1800), 0x1800, 0), false).await;
    scene.agent.request().await;
    scene.agent.answer(A::refusal(SET_LOG_BASE)).await;
    front_end.sees_end().await;
    scene.clear_away().await;
    assert_eq!(scene.vmm.driver_mappings(), []);
    scene.proves_alive().await;
}

/// Logs set over and over leave no more than one behind. (hardening: repeated messages that leak a descriptor and a mapping each.)
#[tokio::test]
async fn repeated_logs_leave_nothing_behind() {
    let (mut scene, mut front_end) = connected().await;
    let mut after_first = None;
    for round in 0..50 {
        logs(&mut scene, &mut front_end, &memory_file(0x1100), 0x1100, 0).await;
        let signal = event::create().unwrap();
        let seen = told(&mut front_end, &mut scene.agent, R::SetLogFd(signal)).await;
        assert_eq!(seen, R::SetLogFd(Handle::Peer(LOG_PEER)));
        let count = scene.bridge.descriptor_count();
        assert_eq!(*after_first.get_or_insert(count), count, "round {round}: descriptors of the bridge");
        assert_eq!(scene.vmm.driver_mappings().len(), 2, "round {round}");
    }
}

/// Updates of the log are signalled to the front-end, at its last eventfd.
#[tokio::test]
async fn log_updates_are_signalled() {
    let (mut scene, mut front_end) = connected().await;
    for _ in 0..2 {
        let signal = event::create().unwrap();
        told(&mut front_end, &mut scene.agent, R::SetLogFd(signal.try_clone().unwrap())).await;
        scene.vmm.doorbell.ring(LOG_PEER);
        let arrived = event::Event::new(signal).unwrap();
        within("the signal of the log", arrived.signalled()).await.unwrap();
    }
    let (_read, pipe) = rustix::pipe::pipe().unwrap();
    front_end.send(R::SetLogFd(pipe), true).await;
    assert_ne!(front_end.acknowledgement(7).await, 0, "a pipe is no eventfd");
}
