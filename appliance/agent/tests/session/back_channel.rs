//! Requests of the back-end.

use vvu_protocol::control::{Channel, Handle, Status};
use vvu_protocol::message::{BackEndReply, BackEndRequest, ConfigSpace, FrontEndReply, Iotlb, RawMessage};

use crate::back_end::{FLOOD, MISS, Script};
use crate::command::{Command, command};
use crate::stage::{DONE, Request, Stage, play, process_id};

const CONFIG_CHANGE: u32 = 2;
const IOTLB_MSG: u32 = 1;

async fn connect(stage: &Stage) {
    stage.connect_and_negotiate().await;
    stage.done(Request::SetBackendReqFd(Handle::BackChannel)).await;
}

/// The answer to the request that is under way.
async fn answer(stage: &Stage) -> u64 {
    let message = stage.bridge.frame().await.message;
    match FrontEndReply::decode(message.header.request, message).unwrap() {
        FrontEndReply::Acknowledgement(value) => value,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_back_end_asks_while_it_is_asked() {
    for script in [Script::Proper, Script::Plain] {
        play(script, |stage| {
            Box::pin(async move {
                connect(stage).await;
                // It answers the command only when its own request is answered.
                for value in [0, 7] {
                    stage.bridge.send(command(Command::AskConfigChange));
                    assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
                    stage.bridge.answer_back_end(CONFIG_CHANGE, value);
                    let expected = if script == Script::Plain { 0 } else { value };
                    assert_eq!(answer(stage).await, expected);
                }
                stage.bridge.send(command(Command::AskMiss));
                assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::Iotlb(MISS));
                stage.bridge.answer_back_end(IOTLB_MSG, 0);
                assert_eq!(answer(stage).await, 0);
            })
        });
    }
}

#[test]
fn a_front_end_asks_while_it_is_asked() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            connect(stage).await;
            stage.done(command(Command::TellConfigChange)).await;
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
            // As QEMU does, before it answers.
            let config = ConfigSpace { offset: 0, flags: 0, bytes: vec![5; 60] };
            let read = stage.ask(Request::GetConfig(config.clone())).await;
            assert_eq!(read, FrontEndReply::Config(Some(config)));
            let update = Iotlb { kind: 2, ..MISS };
            assert_eq!(stage.ask(Request::Iotlb(update)).await, FrontEndReply::Number(0));
            stage.bridge.answer_back_end(CONFIG_CHANGE, 0);
            // It was told nothing that it had not asked for: the next answer is to the next request.
            stage.bridge.send(command(Command::AskMiss));
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::Iotlb(MISS));
            stage.bridge.answer_back_end(IOTLB_MSG, 0);
            assert_eq!(answer(stage).await, 0);
        })
    });
}

#[test]
fn what_cannot_cross_is_refused_to_the_back_end() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            connect(stage).await;
            for asked in [Command::AskSharedObject, Command::AskLookup, Command::AskUnknown] {
                let answer = stage.ask(command(asked)).await;
                assert!(matches!(answer, FrontEndReply::Acknowledgement(value) if value != 0), "{asked:?}");
            }
            assert!(!stage.bridge.has_frames());
            stage.refused(Request::SetBackendReqFd(Handle::Stream)).await;
        })
    });
}

#[test]
fn a_flood_stays_with_the_back_end() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            connect(stage).await;
            stage.done(command(Command::Flood)).await;
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
            // Nobody answers; the back-end is stuck in the middle of it, and does what it is asked all the same.
            let mut sent = 0;
            loop {
                let before = sent;
                let FrontEndReply::Acknowledgement(count) = stage.ask(command(Command::CountFlood)).await else {
                    panic!("no count")
                };
                sent = count;
                if sent == before && sent > 0 {
                    break;
                }
            }
            assert!(sent < FLOOD / 10, "{sent}");
            assert!(!stage.bridge.has_frames());
            // One answer, one more request.
            for _ in 0..10 {
                stage.bridge.answer_back_end(CONFIG_CHANGE, 0);
                assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
                assert!(!stage.bridge.has_frames());
            }
        })
    });
}

