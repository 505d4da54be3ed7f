//! A disk of several files, and what can be asked of it.
//!
//! An image that is made to lead the format's driver into a panic ends the program, and nothing else.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use vvu_back_end::Segment;

use super::header::{Count, HEADER_LEN, Header, HeaderError};
use super::places::{PART_LEN, PIECE_LEN, Place, Places, parts_of};
use super::transfer::{self, Moved};
use crate::DriverMemory;
use crate::aligned_buffer::AlignedBuffer;
use crate::config_space::{DiskShape, SECTOR_SIZE};
use crate::image::{Alignment, Format, Image};
use crate::request::ByteRange;

/// Physical block size that is told to the driver.
const PHYSICAL_BLOCK_SIZE: u32 = 4096;

/// Why a disk cannot be put together of its files.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The image is not served.
    #[error("{path} {source}")]
    Header {
        /// The image.
        path: PathBuf,
        /// Why.
        source: HeaderError,
    },
    /// The header cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The image.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The image needs more than was given.
    #[error("{path} has a backing file, and none is given for it; name it with --backing FORMAT:PATH")]
    BackingMissing {
        /// The image.
        path: PathBuf,
    },
    /// More was given than the image needs.
    #[error("{path} has no backing file, but {backing} is given as one; leave it out")]
    BackingTooMuch {
        /// The image.
        path: PathBuf,
        /// The file behind it.
        backing: PathBuf,
    },
    /// No sector.
    #[error("{path} is a disk of {len} bytes, less than one sector; enlarge it with qemu-img resize")]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Virtual size in bytes.
        len: u64,
    },
}

/// One file of a disk.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) format: Format,
    pub(crate) image: Arc<Image>,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Qcow2Disk {
    /// The image, its backing file, the backing file of that, and so on.
    layers: Vec<Layer>,
    shape: DiskShape,
    /// Requests share it; what moves data within the image, or frees some, has it alone.
    state: RwLock<State>,
    /// Requests that change tables beside others share it, and it is taken alone to write tables to the file; always after `state`.
    /// The format's driver writes its counts of references first and what refers to clusters then. A cluster that is taken
    /// in between would be referred to and not be counted if the program is killed then, and be given away a second time.
    tables: RwLock<()>,
    /// Requests that have changed tables.
    changes: AtomicU64,
    /// Those of them, the first ones, whose tables are in the file.
    written_changes: Mutex<u64>,
    places: Places,
}

/// What a ring's thread may read by itself; the disk is not used alone before it is dropped.
#[derive(Debug)]
pub(crate) struct Found<'a> {
    pub(crate) place: Place,
    /// What the file asks of direct I/O.
    pub(crate) alignment: Alignment,
    pub(crate) shared: Shared<'a>,
}

#[derive(Debug, Default)]
struct State {
    /// Rings in service.
    users: usize,
    /// None while there are none, and if the image cannot be used.
    access: Option<FormatAccess<File>>,
}

/// What is to be done for a request.
#[derive(Debug)]
pub(crate) enum Operation {
    Read(ByteRange),
    Write(ByteRange),
    /// Nothing but to make durable what was done before.
    Flush,
    Discard(Vec<ByteRange>),
    WriteZeroes(Vec<ByteRange>),
}

/// A request.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) operation: Operation,
    pub(crate) memory: Arc<DriverMemory>,
    pub(crate) data: Vec<Segment>,
    /// It is durable when it is done.
    pub(crate) durable: bool,
    /// Losses of driver memory before the connection.
    pub(crate) former_losses: u64,
}

