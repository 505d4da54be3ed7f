//! `vvu-station`: what a test does with a driver VM's network cards that no packaged program does.
//!
//! - `stream-from PORT PROGRESS`: takes one TCP connection and checks each byte of what comes; the file PROGRESS has the
//!   number of bytes so far. `stream-to ADDRESS:PORT ENOUGH`: sends until the file ENOUGH is there.
//! - `echo PORT`: sends each datagram back, and prints those that are marked. `flows ADDRESS:PORT COUNT`: exchanges a datagram
//!   with it from each of as many sockets, and prints through how many of the card's queues the answers came. `segments ADDRESS:PORT LEN COUNT ROUNDS`: sends it datagrams of LEN bytes, each
//!   round of COUNT as one packet that the card is to cut, and compares what comes back.
//! - `attack PCI_DEVICE NAME`: takes the card from its driver and breaks a rule of a ring. `malformed PCI_DEVICE MAC
//!   ADDRESS:PORT` sends packets whose headers are not true of them, and a marked datagram at the end. `commands PCI_DEVICE`
//!   gives commands that a device must refuse.
//!
//! It never judges the device by anything but what a driver can see.

mod attack;
mod card;
mod datagrams;
mod mapping;
mod socket_options;
mod stream;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vvu-station: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["stream-from", port, progress] => stream::receive(number(port)?, progress.as_ref()),
        ["stream-to", address, enough] => stream::send(address, enough.as_ref()),
        ["echo", port] => datagrams::echo(number(port)?),
        ["flows", address, count] => datagrams::flows(address, number(count)?),
        ["segments", address, len, count, rounds] => {
            datagrams::segments(address, number(len)?, number(count)?, number(rounds)?)
        }
        ["attack", device, name] => attack::attack(device, name),
        ["malformed", device, mac, address] => attack::malformed(device, mac, address),
        ["commands", device] => attack::commands(device),
        _ => bail!("no such command: {arguments:?}"),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().with_context(|| format!("'{text}' is no number, or out of range"))
}
