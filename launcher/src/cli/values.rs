//! Values of options, checked as far as they can be without looking at the host.

use vvu_appliance_config::MAX_SERIAL_LEN;
use vvu_protocol::window;

use crate::size::{GIB, MIB, Size};

/// Smallest appliance memory in bytes; below this its kernel and initial RAM file system do not unpack.
const MIN_MEMORY_BYTES: u64 = 96 * MIB;

/// Largest appliance memory in bytes.
const MAX_MEMORY_BYTES: u64 = 64 * GIB;

/// Formats of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ImageFormat {
    /// The bytes of the file are the bytes of the disk.
    Raw,
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
