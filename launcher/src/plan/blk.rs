//! What `vvu run blk` wants.

use std::path::Path;

use vvu_appliance_config::{BlkOptions, Device, Format, Layer, Limits, MAX_SERIAL_LEN};

use super::draft::{Class, DiskDraft, Draft, PortDraft};
use crate::cli::BlkArgs;
use crate::image::Image;
use crate::image_lock::ImageLock;

/// Serial number by which the agent finds the image.
const DISK_SERIAL: &str = "vvu-disk-0";

/// Serial number of a disk whose file name has no printable character.
const FALLBACK_SERIAL: &str = "vvu-0";

impl Draft {
    /// A disk.
    ///
    /// # Errors
    /// The image cannot be served; one line with the remedy.
    pub(crate) fn blk(args: &BlkArgs) -> anyhow::Result<Self> {
        let image = Image::check(&args.image, args.read_only, args.format.is_some())?;
        let lock = if args.share_image { None } else { Some(ImageLock::take(&image)?) };
        let options = BlkOptions {
            image: Layer { disk_serial: DISK_SERIAL.to_owned(), format: Format::Raw },
            backing: Vec::new(),
            read_only: args.read_only,
            queues: args.queues,
            serial: args.serial.clone().unwrap_or_else(|| serial_from(&args.image)),
            limits: Limits::default(),
        };
        let (socket, queues) = (args.socket.clone(), args.queues);
        Ok(Self {
            class: Class::Blk,
            ports: vec![PortDraft { socket, option: "--socket", queues, vrings: queues }],
            disks: vec![DiskDraft { serial: DISK_SERIAL.to_owned(), image, lock }],
            device: Device::Blk(options),
        })
    }
}

/// The image's file name, as far as it makes a serial number: the same image is the same disk in every run.
fn serial_from(image: &Path) -> String {
    let name = image.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let serial: String = name.chars().filter(char::is_ascii_graphic).take(MAX_SERIAL_LEN).collect();
    if serial.is_empty() { FALLBACK_SERIAL.to_owned() } else { serial }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_comes_from_the_file_name() {
        let cases = [
            ("/images/disk.img", "disk.img"),
            ("/images/a disk with a very long name.img", "adiskwithaverylongna"),
            ("/images/\u{fc}\u{e4}", FALLBACK_SERIAL),
            ("/", FALLBACK_SERIAL),
        ];
        for (path, serial) in cases {
            assert_eq!(serial_from(Path::new(path)), serial);
        }
    }
}
