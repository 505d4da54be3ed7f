//! A directory of the operator's that becomes part of the appliance: a second archive behind the one of the appliance image,
//! which the kernel unpacks over it (kernel documentation, "initramfs buffer format"; the archive is "newc").
//!
//! It is packed once for a run, so a restart boots what the first start did. Everything in it belongs to root, without
//! set-id bits: a back-end runs as somebody else, and must not be able to change its own program.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use cpio::newc::{Builder, ModeFileType, trailer};

use crate::size::{MIB, Size};

/// Largest sum of all files in bytes; the appliance holds it in memory, twice while it unpacks it.
const MAX_BYTES: u64 = 512 * MIB;

/// Most files and directories.
const MAX_ENTRIES: usize = 50_000;

/// Archives in an initial RAM file system begin at multiples of this, in bytes.
const ARCHIVE_ALIGNMENT: u64 = 4;

/// Permission bits that are kept.
const PERMISSIONS: u32 = 0o777;

/// A packed directory.
#[derive(Debug)]
pub(crate) struct Overlay {
    archive: File,
    len_bytes: u64,
}

impl Overlay {
    /// Packs `directory` with all that is below it.
    ///
    /// # Errors
    /// One line that names what cannot be read or packed.
    pub(crate) fn pack(directory: &Path) -> anyhow::Result<Self> {
        let shown = directory.display();
        match std::fs::metadata(directory) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => bail!("overlay {shown} is no directory; name the one that holds the files"),
            Err(error) => return Err(error).with_context(|| format!("overlay {shown} cannot be used")),
        }
        let archive = tempfile::tempfile().context("cannot create a temporary file for the overlay; set TMPDIR")?;
        let mut packer = Packer { root: directory, writer: io::BufWriter::new(archive), count: 0, bytes: 0 };
        packer.pack_all()?;
        let end = trailer(packer.writer).and_then(|writer| writer.into_inner().map_err(io::Error::from));
        let mut archive = end.context("cannot write the overlay's archive")?;
        let len_bytes = archive.stream_position().context("cannot write the overlay's archive")?;
        Ok(Self { archive, len_bytes })
    }

    /// Length of the archive in bytes.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Writes the initial RAM file system `base` with this behind it to `path`.
    ///
    /// # Errors
    /// One of the files cannot be read or written.
    pub(crate) fn append_to(&self, base: &Path, path: &Path) -> anyhow::Result<()> {
        let write = || -> io::Result<()> {
            let mut file = File::create(path)?;
            let len = io::copy(&mut File::open(base)?, &mut file)?;
            let padding = len.next_multiple_of(ARCHIVE_ALIGNMENT) - len;
            io::copy(&mut io::repeat(0).take(padding), &mut file)?;
            let mut archive = &self.archive;
            archive.seek(SeekFrom::Start(0))?;
            io::copy(&mut archive, &mut file)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {} from {} and the overlay", path.display(), base.display()))
    }
}

/// Writes one archive.
#[derive(Debug)]
struct Packer<'a> {
    root: &'a Path,
    writer: io::BufWriter<File>,
    count: usize,
    bytes: u64,
}

