//! The device behind the crate's back-end: it writes down what reached it, in our types but out of the crate's values.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::ByteValued;
use vvu_protocol::address::FileOffset;
use vvu_protocol::features::{Features, ProtocolFeatures};
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{
    ConfigSpace, DeviceStatePhase, DeviceStateTransfer, FrontEndRequest as Request, Inflight, LogArea, StateDirection,
    VringAddresses, VringFile, VringState,
};

use crate::descriptor::{Identity, identity, memfd};
use crate::session::{
    CONFIG, CONFIG_OFFSET, FEATURES, INFLIGHT, PROTOCOL_FEATURES, QUEUE_COUNT, SLOT_COUNT, UUID, VRING_BASE, region,
};

/// The requests that reached the device, and the descriptors that it hands out.
pub(crate) struct Recorder {
    /// Every request that reached it.
    pub(crate) seen: Vec<Request<Identity>>,
    /// What it hands out as inflight buffer, shared object and transfer channel.
    pub(crate) own_file: File,
    channel: mpsc::Sender<Backend>,
}

/// The crate's back-end on one end of a socket, in a thread of its own.
pub(crate) struct CrateBackEnd {
    /// The device.
    pub(crate) recorder: Arc<Mutex<Recorder>>,
    /// Receives the crate's end of the channel for requests of the back-end.
    pub(crate) channel: mpsc::Receiver<Backend>,
    thread: JoinHandle<Error>,
}

impl CrateBackEnd {
    /// Serves `stream` until its end.
    pub(crate) fn serve(stream: UnixStream) -> Self {
        let (sender, channel) = mpsc::channel();
        let own_file = File::from(memfd().try_clone().unwrap());
        let recorder = Arc::new(Mutex::new(Recorder { seen: Vec::new(), own_file, channel: sender }));
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&recorder));
        let thread = std::thread::spawn(move || {
            loop {
                match handler.handle_request() {
                    Ok(()) | Err(Error::ReqHandlerError(_)) => {}
                    Err(error) => return error,
                }
            }
        });
        Self { recorder, channel, thread }
    }

    /// What the device has seen in the whole session, which has to have ended in order.
    pub(crate) async fn finish(self) -> Vec<Request<Identity>> {
        let end = tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap();
        assert!(matches!(end, Error::Disconnected), "the crate's back-end ended with: {end}");
        std::mem::take(&mut self.recorder.lock().unwrap().seen)
    }
}

fn refused() -> Error {
    Error::ReqHandlerError(io::Error::other("refused by the device"))
}

fn file(file: &File) -> Identity {
    identity(file.as_raw_fd())
}

fn vring_file(index: u8, descriptor: Option<File>) -> VringFile<Identity> {
    VringFile { index, descriptor: descriptor.as_ref().map(file) }
}

fn memory_region(theirs: &VhostUserMemoryRegion) -> MemoryRegion {
    region(theirs.guest_phys_addr, theirs.memory_size, theirs.user_addr, theirs.mmap_offset)
}

fn inflight(theirs: &VhostUserInflight) -> Inflight {
    Inflight {
        mmap_size: theirs.mmap_size,
        mmap_offset: FileOffset(theirs.mmap_offset),
        queue_count: theirs.num_queues,
        queue_size: theirs.queue_size,
    }
}

impl Recorder {
    fn note(&mut self, request: Request<Identity>) -> Result<()> {
        self.seen.push(request);
        Ok(())
    }

    /// Notes a request about a vring and refuses it if there is no such vring.
    fn note_vring(&mut self, index: u32, request: Request<Identity>) -> Result<()> {
        self.note(request)?;
        if u64::from(index) < QUEUE_COUNT { Ok(()) } else { Err(refused()) }
    }
}

impl VhostUserBackendReqHandlerMut for Recorder {
    fn set_owner(&mut self) -> Result<()> {
        self.note(Request::SetOwner)
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.note(Request::ResetOwner)
    }

    fn reset_device(&mut self) -> Result<()> {
        self.note(Request::ResetDevice)
    }

