//! An initramfs as a sorted set of entries, written as a newc archive
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use cpio::newc::{Builder, ModeFileType, trailer};
use sha2::{Digest, Sha256};

use crate::error::{ImageError, at};
use crate::manifest::FileRecord;

/// Which kind of device a node stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Character device.
    Character,
    /// Block device.
    Block,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    Node { kind: DeviceKind, major: u32, minor: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    permissions: u32,
    content: Content,
}

/// The content of an initramfs. Paths are relative (`bin/sh`); directories on the way to an entry are
/// made with permissions 0755. Adding the same thing twice is no error, adding another one is.
#[derive(Clone, Debug, Default)]
pub struct Initramfs {
    // A path sorts behind all of its parents, as the kernel needs it.
    entries: BTreeMap<String, Entry>,
}

impl Initramfs {
    /// An initramfs without any entry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// [`ImageError::Path`], [`ImageError::Duplicate`], and [`ImageError::TooLarge`] from 4 GiB on.
    pub fn add_file(&mut self, path: &str, permissions: u32, bytes: Vec<u8>) -> Result<(), ImageError> {
        if u32::try_from(bytes.len()).is_err() {
            return Err(ImageError::TooLarge { path: path.into(), bytes: bytes.len() });
        }
        self.add(path, permissions, Content::File(bytes))
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// [`ImageError::Path`] and [`ImageError::Duplicate`].
    pub fn add_dir(&mut self, path: &str, permissions: u32) -> Result<(), ImageError> {
        self.add(path, permissions, Content::Directory)
    }

    /// Adds a symbolic link at `path` that points at `target`, which need not exist.
    ///
    /// # Errors
    /// [`ImageError::Path`] and [`ImageError::Duplicate`].
    pub fn add_symlink(&mut self, path: &str, target: &str) -> Result<(), ImageError> {
        self.add(path, 0o777, Content::Symlink(target.into()))
    }

    /// Adds a device node.
    ///
    /// # Errors
    /// [`ImageError::Path`] and [`ImageError::Duplicate`].
    pub fn add_node(
        &mut self,
        path: &str,
        permissions: u32,
        kind: DeviceKind,
        major: u32,
        minor: u32,
    ) -> Result<(), ImageError> {
        self.add(path, permissions, Content::Node { kind, major, minor })
    }

    /// Whether there is an entry at `path`.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path)
    }

    fn add(&mut self, path: &str, permissions: u32, content: Content) -> Result<(), ImageError> {
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        if !path.split('/').all(plain) {
            return Err(ImageError::Path(path.into()));
        }
        for (end, _) in path.match_indices('/') {
            let parent = path.get(..end).unwrap_or_default();
            let entry = Entry { permissions: 0o755, content: Content::Directory };
            let present = self.entries.entry(parent.to_owned()).or_insert(entry);
            if present.content != Content::Directory {
                return Err(ImageError::Duplicate(parent.into()));
            }
        }
        let entry = Entry { permissions: permissions & 0o7777, content };
        match self.entries.get(path) {
            Some(present) if *present != entry => Err(ImageError::Duplicate(path.into())),
            Some(_) => Ok(()),
            None => {
                self.entries.insert(path.to_owned(), entry);
                Ok(())
            }
        }
    }

    /// Name, size and hash of every regular file, in order.
    #[must_use]
    pub fn files(&self) -> Vec<FileRecord> {
        let files = self.entries.iter().filter_map(|(path, entry)| match &entry.content {
            Content::File(bytes) => Some(FileRecord::of(path, bytes)),
            _ => None,
        });
        files.collect()
    }

    /// Makes the entries below an empty directory instead of an archive.
    ///
    /// # Errors
    /// [`ImageError::Node`] for a device node, which only root can make, and errors of writing.
    pub fn write_to(&self, directory: &Path) -> Result<(), ImageError> {
        for (path, entry) in &self.entries {
            let place = directory.join(path);
            match &entry.content {
                Content::Directory => fs::create_dir(&place),
                Content::File(bytes) => fs::write(&place, bytes),
                Content::Symlink(target) => symlink(target, &place),
                Content::Node { .. } => return Err(ImageError::Node(path.clone())),
            }
            .map_err(at(&place))?;
            if !matches!(entry.content, Content::Symlink(_)) {
                fs::set_permissions(&place, Permissions::from_mode(entry.permissions)).map_err(at(&place))?;
            }
        }
        Ok(())
    }

    /// The archive's bytes.
    ///
    /// # Errors
    /// [`ImageError::TooLarge`] if there are more entries than inode numbers.
    pub fn finish(&self) -> Result<Vec<u8>, ImageError> {
        let mut archive = Vec::new();
        for (number, (path, entry)) in (1_u32..).zip(&self.entries) {
            archive = write_entry(archive, number, path, entry)?;
        }
        trailer(archive).map_err(at("the end of the initramfs"))
    }
}

