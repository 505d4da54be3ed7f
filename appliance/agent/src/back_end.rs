//! The front-end's end of the connection to the back-end: one request at a time, each with its answer.
//!
//! The bridge asks for an answer to every request; vhost-user has one only for some, and for all if REPLY_ACK was
//! negotiated. That is settled here: REPLY_ACK is added to what the front-end negotiates if the back-end offers it, and
//! without it a request is followed by GET_FEATURES, whose reply shows that the back-end, which handles messages in
//! their order, is done with the one before (vhost-user specification, "Communication").

use std::os::fd::OwnedFd;

use vvu_protocol::DecodeError;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, RawMessage, ReplyPayload};
use vvu_socket::{MessageSocket, SocketError};

use crate::translate::Descriptor;

/// Code of GET_FEATURES, which serves as a barrier.
const GET_FEATURES: u32 = 1;

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
    /// The back-end offers REPLY_ACK.
    offers_acknowledgement: bool,
    /// REPLY_ACK is negotiated.
    acknowledges: bool,
}

impl BackEndLink {
    /// A connection on which nothing has been said yet.
    #[must_use]
    pub const fn new(socket: MessageSocket) -> Self {
        Self { socket, offers_acknowledgement: false, acknowledges: false }
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
        let acknowledges = self.acknowledges;
        let request = self.negotiate(request);
        self.socket.send(&request.encode(acknowledges && !has_reply)).await?;
        if has_reply || acknowledges {
            let reply = self.reply(code, name).await?;
            self.note(code, &reply);
            return Ok(reply);
        }
        self.barrier().await?;
        Ok(FrontEndReply::Acknowledgement(0))
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

    /// Replaces the front-end's word on REPLY_ACK by this link's own.
    fn negotiate(&mut self, request: FrontEndRequest<Descriptor>) -> FrontEndRequest<Descriptor> {
        let FrontEndRequest::SetProtocolFeatures(mut features) = request else {
            return request;
        };
        self.acknowledges = self.offers_acknowledgement;
        features.set(ProtocolFeatures::REPLY_ACK, self.acknowledges);
        FrontEndRequest::SetProtocolFeatures(features)
    }

    fn note(&mut self, code: u32, reply: &FrontEndReply<OwnedFd>) {
        let asked = FrontEndRequest::<Descriptor>::GetProtocolFeatures.code();
        if let (true, FrontEndReply::Number(bits)) = (code == asked, reply) {
            let offered = ProtocolFeatures::from_bits_retain(*bits);
            self.offers_acknowledgement = offered.contains(ProtocolFeatures::REPLY_ACK);
        }
    }
}
