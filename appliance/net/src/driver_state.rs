//! What the driver has set since its device was reset, and the commands of the control queue that set it (virtio 1.3,
//! section 5.1.6.5). Pure.

use crate::ethernet::MacAddress;
use crate::features;
use crate::filter::DriverFilter;
use crate::offloads::Offloads;

/// Longest command that is read: two lists of 340 addresses.
pub(crate) const MAX_COMMAND_LEN: usize = 4096;

/// Classes of commands.
const RX: u8 = 0;
const MAC: u8 = 1;
const VLAN: u8 = 2;
const ANNOUNCE: u8 = 3;
const MQ: u8 = 4;
const GUEST_OFFLOADS: u8 = 5;

/// Which of the driver's commands are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// None: its control queue has not been in service, or the front-end keeps it to itself.
    Nothing,
    /// All since the reset.
    All,
    /// Those since its control queue was taken over from a back-end before.
    Latest,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DriverState {
    heard: Heard,
    pub(crate) filter: DriverFilter,
    /// The driver's address.
    pub(crate) mac: MacAddress,
    /// Queue pairs that the driver uses. None: not known.
    pub(crate) pairs: Option<u16>,
    /// What may be left to the driver.
    pub(crate) offloads: Offloads,
    /// The driver is asked to announce itself.
    pub(crate) announce: bool,
}

/// What commands are checked against.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Negotiated {
    /// Features that the driver has accepted.
    pub(crate) features: u64,
    /// Queue pairs of the device.
    pub(crate) max_pairs: u16,
}

