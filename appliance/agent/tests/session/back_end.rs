//! A vhost-user back-end that keeps to a script and does what it is told, as a process of its own: this test binary, started
//! anew for the one "test" below.
//!
//! It writes a line into its journal for each message, before it answers, and does what a [`Command`] says.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;

use vvu_agent::process::{BackEndProgram, Output};
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    BackEndReply, BackEndRequest, DeviceStateTransfer, FrontEndReply, FrontEndRequest, Iotlb, RawMessage, ReplyPayload,
    StateDirection,
};
use vvu_socket::MessageSocket;
use vvu_socket::event::{self, Event};

use crate::command::{Command, commanded};

/// Variables that make a process a back-end: what to do, and where to listen.
const SCRIPT: &str = "VVU_TEST_SCRIPT";
const SOCKET: &str = "VVU_TEST_SOCKET";

/// What the back-end writes at the start of each of its regions, of the log and of the inflight buffer.
pub(crate) const MARK: [u8; 8] = *b"back-end";

/// Memory slots of [`Script::Slotted`].
pub(crate) const SLOTS: u64 = 32;

/// Length of the state of this device in bytes: two whole parts and a bit.
pub(crate) const STATE_LEN: usize = 10_000;

/// Messages that [`Command::Flood`] tries to send.
pub(crate) const FLOOD: u64 = 100_000;

/// A miss of the IOTLB, as [`Command::AskMiss`] tells it.
pub(crate) const MISS: Iotlb = Iotlb { iova: 0x1234_5000, size: 0x1000, user_address: 0, permission: 3, kind: 1 };

/// The state of this device.
pub(crate) fn device_state() -> Vec<u8> {
    (0..=250).cycle().take(STATE_LEN).collect()
}

/// What the back-end does besides answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Script {
    /// Nothing; it offers REPLY_ACK.
    Proper,
    /// Does not offer REPLY_ACK.
    Plain,
    /// Has memory slots.
    Slotted,
    /// Refuses SET_VRING_ADDR.
    Refusing,
    /// Dies of GET_VRING_BASE.
    Dying,
    /// Does not answer GET_VRING_BASE, but signals a call when it comes.
    Silent,
    /// Answers GET_VRING_BASE with the reply to another request.
    Lying,
    /// Says something before it was asked, after SET_OWNER.
    Chatty,
    /// Keeps the memory of connections that are gone.
    Hoarding,
    /// Dies at its start.
    StillBorn,
    /// Listens until its first front-end has come, and ends when that has gone.
    Single,
    /// Ends when its first front-end has gone, after a while in which it still listens.
    SingleSlow,
}

const SCRIPTS: [Script; 12] = [
    Script::Proper,
    Script::Plain,
    Script::Slotted,
    Script::Refusing,
    Script::Dying,
    Script::Silent,
    Script::Lying,
    Script::Chatty,
    Script::Hoarding,
    Script::StillBorn,
    Script::Single,
    Script::SingleSlow,
];

/// How the agent starts it, with the socket in `directory`.
pub(crate) fn program(script: Script, directory: &Path) -> BackEndProgram {
    this_binary("back_end::scripted", &format!("{script:?}"), directory)
}

/// As [`program`], with several sockets.
pub(crate) fn program_with(script: Script, directory: &Path, sockets: &[&str]) -> BackEndProgram {
    let sockets: Vec<_> = sockets.iter().map(|name| directory.join(name)).collect();
    let mut program = program(script, directory);
    program.environment.retain(|(name, _)| name != SOCKET);
    program.environment.push((SOCKET.into(), std::env::join_paths(&sockets).unwrap()));
    BackEndProgram { sockets, ..program }
}

/// A program that is one "test" of this binary, which finds its name for itself in `variant`.
pub(crate) fn this_binary(test: &str, variant: &str, directory: &Path) -> BackEndProgram {
    let socket = directory.join("back-end.sock");
    BackEndProgram {
        program: std::env::current_exe().unwrap(),
        arguments: ["--exact", test, "--ignored", "--nocapture", "--quiet"].map(Into::into).to_vec(),
        environment: vec![(SCRIPT.into(), variant.into()), (SOCKET.into(), socket.clone().into())],
        directory: directory.to_owned(),
        sockets: vec![socket],
        user: None,
        output: Output::Inherited,
        window: None,
    }
}

/// What [`this_binary`] was told: the variant and where to listen. A test that fails leaves no process behind.
pub(crate) fn told() -> (String, PathBuf) {
    let variant = std::env::var(SCRIPT).expect("this is no test by itself");
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    (variant, PathBuf::from(std::env::var_os(SOCKET).unwrap()))
}

