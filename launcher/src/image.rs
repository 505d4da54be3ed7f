//! A disk image: what the operator named, checked before anything is started.

mod qcow2;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Unit of a virtio block device's capacity in bytes (virtio 1.3, section 5.2.4).
pub(crate) const SECTOR_BYTES: u32 = 512;

/// Physical block size announced for files, in bytes: a page, below which every file system does extra work.
const FILE_PHYSICAL_BLOCK_BYTES: u32 = 4096;

/// Largest block size of a device that is passed on, in bytes; larger ones (none is known) are served as this.
const MAX_BLOCK_BYTES: u32 = 32 * 1024;

/// Bytes read from the start of an image: what tells a container format, and how long a qcow2 image can become.
const HEAD_LEN: usize = qcow2::HEADER_LEN;

/// Beginnings of the formats that hold a disk inside a file: offset, bytes, name as `qemu-img` knows it.
const CONTAINER_MAGICS: [(usize, &[u8], &str); 6] = [
    (0, qcow2::MAGIC, "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
];

/// What kind of file holds the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// What an image is expected to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The bytes of a disk; what looks like a container is a mistake.
    Raw,
    /// Whatever it is, its bytes are served.
    Anything,
    /// Whatever it is, it is still to be made longer, or its length does not matter.
    AnyLength,
    /// A qcow2 image.
    Qcow2,
}

/// An image that can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    /// Absolute path.
    pub(crate) path: String,
    /// File or block device.
    pub(crate) kind: ImageKind,
    /// Size in bytes, a multiple of 512.
    pub(crate) size_bytes: u64,
    /// Smallest request in bytes.
    pub(crate) logical_block_bytes: u32,
    /// Request size below which the storage does extra work, in bytes.
    pub(crate) physical_block_bytes: u32,
    /// Whether it is opened for reading only.
    pub(crate) read_only: bool,
}

