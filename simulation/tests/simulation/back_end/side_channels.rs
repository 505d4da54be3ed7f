//! What runs beside the main channel: what the back-end asks the front-end, and the state of its device on the way.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use vvu_protocol::message::{BackEndReply, BackEndRequest, FrontEndReply, StateDirection};
use vvu_socket::MessageSocket;

use super::super::checks;
use super::super::device_state;
use super::super::task::OwnedTask;
use super::super::world::World;
use super::{BackEnd, Reply, State};

/// Questions over one connection. The last one counts: it is not made up for by another one.
const QUESTIONS: [u64; 4] = [0, 1, 2, 12];

/// How long the back-end waits between two of them.
const PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(10), Duration::from_secs(1)];

/// The bridge refuses in place of a front-end that takes longer.
const LATE: Duration = Duration::from_secs(30);

/// `VHOST_IOTLB_MISS`.
const MISS: u8 = 1;

/// Answer of the bridge that says "not done". The front-end has others.
const REFUSED: u64 = 1;

/// "The back-end has no descriptor of its own", and what it says of a transfer that has failed.
const NO_DESCRIPTOR: u64 = 0x100;
const FAILED: u64 = 2;

/// A transfer of the device's state; its task answers whether it has come to its end.
#[derive(Debug)]
pub(super) struct Transfer {
    direction: StateDirection,
    ended: oneshot::Receiver<Option<Vec<u8>>>,
    _task: OwnedTask,
}

impl BackEnd {
    pub(super) fn use_back_channel(&self, file: OwnedFd) -> OwnedTask {
        let socket = MessageSocket::new(file.into()).unwrap();
        let acknowledges = self.world.kind.acknowledges;
        let asker = Asker { world: Rc::clone(&self.world), number: self.number, socket, acknowledges };
        OwnedTask::spawn(asker.run())
    }

    /// SET_DEVICE_STATE_FD, with the descriptor that came or one of the back-end's own.
    pub(super) fn begin_transfer(&self, state: &mut State, direction: StateDirection, file: OwnedFd) -> Reply {
        let (mut file, mut theirs) = (file, None);
        if self.world.random.percent(30) {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
            let (ours, for_agent) = match direction {
                StateDirection::Save => (write, read),
                StateDirection::Load => (read, write),
            };
            (file, theirs) = (ours, Some(for_agent));
        }
        let (outcome, ended) = oneshot::channel();
        let world = Rc::clone(&self.world);
        let task = OwnedTask::spawn(async move {
            let moved = match direction {
                StateDirection::Save => save(&world, file).await,
                StateDirection::Load => load(&world, file).await,
            };
            let _ = outcome.send(moved);
        });
        state.transfer = Some(Transfer { direction, ended, _task: task });
        FrontEndReply::DeviceState(if theirs.is_some() { 0 } else { NO_DESCRIPTOR }, theirs)
    }

    /// CHECK_DEVICE_STATE.
    pub(super) async fn end_of_transfer(&self, transfer: Transfer) -> Reply {
        let Transfer { direction, ended, _task } = transfer;
        let state = ended.await.ok().flatten();
        let good = state.as_ref().is_some_and(|state| device_state::is_whole(state));
        if let (StateDirection::Load, true, Some(state)) = (direction, good, &state) {
            self.state.borrow_mut().loaded = Some(device_state::check(state));
        }
        FrontEndReply::Number(if good { 0 } else { FAILED })
    }
}

/// Writes a state; now and then only the half of it. Answers what was written.
async fn save(world: &World, file: OwnedFd) -> Option<Vec<u8>> {
    let mut pipe = pipe::Sender::from_owned_fd(file).unwrap();
    let mut state = device_state::some(&world.random);
    if world.random.percent(15) {
        state.truncate(state.len() / 2);
    }
    for part in state.chunks(1500) {
        world.hesitate().await;
        pipe.write_all(part).await.ok()?;
    }
    Some(state)
}

/// Reads a state to the end, or until it is clear that the back-end has no use for it.
async fn load(world: &World, file: OwnedFd) -> Option<Vec<u8>> {
    let mut pipe = pipe::Receiver::from_owned_fd(file).unwrap();
    let mut state = Vec::new();
    loop {
        world.hesitate().await;
        let is_end = pipe.read_buf(&mut state).await.ok()? == 0;
        if !state.is_empty() && device_state::is_refused(&state) {
            return None;
        }
        if is_end {
            return Some(state);
        }
    }
}

/// Asks the front-end, one question after the other.
struct Asker {
    world: Rc<World>,
    number: u32,
    socket: MessageSocket,
    acknowledges: bool,
}

impl Asker {
    async fn run(mut self) {
        let random = &self.world.random;
        let count = if self.world.kind.asks { *random.one_of(&QUESTIONS).unwrap() } else { 0 };
        let pause = *random.one_of(&PAUSES).unwrap();
        for _ in 0..count {
            sleep(self.world.random.time(pause)).await;
            // The device is where it is served: another back-end of it is none of its any more, or not yet.
            if !self.world.is_served_by(self.number) {
                break;
            }
            if self.ask().await.is_none() {
                return;
            }
        }
        if let Ok(Some(message)) = self.socket.recv().await {
            panic!("appliance {}: {message:?} comes to a back-end that has asked nothing", self.number);
        }
    }

    /// `None` if the connection is closed.
    async fn ask(&mut self) -> Option<()> {
        let question = self.world.questions.ask(MISS);
        let is_change = self.world.random.percent(40);
        let request: BackEndRequest<OwnedFd> =
            if is_change { BackEndRequest::ConfigChange } else { BackEndRequest::Iotlb(question) };
        if is_change {
            self.world.config.set(self.world.config.get() + 1);
        }
        let (code, name) = (request.code(), request.name());
        let asks = self.acknowledges && self.world.random.percent(70);
        let (before, since) = (checks::moment(&self.world), Instant::now());
        self.world.note(format!("appliance {}: back-end: {name} {}", self.number, question.user_address));
        self.world.hesitate().await;
        self.socket.send(&request.encode(asks)).await.ok()?;
        self.world.hesitate().await;
        if !asks {
            return Some(());
        }
        let message = self.socket.recv().await.ok()??;
        let BackEndReply::Acknowledgement(answer) = BackEndReply::decode(code, message).unwrap() else {
            panic!("{name} is answered with a descriptor");
        };
        self.world.note(format!("appliance {}: back-end: {name} is answered: {answer}", self.number));
        let disturbed = checks::moment(&self.world) != before;
        let late = since.elapsed() >= LATE;
        let excused = late || disturbed || !self.world.questions.heard.get();
        assert!(answer != REFUSED || excused, "{name} is refused after {:?}", since.elapsed());
        if !is_change && self.world.questions.answers.get() && !disturbed && answer != REFUSED {
            assert_eq!(self.world.questions.of(&question).answer, Some(answer), "answer to {name}");
        }
        Some(())
    }
}
