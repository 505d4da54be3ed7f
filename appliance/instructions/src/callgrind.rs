//! Programs under callgrind.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use vvu_setup::Extra;

/// How the C library copies memory, which it decides by the processor: as on any processor, and never past its cache
/// (glibc manual, "Hardware Capability Tunables").
const TUNABLES: &str = concat!(
    "glibc.cpu.hwcaps=-AVX2,-AVX,-AVX512F,-AVX512VL,-AVX512BW,-ERMS,-FSRM,-SSSE3,-SSE4_1,-SSE4_2,-BMI2,-BMI1,-MOVBE,-RTM",
    ",-AVX_Fast_Unaligned_Load,-Fast_Unaligned_Copy,-Fast_Copy_Backward,-Prefer_No_VZEROUPPER",
    ":glibc.cpu.x86_non_temporal_threshold=0x40000000",
);

/// Where callgrind is.
#[derive(Debug)]
pub(crate) struct Callgrind {
    tool: PathBuf,
    directory: PathBuf,
}

impl Callgrind {
    /// That of the private cache, which is fetched if it is not there.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let root = Extra::Valgrind.root().context("valgrind cannot be provided")?;
        let places = ["usr/libexec/valgrind", "usr/lib/valgrind", "usr/lib/x86_64-linux-gnu/valgrind"];
        let tool = |place: &str| root.join(place).join("callgrind-amd64-linux");
        let place = places.into_iter().find(|place| tool(place).is_file()).context("valgrind has no callgrind")?;
        Ok(Self { tool: tool(place), directory: root.join(place) })
    }

    /// A command that says which version it is.
    pub(crate) fn version(&self) -> Command {
        let mut command = self.tool();
        command.arg("--version");
        command
    }

    fn tool(&self) -> Command {
        // The tool is a static program of its own: started without valgrind's launcher, it needs no library of its system.
        let mut command = Command::new(&self.tool);
        command.env("VALGRIND_LIB", &self.directory).env("VALGRIND_LAUNCHER", &self.tool).env_remove("VALGRIND_OPTS");
        command.arg("--tool=callgrind");
        command
    }

    /// A command that runs `program` and leaves what was counted in `output`. The program must be linked statically: nothing is
    /// put into it.
    pub(crate) fn command(&self, program: &Path, output: &Path) -> Command {
        let mut command = self.tool();
        command.env("GLIBC_TUNABLES", TUNABLES);
        // Without a debugger's door nobody else can wake the threads.
        command.args(["--vgdb=no", "--quiet", "--compress-strings=no", "--compress-pos=no"]);
        command.arg(format!("--callgrind-out-file={}", output.display())).arg("--").arg(program);
        command
    }
}
