//! Values of options, checked as far as they can be without looking at the host.

use std::path::PathBuf;
use std::str::FromStr;

use vvu_appliance_config::{Format, MAX_NAME_LEN, MAX_SERIAL_LEN};
use vvu_protocol::window;

use crate::image::{Expected, SECTOR_BYTES};
use crate::size::{GIB, MIB, Size};

/// Smallest appliance memory in bytes; below this not even a minimal kernel and its initial RAM file system unpack. A stock kernel
/// needs twice as much.
const MIN_MEMORY_BYTES: u64 = 48 * MIB;

/// Largest appliance memory in bytes.
const MAX_MEMORY_BYTES: u64 = 64 * GIB;

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ImageFormat {
    /// The bytes of the file are the bytes of the disk.
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
}

impl ImageFormat {
    /// What an image of this format is expected to be, and what the agent is told of it.
    pub(crate) fn meaning(self) -> (Expected, Format) {
        match self {
            Self::Raw => (Expected::Anything, Format::Raw),
            Self::Qcow2 => (Expected::Qcow2, Format::Qcow2),
        }
    }
}

/// A backing file: `FORMAT:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backing {
    /// Its format.
    pub(crate) format: ImageFormat,
    /// The file or block device.
    pub(crate) path: PathBuf,
}

impl FromStr for Backing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (format, path) = match text.split_once(':') {
            Some(("raw", path)) => (ImageFormat::Raw, path),
            Some(("qcow2", path)) => (ImageFormat::Qcow2, path),
            _ => return Err("expected raw:PATH or qcow2:PATH".to_owned()),
        };
        if path.is_empty() { Err("the path is missing".to_owned()) } else { Ok(Self { format, path: path.into() }) }
    }
}

/// A disk for a program: `NAME=PATH[,ro][,size=SIZE]`. A comma in the path is doubled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    /// Name and serial number.
    pub(crate) name: String,
    /// The file or block device.
    pub(crate) path: PathBuf,
    /// It cannot be written to.
    pub(crate) read_only: bool,
    /// The file is made at least that long.
    pub(crate) size: Option<Size>,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("expected NAME=PATH")?;
        // No path has a NUL.
        let escaped = rest.replace(",,", "\0");
        let mut parts = escaped.split(',').map(|part| part.replace('\0', ","));
        let path = parts.next().filter(|path| !path.is_empty()).ok_or("the path is missing")?;
        let mut disk = Self { name: channel(name)?, path: path.into(), read_only: false, size: None };
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => disk.read_only = true,
                Some(("size", size)) => {
                    let size: Size = size.parse().map_err(|error: crate::size::SizeError| error.to_string())?;
                    if !size.0.is_multiple_of(u64::from(SECTOR_BYTES)) {
                        return Err(format!("{size} is no multiple of {SECTOR_BYTES}"));
                    }
                    disk.size = Some(size);
                }
                _ => return Err(format!("'{part}' is neither ro nor size=SIZE")),
            }
        }
        Ok(disk)
    }
}

/// A name that can be part of a file name and a serial number.
pub(super) fn channel(text: &str) -> Result<String, String> {
    let plain = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if text.is_empty() || text.len() > MAX_NAME_LEN || !plain {
        return Err(format!("'{text}' is not a name of 1 to {MAX_NAME_LEN} lower-case letters, digits and hyphens"));
    }
    Ok(text.to_owned())
}

pub(super) fn window_size(text: &str) -> Result<Size, String> {
    let size = in_range(text, window::MEMORY_LEN_MIN, window::MEMORY_LEN_MAX)?;
    if size.0.is_multiple_of(window::ALIGNMENT) {
        Ok(size)
    } else {
        Err(format!("not a multiple of {}", Size(window::ALIGNMENT)))
    }
}

pub(super) fn memory_size(text: &str) -> Result<Size, String> {
    let size = in_range(text, MIN_MEMORY_BYTES, MAX_MEMORY_BYTES)?;
    if size.0.is_multiple_of(MIB) { Ok(size) } else { Err("not a whole number of mebibytes".to_owned()) }
}

fn in_range(text: &str, min: u64, max: u64) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: crate::size::SizeError| error.to_string())?;
    let allowed = min..=max;
    if allowed.contains(&size.0) { Ok(size) } else { Err(format!("expected {} to {}", Size(min), Size(max))) }
}

pub(super) fn serial(text: &str) -> Result<String, String> {
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
    if text.is_empty() || text.len() > MAX_SERIAL_LEN || !printable {
        return Err(format!("expected 1 to {MAX_SERIAL_LEN} printable ASCII characters without spaces"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_files_name_their_format() {
        let backing = Backing { format: ImageFormat::Qcow2, path: "/a:b,c".into() };
        assert_eq!("qcow2:/a:b,c".parse(), Ok(backing));
        for text in ["", "/a", "vmdk:/a", "raw:", ":/a"] {
            assert!(text.parse::<Backing>().is_err(), "{text}");
        }
    }

    #[test]
    fn disks_are_read_with_their_properties() {
        let disk = DiskSpec { name: "data-1".into(), path: "/a,b=c".into(), read_only: true, size: Some(Size(GIB)) };
        assert_eq!("data-1=/a,,b=c,ro,size=1G".parse(), Ok(disk));
        for text in ["", "/a", "data=", "Data=/a", "=/a", "data=/a,rw", "data=/a,size=big", "data=/a,size=513"] {
            assert!(text.parse::<DiskSpec>().is_err(), "{text}");
        }
    }
}
