//! A buffer whose first byte has a given alignment, as direct I/O needs it.

/// Zeroed memory of fixed length. Its address stays the same when the value is moved.
#[derive(Debug)]
pub(crate) struct AlignedBuffer {
    /// Longer than asked for, and never resized.
    storage: Box<[u8]>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// Allocates `len` bytes at a multiple of `alignment`, a power of two.
    pub(crate) fn new(len: usize, alignment: u32) -> Self {
        let alignment = alignment as usize;
        let storage = vec![0; len + alignment].into_boxed_slice();
        let start = storage.as_ptr().align_offset(alignment).min(alignment);
        Self { storage, start, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.storage.get(self.start..self.start + self.len).unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.storage.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_is_aligned_and_keeps_its_place() {
        for alignment in [1, 512, 4096, 65536] {
            let mut buffer = AlignedBuffer::new(1000, alignment);
            let address = buffer.bytes().as_ptr().addr();
            assert_eq!(address % alignment as usize, 0);
            assert_eq!(buffer.bytes_mut().len(), 1000);
            let moved = Box::new(buffer);
            assert_eq!(moved.bytes().as_ptr().addr(), address);
        }
    }
}
