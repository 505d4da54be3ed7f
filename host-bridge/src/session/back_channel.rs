//! Requests of the back-end to the front-end, over the socket of SET_BACKEND_REQ_FD.
//!
//! The socket has a task of its own, so that the main channel never waits for it, and outlives appliances as the front-end does.
//! The agent always gets an answer: the front-end's if it gives answers, "done" once the request is sent if it does not,
//! and a refusal if there is no socket, if the request is not carried, or if the front-end takes longer than
//! [`REPLY_TIMEOUT`]. Its late replies are still expected, in order; one that owes more than [`OWED_MAX`] of them, or
//! sends anything else, loses this channel and nothing else.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use vvu_protocol::DecodeError;
use vvu_protocol::carriage::{self, Carriage};
use vvu_protocol::control::{Channel, Frame, Handle};
use vvu_protocol::message::{BackEndReply, BackEndRequest, RawMessage};
use vvu_socket::{MessageSocket, SocketError};

use super::link::REFUSED;
use crate::appliance::ApplianceError;
use crate::appliance::control::ControlCommands;

/// How long the front-end may take for a reply. QEMU replies from its main loop, which other devices may keep busy.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the front-end may take to make room in its socket.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Most replies that a front-end may owe.
const OWED_MAX: usize = 16;

/// Most requests that wait for the task: one of the agent, one of an agent before, and what the bridge has to say.
const WAITING_MAX: usize = 4;

/// Why a descriptor cannot be a back channel.
#[derive(Debug, thiserror::Error)]
pub(super) enum BackChannelError {
    #[error("expected a unix stream socket")]
    Kind,
    #[error("socket")]
    Io(#[from] io::Error),
}

/// The back channel of a session, if the front-end has one.
#[derive(Debug, Default)]
pub(super) struct BackChannel {
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    requests: mpsc::Sender<Carried>,
    /// Attachment whose request is under way.
    under_way: Rc<Cell<Option<u32>>>,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A request on its way to the front-end.
#[derive(Debug)]
struct Carried {
    request: BackEndRequest<OwnedFd>,
    answer: Option<AnswerTo>,
}

/// Who waits for the answer.
#[derive(Debug)]
struct AnswerTo {
    commands: ControlCommands,
    attachment: u32,
    under_way: Rc<Cell<Option<u32>>>,
}

impl AnswerTo {
    /// An attachment that has ended meanwhile gets its answer too, and drops it.
    async fn answer(self, code: u32, value: u64) {
        if self.under_way.get() == Some(self.attachment) {
            self.under_way.set(None);
        }
        let message = BackEndReply::Acknowledgement(value).encode(code);
        if let Err(error) = self.commands.send(&Frame::new(Channel::BackEnd, self.attachment, message)).await {
            tracing::debug!(%error, "nobody takes the answer of the front-end");
        }
    }
}

impl BackChannel {
    /// Uses this socket from now on. The one before is closed, if there was one.
    pub(super) fn replace(&mut self, descriptor: OwnedFd, asks_replies: bool) -> Result<(), BackChannelError> {
        let kind = (socket_domain(&descriptor).ok(), socket_type(&descriptor).ok());
        if kind != (Some(AddressFamily::UNIX), Some(SocketType::STREAM)) {
            return Err(BackChannelError::Kind);
        }
        let socket = MessageSocket::new(UnixStream::from(descriptor))?;
        let (requests, receiver) = mpsc::channel(WAITING_MAX);
        let under_way = Rc::default();
        let task = tokio::task::spawn_local(serve(Served { socket, asks_replies, owed: VecDeque::new() }, receiver));
        self.connection = Some(Connection { requests, under_way, task });
        Ok(())
    }

    /// Takes a request of the back-end. What is answered at once comes back.
    ///
    /// # Errors
    /// [`ApplianceError`] if it is no request, or comes before the one before was answered.
    pub(super) fn take(
        &mut self,
        message: RawMessage<Handle>,
        commands: &ControlCommands,
        attachment: u32,
    ) -> Result<Option<RawMessage<Handle>>, ApplianceError> {
        let code = message.header.request;
        let decoded = BackEndRequest::decode(message);
        let request = decoded.map_err(|source| ApplianceError::Decode { device: "control", source })?;
        let name = request.name();
        let refuse = |reason| {
            tracing::debug!(request = name, reason, "refused a request of the back-end");
            Ok(Some(BackEndReply::Acknowledgement(REFUSED).encode(code)))
        };
        let request = match (carriage::back_end(code), request) {
            (Carriage::Refused(reason), _) => return refuse(reason),
            (_, BackEndRequest::Iotlb(iotlb)) => BackEndRequest::Iotlb(iotlb),
            (_, BackEndRequest::ConfigChange) => BackEndRequest::ConfigChange,
            _ => return refuse("it has descriptors"),
        };
        let Some(connection) = &self.connection else { return refuse("the front-end has no back channel") };
        if connection.under_way.get() == Some(attachment) {
            let request = "a request before the answer to the one before";
            return Err(ApplianceError::Request { device: "control", request });
        }
        tracing::debug!(attachment, request = name, "request of the back-end");
        let under_way = Rc::clone(&connection.under_way);
        let answer = AnswerTo { commands: commands.clone(), attachment, under_way };
        match connection.requests.try_send(Carried { request, answer: Some(answer) }) {
            Ok(()) => {
                connection.under_way.set(Some(attachment));
                Ok(None)
            }
            Err(_) => refuse("the front-end's back channel takes nothing"),
        }
    }

