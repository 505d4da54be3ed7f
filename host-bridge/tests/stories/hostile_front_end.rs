//! What a hostile front-end may send. It loses its session; the bridge lives, the next session works, and no descriptor stays
//! behind.

use std::os::fd::OwnedFd;

use vvu_protocol::message::{FrontEndRequest, RawMessage, VringAddresses, VringState};
use vvu_socket::event;

use crate::scripted::front_end::{DriverMemory, repeated, vring_file};
use crate::scripted::{Scene, memory_file, told};

use FrontEndRequest as R;

const NEED_REPLY: u32 = 9;

/// A message of any form: code, flags, length as the header says it, payload.
fn message(code: u32, flags: u32, len: u32, payload: &[u8]) -> Vec<u8> {
    [&code.to_le_bytes(), &flags.to_le_bytes(), &len.to_le_bytes(), payload].concat()
}

/// A message whose header tells the truth.
fn honest(code: u32, payload: &[u8]) -> Vec<u8> {
    message(code, NEED_REPLY, u32::try_from(payload.len()).unwrap(), payload)
}

/// SET_MEM_TABLE with this count of regions, and the bytes of this many.
fn table(count: u32, regions: u64) -> Vec<u8> {
    let mut payload = [count.to_le_bytes(), [0; 4]].concat();
    for index in 0..regions {
        for field in [index << 20, 1 << 20, (0x7000 << 32) + (index << 20), index << 20] {
            payload.extend(field.to_le_bytes());
        }
    }
    honest(5, &payload)
}

/// Each row ends the session: bytes, and how many descriptors come with them.
fn rows() -> Vec<(&'static str, Vec<u8>, usize)> {
    vec![
        ("GET_FEATURES with a descriptor", honest(1, &[]), 1),
        ("GET_FEATURES with eight descriptors", honest(1, &[]), 8),
        ("nine descriptors", honest(1, &[]), 9),
        ("sixty descriptors", honest(5, &[0; 8]), 60),
        ("descriptors with half a header", vec![1, 0, 0], 5),
        ("SET_MEM_TABLE without descriptors", table(2, 2), 0),
        ("SET_MEM_TABLE with one descriptor too few", table(2, 2), 1),
        ("SET_MEM_TABLE with one descriptor too many", table(2, 2), 3),
        ("SET_MEM_TABLE with nine regions", table(9, 9), 8),
        ("SET_MEM_TABLE with 2^32-1 regions", table(u32::MAX, 2), 2),
        ("SET_MEM_TABLE that counts more regions than come", table(3, 2), 3),
        ("SET_MEM_TABLE that counts fewer regions than come", table(1, 2), 1),
        ("SET_MEM_TABLE without a count", honest(5, &[]), 0),
        ("SET_VRING_NUM that is short", honest(8, &[0; 7]), 0),
        ("SET_VRING_NUM that is long", honest(8, &[0; 9]), 0),
        ("SET_VRING_KICK that promises a descriptor", honest(12, &[0; 8]), 0),
        ("SET_VRING_KICK that denies a descriptor", honest(12, &0x100_u64.to_le_bytes()), 1),
        ("SET_VRING_CALL with two descriptors", honest(13, &[0; 8]), 2),
        ("SET_VRING_CALL with unknown bits", honest(13, &0x1_0000_u64.to_le_bytes()), 1),
        ("SET_LOG_BASE that is short", honest(6, &[0; 8]), 1),
        ("SET_LOG_FD without a descriptor", honest(7, &[]), 0),
        ("GET_CONFIG of more than there can be", honest(24, &[&[0; 4][..], &[0xff; 4], &[0; 4]].concat()), 0),
        ("GET_CONFIG that is short", honest(24, &[0; 11]), 0),
        ("SET_CONFIG with fewer bytes than it says", honest(25, &[0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]), 0),
        ("SET_INFLIGHT_FD that is short", honest(32, &[0; 8]), 1),
        ("a reply", message(1, 5, 0, &[]), 0),
        ("a reply to an unknown request", message(77, 5, 0, &[]), 0),
        ("version 0", message(1, 0, 0, &[]), 0),
        ("version 2", message(1, 2, 0, &[]), 0),
        ("reserved flags", message(1, 0x11, 0, &[]), 0),
        ("a payload of 2^32-1 bytes", message(5, 1, u32::MAX, &[0; 64]), 3),
        ("a payload of 3841 bytes", message(77, 1, 3841, &[0; 64]), 0),
        ("garbage", vec![0xa5; 200], 2),
    ]
}

/// Rows of hardening: surplus descriptors that are never closed; descriptors that leak on short, over-long and truncated
/// messages; an index or a length that is cut before it is checked.
#[tokio::test]
async fn broken_messages_end_the_session_and_nothing_else() {
    let mut scene = Scene::ready().await;
    let before = scene.proves_alive().await;
    let file = memory_file(16 << 20);
    for (name, bytes, count) in rows() {
        let mut front_end = scene.connect_front_end().await;
        front_end.send_raw(&bytes, &repeated(&file, count));
        if bytes.len() < 12 {
            // Only the end of the connection shows that there will be no more of it.
            drop(front_end);
        } else {
            front_end.sees_end().await;
        }
        scene.clear_away().await;
        assert!(!scene.agent.has_frame(), "{name}: the agent was told");
        assert_eq!(scene.proves_alive().await, before, "{name}: descriptors of the bridge");
    }
}

