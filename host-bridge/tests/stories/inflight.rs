//! The inflight buffer: made by the bridge, kept by the front-end or, if it has none, by the bridge.

use std::os::fd::OwnedFd;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat, ftruncate};
use rustix::io::{pread, pwrite};
use vvu_protocol::address::FileOffset;
use vvu_protocol::control::Handle;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, Inflight, RawMessage, VringState};
use vvu_protocol::window::{ALIGNMENT, INFLIGHT_LEN, INFLIGHT_OFFSET};
use vvu_socket::event;

use crate::scripted::front_end::{FrontEnd, vring_file};
use crate::scripted::{PROTOCOL, QUEUES, Scene, identity, memory_file, told};

use FrontEndReply as A;
use FrontEndRequest as R;

const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_KICK: u32 = 12;
const WITH_INFLIGHT: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::INFLIGHT_SHMFD);

async fn connected() -> (Scene, FrontEnd) {
    Scene::connected_with(WITH_INFLIGHT, WITH_INFLIGHT).await
}

const fn wanted(queue_count: u16, queue_size: u16) -> Inflight {
    Inflight { mmap_size: 0, mmap_offset: FileOffset(0), queue_count, queue_size }
}

async fn get_inflight(front_end: &mut FrontEnd, wanted: Inflight) -> (Inflight, OwnedFd) {
    front_end.send(R::GetInflightFd(wanted), false).await;
    match front_end.reply(GET_INFLIGHT_FD).await {
        A::Inflight(inflight, file) => (inflight, file),
        other => panic!("expected a buffer, {other:?} came"),
    }
}

fn set_inflight(inflight: Inflight, file: &OwnedFd) -> R<OwnedFd> {
    R::SetInflightFd(inflight, file.try_clone().unwrap())
}

/// Each GET_INFLIGHT_FD has a buffer of its own, zeroed, sealed and in whole huge pages; the back-end gets it by SET_INFLIGHT_FD,
/// and the same again is not mapped again.
#[tokio::test]
async fn a_buffer_goes_out_and_comes_back() {
    let (mut scene, mut front_end) = connected().await;
    let (first, file) = get_inflight(&mut front_end, wanted(QUEUES, 128)).await;
    assert!(first.mmap_size >= u64::from(QUEUES) * (64 + 128 * 32) && first.mmap_size.is_multiple_of(4096));
    assert_eq!((first.queue_count, first.queue_size, first.mmap_offset), (QUEUES, 128, FileOffset(0)));
    let len = fstat(&file).unwrap().st_size.unsigned_abs();
    assert!(len >= first.mmap_size && len.is_multiple_of(ALIGNMENT));
    assert!(fcntl_get_seals(&file).unwrap().contains(SealFlags::SHRINK | SealFlags::GROW));
    assert!(ftruncate(&file, 0).is_err());
    pwrite(&file, &[7], 0).unwrap();
    let (_, second) = get_inflight(&mut front_end, wanted(QUEUES, 128)).await;
    let mut byte = [1];
    pread(&second, &mut byte[..], 0).unwrap();
    assert_eq!(byte, [0], "the second buffer is as good as new");

    for round in 0..3 {
        let seen = told(&mut front_end, &mut scene.agent, set_inflight(first, &file)).await;
        let placed = Inflight { mmap_offset: FileOffset(INFLIGHT_OFFSET.0), ..first };
        assert_eq!(seen, R::SetInflightFd(placed, Handle::Window), "round {round}");
        assert_eq!(identity(scene.vmm.file_at(INFLIGHT_OFFSET.0)), identity(&file));
    }
    let maps = scene.journal.take().iter().filter(|note| note.starts_with("SHMEM_MAP asked")).count();
    assert_eq!(maps, 1, "the same buffer was mapped again");
}

/// Who asks with the structure's padding is answered with it, who asks without is answered without.
#[tokio::test]
async fn the_reply_has_the_length_of_the_request() {
    let (_scene, mut front_end) = connected().await;
    for len in [20, 24] {
        let mut payload = vec![0; len];
        (payload[16], payload[18]) = (1, 128);
        front_end.send_raw(&RawMessage::<OwnedFd>::request(GET_INFLIGHT_FD, false, payload, vec![]).to_bytes(), &[]);
        let reply = front_end.raw_reply().await;
        assert_eq!((reply.payload.len(), reply.header.payload_len, reply.descriptors.len()), (len, len, 1));
    }
}

