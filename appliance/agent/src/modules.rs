//! Loading the kernel's modules, in an order that the device set needs.
//!
//! The image lists its modules with dependencies first. They are loaded in [`Stage`]s, since a driver that looks at the
//! window before its header is there would take it for plain memory: the window's device comes up first, then the bridge
//! maps the header, then come the drivers that read it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::system::finit_module;

/// When a module is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// At boot.
    Boot,
    /// When the control devices are up: the devices of the windows, which lets the bridges map the windows' headers.
    Window,
    /// When the headers of all windows are mapped.
    Dax,
}

/// Modules that are not for [`Stage::Boot`], with `_` for `-`.
const STAGES: [(&str, Stage); 8] = [
    ("libnvdimm", Stage::Window),
    ("nd_virtio", Stage::Window),
    ("virtio_pmem", Stage::Window),
    ("nd_btt", Stage::Dax),
    ("nd_pmem", Stage::Dax),
    ("dax", Stage::Dax),
    ("device_dax", Stage::Dax),
    ("dax_pmem", Stage::Dax),
];

/// Why a module is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// A file of the image cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The list names something that is no file name.
    #[error("'{name}' in the list of modules is not the file name of a module")]
    Name {
        /// Text that came.
        name: String,
    },
    /// The kernel refuses the module.
    #[error("kernel refuses module {name}")]
    Load {
        /// File name of the module.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// The modules of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modules {
    directory: PathBuf,
    names: Vec<String>,
}

impl Modules {
    /// Reads the list of modules: one file name of `directory` a line, dependencies first.
    ///
    /// # Errors
    /// [`ModuleError::Read`] or [`ModuleError::Name`].
    pub fn read(list: &Path, directory: &Path) -> Result<Self, ModuleError> {
        let text = fs::read_to_string(list).map_err(|source| ModuleError::Read { path: list.to_owned(), source })?;
        let names = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|name| {
            let is_name = name.ends_with(".ko") && !name.contains('/');
            if is_name { Ok(name.to_owned()) } else { Err(ModuleError::Name { name: name.to_owned() }) }
        });
        Ok(Self { directory: directory.to_owned(), names: names.collect::<Result<_, _>>()? })
    }

    /// Loads all modules of a stage; one that is there already counts as loaded.
    ///
    /// # Errors
    /// [`ModuleError`].
    pub fn load(&self, stage: Stage) -> Result<(), ModuleError> {
        for name in self.of_stage(stage) {
            let path = self.directory.join(name);
            let file = File::open(&path).map_err(|source| ModuleError::Read { path, source })?;
            match finit_module(&file, &CString::default(), 0) {
                Ok(()) | Err(Errno::EXIST) => tracing::debug!(name, "module is loaded"),
                Err(errno) => return Err(ModuleError::Load { name: name.to_owned(), source: errno.into() }),
            }
        }
        Ok(())
    }

    fn of_stage(&self, stage: Stage) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str).filter(move |name| stage_of(name) == stage)
    }
}

fn stage_of(file_name: &str) -> Stage {
    let module = file_name.trim_end_matches(".ko").replace('-', "_");
    STAGES.iter().find(|(name, _)| *name == module).map_or(Stage::Boot, |(_, stage)| *stage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(text: &str) -> Result<Modules, ModuleError> {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("modules.list");
        fs::write(&list, text).unwrap();
        Modules::read(&list, Path::new("/nowhere"))
    }

    #[test]
    fn stages_keep_the_order_of_the_list() {
        let list = "vfio.ko\nlibnvdimm.ko\nnd_btt.ko\nnd-pmem.ko\n\nvirtio_pmem.ko\nvfio-pci.ko\ndevice_dax.ko\n";
        let modules = modules(list).unwrap();
        let of = |stage| modules.of_stage(stage).collect::<Vec<_>>();
        assert_eq!(of(Stage::Boot), ["vfio.ko", "vfio-pci.ko"]);
        assert_eq!(of(Stage::Window), ["libnvdimm.ko", "virtio_pmem.ko"]);
        assert_eq!(of(Stage::Dax), ["nd_btt.ko", "nd-pmem.ko", "device_dax.ko"]);
    }

    #[test]
    fn other_lines_are_refused() {
        for list in ["../vfio.ko", "vfio.ko.xz", "vfio"] {
            assert!(matches!(modules(list), Err(ModuleError::Name { .. })), "{list}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = modules("vfio.ko").unwrap().load(Stage::Boot).unwrap_err().to_string();
        assert!(error.contains("/nowhere/vfio.ko"), "{error}");
    }
}
