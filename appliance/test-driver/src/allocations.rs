//! Counts allocations, to show that there are none where there must not be any.

#![expect(
    unsafe_code,
    reason = "the trait of allocators is unsafe; all calls go to the system's allocator as they come"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static LEFT_OUT: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, with a counter. To be the test's `#[global_allocator]`.
#[derive(Debug)]
pub struct CountingAllocator;

/// Rounds before those that count: by then all that is kept for the next one has its size.
const WARM_UP: u32 = 4;

/// How often memory is allocated or moved by other threads than this one in so many rounds, after a few that do not count.
pub fn allocations_in(rounds: u32, mut round: impl FnMut()) -> u64 {
    LEFT_OUT.set(true);
    (0..WARM_UP).for_each(|_| round());
    let before = COUNT.load(Ordering::Relaxed);
    (0..rounds).for_each(|_| round());
    COUNT.load(Ordering::Relaxed) - before
}

fn count() {
    // A thread that ends has no flag any more.
    if !LEFT_OUT.try_with(Cell::get).unwrap_or(false) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does all of it, under the same conditions; to count allocates nothing.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those that the system's allocator wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(place, layout, new_size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}
