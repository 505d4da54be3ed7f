//! What a finished set-up leaves behind: one JSON document that says where everything is.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use serde::{Deserialize, Serialize};

use crate::SetupError;
use crate::error::at;
use crate::step::recipe;

/// Name of the document inside the cache root.
const RECORD_FILE: &str = "setup.json";

/// Where the parts of a finished set-up are. Every program can be executed as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// `qemu-system-x86_64`, version 11 or later: runs the appliance VM and most driver VMs.
    pub qemu: PathBuf,
    /// `qemu-system-x86_64` of the machine's own distribution release: an older driver VMM.
    pub qemu_distribution: PathBuf,
    /// Kernel image (bzImage) of appliance and driver VMs.
    pub kernel: PathBuf,
    /// Directory of that kernel's modules, with `modules.dep` and `modules.builtin` in it.
    pub modules: PathBuf,
    /// What `uname -r` says under that kernel, for instance `6.12.1+deb13-cloud-amd64`.
    pub kernel_release: String,
    /// Root directory of unpacked packages from which the driver VM's initramfs is made.
    pub driver_root: PathBuf,
    /// `qemu-img`, of the release of [`Setup::qemu`].
    pub qemu_img: PathBuf,
    /// `qemu-io`, of the release of [`Setup::qemu`].
    pub qemu_io: PathBuf,
    /// `qemu-storage-daemon`, of the release of [`Setup::qemu`]: the peer to compare with.
    pub qemu_storage_daemon: PathBuf,
    /// `debugfs` of e2fsprogs: reads an ext4 image on the host without mounting it.
    pub debugfs: PathBuf,
    /// Hash of what this version of the crate unpacks; a record with another one is outdated.
    pub recipe: String,
}

/// The cache's root directory: `$VVU_CACHE`, else `$XDG_CACHE_HOME/vvu`, else `$HOME/.cache/vvu`.
///
/// # Errors
/// [`SetupError::NoCacheRoot`] if none of the three variables is set.
pub fn cache_root() -> Result<PathBuf, SetupError> {
    cache_root_from(|name| env::var_os(name).filter(|value| !value.is_empty())).ok_or(SetupError::NoCacheRoot)
}

fn cache_root_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(root) = variable("VVU_CACHE") {
        return Some(root.into());
    }
    if let Some(cache) = variable("XDG_CACHE_HOME") {
        return Some(Path::new(&cache).join("vvu"));
    }
    variable("HOME").map(|home| Path::new(&home).join(".cache/vvu"))
}

impl Setup {
    /// Reads the record of the last set-up and checks that all that it names is still there.
    ///
    /// # Errors
    /// Any [`SetupError`]; each text names the remedy.
    pub fn load() -> Result<Self, SetupError> {
        Self::load_from(&cache_root()?)
    }

    /// As [`Setup::load`], from the given cache root.
    ///
    /// # Errors
    /// Any [`SetupError`] but [`SetupError::NoCacheRoot`].
    pub fn load_from(cache_root: &Path) -> Result<Self, SetupError> {
        let path = cache_root.join(RECORD_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(SetupError::Missing(path)),
            Err(source) => return Err(SetupError::Io { path, source }),
        };
        let setup: Self =
            serde_json::from_slice(&text).map_err(|source| SetupError::Unreadable { path: path.clone(), source })?;
        if setup.recipe != recipe() {
            return Err(SetupError::Outdated(path));
        }
        for (part, path) in setup.parts() {
            if !path.exists() {
                return Err(SetupError::Gone { part, path: path.to_owned() });
            }
        }
        Ok(setup)
    }

    /// Writes the record into the given cache root, whole or not at all.
    ///
    /// # Errors
    /// [`SetupError::Io`] if the file system refuses.
    pub fn save_to(&self, cache_root: &Path) -> Result<(), SetupError> {
        let path = cache_root.join(RECORD_FILE);
        let fresh = cache_root.join("setup.json.new");
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|source| SetupError::Unreadable { path: path.clone(), source })?;
        text.push(b'\n');
        fs::write(&fresh, text).map_err(at(&fresh))?;
        fs::rename(&fresh, &path).map_err(at(&path))
    }

    fn parts(&self) -> [(&'static str, &Path); 9] {
        [
            ("qemu", &self.qemu),
            ("qemu_distribution", &self.qemu_distribution),
            ("kernel", &self.kernel),
            ("modules", &self.modules),
            ("driver_root", &self.driver_root),
            ("qemu_img", &self.qemu_img),
            ("qemu_io", &self.qemu_io),
            ("qemu_storage_daemon", &self.qemu_storage_daemon),
            ("debugfs", &self.debugfs),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup_in(root: &Path) -> Setup {
        let part = |name: &str| {
            let path = root.join(name);
            fs::write(&path, name).unwrap();
            path
        };
        Setup {
            qemu: part("qemu"),
            qemu_distribution: part("qemu-distribution"),
            kernel: part("vmlinuz"),
            modules: part("modules"),
            kernel_release: "6.12.0-test".into(),
            driver_root: part("driver"),
            qemu_img: part("qemu-img"),
            qemu_io: part("qemu-io"),
            qemu_storage_daemon: part("qemu-storage-daemon"),
            debugfs: part("debugfs"),
            recipe: recipe(),
        }
    }

    #[test]
    fn a_saved_record_is_loaded_again() {
        let cache = tempfile::tempdir().unwrap();
        let setup = setup_in(cache.path());
        setup.save_to(cache.path()).unwrap();
        assert_eq!(Setup::load_from(cache.path()).unwrap(), setup);
    }

    #[test]
    fn every_refusal_names_the_remedy() {
        let cache = tempfile::tempdir().unwrap();
        let refusal = || Setup::load_from(cache.path()).unwrap_err().to_string();
        assert!(refusal().ends_with("setup.json is missing: run `cargo xtask setup`"));

        setup_in(cache.path()).save_to(cache.path()).unwrap();
        fs::remove_file(cache.path().join("qemu-io")).unwrap();
        assert!(refusal().contains("qemu_io is gone"));
        assert!(refusal().ends_with("run `cargo xtask setup`"));

        Setup { recipe: "old".into(), ..setup_in(cache.path()) }.save_to(cache.path()).unwrap();
        assert!(refusal().ends_with("is of another version: run `cargo xtask setup`"));

        fs::write(cache.path().join("setup.json"), "{}").unwrap();
        assert!(refusal().ends_with("cannot be read: run `cargo xtask setup`"));
    }

    #[test]
    fn the_most_particular_variable_names_the_cache() {
        let with = |set: &'static [(&str, &str)]| {
            cache_root_from(move |name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
        };
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[("HOME", "/h")]), Some("/h/.cache/vvu".into()));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Some("/x/vvu".into()));
        assert_eq!(with(&[("HOME", "/h"), ("VVU_CACHE", "/v")]), Some("/v".into()));
    }
}
