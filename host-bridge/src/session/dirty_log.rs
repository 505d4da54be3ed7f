//! The dirty log: SET_LOG_BASE and SET_LOG_FD, and the page that its last bytes need if its file ends within one.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use vvu_protocol::address::FileOffset;
use vvu_protocol::features::ProtocolFeatures;
use vvu_protocol::message::{FrontEndReply, LogArea};
use vvu_protocol::window::{Area, Buffer, BufferError, Span, Tail};

use super::SessionError;
use super::device_state::Descriptor;
use super::link::REFUSED;
use super::log_tail::{LogTail, LogTailError};
use super::relay::{Answer, Relay, unexpected_answer};
use crate::appliance::{ApplianceError, file_identity};
use crate::translate;

const NAME: &str = "SET_LOG_BASE";

/// Why a log was refused.
#[derive(Debug, thiserror::Error)]
enum LogError {
    #[error("file")]
    File(#[from] ApplianceError),
    #[error("log")]
    Buffer(#[from] BufferError),
    #[error("log")]
    Tail(#[from] LogTailError),
}

impl Relay<'_> {
    /// The new log is mapped beside the one before, which goes when the back-end has agreed.
    pub(super) async fn set_log(&mut self, area: &LogArea, file: &Descriptor) -> Result<Answer, SessionError> {
        if !self.session.state.has_negotiated(ProtocolFeatures::LOG_SHMFD) {
            return Err(SessionError::NotOffered { request: NAME, reason: "LOG_SHMFD was not negotiated" });
        }
        let (buffer, tail) = match self.prepare_log(area, file) {
            Ok(prepared) => prepared,
            Err(error) => return Ok(self.refuse("dirty log", error)),
        };
        let mut pieces: Vec<(Span, &OwnedFd)> = buffer.span.map(|span| (span, file.as_ref())).into_iter().collect();
        if let (Some(place), Some(tail)) = (&buffer.tail, &tail) {
            pieces.push((tail.span(place)?, tail.window_file()));
        }
        let spans: Vec<Span> = pieces.iter().map(|(span, _)| *span).collect();
        let before = self.mapped_in(Area::LOG);
        if let Err(error) = self.map_buffer(&pieces).await? {
            return Ok(self.refuse("dirty log", error));
        }
        match self.ask(translate::log(area, buffer.offset)).await? {
            FrontEndReply::LogBase => {}
            FrontEndReply::Acknowledgement(_) => {
                self.keep_only(Area::LOG, &before).await?;
                return Ok(Answer::Acknowledgement(REFUSED));
            }
            _ => return Err(unexpected_answer(NAME)),
        }
        // After the answer the front-end takes the log before for itself.
        self.merge_log_tail();
        self.session.log_tail = tail;
        self.keep_only(Area::LOG, &spans).await?;
        Ok(Answer::Reply(FrontEndReply::LogBase))
    }

    /// Where a log goes, with the page for its end: the one that there is, if it is the same log, so that no bit is lost.
    fn prepare_log(&self, area: &LogArea, file: &Descriptor) -> Result<(Buffer, Option<Rc<LogTail>>), LogError> {
        let identity = file_identity(file)?;
        let mapped = self.appliance.window.mapped();
        let buffer = Area::LOG.place(identity, area.mmap_offset, area.size, mapped)?;
        let Some(tail) = buffer.tail else { return Ok((buffer, None)) };
        if let Some(known) = self.session.log_tail.as_ref().filter(|known| known.serves(identity.0, &tail)) {
            return Ok((buffer, Some(Rc::clone(known))));
        }
        let buffer = Area::LOG.place_anew(identity, area.mmap_offset, area.size, mapped)?;
        Ok((buffer, Some(Rc::new(LogTail::new(file, identity.0, tail)?))))
    }

    /// Moves what back-ends have set in the window's own page into the front-end's log.
    pub(super) fn merge_log_tail(&self) {
        if let Some(tail) = &self.session.log_tail {
            tail.merge();
        }
    }

    pub(super) async fn set_log_signal(&mut self, descriptor: &Descriptor) -> Result<Answer, SessionError> {
        // Before the request: the back-end may signal as soon as it has it.
        if let Err(error) = self.appliance.doorbells.set_log_target(Rc::clone(descriptor)) {
            return Ok(self.refuse("eventfd of the dirty log", error));
        }
        let peer = self.appliance.doorbells.log_peer();
        self.ask_acknowledgement(translate::log_signal(peer)).await.map(Answer::Acknowledgement)
    }
}

impl LogTail {
    /// The page's mapping at its place in the window.
    fn span(&self, place: &Tail) -> Result<Span, ApplianceError> {
        let (file, len) = file_identity(self.window_file())?;
        Ok(Span { file, file_offset: FileOffset(0), len, window_offset: place.window_offset })
    }
}