fn write_entry(archive: Vec<u8>, number: u32, path: &str, entry: &Entry) -> Result<Vec<u8>, ImageError> {
    let builder = Builder::new(path).ino(number).mode(entry.permissions);
    let (builder, data): (_, &[u8]) = match &entry.content {
        Content::Directory => (builder.nlink(2).set_mode_file_type(ModeFileType::Directory), &[]),
        Content::File(bytes) => (builder.set_mode_file_type(ModeFileType::Regular), bytes),
        Content::Symlink(target) => (builder.set_mode_file_type(ModeFileType::Symlink), target.as_bytes()),
        Content::Node { kind, major, minor } => {
            let kind = match kind {
                DeviceKind::Character => ModeFileType::Char,
                DeviceKind::Block => ModeFileType::Block,
            };
            (builder.rdev_major(*major).rdev_minor(*minor).set_mode_file_type(kind), &[])
        }
    };
    let size = u32::try_from(data.len()).map_err(|_| ImageError::TooLarge { path: path.into(), bytes: data.len() })?;
    let mut writer = builder.write(archive, size);
    writer.write_all(data).and_then(|()| writer.finish()).map_err(at(path))
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;
    use proptest::prelude::*;

    /// (name, inode, mode, content) of all entries, read back by the crate's reader.
    fn read_back(archive: &[u8]) -> Vec<(String, u32, u32, Vec<u8>)> {
        let mut rest = archive;
        let mut entries = Vec::new();
        loop {
            let reader = Reader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                return entries;
            }
            let (name, ino, mode) = (entry.name().to_owned(), entry.ino(), entry.mode());
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            let mut content = Vec::new();
            rest = reader.to_writer(&mut content).unwrap();
            entries.push((name, ino, mode, content));
        }
    }

    #[test]
    fn entries_are_sorted_numbered_and_complete() {
        let mut image = Initramfs::new();
        image.add_file("init", 0o755, b"#!".to_vec()).unwrap();
        image.add_symlink("bin/sh", "busybox").unwrap();
        image.add_node("dev/console", 0o600, DeviceKind::Character, 5, 1).unwrap();
        image.add_dir("tmp", 0o1777).unwrap();
        let entries = read_back(&image.finish().unwrap());
        let expected: [(&str, u32, u32, &[u8]); 6] = [
            ("bin", 1, 0o040_755, b""),
            ("bin/sh", 2, 0o120_777, b"busybox"),
            ("dev", 3, 0o040_755, b""),
            ("dev/console", 4, 0o020_600, b""),
            ("init", 5, 0o100_755, b"#!"),
            ("tmp", 6, 0o041_777, b""),
        ];
        let expected: Vec<_> =
            expected.map(|(name, ino, mode, data)| (name.to_owned(), ino, mode, data.to_vec())).into();
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_directory_has_the_same_content() {
        let mut image = Initramfs::new();
        image.add_file("bin/tool", 0o755, b"#!".to_vec()).unwrap();
        image.add_symlink("bin/other", "tool").unwrap();
        let place = tempfile::tempdir().unwrap();
        image.write_to(place.path()).unwrap();
        assert_eq!(fs::read(place.path().join("bin/other")).unwrap(), b"#!");
        assert_eq!(fs::metadata(place.path().join("bin/tool")).unwrap().permissions().mode() & 0o7777, 0o755);
        image.add_node("null", 0o666, DeviceKind::Character, 1, 3).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(matches!(image.write_to(elsewhere.path()), Err(ImageError::Node(_))));
    }

    #[test]
    fn paths_stay_inside_and_content_is_not_replaced() {
        let mut image = Initramfs::new();
        for path in ["", "/init", "a//b", "../x", "a/./b", "a/"] {
            assert!(matches!(image.add_dir(path, 0o755), Err(ImageError::Path(_))), "{path}");
        }
        image.add_file("a", 0o644, b"1".to_vec()).unwrap();
        image.add_file("a", 0o644, b"1".to_vec()).unwrap();
        assert!(matches!(image.add_file("a", 0o644, b"2".to_vec()), Err(ImageError::Duplicate(_))));
        assert!(matches!(image.add_dir("a/b", 0o755), Err(ImageError::Duplicate(_))));
    }

    proptest! {
        #[test]
        fn the_order_of_adding_does_not_show(
            files in proptest::collection::btree_map("[a-c]{1,3}(/[a-c]{4,6}){0,2}x", proptest::collection::vec(any::<u8>(), 0..9), 0..12),
            turn in 0_usize..12,
        ) {
            let mut files: Vec<_> = files.into_iter().collect();
            let build = |files: &[(String, Vec<u8>)]| {
                let mut image = Initramfs::new();
                for (path, bytes) in files {
                    // A name may be another one's directory; then neither order builds.
                    if image.add_file(path, 0o644, bytes.clone()).is_err() {
                        return None;
                    }
                }
                Some(image.finish().unwrap())
            };
            let archive = build(&files);
            if !files.is_empty() {
                let len = files.len();
                files.rotate_left(turn % len);
            }
            prop_assert_eq!(&archive, &build(&files));
            if let Some(archive) = archive {
                let read = read_back(&archive);
                for (path, bytes) in files {
                    prop_assert!(read.iter().any(|(name, .., content)| *name == path && *content == bytes));
                }
            }
        }
    }
}
