//! The ports of a run: a vhost-user socket, the bridge behind it, a device set of the appliance VM.

use std::fmt;

use vvu_appliance_config::MAX_DEVICE_SETS;

/// Number of a port in its run, from 0 in the order of the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub(crate) struct PortId(pub(crate) u8);

impl PortId {
    /// The first `count` ports.
    pub(crate) fn first(count: u8) -> impl Iterator<Item = Self> {
        (0..count).map(Self)
    }

    /// Its place in a list of all ports.
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Some of the ports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PortSet(u8);

impl PortSet {
    pub(super) fn insert(&mut self, port: PortId) {
        self.0 |= bit(port);
    }

    pub(super) fn contains(self, port: PortId) -> bool {
        self.0 & bit(port) != 0
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether each of these is also one of `others`.
    pub(super) fn is_within(self, others: Self) -> bool {
        self.0 & !others.0 == 0
    }

    /// Whether these are the first `count` ports.
    pub(super) fn is_all(self, count: u8) -> bool {
        PortId::first(count).all(|port| self.contains(port))
    }
}

fn bit(port: PortId) -> u8 {
    1_u8.checked_shl(u32::from(port.0)).unwrap_or_default()
}

/// A value for each port that a run can have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PerPort<T>([T; MAX_DEVICE_SETS]);

impl<T: Copy> PerPort<Option<T>> {
    pub(super) fn get(&self, port: PortId) -> Option<T> {
        self.0.get(port.index()).copied().flatten()
    }

    pub(super) fn set(&mut self, port: PortId, value: T) {
        if let Some(place) = self.0.get_mut(port.index()) {
            *place = Some(value);
        }
    }
}
