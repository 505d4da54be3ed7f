//! Stories of sessions. Each test plays the bridge, and sees the agent do what the control profile says.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vvu_agent::doorbell::Doorbell;
use vvu_agent::process::BackEndProcess;
use vvu_agent::reaper::{Reaper, Scope};
use vvu_agent::session::REQUEST_TIMEOUT;
use vvu_agent::supervisor::Supervisor;
use vvu_protocol::address::FileOffset;
use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::{Channel, Handle, Status};
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, Inflight, LogArea, RawMessage};
use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};
use vvu_socket::event;

use crate::back_end::{MARK, MISS, Script, program};
use crate::bridge::VECTORS;
use crate::stage::{
    ADDRESSES, DONE, MEMORY_IN_NODE, Request, Stage, WINDOW_LEN, file, play, process_id, region, start, state,
};

async fn a_driver_is_served(stage: &Stage) {
    start(stage).await;
    // The two regions around the hole have become one, so there are two marks: at each region's place in the window.
    for offset in [0, 8 << 20] {
        let mut found = [0; MARK.len()];
        let place = MEMORY_IN_NODE + offset;
        stage.window.read_exact_at(&mut found, place).unwrap();
        assert_eq!(found, MARK, "at {offset:#x}");
        stage.window.write_all_at(&[0; MARK.len()], place).unwrap();
    }
    let call = stage.called();
    for _ in 0..3 {
        event::signal(stage.eventfds.clone().vector(Vector(1)).unwrap()).unwrap();
        call.signalled().await.unwrap();
    }
    let stopped = stage.bridge.ask(Request::GetVringBase(state(0))).await;
    assert_eq!(stopped, FrontEndReply::VringState(state(0)));
    assert_eq!(stage.eventfds.in_use(), (vec![], vec![2, 3]), "a vring that has stopped is not kicked");
}

#[test]
fn a_driver_is_served_by_a_back_end_that_acknowledges() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.bridge.connect().await;
            a_driver_is_served(stage).await;
            stage.bridge.disconnect();
            stage.bridge.connect().await;
            assert_eq!(stage.eventfds.in_use(), (vec![], vec![]), "signals of a session end with it");
        })
    });
}

#[test]
fn a_driver_is_served_by_a_back_end_without_acknowledgements() {
    play(Script::Plain, |stage| {
        Box::pin(async {
            stage.bridge.connect().await;
            a_driver_is_served(stage).await;
        })
    });
}

#[test]
fn one_front_end_after_the_other_is_served_by_the_same_process() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            let mut ids = Vec::new();
            for _ in 0..3 {
                stage.bridge.connect().await;
                ids.push(process_id(stage).await);
                a_driver_is_served(stage).await;
                stage.bridge.disconnect();
            }
            assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        })
    });
}

#[test]
fn a_back_end_that_keeps_memory_of_an_earlier_session_is_replaced() {
    play(Script::Hoarding, |stage| {
        Box::pin(async {
            let mut ids = Vec::new();
            // More often than a back-end that fails would be started again.
            for _ in 0..8 {
                stage.bridge.connect().await;
                ids.push(process_id(stage).await);
                a_driver_is_served(stage).await;
                stage.bridge.disconnect();
            }
            ids.dedup();
            assert_eq!(ids.len(), 8);
        })
    });
}

#[test]
fn a_refusal_of_the_back_end_is_passed_on() {
    play(Script::Refusing, |stage| {
        Box::pin(async {
            stage.bridge.connect().await;
            stage.bridge.ask(Request::GetProtocolFeatures).await;
            stage.bridge.ask(Request::SetProtocolFeatures(ProtocolFeatures::empty())).await;
            let answer = stage.bridge.ask(Request::SetVringAddr(ADDRESSES)).await;
            assert_eq!(answer, FrontEndReply::Acknowledgement(22));
            assert_eq!(stage.bridge.ask(Request::SetVringNum(state(1))).await, DONE);
        })
    });
}

