//! Who a program is: one user of the appliance, or the root of a user namespace with many.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::user_namespace;

/// The ids that a program has and no other program has: of users and of groups alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// One user without any rights.
    Plain {
        /// Its id, and that of its group.
        id: u32,
    },
    /// Root of a user namespace ([`user_namespace`]).
    NamespaceRoot {
        /// What its ids 0 to `count - 1` are outside: `first`, `first + 1`, and so on.
        first: u32,
        /// Number of its ids.
        count: u32,
    },
}

impl User {
    /// The id that it begins with, as the agent sees it.
    #[must_use]
    pub const fn id(self) -> u32 {
        match self {
            Self::Plain { id } => id,
            Self::NamespaceRoot { first, .. } => first,
        }
    }

    /// Whether a process with this id, as the agent sees it, belongs to it.
    #[must_use]
    pub fn has(self, id: u32) -> bool {
        match self {
            Self::Plain { id: own } => own == id,
            Self::NamespaceRoot { first, count } => id.checked_sub(first).is_some_and(|inside| inside < count),
        }
    }

    /// Has the next program that `command` starts run as this. What else is to be done before a program begins
    /// must be added later.
    ///
    /// # Errors
    /// If the system lacks resources.
    pub fn apply(self, command: &mut Command) -> io::Result<()> {
        match self {
            Self::Plain { id } => {
                // Setting the user also clears the supplementary groups.
                command.uid(id).gid(id);
                Ok(())
            }
            Self::NamespaceRoot { first, count } => user_namespace::apply(command, first, count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_its_own_ids_only() {
        let root = User::NamespaceRoot { first: 100_000, count: 65_536 };
        assert_eq!([99_999, 100_000, 165_535, 165_536, 0].map(|id| root.has(id)), [false, true, true, false, false]);
        let plain = User::Plain { id: 1000 };
        assert_eq!([999, 1000, 1001].map(|id| plain.has(id)), [false, true, false]);
        assert_eq!((root.id(), plain.id()), (100_000, 1000));
    }
}
