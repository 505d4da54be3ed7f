//! The window: which files the bridge has mapped into it, and where.
//!
//! An appliance maps the window as a whole and has one file for it, its device-DAX node. Here the back-end gets the files
//! themselves: a part of the window is a part of the one file that is mapped there.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::fstat;
use vvu_agent::window::{Backing, NotBacked, ReadError, Window};
use vvu_protocol::address::{FileOffset, WindowOffset};
use vvu_protocol::memory::PAGE_SIZE;
use vvu_protocol::message::ShmemMap;
use vvu_protocol::window::HEADER_LEN;

/// One mapping.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// Where it is, and of what part of the file.
    pub map: ShmemMap,
    /// The file.
    pub file: Arc<OwnedFd>,
}

impl Mapping {
    const fn end(&self) -> u64 {
        self.map.region_offset.saturating_add(self.map.len)
    }
}

/// A mapping that QEMU refuses.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Not in whole pages.
    #[error("not in whole pages")]
    Alignment,
    /// It ends behind the end of its file.
    #[error("file has {len:#x} bytes")]
    BeyondFile {
        /// Length of the file in bytes.
        len: u64,
    },
    /// Something else is there.
    #[error("something else is mapped there")]
    Overlap,
    /// Nothing is there.
    #[error("nothing is mapped so")]
    Unknown,
    /// The file cannot be looked at.
    #[error("its file")]
    Io(#[from] io::Error),
}

/// All mappings. Who maps and who looks share them.
#[derive(Debug, Clone, Default)]
pub struct Mappings(Arc<Mutex<Vec<Mapping>>>);

impl Mappings {
    fn lock(&self) -> MutexGuard<'_, Vec<Mapping>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Mapping> {
        self.lock().clone()
    }

    /// Maps.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn map(&self, map: ShmemMap, file: OwnedFd) -> Result<(), Refused> {
        let mapping = Mapping { map, file: Arc::new(file) };
        let mut mappings = self.lock();
        if [map.len, map.region_offset, map.file_offset.0].iter().any(|value| !value.is_multiple_of(PAGE_SIZE)) {
            return Err(Refused::Alignment);
        }
        let len = file_len(&*mapping.file)?;
        if map.file_offset.0.checked_add(map.len).is_none_or(|end| end > len) {
            return Err(Refused::BeyondFile { len });
        }
        let overlaps = |other: &Mapping| map.region_offset < other.end() && other.map.region_offset < mapping.end();
        if mappings.iter().any(overlaps) {
            return Err(Refused::Overlap);
        }
        mappings.push(mapping);
        Ok(())
    }

    /// Unmaps what was mapped in one piece.
    ///
    /// # Errors
    /// [`Refused::Unknown`].
    pub fn unmap(&self, map: &ShmemMap) -> Result<(), Refused> {
        let mut mappings = self.lock();
        let same = |other: &Mapping| other.map.region_offset == map.region_offset && other.map.len == map.len;
        let found = mappings.iter().position(same).ok_or(Refused::Unknown)?;
        mappings.remove(found);
        Ok(())
    }

    /// The first mapping that has something of these bytes.
    fn first_of(&self, start: u64, len: u64) -> Option<Mapping> {
        let mappings = self.lock();
        let there = |mapping: &&Mapping| mapping.map.region_offset < start.saturating_add(len) && start < mapping.end();
        mappings.iter().filter(there).min_by_key(|mapping| mapping.map.region_offset).cloned()
    }
}

fn file_len(file: impl AsFd) -> io::Result<u64> {
    Ok(fstat(file)?.st_size.unsigned_abs())
}

/// The window for the agent.
#[derive(Debug)]
pub struct MappedFiles {
    /// What is mapped.
    pub mappings: Mappings,
    /// Length of the window in bytes, header included.
    pub len: u64,
}

impl MappedFiles {
    /// The file at these bytes, and where `start` lies in it.
    fn place(&self, start: WindowOffset, len: u64) -> Option<(Arc<OwnedFd>, u64)> {
        if start.0 < HEADER_LEN || start.checked_add(len)?.0 > self.len {
            return None;
        }
        let Mapping { map, file } = self.mappings.first_of(start.0, len)?;
        // The piece that the bridge puts into the window starts at a multiple of what pieces of the agent do.
        let offset = map.file_offset.0.checked_add(start.0)?.checked_sub(map.region_offset)?;
        Some((file, offset))
    }
}

impl Window for MappedFiles {
    fn window_len(&self) -> u64 {
        self.len
    }

    fn seams(&self) -> Vec<WindowOffset> {
        self.mappings.lock().iter().map(|mapping| WindowOffset(mapping.map.region_offset)).collect()
    }