#[test]
#[ignore = "the back-end of the other tests, which start it as a process"]
fn scripted() {
    let (name, sockets) = told();
    let script = SCRIPTS.into_iter().find(|script| format!("{script:?}") == name).unwrap();
    if script == Script::StillBorn {
        std::process::exit(3);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let mut listening = tokio::task::JoinSet::new();
        for socket in std::env::split_paths(&sockets) {
            listening.spawn_local(listen(script, socket));
        }
        listening.join_next().await.unwrap().unwrap();
    });
}

async fn listen(script: Script, socket: PathBuf) {
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let journal = socket.with_file_name("journal");
    let mut hoard = Vec::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        if script == Script::Single {
            std::fs::remove_file(&socket).unwrap();
        }
        let connection = Connection::new(script, &journal);
        let memory = connection.serve(MessageSocket::new(stream.into_std().unwrap()).unwrap()).await;
        match script {
            Script::Hoarding => hoard.push(memory),
            Script::Single => std::process::exit(0),
            Script::SingleSlow => {
                tokio::time::sleep(std::time::Duration::from_millis(400)).await;
                std::process::exit(0);
            }
            _ => {}
        }
    }
}

type Region = (MemoryRegion, OwnedFd);
type Answer = FrontEndReply<OwnedFd>;

const DONE: Answer = FrontEndReply::Acknowledgement(0);

struct Connection {
    script: Script,
    journal: File,
    memory: Vec<Region>,
    call: Option<OwnedFd>,
    kick: Option<Event>,
    back_channel: Option<Rc<tokio::sync::Mutex<MessageSocket>>>,
    flood: Rc<Cell<u64>>,
    next_transfer: Option<Command>,
    stops_reading: bool,
    copies_of_state: usize,
    transfer: Option<JoinHandle<bool>>,
    leaves: bool,
}

impl Connection {
    fn new(script: Script, journal: &Path) -> Self {
        let journal = File::options().append(true).create(true).open(journal).unwrap();
        Self {
            script,
            journal,
            memory: Vec::new(),
            call: None,
            kick: None,
            back_channel: None,
            flood: Rc::default(),
            next_transfer: None,
            stops_reading: false,
            copies_of_state: 1,
            transfer: None,
            leaves: false,
        }
    }

    async fn serve(mut self, mut socket: MessageSocket) -> Vec<Region> {
        while !self.leaves {
            let message = tokio::select! {
                // A front-end that closes while a message is on its way shows as an error.
                message = socket.recv() => message.unwrap_or(None),
                () = kicked(self.kick.as_ref()) => {
                    event::signal(self.call.as_ref().unwrap()).unwrap();
                    continue;
                }
            };
            let Some(message) = message else {
                return self.memory;
            };
            let asks = message.header.needs_reply;
            let request = FrontEndRequest::decode(message).unwrap();
            let (code, row) = (request.code(), request.row().unwrap());
            // An answer to this one is always asked for, if that can be done: some back-ends send none otherwise.
            let must_ask = row.name == "IOTLB_MSG" && self.script != Script::Plain;
            assert!(asks == must_ask || row.reply == ReplyPayload::None, "{} has a reply of its own", row.name);
            writeln!(self.journal, "{}{}", row.name, details(&request)).unwrap();
            let reply = self.handle(request).await;
            if self.script == Script::Silent && row.name == "GET_VRING_BASE" {
                self.call.iter().for_each(|call| event::signal(call).unwrap());
                continue;
            }
            if self.script == Script::Chatty && row.name == "SET_OWNER" {
                socket.send(&FrontEndReply::<OwnedFd>::Number(0).encode(17)).await.unwrap();
            }
            let lies = self.script == Script::Lying && row.name == "GET_VRING_BASE";
            let reply = reply.encode(if lies { 17 } else { code });
            if (row.reply != ReplyPayload::None || asks) && socket.send(&reply).await.is_err() {
                // The session has ended in between.
                return self.memory;
            }
        }
        self.memory
    }

