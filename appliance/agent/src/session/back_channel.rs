//! The back-end's requests: one after the other, each put to the bridge if it can cross, and answered if the back-end asks for
//! that.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use tracing::debug;
use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::Handle;
use vvu_protocol::message::{BackEndReply, BackEndRequest, RawMessage, ReplyPayload};
use vvu_socket::{MessageSocket, SocketError};

use super::end::End;
use super::front_end::REFUSED;
use super::refusal::{Refusal, RefusalLog};
use super::router::Mailbox;
use super::slot::Slot;
use crate::uuid::Uuid;

/// Where a new connection for requests of the back-end is left.
pub(super) type BackChannels = Slot<MessageSocket>;

/// Serves channel 1.
#[derive(Debug)]
pub(super) struct BackChannelTask {
    uuid: Uuid,
    bridge: Mailbox,
    connections: Rc<BackChannels>,
    refusals: RefusalLog,
}

impl BackChannelTask {
    pub(super) const fn new(uuid: Uuid, bridge: Mailbox, connections: Rc<BackChannels>) -> Self {
        Self { uuid, bridge, connections, refusals: RefusalLog::new(uuid) }
    }

    /// Serves one connection until it is replaced or the back-end closes it, then the next.
    pub(super) async fn run(mut self) -> End {
        let mut socket = self.connections.take().await;
        loop {
            let message = tokio::select! {
                biased;
                newer = self.connections.take() => {
                    socket = newer;
                    continue;
                }
                message = socket.recv() => message,
            };
            let served = match message {
                Ok(Some(message)) => self.serve(message, &socket).await,
                Ok(None) | Err(SocketError::Io(_)) => {
                    socket = self.connections.take().await;
                    continue;
                }
                Err(error) => Err(End::BackChannel(error)),
            };
            if let Err(end) = served {
                return end;
            }
        }
    }

    async fn serve(&mut self, message: RawMessage<OwnedFd>, socket: &MessageSocket) -> Result<(), End> {
        let mut asks = message.header.needs_reply;
        let request = BackEndRequest::decode(message).map_err(End::NotBackEndRequest)?;
        let (code, name) = (request.code(), request.name());
        // A request with a reply of its own is not told that it asks for one.
        asks |= request.row().is_some_and(|row| row.reply != ReplyPayload::None);
        let value = match for_bridge(request) {
            Ok(request) => self.ask_bridge(request).await?,
            Err(refusal) => {
                self.refusals.log(code, name, &refusal);
                REFUSED
            }
        };
        debug!(set = %self.uuid, value, "{name}");
        // A failure has this form whatever the request is.
        let reply = BackEndReply::<OwnedFd>::Acknowledgement(value).encode(code);
        if asks && let Err(error) = socket.send(&reply).await {
            // The next look at the socket shows that it is closed.
            debug!(set = %self.uuid, "back-end does not take an answer: {error}");
        }
        Ok(())
    }

    /// What the bridge answers to a request that it carries.
    async fn ask_bridge(&mut self, request: BackEndRequest<Handle>) -> Result<u64, End> {
        let (channel, code) = (self.bridge.channel(), request.code());
        self.bridge.send(request.encode(true)).await;
        let answer = self.bridge.receive().await.message;
        match BackEndReply::decode(code, answer) {
            Ok(BackEndReply::Acknowledgement(value)) => Ok(value),
            Ok(BackEndReply::SharedObject(_)) => Ok(REFUSED),
            Err(source) => Err(End::NotMessage { channel, source }),
        }
    }
}

/// The same request for the bridge, if it can cross.
fn for_bridge(request: BackEndRequest<OwnedFd>) -> Result<BackEndRequest<Handle>, Refusal> {
    if let Carriage::Refused(reason) = carriage::back_end(request.code()) {
        return Err(Refusal::NotCarried { reason });
    }
    match request {
        BackEndRequest::Iotlb(iotlb) => Ok(BackEndRequest::Iotlb(iotlb)),
        BackEndRequest::ConfigChange => Ok(BackEndRequest::ConfigChange),
        _ => Err(Refusal::NotCarried { reason: "it has descriptors" }),
    }
}
