//! Data between an image and driver memory.
//!
//! Where alignment permits it goes straight there. Otherwise it takes the way over a buffer, in steps; the format's driver
//! would do so itself, but it cannot know of memory that was lost while it copied.

use std::io;

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, Mapping, ShallowMapping};
use vm_memory::{GuestMemory, Permissions, VolatileSlice};
use vvu_back_end::lost_memory;

use super::disk::Job;
use super::places::Place;
use crate::aligned_buffer::AlignedBuffer;
use crate::bounce::BOUNCE_LEN;
use crate::driver_data::{copy_from_driver, copy_to_driver};
use crate::request::ByteRange;

/// Most pieces of memory in one system call (`IOV_MAX`).
const MAX_PIECES: usize = 1024;

/// How much data was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moved {
    Nothing,
    /// Between storage and driver memory.
    InPlace(u64),
    /// Over a buffer.
    Bounced(u64),
}

pub(super) fn read(
    access: &FormatAccess<File>,
    job: &Job,
    range: ByteRange,
    buffer: &mut Option<AlignedBuffer>,
) -> io::Result<Moved> {
    let slices = slices(job)?;
    let (vector, guard) = IoVectorMut::from_volatile_slice(&slices);
    let fits = vector.is_aligned(access.mem_align(), access.req_align());
    if fits && is_possible(access, &range, slices.len()) {
        match access.readv(vector, range.offset) {
            Err(error) if refuses_memory(&error) => {}
            outcome => return outcome.map(|()| Moved::InPlace(range.len)),
        }
    }
    drop(guard);
    in_steps(access, range, buffer, |position, offset, part| {
        access.read(&mut *part, offset)?;
        copy_to_driver(job.memory.as_ref(), &job.data, position, part).map_err(io::Error::other)
    })
}

/// Where the data from `start` on is, if it is data, and how much of it lies there in one piece, at most `len`. Each image leads
/// to the one below it.
pub(super) fn place_of(access: &FormatAccess<File>, start: u64, mut len: u64) -> Option<(Place, u64)> {
    let (mut access, mut position) = (access, start);
    for layer in 0.. {
        let (mapping, found) = access.get_shallow_mapping(position, len).ok()?;
        len = found;
        match mapping {
            ShallowMapping::Raw { offset, .. } => return Some((Place { layer, offset }, len)),
            ShallowMapping::Indirect { layer: below, offset, .. } => (access, position) = (below, offset),
            _ => return None,
        }
    }
    None
}

/// Whether all of the range has its place in the image, so that a write changes no tables.
pub(super) fn has_its_place(access: &FormatAccess<File>, range: ByteRange) -> io::Result<bool> {
    let mut position = 0;
    while position < range.len {
        match access.get_mapping(range.offset + position, range.len - position)? {
            (Mapping::Raw { writable: true, .. }, len) if len > 0 => position += len,
            _ => return Ok(false),
        }
    }
    Ok(true)
}

pub(super) fn write(
    access: &FormatAccess<File>,
    job: &Job,
    range: ByteRange,
    buffer: &mut Option<AlignedBuffer>,
) -> io::Result<Moved> {
    let slices = slices(job)?;
    let (vector, guard) = IoVector::from_volatile_slice(&slices);
    let fits = vector.is_aligned(access.mem_align(), access.req_align());
    if fits && is_possible(access, &range, slices.len()) {
        match access.writev(vector, range.offset) {
            Err(error) if refuses_memory(&error) => {}
            outcome => return outcome.map(|()| Moved::InPlace(range.len)),
        }
    }
    drop(guard);
    in_steps(access, range, buffer, |position, offset, part| {
        copy_from_driver(job.memory.as_ref(), &job.data, position, part).map_err(io::Error::other)?;
        if lost_memory::losses() != job.former_losses {
            // Zeroes in place of what was lost must not reach the image.
            return Err(io::Error::other("driver memory was taken away"));
        }
        access.write(&*part, offset)
    })
}

/// Writes zeroes as data.
pub(super) fn write_zeroes(
    access: &FormatAccess<File>,
    range: ByteRange,
    buffer: &mut Option<AlignedBuffer>,
) -> io::Result<()> {
    let zeroed = in_steps(access, range, buffer, |_, offset, part| {
        part.fill(0);
        access.write(&*part, offset)
    });
    zeroed.map(drop)
}

/// The request's memory, a slice for each piece.
fn slices(job: &Job) -> io::Result<Vec<VolatileSlice<'_>>> {
    let mut slices = Vec::with_capacity(job.data.len());
    for segment in &job.data {
        let found = job.memory.get_slices(segment.address, segment.len as usize, Permissions::ReadWrite);
        for slice in found.map_err(io::Error::other)? {
            slices.push(slice.map_err(io::Error::other)?);
        }
    }
    Ok(slices)
}

fn is_possible(access: &FormatAccess<File>, range: &ByteRange, pieces: usize) -> bool {
    range.offset.is_multiple_of(access.req_align() as u64) && pieces <= MAX_PIECES
}

/// Direct I/O refuses this memory although it looked fit.
fn refuses_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL))
}

/// Calls `step` with the position in the range, the offset on the image and the bytes, for one part after the other.
fn in_steps(
    access: &FormatAccess<File>,
    range: ByteRange,
    buffer: &mut Option<AlignedBuffer>,
    mut step: impl FnMut(u64, u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Moved> {
    let alignment = u32::try_from(access.mem_align().max(access.req_align())).unwrap_or(u32::from(u16::MAX) + 1);
    let buffer = buffer.get_or_insert_with(|| AlignedBuffer::new(BOUNCE_LEN, alignment));
    let mut position = 0;
    while position < range.len {
        let len = usize::try_from(range.len - position).map_or(BOUNCE_LEN, |left| left.min(BOUNCE_LEN));
        let part = buffer.bytes_mut().get_mut(..len).unwrap_or_default();
        step(position, range.offset + position, part)?;
        position += len as u64;
    }
    Ok(Moved::Bounced(range.len))
}
