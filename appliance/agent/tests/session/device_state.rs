//! The state of the device, saved and loaded.

use vvu_protocol::control::{Channel, Handle};
use vvu_protocol::message::{
    DeviceStatePhase, DeviceStateTransfer, FrontEndReply, MAX_PAYLOAD_LEN, RawMessage, StateDirection,
};
use vvu_protocol::state::StateMessage;

use crate::back_end::{STATE_LEN, Script, device_state};
use crate::command::{Command, command};
use crate::stage::{Reply, Request, Stage, play};

fn transfer(direction: StateDirection) -> Request {
    let transfer = DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped };
    Request::SetDeviceStateFd(transfer, Handle::Stream)
}

const STARTED: Reply = FrontEndReply::DeviceState(0x100, None);
const GOOD: Reply = FrontEndReply::Number(0);
const BAD: Reply = FrontEndReply::Number(1);

/// Takes all parts.
async fn save(stage: &Stage) -> Vec<u8> {
    assert_eq!(stage.ask(transfer(StateDirection::Save)).await, STARTED);
    let mut state = Vec::new();
    loop {
        let StateMessage::Part(bytes) = stage.bridge.state().await else { panic!("an answer to nothing") };
        // The next part comes when this one was taken.
        assert!(!stage.bridge.has_frames());
        stage.bridge.send_state(StateMessage::Answer(0));
        if bytes.is_empty() {
            return state;
        }
        state.extend(bytes);
    }
}

/// Sends all parts.
async fn load(stage: &Stage, state: &[u8]) {
    assert_eq!(stage.ask(transfer(StateDirection::Load)).await, STARTED);
    for part in state.chunks(MAX_PAYLOAD_LEN).chain([[].as_slice()]) {
        stage.bridge.send_state(StateMessage::Part(part.to_vec()));
        assert_eq!(stage.bridge.state().await, StateMessage::Answer(0));
    }
}

#[test]
fn a_state_is_saved_and_loaded() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            for own_pipe in [false, true] {
                if own_pipe {
                    stage.done(command(Command::UseOwnPipe)).await;
                }
                assert!(save(stage).await == device_state());
                assert_eq!(stage.ask(Request::CheckDeviceState).await, GOOD);
                if own_pipe {
                    stage.done(command(Command::UseOwnPipe)).await;
                }
                load(stage, &device_state()).await;
                assert_eq!(stage.ask(Request::CheckDeviceState).await, GOOD);
            }
            // What is wrong is seen by the back-end.
            load(stage, &device_state()[1..]).await;
            assert_eq!(stage.ask(Request::CheckDeviceState).await, BAD);
            load(stage, &[]).await;
            assert_eq!(stage.ask(Request::CheckDeviceState).await, BAD);
        })
    });
}

#[test]
fn requests_go_on_beside_a_transfer() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            assert_eq!(stage.ask(transfer(StateDirection::Save)).await, STARTED);
            assert!(matches!(stage.bridge.state().await, StateMessage::Part(_)));
            stage.done(Request::SetVringNum(crate::stage::state(8))).await;
            // One transfer at a time.
            stage.refused(transfer(StateDirection::Save)).await;
            stage.refused(transfer(StateDirection::Load)).await;
            stage.bridge.send_state(StateMessage::Answer(0));
            assert!(matches!(stage.bridge.state().await, StateMessage::Part(_)));
        })
    });
}

#[test]
fn a_bridge_that_takes_no_more_ends_the_transfer() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.done(command(Command::LargeState)).await;
            assert_eq!(stage.ask(transfer(StateDirection::Save)).await, STARTED);
            assert!(matches!(stage.bridge.state().await, StateMessage::Part(_)));
            stage.bridge.send_state(StateMessage::Answer(1));
            // The back-end finds that nobody reads.
            assert_eq!(stage.ask(Request::CheckDeviceState).await, BAD);
            assert!(!stage.bridge.has_frames());
            assert!(save(stage).await.len() > STATE_LEN);
        })
    });
}

