//! What is told before anything is started.

use crate::events::{DiskFacts, Event, PortFacts, Starting};
use crate::plan::{Class, Disk, Plan, Port};
use crate::runtime_dir::RuntimeDir;
use crate::supervisor::PortId;

/// The event.
pub(super) fn event(plan: &Plan, directory: &RuntimeDir) -> Event {
    let machine = &plan.machine;
    let disks: Vec<_> = plan.disks.iter().map(disk_facts).collect();
    let ports = ports(plan);
    Event::Starting(Box::new(Starting {
        class: plan.class.name(),
        disk: disks.first().filter(|_| plan.class == Class::Blk).cloned(),
        disks,
        first: ports.first().cloned(),
        ports,
        window_bytes: machine.window.0,
        memory_bytes: machine.memory.0,
        cpus: machine.cpus,
        accel: machine.accel,
        accel_reason: machine.accel_reason.clone(),
        qemu_version: machine.qemu_version.map(|version| version.to_string()).unwrap_or_default(),
        runtime_dir: directory.text().to_owned(),
        control: plan.control.clone(),
    }))
}

/// What is told of each port.
pub(super) fn ports(plan: &Plan) -> Vec<PortFacts> {
    let facts = |(number, port): (PortId, &Port)| PortFacts {
        port: number,
        socket: port.socket.clone(),
        uuid: port.uuid.clone(),
        queues: port.queues,
        mac: port.mac.map(|mac| mac.to_string()),
    };
    (0..).map(PortId).zip(&plan.ports).map(facts).collect()
}

fn disk_facts(disk: &Disk) -> DiskFacts {
    let cache = if disk.io.direct { "O_DIRECT" } else { "page cache" };
    DiskFacts {
        image: disk.image.path.clone(),
        image_bytes: disk.image.size_bytes,
        read_only: disk.image.read_only,
        disk_io: format!("{}, {cache}", disk.io.aio),
    }
}
