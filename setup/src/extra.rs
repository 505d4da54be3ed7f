//! Roots that one class of tests or one overlay needs, and nobody else.
//!
//! They are no part of the record ([`Setup`](crate::Setup)): who needs one asks for it, and it is fetched then.

use std::fs;
use std::path::PathBuf;

use crate::error::at;
use crate::run::{Lock, Provider, remove_lists};
use crate::step::Step;
use crate::{SetupError, cache_root};

/// Programs of Debian's packages beyond the set-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// `usr/bin/qemu-storage-daemon`, of the release of the appliance's QEMU.
    StorageDaemon,
    /// `usr/libexec/virtiofsd`.
    Virtiofsd,
    /// `usr/bin/iperf3`, `usr/sbin/ethtool` and `usr/bin/socat`, which knows virtio's own sockets too: for the driver VM.
    Network,
    /// `usr/bin/passt`, a network back-end on the host.
    Passt,
    /// `usr/bin/dpdk-testpmd` and DPDK's drivers.
    Dpdk,
    /// `usr/bin/vhost-device-vsock`, of the release that comes next.
    VhostDeviceVsock,
    /// Valgrind's tools, of which callgrind counts instructions.
    Valgrind,
}

impl Extra {
    /// The root directory that has the programs, which is fetched and unpacked now if it is not there. On a system that is no
    /// Debian it is the system itself, where they have to be installed.
    ///
    /// # Errors
    /// Any [`SetupError`].
    pub fn root(self) -> Result<PathBuf, SetupError> {
        let cache = cache_root()?;
        fs::create_dir_all(&cache).map_err(at(&cache))?;
        let lock = Lock::take(&cache)?;
        let provider = Provider::new(&cache, &lock)?;
        if provider.is_foreign() {
            for program in self.programs() {
                provider.installed(program)?;
            }
            return Ok("/".into());
        }
        let root = provider.root(&self.step())?;
        remove_lists(&cache)?;
        Ok(root)
    }

    /// What has to be on the `PATH` of a system that is no Debian.
    const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::StorageDaemon => &["qemu-storage-daemon"],
            Self::Virtiofsd => &["virtiofsd"],
            Self::Network => &["iperf3", "ethtool", "socat"],
            Self::Passt => &["passt"],
            Self::Dpdk => &["dpdk-testpmd"],
            Self::VhostDeviceVsock => &["vhost-device-vsock"],
            Self::Valgrind => &["valgrind"],
        }
    }

    fn step(self) -> Step {
        match self {
            Self::StorageDaemon => Step::qemu(),
            Self::Virtiofsd => Step::extra("virtiofsd", "virtiofsd", &["virtiofsd"]),
            Self::Network => {
                Step::extra("network", "network programs of the driver VM", &["ethtool", "iperf3", "socat"])
            }
            Self::Passt => Step::extra("passt", "passt", &["passt"]),
            Self::Dpdk => Step::extra("dpdk", "DPDK", &["dpdk-dev", "librte-net-vhost25"]),
            Self::VhostDeviceVsock => Step::next_release("vsock", "vhost-device-vsock", &["vhost-device-vsock"]),
            Self::Valgrind => Step::extra("valgrind", "valgrind", &["valgrind"]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_that_the_set_up_has_is_not_fetched_again() {
        let name = |extra: Extra| extra.step().directory_name();
        assert_eq!(name(Extra::StorageDaemon), Step::qemu().directory_name());
        assert!(name(Extra::Virtiofsd).starts_with("virtiofsd-"));
        // An older recipe of a step is removed by its name, so no two steps share one.
        let extras =
            [Extra::Virtiofsd, Extra::Network, Extra::Passt, Extra::Dpdk, Extra::VhostDeviceVsock, Extra::Valgrind];
        let names = extras.map(|extra| extra.step().name);
        let others = [Step::kernel(), Step::qemu(), Step::driver(), Step::qemu_distribution("x")].map(|step| step.name);
        assert!(names.iter().all(|name| !others.contains(name)));
    }
}
