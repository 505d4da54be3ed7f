//! Ready-to-paste configuration that points a VMM at the device's socket.
//!
//! Every VMM must share the driver VM's memory with the back-end, and each says so in its own way; that requirement is
//! part of each text. Texts are quoted for the place where they are pasted: a shell, an XML document, a JSON document.

use serde::Serialize;

use crate::mac::Mac;
use crate::plan::{Class, Plan, Port};
use crate::supervisor::PortId;

/// Memory of the driver VM in the examples; the reader puts in the VM's own.
const EXAMPLE_MEMORY: &str = "2G";

/// Identifier of the device in the examples, but for the number of its port.
const DEVICE_ID: &str = "vvu";

/// What the texts depend on.
#[derive(Debug, Clone, Copy)]
struct DeviceAddress<'a> {
    /// The port.
    port: PortId,
    /// Absolute path of the vhost-user socket.
    socket: &'a str,
    /// Request queues of the device, or queue pairs.
    queues: u16,
}

impl DeviceAddress<'_> {
    fn id(self) -> String {
        format!("{DEVICE_ID}{}", self.port)
    }

    fn lines(self, vmm: &'static str, memory: &'static str, lines: String) -> VmmLines {
        VmmLines { port: self.port, vmm, memory, lines }
    }

    /// QEMU's options for shared memory and a socket, to which those of a device are added.
    fn qemu(self, device: &str) -> VmmLines {
        let chardev = format!("socket,id={},path={}", self.id(), self.socket.replace(',', ",,"));
        let lines = format!(
            "-m {EXAMPLE_MEMORY} -object memory-backend-memfd,id=mem,size={EXAMPLE_MEMORY},share=on \\\n\
             -machine q35,memory-backend=mem \\\n-chardev {} \\\n{device}",
            shell_word(&chardev)
        );
        self.lines("QEMU", "a memory backend with share=on as the machine's memory-backend", lines)
    }

    fn cloud_hypervisor(self, option: &str, value: &str) -> VmmLines {
        let lines = format!("--memory size={EXAMPLE_MEMORY},shared=on \\\n{option} {}", shell_word(value));
        self.lines("Cloud Hypervisor", "--memory with shared=on", lines)
    }

    fn libvirt(self, device: &str) -> VmmLines {
        let lines = format!(
            "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n\
             <!-- and under <devices>: -->\n{device}"
        );
        self.lines("libvirt", "<memoryBacking> with memfd and shared access", lines)
    }
}

/// One text for one VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct VmmLines {
    /// The port that it is about.
    pub(crate) port: PortId,
    /// The VMM.
    pub(crate) vmm: &'static str,
    /// How its driver VM's memory becomes shared.
    pub(crate) memory: &'static str,
    /// The text to paste.
    pub(crate) lines: String,
}

/// The texts for all VMMs.
pub(crate) fn all(plan: &Plan) -> Vec<VmmLines> {
    let of_port = |(number, port): (PortId, &Port)| {
        let device = DeviceAddress { port: number, socket: &port.socket, queues: port.queues };
        match (plan.class, port.mac) {
            (Class::Net, Some(mac)) => of_net(device, mac),
            (Class::Blk, _) => of_disk(device),
            _ => vec![of_program(device)],
        }
    };
    (0..).map(PortId).zip(&plan.ports).flat_map(of_port).collect()
}

/// The texts for a disk.
fn of_disk(device: DeviceAddress<'_>) -> Vec<VmmLines> {
    let DeviceAddress { socket, queues, .. } = device;
    let id = device.id();
    let drive = serde_json::json!({ "drive_id": id, "socket": socket, "is_root_device": false });
    let disk = format!(
        "<disk type='vhostuser' device='disk'>\n  <driver name='qemu' type='raw' queues='{queues}'/>\n  \
         <source type='unix' path='{}'/>\n  <target dev='vdb' bus='virtio'/>\n</disk>",
        xml_attribute(socket)
    );
    vec![
        device.qemu(&format!("-device vhost-user-blk-pci,chardev={id},num-queues={queues}")),
        device.cloud_hypervisor("--disk", &format!("vhost_user=on,socket={socket},num_queues={queues}")),
        device.libvirt(&disk),
        device.lines(
            "Firecracker",
            "nothing to set: with a vhost-user drive it shares the memory itself; it uses one queue",
            format!("PUT /drives/{id}\n{drive}"),
        ),
    ]
}

