//! The private directory of one run: the bridge's sockets, the configuration document, the notification socket.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::qemu_args::LONGEST_SOCKET_NAME;

/// Longest path of a Unix socket in bytes: `sun_path` without its NUL (unix(7)).
pub(crate) const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Characters that a directory's own name adds: a fixed start and six random ones.
const PREFIX: &str = "vvu-";

/// A directory of mode 0700 that is removed when the value is dropped.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    directory: TempDir,
    path: String,
}

impl RuntimeDir {
    /// Creates a directory under `$XDG_RUNTIME_DIR/vvu`, else `/run/vvu`, else the directory for temporary files.
    ///
    /// # Errors
    /// None of them can be written, or the path would be too long for a socket.
    pub(crate) fn create() -> anyhow::Result<Self> {
        let bases = candidates(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from));
        let mut refusals = Vec::new();
        for base in &bases {
            match create_under(base) {
                Ok(created) => return Ok(created),
                Err(error) => refusals.push(format!("{error:#}")),
            }
        }
        bail!("no private runtime directory: {}; set XDG_RUNTIME_DIR to a directory of this user", refusals.join("; "))
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The directory as text: it goes into QEMU's options.
    pub(crate) fn text(&self) -> &str {
        &self.path
    }
}

fn candidates(xdg_runtime_dir: Option<PathBuf>) -> Vec<PathBuf> {
    let own = xdg_runtime_dir.filter(|path| path.is_absolute()).map(|path| path.join("vvu"));
    own.into_iter().chain([PathBuf::from("/run/vvu"), std::env::temp_dir()]).collect()
}

fn create_under(base: &Path) -> anyhow::Result<RuntimeDir> {
    let shown = base.display();
    DirBuilder::new().recursive(true).mode(0o700).create(base).with_context(|| format!("{shown}"))?;
    let directory = tempfile::Builder::new()
        .prefix(PREFIX)
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(base)
        .with_context(|| format!("{shown}"))?;
    let Some(path) = directory.path().to_str().map(str::to_owned) else { bail!("{shown}: not valid UTF-8") };
    let longest = path.len() + 1 + LONGEST_SOCKET_NAME.len();
    if longest > MAX_SOCKET_PATH_BYTES {
        bail!("{shown}: socket paths in it would have {longest} bytes, at most {MAX_SOCKET_PATH_BYTES} are possible");
    }
    Ok(RuntimeDir { directory, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_own_directory_comes_first() {
        let all = candidates(Some("/run/user/7".into()));
        assert_eq!(all[..2], [PathBuf::from("/run/user/7/vvu"), PathBuf::from("/run/vvu")]);
        assert_eq!(candidates(Some("relative".into()))[0], PathBuf::from("/run/vvu"));
    }

    #[test]
    fn the_directory_is_private_and_vanishes() {
        let base = tempfile::tempdir().unwrap();
        let created = create_under(&base.path().join("vvu")).unwrap();
        let path = created.path().to_owned();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        drop(created);
        assert!(!path.exists());
    }

    #[test]
    fn a_base_too_deep_for_sockets_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let error = create_under(&base.path().join("x".repeat(100))).unwrap_err().to_string();
        assert!(error.contains("at most 107"), "{error}");
    }
}
