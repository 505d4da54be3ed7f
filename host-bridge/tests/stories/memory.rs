//! Driver memory in the window: what is mapped when, and what of a table that is refused.

use tokio::sync::oneshot;
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::control::Status;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, ShmemMap};
use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};

use crate::scripted::front_end::{DriverMemory, FrontEnd};
use crate::scripted::vmm::Verdict;
use crate::scripted::{Scene, WINDOW_LEN, identity, told};

use FrontEndRequest as R;

const MIB: u64 = 1 << 20;
const SET_MEM_TABLE: u32 = 5;

/// Each file is mapped once, whatever the number of its regions, and each region lies congruent to its file offset.
#[tokio::test]
async fn one_mapping_for_each_file() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (main, extra) = (DriverMemory::new(16 * MIB), DriverMemory::new(4 * MIB));
    let high = |(region, file)| (MemoryRegion { guest_address: GuestAddress(1 << 32), ..region }, file);
    let mut table = vec![main.region(0, 0xa_0000), main.region(0xc_0000, 7 * MIB), high(main.region(9 * MIB, 7 * MIB))];
    let (mut region, file) = extra.region(MIB, 2 * MIB);
    (region.guest_address, region.user_address) = (GuestAddress(2 << 32), UserAddress(0x6000_0000_0000));
    table.push((region, file));
    let asked: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();

    let R::SetMemTable(seen) = told(&mut front_end, &mut scene.agent, R::SetMemTable(table)).await else {
        panic!("no memory table");
    };
    let maps = scene.vmm.driver_mappings();
    let spans: Vec<_> = maps.iter().map(|map| (map.region_offset, map.file_offset.0, map.len)).collect();
    let start = MEMORY_OFFSET.0;
    assert_eq!(spans, [(start, 0, 16 * MIB), (start + 16 * MIB, 0, 4 * MIB)]);
    let offsets: Vec<u64> = seen.iter().map(|(region, _)| region.mmap_offset.0).collect();
    assert_eq!(offsets, [start, start + 0xc_0000, start + 9 * MIB, start + 17 * MIB]);
    for ((region, _), asked) in seen.iter().zip(&asked) {
        assert_eq!(region.mmap_offset.0 % ALIGNMENT, asked.mmap_offset.0 % ALIGNMENT);
        assert_eq!(MemoryRegion { mmap_offset: asked.mmap_offset, ..*region }, *asked);
    }
}

/// New memory is mapped before the back-end hears of it, old memory is unmapped when the back-end has let go of it, and the
/// front-end is told when all of that has happened.
#[tokio::test]
async fn a_new_table_replaces_the_old_one_in_order() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (old, new) = (DriverMemory::new(8 * MIB), DriverMemory::new(8 * MIB));
    told(&mut front_end, &mut scene.agent, old.pc_table()).await;
    let map = ["SHMEM_MAP asked", "SHMEM_MAP answered 0"];
    let frame = ["frame SET_MEM_TABLE", "answer Acknowledgement(0)"];
    let unmap = ["SHMEM_UNMAP asked", "SHMEM_UNMAP answered 0"];
    let reply = ["reply Acknowledgement(0)"];
    assert_eq!(scene.journal.take(), [&map[..], &frame, &reply].concat());
    told(&mut front_end, &mut scene.agent, new.pc_table()).await;
    assert_eq!(scene.journal.take(), [&map[..], &frame, &unmap, &reply].concat());
    assert_eq!((scene.vmm.lists(old.identity()), scene.vmm.lists(new.identity())), (0, 1));
    told(&mut front_end, &mut scene.agent, new.pc_table()).await;
    assert_eq!(scene.journal.take(), [&frame[..], &reply].concat(), "the same table again");
}

/// The same order, with each step held back: nobody hears of the next one.
#[tokio::test]
async fn nobody_is_told_before_it_has_happened() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (old, new) = (DriverMemory::new(8 * MIB), DriverMemory::new(8 * MIB));
    told(&mut front_end, &mut scene.agent, old.whole()).await;

    let ((map, map_held), (unmap, unmap_held)) = (oneshot::channel(), oneshot::channel());
    scene.vmm.decides(Verdict::Hold(map_held));
    scene.vmm.decides(Verdict::Hold(unmap_held));
    front_end.send(new.whole(), true).await;
    scene.vmm.asked("SHMEM_MAP").await;
    scene.vmm.fence().await;
    assert!(!scene.agent.has_frame(), "the agent was told of memory that is not mapped yet");

    map.send(()).unwrap();
    scene.agent.request().await;
    scene.vmm.fence().await;
    assert_eq!(scene.vmm.driver_mappings().len(), 2, "old memory went before the back-end let go of it");

    scene.agent.answer(FrontEndReply::Acknowledgement(0)).await;
    scene.vmm.asked("SHMEM_UNMAP").await;
    scene.vmm.fence().await;
    assert!(!front_end.has_message(), "the front-end was told before its old memory was unmapped");

    unmap.send(()).unwrap();
    assert_eq!(front_end.acknowledgement(SET_MEM_TABLE).await, 0);
}

