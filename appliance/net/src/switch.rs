//! Carries packets from one place to another: port to port, port to uplink, uplink to port.
//!
//! A station is behind the port whose device has its address, as long as a driver is there, or where frames with its address
//! as their source came from last. What is for a station that is known goes there and nowhere else, what is for several or
//! for an unknown one goes everywhere but back. Nobody takes the address of another port's device.

use std::sync::{PoisonError, RwLock};
use std::time::Instant;

use vvu_back_end::threads::Threads;

use crate::bell::Bell;
use crate::checksum;
use crate::counters::Counters;
use crate::ethernet::{Ethernet, MacAddress};
use crate::forwarding::ForwardingTable;
use crate::net_header::{Checksum, LEGACY_LEN, NetHeader};
use crate::offloads::Offloads;
use crate::outbox::Outbox;
use crate::packet::{Content, Packet};
use crate::port::{Port, PortSettings};
use crate::rarp;
use crate::receiver::{Delivery, Parcel};
use crate::segment::Pieces;
use crate::uplink::Uplink;

/// Addresses of protocols between neighbours, 01:80:c2:00:00:00 to 0f, which no bridge passes on (IEEE 802.1Q, section 8.6.3).
const NEIGHBOURS: [u8; 5] = [0x01, 0x80, 0xc2, 0, 0];

/// A packet whose checksum we have made.
const FINISHED: NetHeader = NetHeader { checksum: Checksum::Valid, segmentation: None };

/// Where packets come from and go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// A port, by its index.
    Port(usize),
    /// The network outside.
    Uplink,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Switch {
    /// How the queues' threads work; those of a queue pair share a CPU.
    pub(crate) threads: Threads,
    ports: Vec<Port>,
    uplink: Option<Uplink>,
    mtu: u16,
    table: RwLock<ForwardingTable<Place>>,
}

impl Switch {
    pub(crate) fn new(ports: Vec<PortSettings>, uplink: Option<Uplink>, mtu: u16, threads: Threads) -> Self {
        let ports = ports.into_iter().enumerate();
        Self {
            threads,
            ports: ports.map(|(index, settings)| Port::new(index, settings, mtu)).collect(),
            uplink,
            mtu,
            table: RwLock::new(ForwardingTable::new()),
        }
    }

    pub(crate) fn port(&self, index: usize) -> Option<&Port> {
        self.ports.get(index)
    }

    pub(crate) fn ports(&self) -> &[Port] {
        &self.ports
    }

    pub(crate) fn uplink(&self) -> Option<&Uplink> {
        self.uplink.as_ref()
    }

    /// The CPU for the threads of a queue pair.
    pub(crate) fn cpu_of_pair(&self, port: usize, pair: u16) -> Option<usize> {
        let before = self.ports.iter().take(port).map(|port| port.max_pairs).sum::<u16>();
        self.threads.cpu_of_queue(before.saturating_add(pair))
    }

    /// Forgets who is behind a port.
    pub(crate) fn forget(&self, port: usize) {
        self.table.write().unwrap_or_else(PoisonError::into_inner).forget(Place::Port(port));
    }

    fn counters(&self, place: Place) -> Option<&Counters> {
        match place {
            Place::Port(index) => self.port(index).map(|port| &port.counters),
            Place::Uplink => self.uplink().map(|uplink| &uplink.counters),
        }
    }

    /// Takes a packet that has come, and carries it to where it is to go, unless it may not be here at all.
    pub(crate) fn accept(&self, from: Place, packet: &Packet<'_>, outbox: &mut Outbox, now: Instant) {
        let Some(counters) = self.counters(from) else { return };
        let ethernet = &packet.ethernet;
        if let Place::Port(index) = from
            && let Some(port) = self.port(index)
        {
            if !port.link_up() {
                return counters.tx_link_down.count();
            }
            if port.filter().is_some_and(|filter| !filter.admits_sent(ethernet)) {
                return counters.tx_filtered.count();
            }
        }
        if packet.network_len() > usize::from(self.mtu) {
            return counters.tx_oversized.count();
        }
        if is_for_neighbours(ethernet.destination) || ethernet.source.is_group() {
            return counters.tx_filtered.count();
        }
        if self.is_spoofed(from, ethernet) {
            return counters.tx_spoofed.count();
        }
        if !self.is_own(from, ethernet.source) {
            self.learn(from, ethernet.source, now);
        }
        if ethernet.destination.is_group() {
            return self.flood(from, packet, outbox, now);
        }
        match self.locate(ethernet.destination, now) {
            Some(to) if to == from => {}
            Some(to) => self.send(to, packet, outbox, now),
            None => self.flood(from, packet, outbox, now),
        }
    }