#[test]
fn a_back_end_that_takes_no_more_ends_the_transfer() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.done(command(Command::StopReading)).await;
            assert_eq!(stage.ask(transfer(StateDirection::Load)).await, STARTED);
            // The pipe takes some before the back-end is seen to have closed it.
            let mut sent = 0;
            loop {
                stage.bridge.send_state(StateMessage::Part(vec![1; MAX_PAYLOAD_LEN]));
                match stage.bridge.state().await {
                    StateMessage::Answer(0) => sent += 1,
                    StateMessage::Answer(_) => break,
                    StateMessage::Part(_) => panic!("nothing is saved"),
                }
                assert!(sent < 1000);
            }
            // The rest of it is refused; the next one may begin.
            stage.bridge.send_state(StateMessage::Part(vec![1]));
            assert_eq!(stage.bridge.state().await, StateMessage::Answer(1));
            assert_eq!(stage.ask(Request::CheckDeviceState).await, BAD);
            assert!(save(stage).await == device_state());
        })
    });
}

#[test]
fn what_is_no_transfer_is_refused() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            stage.done(command(Command::RefuseTransfer)).await;
            let refused = stage.ask(transfer(StateDirection::Save)).await;
            assert_eq!(refused, FrontEndReply::DeviceState(5, None));
            stage.done(command(Command::UseOwnFile)).await;
            stage.refused(transfer(StateDirection::Save)).await;
            stage.done(command(Command::UseOwnFile)).await;
            stage.refused(transfer(StateDirection::Load)).await;
            let other = DeviceStateTransfer { direction: StateDirection::Save, phase: DeviceStatePhase::Stopped };
            stage.refused(Request::SetDeviceStateFd(other, Handle::Window)).await;
            // A part of nothing.
            stage.bridge.send_state(StateMessage::Part(vec![1, 2, 3]));
            assert_eq!(stage.bridge.state().await, StateMessage::Answer(1));
            assert!(save(stage).await == device_state());
        })
    });
}

#[test]
fn a_bridge_that_breaks_the_rules_of_a_transfer_ends_the_session() {
    let cases: Vec<(Option<StateDirection>, RawMessage<Handle>)> = vec![
        (None, StateMessage::Answer(0).encode()),
        (None, RawMessage::request(2, true, vec![], vec![])),
        (None, RawMessage::request(1, true, vec![], vec![Handle::Stream])),
        (Some(StateDirection::Load), StateMessage::Answer(0).encode()),
        (Some(StateDirection::Load), RawMessage::request(7, true, vec![1], vec![])),
        (Some(StateDirection::Save), StateMessage::Part(vec![1]).encode()),
        (Some(StateDirection::Save), RawMessage::reply(1, vec![0; 9], vec![])),
        (Some(StateDirection::Save), RawMessage::reply(2, vec![0; 8], vec![])),
    ];
    play(Script::Proper, |stage| {
        Box::pin(async move {
            for (direction, message) in cases {
                stage.connect_and_negotiate().await;
                if let Some(direction) = direction {
                    assert_eq!(stage.ask(transfer(direction)).await, STARTED);
                }
                if direction == Some(StateDirection::Save) {
                    assert!(matches!(stage.bridge.state().await, StateMessage::Part(_)));
                }
                stage.bridge.send_frame(Channel::State, stage.bridge.session(), message);
                stage.bridge.orphaned().await;
            }
            stage.connect_and_negotiate().await;
            assert!(save(stage).await == device_state());
        })
    });
}

#[test]
fn a_session_may_end_in_the_middle_of_a_transfer() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            for direction in [StateDirection::Save, StateDirection::Load, StateDirection::Save] {
                stage.connect_and_negotiate().await;
                assert_eq!(stage.ask(transfer(direction)).await, STARTED);
                stage.bridge.disconnect();
            }
            stage.connect_and_negotiate().await;
            assert!(!stage.bridge.has_frames());
            load(stage, &device_state()).await;
            assert_eq!(stage.ask(Request::CheckDeviceState).await, GOOD);
        })
    });
}
