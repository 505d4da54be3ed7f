//! Memory slots: regions that come and go one by one, while vrings run.

use std::os::fd::OwnedFd;

use tokio::process::Command;
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::control::Handle;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest};
use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};

use crate::scripted::front_end::{DriverMemory, FrontEnd, USER_BASE};
use crate::scripted::process::{Bridge, UUID};
use crate::scripted::{PROTOCOL, QUEUES, Scene, WINDOW_LEN, memory_file, told};

use FrontEndReply as A;
use FrontEndRequest as R;

const MIB: u64 = 1 << 20;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
const WITH_SLOTS: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// The back-end knows nothing of slots: the bridge offers them all the same.
async fn connected() -> (Scene, FrontEnd) {
    Scene::connected_with(PROTOCOL, WITH_SLOTS).await
}

fn region(at: u64, size: u64, offset: u64) -> MemoryRegion {
    MemoryRegion {
        guest_address: GuestAddress(at),
        size,
        user_address: UserAddress(USER_BASE + at),
        mmap_offset: FileOffset(offset),
    }
}

fn add(region: MemoryRegion, file: &OwnedFd) -> R<OwnedFd> {
    R::AddMemReg(region, file.try_clone().unwrap())
}

/// As QEMU removes a region: without its offset.
fn remove(region: MemoryRegion) -> R<OwnedFd> {
    R::RemMemReg(MemoryRegion { mmap_offset: FileOffset(0), ..region })
}

/// Where in the window the agent is told that a region is.
async fn placed(scene: &mut Scene, front_end: &mut FrontEnd, request: R<OwnedFd>) -> u64 {
    match told(front_end, &mut scene.agent, request).await {
        R::AddMemReg(region, Handle::Window) | R::RemMemReg(region) => region.mmap_offset.0,
        other => panic!("{other:?}"),
    }
}

/// New memory is mapped before the back-end hears of it; what is removed is unmapped when the back-end has let go of it.
#[tokio::test]
async fn regions_come_and_go_in_order() {
    let (mut scene, mut front_end) = connected().await;
    let (first, second) = (memory_file(8 * MIB), memory_file(8 * MIB));
    let (low, high) = (region(0, 8 * MIB, 0), region(1 << 32, 8 * MIB, 0));
    let map = ["SHMEM_MAP asked", "SHMEM_MAP answered 0"];
    let unmap = ["SHMEM_UNMAP asked", "SHMEM_UNMAP answered 0"];
    let reply = ["reply Acknowledgement(0)"];
    let frame = |name| [name, "answer Acknowledgement(0)"];
    assert_eq!(placed(&mut scene, &mut front_end, add(low, &first)).await, MEMORY_OFFSET.0);
    assert_eq!(scene.journal.take(), [&map[..], &frame("frame ADD_MEM_REG"), &reply].concat());
    assert_eq!(placed(&mut scene, &mut front_end, add(high, &second)).await, MEMORY_OFFSET.0 + 8 * MIB);
    scene.journal.take();
    assert_eq!(placed(&mut scene, &mut front_end, remove(low)).await, MEMORY_OFFSET.0);
    assert_eq!(scene.journal.take(), [&frame("frame REM_MEM_REG")[..], &unmap, &reply].concat());
    assert_eq!(scene.vmm.driver_mappings().len(), 1);
    // The hole is used again.
    assert_eq!(placed(&mut scene, &mut front_end, add(region(2 << 32, 8 * MIB, 0), &first)).await, MEMORY_OFFSET.0);
}

/// A file is mapped as a whole: a region of it that comes later, as virtio-mem's do, is there already. A file with no room
/// for all of it is mapped in pieces, and no region moves while it is in use.
#[tokio::test]
async fn later_regions_of_a_file_move_nothing() {
    let (mut scene, mut front_end) = connected().await;
    let whole = memory_file(16 * MIB);
    let first = placed(&mut scene, &mut front_end, add(region(0, 2 * MIB, 0), &whole)).await;
    scene.journal.take();
    let later = placed(&mut scene, &mut front_end, add(region(8 * MIB, 2 * MIB, 8 * MIB), &whole)).await;
    assert_eq!(later - first, 8 * MIB);
    assert!(!scene.journal.take().contains(&"SHMEM_MAP asked".to_owned()), "the file was mapped again");

    let large = memory_file(4 * WINDOW_LEN);
    let base = 1 << 32;
    let mut last = None;
    for piece in [100, 30, 31, 7] {
        let at = piece * ALIGNMENT;
        let place = placed(&mut scene, &mut front_end, add(region(base + at, ALIGNMENT, at), &large)).await;
        assert_ne!(last.replace(place), Some(place));
    }
    let maps = scene.vmm.driver_mappings();
    assert_eq!(maps.len(), 5, "{maps:?}");
    for piece in [100, 7, 30, 31] {
        let at = piece * ALIGNMENT;
        told(&mut front_end, &mut scene.agent, remove(region(base + at, ALIGNMENT, at))).await;
    }
    assert_eq!(scene.vmm.driver_mappings().len(), 1);
}

