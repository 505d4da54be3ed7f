use vvu_protocol::address::{FileOffset, GuestAddress, UserAddress};

use super::*;

const DONE: FrontEndReply<Descriptor> = FrontEndReply::Acknowledgement(0);

fn descriptor() -> Descriptor {
    Rc::new(vvu_socket::event::create().unwrap())
}

const fn state(num: u32) -> VringState {
    VringState { index: 0, num }
}

fn file(descriptor: &Descriptor) -> VringFile<Descriptor> {
    VringFile { index: 0, descriptor: Some(Rc::clone(descriptor)) }
}

const ADDRESSES: VringAddresses =
    VringAddresses { index: 0, flags: 0, descriptors: 0x1000, used: 0x3000, available: 0x2000, log: 0 };

/// A front-end's state after these requests, all of them done.
fn after(requests: impl IntoIterator<Item = Request>) -> DeviceState {
    let mut state = DeviceState::default();
    for request in requests {
        state.crosses(&request);
        state.apply(&request, &DONE);
    }
    state
}

/// Each step in a form that can be compared: code, resume, and the number of a vring state.
fn summary(state: &DeviceState) -> Vec<(u32, bool, u32)> {
    let of = |request: &Request| match request {
        Request::SetVringNum(state) | Request::SetVringBase(state) | Request::SetVringEnable(state) => state.num,
        _ => 0,
    };
    let steps = state.steps();
    let step = |step: &Step| match step {
        Step::Ask(request) => (request.code(), false, of(request)),
        Step::Resume(state) => (10, true, state.num),
        Step::Memory => (5, false, 0),
        Step::BackChannel => (21, false, 0),
    };
    steps.iter().map(step).collect()
}

fn started() -> Vec<Request> {
    let file = file(&descriptor());
    vec![
        Request::SetVringNum(state(256)),
        Request::SetVringBase(state(7)),
        Request::SetVringAddr(ADDRESSES),
        Request::SetVringCall(file.clone()),
        Request::SetVringKick(file),
        Request::SetVringEnable(state(1)),
    ]
}

#[test]
fn a_front_end_that_has_set_nothing_has_nothing_replayed() {
    assert!(DeviceState::default().steps().is_empty());
}

#[test]
fn the_position_of_a_vring_is_known_until_it_may_have_been_started() {
    let mut vring = after([Request::SetVringBase(state(7))]);
    assert_eq!(summary(&vring), [(10, false, 7)]);
    vring.crosses(&Request::SetVringKick(file(&descriptor())));
    assert_eq!(summary(&vring), [(10, true, 7)], "the back-end may have heard of the kick");
    vring.apply(&Request::SetVringBase(state(9)), &DONE);
    assert_eq!(summary(&vring), [(10, false, 9)]);

    let mut vring = after(started());
    assert_eq!(
        summary(&vring),
        [(8, false, 256), (9, false, 0), (10, true, 7), (13, false, 0), (12, false, 0), (18, false, 1)]
    );
    // Its position is as unknown as before if the front-end sets it while it runs.
    vring.apply(&Request::SetVringBase(state(50)), &DONE);
    assert!(summary(&vring).contains(&(10, true, 50)));
    // Drained, it is known, and for the front-end it still runs; until the next back-end may run it.
    vring.drained(0, 60);
    assert!(summary(&vring).contains(&(10, false, 60)) && summary(&vring).contains(&(12, false, 0)));
    assert_eq!(vring.started(), [0]);
    vring.crosses(&Request::SetVringKick(file(&descriptor())));
    assert!(summary(&vring).contains(&(10, true, 60)));
    // Stopped by the front-end: nothing is started or said of its addresses.
    vring.apply(&Request::GetVringBase(state(0)), &FrontEndReply::VringState(state(70)));
    assert_eq!(summary(&vring), [(8, false, 256), (10, false, 70), (13, false, 0), (18, false, 1)]);
    assert!(vring.started().is_empty());
}

#[test]
fn a_vring_without_eventfds_is_started_as_well() {
    let polled = VringFile { index: 0, descriptor: None };
    let vring = after([Request::SetVringKick(polled)]);
    assert_eq!((vring.started(), summary(&vring)), (vec![0], vec![(10, true, 0), (12, false, 0)]));
}

#[test]
fn status_0_keeps_vrings_as_they_are() {
    // QEMU 7.2 sets it before it stops its vrings.
    let mut device = after(started());
    let before = summary(&device);
    device.apply(&Request::SetStatus(15), &DONE);
    assert_eq!(summary(&device).last(), Some(&(39, false, 0)));
    device.apply(&Request::SetStatus(0), &DONE);
    assert_eq!(summary(&device), before);
}

