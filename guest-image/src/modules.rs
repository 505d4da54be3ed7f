//! Kernel modules: finds them, reads their dependencies from themselves, and puts them into load order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use crate::elf::module_dependencies;
use crate::error::{ImageError, at};
use crate::initramfs::Initramfs;

/// Where an image has its modules.
const MODULES_DIRECTORY: &str = "lib/modules";

/// The modules of one kernel.
///
/// Packages have no `modules.dep` (it is made when a kernel is installed), so dependencies come from the
/// modules themselves.
#[derive(Debug)]
pub struct ModuleTree {
    directory: PathBuf,
    /// By name with underscores.
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module, decompressed.
#[derive(Debug)]
struct Module {
    file_name: String,
    bytes: Vec<u8>,
}

impl ModuleTree {
    /// Reads the directory of a kernel's modules (`/lib/modules/<release>`).
    ///
    /// # Errors
    /// [`ImageError::Io`] if it or its `modules.builtin` cannot be read.
    pub fn open(directory: &Path) -> Result<Self, ImageError> {
        let list = directory.join("modules.builtin");
        let text = fs::read_to_string(&list).map_err(at(list))?;
        let builtin = text.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut files = BTreeMap::new();
        collect(&directory.join("kernel"), &mut files)?;
        Ok(Self { directory: directory.into(), files, builtin })
    }

    /// Adds modules and what they depend on to an image, decompressed, under `/lib/modules`, and their file names in load
    /// order, one per line, as the file `list`. What is built into the kernel is left out.
    ///
    /// # Errors
    /// [`ImageError::NoModule`] for an unknown one, and errors of reading and decompressing.
    pub fn add_to(&self, image: &mut Initramfs, list: &str, names: &[&str]) -> Result<Vec<String>, ImageError> {
        let mut loaded = BTreeSet::new();
        let mut modules = Vec::new();
        for name in names {
            self.visit(name, &mut loaded, &mut modules)?;
        }
        let file_names: Vec<String> = modules.iter().map(|module| module.file_name.clone()).collect();
        image.add_dir(MODULES_DIRECTORY, 0o755)?;
        for module in modules {
            image.add_file(&format!("{MODULES_DIRECTORY}/{}", module.file_name), 0o644, module.bytes)?;
        }
        let text: String = file_names.iter().flat_map(|name| [name.as_str(), "\n"]).collect();
        image.add_file(list, 0o644, text.into_bytes())?;
        Ok(file_names)
    }

    /// Depth first, dependencies before their users. Modules cannot depend on each other in a circle;
    /// `loaded` would end one.
    fn visit(&self, name: &str, loaded: &mut BTreeSet<String>, out: &mut Vec<Module>) -> Result<(), ImageError> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || !loaded.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else {
            return Err(ImageError::NoModule { module: name, directory: self.directory.clone() });
        };
        let module = read_module(path)?;
        for dependency in module_dependencies(path, &module.bytes)? {
            self.visit(&dependency, loaded, out)?;
        }
        out.push(module);
        Ok(())
    }
}

fn read_module(path: &Path) -> Result<Module, ImageError> {
    let bytes = fs::read(path).map_err(at(path))?;
    let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if file_name.ends_with(".ko") {
        return Ok(Module { file_name, bytes });
    }
    let Some(file_name) = file_name.strip_suffix(".xz").map(str::to_owned) else {
        return Err(ImageError::ModuleFormat(path.into()));
    };
    let mut plain = Vec::new();
    lzma_rs::xz_decompress(&mut Cursor::new(bytes), &mut plain)
        .map_err(|source| ImageError::Decompress { path: path.into(), source })?;
    Ok(Module { file_name, bytes: plain })
}

