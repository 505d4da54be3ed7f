//! What a card's driver has counted.

use anyhow::{Context, Result};

use crate::driver_vm::DriverVm;

/// A number of the card's statistics in the driver VM.
///
/// # Errors
/// If there is no such number.
pub fn statistic(vm: &mut DriverVm, card: &str, name: &str) -> Result<u64> {
    let text = vm.run(&format!("cat /sys/class/net/{card}/statistics/{name}"))?;
    text.trim().parse().with_context(|| format!("{name} is {text}"))
}

/// Bytes of the average packet that a card has sent and received while something was done.
///
/// # Errors
/// What `doing` returns, and if there are no statistics.
pub fn packet_sizes(
    vm: &mut DriverVm,
    card: &str,
    doing: impl FnOnce(&mut DriverVm) -> Result<()>,
) -> Result<[u64; 2]> {
    const NAMES: [&str; 4] = ["tx_bytes", "tx_packets", "rx_bytes", "rx_packets"];
    let mut before = [0; 4];
    for (number, name) in before.iter_mut().zip(NAMES) {
        *number = statistic(vm, card, name)?;
    }
    doing(vm)?;
    let mut moved = [0; 4];
    for ((number, name), before) in moved.iter_mut().zip(NAMES).zip(before) {
        *number = statistic(vm, card, name)? - before;
    }
    let [sent_bytes, sent, received_bytes, received] = moved;
    Ok([sent_bytes / sent.max(1), received_bytes / received.max(1)])
}

/// Notifications so far of each of a card's sending queues.
///
/// # Errors
/// If the driver does not count them.
pub fn sending_kicks(vm: &mut DriverVm, card: &str, pairs: u16) -> Result<Vec<u64>> {
    let text = vm.run(&format!("ethtool -S {card}"))?;
    let number = |pair: u16| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("tx{pair}_kicks: ")));
        line.and_then(|number| number.parse().ok()).with_context(|| format!("no kicks of queue {pair} in {text}"))
    };
    (0..pairs).map(number).collect()
}
