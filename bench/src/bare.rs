//! The same requests without a back-end, straight at the kernel: what a back-end can reach at the most.
//!
//! The data goes to the same kind of memory, and time is taken in the same way as in [`disk`](crate::disk).

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use self::reads::Reads;
use crate::disk::{Blocks, Limit, MAX_DEPTH, Measurement, Share, sum_up};
use crate::error::Error;
use crate::latency::Latencies;
use crate::memory::Memory;
use crate::outcome::{Outcome, Whole};
use crate::processes;

mod reads;

/// How the kernel is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// One thread with an io_uring. Files in memory are read at its submission.
    IoUring,
    /// As many threads as there are CPUs, but no more than requests under way, each with one pread(2) after the other.
    Pread,
}

/// A load. It only reads.
#[derive(Debug, Clone)]
pub struct BareLoad {
    /// A file, or a block device; opened with O_DIRECT if it has it.
    pub file: PathBuf,
    /// How the kernel is asked.
    pub method: Method,
    /// Blocks in no order, instead of one after the other.
    pub random: bool,
    /// Bytes of a request, a multiple of 512.
    pub block: u32,
    /// Requests under way, 1 to [`MAX_DEPTH`].
    pub depth: u16,
    /// Looks for completions all the time, instead of waiting for them; for [`Method::IoUring`].
    pub polled: bool,
    /// When it ends; the warm-up comes before.
    pub limit: Limit,
    /// What is not measured at the beginning.
    pub warm_up: Duration,
}

impl BareLoad {
    /// Runs it.
    ///
    /// # Errors
    /// If the file cannot be opened or read, or the load makes no sense.
    pub fn run(&self) -> Result<Outcome, Error> {
        if self.depth == 0 || self.depth > MAX_DEPTH || self.block == 0 || !self.block.is_multiple_of(512) {
            let (depth, block) = (self.depth, self.block);
            return Err(Error::Usage(format!(
                "{depth} requests of {block} bytes are not possible: 1 to {MAX_DEPTH} of a multiple of 512"
            )));
        }
        let (file, capacity) = self.open()?;
        let blocks = capacity / u64::from(self.block);
        let threads = match self.method {
            Method::IoUring => 1,
            Method::Pread => u64::from(self.depth).min(thread::available_parallelism().map_or(1, |n| n.get() as u64)),
        };
        let each = blocks / threads;
        if each == 0 {
            return Err(Error::TooSmall { capacity, needed: u64::from(self.block) * threads });
        }
        let memory = Memory::new(self.block as usize * usize::from(self.depth))?;
        let begin = Instant::now();
        let shares = thread::scope(|scope| {
            let start = |index| {
                let blocks = Blocks::new(self.random, self.block, index * each..(index + 1) * each);
                let measurement = Measurement::new(self.warm_up, self.limit, threads, begin);
                let (file, memory) = (&file, &memory);
                scope.spawn(move || match self.method {
                    Method::IoUring => self.with_io_uring(file, memory, blocks, measurement),
                    Method::Pread => {
                        let slots = (index..u64::from(self.depth)).step_by(usize::try_from(threads).unwrap_or(1));
                        self.with_pread(file, memory, slots, blocks, measurement)
                    }
                })
            };
            let threads: Vec<_> = (0..threads).map(start).collect();
            threads.into_iter().map(|thread| thread.join().map_err(|_| Error::Panicked)?).collect::<Result<Vec<_>, _>>()
        })?;
        sum_up(self.block, &shares)
    }

    /// The file and its length.
    fn open(&self) -> Result<(File, u64), Error> {
        let failed = |source| Error::File { path: self.file.clone(), source };
        // Without O_NONBLOCK io_uring would leave files in memory to threads of the kernel; others it reads as before.
        let open = |flags: OFlags| {
            let flags = (flags | OFlags::NONBLOCK).bits().cast_signed();
            OpenOptions::new().read(true).custom_flags(flags).open(Path::new(&self.file))
        };
        let mut file = match open(OFlags::DIRECT) {
            Err(error) if error.kind() == ErrorKind::InvalidInput => open(OFlags::empty()),
            outcome => outcome,
        }
        .map_err(failed)?;
        let capacity = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok((file, capacity))
    }

