//! Which station is behind which port: learned from the source addresses of frames, forgotten after a while, and bounded.
//!
//! A port that is full learns nothing until some of its entries have aged. So one that sends from ever new addresses fills
//! its own part of the table and nothing else. Pure: time comes in as an argument.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::ethernet::MacAddress;

/// How long an address is known after its last frame; the default of IEEE 802.1Q.
const AGE: Duration = Duration::from_secs(300);

/// How old an entry must be to be renewed: a busy station costs a write once in this time.
const RENEWAL: Duration = Duration::from_secs(1);

/// Least time between two searches for entries that have aged, each of which looks at the whole table.
const SWEEP: Duration = Duration::from_secs(1);

/// Most addresses of one port.
pub(crate) const MAX_PER_PORT: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Entry<P> {
    port: P,
    seen: Instant,
}

/// See the module's text. `P` names a port.
#[derive(Debug)]
pub(crate) struct ForwardingTable<P> {
    entries: HashMap<MacAddress, Entry<P>>,
    /// Number of entries of each port.
    counts: HashMap<P, usize>,
    swept: Option<Instant>,
}

impl<P: Copy + Eq + Hash> ForwardingTable<P> {
    pub(crate) fn new() -> Self {
        Self { entries: HashMap::new(), counts: HashMap::new(), swept: None }
    }

    /// The port behind which the station is, if that is known.
    pub(crate) fn lookup(&self, address: MacAddress, now: Instant) -> Option<P> {
        let entry = self.entries.get(&address)?;
        (now.saturating_duration_since(entry.seen) < AGE).then_some(entry.port)
    }

    /// Whether [`ForwardingTable::learn`] would change something. With it, most frames need only to look.
    pub(crate) fn is_news(&self, address: MacAddress, port: P, now: Instant) -> bool {
        let is_known = |entry: &Entry<P>| entry.port == port && now.saturating_duration_since(entry.seen) < RENEWAL;
        !self.entries.get(&address).is_some_and(is_known)
    }

    /// A frame from this station has come through this port.
    pub(crate) fn learn(&mut self, address: MacAddress, port: P, now: Instant) {
        if address.is_group() {
            return;
        }
        let is_same = self.entries.get(&address).is_some_and(|entry| entry.port == port);
        if !is_same && self.is_full(port) && !self.sweep(port, now) {
            return;
        }
        let former = self.entries.insert(address, Entry { port, seen: now });
        *self.counts.entry(port).or_default() += 1;
        if let Some(count) = former.and_then(|former| self.counts.get_mut(&former.port)) {
            *count -= 1;
        }
    }

    /// Forgets all stations behind a port.
    pub(crate) fn forget(&mut self, port: P) {
        self.entries.retain(|_, entry| entry.port != port);
        self.counts.remove(&port);
    }

    fn is_full(&self, port: P) -> bool {
        self.counts.get(&port).is_some_and(|count| *count >= MAX_PER_PORT)
    }

    /// Removes what has aged, unless that was done just before. True if the port has room.
    fn sweep(&mut self, port: P, now: Instant) -> bool {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP) {
            return false;
        }
        self.swept = Some(now);
        self.entries.retain(|_, entry| now.saturating_duration_since(entry.seen) < AGE);
        self.counts.clear();
        for entry in self.entries.values() {
            *self.counts.entry(entry.port).or_default() += 1;
        }
        !self.is_full(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn station(number: u32) -> MacAddress {
        let [a, b, c, d] = number.to_be_bytes();
        MacAddress([0x52, 0x54, a, b, c, d])
    }

    #[test]
    fn stations_are_learned_move_and_are_forgotten() {
        let (mut table, start) = (ForwardingTable::new(), Instant::now());
        assert_eq!(table.lookup(station(1), start), None);
        table.learn(station(1), 0, start);
        assert_eq!(table.lookup(station(1), start), Some(0));
        assert!(!table.is_news(station(1), 0, start) && table.is_news(station(1), 1, start));
        assert!(table.is_news(station(1), 0, start + RENEWAL));

        table.learn(station(1), 1, start);
        assert_eq!(table.lookup(station(1), start), Some(1));
        table.learn(station(1), 1, start + RENEWAL);
        assert_eq!(table.lookup(station(1), start + AGE), Some(1));
        assert_eq!(table.lookup(station(1), start + AGE + RENEWAL), None);

        table.learn(station(2), 0, start);
        table.forget(1);
        assert_eq!((table.lookup(station(1), start), table.lookup(station(2), start)), (None, Some(0)));
        table.learn(MacAddress::BROADCAST, 0, start);
        assert_eq!(table.lookup(MacAddress::BROADCAST, start), None);
    }

    #[test]
    fn a_port_that_floods_the_table_harms_only_itself() {
        let (mut table, start) = (ForwardingTable::new(), Instant::now());
        table.learn(station(u32::MAX), 1, start);
        for number in 0..5000 {
            table.learn(station(number), 0, start);
        }
        assert_eq!(table.entries.len(), MAX_PER_PORT + 1);
        assert_eq!(table.lookup(station(u32::MAX), start), Some(1));
        table.learn(station(u32::MAX - 1), 1, start);
        assert_eq!(table.lookup(station(u32::MAX - 1), start), Some(1), "the other port learns as before");
        // What it holds is renewed; what is new comes in when the rest has aged.
        let later = start + AGE - RENEWAL;
        table.learn(station(0), 0, later);
        table.learn(station(9000), 0, start + AGE);
        assert_eq!(table.lookup(station(9000), start + AGE), Some(0));
        assert_eq!(table.lookup(station(0), start + AGE), Some(0));
        assert_eq!(table.entries.len(), 2);
    }
}