    async fn handle(&mut self, request: FrontEndRequest<OwnedFd>) -> Answer {
        use FrontEndRequest as R;
        match request {
            R::GetFeatures => {
                let features = Features::VERSION_1 | Features::PROTOCOL_FEATURES | Features::LOG_ALL;
                FrontEndReply::Number(features.bits())
            }
            R::GetProtocolFeatures => FrontEndReply::Number(offered(self.script).bits()),
            R::SetProtocolFeatures(features) => {
                // The agent's own, whatever the front-end wants.
                let own = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIGURE_MEM_SLOTS;
                assert_eq!(features & own, offered(self.script) & own);
                DONE
            }
            // So that a test can tell processes apart.
            R::GetQueueNum => FrontEndReply::Number(u64::from(std::process::id())),
            R::GetConfig(config) => FrontEndReply::Config(Some(config)),
            R::SetConfig(config) => FrontEndReply::Acknowledgement(self.obey(commanded(&config)).await),
            R::SetBackendReqFd(socket) => {
                let socket = MessageSocket::new(UnixStream::from(socket)).unwrap();
                self.back_channel = Some(Rc::new(tokio::sync::Mutex::new(socket)));
                DONE
            }
            R::SetDeviceStateFd(transfer, pipe) => self.begin_transfer(transfer, pipe),
            R::CheckDeviceState => {
                let good = self.transfer.take().is_some_and(|transfer| transfer.join().unwrap());
                FrontEndReply::Number(u64::from(!good))
            }
            R::Iotlb(_) | R::GetStatus => FrontEndReply::Number(0),
            R::SetOwner
            | R::SetFeatures(_)
            | R::SendRarp(_)
            | R::NetSetMtu(_)
            | R::SetStatus(_)
            | R::ResetDevice
            | R::ResetOwner => DONE,
            other => self.handle_memory_or_vring(other),
        }
    }

    fn handle_memory_or_vring(&mut self, request: FrontEndRequest<OwnedFd>) -> Answer {
        use FrontEndRequest as R;
        match request {
            R::GetVringBase(_) if self.script == Script::Dying => std::process::abort(),
            R::GetVringBase(state) => FrontEndReply::VringState(state),
            R::SetMemTable(table) => {
                self.memory = table.into_iter().map(mark).collect();
                DONE
            }
            R::GetMaxMemSlots => FrontEndReply::Number(SLOTS),
            R::AddMemReg(region, file) => {
                self.memory.push(mark((region, file)));
                DONE
            }
            R::RemMemReg(region) => self.remove(&region),
            R::SetVringAddr(_) if self.script == Script::Refusing => FrontEndReply::Acknowledgement(22),
            R::SetVringCall(file) => {
                self.call = file.descriptor;
                DONE
            }
            R::SetVringKick(file) => {
                self.kick = file.descriptor.map(|kick| Event::new(kick).unwrap());
                DONE
            }
            R::SetLogBase(area, file) => {
                File::from(file).write_all_at(&MARK, area.mmap_offset.0).unwrap();
                FrontEndReply::LogBase
            }
            R::SetLogFd(eventfd) => {
                event::signal(&eventfd).unwrap();
                DONE
            }
            R::SetInflightFd(buffer, file) => {
                File::from(file).write_all_at(&MARK, buffer.mmap_offset.0).unwrap();
                DONE
            }
            R::SetVringNum(_) | R::SetVringBase(_) | R::SetVringAddr(_) | R::SetVringErr(_) | R::SetVringEnable(_) => {
                DONE
            }
            other => panic!("{} must not come through", other.name()),
        }
    }

    async fn obey(&mut self, command: Command) -> u64 {
        let asks_for_answer = true;
        match command {
            Command::AskConfigChange => return self.ask(BackEndRequest::ConfigChange.encode(asks_for_answer)).await,
            Command::AskMiss => return self.ask(BackEndRequest::Iotlb(MISS).encode(asks_for_answer)).await,
            Command::AskSharedObject => {
                return self.ask(BackEndRequest::SharedObjectAdd([1; 16]).encode(asks_for_answer)).await;
            }
            Command::AskLookup => return self.ask(BackEndRequest::SharedObjectLookup([1; 16]).encode(false)).await,
            Command::AskUnknown => {
                return self.ask(RawMessage::request(99, asks_for_answer, vec![1, 2, 3], vec![])).await;
            }
            Command::TellConfigChange => self.tell(BackEndRequest::ConfigChange.encode(false)).await,
            Command::Reply => self.tell(BackEndReply::Acknowledgement(0).encode(2)).await,
            Command::Misform => self.tell(RawMessage::request(1, false, vec![0; 5], vec![])).await,
            Command::Garble => {
                let socket = self.back_channel.clone().unwrap();
                socket.lock().await.send_bytes(&[0xff; 12], &[]).await.unwrap();
            }
            Command::Flood => {
                let (socket, count) = (self.back_channel.clone().unwrap(), Rc::clone(&self.flood));
                tokio::task::spawn_local(async move {
                    let socket = socket.lock().await;
                    while count.get() < FLOOD {
                        socket.send(&BackEndRequest::<OwnedFd>::ConfigChange.encode(false)).await.unwrap();
                        count.set(count.get() + 1);
                    }
                });
            }
            Command::CountFlood => return self.flood.get(),
            Command::CloseBackChannel => self.back_channel = None,
            Command::UseOwnPipe | Command::UseOwnFile | Command::RefuseTransfer => self.next_transfer = Some(command),
            Command::StopReading => self.stops_reading = true,
            Command::LargeState => self.copies_of_state = 100,
            Command::ForgetMemory => self.memory.clear(),
            Command::Leave => self.leaves = true,
            Command::Die => std::process::abort(),
        }
        0
    }

