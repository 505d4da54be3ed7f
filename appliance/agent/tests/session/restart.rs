//! A back-end that is lost while a front-end stays.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use vvu_agent::restarts::MAX_RESTARTS;
use vvu_agent::session::DeviceSetError;
use vvu_agent::watch::wait_for;
use vvu_protocol::control::{Handle, Status};

use crate::back_end::Script;
use crate::command::{Command, command};
use crate::stage::{Request, Stage, play, play_to_the_end, process_id};

/// Which socket is there now.
fn socket(stage: &Stage) -> Option<(u64, i64)> {
    let metadata = std::fs::metadata(stage.directory.join("back-end.sock")).ok()?;
    Some((metadata.ino(), metadata.ctime_nsec()))
}

#[test]
fn the_next_back_end_starts_before_the_bridge_has_taken_note() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            let (first, before) = (process_id(stage).await, socket(stage));
            let lost = Instant::now();
            stage.bridge.send(command(Command::Die));
            stage.bridge.status(Status::FRONT_END_UP).await;
            // The bridge does not answer yet.
            let look = || Ok::<_, io::Error>(socket(stage).filter(|now| Some(*now) != before));
            assert!(wait_for(&stage.directory, Duration::from_secs(30), look).await.unwrap().is_some());
            stage.bridge.disconnect();
            stage.connect_and_negotiate().await;
            println!("a new back-end serves {:?} after the old one's death", lost.elapsed());
            assert_ne!(process_id(stage).await, first);
        })
    });
}

#[test]
fn a_back_end_that_hangs_up_and_lives_on_is_connected_to_again() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            stage.connect_and_negotiate().await;
            let first = process_id(stage).await;
            stage.bridge.send(command(Command::Leave));
            stage.bridge.status(Status::FRONT_END_UP).await;
            stage.bridge.disconnect();
            stage.connect_and_negotiate().await;
            assert_eq!(process_id(stage).await, first);
        })
    });
}

#[test]
fn a_back_end_lost_with_everything_under_way_leaves_nothing() {
    play(Script::Proper, |stage| {
        Box::pin(async {
            for _ in 0..3 {
                stage.connect_and_negotiate().await;
                stage.done(Request::SetBackendReqFd(Handle::BackChannel)).await;
                stage.done(command(Command::TellConfigChange)).await;
                stage.bridge.back_end_request().await;
                stage.bridge.send(command(Command::Die));
                stage.bridge.orphaned().await;
            }
            stage.connect_and_negotiate().await;
            assert!(!stage.bridge.has_frames());
        })
    });
}

/// Loses the back-end again and again, until it is given up. The status is down then.
fn is_given_up(end: Command) {
    let error = play_to_the_end(Script::Proper, |stage| {
        Box::pin(async move {
            for _ in 0..MAX_RESTARTS {
                stage.connect_and_negotiate().await;
                stage.bridge.send(command(end));
                stage.bridge.orphaned().await;
            }
            stage.connect_and_negotiate().await;
            stage.bridge.send(command(end));
            stage.bridge.orphaned().await;
            stage.bridge.connect().await;
            panic!("one more session has begun");
        })
    });
    assert!(matches!(error, DeviceSetError::GaveUp(_)), "{error:?}");
}

#[test]
fn a_back_end_that_dies_of_each_session_is_given_up() {
    is_given_up(Command::Die);
}

#[test]
fn a_back_end_that_hangs_up_in_each_session_is_given_up() {
    is_given_up(Command::Leave);
}

/// One front-end after the other, more than a back-end may fail, each with a process of its own.
fn serves_one_front_end_each(script: Script) {
    play(script, |stage| {
        Box::pin(async {
            let mut processes = Vec::new();
            for _ in 0..MAX_RESTARTS + 2 {
                stage.connect_and_negotiate().await;
                let process = process_id(stage).await;
                assert!(!processes.contains(&process));
                processes.push(process);
                stage.bridge.disconnect();
            }
        })
    });
}

#[test]
fn a_program_that_ends_with_its_front_end_has_not_failed() {
    serves_one_front_end_each(Script::Single);
}

#[test]
fn a_program_that_takes_its_time_to_end_with_its_front_end_has_not_failed() {
    serves_one_front_end_each(Script::SingleSlow);
}