#[test]
fn what_cannot_be_carried_is_refused_and_the_session_goes_on() {
    use FrontEndRequest as R;
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.bridge.connect().await;
            let log = LogArea { size: 4096, mmap_offset: FileOffset(2 * ALIGNMENT - 4096) };
            let unknown = RawMessage::request(200, true, vec![1, 2, 3], vec![]);
            let outside = region(0, 4096, 0x7f00_0000_0000, WINDOW_LEN);
            let mut other_handle = region(0, 4096, 0x7f00_0000_0000, MEMORY_OFFSET.0);
            other_handle.1 = Handle::Peer(PeerId(1));
            let requests = [
                R::SetLogBase(log, Handle::Window),
                R::SetBackendReqFd(Handle::Peer(PeerId(1))),
                R::SetVringKick(file(Handle::Peer(PeerId(1)))),
                R::SetVringKick(file(Handle::Window)),
                R::SetVringKick(file(Handle::Vector(Vector(VECTORS)))),
                R::SetVringCall(file(Handle::Vector(Vector(0)))),
                R::SetVringErr(file(Handle::Window)),
                R::SetMemTable(vec![outside]),
                R::SetMemTable(vec![other_handle]),
                R::Unknown(unknown),
            ];
            for request in requests {
                stage.refused(request).await;
            }
            a_driver_is_served(stage).await;
        })
    });
}

/// Each request of the table that has no handle and no place elsewhere in these tests.
fn plain_requests() -> Vec<Request> {
    use FrontEndRequest as R;
    vec![
        R::GetFeatures,
        R::GetProtocolFeatures,
        R::GetQueueNum,
        R::ResetOwner,
        R::SetOwner,
        R::SetVringNum(state(8)),
        R::SetVringEnable(state(1)),
        R::GetVringBase(state(0)),
        R::SendRarp(0x0102_0304_0506),
        R::NetSetMtu(1500),
        R::Iotlb(MISS),
        R::ResetDevice,
        R::SetStatus(0xf),
        R::GetStatus,
        R::CheckDeviceState,
        R::SetVringEndian(state(1)),
        R::CreateCryptoSession(vec![0; 100]),
        R::CloseCryptoSession(1),
        R::PostcopyAdvise,
        R::PostcopyListen,
        R::PostcopyEnd,
        R::GetInflightFd(Inflight { mmap_size: 0, mmap_offset: FileOffset(0), queue_count: 1, queue_size: 8 }),
        R::GpuSetSocket(Handle::BackChannel),
        R::VringKick(state(0)),
        R::GetMaxMemSlots,
        R::GetSharedObject([1; 16]),
        R::GetShmemConfig,
    ]
}

#[test]
fn each_request_reaches_the_back_end_or_is_refused_as_the_table_says() {
    for script in [Script::Proper, Script::Plain] {
        play(script, |stage| {
            Box::pin(async move {
                stage.connect_and_negotiate().await;
                for request in plain_requests() {
                    let (code, name) = (request.code(), request.name());
                    stage.journal();
                    let expected: &[&str] = match carriage::front_end(code) {
                        Carriage::Refused(_) | Carriage::Answered => {
                            stage.refused(request).await;
                            &[]
                        }
                        _ => {
                            stage.ask(request).await;
                            &[name]
                        }
                    };
                    let mut told = stage.journal();
                    // What a back-end without REPLY_ACK is asked after each request.
                    told.retain(|line| line != "GET_FEATURES" || name == "GET_FEATURES");
                    assert_eq!(told, expected, "{name}");
                }
            })
        });
    }
}

#[test]
fn frames_of_other_sessions_are_dropped() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            let bridge = &stage.bridge;
            let queue_count = || Request::GetQueueNum.encode(true);
            // Before the first session, and of a session that will be.
            bridge.send_frame(Channel::FrontEnd, 0, queue_count());
            bridge.send_frame(Channel::FrontEnd, 1, queue_count());
            bridge.send_bytes(vec![0xff; 30]);
            bridge.connect().await;
            bridge.send_frame(Channel::FrontEnd, 0, queue_count());
            bridge.send_frame(Channel::FrontEnd, 2, queue_count());
            bridge.send_frame(Channel::BackEnd, 3, queue_count());
            assert!(matches!(bridge.ask(Request::GetFeatures).await, FrontEndReply::Number(_)));
            assert!(!bridge.has_frames());
            a_driver_is_served(stage).await;
        })
    });
}

#[test]
fn a_frame_may_overtake_the_status() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            // Change and frame come together; the agent looks at the frame first.
            stage.bridge.connect().await;
            stage.bridge.send(Request::GetFeatures);
            let answer = stage.bridge.frame().await;
            assert_eq!((answer.session, answer.message.header.request), (1, 1));
        })
    });
}

