//! The address spaces that a message may speak of, each a type of its own so that one cannot be taken for another.

use std::fmt;

macro_rules! address_space {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` if that is beyond the address space.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The address `bytes` before, or `None` if there is none.
            #[must_use]
            pub const fn checked_sub(self, bytes: u64) -> Option<Self> {
                match self.0.checked_sub(bytes) {
                    Some(difference) => Some(Self(difference)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address_space!(
    /// A guest-physical address of the driver VM.
    GuestAddress
);
address_space!(
    /// A virtual address of the front-end's process (the driver VM's VMM). vhost-user names rings by it.
    UserAddress
);
address_space!(
    /// An offset in bytes from the start of the window, header included.
    WindowOffset
);
address_space!(
    /// An offset in bytes into a file that came with a message.
    FileOffset
);
