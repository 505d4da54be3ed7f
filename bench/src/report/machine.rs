//! On what something was measured.

use std::{fmt, fs, thread};

use rustix::system::uname;
use serde::Serialize;

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Model of the processor, as the kernel has it.
    pub processor: String,
    /// Processors that may be used.
    pub cores: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Whether it is a virtual machine itself.
    pub is_virtual: bool,
    /// Whether its machines can run with KVM; else they run under TCG.
    pub kvm: bool,
}

impl Machine {
    /// The one that this runs on. A device for KVM may be there where the processor has no such mode.
    #[must_use]
    pub fn this_one() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
        };
        let flags = field("flags").unwrap_or_default();
        let has = |names: &[&str]| flags.split(' ').any(|flag| names.contains(&flag));
        Self {
            processor: field("model name").unwrap_or_else(|| "unknown processor".to_owned()),
            cores: thread::available_parallelism().map_or(1, usize::from),
            kernel: uname().release().to_string_lossy().into_owned(),
            is_virtual: has(&["hypervisor"]),
            kvm: has(&["vmx", "svm"]) && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_virtual { "a virtual machine" } else { "hardware" };
        let kvm = if self.kvm { "KVM" } else { "no KVM (virtual machines under TCG)" };
        write!(f, "{kind}, {} cores of {}, Linux {}, {kvm}", self.cores, self.processor, self.kernel)
    }
}
