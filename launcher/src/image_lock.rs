//! The lock on the disk image, held by `vvu` and its appliance VMs together.
//!
//! While one appliance VM replaces another, two QEMUs have the image open, which QEMU's own locking forbids. So theirs is
//! off, and this lock stands for both: it lies on an open file description that each QEMU inherits, so the image stays
//! locked as long as any of them lives, even if `vvu` is killed. The bytes are those that QEMU's programs lock and test
//! (QEMU documentation, "Disk image file locking"; `block/file-posix.c`), so those refuse the image meanwhile, and are
//! respected.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::image::Image;
use crate::ofd_lock::{Kind, Range, is_free, try_lock};

/// First byte of those that say what a QEMU does with an image; bit `n` of its permissions is byte 100 + n.
const DOES: u16 = 100;

/// First byte of those that say what a QEMU does not let others do; same bits.
const FORBIDS: u16 = 200;

/// Permission to read consistent data (bit 0 of QEMU's `BlockPermission`).
const READ: u16 = 0;

/// Permission to write (bit 1).
const WRITE: u16 = 1;

/// Permission to resize (bit 3).
const RESIZE: u16 = 3;

/// All bytes that QEMU's programs look at.
const ALL: Range = Range { first: DOES, len: 201 };

/// The lock; copies are the same one.
#[derive(Debug, Clone)]
pub(crate) struct ImageLock(Arc<File>);

/// Why an image cannot be locked, with the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageLockError {
    /// Somebody has it open, and it is to be written here.
    #[error(
        "image {0} is in use by another process; end that one (for a live migration between two vvu, give --share-image \
         to both)"
    )]
    InUse(PathBuf),
    /// Somebody writes to it, and it is to be read here.
    #[error(
        "image {0} may be written by another process; end that one, or open it read-only there too (for a live migration \
         between two vvu, give --share-image to both)"
    )]
    Written(PathBuf),
    /// It can no longer be opened, or its file system has no locks.
    #[error("image {path} cannot be locked; see that nobody else uses it and add --share-image")]
    System {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl ImageLock {
    /// Locks the image against every other use, or, if it is served read-only, against writers.
    ///
    /// # Errors
    /// [`ImageLockError`], one line with the remedy.
    pub(crate) fn take(image: &Image) -> Result<Self, ImageLockError> {
        let path = || PathBuf::from(&image.path);
        let system = |source| ImageLockError::System { path: path(), source };
        let file = OpenOptions::new().read(true).write(!image.read_only).open(&image.path).map_err(system)?;
        let taken = if image.read_only { lock_as_reader(&file) } else { try_lock(file.as_fd(), Kind::Exclusive, ALL) };
        match (taken.map_err(system)?, image.read_only) {
            (true, _) => Ok(Self(Arc::new(file))),
            (false, true) => Err(ImageLockError::Written(path())),
            (false, false) => Err(ImageLockError::InUse(path())),
        }
    }

    /// The file whose description carries the lock, to be inherited by a QEMU.
    pub(crate) fn file(&self) -> Arc<File> {
        Arc::clone(&self.0)
    }
}

/// Does what a QEMU that only reads does: says that it reads and suffers no writer, then looks whether somebody writes or
/// suffers no reader.
fn lock_as_reader(file: &File) -> io::Result<bool> {
    let byte = |first| Range { first, len: 1 };
    for first in [DOES + READ, FORBIDS + WRITE, FORBIDS + RESIZE] {
        if !try_lock(file.as_fd(), Kind::Shared, byte(first))? {
            return Ok(false);
        }
    }
    for first in [DOES + WRITE, DOES + RESIZE, FORBIDS + READ] {
        // A shared lock of somebody else is in the way of a shared lock of ours no more than of an exclusive one's test.
        if !is_free(file.as_fd(), Kind::Exclusive, byte(first))? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Expected;

    fn image(file: &tempfile::NamedTempFile, read_only: bool) -> Image {
        file.as_file().set_len(4096).unwrap();
        Image::check(file.path(), read_only, Expected::Raw).unwrap()
    }

    #[test]
    fn a_writer_is_alone_and_readers_are_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (writer, reader) = (image(&file, false), image(&file, true));
        let first = ImageLock::take(&writer).unwrap();
        assert!(matches!(ImageLock::take(&writer), Err(ImageLockError::InUse(_))));
        assert!(matches!(ImageLock::take(&reader), Err(ImageLockError::Written(_))));
        drop(first);
        let _one = ImageLock::take(&reader).unwrap();
        let _other = ImageLock::take(&reader).unwrap();
        assert!(matches!(ImageLock::take(&writer), Err(ImageLockError::InUse(_))));
    }

    /// QEMU's programs take shared locks only, and find each other by looking.
    #[test]
    fn what_qemus_programs_do_and_forbid_is_respected() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = image(&file, true);
        for (first, allowed) in [
            (DOES + READ, true),
            (DOES + WRITE, false),
            (DOES + RESIZE, false),
            (FORBIDS + READ, false),
            (FORBIDS + WRITE, true),
        ] {
            let other = File::open(file.path()).unwrap();
            assert!(try_lock(other.as_fd(), Kind::Shared, Range { first, len: 1 }).unwrap());
            assert_eq!(ImageLock::take(&reader).is_ok(), allowed, "byte {first}");
            assert!(ImageLock::take(&image(&file, false)).is_err(), "byte {first}");
        }
    }

    #[test]
    fn the_lock_lives_as_long_as_any_copy_of_its_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = image(&file, false);
        let first = ImageLock::take(&writer).unwrap();
        let inherited = first.file().try_clone().unwrap();
        // Closing another descriptor of the file would end a lock of the older kind (fcntl(2), F_SETLK).
        drop(File::open(file.path()).unwrap());
        drop(first);
        assert!(ImageLock::take(&writer).is_err());
        drop(inherited);
        assert!(ImageLock::take(&writer).is_ok());
    }
}
