//! The window device: a virtio-pmem device whose shared memory is the window.
//!
//! [`Window`] is the task that owns the socket; [`WindowPort`] is how the session maps driver memory. QEMU drops all mappings
//! when the appliance resets; the task then maps the header again as soon as the device runs and the agent does not hold it
//! back, and the session learns by the state that its own mappings are gone.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use tokio::sync::{mpsc, oneshot, watch};
use vvu_protocol::address::FileOffset;
use vvu_protocol::dax;
use vvu_protocol::features::Features;
use vvu_protocol::message::{BackEndReply, BackEndRequest, RawMessage, ShmemMap};
use vvu_protocol::window::{HEADER_LEN, Layout, Span};
use vvu_socket::MessageSocket;

use super::control::back_channel;
use super::device::{Effect, GenericDevice, Model};
use super::{ApplianceError, sent};

const NAME: &str = "window";

/// `VIRTIO_PMEM_F_SHMEM_REGION` (virtio 1.3, section 5.19.3): the memory is shared memory region 0.
const PMEM_SHARED_MEMORY: Features = Features::from_bits_retain(1);

/// Length of virtio-pmem's configuration space in bytes; its fields are not used with a shared memory region.
const CONFIG: [u8; 16] = [0; 16];

const WINDOW_REGION: u8 = 0;
const FILLER_REGION: u8 = 1;

/// How long the appliance's VMM may take to map something.
const MAP_TIMEOUT: Duration = Duration::from_secs(20);

/// What the session has to know of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WindowState {
    /// The header is mapped and more can be.
    pub ready: bool,
    /// How often all mappings were lost.
    pub losses: u64,
}

#[derive(Debug)]
enum Operation {
    Map(ShmemMap, OwnedFd),
    Unmap(ShmemMap),
}

/// An operation of the session, which belongs to a time between two losses of all mappings.
#[derive(Debug)]
struct Ordered {
    operation: Operation,
    losses: u64,
    completion: Completion,
}

type Completion = oneshot::Sender<Result<(), ApplianceError>>;

/// How the session maps driver memory into the window. It remembers what is mapped, so that nothing stays behind.
#[derive(Debug)]
pub struct WindowPort {
    operations: mpsc::Sender<Ordered>,
    state: watch::Receiver<WindowState>,
    mapped: Vec<Span>,
    losses: u64,
}

