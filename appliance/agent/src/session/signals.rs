//! Which signals the back-end of a session uses, as far as it has agreed to them.

use std::collections::BTreeMap;

use vvu_protocol::control::Handle;
use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_protocol::message::{FrontEndRequest, VringFile};

use crate::doorbell::SignalsInUse;

/// What a request changes, if the back-end takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignalChange {
    Kick(u32, Option<Vector>),
    Call(u32, Option<PeerId>),
    Error(u32, Option<PeerId>),
    Log(PeerId),
}

impl SignalChange {
    pub(super) fn of(request: &FrontEndRequest<Handle>) -> Option<Self> {
        use FrontEndRequest as R;
        match request {
            R::SetVringKick(file) => Some(Self::Kick(u32::from(file.index), vector(file))),
            R::SetVringCall(file) => Some(Self::Call(u32::from(file.index), peer(file))),
            R::SetVringErr(file) => Some(Self::Error(u32::from(file.index), peer(file))),
            // A ring that has stopped waits for its next SET_VRING_KICK.
            R::GetVringBase(state) => Some(Self::Kick(state.index, None)),
            R::SetLogFd(Handle::Peer(peer)) => Some(Self::Log(*peer)),
            _ => None,
        }
    }
}

const fn vector(file: &VringFile<Handle>) -> Option<Vector> {
    match file.descriptor {
        Some(Handle::Vector(vector)) => Some(vector),
        _ => None,
    }
}

const fn peer(file: &VringFile<Handle>) -> Option<PeerId> {
    match file.descriptor {
        Some(Handle::Peer(peer)) => Some(peer),
        _ => None,
    }
}

/// The signals of one session.
#[derive(Debug, Default)]
pub(super) struct Signals {
    kicks: BTreeMap<u32, Vector>,
    calls: BTreeMap<u32, PeerId>,
    errors: BTreeMap<u32, PeerId>,
    log: Option<PeerId>,
}

impl Signals {
    pub(super) fn note(&mut self, change: SignalChange) {
        match change {
            SignalChange::Kick(index, vector) => set(&mut self.kicks, index, vector),
            SignalChange::Call(index, peer) => set(&mut self.calls, index, peer),
            SignalChange::Error(index, peer) => set(&mut self.errors, index, peer),
            SignalChange::Log(peer) => self.log = Some(peer),
        }
    }

    pub(super) fn in_use(&self) -> SignalsInUse {
        SignalsInUse {
            vectors: self.kicks.values().copied().collect(),
            peers: self.calls.values().chain(self.errors.values()).copied().chain(self.log).collect(),
        }
    }
}

fn set<T>(signals: &mut BTreeMap<u32, T>, index: u32, signal: Option<T>) {
    match signal {
        Some(signal) => drop(signals.insert(index, signal)),
        None => drop(signals.remove(&index)),
    }
}

#[cfg(test)]
mod tests {
    use vvu_protocol::message::VringState;

    use super::*;

    fn file(index: u8, handle: Handle) -> VringFile<Handle> {
        VringFile { index, descriptor: Some(handle) }
    }

    fn after(requests: impl IntoIterator<Item = FrontEndRequest<Handle>>) -> (Vec<u16>, Vec<u16>) {
        let mut signals = Signals::default();
        requests.into_iter().filter_map(|request| SignalChange::of(&request)).for_each(|change| signals.note(change));
        let SignalsInUse { vectors, peers } = signals.in_use();
        (vectors.into_iter().map(|vector| vector.0).collect(), peers.into_iter().map(|peer| peer.0).collect())
    }

    #[test]
    fn each_signal_lasts_until_it_is_replaced_or_its_vring_stops() {
        use FrontEndRequest as R;
        let kick = |index, vector| R::SetVringKick(file(index, Handle::Vector(Vector(vector))));
        let call = |index, peer| R::SetVringCall(file(index, Handle::Peer(PeerId(peer))));
        let start = [
            kick(0, 7),
            kick(1, 8),
            call(0, 20),
            call(1, 21),
            R::SetVringErr(file(0, Handle::Peer(PeerId(22)))),
            R::SetLogFd(Handle::Peer(PeerId(23))),
        ];
        assert_eq!(after(start.clone()), (vec![7, 8], vec![20, 21, 22, 23]));
        let replaced = [kick(0, 9), call(0, 24), R::SetLogFd(Handle::Peer(PeerId(25)))];
        assert_eq!(after(start.clone().into_iter().chain(replaced)), (vec![8, 9], vec![21, 22, 24, 25]));
        let shared = [kick(0, 8), R::GetVringBase(VringState { index: 1, num: 0 })];
        assert_eq!(after(start.clone().into_iter().chain(shared)), (vec![8], vec![20, 21, 22, 23]));
        let polled = [R::SetVringCall(VringFile { index: 0, descriptor: None })];
        assert_eq!(after(start.into_iter().chain(polled)), (vec![7, 8], vec![21, 22, 23]));
    }
}
