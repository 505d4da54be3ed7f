//! What a new back-end is told so that it goes on where the one before was lost.

use std::os::unix::fs::FileExt;

use vvu_protocol::address::FileOffset;
use vvu_protocol::control::Handle;
use vvu_protocol::features::Features;
use vvu_protocol::message::{Inflight, VringAddresses, VringState};
use vvu_protocol::window::{INFLIGHT_OFFSET, MEMORY_OFFSET};

use crate::back_end::Script;
use crate::stage::{ADDRESSES, DONE, MEMORY_IN_NODE, Request, Stage, play, region};

const USER: u64 = 0x7f00_0000_0000;

/// Where the used ring of vring 0 lies from the start of driver memory.
const USED: u64 = 0x20_3000;

/// Two regions of one file and a hole between them.
async fn set_memory(stage: &Stage) {
    let start = MEMORY_OFFSET.0;
    let table = vec![
        region(0x1_0000_0000, 0xa_0000, USER, start),
        region(0x1_000c_0000, (8 << 20) - 0xc_0000, USER + 0xc_0000, start + 0xc_0000),
    ];
    stage.done(Request::SetMemTable(table)).await;
}

fn addresses(index: u32, used: u64) -> Request {
    Request::SetVringAddr(VringAddresses { index, used, ..ADDRESSES })
}

fn base(index: u32, num: u32) -> Request {
    Request::SetVringBase(VringState { index, num })
}

async fn resume(stage: &Stage, index: u32, num: u32) -> bool {
    stage.bridge.send_resume(base(index, num));
    let answer = stage.bridge.frame().await.message;
    assert_eq!(answer.header.request, 10);
    answer.payload == 0_u64.to_le_bytes()
}

/// What the back-end was told of positions.
fn bases(stage: &Stage) -> Vec<String> {
    stage.journal().into_iter().filter(|line| line.starts_with("SET_VRING_BASE")).collect()
}

fn write_used_index(stage: &Stage, at: u64, value: u16) {
    // Flags beside it and the first entry behind it must not be taken for it.
    let mut bytes = [0xee; 8];
    bytes[2..4].copy_from_slice(&value.to_le_bytes());
    stage.window.write_all_at(&bytes, MEMORY_IN_NODE + at).unwrap();
}

const BUFFER: Inflight = Inflight { mmap_size: 4096, mmap_offset: FileOffset(0), queue_count: 2, queue_size: 128 };

fn inflight(mmap_offset: u64, mmap_size: u64) -> Request {
    let buffer = Inflight { mmap_offset: FileOffset(mmap_offset), mmap_size, ..BUFFER };
    Request::SetInflightFd(buffer, Handle::Window)
}

#[test]
fn a_vring_goes_on_at_the_index_of_its_used_ring() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            set_memory(stage).await;
            for (index, at, value) in [(0, USED, 0x1234), (1, 0xc_0000, 0xffff), (7, 0x9_fff8, 0)] {
                write_used_index(stage, at, value);
                stage.done(addresses(index, USER + at)).await;
                assert!(resume(stage, index, 99).await);
                assert_eq!(bases(stage), [format!("SET_VRING_BASE {index} {value:x}")]);
            }
            // Read anew each time, and only when it is asked for.
            write_used_index(stage, USED, 0x1235);
            stage.done(base(0, 5)).await;
            assert!(resume(stage, 0, 5).await);
            assert_eq!(bases(stage), ["SET_VRING_BASE 0 5", "SET_VRING_BASE 0 1235"]);
        })
    });
}

#[test]
fn nothing_of_driver_memory_stays_mapped_here() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            set_memory(stage).await;
            stage.done(addresses(0, USER + USED)).await;
            for _ in 0..50 {
                assert!(resume(stage, 0, 0).await);
            }
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            assert!(!maps.contains("window-Proper"), "{maps}");
        })
    });
}

