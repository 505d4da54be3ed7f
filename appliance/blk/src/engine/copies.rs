//! Transfers of images in memory: copies, made by the system call that submits them, or by threads of the kernel. Pure.
//!
//! Not too much of it is submitted at a time: the driver is to go on with the first requests while the next ones are copied.
//! Where several long ones are to be copied, threads of the kernel take their part, as many as there are other CPUs.

/// Bytes that are copied by one submission; the last request may go beyond.
const ENOUGH: u64 = 128 * 1024;

/// A copy of so many bytes is worth the waking of another thread.
const LONG: u64 = 64 * 1024;

/// See the module's text.
pub(super) struct Copies {
    /// There are any: an image is in memory.
    any: bool,
    /// Bytes that the next submission copies.
    at_submission: u64,
    /// Several requests are to be started.
    several: bool,
    /// Copies that threads of the kernel have to make, and how many of them there may be at a time.
    elsewhere: usize,
    most_elsewhere: usize,
}

impl Copies {
    /// `any`: an image is in memory.
    pub(super) fn new(any: bool) -> Self {
        let other_cpus = std::thread::available_parallelism().map_or(0, |cpus| cpus.get() - 1);
        Self { any, at_submission: 0, several: false, elsewhere: 0, most_elsewhere: other_cpus }
    }

    /// So many requests are about to be started.
    pub(super) fn expect(&mut self, requests: u16) {
        self.several = requests > 1;
    }

    /// Whether a thread of the kernel is to make this one; [`Copies::finish_elsewhere`] is to come then.
    pub(super) fn place(&mut self, pieces: &[libc::iovec]) -> bool {
        if !self.any {
            return false;
        }
        let len: u64 = pieces.iter().map(|piece| piece.iov_len as u64).sum();
        let elsewhere = self.several && len >= LONG && self.elsewhere < self.most_elsewhere;
        if elsewhere {
            self.elsewhere += 1;
        } else {
            self.at_submission += len;
        }
        elsewhere
    }

    pub(super) fn finish_elsewhere(&mut self) {
        self.elsewhere = self.elsewhere.saturating_sub(1);
    }

    /// What was started is submitted before more is.
    pub(super) fn are_enough(&self) -> bool {
        self.at_submission >= ENOUGH
    }

    pub(super) fn submit(&mut self) {
        self.at_submission = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(len: usize) -> [libc::iovec; 1] {
        [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: len }]
    }

    #[test]
    fn of_several_long_ones_as_many_are_made_elsewhere_as_there_are_other_cpus() {
        let mut copies = Copies { most_elsewhere: 2, ..Copies::new(true) };
        copies.expect(1);
        assert!(!copies.place(&pieces(1 << 20)), "one alone is made at once");
        copies.expect(9);
        let mut place = |len| copies.place(&pieces(len));
        assert_eq!([place(65535), place(65536), place(65536), place(65536)], [false, true, true, false]);
        copies.finish_elsewhere();
        assert!(copies.place(&pieces(65536)));
    }

    #[test]
    fn a_submission_copies_what_is_enough_and_others_copy_nothing() {
        let mut copies = Copies::new(true);
        for _ in 0..32 {
            assert!(!copies.are_enough());
            copies.place(&pieces(4096));
        }
        assert!(copies.are_enough());
        copies.submit();
        assert!(!copies.are_enough());
        let mut none = Copies::new(false);
        none.expect(9);
        assert!(!none.place(&pieces(1 << 20)) && !none.are_enough());
    }
}
