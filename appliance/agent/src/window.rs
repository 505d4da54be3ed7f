//! The window as the appliance sees it: the device-DAX node that the kernel makes over a virtio-pmem device whose header
//! names the device set.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vm_memory::mmap::MmapRegionError;
use vm_memory::volatile_memory::Error as VolatileError;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use vvu_protocol::address::{FileOffset, WindowOffset};
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::window::ALIGNMENT;

use crate::uuid::Uuid;
use crate::watch::look_until;

/// Devices of the kernel's nvdimm bus. A device-DAX namespace has an attribute `uuid`, from the header of the window, and
/// below it a directory with the name of its node.
const ND_DEVICES: &str = "/sys/bus/nd/devices";

/// How long the kernel may take from the drivers' loading to the node.
const NODE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no window.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// No node has come.
    #[error(
        "no device-DAX node of device set {uuid} has come within {} s; the kernel has to be Linux 6.9 or newer",
        NODE_TIMEOUT.as_secs()
    )]
    NoNode {
        /// The device set.
        uuid: Uuid,
    },
    /// The node cannot be looked for or opened.
    #[error("device-DAX node")]
    Io(#[from] io::Error),
}

/// Why a number in driver memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not in the window.
    #[error("window offset {offset} is outside the window")]
    Outside {
        /// Where it is.
        offset: WindowOffset,
    },
    /// The node cannot be mapped.
    #[error("device-DAX node cannot be mapped")]
    Map(#[from] MmapRegionError),
    /// It crosses a unit or is not aligned.
    #[error("window offset {offset}")]
    Access {
        /// Where it is.
        offset: WindowOffset,
        /// What is wrong with that.
        source: VolatileError,
    },
    /// The node cannot be opened once more.
    #[error("device-DAX node")]
    Io(#[from] io::Error),
}

/// Something is not in the window.
#[derive(Debug, thiserror::Error)]
#[error("{len:#x} bytes at window offset {start} are not in the window")]
pub struct NotBacked {
    /// Where it starts.
    pub start: WindowOffset,
    /// Its length in bytes.
    pub len: u64,
}

/// Where a part of the window lies, for a program that maps it.
#[derive(Debug, Clone)]
pub struct Backing {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Where in it the part starts.
    pub offset: FileOffset,
    /// How much of the part is there, in bytes.
    pub len: u64,
}

/// What a session needs of the window.
pub trait Window {
    /// Length of the window in bytes, header included.
    fn window_len(&self) -> u64;

    /// Where in the window one file ends and another one begins, so that no program can map what is before and what is
    /// behind in one piece.
    fn seams(&self) -> Vec<WindowOffset>;

    /// Where `len` bytes from `start` on lie; both are multiples of [`ALIGNMENT`].
    ///
    /// # Errors
    /// [`NotBacked`].
    fn backing(&self, start: WindowOffset, len: u64) -> Result<Backing, NotBacked>;

    /// Reads two little-endian bytes of driver memory in one access. The driver may write there at any time.
    ///
    /// # Errors
    /// [`ReadError`].
    fn read_u16(&self, offset: WindowOffset) -> Result<u16, ReadError>;
}

/// The window of one device set as the kernel gives it. Its file's offset 0 is window offset
/// [`vvu_protocol::dax::NODE_OFFSET`].
#[derive(Debug, Clone)]
pub struct WindowNode {
    /// The node, open for reading and writing.
    pub file: Arc<OwnedFd>,
    /// Length of the window in bytes, header included.
    pub len: u64,
}

impl WindowNode {
    /// Waits for the node of a device set, and opens it.
    ///
    /// # Errors
    /// [`WindowError`].
    pub async fn open(uuid: Uuid, len: u64) -> Result<Self, WindowError> {
        let look = || {
            let Some(path) = find_node(Path::new(ND_DEVICES), uuid) else { return Ok(None) };
            match File::options().read(true).write(true).open(&path) {
                Ok(file) => Ok(Some((path, file))),
                Err(error) if is_to_come(&error) => Ok(None),
                Err(error) => Err(error),
            }
        };
        let found = look_until(NODE_TIMEOUT, look).await?;
        let (path, file) = found.ok_or(WindowError::NoNode { uuid })?;
        tracing::info!(node = %path.display(), len_bytes = len, "window is open");
        Ok(Self { file: Arc::new(file.into()), len })
    }
}

impl Window for WindowNode {
    fn window_len(&self) -> u64 {
        self.len
    }

    fn seams(&self) -> Vec<WindowOffset> {
        Vec::new()
    }

    fn backing(&self, start: WindowOffset, len: u64) -> Result<Backing, NotBacked> {
        let inside = start.checked_add(len).is_some_and(|end| end.0 <= self.len);
        let in_node = start.checked_sub(NODE_OFFSET).filter(|_| inside).ok_or(NotBacked { start, len })?;
        Ok(Backing { file: Arc::clone(&self.file), offset: FileOffset(in_node.0), len })
    }

    /// For that moment, and no longer, one unit of the node is mapped.
    fn read_u16(&self, offset: WindowOffset) -> Result<u16, ReadError> {
        let outside = ReadError::Outside { offset };
        let Some(in_node) = offset.checked_sub(NODE_OFFSET).filter(|_| offset.0 < self.len) else {
            return Err(outside);
        };
        let in_unit = in_node.0 % ALIGNMENT;
        let (Ok(place), Ok(unit_len)) = (usize::try_from(in_unit), usize::try_from(ALIGNMENT)) else {
            return Err(outside);
        };
        let file = vm_memory::FileOffset::new(File::from(self.file.try_clone()?), in_node.0 - in_unit);
        let unit = MmapRegion::<()>::build(Some(file), unit_len, libc::PROT_READ, libc::MAP_SHARED)?;
        let value: u16 = unit
            .as_volatile_slice()
            .load(place, Ordering::Acquire)
            .map_err(|source| ReadError::Access { offset, source })?;
        Ok(u16::from_le(value))
    }
}

/// The node is not there, or it is but its driver is not bound to it yet, of which no change of a directory tells.
fn is_to_come(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV))
}

fn find_node(nd_devices: &Path, uuid: Uuid) -> Option<PathBuf> {
    let namespaces = fs::read_dir(nd_devices).ok()?.flatten();
    let mut ours = namespaces.filter(|namespace| {
        let text = fs::read_to_string(namespace.path().join("uuid")).unwrap_or_default();
        namespace.file_name().to_string_lossy().starts_with("dax") && text.trim().parse() == Ok(uuid)
    });
    let below = fs::read_dir(ours.next()?.path()).ok()?.flatten();
    let mut nodes = below.filter(|entry| entry.path().join("dev").is_file());
    Some(Path::new("/dev").join(nodes.next()?.file_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_of_the_uuid_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("dax0.0/uuid", "11111111-1111-1111-1111-111111111111\n");
        put("dax0.0/dax0.0/dev", "252:1\n");
        put("dax1.0/uuid", "22222222-2222-2222-2222-222222222222\n");
        put("dax1.0/power/control", "auto\n");
        put("dax1.0/dax1.0/dev", "252:2\n");
        put("dax1.1/uuid", "\n");
        put("namespace1.0/uuid", "33333333-3333-3333-3333-333333333333\n");
        let find = |digit: u8| find_node(directory.path(), Uuid([digit << 4 | digit; 16]));
        assert_eq!(find(1), Some(PathBuf::from("/dev/dax0.0")));
        assert_eq!(find(2), Some(PathBuf::from("/dev/dax1.0")));
        assert_eq!(find(3), None);
    }
}