impl Negotiated {
    fn has(self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

impl DriverState {
    /// As after a reset.
    pub(crate) fn new(mac: MacAddress) -> Self {
        let filter = DriverFilter::open();
        Self { heard: Heard::Nothing, filter, mac, pairs: None, offloads: Offloads::empty(), announce: false }
    }

    /// The control queue starts, at this position of its ring. `mac` is the device's own. True if the driver is to be told that
    /// it shall announce itself.
    ///
    /// At the ring's beginning the driver is new: it has said nothing yet, but will. Of several queue pairs it uses one, and
    /// no VLANs pass, until it says otherwise (sections 5.1.6.5.5 and 5.1.6.5.3).
    ///
    /// In its midst the driver has said what it wants, and will not say it again. If it was to a back-end before this one,
    /// which is gone or on another host, everything passes, and nothing is left to the driver that it may have declined; and
    /// the network has to learn where the driver is now.
    pub(crate) fn start_control(&mut self, position: u16, mac: MacAddress, negotiated: Negotiated) -> bool {
        if position == 0 {
            *self = Self::new(mac);
            self.heard = Heard::All;
            self.pairs = Some(1);
            self.offloads = Offloads::of_receiver(negotiated.features);
            if negotiated.has(features::CTRL_VLAN) {
                self.filter.close_vlans();
            }
            return false;
        }
        if self.heard != Heard::Nothing {
            return false;
        }
        self.heard = Heard::Latest;
        self.filter = DriverFilter::unknown();
        if negotiated.has(features::CTRL_GUEST_OFFLOADS) {
            self.offloads = Offloads::empty();
        }
        self.announce = negotiated.has(features::GUEST_ANNOUNCE);
        self.announce
    }

    /// Carries out a command; false if that is refused.
    #[must_use]
    pub(crate) fn apply(&mut self, command: &[u8], negotiated: Negotiated) -> bool {
        let Some(([class, code], data)) = command.split_first_chunk::<2>() else { return false };
        match *class {
            RX => self.set_reception(*code, data, negotiated),
            MAC => self.set_addresses(*code, data, negotiated),
            VLAN => self.set_vlan(*code, data, negotiated),
            ANNOUNCE => {
                let taken = negotiated.has(features::GUEST_ANNOUNCE) && *code == 0;
                self.announce &= !taken;
                taken
            }
            MQ => self.set_pairs(*code, data, negotiated),
            GUEST_OFFLOADS => self.set_offloads(*code, data, negotiated),
            _ => false,
        }
    }

    fn set_reception(&mut self, code: u8, data: &[u8], negotiated: Negotiated) -> bool {
        let [on @ (0 | 1)] = *data else { return false };
        let needed = if code < 2 { features::CTRL_RX } else { features::CTRL_RX_EXTRA };
        let filter = &mut self.filter;
        let place = match code {
            0 => &mut filter.promiscuous,
            1 => &mut filter.all_multicast,
            2 => &mut filter.all_unicast,
            3 => &mut filter.no_multicast,
            4 => &mut filter.no_unicast,
            5 => &mut filter.no_broadcast,
            _ => return false,
        };
        if !negotiated.has(needed) {
            return false;
        }
        *place = on == 1;
        true
    }

    fn set_addresses(&mut self, code: u8, data: &[u8], negotiated: Negotiated) -> bool {
        match code {
            0 if negotiated.has(features::CTRL_RX) => {
                let Some((unicast, rest)) = split_list(data) else { return false };
                let Some((multicast, [])) = split_list(rest) else { return false };
                self.filter.set_macs(unicast, multicast);
                true
            }
            1 if negotiated.has(features::CTRL_MAC_ADDR) => match <[u8; 6]>::try_from(data).map(MacAddress) {
                Ok(mac) if !mac.is_group() && mac.bits() != 0 => {
                    self.mac = mac;
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }

    fn set_vlan(&mut self, code: u8, data: &[u8], negotiated: Negotiated) -> bool {
        let Ok(vlan) = <[u8; 2]>::try_from(data).map(u16::from_le_bytes) else { return false };
        negotiated.has(features::CTRL_VLAN) && code < 2 && self.filter.set_vlan(vlan, code == 0)
    }

    fn set_pairs(&mut self, code: u8, data: &[u8], negotiated: Negotiated) -> bool {
        let Ok(pairs) = <[u8; 2]>::try_from(data).map(u16::from_le_bytes) else { return false };
        let taken = negotiated.has(features::MQ) && code == 0 && (1..=negotiated.max_pairs).contains(&pairs);
        if taken {
            self.pairs = Some(pairs);
        }
        taken
    }

    fn set_offloads(&mut self, code: u8, data: &[u8], negotiated: Negotiated) -> bool {
        let Ok(bits) = <[u8; 8]>::try_from(data).map(u64::from_le_bytes) else { return false };
        let possible = Offloads::command_bits() & negotiated.features;
        let taken = negotiated.has(features::CTRL_GUEST_OFFLOADS) && code == 0 && bits & !possible == 0;
        if taken {
            self.offloads = Offloads::of_command(bits);
        }
        taken
    }
}

/// `struct virtio_net_ctrl_mac`: a count and as many addresses.
fn split_list(data: &[u8]) -> Option<(Vec<MacAddress>, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (list, rest) = rest.split_at_checked(len)?;
    let (macs, _) = list.as_chunks::<6>();
    Some((macs.iter().map(|mac| MacAddress(*mac)).collect(), rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
    const ALL: Negotiated = Negotiated { features: features::OFFERED, max_pairs: 4 };

    #[test]
    fn commands_set_what_they_say() {
        let mut state = DriverState::new(OWN);
        state.start_control(0, OWN, ALL);
        state.announce = true;
        assert_eq!(state.pairs, Some(1));
        let mut apply = |command: &[u8]| {
            assert!(state.apply(command, ALL), "{command:x?}");
            state.clone()
        };
        assert!(!apply(&[0, 0, 0]).filter.promiscuous);
        assert!(apply(&[0, 1, 1]).filter.all_multicast);
        assert!(apply(&[0, 5, 1]).filter.no_broadcast);
        assert_eq!(apply(&[1, 1, 2, 0, 0, 0, 0, 9]).mac, MacAddress([2, 0, 0, 0, 0, 9]));
        apply(&[&[1, 0][..], &1u32.to_le_bytes(), &[2, 0, 0, 0, 0, 7], &0u32.to_le_bytes()].concat());
        apply(&[2, 0, 7, 0]);
        assert!(!apply(&[3, 0]).announce);
        assert_eq!(apply(&[4, 0, 4, 0]).pairs, Some(4));
        let offloads = (features::GUEST_CSUM | features::GUEST_TSO4).to_le_bytes();
        assert_eq!(apply(&[&[5, 0][..], &offloads].concat()).offloads, Offloads::CHECKSUM | Offloads::TCP4);
    }

    #[test]
    fn a_driver_that_was_here_before_loses_nothing() {
        let mut state = DriverState::new(OWN);
        assert!(state.start_control(9, OWN, ALL), "it is asked to announce itself");
        assert_eq!((state.pairs, state.offloads, &state.filter), (None, Offloads::empty(), &DriverFilter::unknown()));
        assert!(state.apply(&[4, 0, 3, 0], ALL) && state.apply(&[3, 0], ALL));
        let known = state.clone();
        assert!(!state.start_control(10, OWN, ALL), "it was heard since");
        assert_eq!(state, known);
        let others = Negotiated { features: features::GUEST_TSO4 | features::GUEST_CSUM, max_pairs: 4 };
        state = DriverState { offloads: Offloads::of_receiver(others.features), ..DriverState::new(OWN) };
        assert!(!state.start_control(9, OWN, others));
        assert_eq!(state.offloads, Offloads::CHECKSUM | Offloads::TCP4, "what it could not decline");
        // A new driver, whatever the one before has set.
        assert!(state.apply(&[0, 0, 0], ALL) && !state.start_control(0, OWN, ALL));
        let mut new = DriverState::new(OWN);
        new.start_control(0, OWN, ALL);
        assert_eq!(state, new);
        assert!(new.offloads == Offloads::of_receiver(ALL.features) && new.pairs == Some(1));
    }

    #[test]
    fn malformed_and_unknown_commands_change_nothing() {
        let list = |count: u32, bytes: usize| [&count.to_le_bytes()[..], &vec![2; bytes]].concat();
        let macs = |unicast: Vec<u8>, rest: Vec<u8>| [vec![1, 0], unicast, rest].concat();
        for command in [
            vec![],
            vec![0],
            vec![0, 0],
            vec![0, 0, 2],
            vec![0, 0, 1, 1],
            vec![0, 6, 1],
            vec![1, 1, 2, 0, 0, 0, 0],
            vec![1, 1, 3, 0, 0, 0, 0, 1],
            vec![1, 1, 0, 0, 0, 0, 0, 0],
            vec![1, 2, 0],
            macs(list(1, 5), vec![]),
            macs(list(1, 6), vec![]),
            macs(list(u32::MAX, 6), list(0, 0)),
            macs(list(0, 0), list(1, 7)),
            vec![2, 0, 0, 16],
            vec![2, 0, 1],
            vec![2, 2, 1, 0],
            vec![3, 1],
            vec![4, 0, 0, 0],
            vec![4, 0, 5, 0],
            vec![4, 1, 1, 0],
            vec![4, 0, 1],
            [vec![5, 0], (1u64 << 40).to_le_bytes().to_vec()].concat(),
            vec![5, 0, 0],
            vec![6, 0],
            vec![255, 255],
        ] {
            let mut state = DriverState::new(OWN);
            state.start_control(0, OWN, ALL);
            let before = state.clone();
            assert!(!state.apply(&command, ALL), "{command:x?}");
            assert_eq!(state, before, "{command:x?}");
        }
    }

    #[test]
    fn commands_need_their_features() {
        let none = Negotiated { features: features::CTRL_VQ, max_pairs: 4 };
        for command in [
            &[0, 0, 0][..],
            &[0, 3, 0],
            &[1, 1, 2, 0, 0, 0, 0, 9],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 7, 0],
            &[3, 0],
            &[4, 0, 2, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            let mut state = DriverState::new(OWN);
            assert!(!state.apply(command, none), "{command:x?}");
            assert!(state.apply(command, ALL), "{command:x?}");
        }
        let mut state = DriverState::new(OWN);
        let few = Negotiated { features: ALL.features & !features::GUEST_TSO4, ..ALL };
        let offloads = features::GUEST_TSO4.to_le_bytes();
        assert!(!state.apply(&[&[5, 0][..], &offloads].concat(), few));
    }

    proptest! {
        #[test]
        fn no_command_can_do_harm(command in prop::collection::vec(any::<u8>(), 0..100), class in 0u8..7, code in 0u8..4) {
            let mut command = command;
            command.splice(..command.len().min(2), [class, code]);
            let mut state = DriverState::new(OWN);
            state.start_control(0, OWN, ALL);
            let before = state.clone();
            let taken = state.apply(&command, ALL);
            prop_assert!(taken || state == before);
            prop_assert!(state.pairs.is_some_and(|pairs| (1..=4).contains(&pairs)) && !state.mac.is_group());
        }
    }
}
