//! A cable between the network cards of two appliance VMs, as between the hosts that they would be on. Whoever holds it sees
//! what goes through.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use crate::testbed::Testbed;

/// Longest frame, with room to spare.
const FRAME_MAX: usize = 128 << 10;

/// Protocol number of reverse ARP (RFC 903) in a frame.
const RARP: [u8; 2] = [0x80, 0x35];

/// What has been seen of a station.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its frames.
    pub frames: u64,
    /// Announcements of where it is, which are among them.
    pub announcements: u64,
}

/// What each station, by its address as text, has sent into an end.
type Stations = Mutex<BTreeMap<(End, String), Seen>>;

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// One.
    Here,
    /// The other.
    There,
}

/// See the module's text. It ends with the process.
#[derive(Debug)]
pub struct Wire {
    here: PathBuf,
    there: PathBuf,
    stations: Arc<Stations>,
}

impl Wire {
    /// Lays it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn lay(testbed: &Testbed) -> Result<Self> {
        let (here, there) = (testbed.socket("wire-here"), testbed.socket("wire-there"));
        let stations = Arc::new(Stations::default());
        let (left, right) = (open(&here)?, open(&there)?);
        for (end, from, to, far) in [(End::Here, &left, &right, &there), (End::There, &right, &left, &here)] {
            let (from, to, far) = (from.try_clone()?, to.try_clone()?, card_of(far));
            let stations = Arc::clone(&stations);
            thread::spawn(move || carry(end, &from, &to, &far, &stations));
        }
        Ok(Self { here, there, stations })
    }

    /// The value of `--uplink` with which a run is at one end.
    pub fn uplink(&self, end: End) -> String {
        let end = match end {
            End::Here => &self.here,
            End::There => &self.there,
        };
        let (far, near) = (end.display(), card_of(end));
        format!("netdev=dgram,local.type=unix,local.path={},remote.type=unix,remote.path={far}", near.display())
    }

    /// What the station with this address has sent into an end.
    pub fn seen(&self, end: End, mac: &str) -> Seen {
        let stations = self.stations.lock().unwrap_or_else(PoisonError::into_inner);
        stations.get(&(end, mac.to_owned())).copied().unwrap_or_default()
    }
}

fn open(path: &Path) -> Result<UnixDatagram> {
    UnixDatagram::bind(path).with_context(|| format!("cannot bind {}", path.display()))
}

/// Where the network card at an end receives.
fn card_of(end: &Path) -> PathBuf {
    end.with_extension("card")
}

fn carry(end: End, from: &UnixDatagram, to: &UnixDatagram, far: &Path, stations: &Stations) {
    let mut buffer = vec![0; FRAME_MAX];
    while let Ok(len) = from.recv(&mut buffer) {
        let frame = buffer.get(..len).unwrap_or_default();
        if let (Some(source), Some(protocol)) = (frame.get(6..12), frame.get(12..14)) {
            let mac = source.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
            let mut stations = stations.lock().unwrap_or_else(PoisonError::into_inner);
            let seen = stations.entry((end, mac)).or_default();
            seen.frames += 1;
            seen.announcements += u64::from(protocol == RARP);
        }
        // Nobody is there before the other run is up, and what is sent then is lost, as on any cable.
        let _ = to.send_to(frame, far);
    }
}
