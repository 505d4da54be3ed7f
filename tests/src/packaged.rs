//! Programs of distribution packages, run on the host out of the private root that they were unpacked in.

use std::path::Path;
use std::process::Command;

use crate::process::command_that_dies_with_us;

/// A root's dynamic loader and the directories of its libraries.
const LOADER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// A command that runs the program at `path` of a root ([`vvu_setup::Extra::root`]) with that root's loader and libraries.
/// What the root does not have is expected to be installed (the root may be the system itself).
pub fn command(root: &Path, path: &str) -> Command {
    let program = root.join(path);
    if root == Path::new("/") || !program.exists() {
        return command_that_dies_with_us(Path::new(path).file_name().unwrap_or_default());
    }
    let libraries = LIBRARIES.map(|directory| root.join(directory).display().to_string()).join(":");
    let mut command = command_that_dies_with_us(root.join(LOADER));
    command.args(["--inhibit-cache", "--library-path", &libraries]).arg(program);
    command
}
