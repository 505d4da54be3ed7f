//! The image: a raw file or a block device, opened once, with what its storage demands of direct I/O.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, OFlags, StatxFlags};

use crate::aligned_buffer::AlignedBuffer;
use crate::config_space::{DiskShape, SECTOR_SIZE};
use crate::write_gate::WriteGate;

/// Largest alignment that storage may ask for, in bytes; above any that exists.
const MAX_ALIGNMENT: u32 = 64 * 1024;

/// Physical block size that is told to the driver for a file: the block size of common file systems.
const FILE_BLOCK_SIZE: u32 = 4096;

/// How long the image may still be locked by a back-end that has ended.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Time between two attempts to lock; flock(2) itself waits without limit or not at all.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The path cannot be looked up.
    #[error("cannot find image {path}")]
    Stat {
        /// The image.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("{path} is neither a regular file nor a block device; give a raw image or a disk")]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// The image cannot be opened.
    #[error("cannot open image {path}; check its access rights, or give --read-only")]
    Open {
        /// The image.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Another back-end has the image.
    #[error("image {path} is in use by another back-end; end that one first")]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// Size, block size or alignment cannot be found out.
    #[error("cannot examine image {path}")]
    Examine {
        /// The image.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Less than one block.
    #[error(
        "image {path} has {len} bytes, less than one block of {block_size}; enlarge it, for example with truncate(1)"
    )]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Bytes of one block.
        block_size: u32,
    },
}

/// Format of an image. Nothing is ever guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The bytes are those of the disk.
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
}

/// What direct I/O must be a multiple of, in bytes. Both powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Offset and length on the image.
    pub(crate) offset: u32,
    /// Address in memory.
    pub(crate) memory: u32,
}

impl Alignment {
    /// Buffered I/O takes anything.
    const NONE: Self = Self { offset: 1, memory: 1 };
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    path: PathBuf,
    /// As it was at the start; the capacity of now is in `capacity_sectors`.
    shape: DiskShape,
    /// May change at any time, under requests in flight too; those were checked against what it was before.
    capacity_sectors: AtomicU64,
    block_device: bool,
    direct: bool,
    alignment: Alignment,
    /// A file in memory: see [`Image::in_memory`].
    in_memory: bool,
    /// There is no image: nothing is read or written.
    null: bool,
    /// Present where a request can be smaller than the smallest write to the storage.
    gate: Option<WriteGate>,
    /// A flush failed in buffered mode: the page cache has dropped data that it had accepted, and the next fsync would
    /// claim success. So no later flush may.
    cache_lost_data: AtomicBool,
}

