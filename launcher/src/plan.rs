//! Everything that a run needs, checked before anything is started.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use vvu_appliance_config::{
    ApplianceConfig, BackEnd, BlkOptions, CONFIG_VERSION, Device, Format, Layer, Limits, MAX_SERIAL_LEN,
};

use crate::accel::{self, Accel, KvmState};
use crate::cli::{BlkArgs, RestartChoice};
use crate::control;
use crate::image::Image;
use crate::image_lock::ImageLock;
use crate::probe::{self, Version};
use crate::programs::{self, ApplianceFiles};
use crate::qemu_args::{DISK_SERIAL, DiskIo};
use crate::restart_policy::RestartLimit;
use crate::size::{MIB, Size};
use crate::socket_path;

/// Appliance memory that does not depend on the window, in bytes: kernel, initial RAM file system, agent, back-end and
/// its buffers.
const BASE_MEMORY_BYTES: u64 = 160 * MIB;

/// Window bytes for each byte of page descriptors: the appliance's kernel keeps a `struct page` of 64 bytes for every
/// 4096 bytes of the window.
const WINDOW_BYTES_PER_DESCRIPTOR_BYTE: u64 = 4096 / 64;

/// Serial number of a disk whose file name has no printable character.
const FALLBACK_SERIAL: &str = "vvu-0";

/// A run that can be started.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The disk.
    pub(crate) image: Image,
    /// The lock on it, unless it is shared.
    pub(crate) image_lock: Option<ImageLock>,
    /// How QEMU submits its requests.
    pub(crate) disk_io: DiskIo,
    /// Absolute path of the vhost-user socket.
    pub(crate) socket: String,
    /// Absolute path of the control socket.
    pub(crate) control: String,
    /// Restarts that are allowed; none if there shall never be one.
    pub(crate) restart_limit: Option<RestartLimit>,
    /// Further words for the kernel's command line.
    pub(crate) append: Option<String>,
    /// Identity of the device set.
    pub(crate) uuid: String,
    /// Request queues.
    pub(crate) queues: u16,
    /// Window.
    pub(crate) window: Size,
    /// Memory of the appliance.
    pub(crate) memory: Size,
    /// CPUs of the appliance.
    pub(crate) cpus: u16,
    /// KVM or TCG.
    pub(crate) accel: Accel,
    /// Why.
    pub(crate) accel_reason: String,
    /// Kernel and initial RAM file system.
    pub(crate) appliance: ApplianceFiles,
    /// QEMU.
    pub(crate) qemu: PathBuf,
    /// Its version.
    pub(crate) qemu_version: Version,
    /// The bridge.
    pub(crate) bridge: PathBuf,
    /// The document for the agent, as JSON.
    pub(crate) config: Vec<u8>,
    /// Log filter of bridge and appliance.
    pub(crate) log: String,
}

impl Plan {
    /// Checks arguments, files and programs, the operator's likeliest mistakes first.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(crate) async fn make(args: &BlkArgs) -> anyhow::Result<Self> {
        let image = Image::check(&args.image, args.read_only, args.format.is_some())?;
        let image_lock = if args.share_image { None } else { Some(ImageLock::take(&image)?) };
        let socket = socket_path::claim(&args.socket, "--socket").await?;
        let control = args.control.clone().unwrap_or_else(|| control::beside(Path::new(&socket)));
        let control = socket_path::claim(&control, "--control").await?;
        let (accel, accel_reason) = accel::choose(args.accel, &KvmState::of_this_host())?;
        let bridge = programs::find_bridge(args.bridge.as_deref())?;
        let qemu = programs::find_qemu(args.qemu.as_deref())?;
        let appliance = programs::find_appliance(args.appliance.as_deref())?;
        let facts = probe::probe(&qemu, &image).await?;
        if let Some(refusal) = facts.refusal() {
            bail!("{refusal}");
        }
        let disk_io = match facts.disk_io {
            Ok(way) => way,
            Err(reason) => bail!("QEMU cannot open image {}: {reason}", image.path),
        };
        if args.share_image && !disk_io.direct {
            bail!(
                "image {} cannot be opened with O_DIRECT, so --share-image would let hosts read stale data from their page \
                 caches; put it on a file system that has O_DIRECT",
                image.path
            );
        }
        let uuid = new_uuid()?;
        let serial = args.serial.clone().unwrap_or_else(|| serial_from(&args.image));
        let config = config(&uuid, &args.log, args, serial)?;
        Ok(Self {
            image,
            image_lock,
            disk_io,
            socket,
            control,
            restart_limit: (args.restart == RestartChoice::Always).then_some(args.restart_limit),
            append: args.append.clone(),
            uuid,
            queues: args.queues,
            window: args.window,
            memory: args.memory.unwrap_or_else(|| default_memory(args.window)),
            cpus: args.cpus,
            accel,
            accel_reason,
            appliance,
            qemu,
            qemu_version: facts.version,
            bridge,
            config,
            log: args.log.clone(),
        })
    }
}

/// Appliance memory for a window: [`BASE_MEMORY_BYTES`] plus the page descriptors, in whole mebibytes.
pub(crate) fn default_memory(window: Size) -> Size {
    let descriptors = window.0.div_ceil(WINDOW_BYTES_PER_DESCRIPTOR_BYTE);
    Size(BASE_MEMORY_BYTES.saturating_add(descriptors).next_multiple_of(MIB))
}

/// A random uuid in lower case; the kernel makes one with each read (random(4)).
fn new_uuid() -> anyhow::Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}; mount /proc"))?;
    Ok(text.trim().to_owned())
}

/// The image's file name, as far as it makes a serial number: the same image is the same disk in every run.
fn serial_from(image: &Path) -> String {
    let name = image.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let serial: String = name.chars().filter(char::is_ascii_graphic).take(MAX_SERIAL_LEN).collect();
    if serial.is_empty() { FALLBACK_SERIAL.to_owned() } else { serial }
}

fn config(uuid: &str, log: &str, args: &BlkArgs, serial: String) -> anyhow::Result<Vec<u8>> {
    let options = BlkOptions {
        image: Layer { disk_serial: DISK_SERIAL.to_owned(), format: Format::Raw },
        backing: Vec::new(),
        read_only: args.read_only,
        queues: args.queues,
        serial,
        limits: Limits::default(),
    };
    let back_end = BackEnd { device_sets: vec![uuid.to_owned()], channels: Vec::new(), device: Device::Blk(options) };
    let document = ApplianceConfig { version: CONFIG_VERSION, log: log.to_owned(), back_ends: vec![back_end] };
    document.to_json().context("cannot write the appliance's configuration")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::{GIB, TIB};

    #[test]
    fn memory_follows_the_window() {
        assert_eq!(default_memory(Size(4 * GIB)), Size(224 * MIB));
        assert_eq!(default_memory(Size(16 * MIB)), Size(161 * MIB));
        assert_eq!(default_memory(Size(TIB)), Size(16 * GIB + 160 * MIB));
    }

    #[test]
    fn a_uuid_is_what_the_appliance_takes() {
        let (first, second) = (new_uuid().unwrap(), new_uuid().unwrap());
        assert_eq!(first.len(), 36);
        assert_ne!(first, second);
        assert_eq!(first, first.to_ascii_lowercase());
    }

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