/// A message that the front-end never ends: the descriptors that came with its first half go with it.
#[tokio::test]
async fn half_a_message_then_the_end() {
    let mut scene = Scene::ready().await;
    let before = scene.proves_alive().await;
    let file = memory_file(16 << 20);
    let whole = table(2, 2);
    for len in [1, 11, 12, 13, 20, whole.len() - 1] {
        let front_end = scene.connect_front_end().await;
        front_end.send_raw(&whole[..len], &repeated(&file, 2));
        scene.vmm.fence().await;
        scene.end_session(front_end).await;
        assert_eq!(scene.proves_alive().await, before, "{len} bytes: descriptors of the bridge");
    }
}

/// A queue that does not exist ends the session, before anything is indexed with it. (hardening: a 32-bit vring index that is
/// cut to fewer bits before the check; an unchecked index of SET_VRING_BASE.)
#[tokio::test]
async fn queues_that_do_not_exist_end_the_session() {
    let mut scene = Scene::ready().await;
    let before = scene.proves_alive().await;
    let file = event::create().unwrap();
    let addresses = |index| VringAddresses { index, flags: 0, descriptors: 0, used: 0, available: 0, log: 0 };
    for index in [2, 200, 256, 1 << 16, 1 << 31, u32::MAX] {
        let state = VringState { index, num: 0 };
        let mut requests = vec![
            R::SetVringNum(state),
            R::SetVringBase(state),
            R::GetVringBase(state),
            R::SetVringEnable(state),
            R::SetVringAddr(addresses(index)),
        ];
        if let Ok(index) = u8::try_from(index) {
            let files = [Some(&file), None].map(|file| (vring_file(index, file), vring_file(index, file)));
            for (kick, call) in files {
                requests.extend([R::SetVringKick(kick), R::SetVringCall(call)]);
            }
            requests.push(R::SetVringErr(vring_file(index, Some(&file))));
        }
        for request in requests {
            let name = request.name();
            let mut front_end = scene.connect_front_end().await;
            front_end.send(request, true).await;
            front_end.sees_end().await;
            scene.clear_away().await;
            assert!(!scene.agent.has_frame(), "{name} of queue {index}: the agent was told");
        }
    }
    assert_eq!(scene.proves_alive().await, before, "descriptors of the bridge");
}

/// The same message a hundred times leaves no more than once. (hardening: repeated set-up messages that allocate each time.)
#[tokio::test]
async fn repeated_messages_leave_nothing_behind() {
    let mut scene = Scene::ready().await;
    let before = scene.proves_alive().await;
    let mut front_end = scene.connect_front_end().await;
    let memory = DriverMemory::new(8 << 20);
    let file = event::create().unwrap();
    let mut after_first = None;
    for _ in 0..100 {
        let agent = &mut scene.agent;
        told(&mut front_end, agent, memory.pc_table()).await;
        told(&mut front_end, agent, R::SetVringNum(VringState { index: 0, num: 128 })).await;
        told(&mut front_end, agent, R::SetVringKick(vring_file(0, Some(&file)))).await;
        told(&mut front_end, agent, R::SetVringCall(vring_file(0, Some(&file)))).await;
        told(&mut front_end, agent, R::SetVringErr(vring_file(0, Some(&file)))).await;
        let count = scene.bridge.descriptor_count();
        assert_eq!(*after_first.get_or_insert(count), count, "descriptors of the bridge");
    }
    assert_eq!(scene.vmm.driver_mappings().len(), 1);
    scene.end_session(front_end).await;
    assert_eq!(scene.proves_alive().await, before, "descriptors of the bridge after the session");
}

/// A front-end that comes and goes a hundred times, with and without a word.
#[tokio::test]
async fn front_ends_may_come_and_go() {
    let mut scene = Scene::ready().await;
    let before = scene.proves_alive().await;
    for round in 0..100 {
        let front_end = scene.new_front_end();
        scene.agent.sees_front_end().await;
        if round % 2 == 0 {
            front_end.send(R::GetFeatures, false).await;
            // The answer to a front-end that is gone.
            scene.agent.request().await;
            drop(front_end);
            scene.agent.answer(vvu_protocol::message::FrontEndReply::Number(0)).await;
        } else {
            drop(front_end);
        }
        scene.clear_away().await;
    }
    assert_eq!(scene.proves_alive().await, before, "descriptors of the bridge");
}

/// A front-end that asks and asks and reads no answer holds nobody up but itself.
#[tokio::test]
async fn a_front_end_that_reads_nothing_holds_nobody_up() {
    let mut scene = Scene::ready().await;
    let before = scene.proves_alive().await;
    let front_end = scene.connect_front_end().await;
    let unknown = RawMessage::<OwnedFd>::request(77, true, vec![], vec![]).to_bytes();
    front_end.fills_socket(&unknown, &scene.vmm).await;
    scene.vmm.fence().await;
    scene.new_front_end().sees_end().await;
    scene.end_session(front_end).await;
    assert_eq!(scene.proves_alive().await, before, "descriptors of the bridge");
}
