//! Which packages are unpacked, from which suites, into which private root.

use sha2::{Digest, Sha256};

use crate::apt::Selection;

/// The release that has the appliance's kernel and, in its backports, a QEMU of the appliance's needs.
const APPLIANCE_SUITE: &str = "trixie";
const APPLIANCE_BACKPORTS: &str = "trixie-backports";

/// The release after that one.
const NEXT_SUITE: &str = "forky";

/// Counts changes in how roots are unpacked that their packages do not show.
const LAYOUT: u32 = 2;

/// One private root.
#[derive(Debug)]
pub(crate) struct Step {
    /// First part of the root's directory name.
    pub(crate) name: &'static str,
    /// What it is, for messages.
    pub(crate) what: &'static str,
    /// Suites that its apt knows.
    pub(crate) suites: Vec<String>,
    /// What is fetched.
    pub(crate) wanted: Wanted,
}

/// What a step fetches.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// Packages with their dependencies.
    Packages(Selection),
    /// The one package that a meta-package depends on, alone.
    DependencyOf(&'static str),
}

impl Step {
    /// Stock kernel of the stable release with its modules. Its other dependencies build an initramfs
    /// on an installed system.
    pub(crate) fn kernel() -> Self {
        Self {
            name: "kernel",
            what: "kernel",
            suites: appliance_suites(),
            wanted: Wanted::DependencyOf("linux-image-cloud-amd64"),
        }
    }

    /// Source of the stock kernel, as one archive in a package.
    pub(crate) fn kernel_source() -> Self {
        Self {
            name: "kernel-source",
            what: "kernel source",
            suites: appliance_suites(),
            wanted: Wanted::DependencyOf("linux-source"),
        }
    }

    /// What builds a kernel beside a C compiler, of the machine's own release: the library is linked with the machine's.
    pub(crate) fn kernel_tools(codename: &str) -> Self {
        let packages = ["bc", "bison", "flex", "libelf-dev", "m4", "make", "xz-utils"];
        Self::packages("kernel-tools", "tools that build kernels", vec![codename.into()], codename, &packages)
    }

    /// QEMU with the three devices of the device set, and its tools.
    pub(crate) fn qemu() -> Self {
        let packages = ["qemu-system-x86", "qemu-utils"];
        Self::packages("qemu", "QEMU", appliance_suites(), APPLIANCE_BACKPORTS, &packages)
    }

    /// QEMU of the machine's own release.
    pub(crate) fn qemu_distribution(codename: &str) -> Self {
        let suites = if codename == APPLIANCE_SUITE { appliance_suites() } else { vec![codename.into()] };
        Self::packages("qemu-distribution", "the distribution's QEMU", suites, codename, &["qemu-system-x86"])
    }

    /// Programs of the driver VM.
    pub(crate) fn driver() -> Self {
        let packages = ["busybox-static", "e2fsprogs", "fio", "util-linux"];
        Self::packages("driver", "programs of the driver VM", appliance_suites(), APPLIANCE_SUITE, &packages)
    }

    /// Packages of the stable release that only those who ask for them need.
    pub(crate) fn extra(name: &'static str, what: &'static str, packages: &[&str]) -> Self {
        Self::packages(name, what, appliance_suites(), APPLIANCE_SUITE, packages)
    }

    /// Packages that only the next release has, with its libraries.
    pub(crate) fn next_release(name: &'static str, what: &'static str, packages: &[&str]) -> Self {
        Self::packages(name, what, vec![NEXT_SUITE.into()], NEXT_SUITE, packages)
    }

    fn packages(name: &'static str, what: &'static str, suites: Vec<String>, target: &str, names: &[&str]) -> Self {
        let packages = names.iter().map(|name| (*name).to_owned()).collect();
        let selection = Selection::WithDependencies { target: target.into(), packages };
        Self { name, what, suites, wanted: Wanted::Packages(selection) }
    }

    /// Name of the root's directory: another recipe has another name.
    pub(crate) fn directory_name(&self) -> String {
        format!("{}-{}", self.name, hash_of(&format!("{LAYOUT} {self:?}")))
    }
}

fn appliance_suites() -> Vec<String> {
    vec![APPLIANCE_SUITE.into(), APPLIANCE_BACKPORTS.into()]
}

/// Tells one version of the steps from another.
pub(crate) fn recipe() -> String {
    let steps = [Step::kernel(), Step::qemu(), Step::qemu_distribution("own"), Step::driver()];
    hash_of(&steps.iter().map(Step::directory_name).collect::<String>())
}

/// First 32 bits of a hash: tells a handful of recipes apart.
pub(crate) fn hash_of(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_recipe_has_another_directory() {
        let names = [Step::kernel(), Step::qemu(), Step::driver(), Step::qemu_distribution("bookworm")]
            .map(|step| step.directory_name());
        assert!(names[0].starts_with("kernel-") && names[0].len() == "kernel-".len() + 8);
        assert_ne!(names[3], Step::qemu_distribution("trixie").directory_name());
        assert_eq!(names[3], Step::qemu_distribution("bookworm").directory_name());
    }

    #[test]
    fn an_older_release_gets_its_own_qemu_and_trixie_not_the_backport() {
        let target = |codename| match Step::qemu_distribution(codename).wanted {
            Wanted::Packages(Selection::WithDependencies { target, .. }) => target,
            other => panic!("{other:?}"),
        };
        assert_eq!(target("bookworm"), "bookworm");
        assert_eq!(target("trixie"), "trixie");
    }
}
