//! An appliance: its VMM, and in its guest the real agent with a back-end. It boots, and may reboot, hang or be killed at any
//! moment.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, spawn_local};
use tokio::time::sleep;
use vvu_agent::control::{ControlError, ControlEvent, ControlPort};
use vvu_agent::doorbell::{Doorbell, DoorbellError, SignalsInUse};
use vvu_agent::session::DeviceSet;
use vvu_agent::uuid::Uuid;
use vvu_agent::window::{Backing, NotBacked, ReadError, Window, WindowNode};
use vvu_protocol::address::WindowOffset;
use vvu_protocol::control::{CONFIG_LEN, ConfigSpace, Frame, Status};
use vvu_protocol::dax::NODE_OFFSET;
use vvu_protocol::doorbell::{PeerId, Vector};

use super::device::Gone;
use super::file;
use super::host::BackEndHost;
use super::ring::DriverRing;
use super::vmm::Vmm;
use super::world::{UUID, World};

/// A boot takes up to this long.
const BOOT: Duration = Duration::from_secs(3);

/// The launcher ends a VMM that the bridge has dropped within this time.
const LAUNCHER: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(crate) struct Appliance {
    pub(crate) number: u32,
    world: Rc<World>,
    vmm: RefCell<Option<Rc<Vmm>>>,
    pub(crate) back_end: Rc<BackEndHost>,
    /// Tasks of the guest, and those of the host.
    guest: RefCell<Vec<AbortHandle>>,
    host: RefCell<Vec<AbortHandle>>,
    /// Its agent does nothing any more.
    pub(crate) hung: Cell<bool>,
    alive: Cell<bool>,
}

impl Appliance {
    /// Starts an appliance; it connects, boots and serves by itself.
    pub(crate) fn start(number: u32, world: &Rc<World>, connecting: &Rc<tokio::sync::Mutex<()>>) -> Rc<Self> {
        world.disturb(&format!("appliance {number} starts"));
        let appliance = Rc::new(Self {
            number,
            world: Rc::clone(world),
            vmm: RefCell::default(),
            back_end: BackEndHost::new(number, world),
            guest: RefCell::default(),
            host: RefCell::default(),
            hung: Cell::new(false),
            alive: Cell::new(true),
        });
        let life = Rc::clone(&appliance).live(Rc::clone(connecting));
        appliance.host.borrow_mut().push(spawn_local(life).abort_handle());
        appliance
    }

    async fn live(self: Rc<Self>, connecting: Rc<tokio::sync::Mutex<()>>) {
        let connected = {
            // All of them are one process, by which the bridge tells their connections apart: one after the other, and
            // not before it has seen the end of one that did not get to the end.
            let _held = connecting.lock().await;
            sleep(Duration::from_millis(1)).await;
            Vmm::start(self.number, &self.world).await
        };
        let Ok(vmm) = connected else {
            self.world.note(format!("appliance {} is turned away", self.number));
            return self.kill();
        };
        self.vmm.replace(Some(Rc::clone(&vmm)));
        self.boot(&vmm);
        vmm.abandonment.notified().await;
        sleep(self.world.random.time(LAUNCHER)).await;
        self.world.disturb(&format!("appliance {} is ended by the launcher", self.number));
        self.kill();
    }

    fn boot(self: &Rc<Self>, vmm: &Rc<Vmm>) {
        let (appliance, vmm) = (Rc::clone(self), Rc::clone(vmm));
        let guest = spawn_local(async move {
            let _ = appliance.run_guest(vmm).await;
            // The devices are gone: the guest waits for its end.
            std::future::pending::<()>().await;
        });
        self.guest.borrow_mut().push(guest.abort_handle());
    }

    /// What the agent's `main` does.
    async fn run_guest(&self, vmm: Rc<Vmm>) -> Result<(), Gone> {
        sleep(self.world.random.time(BOOT)).await;
        vmm.doorbell.complete().await;
        let (mut receive, transmit) = vmm.rings();
        receive.offer_buffers();
        vmm.start_control([&receive, &transmit]).await?;
        vmm.refresh_config().await;
        vmm.start_window().await?;
        let mut port = Port { vmm: Rc::clone(&vmm), receive, transmit };
        let len = loop {
            match port.config().unwrap().window_len {
                0 => port.config_change().await.unwrap(),
                len => break len,
            }
        };
        let node = WindowNode { file: Arc::new(file::sealed(len - NODE_OFFSET)), len };
        let window = SimulatedWindow { vmm: Rc::clone(&vmm), node };
        self.world.note(format!("appliance {}: devices are up", self.number));
        let doorbells = Doorbells(Rc::clone(&vmm));
        let supervisor = self.back_end.supervisor(&vmm);
        let mut set = DeviceSet::new(Uuid(UUID), port, doorbells, window, supervisor);
        let Err(error) = set.serve().await;
        self.world.note(format!("appliance {}: {error:?}", self.number));
        let Err(error) = set.stay_down().await;
        panic!("appliance {}: {error:?}", self.number);
    }

    fn end_guest(&self) {
        self.guest.borrow_mut().drain(..).for_each(|task| task.abort());
        self.back_end.kill();
    }