/// A new buffer is mapped beside the one before, which goes when the back-end has agreed.
#[tokio::test]
async fn a_new_buffer_replaces_the_old_one_in_order() {
    let (mut scene, mut front_end) = connected().await;
    let map = ["SHMEM_MAP asked", "SHMEM_MAP answered 0"];
    let frame = ["frame SET_INFLIGHT_FD", "answer Acknowledgement(0)"];
    let unmap = ["SHMEM_UNMAP asked", "SHMEM_UNMAP answered 0"];
    let reply = ["reply Acknowledgement(0)"];
    for round in 0..4 {
        let (inflight, file) = get_inflight(&mut front_end, wanted(QUEUES, 1024)).await;
        scene.journal.take();
        told(&mut front_end, &mut scene.agent, set_inflight(inflight, &file)).await;
        let unmap = if round == 0 { &[][..] } else { &unmap };
        assert_eq!(scene.journal.take(), [&map[..], &frame, unmap, &reply].concat(), "round {round}");
        assert_eq!(scene.vmm.driver_mappings().len(), 1);
    }
    // One that the back-end refuses leaves the one before.
    let before = scene.vmm.driver_mappings();
    let (inflight, file) = get_inflight(&mut front_end, wanted(1, 1024)).await;
    front_end.send(set_inflight(inflight, &file), true).await;
    scene.agent.request().await;
    scene.agent.answer(A::Acknowledgement(22)).await;
    assert_ne!(front_end.acknowledgement(SET_INFLIGHT_FD).await, 0);
    assert_eq!(scene.vmm.driver_mappings(), before);
}

/// A buffer of the front-end's own making, as after a migration, is taken: its file has just the length that was said.
#[tokio::test]
async fn a_buffer_of_the_front_ends_own_is_taken() {
    let (mut scene, mut front_end) = connected().await;
    let (described, _) = get_inflight(&mut front_end, wanted(QUEUES, 256)).await;
    let file = memory_file(described.mmap_size);
    told(&mut front_end, &mut scene.agent, set_inflight(described, &file)).await;
    assert_eq!(identity(scene.vmm.file_at(INFLIGHT_OFFSET.0)), identity(&file));
}

/// Descriptions that do not fit the device, the file or the window are refused before the agent is told. (hardening,
/// CVE-2021-3839: num_queues of SET_INFLIGHT_FD unchecked.)
#[tokio::test]
async fn broken_descriptions_are_refused() {
    let (mut scene, mut front_end) = connected().await;
    let (good, file) = get_inflight(&mut front_end, wanted(QUEUES, 128)).await;
    let large = memory_file(INFLIGHT_LEN);
    let odd = memory_file(good.mmap_size + 100);
    let rows = [
        ("one queue too many", Inflight { queue_count: QUEUES + 1, ..good }, &file),
        ("2^16-1 queues", Inflight { queue_count: u16::MAX, ..good }, &file),
        ("no queues", Inflight { queue_count: 0, ..good }, &file),
        ("no entries", Inflight { queue_size: 0, ..good }, &file),
        ("2^16-1 entries", Inflight { queue_size: u16::MAX, ..good }, &file),
        ("no bytes", Inflight { mmap_size: 0, ..good }, &file),
        ("too few bytes", Inflight { mmap_size: 1000, ..good }, &file),
        ("more bytes than the file has", Inflight { mmap_size: ALIGNMENT + 1, ..good }, &file),
        ("offset plus size overflows", Inflight { mmap_offset: FileOffset(u64::MAX), ..good }, &file),
        ("size overflows", Inflight { mmap_size: u64::MAX, ..good }, &file),
        ("offset behind the end", Inflight { mmap_offset: FileOffset(ALIGNMENT), ..good }, &file),
        ("larger than the area", Inflight { mmap_size: INFLIGHT_LEN, ..good }, &large),
        ("a file that ends within a page", Inflight { mmap_size: good.mmap_size + 100, ..good }, &odd),
    ];
    scene.journal.take();
    for (name, inflight, file) in rows {
        front_end.send(set_inflight(inflight, file), true).await;
        assert_ne!(front_end.acknowledgement(SET_INFLIGHT_FD).await, 0, "{name}");
        assert!(!scene.agent.has_frame(), "{name}: the agent was told");
        assert_eq!(scene.vmm.driver_mappings(), [], "{name}");
    }
    told(&mut front_end, &mut scene.agent, set_inflight(good, &file)).await;
    // What GET_INFLIGHT_FD cannot give it cannot refuse either.
    scene.end_session(front_end).await;
    for wanted in [wanted(QUEUES + 1, 128), wanted(0, 128), wanted(1, 0), wanted(u16::MAX, u16::MAX)] {
        let mut front_end = scene.connect_front_end_with(WITH_INFLIGHT, WITH_INFLIGHT).await;
        front_end.send(R::GetInflightFd(wanted), false).await;
        front_end.sees_end().await;
        scene.clear_away().await;
    }
}

