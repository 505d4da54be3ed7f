//! What the front-end has told of the driver VM's IOMMU: which I/O address stands for which address of its own.
//!
//! A cache in the plain sense: the front-end fills it as it is asked to (a [`Miss`] becomes a request on the back channel) and
//! takes back what has changed. What is not in it is unknown, not forbidden. An entry that lacks the permission counts as a
//! miss too, because another answer may grant it; so a caller asks for the same miss once, and takes a second one for an
//! access failure.
//!
//! Rules where the specification is silent:
//! - The newest update wins: what it overlaps of older entries is dropped, and no more than that.
//! - An invalidation that cannot be read as a range (its length is 0, or it goes over the end of the address space) takes
//!   everything back. Front-ends write the length of the whole address space, 2^64, as 0. To forget too much costs a
//!   question; to forget too little gives the driver VM's memory away.
//! - The oldest entries go when there are more than [`MAX_ENTRIES`].
//!
//! Pure: no I/O and no waiting. Source: vhost-user specification, "IOMMU support" and "An IOTLB message".

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use vvu_protocol::address::UserAddress;
use vvu_protocol::message;

#[cfg(test)]
mod tests;

/// Most entries that are kept. A front-end may map each page of 4 KiB by itself; the largest request of our block back-end,
/// 126 segments of 1 MiB that begin anywhere, then needs 32,382 entries. Twice as many, so that it cannot displace
/// its own; about 6 MiB of memory.
pub const MAX_ENTRIES: usize = 65_536;

/// What a device does at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// It reads.
    Read,
    /// It writes.
    Write,
}

impl Access {
    /// The bit of the message's permissions.
    #[must_use]
    pub fn permission(self) -> u8 {
        match self {
            Self::Read => 1,
            Self::Write => 2,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "reading",
            Self::Write => "writing",
        })
    }
}

/// What the front-end has to be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Miss {
    /// First I/O address that has no translation.
    pub iova: u64,
    /// What is to be done there.
    pub access: Access,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "I/O address {:#x} has no translation for {}", self.iova, self.access)
    }
}

/// Why a range is not translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TranslateError {
    /// The front-end may know more.
    #[error("{0}")]
    Miss(Miss),
    /// The range goes over the end of the address space; nobody can translate it.
    #[error("{len:#x} bytes at I/O address {iova:#x} go over the end of the address space")]
    Wraps {
        /// First address.
        iova: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// Why a message of the front-end is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IotlbError {
    /// An update of no bytes, or over the end of one of the address spaces.
    #[error("IOTLB update of {size:#x} bytes at {iova:#x} to {user_address} is no range")]
    Range {
        /// I/O address.
        iova: u64,
        /// Length in bytes.
        size: u64,
        /// What it is mapped to.
        user_address: UserAddress,
    },
    /// Bits that the specification does not have.
    #[error("IOTLB update with unknown permissions {permission:#x}")]
    Permission {
        /// What came.
        permission: u8,
    },
    /// Misses and failures go the other way, and batches belong to the kernel's vhost.
    #[error("IOTLB message of type {kind} is none of a front-end")]
    Kind {
        /// What came.
        kind: u8,
    },
}

/// A contiguous range of the front-end's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserRange {
    /// First address.
    pub address: UserAddress,
    /// Length in bytes; more than 0.
    pub len: u64,
}

/// "IOTLB message type": update.
const UPDATE: u8 = 2;

/// "IOTLB message type": invalidate.
const INVALIDATE: u8 = 3;

/// All permissions that there are: read and write.
const PERMISSIONS: u8 = 3;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Iotlb {
    /// By first I/O address; they do not overlap.
    entries: BTreeMap<u64, Entry>,
    /// Age and first I/O address of each entry, the oldest first.
    by_age: BTreeSet<(u64, u64)>,
    /// Age of the next entry.
    next_age: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Last I/O address; the first is the key. So an entry may end where the address space does.
    last: u64,
    user_address: u64,
    permission: u8,
    /// Number of the update; parts of a split entry keep it.
    age: u64,
}

