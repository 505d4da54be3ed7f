//! Amounts of memory as people write them: `4G`, `512M`, `4096`.

use std::fmt;
use std::str::FromStr;

/// Bytes in a kibibyte.
pub(crate) const KIB: u64 = 1024;
/// Bytes in a mebibyte.
pub(crate) const MIB: u64 = 1024 * KIB;
/// Bytes in a gibibyte.
pub(crate) const GIB: u64 = 1024 * MIB;
/// Bytes in a tebibyte.
pub(crate) const TIB: u64 = 1024 * GIB;

/// Suffixes from large to small; all of them are powers of 1024, as in QEMU.
const UNITS: [(char, u64); 4] = [('T', TIB), ('G', GIB), ('M', MIB), ('K', KIB)];

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size(
    /// The number, in bytes.
    pub(crate) u64,
);

/// Why a text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// Not a whole number with an optional suffix.
    #[error("'{0}' is not a size: write a whole number of bytes or one with K, M, G or T, such as 4G")]
    Form(String),
    /// More bytes than 64 bits count.
    #[error("'{0}' is more than 64 bits can count")]
    TooLarge(String),
}

impl FromStr for Size {
    type Err = SizeError;

    /// Reads `123`, `4G`, `4GiB` or `4GB` (all suffixes are powers of 1024; upper or lower case).
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let form = || SizeError::Form(text.to_owned());
        let upper = text.trim().to_ascii_uppercase();
        let bare = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
        let unit = UNITS.iter().find(|(letter, _)| bare.ends_with(*letter));
        let (digits, factor) = match unit {
            Some((letter, factor)) => (bare.strip_suffix(*letter).unwrap_or(bare), *factor),
            None if bare.len() == upper.len() => (bare, 1),
            None => return Err(form()),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(form());
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        number.checked_mul(factor).map(Self).ok_or_else(too_large)
    }
}

impl Size {
    /// The size in whole mebibytes, rounded down, for measured values that nobody wants to read to the byte.
    pub(crate) fn in_mebibytes(self) -> String {
        format!("{} MiB", self.0 / MIB)
    }
}

impl fmt::Display for Size {
    /// Writes the largest unit that divides the number, so that nothing is lost: `4G`, `224M`, `1000`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(_, factor)| self.0 != 0 && self.0.is_multiple_of(*factor));
        match unit {
            Some((letter, factor)) => write!(formatter, "{}{letter}", self.0 / factor),
            None => write!(formatter, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("4096", 4096),
            ("4G", 4 * GIB),
            ("4g", 4 * GIB),
            ("512MiB", 512 * MIB),
            ("1TB", TIB),
            (" 16K ", 16 * KIB),
            ("0", 0),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "4.5G", "-1", "4X", "4GG", "0x10", "16B", "1 G", "+4G"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Form(text.to_owned())), "{text}");
        }
        for text in ["99999999999999999999", "18446744073709551615K"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_size_is_written_without_loss() {
        for (bytes, text) in [(4 * GIB, "4G"), (224 * MIB, "224M"), (1000, "1000"), (0, "0"), (GIB + KIB, "1048577K")] {
            assert_eq!(Size(bytes).to_string(), text);
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)));
        }
    }
}