#[test]
fn a_newer_back_channel_takes_the_place_of_the_one_before() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            connect(stage).await;
            stage.done(command(Command::TellConfigChange)).await;
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
            // While a request of the one before is under way.
            stage.done(Request::SetBackendReqFd(Handle::BackChannel)).await;
            stage.done(Request::SetBackendReqFd(Handle::BackChannel)).await;
            stage.bridge.answer_back_end(CONFIG_CHANGE, 0);
            stage.bridge.send(command(Command::AskConfigChange));
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
            stage.bridge.answer_back_end(CONFIG_CHANGE, 3);
            assert_eq!(answer(stage).await, 3);
            // Closed, and opened anew.
            stage.done(command(Command::CloseBackChannel)).await;
            assert_eq!(stage.ask(Request::SetVringNum(crate::stage::state(1))).await, DONE);
            stage.done(Request::SetBackendReqFd(Handle::BackChannel)).await;
            stage.bridge.send(command(Command::AskConfigChange));
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
            stage.bridge.answer_back_end(CONFIG_CHANGE, 0);
            assert_eq!(answer(stage).await, 0);
        })
    });
}

#[test]
fn a_session_may_end_while_the_back_end_waits() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            connect(stage).await;
            stage.bridge.send(command(Command::AskConfigChange));
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
            stage.bridge.disconnect();
            stage.connect_and_negotiate().await;
            assert!(!stage.bridge.has_frames());
        })
    });
}

#[test]
fn a_back_end_that_sends_no_request_is_ended() {
    for sent in [Command::Garble, Command::Reply, Command::Misform] {
        play(Script::Proper, |stage| {
            Box::pin(async move {
                connect(stage).await;
                let first = process_id(stage).await;
                stage.bridge.send(command(sent));
                // Its answer may come first.
                stage.bridge.status(Status::FRONT_END_UP).await;
                while stage.bridge.has_frames() {
                    assert_eq!(answer(stage).await, 0, "{sent:?}");
                }
                stage.bridge.disconnect();
                stage.bridge.connect().await;
                assert_ne!(process_id(stage).await, first, "{sent:?}");
            })
        });
    }
}

#[test]
fn a_bridge_that_answers_wrongly_or_out_of_turn_ends_the_session() {
    let good = || BackEndReply::<Handle>::Acknowledgement(0).encode(CONFIG_CHANGE);
    let bad: Vec<(bool, Channel, RawMessage<Handle>)> = vec![
        // Whether the back-end has asked before, and what the bridge says.
        (false, Channel::BackEnd, good()),
        (true, Channel::BackEnd, BackEndReply::Acknowledgement(0).encode(IOTLB_MSG)),
        (true, Channel::BackEnd, RawMessage::reply(CONFIG_CHANGE, vec![0; 7], vec![])),
        (true, Channel::BackEnd, RawMessage::reply(CONFIG_CHANGE, vec![0; 8], vec![Handle::Window])),
        (true, Channel::BackEnd, BackEndRequest::ConfigChange.encode(true)),
        (false, Channel::BackEnd, BackEndRequest::ConfigChange.encode(true)),
        (true, Channel::FrontEnd, good()),
    ];
    play(Script::Proper, |stage| {
        Box::pin(async move {
            let mut process = None;
            for (asked, channel, message) in bad {
                connect(stage).await;
                let id = process_id(stage).await;
                assert_eq!(*process.get_or_insert(id), id, "the back-end is not to blame");
                if asked {
                    stage.done(command(Command::TellConfigChange)).await;
                    assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
                }
                stage.bridge.send_frame(channel, stage.bridge.session(), message);
                stage.bridge.orphaned().await;
            }
        })
    });
}

#[test]
fn two_requests_at_once_end_the_session() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            connect(stage).await;
            stage.bridge.send(command(Command::AskConfigChange));
            assert_eq!(stage.bridge.back_end_request().await, BackEndRequest::ConfigChange);
            stage.bridge.send(Request::GetFeatures);
            stage.bridge.orphaned().await;
            connect(stage).await;
        })
    });
}
