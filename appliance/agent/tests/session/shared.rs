//! Device sets that share a back-end process.

use std::cell::Cell;
use std::rc::Rc;

use vvu_agent::restarts::MAX_RESTARTS;
use vvu_agent::session::DeviceSetError;
use vvu_protocol::control::Status;

use crate::back_end::Script;
use crate::command::{Command, command};
use crate::stage::{Request, Stage, play_two, process_id, start, state};

/// Both front-ends come, and find the same process.
async fn both_connect(stages: &[Stage]) -> u64 {
    let mut processes = Vec::new();
    for stage in stages {
        stage.connect_and_negotiate().await;
        processes.push(process_id(stage).await);
    }
    assert_eq!(processes.len(), 2);
    assert_eq!(processes[0], processes[1]);
    processes[0]
}

/// Both see that the back-end has gone.
async fn both_lose(stages: &[Stage]) {
    for stage in stages {
        stage.bridge.status(Status::FRONT_END_UP).await;
    }
    for stage in stages {
        stage.bridge.disconnect();
    }
}

#[test]
fn front_ends_come_and_go_one_by_one() {
    let ended = play_two(Script::Proper, |stages| {
        Box::pin(async {
            let process = both_connect(stages).await;
            for _ in 0..MAX_RESTARTS + 2 {
                stages[0].bridge.disconnect();
                stages[0].connect_and_negotiate().await;
                start(&stages[0]).await;
                assert_eq!(process_id(&stages[0]).await, process);
                assert_eq!(process_id(&stages[1]).await, process);
            }
        })
    });
    assert!(ended.is_none(), "{ended:?}");
}

#[test]
fn a_death_is_one_failure_for_all() {
    let survived = Rc::new(Cell::new(0));
    let counted = Rc::clone(&survived);
    let ended = play_two(Script::Proper, |stages| {
        Box::pin(async move {
            let mut last = both_connect(stages).await;
            for death in 0..MAX_RESTARTS {
                stages[death % 2].bridge.send(command(Command::Die));
                both_lose(stages).await;
                let next = both_connect(stages).await;
                assert_ne!(next, last);
                last = next;
                counted.set(death + 1);
            }
            stages[0].bridge.send(command(Command::Die));
            both_lose(stages).await;
            stages[0].bridge.connect().await;
            panic!("one more session has begun");
        })
    });
    assert!(matches!(ended, Some(DeviceSetError::GaveUp(_))), "{ended:?}");
    assert_eq!(survived.get(), MAX_RESTARTS);
}

#[test]
fn a_back_end_that_lies_to_one_is_lost_to_the_other() {
    let ended = play_two(Script::Lying, |stages| {
        Box::pin(async {
            for _ in 0..3 {
                let process = both_connect(stages).await;
                start(&stages[1]).await;
                stages[1].bridge.send(Request::GetVringBase(state(0)));
                both_lose(stages).await;
                assert_ne!(both_connect(stages).await, process);
                stages.iter().for_each(|stage| stage.bridge.disconnect());
            }
        })
    });
    assert!(ended.is_none(), "{ended:?}");
}

#[test]
fn a_back_end_that_keeps_the_memory_of_one_is_replaced_for_both() {
    let ended = play_two(Script::Hoarding, |stages| {
        Box::pin(async {
            let process = both_connect(stages).await;
            start(&stages[0]).await;
            stages[0].bridge.disconnect();
            stages[1].bridge.orphaned().await;
            assert_ne!(both_connect(stages).await, process);
        })
    });
    assert!(ended.is_none(), "{ended:?}");
}

#[test]
fn a_connection_that_is_closed_is_lost_to_one_only() {
    let ended = play_two(Script::Proper, |stages| {
        Box::pin(async {
            let process = both_connect(stages).await;
            stages[0].bridge.send(command(Command::Leave));
            stages[0].bridge.orphaned().await;
            stages[0].connect_and_negotiate().await;
            assert_eq!(process_id(&stages[0]).await, process);
            assert_eq!(process_id(&stages[1]).await, process);
        })
    });
    assert!(ended.is_none(), "{ended:?}");
}

#[test]
fn a_program_that_ends_with_one_front_end_has_failed_the_other() {
    let survived = Rc::new(Cell::new(0));
    let counted = Rc::clone(&survived);
    let ended = play_two(Script::Single, |stages| {
        Box::pin(async move {
            for death in 0..=MAX_RESTARTS {
                both_connect(stages).await;
                counted.set(death);
                stages[0].bridge.disconnect();
                stages[1].bridge.orphaned().await;
            }
            stages[1].bridge.connect().await;
            panic!("one more session has begun");
        })
    });
    assert!(matches!(ended, Some(DeviceSetError::GaveUp(_))), "{ended:?}");
    assert_eq!(survived.get(), MAX_RESTARTS);
}