    /// The source is the address of another port's device, and not one that the operator has given to this port, too.
    fn is_spoofed(&self, from: Place, ethernet: &Ethernet) -> bool {
        let is_owner = |port: &Port| port.has_driver() && port.mac() == ethernet.source;
        let own = match from {
            Place::Port(index) => self.port(index),
            Place::Uplink => None,
        };
        let is_given = |port: &Port| port.filter().is_some_and(|filter| filter.macs.contains(&ethernet.source));
        if own.is_some_and(|port| port.mac() == ethernet.source || is_given(port)) {
            return false;
        }
        self.ports.iter().any(is_owner)
    }

    /// The source is that of the port's own device, which is found without having been learned.
    fn is_own(&self, from: Place, source: MacAddress) -> bool {
        matches!(from, Place::Port(index) if self.port(index).is_some_and(|port| port.has_driver() && port.mac() == source))
    }

    fn learn(&self, from: Place, source: MacAddress, now: Instant) {
        let is_news = self.table.read().unwrap_or_else(PoisonError::into_inner).is_news(source, from, now);
        if is_news {
            self.table.write().unwrap_or_else(PoisonError::into_inner).learn(source, from, now);
        }
    }

    fn locate(&self, address: MacAddress, now: Instant) -> Option<Place> {
        let owner = self.ports.iter().position(|port| port.has_driver() && port.mac() == address);
        let learned = || self.table.read().unwrap_or_else(PoisonError::into_inner).lookup(address, now);
        owner.map(Place::Port).or_else(learned)
    }

    fn flood(&self, from: Place, packet: &Packet<'_>, outbox: &mut Outbox, now: Instant) {
        let ports = (0..self.ports.len()).map(Place::Port).chain([Place::Uplink]);
        for to in ports.filter(|to| *to != from) {
            self.send(to, packet, outbox, now);
        }
    }

    fn send(&self, to: Place, packet: &Packet<'_>, outbox: &mut Outbox, now: Instant) {
        let (outcome, counters) = match to {
            Place::Port(index) => {
                let Some(port) = self.port(index) else { return };
                let Some(outcome) = send_to_port(port, packet, outbox, now) else { return };
                (outcome, &port.counters)
            }
            Place::Uplink => {
                let Some(uplink) = self.uplink() else { return };
                (send_to_uplink(uplink, packet, outbox), &uplink.counters)
            }
        };
        match outcome {
            Delivery::Done => {
                counters.rx_packets.count();
                counters.rx_bytes.add(packet.content.len() as u64);
            }
            Delivery::Full if outbox.must_wait => {}
            Delivery::Full => counters.rx_no_buffers.count(),
            Delivery::TooLarge => counters.rx_too_large.count(),
            Delivery::Away => counters.rx_no_driver.count(),
        }
    }

    /// Lets all drivers see what they have got from this thread.
    pub(crate) fn flush(&self, outbox: &mut Outbox) {
        while let Some((index, pair)) = outbox.touched.pop() {
            if let Some(port) = self.port(index)
                && let Some(receiver) = port.receiver(pair)
            {
                receiver.flush(port, &mut outbox.bell);
            }
        }
    }

    /// Tells all others that a station is behind a port now.
    pub(crate) fn announce(&self, port: usize, mac: MacAddress) {
        let bell = match Bell::new() {
            Ok(bell) => bell,
            Err(error) => return tracing::error!(%error, "an address cannot be announced"),
        };
        let mut outbox = Outbox::new(bell, 0);
        let frame = rarp::announcement(mac);
        if let Ok(packet) = Packet::from_buffer(&[0; LEGACY_LEN], &frame) {
            self.accept(Place::Port(port), &packet, &mut outbox, Instant::now());
            self.flush(&mut outbox);
            outbox.bell.finish();
        }
    }
}

