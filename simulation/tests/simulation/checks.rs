//! What must be true at any moment, or at rest.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;
use vvu_protocol::message::StateDirection;
use vvu_protocol::window::FileId;

use super::device_state;
use super::front_end::Acknowledged;
use super::log;
use super::world::{QUEUES, World};

/// As long as it is the same, nobody was disturbed, and the bridge's life has not changed.
pub(crate) type Moment = (u64, u64);

pub(crate) fn moment(world: &World) -> Moment {
    (world.disturbances(), log::life().1)
}

/// Whether the front-end is served by an appliance, and nothing is about to change that.
pub(crate) fn is_served() -> bool {
    let (life, _) = log::life();
    life.starts_with("front-end connected, appliance attached") && !life.ends_with("standby ready")
}

/// The serving back-end has what the front-end was told that it has, and nothing else; so has the window.
pub(crate) fn back_end_is_as_acknowledged(world: &Rc<World>, expected: &Acknowledged) {
    let serving = world.serving().filter(|_| is_served());
    let Some((appliance, vmm)) = serving.and_then(|appliance| appliance.vmm().map(|vmm| (appliance, vmm))) else {
        return;
    };
    let Some(back_end) = appliance.back_end.back_end() else { return };
    for (region, file) in &expected.memory {
        for offset in [0, region.size - 1] {
            let seen = back_end.sees(region.guest_address.0 + offset);
            let wanted = Some((file.id, region.mmap_offset.0 + offset));
            assert_eq!(seen, wanted, "what the back-end sees at {:#x}", region.guest_address.0 + offset);
        }
    }
    for (id, range) in vmm.driver_files() {
        let known = expected.memory.iter().any(|(_, file)| file.id == id);
        assert!(known, "the window has a file at {range:#x?} that is not in the memory table");
    }
    let state = back_end.state.borrow();
    for queue in 0..usize::from(QUEUES) {
        let vring = &state.vrings[queue];
        let (started, enabled) = (expected.started[queue], expected.enabled[queue]);
        assert_eq!(
            (vring.started, vring.enabled),
            (started, enabled),
            "vring {queue} of the back-end: started, enabled"
        );
        if started {
            assert_eq!(vring.size, expected.sizes[queue], "size of vring {queue} of the back-end");
            assert!(vring.addresses.is_some() && vring.call.is_some(), "vring {queue} of the back-end");
        }
    }
    if let Some(status) = expected.status {
        assert_eq!(state.status, status, "status that the back-end has");
    }
    if expected.features.is_some() {
        assert_eq!(state.features, expected.features, "features that the back-end has");
    }
    assert_eq!(state.config, expected.config, "what the front-end has written to the configuration space");
    drop(state);
    let inflight = back_end.inflight_file();
    if expected.inflight.is_some() {
        assert_eq!(inflight, expected.inflight, "inflight buffer that the back-end has");
    } else if world.kind.inflight && expected.started.contains(&true) {
        assert!(inflight.is_some(), "the back-end has no inflight buffer");
    }
}

/// A transfer of the device's state that began at a moment has ended like this.
pub(crate) fn state_has_moved(world: &World, before: Moment, direction: StateDirection, state: &[u8], value: u64) {
    let whole = device_state::is_whole(state);
    assert!(whole || value != 0, "a state of {} bytes that is not whole is said to be good", state.len());
    if moment(world) != before {
        return;
    }
    match direction {
        StateDirection::Save => {
            assert_eq!(value == 0, whole, "nobody was disturbed, and a state is answered with {value}")
        }
        StateDirection::Load => {
            let refused = device_state::is_refused(state);
            assert_eq!(value != 0, refused, "nobody was disturbed, and a state is answered with {value}");
            let back_end = world.serving().filter(|_| is_served()).and_then(|appliance| appliance.back_end.back_end());
            let loaded = back_end.and_then(|back_end| back_end.state.borrow().loaded);
            assert!(refused || loaded == Some(device_state::check(state)), "what was loaded is not what was sent");
        }
    }
}

/// A vring was stopped: no back-end works on it.
pub(crate) fn is_stopped(world: &Rc<World>, queue: usize) {
    for appliance in world.living() {
        let Some(back_end) = appliance.back_end.back_end() else { continue };
        let in_flight = back_end.state.borrow().vrings[queue].in_flight();
        assert_eq!(in_flight, 0, "vring {queue} is stopped, appliance {} works on it", appliance.number);
    }
}

/// The front-end has taken memory away: no appliance that serves has it.
pub(crate) fn is_unmapped(world: &Rc<World>, file: FileId) {
    let Some(vmm) = world.serving().filter(|_| is_served()).and_then(|appliance| appliance.vmm()) else { return };
    assert!(!vmm.mapped_files().contains(&file), "memory that was taken away is still mapped");
}

/// The bridge is ready for another front-end, and everybody has rested: nothing is mapped anywhere.
pub(crate) fn nothing_is_mapped(world: &Rc<World>) {
    for appliance in world.living() {
        let Some(vmm) = appliance.vmm() else { continue };
        let mapped = vmm.mapped_files();
        assert!(mapped.is_empty(), "appliance {} maps {mapped:?}, and there is no front-end", appliance.number);
        let Some(back_end) = appliance.back_end.back_end() else { continue };
        assert!(
            back_end.state.borrow().regions.is_empty(),
            "the back-end of appliance {} has memory",
            appliance.number
        );
    }
}

/// Whether somebody has waited too long: nobody was disturbed, and there is an appliance that could have served.
pub(crate) fn patience(world: &Rc<World>, since: Instant, limit: Duration, what: impl FnOnce() -> String) {
    let waited = since.max(world.disturbed()).elapsed();
    let served = world.living().iter().any(|appliance| appliance.is_of_use());
    assert!(waited < limit || !served, "waited {waited:?} for {}; {}", what(), log::life().0);
}