/// A table that the appliance's VMM cannot map is refused, also if it fails in the middle; the one before stays.
#[tokio::test]
async fn a_refusal_of_the_vmm_changes_nothing() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let old = DriverMemory::new(8 * MIB);
    told(&mut front_end, &mut scene.agent, old.whole()).await;
    let before = scene.vmm.driver_mappings();

    let (first, second) = (DriverMemory::new(4 * MIB), DriverMemory::new(4 * MIB));
    let (allow, held) = oneshot::channel();
    allow.send(()).unwrap();
    scene.vmm.decides(Verdict::Hold(held));
    scene.vmm.decides(Verdict::Refuse);
    let (mut region, file) = second.region(0, 4 * MIB);
    (region.guest_address, region.user_address) = (GuestAddress(4 * MIB), UserAddress(0x6000_0000_0000));
    let table = || R::SetMemTable(vec![first.region(0, 4 * MIB), (region, file.try_clone().unwrap())]);
    front_end.send(table(), true).await;
    assert_ne!(front_end.acknowledgement(SET_MEM_TABLE).await, 0);
    assert_eq!(scene.vmm.driver_mappings(), before);
    assert!(!scene.agent.has_frame(), "the agent was told of a table that was refused");

    // Nothing of the attempt is in the way of the next.
    told(&mut front_end, &mut scene.agent, table()).await;
    assert_eq!(scene.vmm.driver_mappings().len(), 2);
}

/// A table that the back-end refuses is unmapped again, and refused; the one before stays.
#[tokio::test]
async fn a_refusal_of_the_back_end_changes_nothing() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (old, new) = (DriverMemory::new(8 * MIB), DriverMemory::new(8 * MIB));
    told(&mut front_end, &mut scene.agent, old.whole()).await;
    let before = scene.vmm.driver_mappings();
    front_end.send(new.whole(), true).await;
    scene.agent.request().await;
    scene.agent.answer(FrontEndReply::Acknowledgement(22)).await;
    assert_ne!(front_end.acknowledgement(SET_MEM_TABLE).await, 0);
    assert_eq!(scene.vmm.driver_mappings(), before);
    told(&mut front_end, &mut scene.agent, new.whole()).await;
    assert_eq!((scene.vmm.lists(old.identity()), scene.vmm.lists(new.identity())), (0, 1));
}

/// Tables that break a rule are refused before anything is done, and the session goes on. (hardening: a file that is too
/// short for its region, offset plus size overflows, a range that is not wholly covered.)
#[tokio::test]
async fn broken_tables_are_refused() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (old, memory) = (DriverMemory::new(8 * MIB), DriverMemory::new(8 * MIB));
    told(&mut front_end, &mut scene.agent, old.whole()).await;
    let before = scene.vmm.driver_mappings();
    scene.journal.take();

    let changed = |change: fn(&mut MemoryRegion)| {
        let (mut region, file) = memory.region(0, MIB);
        change(&mut region);
        vec![(region, file)]
    };
    let large = DriverMemory::new(WINDOW_LEN + ALIGNMENT);
    let rows = [
        ("no bytes", changed(|region| region.size = 0)),
        ("behind the end of its file", changed(|region| region.size = 16 * MIB)),
        ("file offset plus size overflows", changed(|region| region.mmap_offset = FileOffset(u64::MAX - 0xfff))),
        ("guest address plus size overflows", changed(|region| region.guest_address = GuestAddress(u64::MAX - 0xfff))),
        ("user address plus size overflows", changed(|region| region.user_address = UserAddress(u64::MAX - 0xfff))),
        ("half a page", changed(|region| region.size = 0x800)),
        ("offset within a page", changed(|region| region.mmap_offset = FileOffset(0x10))),
        ("overlap", vec![memory.region(0, 2 * MIB), memory.region(MIB, 2 * MIB)]),
        ("too large for the window", vec![large.region(0, WINDOW_LEN + ALIGNMENT)]),
    ];
    for (name, table) in rows {
        front_end.send(R::SetMemTable(table), true).await;
        assert_ne!(front_end.acknowledgement(SET_MEM_TABLE).await, 0, "{name}");
        assert_eq!(scene.vmm.driver_mappings(), before, "{name}");
        assert!(!scene.agent.has_frame(), "{name}: the agent was told");
    }
    let notes = scene.journal.take();
    assert!(notes.iter().all(|note| note.starts_with("reply")), "{notes:?}");
    told(&mut front_end, &mut scene.agent, R::SetMemTable(vec![memory.region(0, MIB)])).await;
}

