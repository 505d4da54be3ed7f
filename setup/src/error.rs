//! Why there is no usable set-up. Each text that a person can act on names the remedy.

use std::io;
use std::path::PathBuf;

/// Why a set-up cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Neither `VVU_CACHE` nor `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("no place for the cache: set VVU_CACHE to a directory")]
    NoCacheRoot,
    /// There is no record in the cache.
    #[error("{} is missing: run `cargo xtask setup`", .0.display())]
    Missing(PathBuf),
    /// The record names something that is gone.
    #[error("the set-up's {part} is gone ({}): run `cargo xtask setup`", path.display())]
    Gone {
        /// Field of [`Setup`](crate::Setup).
        part: &'static str,
        /// Where it should have been.
        path: PathBuf,
    },
    /// The record is of another version of this crate, or damaged.
    #[error("{} cannot be read: run `cargo xtask setup`", path.display())]
    Unreadable {
        /// The record.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// The record was made by another version of this crate, which unpacked other things.
    #[error("{} is of another version: run `cargo xtask setup`", .0.display())]
    Outdated(PathBuf),
    /// The file system refuses.
    #[error("cannot access {}", path.display())]
    Io {
        /// The file or directory in question.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The machine is no Debian, and no replacement was named.
    #[error(
        "this system is no Debian 12 or 13 on x86-64 ({why}): name a QEMU 11 or later and a kernel with \
         `cargo xtask setup --qemu PATH --kernel PATH [--modules DIR]`"
    )]
    Unsupported {
        /// What is missing or different.
        why: String,
    },
    /// The machine's apt configuration has no entry for the Debian archive.
    #[error(
        "no entry for Debian {codename} (main) in /etc/apt/sources.list or /etc/apt/sources.list.d: add one, \
         its mirror also serves what the set-up needs"
    )]
    NoMirror {
        /// The machine's own release.
        codename: String,
    },
    /// A program that would be unpacked on a Debian is not on this (foreign) system.
    #[error("{0} is not on this system: install it (busybox must be static)")]
    NoProgram(&'static str),
    /// A program could not be started.
    #[error("cannot start {program}")]
    Start {
        /// As it was called.
        program: String,
        /// What the system says.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status}):\n{output}")]
    Failed {
        /// As it was called, with its arguments.
        program: String,
        /// Exit code or signal.
        status: std::process::ExitStatus,
        /// All that it wrote.
        output: String,
    },
    /// A QEMU is too old, or says something else than its version.
    #[error("{} is {found}, but QEMU 11 or later is needed: name another one with --qemu PATH", path.display())]
    QemuVersion {
        /// The program.
        path: PathBuf,
        /// First line of its answer to `--version`.
        found: String,
    },
    /// A QEMU was built without a device of the device set.
    #[error("{} lacks the device {device}: name another QEMU with --qemu PATH", path.display())]
    QemuDevice {
        /// The program.
        path: PathBuf,
        /// Device that its `-device help` does not list.
        device: &'static str,
    },
    /// A file is no x86 kernel image.
    #[error("{} is no bzImage with a version in it: name another kernel with --kernel PATH", .0.display())]
    Kernel(PathBuf),
    /// There are no modules for a kernel.
    #[error("no modules of kernel {release} found: name their directory with --modules DIR")]
    Modules {
        /// The kernel's release.
        release: String,
    },
    /// There is nothing to build a kernel of.
    #[error(
        "a kernel is built out of Debian's source package, and this system is no Debian 12 or 13 on x86-64 ({why})"
    )]
    NoKernelSource {
        /// What is missing or different.
        why: String,
    },
    /// A kernel's configuration is not what was wanted.
    #[error(
        "the kernel cannot be built with all of its options ({unmet}): the source has other options or conditions, or the \
         compiler cannot do what one of them needs"
    )]
    KernelOptions {
        /// The lines that do not hold.
        unmet: String,
    },
    /// A package has none of the files that it was fetched for.
    #[error("the unpacked packages have no {what} in {}: remove that directory and run `cargo xtask setup`", root.display())]
    Incomplete {
        /// What was looked for.
        what: String,
        /// Where it should have been.
        root: PathBuf,
    },
}

/// Names the path in an error of the file system.
pub(crate) fn at(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> SetupError {
    let path = path.into();
    move |source| SetupError::Io { path, source }
}
