//! Ready-to-paste configuration that points a VMM at the device's socket.
//!
//! Every VMM must share the driver VM's memory with the back-end, and each says so in its own way; that requirement is
//! part of each text. Texts are quoted for the place where they are pasted: a shell, an XML document, a JSON document.

use serde::Serialize;

use crate::plan::Plan;

/// Memory of the driver VM in the examples; the reader puts in the VM's own.
const EXAMPLE_MEMORY: &str = "2G";

/// Identifier of the device in the examples.
const DEVICE_ID: &str = "vvu0";

/// What the texts depend on.
#[derive(Debug, Clone, Copy)]
struct DeviceAddress<'a> {
    /// Absolute path of the vhost-user socket.
    socket: &'a str,
    /// Request queues of the device.
    queues: u16,
}

/// One text for one VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct VmmLines {
    /// The VMM.
    pub(crate) vmm: &'static str,
    /// How its driver VM's memory becomes shared.
    pub(crate) memory: &'static str,
    /// The text to paste.
    pub(crate) lines: String,
}

/// The texts for all VMMs.
pub(crate) fn all(plan: &Plan) -> Vec<VmmLines> {
    plan.ports.iter().flat_map(|port| of_disk(DeviceAddress { socket: &port.socket, queues: port.queues })).collect()
}

/// The texts for a disk.
fn of_disk(device: DeviceAddress<'_>) -> [VmmLines; 4] {
    [qemu(device), cloud_hypervisor(device), libvirt(device), firecracker(device)]
}

fn qemu(device: DeviceAddress<'_>) -> VmmLines {
    let chardev = format!("socket,id={DEVICE_ID},path={}", device.socket.replace(',', ",,"));
    let lines = format!(
        "-m {EXAMPLE_MEMORY} -object memory-backend-memfd,id=mem,size={EXAMPLE_MEMORY},share=on \\\n\
         -machine q35,memory-backend=mem \\\n\
         -chardev {} \\\n\
         -device vhost-user-blk-pci,chardev={DEVICE_ID},num-queues={}",
        shell_word(&chardev),
        device.queues
    );
    VmmLines { vmm: "QEMU", memory: "a memory backend with share=on as the machine's memory-backend", lines }
}

fn cloud_hypervisor(device: DeviceAddress<'_>) -> VmmLines {
    let disk = format!("vhost_user=on,socket={},num_queues={}", device.socket, device.queues);
    let lines = format!("--memory size={EXAMPLE_MEMORY},shared=on \\\n--disk {}", shell_word(&disk));
    VmmLines { vmm: "Cloud Hypervisor", memory: "--memory with shared=on", lines }
}

fn libvirt(device: DeviceAddress<'_>) -> VmmLines {
    let lines = format!(
        "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n\
         <!-- and under <devices>: -->\n\
         <disk type='vhostuser' device='disk'>\n  \
           <driver name='qemu' type='raw' queues='{}'/>\n  \
           <source type='unix' path='{}'/>\n  \
           <target dev='vdb' bus='virtio'/>\n\
         </disk>",
        device.queues,
        xml_attribute(device.socket)
    );
    VmmLines { vmm: "libvirt", memory: "<memoryBacking> with memfd and shared access", lines }
}

fn firecracker(device: DeviceAddress<'_>) -> VmmLines {
    let drive = serde_json::json!({ "drive_id": DEVICE_ID, "socket": device.socket, "is_root_device": false });
    let memory = "nothing to set: with a vhost-user drive it shares the memory itself; it uses one queue";
    VmmLines { vmm: "Firecracker", memory, lines: format!("PUT /drives/{DEVICE_ID}\n{drive}") }
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
        of_disk(DeviceAddress { socket, queues }).into_iter().find(|entry| entry.vmm == vmm).unwrap().lines
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
