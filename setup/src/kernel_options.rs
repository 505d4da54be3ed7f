//! What a kernel's configuration says, held against what was wanted of it.
//!
//! The kernel's own configuration passes silently over an option that it does not know, or whose conditions do not hold.

use std::collections::BTreeMap;

/// An option that is off, as a `.config` writes it behind its name.
const OFF: &str = " is not set";

/// The lines of `wanted` that do not hold in `made`, both in the form of a `.config`. An option that is not in `made` at all is off.
pub(crate) fn unmet(wanted: &str, made: &str) -> Vec<String> {
    let made: BTreeMap<&str, &str> = made.lines().filter_map(parse).collect();
    let is_met = |line: &&str| match parse(line) {
        Some((name, value)) => made.get(name).copied().unwrap_or("n") == value,
        None => true,
    };
    wanted.lines().map(str::trim).filter(|line| !is_met(line)).map(str::to_owned).collect()
}

/// Name and value of an option in a line: `CONFIG_X=y`, or `# CONFIG_X is not set`, which is `n`.
fn parse(line: &str) -> Option<(&str, &str)> {
    match line.strip_prefix("# ").and_then(|comment| comment.strip_suffix(OFF)) {
        Some(name) => Some((name, "n")),
        None => line.split_once('=').filter(|_| line.starts_with("CONFIG_")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MADE: &str = "#\n# Automatically generated\n#\nCONFIG_SMP=y\nCONFIG_DAX=m\nCONFIG_LSM=\"landlock\"\n# CONFIG_VT is not set\n";

    #[test]
    fn what_holds_is_passed_over() {
        let wanted = "# a reason\nCONFIG_SMP=y\nCONFIG_DAX=m\n\nCONFIG_LSM=\"landlock\"\n# CONFIG_VT is not set\n# CONFIG_GONE is not set\n";
        assert_eq!(unmet(wanted, MADE), Vec::<String>::new());
    }

    #[test]
    fn what_does_not_hold_is_named_as_it_was_wanted() {
        let wanted = "CONFIG_DAX=y\nCONFIG_VFIO=y\n# CONFIG_SMP is not set\nCONFIG_VT=y\n";
        assert_eq!(unmet(wanted, MADE), ["CONFIG_DAX=y", "CONFIG_VFIO=y", "# CONFIG_SMP is not set", "CONFIG_VT=y"]);
    }
}