impl Image {
    /// Opens an image, with direct I/O if the storage has it. `io_alignment` is the least alignment of direct I/O.
    pub(crate) fn open(path: &Path, read_only: bool, io_alignment: Option<u32>) -> Result<Self, ImageError> {
        let path_buf = || path.to_owned();
        let kind = std::fs::metadata(path).map_err(|source| ImageError::Stat { path: path_buf(), source })?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind { path: path_buf() });
        }
        let (file, direct) =
            open_direct_first(path, read_only).map_err(|source| ImageError::Open { path: path_buf(), source })?;
        if !lock(&file, read_only) {
            return Err(ImageError::InUse { path: path_buf() });
        }
        let in_memory = kind.is_file() && never_waits(&file);
        let examined = examine(&file, kind.is_block_device(), direct, io_alignment);
        let facts = examined.map_err(|source| ImageError::Examine { path: path_buf(), source })?;
        let capacity_sectors = whole_blocks(facts.len, facts.block_size);
        if capacity_sectors == 0 {
            return Err(ImageError::TooSmall { path: path_buf(), len: facts.len, block_size: facts.block_size });
        }
        let shape = DiskShape {
            capacity_sectors,
            block_size: facts.block_size,
            physical_block_size: facts.physical_block_size.max(facts.block_size),
            read_only,
        };
        let alignment = facts.alignment;
        tracing::info!(?shape, direct, ?alignment, path = %path.display(), "image is open");
        let gate = (alignment.offset > SECTOR_SIZE).then(WriteGate::default);
        Ok(Self {
            file,
            path: path_buf(),
            shape,
            capacity_sectors: AtomicU64::new(capacity_sectors),
            block_device: kind.is_block_device(),
            direct,
            alignment,
            in_memory,
            null: false,
            gate,
            cache_lost_data: AtomicBool::new(false),
        })
    }

    /// A disk of `len` bytes that keeps nothing.
    pub(crate) fn null(len: u64, read_only: bool) -> Result<Self, ImageError> {
        let path = PathBuf::from("/dev/null");
        let file = File::open(&path).map_err(|source| ImageError::Open { path: path.clone(), source })?;
        let (block_size, physical_block_size) = (SECTOR_SIZE, FILE_BLOCK_SIZE);
        let capacity_sectors = whole_blocks(len, block_size);
        if capacity_sectors == 0 {
            return Err(ImageError::TooSmall { path, len, block_size });
        }
        tracing::warn!(len, "the disk keeps nothing; it is for measuring");
        Ok(Self {
            file,
            path,
            shape: DiskShape { capacity_sectors, block_size, physical_block_size, read_only },
            capacity_sectors: AtomicU64::new(capacity_sectors),
            block_device: false,
            direct: false,
            alignment: Alignment::NONE,
            in_memory: false,
            null: true,
            gate: None,
            cache_lost_data: AtomicBool::new(false),
        })
    }

    /// There is no image: each request is to succeed without touching anything.
    pub(crate) fn is_null(&self) -> bool {
        self.null
    }

    /// Looks how long the image is now. True if its capacity has changed, which the driver has to be told then; requests
    /// are checked against the new one from now on.
    pub(crate) fn look_again(&self) -> Result<bool, ImageError> {
        if self.null {
            return Ok(false);
        }
        let len = length(&self.file).map_err(|source| ImageError::Examine { path: self.path.clone(), source })?;
        let now = whole_blocks(len, self.shape.block_size);
        let before = self.capacity_sectors.swap(now, Ordering::Relaxed);
        if now != before {
            tracing::info!(before, now, path = %self.path.display(), "capacity has changed, in sectors");
        }
        Ok(now != before)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Length of the file or device at this moment, in bytes.
    pub(crate) fn file_len(&self) -> io::Result<u64> {
        length(&self.file)
    }

    /// With the capacity of this moment.
    pub(crate) fn shape(&self) -> DiskShape {
        DiskShape { capacity_sectors: self.capacity_sectors(), ..self.shape }
    }

    /// Capacity of this moment in units of [`SECTOR_SIZE`].
    pub(crate) fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Relaxed)
    }

    /// The kernel tells when a block device changes its size, and not when a file does.
    pub(crate) fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// I/O bypasses the page cache.
    pub(crate) fn direct(&self) -> bool {
        self.direct
    }

    /// The image is in memory: reads and writes are copies, and are done where they are submitted.
    pub(crate) fn in_memory(&self) -> bool {
        self.in_memory
    }

    pub(crate) fn alignment(&self) -> Alignment {
        self.alignment
    }

    pub(crate) fn gate(&self) -> Option<&WriteGate> {
        self.gate.as_ref()
    }

    /// Remembers that a flush failed.
    pub(crate) fn note_failed_flush(&self) {
        if !self.direct {
            self.cache_lost_data.store(true, Ordering::Relaxed);
        }
    }

    /// A flush can still be honest.
    pub(crate) fn can_flush(&self) -> bool {
        !self.cache_lost_data.load(Ordering::Relaxed)
    }
}

fn open_direct_first(path: &Path, read_only: bool) -> io::Result<(File, bool)> {
    let open = |flags: OFlags| {
        OpenOptions::new().read(true).write(!read_only).custom_flags(flags.bits().cast_signed()).open(path)
    };
    match open(OFlags::DIRECT) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            tracing::warn!(path = %path.display(), "file system refuses O_DIRECT; falling back to buffered I/O");
            Ok((open(OFlags::empty())?, false))
        }
        Err(error) => Err(error),
    }
}

/// Whether the file is in memory (tmpfs). If so, it is made one that io_uring reads and writes where that is submitted.
///
/// io_uring leaves files whose file system cannot promise not to wait to threads of its own, and tmpfs does not promise it. With
/// O_NONBLOCK the one who has opened the file promises it instead; what waits after all, for memory that was swapped out, keeps
/// the queue waiting.
fn never_waits(file: &File) -> bool {
    let in_memory = rustix::fs::fstatfs(file).is_ok_and(|facts| facts.f_type == libc::TMPFS_MAGIC);
    in_memory
        && rustix::fs::fcntl_getfl(file)
            .and_then(|flags| rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK))
            .is_ok()
}

/// Locks the image against a second back-end, for as long as the file is open. False if there is one.
///
/// The kernel ends the io_uring of a process only some time after the process, and with it the last I/O and the lock. So
/// a back-end that is started in place of one that died waits a little.
fn lock(file: &File, read_only: bool) -> bool {
    let operation =
        if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    let deadline = Instant::now() + LOCK_PATIENCE;
    // A file system without locks is no reason to refuse.
    while rustix::fs::flock(file, operation) == Err(rustix::io::Errno::WOULDBLOCK) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOCK_INTERVAL);
    }
    true
}