impl Qcow2Disk {
    /// Puts a disk together; the first layer is a qcow2 image. Looks at the headers, and at nothing else yet.
    pub(crate) fn new(layers: Vec<Layer>, read_only: bool) -> Result<Self, LayerError> {
        let (mut virtual_size, mut cluster_len) = (None, PART_LEN);
        for (index, layer) in layers.iter().enumerate() {
            let path = || layer.image.path().to_owned();
            let has_backing = match layer.format {
                Format::Raw => false,
                Format::Qcow2 => {
                    let header = read_header(&layer.image)?;
                    if index == 0 {
                        cluster_len = header.cluster_len;
                    }
                    virtual_size.get_or_insert(header.virtual_size);
                    header.has_backing
                }
            };
            match (has_backing, layers.get(index + 1)) {
                (true, None) => return Err(LayerError::BackingMissing { path: path() }),
                (false, Some(below)) => {
                    return Err(LayerError::BackingTooMuch { path: path(), backing: below.image.path().to_owned() });
                }
                _ => {}
            }
        }
        let len = virtual_size.unwrap_or(0);
        let capacity_sectors = len / u64::from(SECTOR_SIZE);
        if capacity_sectors == 0 {
            let path = layers.first().map(|layer| layer.image.path().to_owned()).unwrap_or_default();
            return Err(LayerError::TooSmall { path, len });
        }
        let shape = DiskShape {
            capacity_sectors,
            block_size: SECTOR_SIZE,
            physical_block_size: PHYSICAL_BLOCK_SIZE,
            read_only,
        };
        tracing::info!(?shape, files = layers.len(), "qcow2 disk");
        Ok(Self {
            layers,
            shape,
            state: RwLock::default(),
            tables: RwLock::default(),
            changes: AtomicU64::new(0),
            written_changes: Mutex::default(),
            places: Places::new(cluster_len),
        })
    }

    pub(crate) fn shape(&self) -> DiskShape {
        self.shape
    }

    /// The disk's files, from the image downwards.
    pub(crate) fn images(&self) -> Vec<Arc<Image>> {
        self.layers.iter().map(|layer| Arc::clone(&layer.image)).collect()
    }