/// A table of no regions lets go of all driver memory.
#[tokio::test]
async fn an_empty_table_unmaps_everything() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let memory = DriverMemory::new(8 * MIB);
    told(&mut front_end, &mut scene.agent, memory.whole()).await;
    told(&mut front_end, &mut scene.agent, R::SetMemTable(Vec::new())).await;
    assert_eq!(scene.vmm.driver_mappings(), []);
}

/// The back-end dies while it is told of new memory. The next one is told of the old memory, then of the new; what is mapped
/// afterwards is the new alone, and nothing once the front-end is gone.
#[tokio::test]
async fn a_back_end_that_dies_with_a_table_leaves_nothing_behind() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let (old, new) = (DriverMemory::new(8 * MIB), DriverMemory::new(8 * MIB));
    told(&mut front_end, &mut scene.agent, old.whole()).await;
    front_end.send(new.whole(), true).await;
    scene.agent.request().await;
    scene.back_end_restarts().await;
    scene.agent.answers_replay_until(SET_MEM_TABLE).await;
    scene.agent.obliges().await;
    assert_eq!(front_end.acknowledgement(SET_MEM_TABLE).await, 0);
    assert_eq!(scene.vmm.driver_mappings().len(), 1);
    assert_eq!((scene.vmm.lists(old.identity()), scene.vmm.lists(new.identity())), (0, 1));
    scene.end_session(front_end).await;
    assert_eq!(scene.vmm.driver_mappings(), []);
    scene.proves_alive().await;
}

/// The front-end dies while its memory is being mapped.
#[tokio::test]
async fn memory_of_a_dead_front_end_is_unmapped() {
    let (mut scene, front_end) = Scene::connected().await;
    let memory = DriverMemory::new(8 * MIB);
    let (release, held) = oneshot::channel();
    scene.vmm.decides(Verdict::Hold(held));
    front_end.send(memory.whole(), true).await;
    scene.vmm.asked("SHMEM_MAP").await;
    drop(front_end);
    release.send(()).unwrap();
    scene.agent.obliges().await;
    scene.clear_away().await;
    assert_eq!(scene.vmm.driver_mappings(), []);
    scene.proves_alive().await;
}

/// The bridge maps the appliance's memory, and never the driver's: not when it passes it on, and not when the control
/// device's own memory table lists it afterwards.
#[tokio::test]
async fn the_bridge_maps_no_driver_memory() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let memory = DriverMemory::new(16 * MIB);
    maps_only_the_appliance(&mut scene, &mut front_end, &memory).await;
    // A table that lists the driver's memory is also what the appliance's devices start with, after a reset of one of them.
    scene.vmm.control.stop().await;
    scene.reboot_agent().await;
    assert_eq!(scene.vmm.lists(memory.identity()), 1);
    assert!(!scene.bridge.mapped_files().contains(&memory.identity()), "driver memory is mapped after a restart");
    scene.agent.set_status(Status::BACK_END_UP).await;
    scene.agent.sees_front_end().await;
    scene.replay(&front_end).await;
    assert!(!scene.bridge.mapped_files().contains(&memory.identity()), "driver memory is mapped after a replay");
    scene.end_session(front_end).await;
    assert_eq!(scene.vmm.driver_mappings(), []);
}

async fn maps_only_the_appliance(scene: &mut Scene, front_end: &mut FrontEnd, memory: &DriverMemory) {
    told(front_end, &mut scene.agent, memory.pc_table()).await;
    scene.vmm.fence().await;
    assert_eq!(scene.vmm.lists(memory.identity()), 1, "the appliance's memory table lists the driver's file");
    let mapped = scene.bridge.mapped_files();
    assert!(mapped.contains(&scene.vmm.ram_identity()), "the appliance's memory is mapped");
    assert!(!mapped.contains(&memory.identity()), "driver memory is mapped");
    let header = identity(scene.vmm.header().expect("the header"));
    assert_eq!(scene.vmm.lists(header), 1, "the appliance's memory table lists the header");
    assert!(!mapped.contains(&header), "the window's header is mapped");
}

/// A mapping's place does not change as long as its file is in the table, and a freed place is used again.
#[tokio::test]
async fn places_in_the_window_are_kept_and_reused() {
    let (mut scene, mut front_end) = Scene::connected().await;
    let place = |map: &ShmemMap| map.region_offset;
    for _ in 0..8 {
        // Two of these fit side by side, three would not.
        let memory = DriverMemory::new(WINDOW_LEN / 2);
        told(&mut front_end, &mut scene.agent, memory.whole()).await;
        assert_eq!(scene.vmm.driver_mappings().len(), 1);
        let before = scene.vmm.driver_mappings().iter().map(place).collect::<Vec<_>>();
        told(&mut front_end, &mut scene.agent, memory.pc_table()).await;
        assert_eq!(scene.vmm.driver_mappings().iter().map(place).collect::<Vec<_>>(), before);
    }
}