impl Packer<'_> {
    fn pack_all(&mut self) -> anyhow::Result<()> {
        let mut directories = vec![PathBuf::new()];
        while let Some(directory) = directories.pop() {
            for name in names(&self.root.join(&directory))? {
                let path = directory.join(name);
                if self.pack(&path).with_context(|| format!("overlay: {}", self.root.join(&path).display()))? {
                    directories.push(path);
                }
            }
        }
        Ok(())
    }

    /// Packs one entry; returns whether it is a directory.
    fn pack(&mut self, path: &Path) -> anyhow::Result<bool> {
        let source = self.root.join(path);
        let found = std::fs::symlink_metadata(&source).context("cannot be looked at")?;
        let name = path.to_str().context("its name is not valid UTF-8")?;
        self.count += 1;
        if self.count > MAX_ENTRIES {
            bail!("with this there are more than {MAX_ENTRIES} files; leave some out");
        }
        let permissions = found.permissions().mode() & PERMISSIONS;
        let kind = found.file_type();
        if kind.is_dir() {
            self.entry(name, permissions, ModeFileType::Directory, &[])?;
        } else if kind.is_symlink() {
            let target = std::fs::read_link(&source).context("cannot be read")?;
            self.entry(name, PERMISSIONS, ModeFileType::Symlink, target.as_os_str().as_encoded_bytes())?;
        } else if kind.is_file() {
            let mut file = File::open(&source).context("cannot be read")?;
            let len = self.take(file.metadata().context("cannot be looked at")?.len())?;
            let builder = self.builder(name, permissions, ModeFileType::Regular);
            let mut entry = builder.write(&mut self.writer, len);
            let copied = io::copy(&mut (&mut file).take(u64::from(len)), &mut entry).context("cannot be packed")?;
            if copied < u64::from(len) {
                bail!("it became shorter while it was packed");
            }
            entry.finish().context("cannot be packed")?;
        } else {
            bail!("only files, directories and symbolic links can be packed; leave it out");
        }
        Ok(kind.is_dir())
    }

    fn entry(&mut self, name: &str, permissions: u32, kind: ModeFileType, content: &[u8]) -> anyhow::Result<()> {
        let len = self.take(content.len() as u64)?;
        let mut entry = self.builder(name, permissions, kind).write(&mut self.writer, len);
        entry.write_all(content).and_then(|()| entry.finish().map(drop)).context("cannot be packed")
    }

    fn builder(&self, name: &str, permissions: u32, kind: ModeFileType) -> Builder {
        // Inode numbers tell entries apart: two with the same would be the same file.
        let number = u32::try_from(self.count).unwrap_or(u32::MAX);
        Builder::new(name).ino(number).mode(permissions).set_mode_file_type(kind)
    }

    /// Counts `len` bytes of content.
    fn take(&mut self, len: u64) -> anyhow::Result<u32> {
        self.bytes = self.bytes.saturating_add(len);
        match u32::try_from(len) {
            Ok(short) if self.bytes <= MAX_BYTES => Ok(short),
            _ => bail!("with this there are more than {} of files; leave some out", Size(MAX_BYTES)),
        }
    }
}

/// Names in a directory in an order that is always the same.
fn names(directory: &Path) -> anyhow::Result<Vec<std::ffi::OsString>> {
    let entries = std::fs::read_dir(directory).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let entries = entries.with_context(|| format!("overlay: {} cannot be read", directory.display()))?;
    let mut names: Vec<_> = entries.into_iter().map(|entry| entry.file_name()).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use cpio::newc::Reader;

    use super::*;

    /// What is in an archive: name, mode, content.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let mut reader = Reader::new(archive).unwrap();
            if reader.entry().is_trailer() {
                return all;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            assert_eq!((reader.entry().uid(), reader.entry().gid()), (0, 0));
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            archive = reader.finish().unwrap();
            all.push((name, mode, content));
        }
    }

    #[test]
    fn directories_files_and_links_are_packed_behind_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join("files").join(name);
        std::fs::create_dir_all(path("usr/bin")).unwrap();
        std::fs::write(path("usr/bin/daemon"), "program").unwrap();
        std::fs::set_permissions(path("usr/bin/daemon"), Permissions::from_mode(0o4755)).unwrap();
        std::os::unix::fs::symlink("usr/bin", path("bin")).unwrap();
        let overlay = Overlay::pack(&directory.path().join("files")).unwrap();
        let (base, both) = (directory.path().join("base"), directory.path().join("both"));
        std::fs::write(&base, "compressed").unwrap();
        for _ in 0..2 {
            overlay.append_to(&base, &both).unwrap();
            let bytes = std::fs::read(&both).unwrap();
            assert_eq!(&bytes[..12], b"compressed\0\0");
            assert_eq!(bytes.len() as u64, 12 + overlay.len_bytes());
            let packed = entries(&bytes[12..]);
            let shown: Vec<_> = packed.iter().map(|(name, mode, content)| (name.as_str(), *mode, &**content)).collect();
            assert_eq!(shown[0], ("bin", 0o120_777, b"usr/bin".as_slice()));
            assert_eq!((shown[1].0, shown[1].1 & 0o170_000, shown[2].0), ("usr", 0o040_000, "usr/bin"));
            assert_eq!(shown[3], ("usr/bin/daemon", 0o100_755, b"program".as_slice()));
        }
    }

    #[test]
    fn what_cannot_be_packed_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let refusal = |path: &Path| format!("{:#}", Overlay::pack(path).unwrap_err());
        let missing = directory.path().join("missing");
        assert!(refusal(&missing).contains("missing cannot be used"));
        let _listener = std::os::unix::net::UnixListener::bind(directory.path().join("odd.sock")).unwrap();
        let line = refusal(directory.path());
        assert!(line.contains("odd.sock: only files, directories and symbolic links"), "{line}");
        let large = tempfile::tempdir().unwrap();
        File::create(large.path().join("large")).unwrap().set_len(MAX_BYTES + 1).unwrap();
        let line = refusal(large.path());
        assert!(line.contains("large: with this there are more than 512M"), "{line}");
        assert!(refusal(&large.path().join("large")).contains("is no directory"));
    }
}
