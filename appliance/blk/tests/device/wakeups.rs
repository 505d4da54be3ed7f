//! No notification is lost: the driver notifies only when it is asked to, and waits for the call then.

use vvu_test_driver::pauses::Pauses;

use crate::driver::{DATA, EVENT_IDX, FrontEnd, Req, is_signalled};
use crate::process::Program;

/// Requests of each run.
const REQUESTS: u32 = 5_000;

/// Longest pause between two requests, in nanoseconds: twice the window, so that many requests come just when the device asks
/// to be told.
const LONGEST_PAUSE_NS: u64 = 20_000;

/// Does requests with pauses of all lengths between them; returns how many of them the device had to be told of.
fn exchange(mode: &str, event_idx: bool) -> u32 {
    let program = Program::start_null(&["--poll", mode, "--poll-window", "10"]);
    let choose = |offered: u64| if event_idx { offered } else { offered & !EVENT_IDX };
    let mut front_end = FrontEnd::connect_with(&program.socket(), choose);
    let mut queue = front_end.queue(0, 64);
    let (mut pauses, mut published, mut kicks) = (Pauses::shorter_than(LONGEST_PAUSE_NS), 0, 0);
    for number in 0..REQUESTS {
        pauses.spin();
        queue.offer_request(&front_end.memory, 0, &Req::read(0, DATA, 512));
        if queue.publish_and_look(&front_end.memory, event_idx, &mut published) {
            kicks += 1;
            queue.kick();
        }
        while queue.take_used(&front_end.memory).is_none() {
            assert!(
                is_signalled(&queue.call, 10),
                "request {number} is lost with --poll {mode}, event_idx={event_idx}"
            );
            queue.call.read().unwrap();
        }
    }
    // A thread that looks for work sees these, too: each is answered when the thread has done as it says.
    front_end.announce_memory();
    assert_eq!(u32::from(queue.stop(&front_end)), REQUESTS, "--poll {mode}");
    kicks
}

#[test]
fn a_driver_that_notifies_only_when_it_is_asked_to_waits_for_nothing() {
    for event_idx in [true, false] {
        for mode in ["off", "auto"] {
            let kicks = exchange(mode, event_idx);
            assert!(kicks > REQUESTS / 100, "only {kicks} kicks with --poll {mode}: nothing is proven");
        }
        let kicks = exchange("always", event_idx);
        assert!(kicks <= 2, "{kicks} kicks for a device that looks all the time");
    }
}
