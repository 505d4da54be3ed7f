//! The back-end program of each device class, and what it may touch: a user of its own, a directory for its sockets, its
//! disks, its TAP.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use vvu_appliance_config::{
    BackEnd, BlkOptions, CHANNEL_PORT_PREFIX, CONTROL_CHANNEL, Device, ExecOptions, NetOptions,
};

use crate::network::{TAP, TUN_DEVICE, make_uplink};
use crate::process::{BackEndProgram, Output};
use crate::user::User;

mod arguments;
mod command;
mod disks;

use arguments::{BlkPlaces, blk_arguments, net_arguments};
use command::{Places, substitute};
use disks::find_disk;

/// First user and group id for the appliance's own back-ends; each program has its own.
const FIRST_USER: u32 = 1000;

/// First id for programs of overlays, each of which has a range of ids; far above all that anything in the appliance has.
const FIRST_RANGE: u32 = 100_000;

/// Number of a program's ids: as many as files had owners for long, so that those of a driver VM's usual users are among them.
const RANGE_LEN: u32 = 1 << 16;

/// Where programs of overlays are looked for.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that can be started, and what leads to it.
#[derive(Debug)]
pub struct Prepared {
    /// The program, with one socket for each of its device sets, in their order.
    pub program: BackEndProgram,
    /// Its channels.
    pub channels: Vec<PreparedChannel>,
}

/// A channel that can be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedChannel {
    /// Its name.
    pub name: String,
    /// Name of its virtio-serial port.
    pub port: String,
    /// Where the program listens.
    pub socket: PathBuf,
}

/// Where programs look for a directory that they may write to.
const HOME_VARIABLES: [&str; 3] = ["HOME", "TMPDIR", "RUNTIME_DIRECTORY"];

/// What every program has.
struct Home<'a> {
    user: User,
    directory: PathBuf,
    channels: &'a [PreparedChannel],
    log: &'a str,
}

/// Prepares the program of back-end number `index`.
///
/// # Errors
/// If something that it needs is not there, or is more than its class has.
pub async fn prepare(index: u32, back_end: &BackEnd, log: &str) -> Result<Prepared> {
    let user = match back_end.device {
        Device::Blk(_) | Device::Net(_) => User::Plain { id: FIRST_USER + index },
        Device::Exec(_) => User::NamespaceRoot { first: FIRST_RANGE + RANGE_LEN * index, count: RANGE_LEN },
    };
    let name = back_end.device_sets.first().context("a back-end has no device set")?;
    let directory = Path::new("/run").join(name);
    fs::create_dir_all(&directory)
        .and_then(|()| give(&directory, user, 0o700))
        .with_context(|| format!("cannot prepare the directory {} for the back-end", directory.display()))?;
    let is_exec = matches!(back_end.device, Device::Exec(_));
    // That one is the agent's own then.
    let names = back_end.channels.iter().filter(|name| !is_exec || *name != CONTROL_CHANNEL);
    let channels: Vec<_> = names.map(|name| channel(name, &directory)).collect();
    let home = Home { user, directory, channels: &channels, log };
    let program = match &back_end.device {
        Device::Blk(options) => home.blk(options).await?,
        Device::Net(options) => home.net(options)?,
        Device::Exec(options) => home.exec(options).await?,
    };
    Ok(Prepared { program, channels })
}

fn channel(name: &str, directory: &Path) -> PreparedChannel {
    // A name of its own, so that no channel has that of another socket.
    let socket = directory.join(format!("channel-{name}.sock"));
    PreparedChannel { name: name.to_owned(), port: port_name(name), socket }
}

/// Name of a channel's virtio-serial port.
pub(crate) fn port_name(channel: &str) -> String {
    format!("{CHANNEL_PORT_PREFIX}{channel}")
}

