//! What a thread that sends packets has at hand.

use std::sync::Arc;

use vvu_back_end::wakeup::Wakeup;

use crate::bell::Bell;

/// See the module's text.
pub(crate) struct Outbox {
    pub(crate) bell: Bell,
    /// Which of the uplink's queues the thread writes to.
    pub(crate) lane: usize,
    /// Receivers that have got packets and not been told: port and queue pair.
    pub(crate) touched: Vec<(usize, u16)>,
    /// A frame in one piece.
    pub(crate) whole: Vec<u8>,
    /// A segment of it.
    pub(crate) piece: Vec<u8>,
    /// Where to be told of new buffers: the thread rather waits than loses a packet.
    pub(crate) waiter: Option<Arc<Wakeup>>,
    /// Segments of the packet in hand that were delivered before the thread had to wait.
    pub(crate) delivered_pieces: usize,
    /// The packet in hand was not delivered, and the waiter will be told.
    pub(crate) must_wait: bool,
    /// The packet in hand had to wait before, and has been counted by the rate limit.
    pub(crate) is_repeated: bool,
}

impl Outbox {
    pub(crate) fn new(bell: Bell, lane: usize) -> Self {
        Self {
            bell,
            lane,
            touched: Vec::new(),
            whole: Vec::new(),
            piece: Vec::new(),
            waiter: None,
            delivered_pieces: 0,
            must_wait: false,
            is_repeated: false,
        }
    }

    /// A receiver has got a packet.
    pub(crate) fn touch(&mut self, port: usize, pair: u16) {
        if !self.touched.contains(&(port, pair)) {
            self.touched.push((port, pair));
        }
    }
}