    fn get_features(&mut self) -> Result<u64> {
        self.note(Request::GetFeatures)?;
        Ok(FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.note(Request::SetFeatures(Features::from_bits_retain(features)))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions = regions.iter().map(memory_region).zip(files.iter().map(file)).collect();
        self.note(Request::SetMemTable(regions))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.note_vring(index, Request::SetVringNum(VringState { index, num }))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let flags = flags.bits();
        let addresses = VringAddresses { index, flags, descriptors, used, available, log };
        self.note_vring(index, Request::SetVringAddr(addresses))
    }

    fn set_vring_base(&mut self, index: u32, num: u32) -> Result<()> {
        self.note_vring(index, Request::SetVringBase(VringState { index, num }))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.note_vring(index, Request::GetVringBase(VringState { index, num: 0 }))?;
        Ok(VhostUserVringState::new(index, VRING_BASE))
    }

    fn set_vring_kick(&mut self, index: u8, descriptor: Option<File>) -> Result<()> {
        self.note_vring(index.into(), Request::SetVringKick(vring_file(index, descriptor)))
    }

    fn set_vring_call(&mut self, index: u8, descriptor: Option<File>) -> Result<()> {
        self.note_vring(index.into(), Request::SetVringCall(vring_file(index, descriptor)))
    }

    fn set_vring_err(&mut self, index: u8, descriptor: Option<File>) -> Result<()> {
        self.note_vring(index.into(), Request::SetVringErr(vring_file(index, descriptor)))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        self.note(Request::GetProtocolFeatures)?;
        Ok(VhostUserProtocolFeatures::from_bits_truncate(PROTOCOL_FEATURES.bits()))
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.note(Request::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(features)))
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        self.note(Request::GetQueueNum)?;
        Ok(QUEUE_COUNT)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.note_vring(index, Request::SetVringEnable(VringState { index, num: enable.into() }))
    }

    fn get_config(&mut self, offset: u32, size: u32, flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let bytes = vec![0; usize::try_from(size).unwrap()];
        self.note(Request::GetConfig(ConfigSpace { offset, flags: flags.bits(), bytes }))?;
        if offset == CONFIG_OFFSET { Ok(CONFIG.to_vec()) } else { Err(refused()) }
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], flags: VhostUserConfigFlags) -> Result<()> {
        self.note(Request::SetConfig(ConfigSpace { offset, flags: flags.bits(), bytes: bytes.to_vec() }))
    }

    /// The crate does not show the descriptor; that it is the right one is seen when requests come through it.
    fn set_backend_req_fd(&mut self, backend: Backend) {
        self.channel.send(backend).unwrap();
    }

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        Err(refused())
    }

    fn get_shared_object(&mut self, uuid: VhostUserSharedMsg) -> Result<File> {
        let uuid = uuid.as_slice().try_into().expect("16 bytes");
        self.note(Request::GetSharedObject(uuid))?;
        if uuid == UUID { Ok(self.own_file.try_clone().unwrap()) } else { Err(refused()) }
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.note(Request::GetInflightFd(inflight(wanted)))?;
        let (size, offset) = (INFLIGHT.mmap_size, INFLIGHT.mmap_offset.0);
        let theirs = VhostUserInflight::new(size, offset, wanted.num_queues, wanted.queue_size);
        Ok((theirs, self.own_file.try_clone().unwrap()))
    }

    fn set_inflight_fd(&mut self, area: &VhostUserInflight, buffer: File) -> Result<()> {
        self.note(Request::SetInflightFd(inflight(area), file(&buffer)))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        self.note(Request::GetMaxMemSlots)?;
        Ok(SLOT_COUNT)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        memory: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        self.note(Request::AddMemReg(memory_region(region), file(&memory)))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.note(Request::RemMemReg(memory_region(region)))
    }

    /// Saves through the front-end's channel, loads through one of its own.
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        channel: File,
    ) -> Result<Option<File>> {
        let VhostTransferStatePhase::STOPPED = phase;
        let direction = match direction {
            VhostTransferStateDirection::SAVE => StateDirection::Save,
            VhostTransferStateDirection::LOAD => StateDirection::Load,
        };
        let transfer = DeviceStateTransfer { direction, phase: DeviceStatePhase::Stopped };
        self.note(Request::SetDeviceStateFd(transfer, file(&channel)))?;
        Ok((direction == StateDirection::Load).then(|| self.own_file.try_clone().unwrap()))
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.note(Request::CheckDeviceState)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        self.note(Request::GetShmemConfig)?;
        Ok(VhostUserShMemConfig::new(2, &[0x20_0000, 0, 0x1000]))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, log_file: File) -> Result<()> {
        let area = LogArea { size: log.mmap_size, mmap_offset: FileOffset(log.mmap_offset) };
        self.note(Request::SetLogBase(area, file(&log_file)))
    }
}
