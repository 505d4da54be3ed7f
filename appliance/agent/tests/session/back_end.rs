//! A vhost-user back-end that keeps to a script, as a process of its own: this test binary, started anew for the one
//! "test" below.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vvu_agent::supervisor::BackEndProgram;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, ReplyPayload};
use vvu_socket::MessageSocket;
use vvu_socket::event::{self, Event};

/// Variables that make a process a back-end: what to do, and where to listen.
const SCRIPT: &str = "VVU_TEST_SCRIPT";
const SOCKET: &str = "VVU_TEST_SOCKET";

/// What the back-end writes at the start of each of its regions.
pub(crate) const MARK: [u8; 8] = *b"back-end";

/// What the back-end does besides answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Script {
    /// Nothing; it offers REPLY_ACK.
    Proper,
    /// Does not offer REPLY_ACK.
    Plain,
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
}

const SCRIPTS: [Script; 9] = [
    Script::Proper,
    Script::Plain,
    Script::Refusing,
    Script::Dying,
    Script::Silent,
    Script::Lying,
    Script::Chatty,
    Script::Hoarding,
    Script::StillBorn,
];

/// How the agent starts it, with the socket in `directory`.
pub(crate) fn program(script: Script, directory: &Path) -> BackEndProgram {
    let socket = directory.join("back-end.sock");
    BackEndProgram {
        program: std::env::current_exe().unwrap(),
        arguments: ["--exact", "back_end::scripted", "--ignored", "--nocapture", "--quiet"].map(Into::into).to_vec(),
        environment: vec![(SCRIPT.into(), format!("{script:?}").into()), (SOCKET.into(), socket.clone().into())],
        socket,
        user: None,
    }
}

#[test]
#[ignore = "the back-end of the other tests, which start it as a process"]
fn scripted() {
    let name = std::env::var(SCRIPT).expect("this is no test by itself");
    // A test that fails leaves no process behind.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let script = SCRIPTS.into_iter().find(|script| format!("{script:?}") == name).unwrap();
    if script == Script::StillBorn {
        std::process::exit(3);
    }
    let socket = PathBuf::from(std::env::var_os(SOCKET).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let mut hoard = Vec::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let connection = Connection { script, memory: Vec::new(), call: None, kick: None };
            let memory = connection.serve(MessageSocket::new(stream.into_std().unwrap()).unwrap()).await;
            if script == Script::Hoarding {
                hoard.push(memory);
            }
        }
    });
}

struct Connection {
    script: Script,
    memory: Vec<(MemoryRegion, OwnedFd)>,
    call: Option<OwnedFd>,
    kick: Option<Event>,
}

impl Connection {
    async fn serve(mut self, mut socket: MessageSocket) -> Vec<(MemoryRegion, OwnedFd)> {
        loop {
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
            assert!(row.reply == ReplyPayload::None || !asks, "{} has a reply of its own", row.name);
            let reply = self.handle(request);
            if self.script == Script::Silent && row.name == "GET_VRING_BASE" {
                self.call.iter().for_each(|call| event::signal(call).unwrap());
                continue;
            }
            if self.script == Script::Chatty && row.name == "SET_OWNER" {
                socket.send(&FrontEndReply::<OwnedFd>::Number(0).encode(17)).await.unwrap();
            }
            let lies = self.script == Script::Lying && row.name == "GET_VRING_BASE";
            if row.reply != ReplyPayload::None || asks {
                socket.send(&reply.encode(if lies { 17 } else { code })).await.unwrap();
            }
        }
    }

    fn handle(&mut self, request: FrontEndRequest<OwnedFd>) -> FrontEndReply<OwnedFd> {
        let acknowledgement = if self.script == Script::Plain { None } else { Some(ProtocolFeatures::REPLY_ACK) };
        match request {
            FrontEndRequest::GetFeatures => {
                FrontEndReply::Number((Features::VERSION_1 | Features::PROTOCOL_FEATURES).bits())
            }
            FrontEndRequest::GetProtocolFeatures => FrontEndReply::Number(
                (ProtocolFeatures::MQ | acknowledgement.unwrap_or(ProtocolFeatures::empty())).bits(),
            ),
            FrontEndRequest::SetProtocolFeatures(features) => {
                assert_eq!(Some(features), acknowledgement.or(Some(ProtocolFeatures::empty())));
                FrontEndReply::Acknowledgement(0)
            }
            // So that a test can tell processes apart.
            FrontEndRequest::GetQueueNum => FrontEndReply::Number(u64::from(std::process::id())),
            FrontEndRequest::GetVringBase(_) if self.script == Script::Dying => std::process::abort(),
            FrontEndRequest::GetVringBase(state) => FrontEndReply::VringState(state),
            FrontEndRequest::GetConfig(config) => FrontEndReply::Config(Some(config)),
            FrontEndRequest::SetMemTable(table) => {
                self.memory = table.into_iter().map(mark).collect();
                FrontEndReply::Acknowledgement(0)
            }
            FrontEndRequest::SetVringAddr(_) if self.script == Script::Refusing => FrontEndReply::Acknowledgement(22),
            FrontEndRequest::SetVringCall(file) => {
                self.call = file.descriptor;
                FrontEndReply::Acknowledgement(0)
            }
            FrontEndRequest::SetVringKick(file) => {
                self.kick = file.descriptor.map(|kick| Event::new(kick).unwrap());
                FrontEndReply::Acknowledgement(0)
            }
            FrontEndRequest::SetOwner
            | FrontEndRequest::SetFeatures(_)
            | FrontEndRequest::SetVringNum(_)
            | FrontEndRequest::SetVringBase(_)
            | FrontEndRequest::SetVringAddr(_)
            | FrontEndRequest::SetVringErr(_)
            | FrontEndRequest::SetVringEnable(_) => FrontEndReply::Acknowledgement(0),
            other => panic!("{} must not come through", other.name()),
        }
    }
}

async fn kicked(kick: Option<&Event>) {
    match kick {
        Some(kick) => drop(kick.signalled().await.unwrap()),
        None => std::future::pending().await,
    }
}

fn mark((region, file): (MemoryRegion, OwnedFd)) -> (MemoryRegion, OwnedFd) {
    let file = File::from(file);
    file.write_all_at(&MARK, region.mmap_offset.0).unwrap();
    (region, file.into())
}