/// 509 regions, as many as the front-end is told; one more is refused, and all of them go again.
#[tokio::test]
async fn there_are_509_slots() {
    let (mut scene, mut front_end) = connected().await;
    front_end.send(R::GetMaxMemSlots, false).await;
    assert!(matches!(front_end.reply(GET_MAX_MEM_SLOTS).await, A::Number(509)));
    let file = memory_file(WINDOW_LEN);
    let slot = |index: u64| region(index * 2 * MIB, 4096, index * 0x2000);
    for index in 0..509 {
        told(&mut front_end, &mut scene.agent, add(slot(index), &file)).await;
    }
    front_end.send(add(slot(509), &file), true).await;
    assert_ne!(front_end.acknowledgement(ADD_MEM_REG).await, 0);
    assert!(!scene.agent.has_frame(), "the agent was told of the 510th");
    assert_eq!(scene.vmm.driver_mappings().len(), 1);

    // A back-end that takes over has all of them.
    scene.back_end_restarts().await;
    let replayed = scene.replay(&front_end).await;
    let regions: Vec<MemoryRegion> = replayed
        .iter()
        .flat_map(|(request, _)| match request {
            R::SetMemTable(table) => table.iter().map(|(region, _)| *region).collect(),
            R::AddMemReg(region, Handle::Window) => vec![*region],
            _ => Vec::new(),
        })
        .collect();
    assert_eq!(regions.len(), 509);
    for (index, region) in (0..).zip(&regions) {
        let MemoryRegion { guest_address, mmap_offset, .. } = slot(index);
        assert_eq!(region.guest_address, guest_address);
        assert_eq!(region.mmap_offset.0, MEMORY_OFFSET.0 + mmap_offset.0);
    }
    for index in (0..509).rev() {
        told(&mut front_end, &mut scene.agent, remove(slot(index))).await;
    }
    assert_eq!(scene.vmm.driver_mappings(), []);
}

/// Each region comes with a descriptor, and a soft limit of descriptors that is lower than that is no limit.
#[tokio::test]
async fn slots_are_not_limited_by_descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_vvu-bridge");
    let options = format!("--uuid {UUID} --queues {QUEUES} --window {WINDOW_LEN}");
    command.arg("-c").arg(format!(
        "ulimit -S -n 128; exec {program} --socket-path {0}/front-end.sock --appliance-dir {0} {options}",
        directory.path().display()
    ));
    let mut bridge = Bridge::spawn(directory, command);
    bridge.notified("X_VVU_LISTENING=1").await;
    let mut scene = Scene::around(bridge).await;
    let mut front_end = scene.connect_front_end_with(PROTOCOL, WITH_SLOTS).await;
    let file = memory_file(WINDOW_LEN);
    for index in 0..200 {
        let region = region(index * 2 * MIB, 4096, index * 0x2000);
        told(&mut front_end, &mut scene.agent, add(region, &file)).await;
    }
}

/// Regions that break a rule are refused before anything is done, and those before stay.
#[tokio::test]
async fn broken_regions_are_refused() {
    let (mut scene, mut front_end) = connected().await;
    let file = memory_file(8 * MIB);
    let known = region(16 * MIB, 8 * MIB, 0);
    told(&mut front_end, &mut scene.agent, add(known, &file)).await;
    let before = scene.vmm.driver_mappings();
    let large = DriverMemory::new(WINDOW_LEN);
    let rows = [
        ("the same again", add(known, &file)),
        ("an overlap", add(region(20 * MIB, 8 * MIB, 0), &file)),
        ("behind the end of its file", add(region(1 << 32, 8 * MIB, 4096), &file)),
        ("no bytes", add(region(1 << 32, 0, 0), &file)),
        ("an overflow", add(region(1 << 32, u64::MAX - 0xfff, 0x1000), &file)),
        ("no room", add(region(1 << 32, WINDOW_LEN, 0), &large.file)),
        ("no such region", remove(region(1 << 32, 8 * MIB, 0))),
        ("of another size", remove(MemoryRegion { size: 4 * MIB, ..known })),
        ("of another user address", remove(MemoryRegion { user_address: UserAddress(0), ..known })),
    ];
    for (name, request) in rows {
        let code = request.code();
        front_end.send(request, true).await;
        assert_ne!(front_end.acknowledgement(code).await, 0, "{name}");
        assert!(!scene.agent.has_frame(), "{name}: the agent was told");
        assert_eq!(scene.vmm.driver_mappings(), before, "{name}");
    }
    // The back-end may refuse, too.
    for (request, code) in
        [(add(region(1 << 32, MIB, 0), &memory_file(MIB)), ADD_MEM_REG), (remove(known), REM_MEM_REG)]
    {
        front_end.send(request, true).await;
        scene.agent.request().await;
        scene.agent.answer(A::Acknowledgement(12)).await;
        assert_ne!(front_end.acknowledgement(code).await, 0);
        assert_eq!(scene.vmm.driver_mappings(), before);
    }
    told(&mut front_end, &mut scene.agent, remove(known)).await;
    assert_eq!(scene.vmm.driver_mappings(), []);
}
