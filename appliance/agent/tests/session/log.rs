//! The dirty log.

use std::os::unix::fs::FileExt;

use vvu_agent::doorbell::Doorbell;
use vvu_protocol::address::FileOffset;
use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::message::{FrontEndReply, LogArea};
use vvu_protocol::window::{INFLIGHT_OFFSET, LOG_LEN, LOG_OFFSET};
use vvu_socket::event::Event;

use crate::back_end::{MARK, Script};
use crate::stage::{Request, play};

fn log(offset: u64, size: u64) -> Request {
    Request::SetLogBase(LogArea { size, mmap_offset: FileOffset(offset) }, Handle::Window)
}

#[test]
fn the_log_is_mapped_in_whole_units() {
    for script in [Script::Proper, Script::Plain] {
        play(script, |stage| {
            Box::pin(async {
                let (start, unit) = (LOG_OFFSET.0, 2 << 20);
                stage.connect_and_negotiate().await;
                stage.journal();
                // As large as for a VM of 256 MiB, in the first and in the last place, and as large as can be.
                let logs = [(start, 0x2000), (start + LOG_LEN - unit, unit), (start, LOG_LEN)];
                for (offset, size) in logs {
                    assert_eq!(stage.ask(log(offset, size)).await, FrontEndReply::LogBase);
                }
                let expected = [
                    "SET_LOG_BASE 200000@0".to_owned(),
                    format!("SET_LOG_BASE 200000@{:x}", LOG_LEN - unit),
                    format!("SET_LOG_BASE {LOG_LEN:x}@0"),
                ];
                assert_eq!(stage.journal(), expected);
                for offset in [0, LOG_LEN - unit] {
                    let mut found = [0; MARK.len()];
                    stage.window.read_exact_at(&mut found, offset).unwrap();
                    assert_eq!(found, MARK);
                }
            })
        });
    }
}

#[test]
fn a_log_that_is_not_in_its_area_is_refused() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.journal();
            let (start, unit) = (LOG_OFFSET.0, 2 << 20);
            let bad = [
                (start, 0),
                (start + 4096, 4096),
                (0, 4096),
                (start - unit, unit),
                (start, LOG_LEN + 1),
                (start + unit, LOG_LEN),
                (INFLIGHT_OFFSET.0, 4096),
                (start, u64::MAX),
                (u64::MAX, 1),
            ];
            for (offset, size) in bad {
                stage.refused(log(offset, size)).await;
            }
            let area = LogArea { size: 4096, mmap_offset: FileOffset(start) };
            stage.refused(Request::SetLogBase(area, Handle::Peer(PeerId(1)))).await;
            assert_eq!(stage.journal(), Vec::<String>::new());
        })
    });
}

#[test]
fn the_eventfd_of_the_log_signals_its_peer() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.done(Request::SetLogFd(Handle::Peer(PeerId(9)))).await;
            let eventfd = stage.eventfds.clone().peer(PeerId(9)).unwrap();
            Event::new(eventfd.try_clone().unwrap()).unwrap().signalled().await.unwrap();
            stage.refused(Request::SetLogFd(Handle::Vector(Vector(0)))).await;
        })
    });
}