/// Why an image cannot be served, with the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// Nothing has this name.
    #[error("image {0} does not exist; create one with: truncate -s 10G {0}")]
    Missing(PathBuf),
    /// A directory has this name.
    #[error("image {0} is a directory; name the image file inside it")]
    Directory(PathBuf),
    /// Neither file nor block device.
    #[error("image {0} is neither a file nor a block device; only these can be served")]
    Kind(PathBuf),
    /// Not readable.
    #[error("image {0} may not be read by this user; change its owner or mode")]
    NotReadable(PathBuf),
    /// Readable, not writable.
    #[error("image {0} may not be written; change its owner or mode, or add --read-only")]
    NotWritable(PathBuf),
    /// No bytes in it.
    #[error("image {0} is empty; give it a size with: truncate -s 10G {0}")]
    Empty(PathBuf),
    /// Not a whole number of sectors.
    #[error(
        "image {path} has {size} bytes, which is no multiple of {SECTOR_BYTES}; \
         round it up with: truncate -s %{SECTOR_BYTES} {path}"
    )]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// A container format where a raw image is expected.
    #[error("image {path} looks like {format}; {}", container_remedy(path, format))]
    Container {
        /// The image.
        path: PathBuf,
        /// The format, as `qemu-img` names it.
        format: &'static str,
    },
    /// No qcow2 image where one is expected.
    #[error(
        "image {0} is no qcow2 image of version 2 or 3; name its format with --format, or with --backing FORMAT:PATH"
    )]
    NotQcow2(PathBuf),
    /// The file cannot be made longer.
    #[error("image {path} cannot be made {length} bytes long, so that it can grow while it is served")]
    NotGrowable {
        /// The image.
        path: PathBuf,
        /// The length in bytes.
        length: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The path cannot be written in QEMU's JSON.
    #[error("image path {0:?} is not valid UTF-8; rename or link the image")]
    PathEncoding(PathBuf),
    /// Another failure of the system.
    #[error("image {path} cannot be opened")]
    System {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Image {
    /// Checks the image at `path`.
    ///
    /// # Errors
    /// [`ImageError`], one line with the remedy.
    pub(crate) fn check(path: &Path, read_only: bool, expected: Expected) -> Result<Self, ImageError> {
        let owned = || path.to_owned();
        let system = |source| ImageError::System { path: path.to_owned(), source };
        let absolute = std::path::absolute(path).map_err(system)?;
        let text = absolute.to_str().ok_or_else(|| ImageError::PathEncoding(owned()))?.to_owned();
        let metadata = std::fs::metadata(path).map_err(|error| open_error(path, error, ImageError::NotReadable))?;
        // Looked at before the file is opened: opening a FIFO would wait for its other end.
        let kind = match metadata.file_type() {
            kind if kind.is_file() => ImageKind::File,
            kind if kind.is_block_device() => ImageKind::BlockDevice,
            kind if kind.is_dir() => return Err(ImageError::Directory(owned())),
            _ => return Err(ImageError::Kind(owned())),
        };
        let mut file = File::open(path).map_err(|error| open_error(path, error, ImageError::NotReadable))?;
        if !read_only {
            OpenOptions::new()
                .write(true)
                .open(path)
                .map_err(|error| open_error(path, error, ImageError::NotWritable))?;
        }
        let head = head(&mut file).map_err(system)?;
        match (expected, container_format(&head)) {
            (Expected::Raw, Some(format)) => return Err(ImageError::Container { path: owned(), format }),
            (Expected::Qcow2, _) if qcow2::full_length(&head).is_none() => return Err(ImageError::NotQcow2(owned())),
            _ => {}
        }
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(system)?;
        let (logical_block_bytes, physical_block_bytes) = match kind {
            ImageKind::File => (SECTOR_BYTES, FILE_PHYSICAL_BLOCK_BYTES),
            ImageKind::BlockDevice => device_block_sizes(metadata.rdev()),
        };
        let image = Self { path: text, kind, size_bytes, logical_block_bytes, physical_block_bytes, read_only };
        if matches!(expected, Expected::Raw | Expected::Anything) {
            image.check_length()?;
        }
        Ok(image)
    }

    /// Checks that the bytes make whole sectors, and at least one.
    ///
    /// # Errors
    /// [`ImageError::Empty`], [`ImageError::OddSize`].
    pub(crate) fn check_length(&self) -> Result<(), ImageError> {
        let path = || PathBuf::from(&self.path);
        match self.size_bytes {
            0 => Err(ImageError::Empty(path())),
            size if size % u64::from(SECTOR_BYTES) != 0 => Err(ImageError::OddSize { path: path(), size }),
            _ => Ok(()),
        }
    }
}

impl Image {
    /// Makes a qcow2 file so long that all of its disk can be written. Snapshots in it need what is allocated now as well.
    /// A block device is as long as it is.
    ///
    /// # Errors
    /// [`ImageError::NotGrowable`].
    pub(crate) fn make_room(&mut self) -> Result<(), ImageError> {
        let system = |source| ImageError::System { path: PathBuf::from(&self.path), source };
        let mut file = File::open(&self.path).map_err(system)?;
        let head = head(&mut file).map_err(system)?;
        let full = qcow2::full_length(&head).ok_or_else(|| ImageError::NotQcow2(PathBuf::from(&self.path)))?;
        self.grow(full)
    }

    /// Makes a file at least `length` bytes long; what is added takes no space. A block device is as long as it is.
    ///
    /// # Errors
    /// [`ImageError::NotGrowable`].
    pub(crate) fn grow(&mut self, length: u64) -> Result<(), ImageError> {
        if self.kind == ImageKind::File && self.size_bytes < length && !self.read_only {
            let grown = OpenOptions::new().write(true).open(&self.path).and_then(|file| file.set_len(length));
            grown.map_err(|source| ImageError::NotGrowable { path: PathBuf::from(&self.path), length, source })?;
            self.size_bytes = length;
        }
        Ok(())
    }
}

fn container_remedy(path: &Path, format: &str) -> String {
    let raw = "--format raw to serve its bytes as they are";
    match format {
        "qcow2" => format!("add --format qcow2 to serve the disk in it, or {raw}"),
        _ => format!("convert it with: qemu-img convert -O qcow2 {} disk.qcow2 (or add {raw})", path.display()),
    }
}

fn open_error(path: &Path, error: io::Error, denied: fn(PathBuf) -> ImageError) -> ImageError {
    match error.kind() {
        io::ErrorKind::NotFound => ImageError::Missing(path.to_owned()),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => denied(path.to_owned()),
        _ => ImageError::System { path: path.to_owned(), source: error },
    }
}

/// The first bytes of an image, fewer if it has fewer.
fn head(file: &mut File) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD_LEN);
    file.take(HEAD_LEN as u64).read_to_end(&mut head)?;
    Ok(head)
}