    /// As much as the file has: what an appliance finds unbacked behind its end is not part of it.
    fn backing(&self, start: WindowOffset, len: u64) -> Result<Backing, NotBacked> {
        let not_backed = || NotBacked { start, len };
        let (file, offset) = self.place(start, len).ok_or_else(not_backed)?;
        let there = file_len(&*file).ok().and_then(|len| len.checked_sub(offset)).filter(|there| *there > 0);
        let len = there.ok_or_else(not_backed)?.min(len);
        Ok(Backing { file, offset: FileOffset(offset), len })
    }

    fn read_u16(&self, offset: WindowOffset) -> Result<u16, ReadError> {
        let mut bytes = [0; 2];
        let (file, place) = self.place(offset, 2).ok_or(ReadError::Outside { offset })?;
        match rustix::io::pread(&*file, &mut bytes, place).map_err(io::Error::from)? {
            2 => Ok(u16::from_le_bytes(bytes)),
            _ => Err(ReadError::Outside { offset }),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vvu_protocol::window::{ALIGNMENT, MEMORY_OFFSET};

    use super::*;

    const START: u64 = MEMORY_OFFSET.0;

    fn file(len: u64) -> OwnedFd {
        let file = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        file
    }

    const fn map(file_offset: u64, region_offset: u64, len: u64) -> ShmemMap {
        ShmemMap { region: 0, file_offset: FileOffset(file_offset), region_offset, len, writable: true }
    }

    /// A window with the second unit of a file of two units and a page, and another file right behind.
    fn window() -> MappedFiles {
        let mappings = Mappings::default();
        mappings.map(map(ALIGNMENT, START, ALIGNMENT + 4096), file(2 * ALIGNMENT + 4096)).unwrap();
        mappings.map(map(0, START + 2 * ALIGNMENT, ALIGNMENT), file(ALIGNMENT)).unwrap();
        MappedFiles { mappings, len: START + 4 * ALIGNMENT }
    }

    #[test]
    fn a_part_of_the_window_is_a_part_of_a_file() {
        let window = window();
        let backing = |start, len| {
            let Backing { offset, len, .. } = window.backing(WindowOffset(start), len).ok()?;
            Some((offset.0, len))
        };
        assert_eq!(backing(START, ALIGNMENT), Some((ALIGNMENT, ALIGNMENT)));
        // The file ends a page later, wherever the window goes on.
        assert_eq!(backing(START, 2 * ALIGNMENT), Some((ALIGNMENT, ALIGNMENT + 4096)));
        assert_eq!(backing(START + ALIGNMENT, ALIGNMENT), Some((2 * ALIGNMENT, 4096)));
        assert_eq!(backing(START + 2 * ALIGNMENT, ALIGNMENT), Some((0, ALIGNMENT)));
        for (start, len) in [(START + 3 * ALIGNMENT, ALIGNMENT), (0, ALIGNMENT), (START, 5 * ALIGNMENT)] {
            assert_eq!(backing(start, len), None, "{start:#x}");
        }
        assert_eq!(window.seams(), [WindowOffset(START), WindowOffset(START + 2 * ALIGNMENT)]);
    }

    #[test]
    fn numbers_are_read_where_the_window_has_them() {
        let window = window();
        let place = WindowOffset(START + ALIGNMENT + 8);
        let Backing { file, .. } = window.backing(WindowOffset(START), ALIGNMENT).unwrap();
        rustix::io::pwrite(&*file, &[0x34, 0x12], 2 * ALIGNMENT + 8).unwrap();
        assert_eq!(window.read_u16(place).unwrap(), 0x1234);
        for outside in [START + ALIGNMENT + 4096, START + 3 * ALIGNMENT, u64::MAX - 1] {
            assert!(window.read_u16(WindowOffset(outside)).is_err(), "{outside:#x}");
        }
    }

    #[test]
    fn what_qemu_refuses_is_refused() {
        let MappedFiles { mappings, .. } = window();
        let far = START + 3 * ALIGNMENT;
        assert!(matches!(mappings.map(map(0, far + 1, 4096), file(4096)), Err(Refused::Alignment)));
        assert!(matches!(mappings.map(map(0, far, 8192), file(4096)), Err(Refused::BeyondFile { len: 4096 })));
        assert!(matches!(mappings.map(map(0, far - 4096, 8192), file(8192)), Err(Refused::Overlap)));
        assert!(matches!(mappings.unmap(&map(0, START, 4096)), Err(Refused::Unknown)));
        mappings.unmap(&map(0, START, ALIGNMENT + 4096)).unwrap();
        assert_eq!(mappings.all().len(), 1);
    }
}
