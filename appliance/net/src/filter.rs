//! What passes a port: what the operator lets through, and what the driver wants to receive.

use serde::{Deserialize, Serialize};

use crate::ethernet::{Ethernet, MacAddress};

/// Most addresses in the filter of a port.
pub(crate) const MAX_MACS: usize = 256;

/// Most addresses that a driver can name, in each of its two lists. With more of them it gets all frames of the kind.
pub(crate) const MAX_DRIVER_MACS: usize = 64;

/// VLANs are numbered from 0 to 4095 (IEEE 802.1Q, section 9.6); 0 stands for frames without a tag.
const VLANS: u16 = 4096;

/// The operator's filter of a port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortFilter {
    /// Source addresses of frames that the driver may send; all if there are none.
    pub macs: Vec<MacAddress>,
    /// VLANs of frames in both directions, 0 being frames without a tag; all if there are none.
    pub vlans: Vec<u16>,
}

/// Why a filter is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// More addresses than are kept.
    #[error("{found} addresses, at most {MAX_MACS} can be given")]
    Macs {
        /// How many came.
        found: usize,
    },
    /// No VLAN has this number.
    #[error("VLAN {found}, expected 0 to 4094")]
    Vlan {
        /// What came.
        found: u16,
    },
}

impl PortFilter {
    /// Checks what a person has written.
    ///
    /// # Errors
    /// [`FilterError`] says what was expected.
    pub fn check(&self) -> Result<(), FilterError> {
        if self.macs.len() > MAX_MACS {
            return Err(FilterError::Macs { found: self.macs.len() });
        }
        // 4095 is reserved.
        match self.vlans.iter().find(|vlan| **vlan >= VLANS - 1) {
            Some(found) => Err(FilterError::Vlan { found: *found }),
            None => Ok(()),
        }
    }

    /// Whether the driver may send the frame.
    pub(crate) fn admits_sent(&self, ethernet: &Ethernet) -> bool {
        (self.macs.is_empty() || self.macs.contains(&ethernet.source)) && self.admits_received(ethernet)
    }

    /// Whether the driver may receive the frame.
    pub(crate) fn admits_received(&self, ethernet: &Ethernet) -> bool {
        self.vlans.is_empty() || self.vlans.contains(&ethernet.vlan)
    }
}

/// What a driver wants to receive (virtio 1.3, sections 5.1.6.5.1 to 5.1.6.5.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DriverFilter {
    pub(crate) promiscuous: bool,
    pub(crate) all_multicast: bool,
    pub(crate) all_unicast: bool,
    pub(crate) no_multicast: bool,
    pub(crate) no_unicast: bool,
    pub(crate) no_broadcast: bool,
    /// None: more than are kept, or not known; so all pass.
    unicast: Option<Vec<MacAddress>>,
    multicast: Option<Vec<MacAddress>>,
    /// VLANs with tags that pass, a bit each. None: all.
    vlans: Option<Box<[u64; VLANS as usize / 64]>>,
}

