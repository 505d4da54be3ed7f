//! The private directory of one run: a directory for each bridge, with its sockets and the one for its notifications, and the
//! configuration document.
//!
//! It vanishes with the run. A run that was killed leaves it behind, and the next one removes it: each directory holds a
//! file that its run keeps locked, so a lock that can be had belongs to nobody any more.

use std::fs::{DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::qemu_args::LONGEST_SOCKET_NAME;

/// Longest path of a Unix socket in bytes: `sun_path` without its NUL (unix(7)).
pub(crate) const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Characters that a directory's own name adds: a fixed start and six random ones.
const PREFIX: &str = "vvu-";

/// Name of the file whose lock tells that the run lives.
const LOCK_FILE: &str = "lock";

/// Name of that file until it is locked: nobody ever sees [`LOCK_FILE`] unlocked while its run lives.
const UNLOCKED_FILE: &str = "lock.new";

/// A directory of mode 0700 that is removed when the value is dropped.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    directory: TempDir,
    path: String,
    _lock: File,
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
    remove_orphans(base);
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
    let lock = lock_new(directory.path()).with_context(|| format!("{shown}"))?;
    Ok(RuntimeDir { directory, path, _lock: lock })
}

fn lock_new(directory: &Path) -> anyhow::Result<File> {
    let unlocked = directory.join(UNLOCKED_FILE);
    let file = File::create(&unlocked)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    std::fs::rename(&unlocked, directory.join(LOCK_FILE))?;
    Ok(file)
}

/// Removes what killed runs left in `base`. What cannot be looked at or removed belongs to somebody else.
fn remove_orphans(base: &Path) {
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        // In a directory for everybody a stranger may have put anything under such a name.
        let own =
            entry.metadata().is_ok_and(|found| found.is_dir() && found.uid() == rustix::process::geteuid().as_raw());
        if !own || !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(lock) = File::open(entry.path().join(LOCK_FILE)) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            // A run that is orphaned at this moment is removed by whoever comes first.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
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
    fn only_what_a_killed_run_left_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let alive = create_under(base.path()).unwrap();
        let (orphan, starting) = (base.path().join("vvu-killed"), base.path().join("vvu-starting"));
        for directory in [&orphan, &starting] {
            std::fs::create_dir(directory).unwrap();
        }
        std::fs::write(orphan.join(LOCK_FILE), "").unwrap();
        let other = base.path().join("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join(LOCK_FILE), "").unwrap();
        let next = create_under(base.path()).unwrap();
        assert!(!orphan.exists(), "the orphan is still there");
        assert!([alive.path(), next.path(), &starting, &other].iter().all(|path| path.exists()));
    }

    #[test]
    fn a_base_too_deep_for_sockets_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let error = create_under(&base.path().join("x".repeat(100))).unwrap_err().to_string();
        assert!(error.contains("at most 107"), "{error}");
    }
}
