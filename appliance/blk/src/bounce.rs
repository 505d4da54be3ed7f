//! The buffers for I/O that direct I/O cannot do in place, and the arithmetic of the windows that they move in.

use crate::aligned_buffer::AlignedBuffer;
use crate::image::Alignment;

/// Length of one bounce buffer in bytes; a longer request moves through it in steps.
pub(crate) const BOUNCE_LEN: usize = 128 * 1024;

/// Most bounce buffers of one queue. A request that finds none waits for one.
const MAX_BUFFERS: usize = 16;

/// The bounce buffers of one queue, allocated when first needed.
#[derive(Debug)]
pub(crate) struct BufferPool {
    idle: Vec<AlignedBuffer>,
    allocated: usize,
    alignment: u32,
}

impl BufferPool {
    pub(crate) fn new(alignment: Alignment) -> Self {
        Self { idle: Vec::new(), allocated: 0, alignment: alignment.memory.max(alignment.offset) }
    }

    pub(crate) fn take(&mut self) -> Option<AlignedBuffer> {
        if let Some(buffer) = self.idle.pop() {
            return Some(buffer);
        }
        if self.allocated == MAX_BUFFERS {
            return None;
        }
        self.allocated += 1;
        Some(AlignedBuffer::new(BOUNCE_LEN, self.alignment))
    }

    pub(crate) fn give_back(&mut self, buffer: AlignedBuffer) {
        self.idle.push(buffer);
    }
}

/// One step of a request through a bounce buffer: an aligned stretch of the image, and the part of it that is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Offset of the stretch on the image, aligned.
    pub(crate) offset: u64,
    /// Length of the stretch, aligned, at most [`BOUNCE_LEN`].
    pub(crate) len: usize,
    /// Where in the stretch the data begins.
    pub(crate) skip: usize,
    /// Length of the data.
    pub(crate) data_len: usize,
}

impl Window {
    /// The first step for the data at `offset..offset + len` of the image. `alignment` is a power of two, at most
    /// [`BOUNCE_LEN`].
    pub(crate) fn first_of(offset: u64, len: u64, alignment: u32) -> Self {
        let alignment = u64::from(alignment);
        let start = offset - offset % alignment;
        let skip = offset - start;
        let data_len = len.min(BOUNCE_LEN as u64 - skip);
        let stretch = (skip + data_len).next_multiple_of(alignment);
        // All three are at most BOUNCE_LEN.
        let narrow = |value: u64| usize::try_from(value).unwrap_or(BOUNCE_LEN);
        Self { offset: start, len: narrow(stretch), skip: narrow(skip), data_len: narrow(data_len) }
    }

    /// The data fills the stretch.
    pub(crate) fn is_whole(&self) -> bool {
        self.skip == 0 && self.data_len == self.len
    }

    /// Where the data lies in the buffer.
    pub(crate) fn data(&self) -> std::ops::Range<usize> {
        self.skip..self.skip + self.data_len
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_cover_the_data_once_and_are_aligned(
            sector in 0u64..1000,
            sectors in 1u64..2000,
            shift in 9u32..17,
        ) {
            let alignment = 1 << shift;
            let (mut offset, mut left) = (sector * 512, sectors * 512);
            while left > 0 {
                let window = Window::first_of(offset, left, alignment);
                prop_assert!(window.data_len > 0 && window.data_len as u64 <= left);
                prop_assert!(window.len <= BOUNCE_LEN && window.data().end <= window.len);
                prop_assert_eq!(window.offset % u64::from(alignment), 0);
                prop_assert_eq!(window.len % alignment as usize, 0);
                prop_assert_eq!(window.offset + window.skip as u64, offset);
                offset += window.data_len as u64;
                left -= window.data_len as u64;
            }
        }
    }

    #[test]
    fn the_pool_is_bounded() {
        let mut pool = BufferPool::new(Alignment { offset: 512, memory: 4096 });
        let mut taken: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken.len(), MAX_BUFFERS);
        assert_eq!(taken[0].bytes().len(), BOUNCE_LEN);
        pool.give_back(taken.pop().unwrap());
        assert!(pool.take().is_some());
        assert!(pool.take().is_none());
    }
}
