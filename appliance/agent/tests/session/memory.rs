//! Driver memory that comes and goes.

use std::os::unix::fs::FileExt;

use vvu_protocol::address::FileOffset;
use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::FrontEndReply;
use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};

use crate::back_end::{MARK, SLOTS, Script};
use crate::command::{Command, command};
use crate::stage::{MEMORY_IN_NODE, Request, Stage, WINDOW_LEN, file, play, region, state};

const USER: u64 = 0x7f00_0000_0000;

/// A file of one unit, far from the others everywhere but in the window.
fn alone(index: u64) -> (MemoryRegion, Handle) {
    region(index << 30, ALIGNMENT, USER + (index << 31), MEMORY_OFFSET.0 + index * ALIGNMENT)
}

fn add((region, handle): (MemoryRegion, Handle)) -> Request {
    Request::AddMemReg(region, handle)
}

/// As QEMU sends it: without an offset.
fn remove((region, _): (MemoryRegion, Handle)) -> Request {
    Request::RemMemReg(MemoryRegion { mmap_offset: FileOffset(0), ..region })
}

/// The journal's messages about memory.
fn about_memory(stage: &Stage) -> Vec<String> {
    let mut lines = stage.journal();
    lines.retain(|line| line.contains("MEM_"));
    lines
}

/// What the journal says of [`alone`].
fn place(index: u64) -> String {
    format!("{:x}+{ALIGNMENT:x}@{:x}", index << 30, MEMORY_IN_NODE + index * ALIGNMENT)
}

#[test]
fn slots_of_the_front_end_become_one_table() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            for index in 0..3 {
                stage.done(add(alone(index))).await;
            }
            stage.done(remove(alone(1))).await;
            let expected = [
                format!("SET_MEM_TABLE {}", place(0)),
                format!("SET_MEM_TABLE {} {}", place(0), place(1)),
                format!("SET_MEM_TABLE {} {} {}", place(0), place(1), place(2)),
                format!("SET_MEM_TABLE {} {}", place(0), place(2)),
            ];
            assert_eq!(about_memory(stage), expected);
            // Each region was written to where it lies in the window.
            for (index, expected) in [(0, MARK), (1, MARK), (2, MARK), (3, [0; 8])] {
                let mut found = [0; MARK.len()];
                stage.window.read_exact_at(&mut found, MEMORY_IN_NODE + index * ALIGNMENT).unwrap();
                assert_eq!(found, expected, "file {index}");
            }
        })
    });
}

#[test]
fn regions_of_one_file_change_and_the_back_end_hears_nothing() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            let start = MEMORY_OFFSET.0;
            let of_file = |at: u64, size: u64| region(at, size, USER + at, start + at);
            stage.connect_and_negotiate().await;
            stage.done(add(of_file(0, 0xa_0000))).await;
            stage.done(add(of_file(0xc_0000, (8 << 20) - 0xc_0000))).await;
            stage.journal();
            // As firmware has it: shadow memory becomes writable, or not.
            stage.done(remove(of_file(0xc_0000, (8 << 20) - 0xc_0000))).await;
            stage.done(add(of_file(0xc_0000, 0x4_0000))).await;
            stage.done(add(of_file(0x10_0000, (8 << 20) - 0x10_0000))).await;
            stage.done(Request::SetMemTable(vec![of_file(0, 8 << 20)])).await;
            assert_eq!(about_memory(stage), Vec::<String>::new());
        })
    });
}

#[test]
fn a_device_that_runs_keeps_its_regions_if_the_back_end_has_slots() {
    play(Script::Slotted, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.done(Request::SetMemTable(vec![alone(0), alone(1)])).await;
            stage.done(Request::SetVringKick(file(Handle::Vector(Vector(1))))).await;
            stage.journal();
            stage.done(add(alone(5))).await;
            stage.done(remove(alone(1))).await;
            let expected = [format!("ADD_MEM_REG {}", place(5)), format!("REM_MEM_REG {}", place(1))];
            assert_eq!(about_memory(stage), expected);
            // Stopped, one message says it all.
            stage.ask(Request::GetVringBase(state(0))).await;
            stage.done(add(alone(7))).await;
            assert_eq!(about_memory(stage), [format!("SET_MEM_TABLE {} {} {}", place(0), place(5), place(7))]);
        })
    });
}

