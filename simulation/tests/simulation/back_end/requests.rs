//! What the back-end does for each request.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::fs::fstat;
use tokio::time::sleep_until;
use vvu_back_end::inflight::InflightBuffer;
use vvu_protocol::address::FileOffset;
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::memory::MemoryRegion;
use vvu_protocol::message::{FrontEndReply, FrontEndRequest, Inflight, VringFile, VringState};

use super::super::world::QUEUES;
use super::rings::Vring;
use super::{BackEnd, CONFIG_VERSION, Dead, Reply, offered};

const DONE: Reply = FrontEndReply::Acknowledgement(0);

/// Memory slots of a back-end that has some.
const SLOTS: u64 = 32;

impl BackEnd {
    pub(super) async fn handle(&self, request: FrontEndRequest<OwnedFd>) -> Result<Reply, Dead> {
        use FrontEndRequest as R;
        let mut state = self.state.borrow_mut();
        Ok(match request {
            R::GetFeatures => FrontEndReply::Number(offered().bits()),
            R::SetFeatures(features) => {
                assert!(offered().contains(features), "{features:?} were not offered");
                state.features = Some(features);
                DONE
            }
            R::SetOwner => {
                state.owner = true;
                DONE
            }
            R::GetProtocolFeatures => FrontEndReply::Number(self.world.kind.protocol().bits()),
            R::SetProtocolFeatures(protocol) => {
                assert!(self.world.kind.protocol().contains(protocol), "{protocol:?} were not offered");
                state.protocol = Some(protocol);
                DONE
            }
            R::GetQueueNum => FrontEndReply::Number(u64::from(QUEUES)),
            R::GetMaxMemSlots => FrontEndReply::Number(SLOTS),
            R::GetConfig(mut wanted) => {
                let start = usize::try_from(wanted.offset).unwrap();
                let mut config = state.config;
                config[CONFIG_VERSION].copy_from_slice(&self.world.config.get().to_le_bytes());
                wanted.bytes = config[start..start + wanted.bytes.len()].to_vec();
                FrontEndReply::Config(Some(wanted))
            }
            R::SetConfig(written) => {
                let start = usize::try_from(written.offset).unwrap();
                state.config[start..start + written.bytes.len()].copy_from_slice(&written.bytes);
                DONE
            }
            R::SetStatus(status) => {
                state.status = status;
                DONE
            }
            R::GetStatus => FrontEndReply::Number(state.status),
            R::SetBackendReqFd(file) => {
                state.back_channel = Some(self.use_back_channel(file));
                DONE
            }
            R::Iotlb(message) => {
                self.world.questions.arrives(&message);
                FrontEndReply::Number(0)
            }
            R::SetDeviceStateFd(transfer, file) => self.begin_transfer(&mut state, transfer.direction, file),
            other => {
                drop(state);
                return self.handle_place(other).await;
            }
        })
    }

    /// What says where something lies, or takes its time.
    async fn handle_place(&self, request: FrontEndRequest<OwnedFd>) -> Result<Reply, Dead> {
        use FrontEndRequest as R;
        match request {
            R::SetMemTable(table) => {
                let regions: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();
                for region in &regions {
                    self.at(region.mmap_offset.0, 1)?;
                }
                self.state.borrow_mut().regions = regions;
            }
            R::AddMemReg(region, _) => {
                self.at(region.mmap_offset.0, 1)?;
                self.state.borrow_mut().regions.push(region);
            }
            R::RemMemReg(region) => {
                let mut state = self.state.borrow_mut();
                let place = state.regions.iter().position(|known| known.guest_address == region.guest_address);
                state.regions.remove(place.expect("a region that was added"));
            }
            R::CheckDeviceState => {
                let transfer = self.state.borrow_mut().transfer.take().expect("a transfer that can be checked");
                return Ok(self.end_of_transfer(transfer).await);
            }
            R::SetInflightFd(inflight, _) => self.set_inflight(&inflight)?,
            R::SetLogBase(area, _) => {
                self.log_place(area.mmap_offset.0, 1)?;
                self.state.borrow_mut().log = Some(area);
                return Ok(FrontEndReply::LogBase);
            }
            other => return self.handle_vring(other).await,
        }
        Ok(DONE)
    }

    fn log_place(&self, node_offset: u64, len: u64) -> Result<(), Dead> {
        let window_offset = node_offset + NODE_OFFSET;
        let place = self.vmm.place(window_offset, len);
        place.map(drop).ok_or_else(|| self.fault(&format!("dirty log at window offset {window_offset:#x}")))
    }

    fn set_inflight(&self, inflight: &Inflight) -> Result<(), Dead> {
        let window_offset = inflight.mmap_offset.0 + NODE_OFFSET;
        let place = self.vmm.place(window_offset, 1);
        let place = place.ok_or_else(|| self.fault(&format!("inflight buffer at window offset {window_offset:#x}")))?;
        let file_len = fstat(&place.file).unwrap().st_size.unsigned_abs();
        let description = Inflight {
            mmap_size: inflight.mmap_size.min(file_len - place.offset),
            mmap_offset: FileOffset(place.offset),
            ..*inflight
        };
        let buffer = InflightBuffer::map(&File::from(place.file), &description).unwrap();
        self.state.borrow_mut().inflight = Some((buffer, place.id));
        Ok(())
    }

    async fn handle_vring(&self, request: FrontEndRequest<OwnedFd>) -> Result<Reply, Dead> {
        use FrontEndRequest as R;
        match request {
            R::SetVringNum(state) => self.vring(state.index, |vring| vring.size = u16::try_from(state.num).unwrap()),
            R::SetVringBase(state) => self.vring(state.index, |vring| vring.next = u16::try_from(state.num).unwrap()),
            R::SetVringAddr(addresses) => {
                for address in [addresses.descriptors, addresses.available, addresses.used] {
                    self.at_user(address, 16)?;
                }
                self.vring(addresses.index, |vring| vring.addresses = Some(addresses));
            }
            R::SetVringEnable(state) => self.vring(state.index, |vring| vring.enabled = state.num != 0),
            R::SetVringCall(VringFile { index, descriptor }) => {
                self.vring(u32::from(index), |vring| vring.call = descriptor.map(Rc::new));
            }
            R::SetVringErr(_) => {}
            R::SetVringKick(VringFile { index, descriptor }) => self.start(index, descriptor)?,
            R::GetVringBase(VringState { index, .. }) => {
                let place = usize::try_from(index).unwrap();
                while !self.state.borrow().vrings[place].in_flight.is_empty() {
                    if let Some(due) = self.next_due_of(place) {
                        sleep_until(due).await;
                    }
                    self.complete(Some(place)).await?;
                }
                let num = self.vring(index, |vring| {
                    (vring.started, vring.kick, vring.tracker) = (false, None, None);
                    u32::from(vring.next)
                });
                return Ok(FrontEndReply::VringState(VringState { index, num }));
            }
            R::ResetDevice => {
                let mut state = self.state.borrow_mut();
                (state.status, state.config, state.inflight) = (0, Default::default(), None);
                for vring in &mut state.vrings {
                    let call = vring.call.take();
                    *vring = Vring { call, ..Vring::default() };
                }
            }
            other => panic!("{} must not come through", other.name()),
        }
        Ok(DONE)
    }
}