impl WindowPort {
    /// The window's state, now and on change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<WindowState> {
        self.state.clone()
    }

    /// A session begins here, or goes on. From the next loss of all mappings on, whatever it asks for fails with
    /// [`ApplianceError::Reset`]. Answers how many losses there were so far.
    pub fn begin(&mut self) -> u64 {
        let losses = self.state.borrow().losses;
        if losses != self.losses {
            self.mapped.clear();
            self.losses = losses;
        }
        losses
    }

    /// What [`WindowPort::map`] has mapped and nobody has undone; all of it is gone after a loss.
    #[must_use]
    pub fn mapped(&self) -> &[Span] {
        if self.state.borrow().losses == self.losses { &self.mapped } else { &[] }
    }

    /// Maps a span of `file`, writable, and waits until it is done.
    ///
    /// # Errors
    /// [`ApplianceError`] if the appliance refuses, resets, or does not answer in time.
    pub async fn map(&mut self, span: &Span, file: OwnedFd) -> Result<(), ApplianceError> {
        self.perform(Operation::Map(request(span), file)).await?;
        self.mapped.push(*span);
        Ok(())
    }

    /// Undoes [`WindowPort::map`].
    ///
    /// # Errors
    /// As [`WindowPort::map`].
    pub async fn unmap(&mut self, span: &Span) -> Result<(), ApplianceError> {
        self.perform(Operation::Unmap(request(span))).await?;
        self.mapped.retain(|mapped| mapped != span);
        Ok(())
    }

    /// Undoes every [`WindowPort::map`] that was not undone or lost.
    ///
    /// # Errors
    /// [`ApplianceError`] if the appliance refuses or does not answer in time.
    pub async fn unmap_all(&mut self) -> Result<(), ApplianceError> {
        for span in std::mem::take(&mut self.mapped) {
            match self.perform(Operation::Unmap(request(&span))).await {
                Ok(()) | Err(ApplianceError::Reset) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn perform(&self, operation: Operation) -> Result<(), ApplianceError> {
        let (completion, done) = oneshot::channel();
        let ordered = Ordered { operation, losses: self.losses, completion };
        let performed = async {
            let gone = || ApplianceError::Gone { device: NAME };
            self.operations.send(ordered).await.map_err(|_| gone())?;
            done.await.map_err(|_| gone())?
        };
        let seconds = MAP_TIMEOUT.as_secs();
        let late = ApplianceError::Timeout { what: "a mapping of driver memory", seconds };
        let result = tokio::time::timeout(MAP_TIMEOUT, performed).await.unwrap_or(Err(late));
        match result {
            // An appliance that is being reset may refuse what it would have granted a moment before.
            Err(ApplianceError::Refused { .. }) if self.state.borrow().losses != self.losses => {
                Err(ApplianceError::Reset)
            }
            result => result,
        }
    }
}

fn request(span: &Span) -> ShmemMap {
    ShmemMap {
        region: WINDOW_REGION,
        file_offset: span.file_offset,
        region_offset: span.window_offset.0,
        len: span.len,
        writable: true,
    }
}

/// An operation that the appliance's VMM has not answered yet. Without a completion it is the header's.
#[derive(Debug)]
struct Pending {
    code: u32,
    name: &'static str,
    map: ShmemMap,
    completion: Option<Completion>,
}

/// The task.
#[derive(Debug)]
pub struct Window {
    socket: MessageSocket,
    device: GenericDevice,
    back_channel: Option<MessageSocket>,
    header: OwnedFd,
    operations: mpsc::Receiver<Ordered>,
    state: watch::Sender<WindowState>,
    /// The agent wants the header not to be mapped yet.
    hold: watch::Receiver<bool>,
    /// The header was mapped, or is being, since the device runs.
    has_header: bool,
    pending: Option<Pending>,
    /// Answers that are still to come for operations that a reset has cut short.
    stale_answers: u32,
}

impl Window {
    /// A window device on the socket of the appliance's VMM, and the port to it. `header` is made by [`header_file`];
    /// `state` is kept up to date; the header is not mapped while `hold` is set.
    ///
    /// # Errors
    /// [`ApplianceError`] if the socket cannot be used.
    pub fn new(
        stream: UnixStream,
        header: OwnedFd,
        layout: &Layout,
        state: watch::Sender<WindowState>,
        hold: watch::Receiver<bool>,
    ) -> Result<(Self, WindowPort), ApplianceError> {
        let socket =
            MessageSocket::new(stream).map_err(|source| ApplianceError::Io { what: "window socket", source })?;
        let mut shared_memory = vec![(WINDOW_REGION, layout.len())];
        if layout.filler_len() != 0 {
            shared_memory.push((FILLER_REGION, layout.filler_len()));
        }
        let model = Model { name: NAME, features: PMEM_SHARED_MEMORY, queue_count: 1, shared_memory };
        let (operation_sender, operations) = mpsc::channel(1);
        let port = WindowPort { operations: operation_sender, state: state.subscribe(), mapped: Vec::new(), losses: 0 };
        let window = Self {
            socket,
            device: GenericDevice::new(model)?,
            back_channel: None,
            header,
            operations,
            state,
            hold,
            has_header: false,
            pending: None,
            stale_answers: 0,
        };
        Ok((window, port))
    }

    /// Serves until the appliance or the rest of the bridge is gone.
    ///
    /// # Errors
    /// [`ApplianceError`] says what ended it.
    pub async fn run(mut self) -> Result<(), ApplianceError> {
        loop {
            let idle = self.pending.is_none();
            tokio::select! {
                message = self.socket.recv() => {
                    let message = message.map_err(|source| ApplianceError::Socket { device: NAME, source })?;
                    let message = message.ok_or(ApplianceError::Gone { device: NAME })?;
                    let effect = self.device.serve(&self.socket, message, &CONFIG).await?;
                    self.apply(effect).await?;
                }
                answer = answer(self.back_channel.as_mut()) => self.answered(answer?)?,
                // Without a control device nobody changes it any more.
                Ok(()) = self.hold.changed() => self.map_header().await?,
                ordered = self.operations.recv(), if idle => match ordered {
                    Some(ordered) => self.execute(ordered).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    async fn apply(&mut self, effect: Effect) -> Result<(), ApplianceError> {
        match effect {
            // The memory of the appliance is of no use here: virtio-pmem's queue only asks for flushes, which the
            // device-DAX node never does.
            Effect::None | Effect::Memory(_) | Effect::ConfigWritten(_) => Ok(()),
            Effect::BackChannel(descriptor) => {
                self.back_channel = Some(back_channel(descriptor)?);
                Ok(())
            }
            Effect::Started => self.map_header().await,
            Effect::Stopped => {
                self.lose_mappings();
                Ok(())
            }
        }
    }

    /// Maps the header if that is due.
    async fn map_header(&mut self) -> Result<(), ApplianceError> {
        if self.has_header || !self.device.is_running() || *self.hold.borrow_and_update() {
            return Ok(());
        }
        self.has_header = true;
        let header = self
            .header
            .try_clone()
            .map_err(|source| ApplianceError::Io { what: "duplicate of the window's header", source })?;
        let map = ShmemMap {
            region: WINDOW_REGION,
            file_offset: FileOffset(0),
            region_offset: 0,
            len: HEADER_LEN,
            writable: true,
        };
        self.start(Operation::Map(map, header), None).await
    }

    /// QEMU has dropped all mappings with the stop of the device.
    fn lose_mappings(&mut self) {
        tracing::info!("window of the appliance stopped; all mappings are gone");
        self.has_header = false;
        if let Some(pending) = self.pending.take() {
            self.stale_answers += 1;
            if let Some(completion) = pending.completion {
                // Nobody waits any more if the session has ended.
                let _ = completion.send(Err(ApplianceError::Reset));
            }
        }
        self.state.send_modify(|state| {
            state.ready = false;
            state.losses = state.losses.wrapping_add(1);
        });
    }

    async fn execute(&mut self, ordered: Ordered) -> Result<(), ApplianceError> {
        let Ordered { operation, losses, completion } = ordered;
        let state = *self.state.borrow();
        if state.ready && state.losses == losses {
            return self.start(operation, Some(completion)).await;
        }
        // Nobody waits any more if the session has ended.
        let _ = completion.send(Err(ApplianceError::Reset));
        Ok(())
    }

    async fn start(&mut self, operation: Operation, completion: Option<Completion>) -> Result<(), ApplianceError> {
        let Some(back_channel) = self.back_channel.as_ref().filter(|_| self.device.is_running()) else {
            if let Some(completion) = completion {
                let _ = completion.send(Err(ApplianceError::Reset));
            }
            return Ok(());
        };
        let (name, map, request) = match operation {
            Operation::Map(map, file) => ("SHMEM_MAP", map, BackEndRequest::ShmemMap(map, file)),
            Operation::Unmap(map) => ("SHMEM_UNMAP", map, BackEndRequest::ShmemUnmap(map)),
        };
        let code = request.code();
        sent(NAME, back_channel.send(&request.encode(true))).await?;
        self.pending = Some(Pending { code, name, map, completion });
        Ok(())
    }

    fn answered(&mut self, message: RawMessage<OwnedFd>) -> Result<(), ApplianceError> {
        if self.stale_answers > 0 {
            self.stale_answers -= 1;
            return Ok(());
        }
        let unexpected = ApplianceError::Request { device: NAME, request: "an answer nobody waits for" };
        let Pending { code, name, map, completion } = self.pending.take().ok_or(unexpected)?;
        let reply = BackEndReply::decode(code, message);
        let answer = match reply.map_err(|source| ApplianceError::Decode { device: NAME, source })? {
            BackEndReply::Acknowledgement(answer) => answer,
            BackEndReply::SharedObject(_) => u64::MAX,
        };
        let result = match answer {
            0 => Ok(()),
            answer => Err(ApplianceError::Refused { operation: name, len: map.len, offset: map.region_offset, answer }),
        };
        match completion {
            Some(completion) => {
                let _ = completion.send(result);
                Ok(())
            }
            None => {
                result?;
                tracing::debug!("header of the window is mapped");
                self.state.send_modify(|state| state.ready = true);
                Ok(())
            }
        }
    }
}

async fn answer(back_channel: Option<&mut MessageSocket>) -> Result<RawMessage<OwnedFd>, ApplianceError> {
    let Some(back_channel) = back_channel else {
        return std::future::pending().await;
    };
    let message = back_channel.recv().await.map_err(|source| ApplianceError::Socket { device: NAME, source })?;
    message.ok_or(ApplianceError::Gone { device: NAME })
}

/// The file behind the window's header, with the device-DAX info block in it.
///
/// # Errors
/// [`ApplianceError::Io`] if the process or the system has too many open files.
pub fn header_file(uuid: [u8; 16], window_len: u64) -> Result<OwnedFd, ApplianceError> {
    let make = || -> rustix::io::Result<OwnedFd> {
        let file = memfd_create("vvu-window-header", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, HEADER_LEN)?;
        rustix::io::pwrite(&file, &dax::info_block(uuid, window_len), dax::INFO_BLOCK_OFFSET)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    };
    make().map_err(|errno| ApplianceError::Io { what: "header of the window", source: errno.into() })
}
