//! The identity of a device set.

use std::fmt;
use std::str::FromStr;

/// 16 bytes, written as 32 hexadecimal digits in the usual groups.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

/// The text is no uuid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a uuid")]
pub struct NotUuid;

impl FromStr for Uuid {
    type Err = NotUuid;

    fn from_str(text: &str) -> Result<Self, NotUuid> {
        let digits = text.chars().filter(|character| *character != '-').collect::<String>();
        if digits.len() != 32 || text.len() != 36 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NotUuid);
        }
        u128::from_str_radix(&digits, 16).map(|value| Self(value.to_be_bytes())).map_err(|_| NotUuid)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, byte) in self.0.iter().enumerate() {
            if matches!(position, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_stand_for_each_other() {
        let text = "6f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a11";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!(uuid.0[..4], [0x6f, 0x1c, 0x1c, 0x0e]);
        assert_eq!(uuid.to_string(), text);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "6f1c1c0e", "6f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a1g", "+f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a11"] {
            assert_eq!(text.parse::<Uuid>(), Err(NotUuid), "{text}");
        }
    }
}