#[test]
fn more_than_eight_files_need_a_back_end_with_slots() {
    play(Script::Slotted, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            for index in 0..31 {
                stage.done(add(alone(index))).await;
            }
            let lines = about_memory(stage);
            assert_eq!(lines.iter().filter(|line| line.starts_with("SET_MEM_TABLE")).count(), 8);
            assert_eq!(lines[9..], (8..31).map(|index| format!("ADD_MEM_REG {}", place(index))).collect::<Vec<_>>());
            for index in (5..31).rev() {
                stage.done(remove(alone(index))).await;
            }
            let lines = about_memory(stage);
            assert_eq!(lines.first().unwrap(), &format!("REM_MEM_REG {}", place(30)));
            let last = (0..5).map(|index| format!(" {}", place(index))).collect::<String>();
            assert_eq!(lines.last().unwrap(), &format!("SET_MEM_TABLE{last}"));
            // To its last slot, and not beyond.
            let all = (0..SLOTS).map(alone).collect::<Vec<_>>();
            for region in &all[5..] {
                stage.done(add(*region)).await;
            }
            let beyond = region(1, 0x1000, 0x1000, MEMORY_OFFSET.0);
            stage.refused(add(beyond)).await;
        })
    });
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            for index in 0..8 {
                stage.done(add(alone(index))).await;
            }
            stage.journal();
            stage.refused(add(alone(8))).await;
            assert_eq!(stage.journal(), Vec::<String>::new());
            // What was refused is not there, and the rest is as it was.
            stage.refused(remove(alone(8))).await;
            stage.done(remove(alone(7))).await;
            stage.done(add(alone(8))).await;
        })
    });
}

#[test]
fn regions_that_cannot_be_are_refused() {
    play(Script::Slotted, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.done(add(alone(0))).await;
            let outside = region(1 << 40, ALIGNMENT, 1 << 40, WINDOW_LEN - 0x1000);
            let in_header = region(1 << 40, ALIGNMENT, 1 << 40, 0);
            let in_log = region(1 << 40, ALIGNMENT, 1 << 40, ALIGNMENT);
            let empty = region(1 << 40, 0, 1 << 40, MEMORY_OFFSET.0 + ALIGNMENT);
            let endless = region(1 << 40, u64::MAX - 0xfff, 1 << 40, MEMORY_OFFSET.0 + ALIGNMENT);
            for bad in [outside, in_header, in_log, empty, endless, alone(0)] {
                stage.refused(add(bad)).await;
            }
            stage.refused(Request::AddMemReg(alone(1).0, Handle::Peer(PeerId(1)))).await;
            stage.refused(remove(alone(1))).await;
            let half = MemoryRegion { size: ALIGNMENT / 2, ..alone(0).0 };
            stage.refused(remove((half, Handle::Window))).await;
            stage.done(remove(alone(0))).await;
            stage.refused(remove(alone(0))).await;
            assert_eq!(about_memory(stage).last().unwrap(), &format!("REM_MEM_REG {}", place(0)));
        })
    });
}

#[test]
fn a_new_session_begins_without_memory() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            for _ in 0..2 {
                stage.connect_and_negotiate().await;
                stage.done(add(alone(0))).await;
                assert_eq!(about_memory(stage), [format!("SET_MEM_TABLE {}", place(0))]);
                stage.bridge.disconnect();
            }
            stage.connect_and_negotiate().await;
            stage.refused(remove(alone(0))).await;
        })
    });
}

#[test]
fn what_the_back_end_refuses_is_passed_on_and_can_be_tried_again() {
    play(Script::Slotted, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.done(Request::SetMemTable(vec![alone(0), alone(1)])).await;
            stage.done(Request::SetVringKick(file(Handle::Vector(Vector(1))))).await;
            // It does not remove what it has: so it is told something else first, behind the agent's back.
            stage.done(command(Command::ForgetMemory)).await;
            let answer = stage.ask(remove(alone(1))).await;
            assert_eq!(answer, FrontEndReply::Acknowledgement(2));
            stage.journal();
            stage.ask(remove(alone(1))).await;
            assert_eq!(about_memory(stage), [format!("REM_MEM_REG {}", place(1))]);
        })
    });
}