    /// Tells the front-end that the configuration space may have changed, without asking for a reply.
    pub(super) fn notify_config_change(&self) {
        if let Some(connection) = &self.connection
            && connection.requests.try_send(Carried { request: BackEndRequest::ConfigChange, answer: None }).is_err()
        {
            tracing::debug!("the front-end's back channel takes nothing");
        }
    }
}

/// Why a back channel was given up.
#[derive(Debug, thiserror::Error)]
enum GivenUp {
    #[error("the front-end closed it")]
    Closed,
    #[error("the front-end takes no messages")]
    Stuck,
    #[error("the front-end owes {OWED_MAX} replies")]
    Owes,
    #[error("the front-end sent what is no reply to the request")]
    Decode(#[from] DecodeError),
    #[error("the front-end sent a reply to nothing")]
    Unasked,
    #[error("socket")]
    Socket(#[from] SocketError),
}

/// A reply that the front-end owes.
#[derive(Debug)]
struct Owed {
    code: u32,
    deadline: Instant,
    /// `None` if the deadline has passed.
    answer: Option<AnswerTo>,
}

#[derive(Debug)]
struct Served {
    socket: MessageSocket,
    asks_replies: bool,
    owed: VecDeque<Owed>,
}

/// Serves until the socket is of no use any more, then refuses everything.
async fn serve(mut served: Served, mut requests: mpsc::Receiver<Carried>) {
    let given_up = loop {
        let deadline = served.owed.iter().find(|owed| owed.answer.is_some()).map(|owed| owed.deadline);
        let step = tokio::select! {
            carried = requests.recv() => match carried {
                Some(carried) => served.carry(carried).await,
                None => return,
            },
            message = served.socket.recv() => served.replied(message).await,
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                served.expire().await;
                Ok(())
            }
        };
        if let Err(given_up) = step {
            break given_up;
        }
    };
    match given_up {
        // As it does at its end.
        GivenUp::Closed => tracing::debug!("back channel: the front-end closed it"),
        fault => tracing::warn!("back channel: {:#}", anyhow::Error::from(fault)),
    }
    let Served { socket, owed, .. } = served;
    drop(socket);
    for Owed { code, answer, .. } in owed {
        refuse(code, answer).await;
    }
    while let Some(Carried { request, answer }) = requests.recv().await {
        refuse(request.code(), answer).await;
    }
}

async fn refuse(code: u32, answer: Option<AnswerTo>) {
    if let Some(answer) = answer {
        answer.answer(code, REFUSED).await;
    }
}

impl Served {
    /// Sends a request to the front-end.
    async fn carry(&mut self, carried: Carried) -> Result<(), GivenUp> {
        let Carried { request, answer } = carried;
        let code = request.code();
        let asks = self.asks_replies && answer.is_some();
        if asks && self.owed.len() == OWED_MAX {
            refuse(code, answer).await;
            return Err(GivenUp::Owes);
        }
        let sent = match timeout(SEND_TIMEOUT, self.socket.send(&request.encode(asks))).await {
            Ok(sent) => sent.map_err(GivenUp::from),
            Err(_) => Err(GivenUp::Stuck),
        };
        match (sent, answer) {
            (Err(given_up), answer) => {
                refuse(code, answer).await;
                Err(given_up)
            }
            (Ok(()), answer) if asks => {
                self.owed.push_back(Owed { code, deadline: Instant::now() + REPLY_TIMEOUT, answer });
                Ok(())
            }
            (Ok(()), Some(answer)) => {
                answer.answer(code, 0).await;
                Ok(())
            }
            (Ok(()), None) => Ok(()),
        }
    }

    /// Passes a reply of the front-end on to who waits for it.
    async fn replied(&mut self, message: Result<Option<RawMessage<OwnedFd>>, SocketError>) -> Result<(), GivenUp> {
        let message = message?.ok_or(GivenUp::Closed)?;
        let code = self.owed.front().ok_or(GivenUp::Unasked)?.code;
        let value = match BackEndReply::decode(code, message)? {
            BackEndReply::Acknowledgement(value) => value,
            BackEndReply::SharedObject(_) => REFUSED,
        };
        if let Some(answer) = self.owed.pop_front().and_then(|owed| owed.answer) {
            answer.answer(code, value).await;
        }
        Ok(())
    }

    /// Refuses in place of the front-end what it has not answered in time.
    async fn expire(&mut self) {
        let now = Instant::now();
        for owed in self.owed.iter_mut().filter(|owed| owed.deadline <= now) {
            refuse(owed.code, owed.answer.take()).await;
        }
    }
}
