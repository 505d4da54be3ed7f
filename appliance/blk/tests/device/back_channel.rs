//! The front-end's end of the back channel, and IOTLB messages on the main one: what the `vhost` crate does not have.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::VhostUserFrontend;
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, FrontEndRequest, Header, Iotlb, RawMessage};

use crate::driver::FrontEnd;
use crate::process::LIMIT;

/// See the module's text.
pub(crate) struct BackChannel {
    stream: UnixStream,
}

impl BackChannel {
    /// Opens the channel and hands the other end to the back-end.
    pub(crate) fn open(front_end: &mut FrontEnd) -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        front_end.frontend.set_backend_request_fd(&theirs).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self { stream }
    }

    /// The next request, and whether it wants an answer; `None` if the back-end has closed the channel.
    pub(crate) fn next(&mut self) -> Option<(BackEndRequest<OwnedFd>, bool)> {
        let message = receive(&mut self.stream)?;
        let needs_reply = message.header.needs_reply;
        Some((BackEndRequest::decode(message).unwrap(), needs_reply))
    }

    /// Answers a request: 0 for done. A channel that was closed meanwhile takes no answer.
    pub(crate) fn answer(&mut self, code: u32, value: u64) {
        let reply: RawMessage<OwnedFd> = BackEndReply::Acknowledgement(value).encode(code);
        let sent = self.stream.write_all(&reply.to_bytes());
        assert!(sent.is_ok() || sent.is_err_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe));
    }

    /// Waits for CONFIG_CHANGE and answers it.
    pub(crate) fn expect_config_change(&mut self) {
        let (request, needs_reply) = self.next().unwrap();
        assert!(matches!(request, BackEndRequest::ConfigChange), "{request:?}");
        if needs_reply {
            self.answer(request.code(), 0);
        }
    }

    pub(crate) fn try_clone(&self) -> Self {
        Self { stream: self.stream.try_clone().unwrap() }
    }

    /// Ends a wait in [`BackChannel::next`] of a clone.
    pub(crate) fn close(&self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

/// Sends an IOTLB message on the main channel; true if the back-end took it.
pub(crate) fn send_iotlb(stream: &mut UnixStream, message: Iotlb) -> bool {
    let request: FrontEndRequest<OwnedFd> = FrontEndRequest::Iotlb(message);
    let code = request.code();
    stream.write_all(&request.encode(true).to_bytes()).unwrap();
    let reply = FrontEndReply::decode(code, receive(stream).unwrap()).unwrap();
    let FrontEndReply::Number(value) = reply else { panic!("{reply:?}") };
    value == 0
}

fn receive(stream: &mut UnixStream) -> Option<RawMessage<OwnedFd>> {
    let mut bytes = [0; Header::LEN];
    let first = stream.read(&mut bytes).unwrap();
    if first == 0 {
        return None;
    }
    stream.read_exact(&mut bytes[first..]).unwrap();
    let header = Header::decode(&bytes).unwrap();
    let mut payload = vec![0; header.payload_len];
    stream.read_exact(&mut payload).unwrap();
    Some(RawMessage { header, payload, descriptors: Vec::new() })
}
