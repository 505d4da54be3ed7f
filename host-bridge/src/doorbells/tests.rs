//! The relay by itself, and the hand-over with a client that reads what it is sent, or not.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd as make_eventfd};
use tokio::runtime::Builder;
use tokio::task::LocalSet;

use super::*;

const RELAYED: Vector = Vector(0);
const CALL: PeerId = PeerId(1);

/// On one thread with tasks of its own, as the bridge itself.
fn in_a_bridge(test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, test);
}

fn eventfd() -> Rc<OwnedFd> {
    Rc::new(event::create().unwrap())
}

/// Doorbells of one queue, and the appliance's ends: vector, call.
fn doorbells() -> (Doorbells, OwnedFd, OwnedFd) {
    let doorbells = Doorbells::new(1).unwrap();
    let Announcement { mut vectors, mut peers } = doorbells.announce().unwrap();
    (doorbells, vectors.remove(0), peers.remove(0).1)
}

/// The front-end's ends: kick, call.
fn connect(doorbells: &mut Doorbells) -> (Rc<OwnedFd>, Rc<OwnedFd>) {
    let (kick, target) = (eventfd(), eventfd());
    doorbells.set_kick(0, RELAYED, Some(Rc::clone(&kick))).unwrap();
    doorbells.set_target(0, OutwardSignal::Call, CALL, Some(Rc::clone(&target))).unwrap();
    (kick, target)
}

#[test]
fn a_kick_that_the_relay_has_not_seen_yet_counts() {
    in_a_bridge(async {
        let (mut doorbells, vector, _) = doorbells();
        for next in [Some(eventfd()), None] {
            let kick = eventfd();
            doorbells.set_kick(0, RELAYED, Some(Rc::clone(&kick))).unwrap();
            event::signal(kick.as_fd()).unwrap();
            // Nothing is awaited: the relay has no turn in between.
            doorbells.set_kick(0, RELAYED, next).unwrap();
            assert_eq!(event::take(&vector).unwrap(), Some(1));
        }
    });
}

#[test]
fn a_vring_that_stops_passes_its_calls_on_at_once() {
    in_a_bridge(async {
        let (mut doorbells, vector, call) = doorbells();
        let (kick, target) = connect(&mut doorbells);
        event::signal(&call).unwrap();
        event::signal(kick.as_fd()).unwrap();
        doorbells.stop(0).unwrap();
        assert_eq!(event::take(target.as_fd()).unwrap(), Some(1));
        assert_eq!(event::take(&vector).unwrap(), None);
    });
}

#[test]
fn a_reset_forgets_what_was_signalled() {
    in_a_bridge(async {
        let (mut doorbells, vector, call) = doorbells();
        let (kick, target) = connect(&mut doorbells);
        event::signal(&call).unwrap();
        event::signal(kick.as_fd()).unwrap();
        doorbells.reset().unwrap();
        tokio::task::yield_now().await;
        assert_eq!(event::take(target.as_fd()).unwrap(), None);
        assert_eq!(event::take(&vector).unwrap(), None);
        doorbells.set_target(0, OutwardSignal::Call, CALL, Some(Rc::clone(&target))).unwrap();
        assert_eq!(event::take(target.as_fd()).unwrap(), None);
    });
}

#[test]
fn each_signal_that_has_both_ends_is_made_once() {
    in_a_bridge(async {
        let (mut doorbells, vector, _) = doorbells();
        doorbells.signal_all();
        assert_eq!(event::take(&vector).unwrap(), None, "nobody listens there");
        let (_kick, target) = connect(&mut doorbells);
        assert_eq!(event::take(target.as_fd()).unwrap(), None, "a call was kept that was never made");
        doorbells.signal_all();
        assert_eq!(event::take(&vector).unwrap(), Some(1));
        assert_eq!(event::take(target.as_fd()).unwrap(), Some(1));
    });
}

/// Doorbells of two queues whose eventfds are handed over to a device with `vectors` vectors, and its side of the socket.
fn handed_over(vectors: u16, readers: &Rc<Readers>) -> (Doorbells, UnixStream) {
    let mut doorbells = Doorbells::new(2).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (task, port) = crate::appliance::doorbell::Doorbell::new(ours, [7; 16]).unwrap();
    tokio::task::spawn_local(task.run(Announcement { vectors: Vec::new(), peers: Vec::new() }));
    doorbells.hand_over(port, Rc::clone(readers), vectors);
    (doorbells, theirs)
}