#[test]
fn a_reset_takes_back_what_the_specification_says() {
    let (signal, memory) = (descriptor(), descriptor());
    let region = |at| MemoryRegion {
        guest_address: GuestAddress(at),
        size: 0x1000,
        user_address: UserAddress(at),
        mmap_offset: FileOffset(0),
    };
    let config = ConfigSpace { offset: 32, flags: 0, bytes: vec![1] };
    let mut device = after(started());
    for request in [
        Request::SetOwner,
        Request::SetMemTable(vec![(region(0), Rc::clone(&memory))]),
        Request::SetBackendReqFd(descriptor()),
        Request::SetConfig(config),
        Request::SetStatus(15),
        Request::SetVringErr(file(&signal)),
    ] {
        device.apply(&request, &DONE);
    }
    let inflight = Inflight { mmap_size: 4096, mmap_offset: FileOffset(0), queue_count: 1, queue_size: 8 };
    device.set_own_inflight(Some((inflight, descriptor())));
    device.apply(&Request::ResetOwner, &DONE);
    assert!(summary(&device).contains(&(18, false, 0)) && !summary(&device).contains(&(18, false, 1)));
    device.apply(&Request::ResetDevice, &DONE);
    let expected = [(3, false, 0), (5, false, 0), (21, false, 0), (13, false, 0), (14, false, 0)];
    assert_eq!(summary(&device), expected);
    // A buffer of the front-end's own is the front-end's to replace.
    device.apply(&Request::SetInflightFd(inflight, descriptor()), &DONE);
    device.apply(&Request::ResetDevice, &DONE);
    assert!(device.inflight().is_some() && device.own_inflight().is_none());
}

#[test]
fn regions_are_told_apart_by_addresses_and_size() {
    let file = descriptor();
    let region = |at, size, offset| MemoryRegion {
        guest_address: GuestAddress(at),
        size,
        user_address: UserAddress(at + 0x7000_0000),
        mmap_offset: FileOffset(offset),
    };
    let mut device = after([
        Request::SetMemTable(vec![(region(0, 0x1000, 0), Rc::clone(&file))]),
        Request::AddMemReg(region(0x1000, 0x1000, 0x1000), Rc::clone(&file)),
        Request::AddMemReg(region(0x2000, 0x1000, 0x2000), Rc::clone(&file)),
    ]);
    assert_eq!((device.regions().len(), Rc::strong_count(&file)), (3, 4));
    device.apply(&Request::RemMemReg(region(0x1000, 0x2000, 0)), &DONE);
    assert_eq!(device.regions().len(), 3);
    device.apply(&Request::RemMemReg(region(0x1000, 0x1000, 0)), &DONE);
    let left: Vec<u64> = device.regions().iter().map(|(region, _)| region.guest_address.0).collect();
    assert_eq!((left, Rc::strong_count(&file)), (vec![0, 0x2000], 3));
    device.apply(&Request::SetMemTable(Vec::new()), &DONE);
    assert_eq!((device.steps().len(), Rc::strong_count(&file)), (0, 1), "descriptors of regions that went");
}

/// Whatever is set again replaces what was set before, whose descriptors are closed.
#[test]
fn repeated_messages_keep_one_descriptor() {
    let inflight = Inflight { mmap_size: 4096, mmap_offset: FileOffset(0), queue_count: 1, queue_size: 8 };
    let log = LogArea { size: 4096, mmap_offset: FileOffset(0) };
    let requests: [fn(Descriptor, Inflight, LogArea) -> Request; 7] = [
        |descriptor, _, _| Request::SetVringKick(file(&descriptor)),
        |descriptor, _, _| Request::SetVringCall(file(&descriptor)),
        |descriptor, _, _| Request::SetVringErr(file(&descriptor)),
        |descriptor, _, log| Request::SetLogBase(log, descriptor),
        |descriptor, _, _| Request::SetLogFd(descriptor),
        |descriptor, inflight, _| Request::SetInflightFd(inflight, descriptor),
        |descriptor, _, _| Request::SetBackendReqFd(descriptor),
    ];
    for request in requests {
        let mut device = DeviceState::default();
        let descriptors: Vec<Descriptor> = (0..3).map(|_| descriptor()).collect();
        for descriptor in &descriptors {
            device.apply(&request(Rc::clone(descriptor), inflight, log), &DONE);
        }
        let held: Vec<bool> = descriptors.iter().map(|descriptor| Rc::strong_count(descriptor) > 1).collect();
        // The back channel is in use elsewhere.
        let last = !matches!(request(descriptor(), inflight, log), Request::SetBackendReqFd(_));
        assert_eq!(held, [false, false, last], "{}", request(descriptor(), inflight, log).name());
    }
}

#[test]
fn bytes_of_the_configuration_are_written_as_they_were() {
    let write = |offset, flags, bytes: &[u8]| Request::SetConfig(ConfigSpace { offset, flags, bytes: bytes.to_vec() });
    let device = after([write(0, 0, &[1, 2, 3]), write(2, 1, &[9]), write(250, 0, &[7; 6]), write(3, 1, &[8])]);
    let writes: Vec<(u32, u32, Vec<u8>)> =
        device.config_writes().map(|written| (written.offset, written.flags, written.bytes)).collect();
    assert_eq!(writes, [(0, 0, vec![1, 2]), (2, 1, vec![9, 8]), (250, 0, vec![7; 6])]);
}

#[test]
fn an_offer_only_becomes_smaller() {
    let mut device = DeviceState::default();
    let (first, second) = (Features::VERSION_1 | Features::EVENT_IDX, Features::VERSION_1 | Features::LOG_ALL);
    device.narrow_offer(second, ProtocolFeatures::all());
    assert_eq!((device.offered(), device.offered_protocol()), (None, None), "nothing was offered yet");
    device.apply(&Request::GetFeatures, &FrontEndReply::Number(first.bits()));
    device.apply(&Request::GetProtocolFeatures, &FrontEndReply::Number(ProtocolFeatures::MQ.bits()));
    device.narrow_offer(second, ProtocolFeatures::CONFIG);
    assert_eq!(device.offered(), Some(Features::VERSION_1));
    assert_eq!(device.offered_protocol(), Some(ProtocolFeatures::empty()));
}
