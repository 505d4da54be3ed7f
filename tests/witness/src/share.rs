//! What a writer knows of its blocks: the words of the ledger, known by heart.
//!
//! The ledger tells others; the writer itself never relies on it. Under TCG a live migration can lose stores to a small
//! block of memory like the ledger (docs/front-ends.md, "Live migration under TCG"), and that is no fault of the disk.

use std::ops::Range;
use std::sync::atomic::Ordering;

use vvu_witness::ledger::{Control, Record};

use crate::mapping::Ledger;

/// A writer's blocks.
#[derive(Debug)]
pub(crate) struct Share {
    blocks: Range<u64>,
    /// One for each block.
    records: Vec<Record>,
    ledger: Ledger,
}

impl Share {
    /// Learns from the ledger what was done before.
    pub(crate) fn new(ledger: Ledger, blocks: Range<u64>) -> Self {
        let records = blocks.clone().map(|block| ledger.record(block)).collect();
        Self { blocks, records, ledger }
    }

    pub(crate) fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }

    /// What is known of a block of this share.
    pub(crate) fn record(&self, block: u64) -> Record {
        self.place(block).and_then(|place| self.records.get(place)).copied().unwrap_or_default()
    }

    /// Changes what is known of a block, here and then in the ledger.
    pub(crate) fn note(&mut self, block: u64, change: impl FnOnce(&mut Record)) {
        if let Some(record) = self.place(block).and_then(|place| self.records.get_mut(place)) {
            let before = *record;
            change(record);
            self.ledger.change(block, before, *record);
        }
    }

    /// Puts words of the ledger back that a migration has lost, and counts them.
    pub(crate) fn restore(&self) {
        for (block, record) in self.blocks.clone().zip(&self.records) {
            let restored = self.ledger.change(block, self.ledger.record(block), *record);
            self.ledger.control(Control::WordsRestored).fetch_add(restored, Ordering::SeqCst);
        }
    }

    fn place(&self, block: u64) -> Option<usize> {
        usize::try_from(block.checked_sub(self.blocks.start)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_were_lost_are_put_back_and_counted() {
        let ledger = Ledger::in_heap();
        let mut share = Share::new(ledger, 5..8);
        share.note(6, |record| record.begun = 4);
        let old = ledger.record(6);
        share.note(6, |record| (record.begun, record.acknowledged) = (5, 5));
        let kept = share.record(6);
        assert_eq!((ledger.record(6), kept), (kept, Record { begun: 5, acknowledged: 5, durable: 0 }));

        // As a page that was sent to the other side too early.
        ledger.change(6, kept, old);
        share.note(7, |record| record.begun = 1);
        assert_eq!((ledger.record(6), share.record(6)), (old, kept));
        share.restore();
        assert_eq!((ledger.record(6), ledger.record(7), share.record(7)), (kept, share.record(7), share.record(7)));
        assert_eq!(ledger.load(Control::WordsRestored), 2);
        share.restore();
        assert_eq!(ledger.load(Control::WordsRestored), 2);
    }
}
