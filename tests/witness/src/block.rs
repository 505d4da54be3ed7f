//! What a block of the disk holds: a function of run, block and generation, so that every byte can be checked and a block
//! tells by itself which write it comes from.

use crate::dice::Dice;

/// Bytes of a block: the smallest request of the witness, written by one request as a whole.
pub const BLOCK_LEN: usize = 4096;

/// Bytes of a word.
const WORD_LEN: usize = 8;

/// First word of every block that was written ("vvublock").
const MAGIC: u64 = u64::from_le_bytes(*b"vvublock");

/// A block's bytes, aligned for O_DIRECT.
#[derive(Debug, Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; BLOCK_LEN]);

impl Default for Block {
    fn default() -> Self {
        Self([0; BLOCK_LEN])
    }
}

/// What was found in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The content of this generation, every byte of it; 0 is a block that was never written (all zero).
    Generation(u64),
    /// Nothing that was ever written to this block as a whole: torn, of another block or run, or foreign bytes. The number is
    /// what the block says its generation is.
    Foreign(u64),
}

impl Block {
    /// Makes this the content of `block` after its write number `generation` (from 1) in the run `seed`.
    pub fn fill(&mut self, seed: u64, block: u64, generation: u64) {
        for (bytes, word) in self.0.chunks_exact_mut(WORD_LEN).zip(words(seed, block, generation)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Reads the block as number `block` of the run `seed`.
    pub fn content(&self, seed: u64, block: u64) -> Content {
        let mut found = self.0.chunks_exact(WORD_LEN).map(word);
        let (magic, generation) = (found.next().unwrap_or(0), found.nth(2).unwrap_or(0));
        let is_zero = magic == 0 && self.0.iter().all(|byte| *byte == 0);
        let as_written = || {
            let expected = words(seed, block, generation);
            self.0.chunks_exact(WORD_LEN).map(word).zip(expected).all(|(found, expected)| found == expected)
        };
        if is_zero {
            Content::Generation(0)
        } else if generation > 0 && as_written() {
            Content::Generation(generation)
        } else {
            Content::Foreign(generation)
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map(u64::from_le_bytes).unwrap_or(0)
}

/// The words of a written block, without end: magic, run, block, generation, then numbers that depend on the three.
fn words(seed: u64, block: u64, generation: u64) -> impl Iterator<Item = u64> {
    let mut dice = Dice::new(seed ^ block.rotate_left(24) ^ generation.rotate_left(48));
    [MAGIC, seed, block, generation].into_iter().chain(std::iter::from_fn(move || Some(dice.roll())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_its_generation() {
        let mut block = Block::default();
        assert_eq!(block.content(1, 2), Content::Generation(0));
        block.fill(1, 2, 3);
        assert_eq!(block.content(1, 2), Content::Generation(3));
    }

    #[test]
    fn a_torn_misplaced_or_foreign_block_is_recognised() {
        let (mut block, mut newer) = (Block::default(), Block::default());
        block.fill(1, 2, 3);
        newer.fill(1, 2, 4);
        assert_eq!(block.content(1, 5), Content::Foreign(3));
        assert_eq!(block.content(9, 2), Content::Foreign(3));
        newer.0[512..].copy_from_slice(&block.0[512..]);
        assert_eq!(newer.content(1, 2), Content::Foreign(4));
        block.0[4095] ^= 1;
        assert_eq!(block.content(1, 2), Content::Foreign(3));
        let mut late = Block::default();
        late.0[4000] = 1;
        assert_eq!(late.content(1, 2), Content::Foreign(0));
    }
}