#[test]
fn what_is_no_request_ends_the_session() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            let bridge = &stage.bridge;
            let message = |code, payload| RawMessage::request(code, true, payload, vec![]);
            let with_handles = |code, count| RawMessage::request(code, true, vec![0; 8], vec![Handle::Window; count]);
            let reply = RawMessage::reply(1, vec![0; 8], vec![]);
            let frames: [(Channel, RawMessage<Handle>); 8] = [
                (Channel::FrontEnd, reply.clone()),
                (Channel::BackEnd, reply),
                (Channel::BackEnd, message(2, vec![])),
                (Channel::FrontEnd, message(8, vec![0; 7])),
                (Channel::FrontEnd, message(5, vec![0xff; 8])),
                (Channel::FrontEnd, with_handles(12, 2)),
                (Channel::FrontEnd, with_handles(2, 1)),
                (Channel::FrontEnd, message(24, vec![0xff; 12])),
            ];
            for (channel, frame) in frames {
                bridge.connect().await;
                bridge.send_frame(channel, bridge.session(), frame);
                bridge.orphaned().await;
            }
            for bytes in [vec![], vec![0; 19], vec![0xff; 4096], vec![0; 5000]] {
                bridge.connect().await;
                bridge.send_bytes(bytes);
                bridge.orphaned().await;
            }
            assert!(!bridge.has_frames());
            bridge.connect().await;
            a_driver_is_served(stage).await;
        })
    });
}

/// A session that ends because the back-end fails at `request`; then another one with a new process.
async fn fails_and_comes_back(stage: &Stage, request: Request) {
    stage.bridge.connect().await;
    let first = process_id(stage).await;
    stage.bridge.send(request);
    stage.bridge.orphaned().await;
    stage.bridge.connect().await;
    assert_ne!(process_id(stage).await, first);
    assert!(!stage.bridge.has_frames());
}

#[test]
fn a_back_end_that_dies_of_a_request_is_started_again() {
    play(Script::Dying, |stage| Box::pin(fails_and_comes_back(stage, Request::GetVringBase(state(0)))));
}

#[test]
fn a_back_end_that_answers_another_question_is_ended() {
    play(Script::Lying, |stage| Box::pin(fails_and_comes_back(stage, Request::GetVringBase(state(0)))));
}

#[test]
fn a_back_end_that_speaks_unasked_is_ended() {
    play(Script::Chatty, |stage| Box::pin(fails_and_comes_back(stage, Request::SetOwner)));
}

#[test]
fn a_back_end_that_does_not_answer_is_ended() {
    play(Script::Silent, |stage| {
        Box::pin(async {
            stage.bridge.connect().await;
            let first = process_id(stage).await;
            // From here on nothing happens but time: the clock jumps to where the agent stops waiting.
            tokio::time::pause();
            let asked = tokio::time::Instant::now();
            stage.bridge.send(Request::GetVringBase(state(0)));
            stage.bridge.status(Status::FRONT_END_UP).await;
            let waited = asked.elapsed();
            tokio::time::resume();
            assert!(waited >= REQUEST_TIMEOUT && waited < REQUEST_TIMEOUT * 2, "{waited:?}");
            stage.bridge.disconnect();
            stage.bridge.connect().await;
            assert_ne!(process_id(stage).await, first);
        })
    });
}

#[test]
fn a_front_end_that_goes_while_it_waits_leaves_nothing_behind() {
    play(Script::Silent, |stage| {
        Box::pin(async {
            stage.bridge.connect().await;
            let first = process_id(stage).await;
            start(stage).await;
            stage.bridge.send(Request::GetVringBase(state(0)));
            stage.called().signalled().await.unwrap();
            stage.bridge.disconnect();
            stage.bridge.connect().await;
            assert_eq!(process_id(stage).await, first);
            assert!(!stage.bridge.has_frames());
        })
    });
}

#[test]
fn a_back_end_that_fails_too_often_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (reaper, reaper_task) = Reaper::new(Scope::OwnChildren).unwrap();
        let window = Arc::new(rustix::fs::memfd_create("window", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let mut program = program(Script::StillBorn, directory.path());
        // Each start leaves a line.
        let script = "echo start >> \"$0\"; exit 3";
        let log = directory.path().join("starts");
        program.program = "/bin/sh".into();
        program.arguments = vec!["-c".into(), script.into(), log.clone().into()];
        let socket = program.sockets[0].clone();
        let mut supervisor = Supervisor::new(BackEndProcess::new(program, reaper), socket, &window).unwrap();
        tokio::select! {
            ready = supervisor.ready() => {
                let error = ready.unwrap_err().to_string();
                assert!(error.ends_with("the last time it ended before it listened: exit code 3"), "{error}");
            }
            ended = reaper_task.run() => panic!("reaper ended: {ended:?}"),
        }
        assert_eq!(std::fs::read_to_string(log).unwrap().lines().count(), 1 + vvu_agent::restarts::MAX_RESTARTS);
        assert!(supervisor.ready().await.is_err());
    });
}
