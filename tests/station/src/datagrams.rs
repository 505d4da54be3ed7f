//! Exchanges of datagrams, all of which are answered by an echo.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt::set_socket_recv_buffer_size;

use crate::socket_options;
use crate::stream::fill;

/// What a datagram begins with that the echo prints.
pub(crate) const MARK: &[u8] = b"mark ";

/// Longest datagram.
const MAX_LEN: usize = 65_507;

/// Room for datagrams that have not been read; the kernel gives what it may.
const ROOM: usize = 4 << 20;

/// How long an answer may take before the question is repeated, and how often it is.
const PATIENCE: Duration = Duration::from_secs(2);
const TRIES: u32 = 10;

/// Answers for ever.
pub(crate) fn echo(port: u16) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).context("cannot listen")?;
    set_socket_recv_buffer_size(&socket, ROOM)?;
    let mut buffer = vec![0; MAX_LEN];
    loop {
        let (len, from) = socket.recv_from(&mut buffer).context("cannot receive")?;
        let datagram = buffer.get(..len).unwrap_or_default();
        if datagram.starts_with(MARK) {
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "{}", String::from_utf8_lossy(datagram)).and_then(|()| stdout.flush())?;
        }
        // A sender that has gone, or is behind a card that no longer works, is not waited for.
        let _ = socket.send_to(datagram, from);
    }
}

/// Exchanges one datagram from each of `count` sockets, and prints how many receive queues have had an answer.
pub(crate) fn flows(address: &str, count: u32) -> Result<()> {
    let mut queues = BTreeSet::new();
    for flow in 0..count {
        let socket = socket_to(address)?;
        let question = format!("flow {flow}");
        let mut tries = 0..TRIES;
        loop {
            ensure!(tries.next().is_some(), "no answer to flow {flow}");
            socket.send(question.as_bytes()).context("cannot send")?;
            let mut answer = [0; 64];
            match socket.recv(&mut answer) {
                Ok(len) if answer.get(..len) == Some(question.as_bytes()) => break,
                Ok(len) => bail!("flow {flow} is answered with {:?}", answer.get(..len)),
                Err(error) if is_late(&error) => {}
                Err(error) => return Err(error).context("cannot receive"),
            }
        }
        queues.insert(socket_options::receive_queue(&socket).context("the kernel does not tell queues")?);
    }
    println!("{}", queues.len());
    Ok(())
}

/// Sends rounds of `count` datagrams of `len` bytes, each round as one packet, and compares what comes back.
pub(crate) fn segments(address: &str, len: u16, count: usize, rounds: u64) -> Result<()> {
    let socket = socket_to(address)?;
    socket_options::cut_into(&socket, len).context("the kernel does not cut datagrams")?;
    let len = usize::from(len);
    let mut packet = vec![0; len * count];
    ensure!(packet.len() <= MAX_LEN && len >= 8, "{count} times {len} bytes are no packet");
    for round in 0..rounds {
        for (datagram, number) in packet.chunks_mut(len).zip(round * count as u64..) {
            // Each one has a piece of the stream's content of its own, behind its number.
            fill(datagram, number * len as u64 / 8 * 8);
            datagram.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
        exchange(&socket, &packet, len).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn exchange(socket: &UdpSocket, packet: &[u8], len: usize) -> Result<()> {
    let mut missing: Vec<&[u8]> = packet.chunks(len).collect();
    for _ in 0..TRIES {
        socket.send(packet).context("cannot send")?;
        let mut answer = vec![0; MAX_LEN];
        while !missing.is_empty() {
            match socket.recv(&mut answer) {
                Ok(found) => {
                    let datagram = answer.get(..found).unwrap_or_default();
                    let head = datagram.get(..8).context("a datagram that is too short")?;
                    // Answers to an earlier try may still come.
                    let Some(place) = missing.iter().position(|sent| sent.starts_with(head)) else { continue };
                    ensure!(
                        missing.swap_remove(place) == datagram,
                        "a datagram of {found} bytes is not as it was sent"
                    );
                }
                Err(error) if is_late(&error) => break,
                Err(error) => return Err(error).context("cannot receive"),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
    }
    bail!("no answer to {} of {} datagrams", missing.len(), packet.chunks(len).count())
}

fn socket_to(address: &str) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("no socket")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    set_socket_recv_buffer_size(&socket, ROOM)?;
    socket.connect(address).with_context(|| format!("cannot send to {address}"))?;
    Ok(socket)
}

fn is_late(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
