//! How the appliance VM is run: by KVM where the machine can, else by TCG.
//!
//! That `/dev/kvm` opens is not enough: a host may offer the node (and even create a VM) although its CPUs show neither
//! VMX nor SVM, and then a stock guest kernel crawls or dies. So the node is opened *and* the CPU's flags are read.

use std::fs::OpenOptions;
use std::io;

use serde::Serialize;

/// What the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AccelChoice {
    /// KVM, or refuse to start.
    Kvm,
    /// Emulation, even where KVM is there.
    Tcg,
    /// KVM where it is usable, else emulation.
    Auto,
}

/// What QEMU is started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator, one thread per vCPU.
    Tcg,
}

/// What this host's KVM is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KvmState {
    /// The node opens and the CPU has VMX or SVM.
    Usable,
    /// There is no `/dev/kvm`.
    NoNode,
    /// The node exists, this user may not open it.
    NoPermission,
    /// The node opens, the CPU shows neither VMX nor SVM.
    NoCpuSupport,
    /// Opening failed in another way; the text is the system's.
    Broken(String),
}

impl KvmState {
    /// Looks at this host.
    pub(crate) fn of_this_host() -> Self {
        let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop);
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::judge(opened, &cpuinfo)
    }

    /// Judges the result of opening `/dev/kvm` and the text of `/proc/cpuinfo`.
    fn judge(opened: io::Result<()>, cpuinfo: &str) -> Self {
        match opened {
            Ok(()) if has_virtualisation(cpuinfo) => Self::Usable,
            Ok(()) => Self::NoCpuSupport,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => Self::NoNode,
                io::ErrorKind::PermissionDenied => Self::NoPermission,
                _ => Self::Broken(error.to_string()),
            },
        }
    }

    /// What was found, as a short clause.
    pub(crate) fn finding(&self) -> String {
        match self {
            Self::Usable => "/dev/kvm opens and the CPU has VMX or SVM".to_owned(),
            Self::NoNode => "there is no /dev/kvm".to_owned(),
            Self::NoPermission => "/dev/kvm may not be opened by this user".to_owned(),
            Self::NoCpuSupport => "/dev/kvm opens, but the CPU shows neither vmx nor svm".to_owned(),
            Self::Broken(text) => format!("/dev/kvm does not open: {text}"),
        }
    }

    /// What would make KVM usable; `None` if it is.
    pub(crate) fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Usable => None,
            Self::NoNode => Some("load kvm_intel or kvm_amd and enable virtualisation in the firmware"),
            Self::NoPermission => Some("add this user to the group that owns /dev/kvm (usually kvm)"),
            Self::NoCpuSupport => Some("enable nested virtualisation for this machine, or accept TCG"),
            Self::Broken(_) => Some("see the kernel's log for kvm"),
        }
    }
}

/// Whether a CPU's flags name VMX (Intel) or SVM (AMD).
fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// KVM was asked for where it cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("--accel kvm: {finding}; {remedy}, or use --accel auto")]
pub(crate) struct KvmUnusable {
    finding: String,
    remedy: &'static str,
}

/// Chooses the accelerator and says why.
///
/// # Errors
/// [`KvmUnusable`] if KVM was demanded and is not usable.
pub(crate) fn choose(choice: AccelChoice, kvm: &KvmState) -> Result<(Accel, String), KvmUnusable> {
    match (choice, kvm) {
        (AccelChoice::Tcg, _) => Ok((Accel::Tcg, "--accel tcg".to_owned())),
        (_, KvmState::Usable) => Ok((Accel::Kvm, kvm.finding())),
        (AccelChoice::Auto, _) => Ok((Accel::Tcg, kvm.finding())),
        (AccelChoice::Kvm, _) => {
            Err(KvmUnusable { finding: kvm.finding(), remedy: kvm.remedy().unwrap_or("see vvu check") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH_VMX: &str = "processor\t: 0\nflags\t\t: fpu vme vmx sse2\n";
    const WITHOUT: &str = "processor\t: 0\nflags\t\t: fpu vme sse2 vmxish\nbugs\t\t: svm\nvmx flags\t: vnmi vmx\n";

    #[test]
    fn kvm_needs_both_the_node_and_the_cpu() {
        assert_eq!(KvmState::judge(Ok(()), WITH_VMX), KvmState::Usable);
        assert_eq!(KvmState::judge(Ok(()), WITHOUT), KvmState::NoCpuSupport);
        assert_eq!(KvmState::judge(Err(io::ErrorKind::NotFound.into()), WITH_VMX), KvmState::NoNode);
        assert_eq!(KvmState::judge(Err(io::ErrorKind::PermissionDenied.into()), WITH_VMX), KvmState::NoPermission);
        let busy = KvmState::judge(Err(io::Error::from_raw_os_error(16)), WITH_VMX);
        assert!(matches!(busy, KvmState::Broken(text) if text.contains("busy")));
    }

    #[test]
    fn auto_falls_back_and_kvm_refuses() {
        assert_eq!(choose(AccelChoice::Auto, &KvmState::Usable).unwrap().0, Accel::Kvm);
        assert_eq!(choose(AccelChoice::Tcg, &KvmState::Usable).unwrap().0, Accel::Tcg);
        let (accel, reason) = choose(AccelChoice::Auto, &KvmState::NoNode).unwrap();
        assert_eq!((accel, reason.as_str()), (Accel::Tcg, "there is no /dev/kvm"));
        let refusal = choose(AccelChoice::Kvm, &KvmState::NoPermission).unwrap_err().to_string();
        assert!(refusal.contains("group") && refusal.contains("--accel auto"), "{refusal}");
    }

    #[test]
    fn every_state_but_usable_has_a_remedy() {
        let states =
            [KvmState::NoNode, KvmState::NoPermission, KvmState::NoCpuSupport, KvmState::Broken("busy".into())];
        assert!(states.iter().all(|state| state.remedy().is_some()));
        assert_eq!(KvmState::Usable.remedy(), None);
    }
}