    fn with_io_uring(
        &self,
        file: &File,
        memory: &Memory,
        mut blocks: Blocks,
        mut measurement: Measurement,
    ) -> Result<Share, Error> {
        let mut reads = Reads::new(file, memory, self.depth)?;
        let mut latencies = Latencies::new()?;
        let mut whole = Whole::default();
        let mut offered = vec![Instant::now(); usize::from(self.depth)];
        for slot in 0..self.depth {
            self.start(&mut reads, slot, &mut blocks)?;
        }
        while reads.under_way() > 0 {
            reads.submit(!self.polled)?;
            while !reads.has_completions() {
                reads.submit(!self.polled)?;
                std::hint::spin_loop();
            }
            let now = Instant::now();
            while let Some(slot) = reads.complete(self.block)? {
                whole.requests += 1;
                if let Some(offered) = offered.get_mut(usize::from(slot)) {
                    let offered = std::mem::replace(offered, now);
                    if measurement.counts(now) {
                        latencies.record(now.duration_since(offered));
                    }
                }
                if !measurement.is_over(now) {
                    self.start(&mut reads, slot, &mut blocks)?;
                }
            }
        }
        whole.load = processes::own_thread();
        Ok(measurement.share(latencies, whole))
    }

    fn start(&self, reads: &mut Reads<'_>, slot: u16, blocks: &mut Blocks) -> Result<(), Error> {
        let place = usize::from(slot) * self.block as usize;
        reads.start(slot, blocks.next_sector() * 512, place, self.block)
    }

    /// The places of these requests are used in turn: caches must not make it faster than it is for as many under way.
    fn with_pread(
        &self,
        file: &File,
        memory: &Memory,
        slots: impl Iterator<Item = u64> + Clone,
        mut blocks: Blocks,
        mut measurement: Measurement,
    ) -> Result<Share, Error> {
        let mut latencies = Latencies::new()?;
        let mut whole = Whole::default();
        let mut offered = Instant::now();
        for slot in slots.cycle() {
            if measurement.is_over(offered) {
                break;
            }
            let place = usize::try_from(slot).unwrap_or(0) * self.block as usize;
            reads::pread(file, memory, blocks.next_sector() * 512, place, self.block)?;
            let now = Instant::now();
            whole.requests += 1;
            if measurement.counts(now) {
                latencies.record(now.duration_since(offered));
            }
            offered = now;
        }
        whole.load = processes::own_thread();
        Ok(measurement.share(latencies, whole))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn load(file: &Path, method: Method) -> BareLoad {
        BareLoad {
            file: file.to_owned(),
            method,
            random: true,
            block: 4096,
            depth: 8,
            polled: false,
            limit: Limit::Count(100),
            warm_up: Duration::ZERO,
        }
    }

    #[test]
    fn every_method_reads_what_was_asked_for() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 1 << 20]).unwrap();
        for (method, polled) in [(Method::IoUring, false), (Method::IoUring, true), (Method::Pread, false)] {
            let outcome = BareLoad { polled, ..load(file.path(), method) }.run().unwrap();
            assert!((100..=101).contains(&outcome.requests), "{method:?}: {outcome:?}");
            assert!(outcome.iops > 0.0 && outcome.whole.requests >= 100);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let run = |load: BareLoad| load.run().unwrap_err().to_string();
        assert!(run(load(file.path(), Method::Pread)).contains("0 bytes"));
        assert!(run(BareLoad { block: 100, ..load(file.path(), Method::IoUring) }).contains("multiple of 512"));
        assert!(run(load(Path::new("/nowhere/file"), Method::IoUring)).contains("/nowhere/file"));
    }
}
