//! Channels between a port and a program, with real sockets: a stream socket stands for the node of the port, which behaves as
//! that does while a client is there and when it goes.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use vvu_agent::channel::{Channel, Port};

const LIMIT: Duration = Duration::from_secs(30);

/// Runs a channel until the story is over. The story gets the client's end, and the path on which it may listen.
async fn play(story: impl AsyncFnOnce(UnixStream, &Path)) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("channel-test.sock");
    let (client, node) = UnixStream::pair().unwrap();
    let node = OwnedFd::from(node.into_std().unwrap());
    let channel = Channel::new(Port::new(node).unwrap(), socket.clone());
    let story = timeout(LIMIT, story(client, &socket));
    tokio::select! {
        over = story => over.expect("what is awaited does not come"),
        Err(error) = channel.run() => panic!("channel has failed: {error}"),
    }
}

async fn receive(stream: &mut UnixStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, expected);
}

#[tokio::test]
async fn bytes_go_both_ways_whoever_speaks_first() {
    play(async |mut client, socket| {
        let listener = UnixListener::bind(socket).unwrap();
        let (mut program, _) = listener.accept().await.unwrap();
        program.write_all(b"greeting").await.unwrap();
        receive(&mut client, b"greeting").await;
        client.write_all(b"question").await.unwrap();
        receive(&mut program, b"question").await;
    })
    .await;
}

#[tokio::test]
async fn more_than_all_buffers_hold_arrives_in_order() {
    play(async |client, socket| {
        let listener = UnixListener::bind(socket).unwrap();
        let (program, _) = listener.accept().await.unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(4 << 20).collect();
        let (mut client_reads, mut client_writes) = client.into_split();
        let (mut program_reads, mut program_writes) = program.into_split();
        let (mut up, mut down) = (vec![0; bytes.len()], vec![0; bytes.len()]);
        let (a, b, c, d) = tokio::join!(
            client_writes.write_all(&bytes),
            program_writes.write_all(&bytes),
            client_reads.read_exact(&mut down),
            program_reads.read_exact(&mut up),
        );
        assert!(a.is_ok() && b.is_ok() && c.is_ok() && d.is_ok());
        assert!(up == bytes && down == bytes);
    })
    .await;
}

#[tokio::test]
async fn a_program_that_listens_later_gets_what_was_said() {
    play(async |mut client, socket| {
        client.write_all(b"early").await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let listener = UnixListener::bind(socket).unwrap();
        let (mut program, _) = listener.accept().await.unwrap();
        receive(&mut program, b"early").await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_goes_is_heard_to_the_end() {
    play(async |mut client, socket| {
        let listener = UnixListener::bind(socket).unwrap();
        // It may have gone before the channel has seen it.
        client.write_all(b"last words").await.unwrap();
        drop(client);
        let (mut program, _) = listener.accept().await.unwrap();
        let mut said = Vec::new();
        program.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"last words");
    })
    .await;
}

#[tokio::test]
async fn a_client_that_goes_is_heard_though_the_program_speaks() {
    play(async |mut client, socket| {
        let listener = UnixListener::bind(socket).unwrap();
        let (program, _) = listener.accept().await.unwrap();
        let (mut reads, mut writes) = program.into_split();
        client.write_all(&[b'x'; 100_000]).await.unwrap();
        drop(client);
        let mut said = Vec::new();
        let speaks = async {
            // Until the channel is closed.
            while writes.write_all(&[b'y'; 4096]).await.is_ok() {}
        };
        let (heard, ()) = tokio::join!(reads.read_to_end(&mut said), speaks);
        // The other end may show as reset, since it did not take what was written.
        let reset = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionReset;
        assert!(heard.is_ok() || heard.is_err_and(|error| reset(&error)));
        assert_eq!(said.len(), 100_000);
    })
    .await;
}

#[tokio::test]
async fn a_program_that_hangs_up_is_connected_to_again_when_the_client_speaks() {
    play(async |mut client, socket| {
        let listener = UnixListener::bind(socket).unwrap();
        for round in 0..3_u8 {
            let (mut program, _) = listener.accept().await.unwrap();
            if round > 0 {
                receive(&mut program, &[round]).await;
            }
            program.write_all(b"!").await.unwrap();
            receive(&mut client, b"!").await;
            drop(program);
            // Without a word of the client nobody connects.
            assert!(timeout(Duration::from_millis(100), listener.accept()).await.is_err());
            client.write_all(&[round + 1]).await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_new_program_in_the_place_of_a_dead_one_is_found() {
    play(async |mut client, socket| {
        let listener = UnixListener::bind(socket).unwrap();
        let (program, _) = listener.accept().await.unwrap();
        drop((program, listener));
        client.write_all(b"hello").await.unwrap();
        // The socket of the dead one is there and refuses.
        tokio::time::sleep(Duration::from_millis(30)).await;
        std::fs::remove_file(socket).unwrap();
        let listener = UnixListener::bind(socket).unwrap();
        let (mut program, _) = listener.accept().await.unwrap();
        receive(&mut program, b"hello").await;
    })
    .await;
}

#[tokio::test]
async fn a_program_that_takes_nothing_is_not_connected_to_without_end() {
    play(async |mut client, socket| {
        let listener = UnixListener::bind(socket).unwrap();
        client.write_all(b"hello").await.unwrap();
        drop(listener.accept().await.unwrap());
        let mut connections = 1;
        while let Ok(connection) = timeout(Duration::from_millis(200), listener.accept()).await {
            drop(connection);
            connections += 1;
            assert!(connections < 4);
        }
    })
    .await;
}