/// The texts for a network device.
fn of_net(device: DeviceAddress<'_>, mac: Mac) -> Vec<VmmLines> {
    let DeviceAddress { socket, queues, .. } = device;
    let id = device.id();
    // A vector for each ring, one for the configuration, one for the control queue.
    let multi_queue = if queues > 1 { format!(",mq=on,vectors={}", 2 * queues + 2) } else { String::new() };
    let card = format!(
        "-netdev vhost-user,id={id}-net,chardev={id},queues={queues} \\\n\
         -device virtio-net-pci,netdev={id}-net,mac={mac}{multi_queue}"
    );
    let interface = format!(
        "<interface type='vhostuser'>\n  <mac address='{mac}'/>\n  <source type='unix' path='{}' mode='client'/>\n  \
         <model type='virtio'/>\n  <driver queues='{queues}'/>\n</interface>",
        xml_attribute(socket)
    );
    let rings = 2 * queues;
    vec![
        device.qemu(&card),
        device.cloud_hypervisor("--net", &format!("vhost_user=true,socket={socket},mac={mac},num_queues={rings}")),
        device.libvirt(&interface),
    ]
}

/// A hint for a device whose class is its program's own.
fn of_program(device: DeviceAddress<'_>) -> VmmLines {
    let lines = format!("a vhost-user device of your program's class, with the socket {}", device.socket);
    device.lines("any VMM", "as for every vhost-user device", lines)
}

/// One word of a POSIX shell: quoted only where it must be.
fn shell_word(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-=,:@%+".contains(&byte);
    if text.bytes().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// A value between single quotes of an XML document (XML 1.0, section 2.4).
fn xml_attribute(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(vmm: &str, socket: &str, queues: u16) -> String {
        of_disk(DeviceAddress { port: PortId(0), socket, queues })
            .into_iter()
            .find(|entry| entry.vmm == vmm)
            .unwrap()
            .lines
    }

    #[test]
    fn qemu_gets_shared_memory_and_a_doubled_comma() {
        let lines = lines_of("QEMU", "/run/a,b/disk.sock", 4);
        assert_eq!(
            lines,
            "-m 2G -object memory-backend-memfd,id=mem,size=2G,share=on \\\n-machine q35,memory-backend=mem \\\n\
             -chardev socket,id=vvu0,path=/run/a,,b/disk.sock \\\n\
             -device vhost-user-blk-pci,chardev=vvu0,num-queues=4"
        );
    }

    #[test]
    fn a_path_with_spaces_stays_one_shell_word() {
        let lines = lines_of("Cloud Hypervisor", "/run/it's here/d.sock", 1);
        assert_eq!(
            lines,
            "--memory size=2G,shared=on \\\n--disk 'vhost_user=on,socket=/run/it'\\''s here/d.sock,num_queues=1'"
        );
    }

    #[test]
    fn a_network_device_is_named_by_its_port_and_has_its_address() {
        let device = DeviceAddress { port: PortId(1), socket: "/run/b.sock", queues: 2 };
        let all = of_net(device, "52:54:00:12:34:56".parse().unwrap());
        assert!(all.iter().all(|entry| entry.port == PortId(1)));
        let lines = all.iter().map(|entry| entry.lines.as_str()).collect::<Vec<_>>().concat();
        for part in [
            "-chardev socket,id=vvu1,path=/run/b.sock",
            "-netdev vhost-user,id=vvu1-net,chardev=vvu1,queues=2",
            "-device virtio-net-pci,netdev=vvu1-net,mac=52:54:00:12:34:56,mq=on,vectors=6",
            "--net vhost_user=true,socket=/run/b.sock,mac=52:54:00:12:34:56,num_queues=4",
            "<source type='unix' path='/run/b.sock' mode='client'/>",
        ] {
            assert!(lines.contains(part), "{part} is not in {lines}");
        }
        let one = of_net(DeviceAddress { queues: 1, ..device }, "52:54:00:12:34:56".parse().unwrap());
        assert!(one[0].lines.ends_with("mac=52:54:00:12:34:56"), "{}", one[0].lines);
    }

    #[test]
    fn libvirt_gets_well_formed_xml() {
        let lines = lines_of("libvirt", "/run/<a>&'b'/d.sock", 2);
        assert!(lines.contains("path='/run/&lt;a&gt;&amp;&apos;b&apos;/d.sock'"), "{lines}");
        assert!(lines.contains("queues='2'") && lines.contains("<access mode='shared'/>"), "{lines}");
    }

    #[test]
    fn firecracker_gets_valid_json() {
        let lines = lines_of("Firecracker", "/run/\"q\"/d.sock", 1);
        let (request, body) = lines.split_once('\n').unwrap();
        assert_eq!(request, "PUT /drives/vvu0");
        let drive: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(drive["socket"], "/run/\"q\"/d.sock");
        assert_eq!((&drive["drive_id"], &drive["is_root_device"]), (&"vvu0".into(), &false.into()));
    }
}