#[test]
fn a_position_that_cannot_be_found_is_refused() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            // No address, no memory, then addresses in the hole, across an edge, outside, and beyond all.
            assert!(!resume(stage, 0, 0).await);
            stage.done(addresses(0, USER + USED)).await;
            assert!(!resume(stage, 0, 0).await);
            set_memory(stage).await;
            assert!(resume(stage, 0, 0).await);
            assert!(!resume(stage, 1, 0).await);
            let wrong = [USER + 0xa_0000, USER + 0x9_fffd, USER + (8 << 20), USER - 4, 0, u64::MAX, USER + USED + 1];
            for used in wrong {
                stage.done(addresses(0, used)).await;
                assert!(!resume(stage, 0, 0).await, "{used:#x}");
            }
            assert!(!resume(stage, u32::MAX, 0).await);
            assert_eq!(bases(stage), ["SET_VRING_BASE 0 0"]);
            stage.done(addresses(0, USER + USED)).await;
            assert!(resume(stage, 0, 0).await);
        })
    });
}

#[test]
fn without_an_index_the_position_is_left_to_the_inflight_buffer() {
    let features = Features::VERSION_1 | Features::PROTOCOL_FEATURES;
    for feature in [Features::ACCESS_PLATFORM, Features::RING_PACKED] {
        play(Script::Proper, |stage| {
            Box::pin(async move {
                stage.connect_and_negotiate().await;
                set_memory(stage).await;
                write_used_index(stage, USED, 77);
                stage.done(Request::SetFeatures(features | feature)).await;
                stage.done(addresses(0, USER + USED)).await;
                assert!(!resume(stage, 0, 0x8000).await, "{feature:?}");
                stage.done(inflight(INFLIGHT_OFFSET.0, 4096)).await;
                assert!(resume(stage, 0, 0x8000).await, "{feature:?}");
                assert_eq!(bases(stage), ["SET_VRING_BASE 0 8000"]);
                // A ring that has an index is looked at, buffer or no buffer.
                stage.done(Request::SetFeatures(features)).await;
                assert!(resume(stage, 0, 0x8000).await);
                assert_eq!(bases(stage), ["SET_VRING_BASE 0 4d"]);
            })
        });
    }
}

#[test]
fn only_a_position_can_be_resumed() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.journal();
            stage.bridge.send_resume(Request::SetVringNum(VringState { index: 0, num: 4 }));
            let answer = stage.bridge.frame().await.message;
            assert_ne!(answer.payload, 0_u64.to_le_bytes());
            assert_eq!(stage.journal(), Vec::<String>::new());
            assert_eq!(stage.ask(base(0, 4)).await, DONE);
        })
    });
}

#[test]
fn a_new_session_knows_nothing_of_the_rings_before() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            set_memory(stage).await;
            stage.done(addresses(0, USER + USED)).await;
            assert!(resume(stage, 0, 0).await);
            stage.bridge.disconnect();
            stage.connect_and_negotiate().await;
            set_memory(stage).await;
            assert!(!resume(stage, 0, 0).await);
        })
    });
}

#[test]
fn the_inflight_buffer_is_mapped_in_whole_units() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            let start = INFLIGHT_OFFSET.0;
            let unit = 2 << 20;
            stage.journal();
            stage.done(inflight(start, 4096)).await;
            stage.done(inflight(start + unit, unit + 1)).await;
            let in_node = start - unit;
            let expected = [
                format!("SET_INFLIGHT_FD 200000@{in_node:x} 2x128"),
                format!("SET_INFLIGHT_FD 400000@{:x} 2x128", in_node + unit),
            ];
            assert_eq!(stage.journal(), expected);
            let mut found = [0; 8];
            stage.window.read_exact_at(&mut found, in_node).unwrap();
            assert_eq!(found, crate::back_end::MARK);
            // No buffer, not at the start of a unit, before the area, in driver memory, beyond everything.
            let bad = [
                (start, 0),
                (start + 4096, 4096),
                (start - unit, 4096),
                (0, 4096),
                (MEMORY_OFFSET.0, 4096),
                (start, MEMORY_OFFSET.0 - start + 1),
                (start, u64::MAX),
                (u64::MAX - unit + 1, unit),
            ];
            for (offset, size) in bad {
                stage.refused(inflight(offset, size)).await;
            }
            stage.refused(Request::SetInflightFd(BUFFER, Handle::BackChannel)).await;
            assert_eq!(stage.journal(), Vec::<String>::new());
        })
    });
}
