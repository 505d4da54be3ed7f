//! Waiting for something to appear in a directory, by inotify instead of looking again and again; waiting for a descriptor that
//! may hang up and come back.

#![expect(unsafe_code, reason = "tokio wants the promise that a descriptor stays what it is")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::epoll;
use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout_at};

/// Between two looks by [`look_until`].
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A directory whose entries are watched: being made, moved in, or changed in their attributes.
#[derive(Debug)]
struct DirectoryWatch {
    inotify: AsyncFd<OwnedFd>,
}

impl DirectoryWatch {
    fn new(directory: &Path) -> io::Result<Self> {
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        add_watch(&inotify, directory, WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ATTRIB)?;
        Ok(Self { inotify: readable(inotify)? })
    }

    /// Waits until something has changed since the last call, and forgets what it was.
    async fn changed(&self) -> io::Result<()> {
        self.inotify.async_io(Interest::READABLE, |inotify| Ok(drain(inotify)?)).await
    }
}

fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open for as long as it lives, and always returns the same descriptor; the AsyncFd owns it.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    registered.map_err(|error| error.into_parts().1)
}

/// Changes of a descriptor whose other end comes and goes. To tokio a descriptor that has hung up once stays so; hence an epoll
/// instance of its own around it.
#[derive(Debug)]
pub(crate) struct Changes {
    epoll: AsyncFd<OwnedFd>,
}

impl Changes {
    /// Watches for these events, and for the other end's hanging up.
    pub(crate) fn new(descriptor: impl AsFd, events: epoll::EventFlags) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, descriptor, epoll::EventData::new_u64(0), events | epoll::EventFlags::ET)?;
        Ok(Self { epoll: readable(epoll)? })
    }

    /// Waits until one of the events has come since the last call. What it was is to be asked of the descriptor: it may not be
    /// so any more, or may have been seen already.
    pub(crate) async fn next(&self) -> io::Result<()> {
        let look = |epoll: &OwnedFd| {
            let mut events = [MaybeUninit::uninit(); 1];
            let (found, _) = epoll::wait(epoll, &mut events, Some(&rustix::event::Timespec::default()))?;
            if found.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        };
        self.epoll.async_io(Interest::READABLE, look).await
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

/// Looks by `look` until that finds something, again and again: for what no directory shows; `None` if `timeout` has passed.
///
/// # Errors
/// That of `look`.
pub async fn look_until<T, E>(
    timeout: Duration,
    mut look: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let deadline = Instant::now() + timeout;
    loop {
        match look()? {
            None if Instant::now() < deadline => sleep(LOOK_AGAIN).await,
            found => return Ok(found),
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

    #[tokio::test]
    async fn a_descriptor_that_hangs_up_and_comes_back_is_seen_each_time() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let node = open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        let changes = Changes::new(&node, epoll::EventFlags::IN).unwrap();
        let hung_up = || {
            let mut node = [PollFd::new(&node, PollFlags::IN)];
            poll(&mut node, Some(&Timespec::default())).unwrap();
            node[0].revents().contains(PollFlags::HUP)
        };
        let wait = || tokio::time::timeout(Duration::from_secs(20), changes.next());
        for round in 0..3 {
            let writer = std::fs::File::options().write(true).open(&path).unwrap();
            rustix::io::write(&writer, &[round]).unwrap();
            wait().await.unwrap().unwrap();
            let mut byte = [0; 4];
            assert_eq!(rustix::io::read(&node, &mut byte).unwrap(), 1);
            assert!(!hung_up());
            // What was seen is not told again.
            let again = tokio::time::timeout(Duration::from_millis(20), changes.next());
            assert!(again.await.is_err());
            drop(writer);
            wait().await.unwrap().unwrap();
            assert!(hung_up());
        }
    }
}
