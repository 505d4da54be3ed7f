//! Why an image cannot be built.

use std::io;
use std::path::PathBuf;

use vvu_setup::SetupError;

use crate::kernel::KernelError;

/// Why an image cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file system refuses.
    #[error("cannot access {}", path.display())]
    Io {
        /// The file or directory in question.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A path inside an image is absolute, empty or has `.` or `..` in it.
    #[error("{0:?} is no path inside an image")]
    Path(String),
    /// Two recipes put different things at the same place.
    #[error("{0} is in the image already, with other content")]
    Duplicate(String),
    /// A device node was to be made in a directory.
    #[error("{0} is a device node, which a directory of programs does not have")]
    Node(String),
    /// A file is larger than a newc archive can say.
    #[error("{path} has {bytes} bytes, an initramfs holds files below 4 GiB")]
    TooLarge {
        /// Path inside the image.
        path: String,
        /// Its size.
        bytes: usize,
    },
    /// The kernel has no such module, neither built in nor as a file.
    #[error("kernel modules in {} have no {module}", directory.display())]
    NoModule {
        /// Name of the module.
        module: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A module is compressed in a way that is not known here.
    #[error("{}: only .ko and .ko.xz are read", .0.display())]
    ModuleFormat(PathBuf),
    /// A compressed module is damaged.
    #[error("{} cannot be decompressed", path.display())]
    Decompress {
        /// The module.
        path: PathBuf,
        /// What the decoder says.
        source: lzma_rs::error::Error,
    },
    /// The kernel cannot be given to QEMU unpacked.
    #[error("cannot unpack the kernel {}: {source}; name another one to `cargo xtask setup --kernel`", path.display())]
    Kernel {
        /// The kernel image.
        path: PathBuf,
        /// What is wrong with it.
        source: KernelError,
    },
    /// The kernel is not there and cannot be had.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A program, library or module is no 64-bit ELF file, or a damaged one.
    #[error("{} is not a readable ELF file", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        source: object::read::Error,
    },
    /// A program or library is not in a root.
    #[error("{name} is not in {}", root.display())]
    NotInRoot {
        /// Program or library.
        name: String,
        /// Where it was looked for.
        root: PathBuf,
    },
    /// `cargo build` could not be started.
    #[error("cannot start cargo")]
    Cargo(#[source] io::Error),
    /// `cargo build` failed; it has said why on standard error.
    #[error("cargo could not build the appliance's programs")]
    Build,
    /// A manifest could not be written as JSON.
    #[error("cannot write the manifest")]
    Manifest(#[from] serde_json::Error),
}

/// Names the path in an error of the file system.
pub(crate) fn at(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.into();
    move |source| ImageError::Io { path, source }
}