impl DriverFilter {
    /// Everything passes: a driver that says nothing gets all frames.
    pub(crate) fn open() -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: None,
        }
    }

    /// Everything passes, and whatever the driver has named goes on to pass when it leaves promiscuous mode.
    pub(crate) fn unknown() -> Self {
        Self { unicast: None, multicast: None, ..Self::open() }
    }

    /// From now on only VLANs pass that the driver names.
    pub(crate) fn close_vlans(&mut self) {
        self.vlans = Some(Box::new([0; VLANS as usize / 64]));
    }

    /// Lets a VLAN pass, or not. False if there is no such VLAN.
    #[must_use]
    pub(crate) fn set_vlan(&mut self, vlan: u16, passes: bool) -> bool {
        // A driver that was here before this back-end may have named others, which pass as before.
        let Some(vlans) = &mut self.vlans else { return vlan < VLANS };
        let Some(word) = vlans.get_mut(usize::from(vlan / 64)) else { return false };
        let bit = 1 << (vlan % 64);
        *word = if passes { *word | bit } else { *word & !bit };
        true
    }

    /// Replaces the lists of addresses. What is too long to be kept lets all frames of its kind pass.
    pub(crate) fn set_macs(&mut self, unicast: Vec<MacAddress>, multicast: Vec<MacAddress>) {
        let keep = |macs: Vec<MacAddress>| (macs.len() <= MAX_DRIVER_MACS).then_some(macs);
        self.unicast = keep(unicast);
        self.multicast = keep(multicast);
    }

    /// Whether the driver, whose own address is `own`, wants the frame.
    pub(crate) fn admits(&self, ethernet: &Ethernet, own: MacAddress) -> bool {
        let destination = ethernet.destination;
        let names = |list: &Option<Vec<MacAddress>>| list.as_ref().is_none_or(|macs| macs.contains(&destination));
        self.admits_vlan(ethernet.vlan)
            && (self.promiscuous
                || if destination == MacAddress::BROADCAST {
                    !self.no_broadcast
                } else if destination.is_group() {
                    !self.no_multicast && (self.all_multicast || names(&self.multicast))
                } else {
                    !self.no_unicast && (self.all_unicast || destination == own || names(&self.unicast))
                })
    }

    fn admits_vlan(&self, vlan: u16) -> bool {
        let Some(vlans) = &self.vlans else { return true };
        vlan == 0 || vlans.get(usize::from(vlan / 64)).is_some_and(|word| word & 1 << (vlan % 64) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
    const GROUP: MacAddress = MacAddress([0x33, 0x33, 0, 0, 0, 1]);

    fn to(destination: MacAddress, vlan: u16) -> Ethernet {
        Ethernet { destination, source: OTHER, vlan, ether_type: 0x0800, payload: 14 }
    }

    #[test]
    fn the_operators_filter_names_what_passes() {
        let none = PortFilter::default();
        assert!(none.admits_sent(&to(OWN, 9)) && none.admits_received(&to(OWN, 9)));
        let filter = PortFilter { macs: vec![OTHER], vlans: vec![0, 7] };
        assert!(filter.admits_sent(&to(OWN, 0)) && filter.admits_sent(&to(OWN, 7)));
        assert!(!filter.admits_sent(&to(OWN, 8)) && !filter.admits_received(&to(OWN, 8)));
        let filter = PortFilter { macs: vec![OWN], vlans: Vec::new() };
        assert!(!filter.admits_sent(&to(OWN, 0)) && filter.admits_received(&to(OWN, 0)));
        assert_eq!(PortFilter { macs: vec![OWN; 257], vlans: vec![] }.check(), Err(FilterError::Macs { found: 257 }));
        assert_eq!(PortFilter { macs: vec![], vlans: vec![1, 4095] }.check(), Err(FilterError::Vlan { found: 4095 }));
        assert_eq!(PortFilter { macs: vec![OWN; 256], vlans: vec![0, 4094] }.check(), Ok(()));
    }

    #[test]
    fn the_driver_gets_what_it_wants() {
        let admits = |filter: &DriverFilter| {
            [OWN, OTHER, GROUP, MacAddress::BROADCAST].map(|mac| filter.admits(&to(mac, 0), OWN))
        };
        let mut filter = DriverFilter::open();
        assert_eq!(admits(&filter), [true; 4]);
        filter.promiscuous = false;
        assert_eq!(admits(&filter), [true, false, false, true]);
        filter.set_macs(vec![OTHER], vec![GROUP]);
        assert_eq!(admits(&filter), [true; 4]);
        filter.set_macs(vec![OTHER; MAX_DRIVER_MACS + 1], Vec::new());
        assert_eq!(admits(&filter), [true, true, false, true], "too long a list lets all of its kind pass");
        filter.set_macs(Vec::new(), Vec::new());
        filter.all_multicast = true;
        assert_eq!(admits(&filter), [true, false, true, true]);
        filter.all_unicast = true;
        filter.no_multicast = true;
        filter.no_broadcast = true;
        assert_eq!(admits(&filter), [true, true, false, false]);
        filter.no_unicast = true;
        assert_eq!(admits(&filter), [false; 4]);
    }

    #[test]
    fn vlans_pass_when_they_are_named() {
        let mut filter = DriverFilter::open();
        assert!(filter.admits(&to(OWN, 5), OWN) && filter.set_vlan(5, false) && filter.admits(&to(OWN, 5), OWN));
        filter.close_vlans();
        assert!(filter.admits(&to(OWN, 0), OWN) && !filter.admits(&to(OWN, 5), OWN));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        assert!(filter.admits(&to(OWN, 5), OWN) && filter.admits(&to(OWN, 4095), OWN));
        assert!(filter.set_vlan(5, false) && !filter.admits(&to(OWN, 5), OWN));
    }
}