/// Seeking finds the length of a block device too. Nothing else here depends on the position.
fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Sectors in the whole blocks of an image.
fn whole_blocks(len: u64, block_size: u32) -> u64 {
    let unreachable_bytes = len % u64::from(block_size);
    if unreachable_bytes != 0 {
        tracing::warn!(unreachable_bytes, block_size, "image ends within a block; the rest stays out of reach");
    }
    len / u64::from(block_size) * u64::from(block_size / SECTOR_SIZE)
}

struct Facts {
    len: u64,
    block_size: u32,
    physical_block_size: u32,
    alignment: Alignment,
}

fn examine(file: &File, block_device: bool, direct: bool, io_alignment: Option<u32>) -> io::Result<Facts> {
    let len = length(file)?;
    let (block_size, physical_block_size) = if block_device {
        (rustix::fs::ioctl_blksszget(file)?, rustix::fs::ioctl_blkpbszget(file)?)
    } else {
        // The content of a file must not depend on the disk that it happens to lie on: its blocks are sectors.
        (SECTOR_SIZE, FILE_BLOCK_SIZE)
    };
    let mut alignment = if direct { direct_alignment(file)? } else { Alignment::NONE };
    if let Some(least) = io_alignment.filter(|_| direct) {
        alignment = Alignment { offset: alignment.offset.max(least), memory: alignment.memory.max(least) };
    }
    for value in [block_size, alignment.offset, alignment.memory] {
        if !value.is_power_of_two() || value > MAX_ALIGNMENT {
            return Err(io::Error::other(format!("storage asks for an alignment of {value} bytes")));
        }
    }
    Ok(Facts { len, block_size: block_size.max(SECTOR_SIZE), physical_block_size, alignment })
}

/// Asks the file system for the alignment of direct I/O (statx, Linux 6.1), and tries it out where it does not say.
fn direct_alignment(file: &File) -> io::Result<Alignment> {
    if let Ok(stat) = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        let told = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN);
        if told && stat.stx_dio_offset_align != 0 {
            return Ok(Alignment { offset: stat.stx_dio_offset_align, memory: stat.stx_dio_mem_align.max(1) });
        }
    }
    let mut last_error = None;
    for alignment in [SECTOR_SIZE, 4096, MAX_ALIGNMENT] {
        let mut buffer = AlignedBuffer::new(alignment as usize, alignment);
        match file.read_at(buffer.bytes_mut(), 0) {
            Ok(_) => return Ok(Alignment { offset: alignment, memory: alignment }),
            Err(error) => last_error = Some(error),
        }
    }
    Err(last_error.unwrap_or_else(|| io::Error::other("no alignment left to try")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn an_odd_length_is_cut_to_whole_sectors() {
        let file = file_of(10 * 512 + 17);
        let image = Image::open(file.path(), false, None).unwrap();
        assert_eq!(image.shape().capacity_sectors, 10);
        assert_eq!(image.shape().block_size, 512);
    }

    #[test]
    fn another_look_finds_another_size() {
        let file = file_of(10 * 512);
        let image = Image::open(file.path(), false, None).unwrap();
        assert!(!image.look_again().unwrap());
        for (len, capacity_sectors) in [(20 * 512 + 511, 20), (3 * 512, 3), (100, 0), (1 << 30, 1 << 21)] {
            file.as_file().set_len(len).unwrap();
            assert!(image.look_again().unwrap());
            assert_eq!(image.shape().capacity_sectors, capacity_sectors);
            assert!(!image.look_again().unwrap());
        }
    }

    #[test]
    fn wrong_images_are_refused_by_name() {
        let open = |path: &Path| Image::open(path, false, None).unwrap_err();
        assert!(matches!(open(Path::new("/nowhere/image")), ImageError::Stat { .. }));
        assert!(matches!(open(Path::new("/dev/null")), ImageError::Kind { .. }));
        assert!(matches!(open(Path::new("/")), ImageError::Kind { .. }));
        assert!(matches!(open(file_of(511).path()), ImageError::TooSmall { len: 511, .. }));
    }

    #[test]
    fn two_writers_exclude_each_other_and_two_readers_do_not() {
        let file = file_of(4096);
        let writer = Image::open(file.path(), false, None).unwrap();
        assert!(matches!(Image::open(file.path(), true, None), Err(ImageError::InUse { .. })));
        drop(writer);
        let _reader = Image::open(file.path(), true, None).unwrap();
        Image::open(file.path(), true, None).unwrap();
        assert!(matches!(Image::open(file.path(), false, None), Err(ImageError::InUse { .. })));
    }

    #[test]
    fn a_read_only_image_is_opened_without_the_right_to_write() {
        let file = file_of(4096);
        let image = Image::open(file.path(), true, None).unwrap();
        let error = image.file().write_at(&[0; 512], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