    /// Where a range lies in one piece, if that is known. Never waits.
    pub(crate) fn find(&self, range: ByteRange) -> Option<Found<'_>> {
        let shared = Shared(self.state.try_read().ok()?);
        let place = self.places.find(range)?;
        let alignment = self.layers.get(place.layer as usize)?.image.alignment();
        Some(Found { place, alignment, shared })
    }

    /// A ring starts: the disk is in use until the guard is dropped. If it cannot be used, its requests fail.
    pub(crate) fn enter(&self) -> InUse<'_> {
        let mut state = self.lock();
        state.users += 1;
        if state.users == 1 {
            match self.open() {
                Ok(access) => state.access = Some(access),
                Err(error) => tracing::error!(error = in_one_line(&error), "image cannot be used"),
            }
        }
        InUse { disk: self }
    }

    fn leave(&self) {
        let mut state = self.lock();
        state.users = state.users.saturating_sub(1);
        if state.users > 0 {
            return;
        }
        let Some(access) = state.access.take() else { return };
        // From now on others may change the image.
        self.places.forget_all();
        let closed = access.flush();
        drop(access);
        if let Err(error) = closed {
            tracing::error!(error = in_one_line(&error), "image was not closed in order; check it with qemu-img check");
        }
    }

    fn open(&self) -> io::Result<FormatAccess<File>> {
        if let Some(layer) = self.layers.first().filter(|_| !self.shape.read_only) {
            check_refcounts(&layer.image).map_err(io::Error::other)?;
        }
        let mut below: Option<FormatAccess<File>> = None;
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let writable = index == 0 && !self.shape.read_only;
            let options = StorageOpenOptions::new().write(writable).direct(layer.image.direct());
            let file = File::from_open_file(layer.image.file().try_clone()?, options)?;
            below = Some(match layer.format {
                Format::Raw => FormatAccess::new(Raw::open_image(file, false)?),
                Format::Qcow2 => {
                    let builder = Qcow2::<File>::builder(file).write(writable);
                    let builder = match below {
                        Some(below) => builder.backing(Some(below)),
                        None => builder,
                    };
                    // What the header names is refused there once more, should it not be what was looked at before.
                    FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?)
                }
            });
        }
        below.ok_or_else(|| io::Error::other("there is no image"))
    }

    /// Carries a request out. `buffer` is for what cannot be done in place. What is done then is in the files, tables and all:
    /// the driver does not notice when this process ends, and would miss it.
    pub(crate) fn carry_out(&self, job: &Job, buffer: &mut Option<AlignedBuffer>) -> io::Result<Moved> {
        let mut changes_tables = true;
        let moved = match &job.operation {
            Operation::Read(range) => return self.read(job, *range, buffer),
            Operation::Write(range) => {
                let guard = self.access();
                let access = guard.get()?;
                changes_tables = !transfer::has_its_place(access, *range)?;
                let _change = changes_tables.then(|| (self.share_tables(), self.places.change(*range)));
                transfer::write(access, job, *range, buffer)?
            }
            Operation::Flush => Moved::Nothing,
            Operation::Discard(ranges) => {
                ranges.iter().try_for_each(|range| self.discard(*range))?;
                Moved::Nothing
            }
            Operation::WriteZeroes(ranges) => {
                ranges.iter().try_for_each(|range| self.write_zeroes(*range, buffer))?;
                Moved::Nothing
            }
        };
        if changes_tables {
            self.write_tables()?;
        }
        if job.durable || matches!(job.operation, Operation::Flush) {
            self.sync()?;
        }
        Ok(moved)
    }

    /// Reads, and learns where the parts are that it has read from.
    fn read(&self, job: &Job, range: ByteRange, buffer: &mut Option<AlignedBuffer>) -> io::Result<Moved> {
        let guard = self.access();
        let access = guard.get()?;
        let changes = self.places.changes();
        let moved = transfer::read(access, job, range, buffer)?;
        for part in parts_of(range).filter(|part| !self.places.knows(*part)) {
            let start = part * PART_LEN;
            let left = access.size().saturating_sub(start);
            let Some((place, len)) = transfer::place_of(access, start, left.min(PIECE_LEN)) else { continue };
            // The last part of the disk may be a short one.
            let count = if len == left { len.div_ceil(PART_LEN) } else { len / PART_LEN };
            self.places.learn(part, count, place, changes);
        }
        Ok(moved)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        let _change = self.places.change(range);
        self.alone().get()?.discard_to_any(range.offset, range.len)
    }

    fn write_zeroes(&self, range: ByteRange, buffer: &mut Option<AlignedBuffer>) -> io::Result<()> {
        let _change = self.places.change(range);
        let zeroed = if range.unmap {
            self.alone().get()?.discard_to_zero(range.offset, range.len)
        } else {
            let guard = self.access();
            let _tables = self.share_tables();
            guard.get()?.write_zeroes(range.offset, range.len)
        };
        match zeroed {
            // Version 2 has no notion of zeroes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let guard = self.access();
                let _tables = self.share_tables();
                transfer::write_zeroes(guard.get()?, range, buffer)
            }
            zeroed => zeroed,
        }
    }

    fn share_tables(&self) -> RwLockReadGuard<'_, ()> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the tables that the caller's request has changed, and with them those of all that were carried out meanwhile.
    fn write_tables(&self) -> io::Result<()> {
        let own = self.changes.fetch_add(1, Ordering::AcqRel) + 1;
        let mut written = self.written_changes.lock().unwrap_or_else(PoisonError::into_inner);
        if *written >= own {
            return Ok(());
        }
        // Whoever has counted has changed its tables before.
        let all = self.changes.load(Ordering::Acquire);
        let guard = self.access();
        let _tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        guard.get()?.flush()?;
        *written = all;
        Ok(())
    }

    /// Makes durable what is in the files.
    fn sync(&self) -> io::Result<()> {
        let Some(image) = self.layers.first().map(|layer| &layer.image) else { return Ok(()) };
        if !image.can_flush() {
            return Err(io::Error::other("an earlier flush failed and data was lost"));
        }
        self.access().get()?.sync().inspect_err(|_| image.note_failed_flush())
    }

    fn access(&self) -> Shared<'_> {
        Shared(self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn alone(&self) -> Alone<'_> {
        Alone(self.lock())
    }

    fn lock(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ring works with the disk.
#[derive(Debug)]
pub(crate) struct InUse<'a> {
    disk: &'a Qcow2Disk,
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.disk.leave();
    }
}

/// The disk, beside others.
#[derive(Debug)]
pub(crate) struct Shared<'a>(RwLockReadGuard<'a, State>);

impl Shared<'_> {
    fn get(&self) -> io::Result<&FormatAccess<File>> {
        self.0.access.as_ref().ok_or_else(unusable)
    }
}

/// The disk, alone.
struct Alone<'a>(RwLockWriteGuard<'a, State>);