impl Iotlb {
    /// Applies a message of the front-end. When it returns, translations are as the message says.
    ///
    /// # Errors
    /// [`IotlbError`]; nothing has changed then.
    pub fn apply(&mut self, message: &message::Iotlb) -> Result<(), IotlbError> {
        match message.kind {
            UPDATE => self.update(message),
            INVALIDATE => {
                self.invalidate(message.iova, message.size);
                Ok(())
            }
            kind => Err(IotlbError::Kind { kind }),
        }
    }

    /// Forgets everything: the device is reset, or translation is negotiated anew.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Number of entries, at most [`MAX_ENTRIES`].
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Appends what `len` bytes at `iova` stand for; what adjoins is merged.
    ///
    /// # Errors
    /// The first miss; ranges before it may have been appended.
    pub fn translate(
        &self,
        iova: u64,
        len: u64,
        access: Access,
        ranges: &mut Vec<UserRange>,
    ) -> Result<(), TranslateError> {
        let Some(before_end) = len.checked_sub(1) else { return Ok(()) };
        let last = iova.checked_add(before_end).ok_or(TranslateError::Wraps { iova, len })?;
        let own = ranges.len();
        let mut at = iova;
        loop {
            let entry = self.entries.range(..=at).next_back();
            let Some((start, entry)) = entry.filter(|(_, entry)| entry.last >= at && entry.allows(access)) else {
                return Err(TranslateError::Miss(Miss { iova: at, access }));
            };
            let end = entry.last.min(last);
            let address = UserAddress(entry.user_address + (at - start));
            let part = UserRange { address, len: end - at + 1 };
            match ranges.get_mut(own..).and_then(<[_]>::last_mut) {
                Some(before) if before.address.checked_add(before.len) == Some(address) => before.len += part.len,
                _ => ranges.push(part),
            }
            if end == last {
                return Ok(());
            }
            at = end + 1;
        }
    }

    fn update(&mut self, message: &message::Iotlb) -> Result<(), IotlbError> {
        let &message::Iotlb { iova, size, user_address, permission, .. } = message;
        let range = IotlbError::Range { iova, size, user_address: UserAddress(user_address) };
        let before_end = size.checked_sub(1).ok_or(range)?;
        let last = iova.checked_add(before_end).ok_or(range)?;
        user_address.checked_add(before_end).ok_or(range)?;
        if permission & !PERMISSIONS != 0 {
            return Err(IotlbError::Permission { permission });
        }
        self.cut(iova, last);
        if permission != 0 {
            let age = self.next_age;
            self.next_age += 1;
            self.insert(iova, Entry { last, user_address, permission, age });
        }
        while self.entries.len() > MAX_ENTRIES {
            let Some((_, oldest)) = self.by_age.pop_first() else { break };
            self.entries.remove(&oldest);
        }
        Ok(())
    }

    fn invalidate(&mut self, iova: u64, size: u64) {
        match size.checked_sub(1).and_then(|before_end| iova.checked_add(before_end)) {
            Some(last) => self.cut(iova, last),
            None => self.clear(),
        }
    }

    /// Takes the I/O addresses from `first` to `last` out of all entries.
    fn cut(&mut self, first: u64, last: u64) {
        let begins_before = self.entries.range(..first).next_back().map(|(start, entry)| (*start, *entry));
        if let Some((start, entry)) = begins_before
            && entry.last >= first
        {
            self.remove(start, entry);
            self.insert(start, Entry { last: first - 1, ..entry });
            self.insert_rest(start, entry, last);
        }
        while let Some((start, entry)) = self.entries.range(first..=last).next().map(|(start, entry)| (*start, *entry))
        {
            self.remove(start, entry);
            self.insert_rest(start, entry, last);
        }
    }

    /// Keeps what an entry has behind `last`.
    fn insert_rest(&mut self, start: u64, entry: Entry, last: u64) {
        if entry.last > last {
            let rest = last + 1;
            self.insert(rest, Entry { user_address: entry.user_address + (rest - start), ..entry });
        }
    }

    fn insert(&mut self, start: u64, entry: Entry) {
        self.by_age.insert((entry.age, start));
        self.entries.insert(start, entry);
    }

    fn remove(&mut self, start: u64, entry: Entry) {
        self.by_age.remove(&(entry.age, start));
        self.entries.remove(&start);
    }
}

impl Entry {
    fn allows(&self, access: Access) -> bool {
        self.permission & access.permission() != 0
    }
}