fn container_format(head: &[u8]) -> Option<&'static str> {
    let magic = CONTAINER_MAGICS
        .iter()
        .find(|(offset, magic, _)| head.get(*offset..).is_some_and(|rest| rest.starts_with(magic)));
    magic.map(|(_, _, format)| *format)
}

/// Logical and physical block size of a block device, from sysfs; a partition's sizes are those of its disk.
fn device_block_sizes(device: u64) -> (u32, u32) {
    let directory = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let read = |name: &str| {
        ["queue", "../queue"]
            .iter()
            .find_map(|queue| std::fs::read_to_string(format!("{directory}/{queue}/{name}")).ok())
            .and_then(|text| text.trim().parse::<u32>().ok())
            .filter(|size| size.is_power_of_two())
            .map(|size| size.clamp(SECTOR_BYTES, MAX_BLOCK_BYTES))
    };
    let logical = read("logical_block_size").unwrap_or(SECTOR_BYTES);
    let physical = read("physical_block_size").unwrap_or(logical);
    (logical, physical.max(logical))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_with(bytes: &[u8], size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn a_raw_file_is_taken_with_its_size() {
        let file = file_with(b"", 1 << 20);
        let image = Image::check(file.path(), false, Expected::Raw).unwrap();
        assert_eq!((image.kind, image.size_bytes), (ImageKind::File, 1 << 20));
        assert_eq!((image.logical_block_bytes, image.physical_block_bytes), (512, 4096));
    }

    #[test]
    fn every_container_format_is_refused_unless_raw_is_explicit() {
        for (offset, magic, format) in CONTAINER_MAGICS {
            let mut bytes = vec![0; offset];
            bytes.extend_from_slice(magic);
            let file = file_with(&bytes, 1 << 20);
            let refusal = Image::check(file.path(), false, Expected::Raw).unwrap_err();
            assert!(matches!(refusal, ImageError::Container { format: found, .. } if found == format));
            assert!(Image::check(file.path(), false, Expected::Anything).is_ok(), "{format}");
        }
    }

    #[test]
    fn a_qcow2_image_is_made_long_enough_to_grow() {
        let mut header = [0; HEAD_LEN];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
        header[23] = 16;
        header[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        let file = file_with(&header, 196_616);
        let mut image = Image::check(file.path(), false, Expected::Qcow2).unwrap();
        image.make_room().unwrap();
        assert!(image.size_bytes > 1 << 30);
        assert_eq!(file.as_file().metadata().unwrap().len(), image.size_bytes);
        let (length, mut served) = (image.size_bytes, Image::check(file.path(), true, Expected::Qcow2).unwrap());
        file.as_file().set_len(196_616).unwrap();
        served.make_room().unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 196_616, "nothing is done to what is only read");
        file.as_file().set_len(2 * length).unwrap();
        Image::check(file.path(), false, Expected::Qcow2).unwrap().make_room().unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 2 * length, "it is never made shorter");
        let raw = file_with(b"", 4096);
        assert!(matches!(Image::check(raw.path(), false, Expected::Qcow2), Err(ImageError::NotQcow2(_))));
    }

    #[test]
    fn a_short_file_is_no_container_and_no_disk() {
        assert!(matches!(
            Image::check(file_with(b"QFI", 3).path(), false, Expected::Raw),
            Err(ImageError::OddSize { .. })
        ));
        assert!(matches!(Image::check(file_with(b"", 0).path(), false, Expected::Raw), Err(ImageError::Empty(_))));
    }

    #[test]
    fn what_is_no_disk_is_refused_without_opening_it() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(Image::check(directory.path(), true, Expected::Raw), Err(ImageError::Directory(_))));
        assert!(matches!(Image::check(&directory.path().join("no"), true, Expected::Raw), Err(ImageError::Missing(_))));
        assert!(matches!(Image::check(Path::new("/dev/null"), true, Expected::Raw), Err(ImageError::Kind(_))));
    }
}
