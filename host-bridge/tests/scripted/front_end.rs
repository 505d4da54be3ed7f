//! The front-end, scripted: the VMM of a driver VM, or somebody who only pretends to be one.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, RawMessage, VringFile};
use vvu_socket::{MessageSocket, SocketError};

use super::vmm::Vmm;
use super::{Journal, identity, memory_file, within};

/// Where the front-end's process has mapped driver memory: far from every other address space.
pub(crate) const USER_BASE: u64 = 0x7fa4_0000_0000;

/// Most descriptors that are ever sent at once.
const MANY: usize = 64;

/// One connection.
#[derive(Debug)]
pub(crate) struct FrontEnd {
    socket: MessageSocket,
    stream: UnixStream,
    journal: Journal,
}

impl FrontEnd {
    pub(crate) fn connect(path: &Path, journal: Journal) -> Self {
        Self::new(UnixStream::connect(path).unwrap(), journal)
    }

    pub(crate) fn new(stream: UnixStream, journal: Journal) -> Self {
        let socket = MessageSocket::new(stream.try_clone().unwrap()).unwrap();
        Self { socket, stream, journal }
    }

    pub(crate) async fn send(&self, request: FrontEndRequest<OwnedFd>, needs_reply: bool) {
        self.socket.send(&request.encode(needs_reply)).await.unwrap();
    }

    /// Sends bytes as they are, with any number of descriptors.
    pub(crate) fn send_raw(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// Waits for the next message, as it is.
    pub(crate) async fn raw_reply(&mut self) -> RawMessage<OwnedFd> {
        let message = within("a reply", self.socket.recv()).await.unwrap();
        message.expect("the bridge closed the connection instead of a reply")
    }

    /// Waits for the reply to the request with this code.
    pub(crate) async fn reply(&mut self, code: u32) -> FrontEndReply<OwnedFd> {
        let message = within(&format!("the reply to request {code}"), self.socket.recv()).await.unwrap();
        let message =
            message.unwrap_or_else(|| panic!("the bridge closed the connection instead of a reply to {code}"));
        let reply = FrontEndReply::decode(code, message).unwrap();
        self.journal.note(format!("reply {reply:?}"));
        reply
    }

    /// Waits for the acknowledgement of the request with this code.
    pub(crate) async fn acknowledgement(&mut self, code: u32) -> u64 {
        match self.reply(code).await {
            FrontEndReply::Acknowledgement(value) => value,
            other => panic!("expected an acknowledgement, {other:?} came"),
        }
    }

    /// Waits until the bridge closes the connection.
    pub(crate) async fn sees_end(&mut self) {
        match within("the bridge to close the connection", self.socket.recv()).await {
            Ok(None) => {}
            // What the front-end has sent and nobody has read.
            Err(SocketError::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("expected the end of the connection, {other:?} came"),
        }
    }

    /// Whether there is a message, or the end of the connection.
    pub(crate) fn has_message(&self) -> bool {
        self.ready_for(PollFlags::IN)
    }

    fn ready_for(&self, what: PollFlags) -> bool {
        let mut polled = [PollFd::new(&self.stream, what)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() != 0
    }

    /// Sends the same bytes until the bridge takes no more, because nobody reads its answers.
    pub(crate) async fn fills_socket(&self, bytes: &[u8], vmm: &Vmm) {
        while self.ready_for(PollFlags::OUT) {
            while self.ready_for(PollFlags::OUT) {
                self.socket.send_bytes(bytes, &[]).await.unwrap();
            }
            vmm.fence().await;
        }
    }
}

/// The request that hands over an eventfd, or none, for a queue.
pub(crate) fn vring_file(index: u8, descriptor: Option<&OwnedFd>) -> VringFile<OwnedFd> {
    VringFile { index, descriptor: descriptor.map(|descriptor| descriptor.try_clone().unwrap()) }
}

/// Memory of a driver VM, in one file.
#[derive(Debug)]
pub(crate) struct DriverMemory {
    pub(crate) file: OwnedFd,
    len: u64,
}

impl DriverMemory {
    pub(crate) fn new(len: u64) -> Self {
        Self { file: memory_file(len), len }
    }

    pub(crate) fn identity(&self) -> (u64, u64) {
        identity(&self.file)
    }

    /// A region of the file, with a descriptor of its own.
    pub(crate) fn region(&self, offset: u64, size: u64) -> (MemoryRegion, OwnedFd) {
        let region = MemoryRegion {
            guest_address: GuestAddress(offset),
            size,
            user_address: UserAddress(USER_BASE + offset),
            mmap_offset: FileOffset(offset),
        };
        (region, self.file.try_clone().unwrap())
    }

    /// The table of a PC: below and above the hole of its VGA card.
    pub(crate) fn pc_table(&self) -> FrontEndRequest<OwnedFd> {
        let regions = vec![self.region(0, 0xa_0000), self.region(0xc_0000, self.len - 0xc_0000)];
        FrontEndRequest::SetMemTable(regions)
    }

    /// A table with the whole file as one region.
    pub(crate) fn whole(&self) -> FrontEndRequest<OwnedFd> {
        FrontEndRequest::SetMemTable(vec![self.region(0, self.len)])
    }
}

/// As many borrowed descriptors of one file.
pub(crate) fn repeated(file: &OwnedFd, count: usize) -> Vec<BorrowedFd<'_>> {
    vec![file.as_fd(); count]
}