/// (hardening, CVE-2020-10726 and CVE-2022-0669: repeated inflight messages leak a descriptor and a mapping each.)
#[tokio::test]
async fn repeated_messages_leave_one_buffer() {
    let (mut scene, mut front_end) = connected().await;
    let mut after_first = None;
    for round in 0..50 {
        let (inflight, file) = get_inflight(&mut front_end, wanted(QUEUES, 128)).await;
        get_inflight(&mut front_end, wanted(1, 128)).await;
        told(&mut front_end, &mut scene.agent, set_inflight(inflight, &file)).await;
        let count = scene.bridge.descriptor_count();
        assert_eq!(*after_first.get_or_insert(count), count, "round {round}: descriptors of the bridge");
        assert_eq!(scene.vmm.driver_mappings().len(), 1, "round {round}");
    }
    scene.end_session(front_end).await;
    assert_eq!(scene.vmm.driver_mappings(), []);
}

/// A front-end that has no buffer gets one by the bridge before its first vring starts, if the back-end can use it: also if it
/// has negotiated the feature. Another appliance gets the same one, with what is in it.
#[tokio::test]
async fn a_front_end_without_a_buffer_loses_nothing_either() {
    for negotiated in [PROTOCOL, WITH_INFLIGHT] {
        let (mut scene, mut front_end) = Scene::connected_with(WITH_INFLIGHT, negotiated).await;
        let state = VringState { index: 0, num: 256 };
        told(&mut front_end, &mut scene.agent, R::SetVringNum(state)).await;
        let kick = event::create().unwrap();
        front_end.send(R::SetVringKick(vring_file(0, Some(&kick))), true).await;
        let seen = scene.agent.obliges().await;
        let R::SetInflightFd(own, Handle::Window) = seen else { panic!("expected a buffer, {seen:?} came") };
        assert_eq!((own.queue_count, own.queue_size), (QUEUES, 1024));
        assert_eq!(own.mmap_offset.0, INFLIGHT_OFFSET.0);
        assert_eq!(scene.agent.obliges().await.code(), SET_VRING_KICK);
        assert_eq!(front_end.acknowledgement(SET_VRING_KICK).await, 0);
        // Once is enough.
        told(&mut front_end, &mut scene.agent, R::SetVringKick(vring_file(1, Some(&kick)))).await;

        // Rings that it has no room for are refused, and the others not.
        front_end.send(R::SetVringNum(VringState { index: 1, num: 2048 }), true).await;
        assert_ne!(front_end.acknowledgement(SET_VRING_NUM).await, 0);
        told(&mut front_end, &mut scene.agent, R::SetVringNum(VringState { index: 1, num: 1024 })).await;

        let buffer = scene.vmm.file_at(INFLIGHT_OFFSET.0);
        pwrite(&buffer, b"in flight", 100).unwrap();
        scene.appliance_is_replaced().await;
        let replayed = scene.replay(&front_end).await;
        assert!(replayed.iter().any(|(request, _)| *request == R::SetInflightFd(own, Handle::Window)), "{replayed:?}");
        assert_eq!(identity(scene.vmm.file_at(INFLIGHT_OFFSET.0)), identity(&buffer));
    }
}

/// The bridge's own buffer has room for the largest vring that was set before.
#[tokio::test]
async fn the_bridges_own_buffer_fits_the_largest_vring() {
    let (mut scene, mut front_end) = Scene::connected_with(WITH_INFLIGHT, PROTOCOL).await;
    told(&mut front_end, &mut scene.agent, R::SetVringNum(VringState { index: 1, num: 4096 })).await;
    front_end.send(R::SetVringKick(vring_file(0, None)), true).await;
    let seen = scene.agent.obliges().await;
    assert!(matches!(seen, R::SetInflightFd(Inflight { queue_size: 4096, .. }, _)), "{seen:?}");
    scene.agent.obliges().await;
    assert_eq!(front_end.acknowledgement(SET_VRING_KICK).await, 0);

    // A reset of the device takes the buffer away with what was in it.
    told(&mut front_end, &mut scene.agent, R::ResetDevice).await;
    let before = identity(scene.vmm.file_at(INFLIGHT_OFFSET.0));
    front_end.send(R::SetVringKick(vring_file(0, None)), true).await;
    let seen = scene.agent.obliges().await;
    let R::SetInflightFd(Inflight { mmap_offset, .. }, _) = seen else { panic!("{seen:?}") };
    scene.agent.obliges().await;
    assert_eq!(front_end.acknowledgement(SET_VRING_KICK).await, 0);
    assert_ne!(identity(scene.vmm.file_at(mmap_offset.0)), before);
    assert_eq!(scene.vmm.driver_mappings().len(), 1);
}
