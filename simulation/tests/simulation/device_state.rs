//! What a back-end gives away as the state of its device, so that whoever gets it knows whether it is whole.

use vvu_simulation::random::Random;

/// Longest state in bytes: some parts on the way between the VMs, and more than a pipe holds.
const LEN_MAX: u64 = 80_000;

/// Bytes of the seed at the start, and of the length behind it.
const HEAD_LEN: usize = 16;

fn bytes(seed: u64, len: u64) -> Vec<u8> {
    let random = Random::new(seed);
    let head = [seed.to_le_bytes(), len.to_le_bytes()].concat();
    head.into_iter().chain((0..len).map(|_| random.next().to_le_bytes()[0])).collect()
}

pub(crate) fn some(random: &Random) -> Vec<u8> {
    let longest = *random.one_of(&[10, 5000, LEN_MAX]).expect("one of three");
    bytes(random.next(), random.within(0..longest))
}

pub(crate) fn is_whole(state: &[u8]) -> bool {
    let number = |start| u64::from_le_bytes(std::array::from_fn(|index| state[start + index]));
    state.len() >= HEAD_LEN && number(8) < LEN_MAX && bytes(number(0), number(8)) == state
}

/// What tells one state from another.
pub(crate) fn check(state: &[u8]) -> u64 {
    state[..8].try_into().map(u64::from_le_bytes).expect("8 bytes")
}

/// A back-end takes no state like this one.
pub(crate) fn is_refused(state: &[u8]) -> bool {
    state[0].is_multiple_of(8)
}
