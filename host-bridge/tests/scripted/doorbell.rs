//! The appliance's doorbell device, scripted as QEMU's client of an ivshmem server behaves.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use vvu_protocol::doorbell::{PeerId, Vector};
use vvu_socket::event::{self, Event};
use vvu_socket::ivshmem::ServerStream;

use super::{QUEUES, within};

/// The doorbell device.
#[derive(Debug)]
pub(crate) struct Doorbell {
    /// Bytes at the start of the shared memory.
    pub(crate) uuid: [u8; 16],
    vectors: Vec<Event>,
    peers: Vec<(u16, OwnedFd)>,
    stream: ServerStream,
}

impl Doorbell {
    /// Connects, and takes everything that the server has for a new client.
    pub(crate) async fn realize(path: &Path) -> Self {
        let stream = ServerStream::connect(path).unwrap();
        let mut doorbell = Self { uuid: [0; 16], vectors: Vec::new(), peers: Vec::new(), stream };
        assert!(matches!(doorbell.message().await, (0, None)), "expected version 0");
        assert!(matches!(doorbell.message().await, (0, None)), "expected the id of the appliance's own device");
        let (-1, Some(shared)) = doorbell.message().await else { panic!("expected the shared memory") };
        rustix::io::pread(&shared, &mut doorbell.uuid, 0).unwrap();
        for _ in 0..QUEUES {
            let (0, Some(vector)) = doorbell.message().await else { panic!("expected a vector") };
            doorbell.vectors.push(Event::new(vector).unwrap());
        }
        // A call and an error for each queue, and updates of the dirty log.
        for _ in 0..=2 * QUEUES {
            let (id, Some(peer)) = doorbell.message().await else { panic!("expected a peer") };
            doorbell.peers.push((u16::try_from(id).unwrap(), peer));
        }
        doorbell
    }

    /// Waits for what the server says next: an id, with the eventfd of a vector of that peer unless it has gone.
    pub(crate) async fn message(&mut self) -> (i64, Option<OwnedFd>) {
        let message = within("a message for the doorbell device", self.stream.recv()).await.unwrap();
        message.expect("the bridge closed the doorbell socket")
    }

    /// Waits until the bridge signals a vector.
    pub(crate) async fn rings(&self, vector: Vector) {
        let event = &self.vectors[usize::from(vector.0)];
        within(&format!("a signal at vector {}", vector.0), event.signalled()).await.unwrap();
    }

    /// Whether the bridge has signalled a vector since it was asked last.
    pub(crate) fn has_rung(&self, vector: Vector) -> bool {
        event::take(self.vectors[usize::from(vector.0)].as_fd()).unwrap().is_some()
    }

    /// The appliance writes a peer into the doorbell register.
    pub(crate) fn ring(&self, peer: PeerId) {
        let (_, event) = self.peers.iter().find(|(id, _)| *id == peer.0).expect("a peer that was announced");
        event::signal(event).unwrap();
    }

    /// Closes the socket.
    pub(crate) fn close(&self) {
        rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both).unwrap();
    }
}
