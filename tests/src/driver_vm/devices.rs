//! Devices of a driver VM other than disks.

use std::path::{Path, PathBuf};

use super::plan::{CommandLine, RECONNECT_MS};

/// A network device's number among the virtio devices, and the length of its configuration space in bytes (virtio 1.3,
/// sections 5.1 and 5.1.4).
const NET_ID: u16 = 1;
const CONFIG_LEN: u16 = 24;

/// A network card of the driver VM.
#[derive(Debug, Clone)]
pub struct Network {
    link: Link,
    mac: String,
    pairs: u16,
    mtu: Option<u16>,
    announcing: bool,
}

/// What is behind a network card.
#[derive(Debug, Clone)]
enum Link {
    /// A vhost-user socket.
    VhostUser { socket: PathBuf, reconnect: bool },
    /// A vhost-user socket to which QEMU leaves all of the card.
    Whole(PathBuf),
    /// QEMU's own path: a value of `-netdev` without its id.
    Netdev(String),
}

impl Network {
    /// The card behind a vhost-user socket, with this MAC address and one pair of queues.
    pub fn at(socket: &Path, mac: &str) -> Self {
        Self::with(Link::VhostUser { socket: socket.to_owned(), reconnect: false }, mac)
    }

    /// The card behind a vhost-user socket, of which QEMU knows nothing but that it is a virtio device: configuration space
    /// and control queue are the back-end's, too, which QEMU keeps to itself with [`Network::at`]. The MAC address and the
    /// MTU are what the back-end says.
    pub fn whole_at(socket: &Path) -> Self {
        Self::with(Link::Whole(socket.to_owned()), "")
    }

    /// A card that QEMU itself emulates, with what `-netdev` says behind it: to compare with.
    pub fn of_qemu(netdev: &str, mac: &str) -> Self {
        Self::with(Link::Netdev(netdev.to_owned()), mac)
    }

    fn with(link: Link, mac: &str) -> Self {
        Self { link, mac: mac.to_owned(), pairs: 1, mtu: None, announcing: true }
    }

    /// Has QEMU connect again when the back-end has gone.
    #[must_use]
    pub fn reconnecting(mut self) -> Self {
        if let Link::VhostUser { reconnect, .. } = &mut self.link {
            *reconnect = true;
        }
        self
    }

    /// Asks for `pairs` pairs of queues.
    #[must_use]
    pub fn pairs(mut self, pairs: u16) -> Self {
        self.pairs = pairs;
        self
    }

    /// Has the driver told the MTU.
    #[must_use]
    pub fn mtu(mut self, mtu: u16) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// Does not let the driver announce itself after a migration: QEMU has the back-end do it.
    #[must_use]
    pub fn without_announcing(mut self) -> Self {
        self.announcing = false;
        self
    }

    pub(super) fn push_options(&self, id: &str, line: &mut CommandLine) {
        match &self.link {
            Link::VhostUser { socket, reconnect } => {
                let reconnect = if *reconnect { format!(",reconnect-ms={RECONNECT_MS}") } else { String::new() };
                line.option("-chardev", format!("socket,id={id},path={}{reconnect}", socket.display()));
                line.option("-netdev", format!("vhost-user,id={id},chardev={id},queues={}", self.pairs));
            }
            Link::Whole(socket) => {
                line.option("-chardev", format!("socket,id={id},path={}", socket.display()));
                let vrings = 2 * self.pairs + 1;
                let size = format!("num_vqs={vrings},vq_size=256,config_size={CONFIG_LEN}");
                line.option("-device", format!("vhost-user-test-device-pci,chardev={id},virtio-id={NET_ID},{size}"));
                return;
            }
            Link::Netdev(netdev) => {
                line.option("-netdev", format!("{netdev},id={id}"));
            }
        }
        let mtu = self.mtu.map(|mtu| format!(",host_mtu={mtu}")).unwrap_or_default();
        // Two vectors a pair, one for the control queue, one for changes of the configuration.
        let vectors = 2 * self.pairs + 2;
        let queues = if self.pairs > 1 { format!(",mq=on,vectors={vectors}") } else { String::new() };
        let announce = if self.announcing { "" } else { ",guest_announce=off" };
        // Nobody boots from it.
        line.option("-device", format!("virtio-net-pci,netdev={id},mac={},romfile={queues}{mtu}{announce}", self.mac));
    }
}

/// A file system that is shared with the driver VM.
#[derive(Debug, Clone)]
pub struct SharedFolder {
    socket: PathBuf,
    tag: String,
}

impl SharedFolder {
    /// The file system behind a vhost-user socket, which the driver VM mounts by its tag.
    pub fn at(socket: &Path, tag: &str) -> Self {
        Self { socket: socket.to_owned(), tag: tag.to_owned() }
    }

    pub(super) fn push_options(&self, id: &str, line: &mut CommandLine) {
        line.option("-chardev", format!("socket,id={id},path={}", self.socket.display()));
        line.option("-device", format!("vhost-user-fs-pci,chardev={id},tag={}", self.tag));
    }
}

/// A device of which nothing is to be said but where its back-end is.
#[derive(Debug, Clone)]
pub struct Peripheral {
    socket: PathBuf,
    model: &'static str,
}

impl Peripheral {
    /// A source of random bytes.
    pub fn rng(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), model: "vhost-user-rng-pci" }
    }

    /// Sockets between the machine and others (virtio 1.3, section 5.10).
    pub fn vsock(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), model: "vhost-user-vsock-pci" }
    }

    pub(super) fn push_options(&self, id: &str, line: &mut CommandLine) {
        line.option("-chardev", format!("socket,id={id},path={}", self.socket.display()));
        line.option("-device", format!("{},chardev={id}", self.model));
    }
}
