//! The ledger: what the witness was told, what it has done, and for each block what was begun, acknowledged and made
//! durable. It is an array of 64-bit little-endian words in memory that driver VM and host share.
//!
//! Words up to [`CONTROL_WORDS`] are for the whole run. Three words for each block follow: the generation of the last write
//! that was *begun*, of the last one that was *acknowledged*, and of the last one acknowledged before a FLUSH that has
//! completed (*durable*). Always: durable ≤ acknowledged ≤ begun. Only the writer that owns a block stores into its words,
//! in the order in which things happen, so a reader that finds the memory after the machine was killed knows exactly how
//! far each write came.
//!
//! The writer knows these words by heart as well and never reads them again: under TCG a live migration can lose stores to a
//! small block of memory like this one (docs/front-ends.md, "Live migration under TCG"). Such words are found and put
//! back when the host asks for it ([`Control::VerifyAsked`]).

/// Bytes of a ledger.
pub const LEDGER_LEN: u64 = 2 << 20;

/// Bytes of a word.
pub const WORD_LEN: u64 = 8;

/// Words before those of the first block.
pub const CONTROL_WORDS: u64 = 512;

/// Words of a block.
pub const WORDS_PER_BLOCK: u64 = 3;

/// Most blocks that a ledger has room for.
pub const BLOCKS_MAX: u64 = (LEDGER_LEN / WORD_LEN - CONTROL_WORDS) / WORDS_PER_BLOCK;

/// Value of [`Control::Magic`] ("vvuwitns").
pub const MAGIC: u64 = u64::from_le_bytes(*b"vvuwitns");

/// Words for the whole run. Those up to [`Control::Stop`] are the host's, the others the witness's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Control {
    /// [`MAGIC`], stored last by the host.
    Magic,
    /// Part of every block's content.
    Seed,
    /// Seed of the choice of requests: another one for each start.
    Order,
    /// Blocks in use, from the start of the disk.
    Blocks,
    /// Writers, each with a request in flight and a share of the blocks of its own.
    Writers,
    /// One of how many requests is a FLUSH.
    FlushOneIn,
    /// How often the host has asked for the words of all blocks to be put right, and for all blocks to be read and compared,
    /// while the load runs.
    VerifyAsked,
    /// Not 0: stop after the requests in flight.
    Stop,
    /// A [`State`].
    State,
    /// Requests completed since the start of the load.
    Completions,
    /// FLUSH requests among them.
    Flushes,
    /// Shares that were read as [`Control::VerifyAsked`] says, all writers together.
    SharesVerified,
    /// Words of blocks that were not as their writer had left them, and were put back.
    WordsRestored,
    /// Longest time in nanoseconds in which no request completed, since the host last stored 0 here.
    LongestGap,
    /// What went wrong, a [`Failure`]; the following words say more.
    Failure,
    /// The block of the failure.
    FailureBlock,
    /// Generation that the block must have (wrong content), or the error number (I/O error).
    FailureExpected,
    /// Generation that the block has or pretends to have.
    FailureFound,
}

/// How far the witness is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    /// Not started.
    Idle,
    /// Reads every block and compares it with the ledger, before the load.
    Verifying,
    /// The load runs.
    Running,
    /// Stopped because the host said so; every block was read and compared again.
    Stopped,
    /// Stopped because something was wrong.
    Failed,
}

/// What was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Failure {
    /// Nothing.
    None,
    /// A request was answered with an error.
    Io,
    /// A block has not the content of its last acknowledged write.
    Content,
}

/// The words of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Record {
    /// Generation of the last write that was begun.
    pub begun: u64,
    /// Generation of the last write that was acknowledged.
    pub acknowledged: u64,
    /// Generation of the last write that was acknowledged before a FLUSH that has completed.
    pub durable: u64,
}

impl Control {
    /// Index of the word.
    pub fn word(self) -> u64 {
        self as u64
    }
}

impl State {
    /// The state that a word holds.
    pub fn from_word(word: u64) -> Option<Self> {
        [Self::Idle, Self::Verifying, Self::Running, Self::Stopped, Self::Failed]
            .into_iter()
            .find(|state| *state as u64 == word)
    }
}

impl Record {
    /// Index of the first word of `block`: begun, then acknowledged, then durable.
    pub fn first_word(block: u64) -> u64 {
        CONTROL_WORDS + block * WORDS_PER_BLOCK
    }

    /// The words in the order in which a ledger has them.
    pub fn words(self) -> [u64; 3] {
        [self.begun, self.acknowledged, self.durable]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_ends_inside_the_ledger() {
        let end = Record::first_word(BLOCKS_MAX - 1) + WORDS_PER_BLOCK;
        assert!(end * WORD_LEN <= LEDGER_LEN);
        assert!((end + WORDS_PER_BLOCK) * WORD_LEN > LEDGER_LEN);
        assert!(Control::FailureFound.word() < CONTROL_WORDS);
    }

    #[test]
    fn states_are_read_back() {
        assert_eq!(State::from_word(State::Failed as u64), Some(State::Failed));
        assert_eq!(State::from_word(99), None);
    }
}
