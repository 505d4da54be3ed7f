//! Waiting for something to appear in a directory, by inotify instead of looking again and again.

#![expect(unsafe_code, reason = "tokio wants the promise that a descriptor stays what it is")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// A directory whose entries are watched: being made, moved in, or changed in their attributes.
#[derive(Debug)]
struct DirectoryWatch {
    inotify: AsyncFd<OwnedFd>,
}

impl DirectoryWatch {
    fn new(directory: &Path) -> io::Result<Self> {
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        add_watch(&inotify, directory, WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ATTRIB)?;
        // SAFETY: an OwnedFd is open for as long as it lives, and always returns the same descriptor; the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) };
        Ok(Self { inotify: registered.map_err(|error| error.into_parts().1)? })
    }

    /// Waits until something has changed since the last call, and forgets what it was.
    async fn changed(&self) -> io::Result<()> {
        self.inotify.async_io(Interest::READABLE, |inotify| Ok(drain(inotify)?)).await
    }
}

/// Takes all events that are there; an error if there is none.
fn drain(inotify: &OwnedFd) -> rustix::io::Result<()> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(inotify, &mut buffer);
    reader.next()?;
    loop {
        match reader.next() {
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}

/// Looks into `directory` by `look` until that finds something, each time that the directory changes; `None` if `timeout`
/// has passed. Needs a tokio runtime with I/O and time.
///
/// # Errors
/// That of `look`, or if the directory cannot be watched.
pub async fn wait_for<T, E: From<io::Error>>(
    directory: &Path,
    timeout: Duration,
    mut look: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    // The watch is set before the first look, so that nothing slips in between.
    let watch = DirectoryWatch::new(directory)?;
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        match timeout_at(deadline, watch.changed()).await {
            Ok(changed) => changed?,
            Err(_) => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_appears_later_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("late");
        let look = || Ok::<_, io::Error>(path.exists().then_some(()));
        let make = async {
            tokio::task::yield_now().await;
            std::fs::write(directory.path().join("other"), "").unwrap();
            tokio::task::yield_now().await;
            std::fs::write(&path, "").unwrap();
        };
        let (found, ()) = tokio::join!(wait_for(directory.path(), Duration::from_secs(20), look), make);
        assert_eq!(found.unwrap(), Some(()));
    }

    #[tokio::test]
    async fn what_never_appears_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let look = || Ok::<Option<()>, io::Error>(None);
        assert_eq!(wait_for(directory.path(), Duration::from_millis(20), look).await.unwrap(), None);
        assert!(wait_for(&directory.path().join("none"), Duration::ZERO, look).await.is_err());
    }
}