/// The numbers that the client is sent next.
async fn messages(client: &UnixStream, count: usize) -> Vec<i64> {
    let mut client = client.try_clone().unwrap();
    let next = move || {
        let mut bytes = [0; 8];
        std::io::Read::read_exact(&mut client, &mut bytes).unwrap();
        i64::from_le_bytes(bytes)
    };
    tokio::task::spawn_blocking(move || std::iter::repeat_with(next).take(count).collect()).await.unwrap()
}

/// Version, own id and shared memory.
const INTRODUCTION: usize = 3;

async fn settle() {
    tokio::time::sleep(Duration::from_millis(2)).await;
}

#[test]
fn an_eventfd_keeps_its_vector_and_its_peer() {
    in_a_bridge(async {
        let (mut doorbells, client) = handed_over(5, &Rc::default());
        let (one, other) = (eventfd(), eventfd());
        let again = Rc::new(one.try_clone().unwrap());
        let vectors = [&one, &other, &again, &one].map(|kick| doorbells.vector(0, Some(kick)));
        assert_eq!(vectors, [2, 3, 2, 2].map(|vector| Some(Vector(vector))));
        let peers = [&one, &other, &again].map(|call| doorbells.peer(1, OutwardSignal::Call, Some(call)));
        assert_eq!(peers, [6, 7, 6].map(|peer| Some(PeerId(peer))));
        settle().await;
        assert_eq!(messages(&client, INTRODUCTION + 4).await[INTRODUCTION..], [0, 0, 6, 7]);
        doorbells.all_known().await.unwrap();
    });
}

#[test]
fn nobody_hears_of_a_vector_before_the_vmm_has_read_of_it() {
    in_a_bridge(async {
        let (mut doorbells, client) = handed_over(5, &Rc::default());
        doorbells.all_known().await.unwrap();
        doorbells.vector(0, Some(&eventfd())).unwrap();
        doorbells.peer(0, OutwardSignal::Call, Some(&eventfd())).unwrap();
        for _ in 0..INTRODUCTION + 2 {
            let known = tokio::time::timeout(Duration::from_millis(5), doorbells.all_known()).await;
            assert!(known.is_err(), "it is known before it was read");
            messages(&client, 1).await;
        }
        doorbells.all_known().await.unwrap();
    });
}