impl Home<'_> {
    async fn blk(self, options: &BlkOptions) -> Result<BackEndProgram> {
        let image = self.disk(&options.image.disk_serial, options.read_only).await?;
        let mut backing = Vec::new();
        for layer in &options.backing {
            backing.push((layer.format, self.disk(&layer.disk_serial, true).await?));
        }
        let socket = self.directory.join("back-end.sock");
        let places = BlkPlaces { socket: &socket, image: &image, backing: &backing, control: self.control()? };
        let arguments = blk_arguments(options, &places);
        Ok(self.own("/bin/vvu-blk", arguments, vec![socket]))
    }

    fn net(self, options: &NetOptions) -> Result<BackEndProgram> {
        let sockets: Vec<_> =
            (0..options.ports.len()).map(|port| self.directory.join(format!("port-{port}.sock"))).collect();
        if let Some(mac) = &options.uplink {
            make_uplink(mac, options.mtu, self.user.id())?;
            give(Path::new(TUN_DEVICE), self.user, 0o600).with_context(|| format!("cannot hand over {TUN_DEVICE}"))?;
        }
        let arguments = net_arguments(options, &sockets, options.uplink.as_ref().map(|_| TAP), self.control()?);
        Ok(self.own("/bin/vvu-net", arguments, sockets))
    }

    async fn exec(self, options: &ExecOptions) -> Result<BackEndProgram> {
        let stem = self.directory.join("back-end");
        let socket = self.directory.join("back-end0");
        let mut disks = Vec::new();
        for disk in &options.disks {
            disks.push((disk.name.as_str(), self.disk(&disk.name, disk.read_only).await?));
        }
        let channels: Vec<_> =
            self.channels.iter().map(|channel| (channel.name.as_str(), channel.socket.clone())).collect();
        let places = Places { socket: &socket, stem: &stem, channels: &channels, disks: &disks };
        let mut words = options.command.iter().map(|word| substitute(word, &places));
        let program = words.next().context("the command is empty")??;
        let arguments = words.collect::<Result<_, _>>()?;
        let program = command::find(Path::new(&program), PATH)
            .with_context(|| format!("the overlay has no program '{}' that can be run ({PATH})", program.display()))?;
        // Apart from its sockets, so that it is empty: a program may share it as a whole.
        let directory = self.directory.join("home");
        fs::create_dir_all(&directory)
            .and_then(|()| give(&directory, self.user, 0o755))
            .with_context(|| format!("cannot prepare the directory {}", directory.display()))?;
        let mut environment = vec![("PATH".into(), PATH.into())];
        environment.extend(HOME_VARIABLES.map(|name| (name.into(), directory.clone().into_os_string())));
        Ok(BackEndProgram {
            program,
            arguments,
            environment,
            directory,
            sockets: vec![socket],
            user: Some(self.user),
            output: Output::Logged,
            window: None,
        })
    }

    /// One of the appliance's own programs.
    fn own(self, program: &str, arguments: Vec<std::ffi::OsString>, sockets: Vec<PathBuf>) -> BackEndProgram {
        let environment = vec![("RUST_LOG".into(), self.log.into())];
        BackEndProgram {
            program: program.into(),
            arguments,
            environment,
            directory: self.directory,
            sockets,
            user: Some(self.user),
            output: Output::Inherited,
            window: None,
        }
    }

    /// The only channel that the appliance's own programs know.
    fn control(&self) -> Result<Option<&Path>> {
        if let Some(other) = self.channels.iter().find(|channel| channel.name != CONTROL_CHANNEL) {
            bail!("this back-end has no channel '{}', only '{CONTROL_CHANNEL}'", other.name);
        }
        Ok(self.channels.first().map(|channel| channel.socket.as_path()))
    }

    /// Waits for a disk and hands it over.
    async fn disk(&self, serial: &str, read_only: bool) -> Result<PathBuf> {
        let disk = find_disk(serial).await?;
        let mode = if read_only { 0o400 } else { 0o600 };
        give(&disk, self.user, mode).with_context(|| format!("cannot hand over the disk {}", disk.display()))?;
        Ok(disk)
    }
}

/// Makes a file or directory accessible to one user only.
fn give(path: &Path, user: User, mode: u32) -> io::Result<()> {
    chown(path, Some(user.id()), Some(user.id()))?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}
