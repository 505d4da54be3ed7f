//! No notification is lost: the driver notifies only when it is asked to, and waits for the call then.

use vvu_test_driver::event::is_signalled;
use vvu_test_driver::pauses::Pauses;

use crate::driver::{DATA_ONLY, EVENT_IDX, Machine};
use crate::frames::{NO_OFFLOAD, between};
use crate::program::Program;

/// Packets of each run.
const PACKETS: u32 = 5_000;

/// Longest pause between two packets, in nanoseconds: twice the window, so that many packets come just when the device asks
/// to be told.
const LONGEST_PAUSE_NS: u64 = 20_000;

/// Sends packets with pauses of all lengths between them; returns how many of them the device had to be told of.
fn exchange(mode: &str, event_idx: bool) -> u32 {
    let program = Program::start(&[""], &["--poll", mode, "--poll-window", "10"]);
    let features = if event_idx { DATA_ONLY } else { DATA_ONLY & !EVENT_IDX };
    let mut machine = Machine::connect(&program, 0, features);
    let mut queue = machine.queue(1, 64);
    let frame = between(0, 1, 60);
    let (mut pauses, mut published, mut kicks) = (Pauses::shorter_than(LONGEST_PAUSE_NS), 0, 0);
    for number in 0..PACKETS {
        pauses.spin();
        queue.offer_packet(&machine, 0, &NO_OFFLOAD, &frame);
        if queue.publish_and_look(&machine.memory, event_idx, &mut published) {
            kicks += 1;
            queue.kick();
        }
        while queue.take_used(&machine.memory).is_none() {
            assert!(is_signalled(&queue.call, 10), "packet {number} is lost with --poll {mode}, event_idx={event_idx}");
            queue.call.read().unwrap();
        }
    }
    // A thread that looks for work sees these, too: each is answered when the thread has done as it says.
    machine.announce_memory();
    assert_eq!(u32::from(queue.stop(&machine)), PACKETS, "--poll {mode}");
    kicks
}

#[test]
fn a_driver_that_notifies_only_when_it_is_asked_to_waits_for_nothing() {
    for event_idx in [true, false] {
        for mode in ["off", "auto"] {
            let kicks = exchange(mode, event_idx);
            assert!(kicks > PACKETS / 100, "only {kicks} kicks with --poll {mode}: nothing is proven");
        }
        let kicks = exchange("always", event_idx);
        assert!(kicks <= 2, "{kicks} kicks for a device that looks all the time");
    }
}