#[test]
fn what_cannot_be_handed_over_is_relayed() {
    in_a_bridge(async {
        let (mut doorbells, _client) = handed_over(3, &Rc::default());
        let blocking = Rc::new(make_eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        assert_eq!(doorbells.vector(1, Some(&blocking)), Some(Vector(1)), "its flags would change");
        assert_eq!(doorbells.peer(1, OutwardSignal::Call, Some(&blocking)), Some(PeerId(3)));
        assert_eq!(doorbells.peer(1, OutwardSignal::Error, Some(&eventfd())), Some(PeerId(4)), "errors are rare");
        let last = eventfd();
        assert_eq!(doorbells.vector(1, Some(&last)), Some(Vector(2)));
        assert_eq!(doorbells.vector(0, Some(&eventfd())), Some(Vector(0)), "the device has no more vectors");
        assert_eq!(doorbells.vector(0, Some(&last)), Some(Vector(2)));
        assert_eq!(doorbells.vector(1, None), Some(Vector(1)));
        assert_eq!(doorbells.vector(2, Some(&last)), None, "there is no such queue");
    });
}

#[test]
fn peers_that_are_not_used_any_more_are_withdrawn() {
    in_a_bridge(async {
        let (mut doorbells, client) = handed_over(2, &Rc::default());
        let mut call = |call: &Rc<OwnedFd>| {
            let peer = doorbells.peer(0, OutwardSignal::Call, Some(call)).unwrap();
            doorbells.call_was_set(0, peer, Some(Rc::clone(call))).unwrap();
            peer.0
        };
        let first = eventfd();
        assert_eq!(call(&first), 6);
        let others: Vec<_> = (0..7).map(|_| call(&eventfd())).collect();
        assert_eq!(others, (7..14).collect::<Vec<_>>());
        assert_eq!(call(&first), 6, "there is room for four of each queue");
        assert_eq!(call(&eventfd()), 14);
        assert_eq!(call(&first), 6, "it was used a moment ago");
        doorbells.withdraw_peers();
        assert_eq!(doorbells.peer(0, OutwardSignal::Call, Some(&first)), Some(PeerId(15)), "ids are used once");
        settle().await;
        let messages = messages(&client, INTRODUCTION + 19).await;
        let sent: Vec<_> = (6..15).chain([7, 8, 9, 10, 11, 12, 13, 14, 6, 15]).collect();
        assert_eq!(messages[INTRODUCTION..], sent);
    });
}

#[test]
fn who_gets_a_new_eventfd_gets_a_signal_with_it() {
    in_a_bridge(async {
        let (mut doorbells, _client) = handed_over(9, &Rc::default());
        let (kick, masked, unmasked) = (eventfd(), eventfd(), eventfd());
        let vector = doorbells.vector(0, Some(&kick)).unwrap();
        assert_eq!(event::take(&kick).unwrap(), Some(1), "a read must not wait while the VMM takes it over");
        doorbells.set_kick(0, vector, Some(Rc::clone(&kick))).unwrap();
        assert_eq!(event::take(&kick).unwrap(), Some(1), "kicks may have gone elsewhere");
        for call in [&masked, &unmasked, &masked] {
            let peer = doorbells.peer(0, OutwardSignal::Call, Some(call)).unwrap();
            event::take(call).unwrap();
            doorbells.call_was_set(0, peer, Some(Rc::clone(call))).unwrap();
            assert_eq!(event::take(call).unwrap(), Some(1), "calls may have gone to the one before");
        }
        doorbells.signal_all();
        assert_eq!([&kick, &unmasked, &masked].map(|it| event::take(it).unwrap()), [Some(1), None, Some(1)]);
        // Back to the relay, which keeps for the next eventfd what nobody can be told now.
        doorbells.set_target(0, OutwardSignal::Call, CALL, None).unwrap();
        doorbells.call_was_set(0, CALL, None).unwrap();
        doorbells.set_target(0, OutwardSignal::Call, CALL, Some(Rc::clone(&unmasked))).unwrap();
        assert_eq!(event::take(&unmasked).unwrap(), Some(1));
        doorbells.stop(0).unwrap();
        doorbells.signal_all();
        assert_eq!(event::take(&kick).unwrap(), None, "a vring that has stopped is not kicked");
    });
}

#[test]
fn kicks_are_repeated_until_the_other_vmm_is_gone() {
    in_a_bridge(async {
        let readers = Rc::default();
        let (mut before, client_before) = handed_over(9, &readers);
        let (mut after, _client) = handed_over(9, &readers);
        let kick = eventfd();
        for doorbells in [&mut before, &mut after] {
            let vector = doorbells.vector(0, Some(&kick)).unwrap();
            doorbells.set_kick(0, vector, Some(Rc::clone(&kick))).unwrap();
        }
        drop(before);
        after.signal_all();
        for _ in 0..3 {
            // The VMM that is still there takes it.
            event::take(&kick).unwrap();
            Event::new(kick.try_clone().unwrap()).unwrap().signalled().await.unwrap();
        }
        drop(client_before);
        tokio::time::sleep(3 * REPEAT_INTERVAL).await;
        event::take(&kick).unwrap();
        tokio::time::sleep(3 * REPEAT_INTERVAL).await;
        assert_eq!(event::take(&kick).unwrap(), None, "nobody else is there");
    });
}

#[test]
fn a_flag_that_a_vmm_has_taken_away_is_set_again() {
    in_a_bridge(async {
        let (mut doorbells, client) = handed_over(9, &Rc::default());
        let kick = eventfd();
        doorbells.vector(0, Some(&kick)).unwrap();
        rustix::fs::fcntl_setfl(&kick, rustix::fs::OFlags::RDWR).unwrap();
        drop(client);
        settle().await;
        assert!(event::is_nonblocking(&kick).unwrap());
    });
}