fn is_for_neighbours(destination: MacAddress) -> bool {
    destination.0.split_last().is_some_and(|(last, first)| *first == NEIGHBOURS && *last < 0x10)
}

/// None if the driver is not to get the packet.
fn send_to_port(port: &Port, packet: &Packet<'_>, outbox: &mut Outbox, now: Instant) -> Option<Delivery> {
    let counters = &port.counters;
    if !port.link_up() {
        counters.rx_link_down.count();
        return None;
    }
    let admits = || port.filter().is_none_or(|filter| filter.admits_received(&packet.ethernet));
    let reception = port.reception(&packet.ethernet).filter(|_| admits());
    let Some((offloads, pairs)) = reception else {
        counters.rx_filtered.count();
        return None;
    };
    let Some((pair, receiver)) = port.choose_receiver(packet, pairs) else { return Some(Delivery::Away) };
    if !outbox.is_repeated && port.limit.take(1, packet.content.len() as u64, now).is_err() {
        counters.rx_limited.count();
        return None;
    }
    let Outbox { bell, whole, piece, waiter, delivered_pieces, .. } = outbox;
    let mut deliver = |parcel: &Parcel<'_>| receiver.deliver(port, parcel, waiter.as_ref(), bell);
    let outcome = if offloads.contains(packet.header.needs()) {
        deliver(&Parcel { header: packet.header, content: packet.content })
    } else {
        adapt(packet, offloads, counters, whole, piece, delivered_pieces, deliver)
    };
    outbox.must_wait = outcome == Delivery::Full && outbox.waiter.is_some();
    if outcome == Delivery::Done || outbox.delivered_pieces > 0 {
        outbox.touch(port.index, pair);
    }
    if !outbox.must_wait {
        outbox.delivered_pieces = 0;
    }
    Some(outcome)
}

fn send_to_uplink(uplink: &Uplink, packet: &Packet<'_>, outbox: &mut Outbox) -> Delivery {
    let Outbox { lane, whole, piece, .. } = outbox;
    if uplink.offloads().contains(packet.header.needs()) {
        if packet.content.copy_to(whole).is_err() {
            return Delivery::Away;
        }
        return uplink.deliver(&packet.header, whole, *lane);
    }
    let deliver = |parcel: &Parcel<'_>| uplink.deliver(&parcel.header, parcel.content.front(), *lane);
    adapt(packet, uplink.offloads(), &uplink.counters, whole, piece, &mut 0, deliver)
}

/// Does for a receiver what the sender has left to others and the receiver does not do: completes the checksum, or cuts the
/// packet. `done` pieces were delivered before.
fn adapt(
    packet: &Packet<'_>,
    offloads: Offloads,
    counters: &Counters,
    whole: &mut Vec<u8>,
    piece: &mut Vec<u8>,
    done: &mut usize,
    mut deliver: impl FnMut(&Parcel<'_>) -> Delivery,
) -> Delivery {
    if packet.content.copy_to(whole).is_err() {
        return Delivery::Away;
    }
    let NetHeader { checksum, segmentation } = packet.header;
    if let Some(segmentation) = segmentation.filter(|segmentation| !offloads.contains(segmentation.offload())) {
        let mut pieces = Pieces::new(whole, &segmentation);
        let mut index = 0;
        while pieces.next(piece) {
            if index >= *done {
                let outcome = deliver(&Parcel { header: FINISHED, content: Content::of(piece) });
                if outcome != Delivery::Done {
                    return outcome;
                }
                *done = index + 1;
            }
            index += 1;
        }
        counters.rx_segmented.count();
        return Delivery::Done;
    }
    if let Checksum::Partial { start, offset } = checksum {
        // Inside of the frame, as was checked.
        let _is_inside = checksum::complete(whole, usize::from(start), usize::from(offset));
        counters.rx_checksums.count();
    }
    deliver(&Parcel { header: FINISHED, content: Content::of(whole) })
}
