//! Another size for the disk of a running device.
//!
//! QEMU does it all: `block_resize` waits for the requests under way, changes the file, and tells the appliance's driver.
//! So a failure leaves file and disk with the same size, whichever it is.

use std::io::{Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::json;

use crate::control::Reply;
use crate::image::{Image, ImageKind, SECTOR_BYTES};
use crate::qemu_args::DISK_NODE;
use crate::qmp;
use crate::size::Size;

/// A change of size that was asked for.
#[derive(Debug)]
pub(crate) struct Resize {
    /// The image.
    pub(crate) image: Image,
    /// The size wanted, in bytes.
    pub(crate) size_bytes: u64,
    /// Whether it may be smaller than now.
    pub(crate) shrink: bool,
    /// QMP socket of the appliance VM in use.
    pub(crate) qmp: PathBuf,
}

impl Resize {
    /// Checks it, does it, and says how it went; the second value is the disk's size now if it was done.
    pub(crate) async fn run(self) -> (Reply, Option<u64>) {
        match self.change().await {
            Ok(old_bytes) => (Reply::Resized { old_bytes, new_bytes: self.size_bytes }, Some(self.size_bytes)),
            Err(error) => (Reply::failed(format!("{error:#}")), None),
        }
    }

    /// Returns the size before.
    async fn change(&self) -> anyhow::Result<u64> {
        let now_bytes = size_of(&self.image.path)?;
        self.check(now_bytes)?;
        let arguments = json!({ "node-name": DISK_NODE, "size": self.size_bytes });
        qmp::command(&self.qmp, "block_resize", arguments).await.context("the disk was not resized")?;
        let new_bytes = size_of(&self.image.path)?;
        if new_bytes < self.size_bytes {
            bail!("the disk was not resized: {} has {new_bytes} bytes", self.image.path);
        }
        Ok(if self.image.kind == ImageKind::File { now_bytes } else { self.image.size_bytes })
    }

    fn check(&self, now_bytes: u64) -> anyhow::Result<()> {
        let Self { image, size_bytes, .. } = self;
        let (path, size, now) = (&image.path, Size(*size_bytes), Size(now_bytes));
        if *size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(SECTOR_BYTES)) {
            bail!("{size} is no size of a disk; choose a multiple of {SECTOR_BYTES} bytes");
        }
        if image.read_only {
            bail!("image {path} is served read-only and keeps its size");
        }
        if image.kind == ImageKind::BlockDevice && *size_bytes != now_bytes {
            bail!("block device {path} has {now_bytes} bytes; resize it itself first, then ask for just that size");
        }
        if image.kind == ImageKind::File && *size_bytes < now_bytes && !self.shrink {
            bail!("image {path} has {now}; to cut it off at {size} and lose what lies behind, add --shrink");
        }
        Ok(())
    }
}

/// The size of a file or block device in bytes, as it is now.
fn size_of(path: &str) -> anyhow::Result<u64> {
    let size = std::fs::File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
    size.with_context(|| format!("image {path} cannot be looked at"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resize(kind: ImageKind, read_only: bool, size_bytes: u64, shrink: bool) -> Resize {
        let image = Image {
            path: "/images/disk.img".to_owned(),
            kind,
            size_bytes: 1 << 20,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            read_only,
        };
        Resize { image, size_bytes, shrink, qmp: PathBuf::new() }
    }

    #[test]
    fn only_what_loses_nothing_unasked_is_done() {
        let now = 1 << 20;
        let refusal = |resize: Resize| resize.check(now).unwrap_err().to_string();
        assert!(resize(ImageKind::File, false, 2 << 20, false).check(now).is_ok());
        assert!(resize(ImageKind::File, false, 1 << 19, true).check(now).is_ok());
        assert!(resize(ImageKind::BlockDevice, false, now, false).check(now).is_ok());
        assert!(refusal(resize(ImageKind::File, false, 1 << 19, false)).contains("add --shrink"));
        assert!(refusal(resize(ImageKind::File, true, 2 << 20, false)).contains("read-only"));
        assert!(refusal(resize(ImageKind::BlockDevice, false, 2 << 20, false)).contains("resize it itself first"));
        for odd in [0, 1, 513] {
            assert!(refusal(resize(ImageKind::File, false, odd, true)).contains("multiple of 512"));
        }
    }
}
