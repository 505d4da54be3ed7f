//! A TCP stream whose every byte is known: its content is a function of the place.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Bytes that are sent at a time.
const BLOCK_LEN: usize = 64 << 10;

/// Bytes of a word of the content.
const WORD_LEN: usize = 8;

/// Between two blocks: a stream that takes all of the machine would slow down what it is to outlive.
const PACE: Duration = Duration::from_millis(20);

/// How long the other side may take to listen.
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);

/// Sends until `enough` is there, and checks that the other side has got it all.
pub(crate) fn send(address: &str, enough: &Path) -> Result<()> {
    let mut stream = connect(address)?;
    let mut block = vec![0; BLOCK_LEN];
    let mut sent = 0;
    while !enough.exists() {
        fill(&mut block, sent);
        stream.write_all(&block).with_context(|| format!("after {sent} bytes"))?;
        sent += block.len() as u64;
        sleep(PACE);
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; WORD_LEN];
    stream.read_exact(&mut answer).with_context(|| format!("no answer to {sent} bytes"))?;
    let received = u64::from_le_bytes(answer);
    ensure!(received == sent, "sent {sent} bytes, of which {received} arrived");
    println!("sent {sent}");
    Ok(())
}

fn connect(address: &str) -> Result<TcpStream> {
    let deadline = Instant::now() + CONNECT_PATIENCE;
    loop {
        match TcpStream::connect(address) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => sleep(PACE),
            outcome => return outcome.with_context(|| format!("cannot connect to {address}")),
        }
    }
}

/// Takes one connection; `progress` has the number of bytes so far.
pub(crate) fn receive(port: u16, progress: &Path) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("cannot listen")?;
    note(progress, 0)?;
    let (mut stream, _) = listener.accept().context("no connection")?;
    let (mut block, mut expected) = (vec![0; BLOCK_LEN], vec![0; BLOCK_LEN]);
    let mut received = 0;
    loop {
        let len = read_block(&mut stream, &mut block).with_context(|| format!("after {received} bytes"))?;
        fill(&mut expected, received);
        let differs = block.iter().zip(&expected).take(len).position(|(found, expected)| found != expected);
        ensure!(differs.is_none(), "the stream is wrong from byte {received} + {differs:?} on");
        received += len as u64;
        note(progress, received)?;
        if len < block.len() {
            break;
        }
    }
    stream.write_all(&received.to_le_bytes()).context("cannot answer")?;
    println!("received {received}");
    Ok(())
}

/// Reads a whole block, or what there is until the end.
fn read_block(stream: &mut TcpStream, block: &mut [u8]) -> Result<usize> {
    let mut len = 0;
    while let Some(rest) = block.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest)? {
            0 => break,
            more => len += more,
        }
    }
    Ok(len)
}

/// Who reads the file meanwhile finds a whole number.
fn note(progress: &Path, received: u64) -> Result<()> {
    let fresh = progress.with_extension("new");
    fs::write(&fresh, format!("{received}\n"))?;
    fs::rename(&fresh, progress).with_context(|| format!("cannot write {}", progress.display()))
}

/// The content of a stream from byte `start` on, a multiple of a word's length. Words that differ everywhere: a piece that
/// is lost, repeated or in the wrong place is found.
pub(crate) fn fill(bytes: &mut [u8], start: u64) {
    for (place, word) in (start / WORD_LEN as u64..).zip(bytes.chunks_mut(WORD_LEN)) {
        let mixed = place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 32)).to_le_bytes();
        for (to, from) in word.iter_mut().zip(mixed) {
            *to = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn no_two_places_are_alike() {
        let (mut whole, mut part) = (vec![0; 4096], vec![0; 1024]);
        fill(&mut whole, 0);
        fill(&mut part, 3072);
        assert_eq!(whole[3072..], part);
        assert!(
            whole.chunks(8).enumerate().all(|(at, word)| !whole[8 * at + 8..].chunks(8).any(|other| other == word))
        );
    }

    #[test]
    fn a_wrong_byte_is_found() {
        let folder = std::env::temp_dir().join(format!("vvu-station-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let progress = folder.join("progress");
        let receiver = thread::spawn({
            let progress = progress.clone();
            move || receive(17_391, &progress)
        });
        let mut stream = connect("127.0.0.1:17391").unwrap();
        let mut block = vec![0; BLOCK_LEN];
        fill(&mut block, 0);
        block[1000] ^= 1;
        stream.write_all(&block).unwrap();
        let error = receiver.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("Some(1000)"), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }
}
