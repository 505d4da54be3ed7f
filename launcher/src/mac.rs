//! MAC addresses of network cards.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

/// Set in the first byte of an address that is a group's (IEEE 802, "I/G bit").
const GROUP: u8 = 1;

/// Set in the first byte of an address that no vendor has given (IEEE 802, "U/L bit").
const LOCAL: u8 = 2;

/// The address of one network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac([u8; 6]);

/// Why a text is no such address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not the MAC address of a network card, such as 52:54:00:12:34:56")]
pub(crate) struct MacError(String);

impl Mac {
    /// The address of what `role` at `place` on this host: always the same, and most likely nobody else's.
    pub(crate) fn derived(role: &str, place: &str) -> Self {
        // Without it hosts with the same paths would have the same addresses; there is one on every systemd host.
        let host = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        Self::hashed(&[host.trim(), role, place])
    }

    fn hashed(parts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let mut bytes = [0; 6];
        bytes.iter_mut().zip(hash.finalize()).for_each(|(byte, hashed)| *byte = hashed);
        if let Some(first) = bytes.first_mut() {
            *first = *first & !GROUP | LOCAL;
        }
        Self(bytes)
    }
}

impl FromStr for Mac {
    type Err = MacError;

    /// Reads six pairs of hexadecimal digits with colons between them, in upper or lower case.
    fn from_str(text: &str) -> Result<Self, MacError> {
        let fault = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|it| it.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(pair.ok_or_else(fault)?, 16).map_err(|_| fault())?;
        }
        let [first, ..] = bytes;
        if pairs.next().is_some() || first & GROUP != 0 || bytes == [0; 6] { Err(fault()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_in_lower_case() {
        assert_eq!("52:54:00:AB:cd:0F".parse::<Mac>().unwrap().to_string(), "52:54:00:ab:cd:0f");
    }

    #[test]
    fn groups_and_what_is_no_address_are_refused() {
        let bad =
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "1:2:3:4:5:6", "01:00:5e:00:00:01", "52-54-00-12-34-56"];
        for text in bad.into_iter().chain(["ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "+2:54:00:12:34:56"]) {
            assert_eq!(text.parse::<Mac>(), Err(MacError(text.to_owned())));
        }
    }

    #[test]
    fn a_derived_address_is_local_stable_and_its_own() {
        let mac = Mac::derived("port", "/run/a.sock");
        assert_eq!(mac, Mac::derived("port", "/run/a.sock"));
        assert_ne!(mac, Mac::derived("port", "/run/b.sock"));
        assert_ne!(mac, Mac::derived("uplink", "/run/a.sock"));
        assert_ne!(Mac::hashed(&["host", "ab", "c"]), Mac::hashed(&["host", "a", "bc"]));
        for place in ["a", "b", "c", "d", "e", "f"] {
            let Mac([first, ..]) = Mac::derived("port", place);
            assert_eq!(first & (GROUP | LOCAL), LOCAL);
        }
    }
}