impl Alone<'_> {
    fn get(&mut self) -> io::Result<&mut FormatAccess<File>> {
        self.0.access.as_mut().ok_or_else(unusable)
    }
}

fn unusable() -> io::Error {
    io::Error::other("the image cannot be used")
}

fn in_one_line(error: &io::Error) -> String {
    vvu_back_end::in_one_line(error)
}

fn read_header(image: &Image) -> Result<Header, LayerError> {
    let path = || image.path().to_owned();
    let bytes = read_at(image, 0, HEADER_LEN).map_err(|source| LayerError::Read { path: path(), source })?;
    let header = bytes.first_chunk().copied().unwrap_or([0; HEADER_LEN]);
    Header::parse(&header).map_err(|source| LayerError::Header { path: path(), source })
}

/// Looks whether the reference counts can be believed as far as that nothing is put where the header is, and counts the L2 tables
/// that are not counted.
///
/// The format's driver refers to a new L2 table in the file before it writes the table's count there. If it is killed in between,
/// the next one would give the table's cluster away again, and data would be written over the table.
fn check_refcounts(image: &Image) -> Result<(), LayerError> {
    let header = read_header(image)?;
    let unread = |source| LayerError::Read { path: image.path().to_owned(), source };
    let read = |offset, len| read_at(image, offset, len).map_err(unread);
    let file_len = image.file_len().map_err(unread)?;
    let damaged = |source| LayerError::Header { path: image.path().to_owned(), source };
    let len = |len| usize::try_from(len).unwrap_or(usize::MAX);
    let table = read(header.refcount_table, len(header.refcount_table_len))?;
    let first_block = header.check_refcount_table(&table, file_len).map_err(damaged)?;
    header.check_first_refcounts(&read(first_block, size_of::<u64>())?).map_err(damaged)?;
    let l1 = read(header.l1_table, len(header.l1_len))?;
    let restored = restore_counts(image, &header.counts_of_l2_tables(&l1, &table)).map_err(unread)?;
    if restored > 0 {
        tracing::info!(path = %image.path().display(), restored, "counts of L2 tables that a killed program has not written");
    }
    Ok(())
}

/// Makes each count 1 that is 0; returns how many were. They are in ascending order.
fn restore_counts(image: &Image, counts: &[Count]) -> io::Result<usize> {
    let alignment = image.alignment();
    let unit = u64::from(alignment.offset.max(SECTOR_SIZE));
    let mut restored = 0;
    let mut rest = counts;
    while let Some(first) = rest.first() {
        let start = first.offset - first.offset % unit;
        let (here, behind) = rest.split_at(rest.partition_point(|count| count.offset - start < unit));
        rest = behind;
        let mut buffer = AlignedBuffer::new(usize::try_from(unit).unwrap_or(0), alignment.memory);
        read_all(image.file(), buffer.bytes_mut(), start)?;
        let before = restored;
        for count in here {
            let position = usize::try_from(count.offset - start).unwrap_or(usize::MAX);
            let bytes = buffer.bytes_mut().get_mut(position..).and_then(|bytes| bytes.get_mut(..count.len));
            restored += usize::from(bytes.is_some_and(|bytes| count.restore(bytes)));
        }
        if restored > before {
            image.file().write_all_at(buffer.bytes(), start)?;
        }
    }
    Ok(restored)
}

/// Reads bytes of a file; zeroes beyond its end. `offset` is a multiple of 512.
fn read_at(image: &Image, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let alignment = image.alignment();
    let skip = offset % u64::from(alignment.offset);
    let needed = len.saturating_add(usize::try_from(skip).unwrap_or(0));
    let mut buffer = AlignedBuffer::new(needed.next_multiple_of(alignment.offset as usize), alignment.memory);
    let read = read_all(image.file(), buffer.bytes_mut(), offset - skip)?;
    let end = needed.min(read);
    let mut bytes = buffer.bytes().get(needed - len..end).unwrap_or_default().to_vec();
    bytes.resize(len, 0);
    Ok(bytes)
}

/// Reads until the buffer is full or the file at its end; returns how much.
fn read_all(file: &std::fs::File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(len) => {
                done += len;
                if !len.is_multiple_of(SECTOR_SIZE as usize) {
                    // The end of the file; direct I/O cannot go on from here.
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