    /// The guest crashes or reboots: its machine is reset, and it boots again.
    pub(crate) fn reboot(self: &Rc<Self>) {
        let Some(vmm) = self.vmm() else { return };
        self.world.disturb(&format!("appliance {} reboots", self.number));
        self.end_guest();
        self.hung.set(false);
        let appliance = Rc::clone(self);
        let rebooting = spawn_local(async move {
            if vmm.reset().await.is_ok() {
                appliance.boot(&vmm);
            }
        });
        self.guest.borrow_mut().push(rebooting.abort_handle());
    }

    /// The agent stops in its tracks; its back-end goes on.
    pub(crate) fn hang(&self) {
        self.world.disturb(&format!("the agent of appliance {} hangs", self.number));
        self.hung.set(true);
        self.guest.borrow_mut().drain(..).for_each(|task| task.abort());
        self.back_end.freeze_supervisor();
    }

    /// The VMM is killed.
    pub(crate) fn kill(&self) {
        if !self.alive.replace(false) {
            return;
        }
        self.end_guest();
        if let Some(vmm) = self.vmm.take() {
            vmm.kill();
        }
        self.host.borrow_mut().drain(..).for_each(|task| task.abort());
    }

    pub(crate) fn world(&self) -> &Rc<World> {
        &self.world
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.alive.get()
    }

    /// The VMM, if it is there and has connected.
    pub(crate) fn vmm(&self) -> Option<Rc<Vmm>> {
        self.vmm.borrow().clone()
    }

    /// Whether it might serve a front-end, now or soon, if nobody disturbs it.
    pub(crate) fn is_of_use(&self) -> bool {
        let abandoned = self.vmm().is_some_and(|vmm| vmm.abandoned.get());
        self.is_alive() && !self.hung.get() && !abandoned && !self.back_end.is_given_up()
    }

    /// Number of the protocol's session that its guest has seen last, if that one goes on.
    pub(crate) fn session(&self) -> Option<u32> {
        let vmm = self.vmm()?;
        let bytes: [u8; CONFIG_LEN] = vmm.control.config.borrow().as_slice().try_into().unwrap();
        let config = ConfigSpace::decode(&bytes).ok()?;
        config.status.contains(Status::BACK_END_UP | Status::FRONT_END_UP).then_some(config.session)
    }
}

/// The control device, as the agent drives it.
#[derive(Debug)]
struct Port {
    vmm: Rc<Vmm>,
    receive: DriverRing,
    transmit: DriverRing,
}

impl ControlPort for Port {
    fn config(&mut self) -> Result<ConfigSpace, ControlError> {
        let bytes: [u8; CONFIG_LEN] = self.vmm.control.config.borrow().as_slice().try_into().unwrap();
        ConfigSpace::decode(&bytes).map_err(ControlError::Profile)
    }

    fn set_back_end_up(&mut self, up: bool) -> Result<(), ControlError> {
        self.vmm.write_status(if up { Status::BACK_END_UP } else { Status::empty() });
        Ok(())
    }

    async fn event(&mut self) -> Result<ControlEvent, ControlError> {
        loop {
            if self.receive.has_used() {
                self.vmm.look_at_status().await;
                let bytes = self.receive.take_used().expect("it was there");
                self.receive.offer_buffers();
                return Ok(ControlEvent::Frame(bytes));
            }
            if self.vmm.take_config_change() {
                return Ok(ControlEvent::ConfigChange);
            }
            tokio::select! {
                biased;
                signalled = self.receive.call.signalled() => drop(signalled?),
                () = self.vmm.interrupt.notified() => {}
            }
        }
    }

    async fn config_change(&mut self) -> Result<(), ControlError> {
        while !self.vmm.take_config_change() {
            self.vmm.interrupt.notified().await;
        }
        Ok(())
    }

    fn send(&mut self, frame: &Frame) -> Result<(), ControlError> {
        self.transmit.offer_bytes(&frame.encode().map_err(ControlError::Frame)?);
        Ok(())
    }
}

/// The window, as the agent sees it. Its node is a name for it and has nothing in it: the VMM knows what is where.
#[derive(Debug)]
struct SimulatedWindow {
    vmm: Rc<Vmm>,
    node: WindowNode,
}

impl Window for SimulatedWindow {
    fn window_len(&self) -> u64 {
        self.node.window_len()
    }

    fn seams(&self) -> Vec<WindowOffset> {
        self.node.seams()
    }

    fn backing(&self, start: WindowOffset, len: u64) -> Result<Backing, NotBacked> {
        self.node.backing(start, len)
    }

    fn read_u16(&self, offset: WindowOffset) -> Result<u16, ReadError> {
        let place =
            self.vmm.place(offset.0, 2).unwrap_or_else(|| panic!("the agent reads at {offset}, where nothing is"));
        Ok(u16::from_le(place.memory.load(place.offset)))
    }
}

/// The doorbell device, as the agent drives it.
#[derive(Debug)]
struct Doorbells(Rc<Vmm>);

impl Doorbell for Doorbells {
    fn vector(&mut self, vector: Vector) -> Result<Arc<OwnedFd>, DoorbellError> {
        self.0.doorbell.vector(vector)
    }

    fn peer(&mut self, peer: PeerId) -> Result<Arc<OwnedFd>, DoorbellError> {
        Ok(self.0.doorbell.peer(peer))
    }

    fn keep_only(&mut self, in_use: &SignalsInUse) {
        self.0.doorbell.keep_only(in_use);
    }
}