    async fn tell(&self, message: RawMessage<OwnedFd>) {
        self.back_channel.clone().unwrap().lock().await.send(&message).await.unwrap();
    }

    async fn ask(&self, message: RawMessage<OwnedFd>) -> u64 {
        let code = message.header.request;
        let socket = self.back_channel.clone().unwrap();
        let mut socket = socket.lock().await;
        socket.send(&message).await.unwrap();
        let Ok(Some(reply)) = socket.recv().await else {
            // The session has ended in between.
            return u64::MAX;
        };
        assert!(reply.header.is_reply && reply.header.request == code && reply.descriptors.is_empty());
        u64::from_le_bytes(reply.payload.try_into().unwrap())
    }

    fn remove(&mut self, region: &MemoryRegion) -> Answer {
        let same = |other: &MemoryRegion| {
            (other.guest_address, other.user_address, other.size)
                == (region.guest_address, region.user_address, region.size)
        };
        let found = self.memory.iter().position(|(other, _)| same(other));
        found.map_or(FrontEndReply::Acknowledgement(2), |found| {
            self.memory.remove(found);
            DONE
        })
    }

    fn begin_transfer(&mut self, transfer: DeviceStateTransfer, pipe: OwnedFd) -> Answer {
        let (ours, theirs) = match self.next_transfer.take() {
            Some(Command::UseOwnPipe) => {
                let (reader, writer) = rustix::pipe::pipe().unwrap();
                match transfer.direction {
                    StateDirection::Save => (writer, Some(reader)),
                    StateDirection::Load => (reader, Some(writer)),
                }
            }
            Some(Command::UseOwnFile) => (pipe, Some(File::open("/proc/self/exe").unwrap().into())),
            Some(_) => return FrontEndReply::DeviceState(5, None),
            None => (pipe, None),
        };
        let mut ours = File::from(ours);
        let (stops, copies) = (self.stops_reading, self.copies_of_state);
        self.transfer = Some(std::thread::spawn(move || match transfer.direction {
            StateDirection::Save => ours.write_all(&device_state().repeat(copies)).is_ok(),
            StateDirection::Load if stops => ours.read_exact(&mut [0]).is_err(),
            StateDirection::Load => {
                let mut state = Vec::new();
                ours.read_to_end(&mut state).is_ok() && state == device_state()
            }
        }));
        FrontEndReply::DeviceState(if theirs.is_some() { 0 } else { 0x100 }, theirs)
    }
}

/// Protocol features of a script.
fn offered(script: Script) -> ProtocolFeatures {
    use ProtocolFeatures as P;
    let all = P::MQ | P::REPLY_ACK | P::LOG_SHMFD | P::BACKEND_REQ | P::CONFIG | P::INFLIGHT_SHMFD | P::DEVICE_STATE;
    let all = all | P::RESET_DEVICE | P::STATUS | P::MTU | P::RARP;
    match script {
        Script::Plain => all - P::REPLY_ACK,
        Script::Slotted => all | P::CONFIGURE_MEM_SLOTS,
        _ => all,
    }
}

/// What the journal says of a request besides its name.
fn details<F>(request: &FrontEndRequest<F>) -> String {
    use FrontEndRequest as R;
    let place =
        |region: &MemoryRegion| format!(" {:x}+{:x}@{:x}", region.guest_address.0, region.size, region.mmap_offset.0);
    match request {
        R::SetMemTable(table) => table.iter().map(|(region, _)| place(region)).collect(),
        R::AddMemReg(region, _) | R::RemMemReg(region) => place(region),
        R::SetVringBase(state) => format!(" {} {:x}", state.index, state.num),
        R::SetLogBase(area, _) => format!(" {:x}@{:x}", area.size, area.mmap_offset.0),
        R::SetInflightFd(buffer, _) => {
            format!(" {:x}@{:x} {}x{}", buffer.mmap_size, buffer.mmap_offset.0, buffer.queue_count, buffer.queue_size)
        }
        _ => String::new(),
    }
}

async fn kicked(kick: Option<&Event>) {
    match kick {
        Some(kick) => drop(kick.signalled().await.unwrap()),
        None => std::future::pending().await,
    }
}

fn mark((region, file): Region) -> Region {
    let file = File::from(file);
    file.write_all_at(&MARK, region.mmap_offset.0).unwrap();
    (region, file.into())
}