/// Name of a module by its file, as `depends=` writes it: without `.ko…`, with underscores.
fn module_name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ImageError> {
    for entry in fs::read_dir(directory).map_err(at(directory))? {
        let entry = entry.map_err(at(directory))?;
        let path = entry.path();
        if entry.file_type().map_err(at(&path))?.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::module_with_modinfo;

    const LIST: &str = "etc/modules.list";

    #[test]
    fn module_names_are_those_of_depends() {
        assert_eq!(module_name(Path::new("kernel/drivers/vfio/pci/vfio-pci-core.ko.xz")).unwrap(), "vfio_pci_core");
        assert_eq!(module_name(Path::new("kernel/fs/ext4/ext4.ko")).unwrap(), "ext4");
        assert_eq!(module_name(Path::new("modules.order")), None);
    }

    /// Modules as a package has them: name of the file, its `depends=`.
    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, ModuleTree) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("kernel/drivers")).unwrap();
        fs::write(directory.path().join("modules.builtin"), "kernel/drivers/virtio/virtio_pci.ko\n").unwrap();
        for (name, depends) in files {
            let plain = module_with_modinfo(format!("depends={depends}\0").as_bytes());
            let mut bytes = Vec::new();
            if name.ends_with(".xz") {
                lzma_rs::xz_compress(&mut plain.as_slice(), &mut bytes).unwrap();
            } else {
                bytes = plain;
            }
            fs::write(directory.path().join("kernel/drivers").join(name), bytes).unwrap();
        }
        let tree = ModuleTree::open(directory.path()).unwrap();
        (directory, tree)
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let (_directory, tree) = tree(&[
            ("vfio-pci.ko.xz", "vfio-pci-core,vfio"),
            ("vfio-pci-core.ko.xz", "vfio,irqbypass,virtio_pci"),
            ("vfio.ko", ""),
            ("irqbypass.ko.xz", ""),
            ("unused.ko.xz", ""),
        ]);
        let mut image = Initramfs::new();
        let list = tree.add_to(&mut image, LIST, &["vfio-pci", "vfio"]).unwrap();
        assert_eq!(list, ["vfio.ko", "irqbypass.ko", "vfio-pci-core.ko", "vfio-pci.ko"]);
        let paths: Vec<_> = image.files().into_iter().map(|file| file.path).collect();
        assert_eq!(paths.len(), list.len() + 1, "{paths:?}");
        assert!(list.iter().all(|name| image.contains(&format!("lib/modules/{name}"))));
        assert!(image.contains(LIST));
    }

    #[test]
    fn modules_that_need_each_other_end_and_other_formats_are_named() {
        let (_directory, tree) = tree(&[("a.ko", "b"), ("b.ko", "a"), ("c.ko.zst", "")]);
        assert_eq!(tree.add_to(&mut Initramfs::new(), LIST, &["a"]).unwrap(), ["b.ko", "a.ko"]);
        let refusal = tree.add_to(&mut Initramfs::new(), LIST, &["c"]).unwrap_err().to_string();
        assert!(refusal.contains("c.ko.zst: only .ko"), "{refusal}");
    }

    #[test]
    fn lists_for_different_times_share_files() {
        let (_directory, tree) = tree(&[("a.ko", "b"), ("b.ko", ""), ("c.ko", "b")]);
        let mut image = Initramfs::new();
        assert_eq!(tree.add_to(&mut image, LIST, &["a"]).unwrap(), ["b.ko", "a.ko"]);
        assert_eq!(tree.add_to(&mut image, "etc/later.list", &["c"]).unwrap(), ["b.ko", "c.ko"]);
        assert_eq!(image.files().len(), 5);
    }

    #[test]
    fn what_is_built_in_is_left_out_and_what_is_missing_is_named() {
        let (_directory, tree) = tree(&[]);
        let mut image = Initramfs::new();
        assert_eq!(tree.add_to(&mut image, LIST, &["virtio-pci"]).unwrap(), Vec::<String>::new());
        let refusal = tree.add_to(&mut image, LIST, &["vfio-pci"]).unwrap_err().to_string();
        assert!(refusal.ends_with("have no vfio_pci"), "{refusal}");
    }
}
