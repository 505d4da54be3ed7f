//! The header of a qcow2 image, as far as it decides whether the image is served ("The QCOW2 image format", section
//! "Header"). Pure.
//!
//! It is looked at before the driver of the format sees the image, so that what cannot be served is refused with a remedy.

/// Bytes of the header that are looked at.
pub(crate) const HEADER_LEN: usize = 104;

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");

/// Incompatible feature: reference counts may be wrong, for a program with lazy ones did not close the image.
const DIRTY: u64 = 1 << 0;
/// Incompatible feature: a program has found the image to be damaged.
const CORRUPT: u64 = 1 << 1;
/// Incompatible feature: the data is in another file.
const DATA_FILE: u64 = 1 << 2;

/// Largest virtual size in bytes; what can be addressed by sectors with a sign.
const MAX_SIZE: u64 = i64::MAX.cast_unsigned();

/// Why an image is not served. Each is one line, behind the name of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else, or damaged.
    #[error("is no qcow2 image; give the format that it has")]
    Magic,
    /// Neither version 2 nor 3.
    #[error("is a qcow2 image of version {0}, only 2 and 3 are known; convert it with qemu-img convert")]
    Version(u32),
    /// The data is encrypted.
    #[error("is encrypted, which is not supported; decrypt it with qemu-img convert")]
    Encrypted,
    /// The data is elsewhere.
    #[error("has its data in another file, which is not supported; put it into one with qemu-img convert")]
    DataFile,
    /// It was not closed, or is known to be damaged.
    #[error("is marked as damaged or as not closed in order; repair it with qemu-img check -r all")]
    NeedsRepair,
    /// Extended L2 entries, another compression, or something newer.
    #[error("has features that are not supported (bits {0:#x}); convert it with qemu-img convert")]
    Features(u64),
    /// The virtual size is beyond all reason.
    #[error("has a virtual size of {0} bytes; it is damaged")]
    Size(u64),
}

/// What is known of an image by its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Length of the disk in bytes.
    pub(crate) virtual_size: u64,
    /// It names a backing file.
    pub(crate) has_backing: bool,
}

impl Header {
    /// Reads the first bytes of an image.
    pub(crate) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let mut fields = Fields { rest: bytes };
        if fields.u32() != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = fields.u32();
        let backing_file_offset = fields.u64();
        let _backing_file_len_and_cluster_bits = fields.u64();
        let virtual_size = fields.u64();
        let encryption = fields.u32();
        let _l1_entries = fields.u32();
        // L1 table, reference counts and snapshots: the format's driver checks them.
        fields.skip(32);
        let features = match version {
            2 => 0,
            3 => fields.u64(),
            _ => return Err(HeaderError::Version(version)),
        };
        match features {
            _ if encryption != 0 => Err(HeaderError::Encrypted),
            _ if features & DATA_FILE != 0 => Err(HeaderError::DataFile),
            _ if features & (DIRTY | CORRUPT) != 0 => Err(HeaderError::NeedsRepair),
            0 if virtual_size > MAX_SIZE => Err(HeaderError::Size(virtual_size)),
            0 => Ok(Self { virtual_size, has_backing: backing_file_offset != 0 }),
            _ => Err(HeaderError::Features(features)),
        }
    }
}

/// Big-endian fields, one after the other. What lies beyond the bytes is zero.
struct Fields<'a> {
    rest: &'a [u8],
}

impl Fields<'_> {
    fn skip(&mut self, len: usize) {
        self.rest = self.rest.get(len..).unwrap_or_default();
    }

    fn u32(&mut self) -> u32 {
        let value = self.rest.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        self.skip(4);
        value
    }

    fn u64(&mut self) -> u64 {
        let value = self.rest.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        self.skip(8);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(changes: &[(usize, &[u8])]) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [(usize, &[u8]); 4] =
            [(0, b"QFI\xfb"), (4, &3u32.to_be_bytes()), (20, &16u32.to_be_bytes()), (24, &(1u64 << 30).to_be_bytes())];
        for (offset, field) in fields.iter().chain(changes) {
            bytes[*offset..offset + field.len()].copy_from_slice(field);
        }
        bytes
    }

    #[test]
    fn an_ordinary_image_is_taken() {
        let parsed = Header::parse(&header(&[])).unwrap();
        assert_eq!(parsed, Header { virtual_size: 1 << 30, has_backing: false });
        assert!(Header::parse(&header(&[(8, &512u64.to_be_bytes())])).unwrap().has_backing);
        // In version 2 there are no features: what stands there is something else.
        let old = header(&[(4, &2u32.to_be_bytes()), (72, &[0xff; 8])]);
        assert_eq!(Header::parse(&old).unwrap().virtual_size, 1 << 30);
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        let features = |bits: u64| bits.to_be_bytes();
        for (offset, field, expected) in [
            (0, &b"QED\0"[..], HeaderError::Magic),
            (4, &4u32.to_be_bytes(), HeaderError::Version(4)),
            (32, &2u32.to_be_bytes(), HeaderError::Encrypted),
            (72, &features(1), HeaderError::NeedsRepair),
            (72, &features(2), HeaderError::NeedsRepair),
            (72, &features(4), HeaderError::DataFile),
            (72, &features(8), HeaderError::Features(8)),
            (72, &features(16), HeaderError::Features(16)),
            (72, &features(1 << 63), HeaderError::Features(1 << 63)),
            (24, &(1u64 << 63).to_be_bytes(), HeaderError::Size(1 << 63)),
        ] {
            assert_eq!(Header::parse(&header(&[(offset, field)])), Err(expected));
        }
        assert_eq!(Header::parse(&[0; HEADER_LEN]), Err(HeaderError::Magic));
    }
}
