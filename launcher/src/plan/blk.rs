//! What `vvu run blk` wants.

use std::path::Path;

use anyhow::bail;
use vvu_appliance_config::{BlkOptions, CONTROL_CHANNEL, Device, Format, Layer, MAX_SERIAL_LEN};

use super::draft::{Class, DiskDraft, Draft, PortDraft};
use crate::cli::{BlkArgs, ImageFormat};
use crate::image::{Expected, Image};
use crate::image_lock::ImageLock;

/// Serial numbers by which the agent finds the image (0) and its backing files (1 and further), without the number.
const DISK_SERIAL: &str = "vvu-disk-";

/// Most backing files of an image: they stand on a PCI bus of 32 places.
const MAX_BACKING: usize = 15;

/// Serial number of a disk whose file name has no printable character.
const FALLBACK_SERIAL: &str = "vvu-0";

impl Draft {
    /// A disk.
    ///
    /// # Errors
    /// The image cannot be served; one line with the remedy.
    pub(crate) fn blk(args: &BlkArgs) -> anyhow::Result<Self> {
        let (expected, format) = args.format.map_or((Expected::Raw, Format::Raw), ImageFormat::meaning);
        let mut image = Image::check(&args.image, args.read_only, expected)?;
        check(args, format)?;
        let lock = if args.share_image { None } else { Some(ImageLock::take(&image)?) };
        if format == Format::Qcow2 {
            image.make_room()?;
        }
        let serial = |number: usize| format!("{DISK_SERIAL}{number}");
        // Our back-end reads tables anew when a driver VM starts the device and has written them when it stops.
        let mut disks = vec![DiskDraft { serial: serial(0), image, lock, has_metadata: false }];
        let mut backing = Vec::new();
        for (number, layer) in (1..).zip(&args.backing) {
            let (expected, format) = layer.format.meaning();
            let image = Image::check(&layer.path, true, expected)?;
            let lock = Some(ImageLock::take(&image)?);
            disks.push(DiskDraft { serial: serial(number), image, lock, has_metadata: false });
            backing.push(Layer { disk_serial: serial(number), format });
        }
        let options = BlkOptions {
            image: Layer { disk_serial: serial(0), format },
            backing,
            read_only: args.read_only,
            queues: args.queues,
            serial: args.serial.clone().unwrap_or_else(|| serial_from(&args.image)),
            limits: args.limits.limits(),
            threads: args.threads.threads(args.machine.cpus)?,
        };
        let (socket, queues) = (args.socket.clone(), args.queues);
        Ok(Self {
            ports: vec![PortDraft { socket, option: "--socket", queues, vrings: queues, mac: None }],
            disks,
            channels: vec![CONTROL_CHANNEL.to_owned()],
            ..Self::of(Class::Blk, Device::Blk(options))
        })
    }
}

/// Options that do not fit together.
fn check(args: &BlkArgs, format: Format) -> anyhow::Result<()> {
    if format == Format::Raw && !args.backing.is_empty() {
        bail!("a raw image has no backing file; leave --backing out, or add --format qcow2");
    }
    if args.backing.len() > MAX_BACKING {
        bail!("{} backing files are too many; merge some with: qemu-img rebase", args.backing.len());
    }
    if format == Format::Qcow2 && args.share_image {
        bail!("a qcow2 image cannot be shared between hosts; convert it with: qemu-img convert -O raw");
    }
    Ok(())
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
