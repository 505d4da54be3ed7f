//! The announcements of a port's bridge: the socket end of the systemd notification protocol (`sd_notify(3)`).
//!
//! A message is one datagram of `KEY=VALUE` lines. The socket lies in the private runtime directory, so only processes
//! of this user reach it; what comes is still read as data of a stranger: bounded, decoded once, unknown keys ignored.

use std::future::{Future, poll_fn};
use std::io;
use std::path::Path;
use std::task::Poll;

use tokio::net::UnixDatagram;

use crate::log_follow::printable;
use crate::supervisor::{Accepted, PortId};

/// Longest datagram that is read, in bytes; systemd itself reads one page.
const MAX_DATAGRAM_LEN: usize = 4096;

/// Longest status text that is kept, in characters: one line on a screen.
const MAX_STATUS_LEN: usize = 200;

/// What one datagram said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Notice {
    /// `X_VVU_LISTENING=1`: the bridge's sockets accept connections.
    pub(crate) listening: bool,
    /// `READY=1`: the appliance's back-end is up, a driver VM can be served.
    pub(crate) ready: bool,
    /// `X_VVU_APPLIANCE_LOST=`: the bridge has dropped this appliance VM.
    pub(crate) lost: Option<Accepted>,
    /// `X_VVU_APPLIANCE_ACTIVE=`: the bridge uses this appliance VM now.
    pub(crate) active: Option<Accepted>,
    /// `X_VVU_PAUSE_US=`, beside the former: how long the front-end had to wait for it, in microseconds.
    pub(crate) pause_us: Option<u64>,
    /// `STATUS=`: the state in words, fit to be printed.
    pub(crate) status: Option<String>,
}

impl Notice {
    /// Reads one datagram; lines that are not understood are left out, as the protocol demands.
    fn decode(datagram: &[u8]) -> Self {
        let mut notice = Self::default();
        for line in String::from_utf8_lossy(datagram).lines() {
            match line.split_once('=') {
                Some(("X_VVU_LISTENING", "1")) => notice.listening = true,
                Some(("READY", "1")) => notice.ready = true,
                Some(("X_VVU_APPLIANCE_LOST", number)) => notice.lost = number.parse().ok().map(Accepted),
                Some(("X_VVU_APPLIANCE_ACTIVE", number)) => notice.active = number.parse().ok().map(Accepted),
                Some(("X_VVU_PAUSE_US", number)) => notice.pause_us = number.parse().ok(),
                Some(("STATUS", text)) => notice.status = Some(printable(text).chars().take(MAX_STATUS_LEN).collect()),
                _ => {}
            }
        }
        notice
    }
}

/// The receiving socket.
#[derive(Debug)]
pub(crate) struct NotifySocket(UnixDatagram);

impl NotifySocket {
    /// Binds the socket at `path`, which goes into the bridge's `$NOTIFY_SOCKET`.
    ///
    /// # Errors
    /// The system's error if `path` cannot be bound.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        UnixDatagram::bind(path).map(Self)
    }

    async fn next(&self) -> io::Result<Notice> {
        let mut buffer = [0; MAX_DATAGRAM_LEN];
        let len = self.0.recv(&mut buffer).await?;
        Ok(Notice::decode(buffer.get(..len).unwrap_or_default()))
    }

    /// Waits for the next message on any of `sockets`; tells on which. May be dropped at any time without losing one.
    ///
    /// # Errors
    /// The system's error if one of them cannot be read.
    pub(crate) async fn next_of(sockets: &[Self]) -> io::Result<(PortId, Notice)> {
        let mut all: Vec<_> = (0..).map(PortId).zip(sockets.iter().map(|socket| Box::pin(socket.next()))).collect();
        poll_fn(move |context| {
            for (port, next) in &mut all {
                if let Poll::Ready(notice) = next.as_mut().poll(context) {
                    return Poll::Ready(notice.map(|notice| (*port, notice)));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// A message that is there already.
    pub(crate) fn try_next(&self) -> Option<Notice> {
        let mut buffer = [0; MAX_DATAGRAM_LEN];
        // A socket that cannot be read tells so when it is waited for.
        let len = self.0.try_recv(&mut buffer).ok()?;
        Some(Notice::decode(buffer.get(..len).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_keys_are_read_and_others_ignored() {
        let notice = Notice::decode(b"X_VVU_LISTENING=1\nSTATUS=waiting for the appliance\nMAINPID=17\nnonsense");
        let status = Some("waiting for the appliance".to_owned());
        assert_eq!(notice, Notice { listening: true, status, ..Notice::default() });
        assert!(Notice::decode(b"READY=1").ready);
        let active = Notice::decode(b"X_VVU_APPLIANCE_LOST=1\nX_VVU_APPLIANCE_ACTIVE=2\nX_VVU_PAUSE_US=1500");
        assert_eq!((active.lost, active.active, active.pause_us), (Some(Accepted(1)), Some(Accepted(2)), Some(1500)));
        assert_eq!(Notice::decode(b"X_VVU_APPLIANCE_LOST=-1\nX_VVU_PAUSE_US=1e3"), Notice::default());
        assert_eq!(Notice::decode(b"READY=0\nX_VVU_LISTENING=yes\n\xff\xfe"), Notice::default());
    }

    #[test]
    fn a_status_is_printable_and_short() {
        let long = format!("STATUS=\x1b[31mred\x07{}", "x".repeat(1000));
        let status = Notice::decode(long.as_bytes()).status.unwrap();
        assert!(status.starts_with("redx"), "{status}");
        assert_eq!(status.len(), MAX_STATUS_LEN);
    }
}
