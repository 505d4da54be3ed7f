//! The paths of a run's sockets, vhost-user and control, and of links to sockets: free, or refused with the reason.

use std::fs::FileType;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, bail};
use rustix::fs::{Access, access};
use tokio::net::UnixStream;

use crate::runtime_dir::MAX_SOCKET_PATH_BYTES;

/// Checks that `path` can be bound, and removes a socket that a dead process left there.
///
/// Returns the absolute path. `option` is the one that names another path.
///
/// # Errors
/// One line with the remedy.
pub(crate) async fn claim(path: &Path, option: &str) -> anyhow::Result<String> {
    claim_as(path, option, "socket", FileType::is_socket).await
}

/// The same for a symbolic link that shall lead to a socket.
///
/// # Errors
/// One line with the remedy.
pub(crate) async fn claim_link(path: &Path, option: &str) -> anyhow::Result<String> {
    claim_as(path, option, "link to a socket", FileType::is_symlink).await
}

async fn claim_as(path: &Path, option: &str, kind: &str, is_kind: fn(&FileType) -> bool) -> anyhow::Result<String> {
    let shown = path.display();
    let absolute = std::path::absolute(path).with_context(|| format!("socket path {shown} cannot be used"))?;
    let text = absolute.to_str().with_context(|| format!("socket path {shown} is not valid UTF-8"))?;
    if text.len() > MAX_SOCKET_PATH_BYTES {
        bail!("socket path {shown} has {} bytes; choose one of at most {MAX_SOCKET_PATH_BYTES}", text.len());
    }
    let Some(directory) = absolute.parent() else { bail!("socket path {shown} names no file") };
    if !directory.is_dir() {
        bail!("socket directory {0} does not exist; create it with: mkdir -p {0}", directory.display());
    }
    if access(directory, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        bail!("socket directory {} may not be written by this user; choose another {option}", directory.display());
    }
    match std::fs::symlink_metadata(&absolute) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(text.to_owned()),
        Err(error) => return Err(error).with_context(|| format!("socket path {shown} cannot be looked at")),
        Ok(found) if !is_kind(&found.file_type()) => {
            bail!("socket path {shown} exists and is no {kind}; remove it or choose another {option}")
        }
        Ok(_) => {}
    }
    match UnixStream::connect(&absolute).await {
        // A link that leads nowhere is one to a socket that is gone.
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            std::fs::remove_file(&absolute).with_context(|| format!("stale socket {shown} cannot be removed"))?;
            Ok(text.to_owned())
        }
        // Accepted, queued, or of another type: in every case somebody has it open.
        _ => bail!("socket {shown} is in use by a live process; end that one or choose another {option}"),
    }
}

/// Identity of the socket file that the bridge created, to remove that one and no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SocketFile {
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// The file that is at `path` now.
    pub(crate) fn at(path: &str) -> Option<Self> {
        let metadata = std::fs::symlink_metadata(path).ok()?;
        metadata.file_type().is_socket().then(|| Self { device: metadata.dev(), inode: metadata.ino() })
    }

    /// Removes the file if it is still this one.
    pub(crate) fn remove(self, path: &str) {
        if Self::at(path) == Some(self) {
            // Gone in the meantime is what was wanted.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_live_socket_is_refused_and_a_stale_one_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let refusal = claim(&path, "--socket").await.unwrap_err().to_string();
        assert!(refusal.contains("in use by a live process"), "{refusal}");
        drop(listener);
        assert!(path.exists());
        claim(&path, "--socket").await.unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn paths_that_cannot_be_bound_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let cases = [
            (file.clone(), "is no socket"),
            (directory.path().join("no/disk.sock"), "mkdir -p"),
            (directory.path().join("x".repeat(100)), "at most 107"),
        ];
        for (path, expected) in cases {
            let refusal = claim(&path, "--socket").await.unwrap_err().to_string();
            assert!(refusal.contains(expected), "{refusal}");
        }
        assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_link_is_replaced_unless_it_leads_to_somebody() {
        let directory = tempfile::tempdir().unwrap();
        let (link, target) = (directory.path().join("d.sock.qmp"), directory.path().join("qmp"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let listener = UnixListener::bind(&target).unwrap();
        let refusal = claim_link(&link, "--channel").await.unwrap_err().to_string();
        assert!(refusal.contains("in use by a live process"), "{refusal}");
        drop(listener);
        claim_link(&link, "--channel").await.unwrap();
        assert!(std::fs::symlink_metadata(&link).is_err() && target.exists(), "the link goes, not what it leads to");
        std::fs::remove_file(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        claim_link(&link, "--channel").await.unwrap();
        std::fs::write(&link, "precious").unwrap();
        assert!(claim_link(&link, "--channel").await.unwrap_err().to_string().contains("is no link"));
    }

    #[test]
    fn only_the_own_socket_file_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let text = path.to_str().unwrap();
        let _first = UnixListener::bind(&path).unwrap();
        let own = SocketFile::at(text).unwrap();
        std::fs::rename(&path, directory.path().join("kept")).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        own.remove(text);
        assert!(path.exists());
        SocketFile::at(text).unwrap().remove(text);
        assert!(!path.exists());
    }
}
