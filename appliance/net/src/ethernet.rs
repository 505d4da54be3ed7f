//! The Ethernet header of a frame: addresses, VLAN tags, what is inside (IEEE 802.3, IEEE 802.1Q).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Length of a header without tags in bytes: two addresses and the type.
pub(crate) const HEADER_LEN: usize = 14;

/// Length of one VLAN tag in bytes.
pub(crate) const TAG_LEN: usize = 4;

/// Tags that are looked behind: a service tag and a customer tag.
pub(crate) const MAX_TAGS: usize = 2;

/// Types that mean "a tag follows": that of IEEE 802.1Q, and the service tag of IEEE 802.1ad.
const TAG_TYPES: [u16; 2] = [0x8100, 0x88a8];

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

/// Why a text is no MAC address of a network card.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not the MAC address of a network card; write it as 52:54:00:12:34:56")]
pub struct MacError {
    text: String,
}

impl MacAddress {
    /// All stations.
    pub(crate) const BROADCAST: Self = Self([0xff; 6]);

    /// One of several stations: multicast or broadcast.
    pub(crate) fn is_group(self) -> bool {
        self.0.first().is_some_and(|first| first & 1 != 0)
    }

    /// The address as a number that is not 0 for any card.
    pub(crate) fn bits(self) -> u64 {
        let [a, b, c, d, e, g] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, g])
    }

    /// The address that [`MacAddress::bits`] has made a number of.
    pub(crate) fn from_bits(bits: u64) -> Self {
        let [_, _, a, b, c, d, e, g] = bits.to_be_bytes();
        Self([a, b, c, d, e, g])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError { text: text.to_owned() };
        let mut address = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut address {
            let pair =
                pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit()));
            *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or_else(error)?;
        }
        let address = Self(address);
        if pairs.next().is_some() || address.is_group() || address.bits() == 0 { Err(error()) } else { Ok(address) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

/// What a switch has to know of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ethernet {
    pub(crate) destination: MacAddress,
    pub(crate) source: MacAddress,
    /// VLAN of the outermost tag; 0 for a frame without a tag or with one that only has a priority.
    pub(crate) vlan: u16,
    /// What the payload is.
    pub(crate) ether_type: u16,
    /// Offset of the payload in the frame.
    pub(crate) payload: usize,
}

impl Ethernet {
    /// Reads the header from the first bytes of a frame. None if they are too few. A third tag counts as payload.
    pub(crate) fn parse(front: &[u8]) -> Option<Self> {
        let (destination, rest) = front.split_first_chunk::<6>()?;
        let (source, _) = rest.split_first_chunk::<6>()?;
        let mut vlan = None;
        let mut offset = HEADER_LEN;
        for _ in 0..MAX_TAGS {
            if !TAG_TYPES.contains(&word(front, offset - 2)?) {
                break;
            }
            let id = word(front, offset)? & 0xfff;
            vlan = vlan.or(Some(id));
            offset += TAG_LEN;
        }
        Some(Self {
            destination: MacAddress(*destination),
            source: MacAddress(*source),
            vlan: vlan.unwrap_or(0),
            ether_type: word(front, offset - 2)?,
            payload: offset,
        })
    }
}

/// The two bytes at an offset, in network order.
pub(crate) fn word(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tail: &[u8]) -> Vec<u8> {
        [&[0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2], tail].concat()
    }

    #[test]
    fn tags_are_looked_behind() {
        for (tail, vlan, ether_type, payload) in [
            (vec![8, 0], 0, 0x0800, 14),
            (vec![0x81, 0, 0xe0, 7, 0x86, 0xdd], 7, 0x86dd, 18),
            (vec![0x88, 0xa8, 0, 9, 0x81, 0, 0, 7, 8, 6], 9, 0x0806, 22),
            (vec![0x81, 0, 0xe0, 0, 8, 0], 0, 0x0800, 18),
            (vec![0x81, 0, 0, 1, 0x81, 0, 0, 2, 0x81, 0, 0, 3, 8, 0], 1, 0x8100, 22),
        ] {
            let bytes = frame(&tail);
            let ethernet = Ethernet::parse(&bytes).unwrap();
            assert_eq!(
                (ethernet.vlan, ethernet.ether_type, ethernet.payload),
                (vlan, ether_type, payload),
                "{tail:x?}"
            );
            assert_eq!(ethernet.source, MacAddress([0x52, 0x54, 0, 0, 0, 2]));
            for len in 0..payload {
                assert_eq!(Ethernet::parse(&bytes[..len]), None, "{len} bytes of {tail:x?}");
            }
        }
    }

    #[test]
    fn addresses_are_read_and_written() {
        let address: MacAddress = "52:54:00:AB:cd:01".parse().unwrap();
        assert_eq!(address.to_string(), "52:54:00:ab:cd:01");
        assert_eq!(MacAddress::from_bits(address.bits()), address);
        for text in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:1",
            "52:54:00:ab:cd:01:02",
            "53:54:00:ab:cd:01",
            "52-54-00-ab-cd-01",
            "00:00:00:00:00:00",
            "+2:54:00:ab:cd:01",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
        assert!(MacAddress::BROADCAST.is_group() && !address.is_group());
    }
}
