//! What can be lost behind a driver VM's disk while it is in use, how it is taken away, and how long until it is back.

use std::fmt;

use anyhow::Result;
use rustix::process::Signal;

use crate::vvu_run::VvuRun;

/// Options with which `vvu run` must have been started: SysRq works in the appliance VM, and losses are repaired at once as
/// often as they come.
pub const OPTIONS: [&str; 4] = ["--append", "sysrq_always_enabled", "--restart-limit", "1000/1"];

/// A part that is taken away without a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// The back-end process in the appliance VM is killed, as its kernel would do that is out of memory.
    BackEnd,
    /// The appliance VM's kernel panics.
    AppliancePanic,
    /// The appliance VM's QEMU is killed with SIGKILL.
    Appliance,
    /// The bridge is killed with SIGKILL; the appliance VM goes with it.
    Bridge,
}

impl Loss {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::BackEnd, Self::AppliancePanic, Self::Appliance, Self::Bridge];

    /// Takes the part away and returns at once.
    ///
    /// # Errors
    /// If it is not there.
    pub fn strike(self, run: &mut VvuRun) -> Result<()> {
        run.forget_events();
        match self {
            // Kill all processes but PID 1.
            Self::BackEnd => run.press_sysrq('i'),
            // Crash.
            Self::AppliancePanic => run.press_sysrq('c'),
            Self::Appliance => run.appliance().signal(Signal::KILL),
            Self::Bridge => run.bridge().signal(Signal::KILL),
        }
    }

    /// Waits until `vvu` says that it is there again. The driver VM may need a moment more.
    ///
    /// # Errors
    /// If it does not come back.
    pub fn await_repair(self, run: &mut VvuRun) -> Result<()> {
        match self {
            Self::BackEnd => run.await_resumed().map(drop),
            Self::AppliancePanic | Self::Appliance | Self::Bridge => run.await_restarted(),
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BackEnd => "back-end process killed",
            Self::AppliancePanic => "appliance kernel panics",
            Self::Appliance => "appliance killed",
            Self::Bridge => "bridge killed",
        })
    }
}
