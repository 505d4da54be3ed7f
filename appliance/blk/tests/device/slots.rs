//! Memory slots: regions come and go one by one, in any number that a front-end may have.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::driver::{
    DATA, FrontEnd, REGION_LEN, Req, SPECIAL_FEATURES, map_region, memfd, noise, region_of, wait_event,
};
use crate::process::{ImageFile, Program};

const MIB: u64 = 1 << 20;

/// Regions that are plugged in beside the first two.
const PLUGGED: u64 = 507;

const LEN: u64 = 64 * 1024;

fn connect(program: &Program) -> FrontEnd {
    FrontEnd::connect_for(
        &program.socket(),
        |offered| offered & !SPECIAL_FEATURES,
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
    )
}

/// Places with gaps, in an order that is not that of addresses.
fn place(index: u64) -> u64 {
    2 * REGION_LEN + (index * 211 % PLUGGED) * 2 * LEN
}

#[test]
fn more_than_eight_regions_come_and_go_while_the_ring_runs() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = connect(&program);
    let slots = front_end.frontend.get_max_mem_slots().unwrap();
    assert!(slots >= PLUGGED + 2, "{slots}");
    let mut queue = front_end.queue(0, 64);
    let data = noise(LEN as usize, 1);
    front_end.fill(DATA, &data);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, LEN as u32));

    // All of them are parts of one file, as those of a VM are.
    let file = memfd(PLUGGED * LEN);
    let regions: Vec<_> = (0..PLUGGED).map(|index| region_of(&file, place(index), LEN, index * LEN)).collect();
    for (index, region) in regions.iter().enumerate() {
        front_end.frontend.add_mem_region(region).unwrap();
        if index % 50 == 0 || index as u64 == PLUGGED - 1 {
            let address = region.guest_phys_addr;
            queue.run_ok(&front_end.memory, &Req::read(0, address, LEN as u32));
            let map = GuestMemoryMmap::<()>::from_regions(vec![map_region(&file, region)]).unwrap();
            let mut found = vec![0; LEN as usize];
            map.read_slice(&mut found, GuestAddress(address)).unwrap();
            assert!(found == data, "region {index}");
        }
    }
    // One that is there already, and one that overlaps.
    front_end.frontend.add_mem_region(&regions[3]).unwrap_err();
    front_end.frontend.add_mem_region(&region_of(&file, place(3) + 4096, LEN, 0)).unwrap_err();
    for region in regions.iter().skip(1) {
        front_end.frontend.remove_mem_region(region).unwrap();
    }
    front_end.frontend.remove_mem_region(&regions[3]).unwrap_err();
    queue.run_ok(&front_end.memory, &Req::read(0, regions[0].guest_phys_addr, LEN as u32));
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, LEN as u32));

    // What is gone is out of reach, and may be put back.
    let address = regions[3].guest_phys_addr;
    queue.offer_request(&front_end.memory, 0, &Req::read(0, address, 4096));
    queue.publish(&front_end.memory);
    queue.kick();
    wait_event(&queue.error, "err");
    queue.stop(&front_end);
    front_end.frontend.add_mem_region(&regions[3]).unwrap();
    queue.clear(&front_end.memory);
    queue.start(&mut front_end, 0);
    queue.run_ok(&front_end.memory, &Req::read(0, address, 4096));
}

#[test]
fn repeated_slots_leave_nothing_behind() {
    let image = ImageFile::new(MIB);
    let program = Program::start(&image.path(), &[]);
    let mut front_end = connect(&program);
    let mut queue = front_end.queue(0, 64);
    let file = memfd(LEN);
    let region = region_of(&file, place(0), LEN, 0);
    let mut before = (0, 0);
    for round in 0..200 {
        front_end.frontend.add_mem_region(&region).unwrap();
        queue.run_ok(&front_end.memory, &Req::read(0, region.guest_phys_addr, 4096));
        // Counted at the same point of each round.
        let now = (program.open_descriptors(), program.mappings());
        if round == 1 {
            before = now;
        }
        assert!(round < 2 || now == before, "descriptors and mappings: {before:?}, then {now:?} in round {round}");
        front_end.frontend.remove_mem_region(&region).unwrap();
        if round % 20 == 0 {
            front_end.announce_memory();
        }
    }
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, 4096));
}
