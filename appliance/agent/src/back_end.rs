//! The front-end's end of the connection to the back-end: one request at a time, each with its answer.
//!
//! The bridge asks for an answer to every request; vhost-user has one only for some, and for all if REPLY_ACK was
//! negotiated. That is settled here: REPLY_ACK is added to what the front-end negotiates if the back-end offers it, and
//! without it a request is followed by GET_FEATURES, whose reply shows that the back-end, which handles messages in
//! their order, is done with the one before (vhost-user specification, "Communication").
//!
//! Memory slots are this link's own matter, too: the front-end's are in the bridge's and the agent's hands
//! ([`crate::memory_map`]), so the back-end's are negotiated whenever it offers them.

use std::os::fd::OwnedFd;

use vvu_protocol::DecodeError;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, RawMessage, ReplyPayload};
use vvu_socket::{MessageSocket, SocketError};

use crate::translate::Descriptor;

/// Code of GET_FEATURES, which serves as a barrier.
const GET_FEATURES: u32 = 1;

/// Code of IOTLB_MSG. The specification has it answered always, some back-ends answer it only if they are asked to.
const IOTLB_MSG: u32 = 22;

/// Protocol features that are negotiated here, whatever the front-end wants.
const OWN_FEATURES: ProtocolFeatures = ProtocolFeatures::REPLY_ACK.union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Why the connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The back-end closed it.
    #[error("back-end closed its connection")]
    Closed,
    /// The stream failed, or what came was no message.
    #[error("connection to the back-end")]
    Socket(#[from] SocketError),
    /// The reply is none to the request.
    #[error("back-end's reply to {request}")]
    Reply {
        /// Name of the request.
        request: &'static str,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// A message that nobody asked for.
    #[error("back-end sent message {request} that nobody asked for")]
    Unasked {
        /// Its request code.
        request: u32,
    },
}

/// A connection to the back-end.
#[derive(Debug)]
pub struct BackEndLink {
    socket: MessageSocket,
    /// What the back-end offers of [`OWN_FEATURES`].
    offered: ProtocolFeatures,
    /// What is negotiated of [`OWN_FEATURES`].
    negotiated: ProtocolFeatures,
    /// Number of memory slots, once it has been asked for.
    memory_slots: Option<usize>,
}

impl BackEndLink {
    /// A connection on which nothing has been said yet.
    #[must_use]
    pub const fn new(socket: MessageSocket) -> Self {
        let none = ProtocolFeatures::empty();
        Self { socket, offered: none, negotiated: none, memory_slots: None }
    }

    /// Sends a request and waits for its answer, which is an acknowledgement for requests without a reply of their own. If
    /// the future is dropped before it is ready, the link must be dropped too.
    ///
    /// # Errors
    /// [`LinkError`]; the link is of no use any more.
    pub async fn request(&mut self, request: FrontEndRequest<Descriptor>) -> Result<FrontEndReply<OwnedFd>, LinkError> {
        let (code, name) = (request.code(), request.name());
        let has_reply = request.row().is_some_and(|row| row.reply != ReplyPayload::None);
        // What this message negotiates is not in force yet.
        let acknowledges = self.negotiated.contains(ProtocolFeatures::REPLY_ACK);
        let request = self.negotiate(request);
        let asks = acknowledges && (!has_reply || code == IOTLB_MSG);
        self.socket.send(&request.encode(asks)).await?;
        if has_reply || acknowledges {
            let reply = self.reply(code, name).await?;
            self.note(code, &reply);
            return Ok(reply);
        }
        self.barrier().await?;
        Ok(FrontEndReply::Acknowledgement(0))
    }

    /// Number of memory slots that the back-end has, or `None` if it takes its memory as a table only. Must not be cancelled,
    /// as [`Self::request`].
    ///
    /// # Errors
    /// [`LinkError`]; the link is of no use any more.
    pub async fn memory_slots(&mut self) -> Result<Option<usize>, LinkError> {
        if !self.negotiated.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            return Ok(None);
        }
        if self.memory_slots.is_none() {
            let reply = self.request(FrontEndRequest::GetMaxMemSlots).await?;
            let FrontEndReply::Number(slots) = reply else { return Ok(None) };
            self.memory_slots = Some(usize::try_from(slots).unwrap_or(usize::MAX));
        }
        Ok(self.memory_slots)
    }

    /// Waits until the back-end closes the connection or says something unasked. Nothing is lost if the future is dropped.
    pub async fn broken(&mut self) -> LinkError {
        match self.socket.recv().await {
            Ok(Some(message)) => LinkError::Unasked { request: message.header.request },
            Ok(None) => LinkError::Closed,
            Err(error) => error.into(),
        }
    }

    async fn barrier(&mut self) -> Result<(), LinkError> {
        self.socket.send(&RawMessage::<OwnedFd>::request(GET_FEATURES, false, Vec::new(), Vec::new())).await?;
        self.reply(GET_FEATURES, "GET_FEATURES").await.map(drop)
    }

    async fn reply(&mut self, code: u32, name: &'static str) -> Result<FrontEndReply<OwnedFd>, LinkError> {
        let message = self.socket.recv().await?.ok_or(LinkError::Closed)?;
        FrontEndReply::decode(code, message).map_err(|source| LinkError::Reply { request: name, source })
    }

    /// Replaces the front-end's word on [`OWN_FEATURES`] by this link's own.
    fn negotiate(&mut self, request: FrontEndRequest<Descriptor>) -> FrontEndRequest<Descriptor> {
        let FrontEndRequest::SetProtocolFeatures(features) = request else {
            return request;
        };
        self.negotiated = self.offered;
        FrontEndRequest::SetProtocolFeatures(features.difference(OWN_FEATURES).union(self.negotiated))
    }

    fn note(&mut self, code: u32, reply: &FrontEndReply<OwnedFd>) {
        let asked = FrontEndRequest::<Descriptor>::GetProtocolFeatures.code();
        if let (true, FrontEndReply::Number(bits)) = (code == asked, reply) {
            self.offered = ProtocolFeatures::from_bits_retain(*bits).intersection(OWN_FEATURES);
        }
    }
}
