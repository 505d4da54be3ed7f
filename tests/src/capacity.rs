//! A model of what many devices cost on one host, each with an appliance of its own, from what one was measured to cost.
//!
//! Pure: the measured figures and a description of the host in, tables out. Memory and descriptors add up; CPU time adds up and is
//! shared by the host's CPUs; what processes share is there once. It knows nothing of load: a device that moves data costs what its
//! requests cost, which `cargo xtask bench` measures.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// A gibibyte.
const GIB: u64 = 1 << 30;

/// Bytes of page descriptors of an appliance for each byte of a window, as one to so many (`default_memory` of the launcher).
const WINDOW_BYTES_PER_DESCRIPTOR_BYTE: u64 = 256;

/// Length of a window in the tables, in bytes: the launcher's default.
pub const DEFAULT_WINDOW: u64 = 4 * GIB;

/// What one device with an appliance of its own costs: a blk device with one queue and one CPU, ready and idle, without a driver
/// VM. `cargo xtask bench boot --json` writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The appliance's kernel.
    pub kernel: String,
    /// Length of its window in bytes.
    pub window_bytes: u64,
    /// Steps of the start, in the order of time.
    pub start: Start,
    /// CPU time of all processes until the device was ready, in ms.
    pub start_cpu_ms: u64,
    /// The appliance VM's own memory that is in use, in bytes, page descriptors of the window included.
    pub vm_bytes: u64,
    /// What QEMU has translated of the appliance's code, in bytes; there is none with KVM.
    pub translated_bytes: u64,
    /// What is left of QEMU's memory, bridge's and launcher's that no other process shares, in bytes.
    pub private_bytes: u64,
    /// Files that all devices of a host share: programs, libraries, kernel and initial RAM file system, in bytes.
    pub shared_bytes: u64,
    /// Processes.
    pub processes: u64,
    /// Their threads.
    pub threads: u64,
    /// Their file descriptors.
    pub descriptors: u64,
    /// File descriptors of the process that has most of them.
    pub most_descriptors: u64,
    /// How often all threads of bridge and launcher woke in an hour of idleness.
    pub bridge_wakeups_per_hour: u64,
    /// How often all threads of QEMU woke in an hour of idleness.
    pub appliance_wakeups_per_hour: u64,
    /// CPU time of all of it in an hour of idleness, in ms.
    pub idle_cpu_ms_per_hour: u64,
}

/// When the start of a device has reached which step, in ms since `vvu` was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// QEMU was started.
    pub qemu_started: u64,
    /// QEMU and its firmware were done.
    pub kernel_started: u64,
    /// The kernel was done.
    pub agent_started: u64,
    /// Modules were loaded.
    pub modules_loaded: u64,
    /// The control device was started.
    pub controls_started: u64,
    /// The window was there.
    pub windows_open: u64,
    /// The back-end was there, too.
    #[serde(default)]
    pub ready: u64,
}

/// A host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// CPUs, as fast as those that were measured on.
    pub cpus: u64,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// `kernel.pid_max`, which counts threads.
    pub pid_max: u64,
    /// `fs.file-max`.
    pub file_max: u64,
}

impl Default for Host {
    /// 64 CPUs, 256 GiB, and what a kernel has for the rest if nobody changes it: 1024 thread ids for each CPU but 32768 at
    /// least, and a file for every 10 KiB of memory.
    fn default() -> Self {
        Self { cpus: 64, memory_bytes: 256 * GIB, pid_max: 65536, file_max: 26_843_545 }
    }
}

/// What so many devices cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Devices.
    pub devices: u64,
    /// Memory in bytes, without driver VMs.
    pub memory_bytes: u64,
    /// Of it, what only TCG needs.
    pub translated_bytes: u64,
    /// From the first start to the last device's being ready if all are started at once, in ms.
    pub start_ms: u64,
    /// Thousandths of a CPU while all are idle.
    pub idle_milli_cpus: u64,
    /// Wake-ups each second while all are idle.
    pub idle_wakeups_per_second: u64,
    /// Threads.
    pub threads: u64,
    /// File descriptors.
    pub descriptors: u64,
}

/// How many devices something of the host is enough for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HostLimit {
    /// What it is.
    pub name: &'static str,
    /// Devices.
    pub devices: u64,
}

/// What one device can have of something, however many devices there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceLimit {
    /// What it is.
    pub name: &'static str,
    /// How many there are.
    pub limit: u64,
    /// What takes of them, and what happens when they run out.
    pub use_of_it: &'static str,
}

/// Limits of one device. The first four are QEMU's, the others KVM's.
pub const DEVICE_LIMITS: [DeviceLimit; 7] = [
    DeviceLimit {
        name: "vhost-user memory regions",
        limit: 8,
        use_of_it: "the appliance's own memory, and each mapping in its windows; devices start first, so that more mappings only cost \
                    a warning of QEMU",
    },
    DeviceLimit {
        name: "device sets of an appliance",
        limit: 8,
        use_of_it: "one for each port of a switch or program; a PCI root bus has no room for more",
    },
    DeviceLimit {
        name: "MSI-X vectors of a doorbell device",
        limit: 2048,
        use_of_it: "one for each queue, and one for each kick that is handed over until the appliance restarts; there are 255 more than \
                    queues at least, and when they run out the bridge relays",
    },
    DeviceLimit {
        name: "peer ids of a doorbell device",
        limit: 65535,
        use_of_it: "one for each call that is handed over, until the appliance restarts; when they run out, the bridge relays",
    },
    DeviceLimit {
        name: "KVM: ioeventfds of a VM",
        limit: 1000,
        use_of_it: "one for each peer that was announced and has not been given up",
    },
    DeviceLimit {
        name: "KVM: GSI routes of a VM",
        limit: 4096,
        use_of_it: "one for each vector that has an eventfd, and 24 of the IOAPIC",
    },
    DeviceLimit {
        name: "KVM: memory slots of a VM",
        limit: 32764,
        use_of_it: "one for each mapping in a window, and about 10 of the machine",
    },
];

/// Computes what devices cost.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    measured: &'a Measured,
    host: Host,
    window_bytes: u64,
}

impl<'a> Model<'a> {
    /// A model of devices with windows of `window_bytes` on `host`.
    #[must_use]
    pub fn new(measured: &'a Measured, host: Host, window_bytes: u64) -> Self {
        Self { measured, host, window_bytes }
    }

    /// Memory of one more device, in bytes.
    fn memory_each(&self) -> u64 {
        let descriptors = |window: u64| window / WINDOW_BYTES_PER_DESCRIPTOR_BYTE;
        let Measured { vm_bytes, translated_bytes, private_bytes, window_bytes, .. } = self.measured;
        let vm = vm_bytes.saturating_sub(descriptors(*window_bytes)) + descriptors(self.window_bytes);
        vm + translated_bytes + private_bytes
    }

    /// What `devices` devices cost.
    #[must_use]
    pub fn cost(&self, devices: u64) -> Cost {
        let Measured { start, start_cpu_ms, .. } = self.measured;
        let wakeups = self.measured.bridge_wakeups_per_hour + self.measured.appliance_wakeups_per_hour;
        // One boots on one CPU and takes its time; many share all of them.
        let start_ms = start.ready.max(devices * start_cpu_ms / self.host.cpus.max(1));
        Cost {
            devices,
            memory_bytes: self.measured.shared_bytes + devices * self.memory_each(),
            translated_bytes: devices * self.measured.translated_bytes,
            start_ms,
            idle_milli_cpus: (devices * self.measured.idle_cpu_ms_per_hour).div_ceil(3600),
            idle_wakeups_per_second: (devices * wakeups).div_ceil(3600),
            threads: devices * self.measured.threads,
            descriptors: devices * self.measured.descriptors,
        }
    }

    /// What the host is enough for, that which ends first before the others.
    #[must_use]
    pub fn host_limits(&self) -> Vec<HostLimit> {
        let Measured { shared_bytes, threads, descriptors, idle_cpu_ms_per_hour, .. } = self.measured;
        let memory = self.host.memory_bytes.saturating_sub(*shared_bytes);
        let enough = |name, all: u64, each: u64| HostLimit { name, devices: all / each.max(1) };
        let mut limits = vec![
            enough("memory", memory, self.memory_each()),
            enough("thread ids (kernel.pid_max)", self.host.pid_max, *threads),
            enough("open files (fs.file-max)", self.host.file_max, *descriptors),
            enough("CPUs, all devices idle", self.host.cpus * 3_600_000, *idle_cpu_ms_per_hour),
        ];
        limits.sort_by_key(|limit| limit.devices);
        limits
    }

    /// Everything as Markdown, for the numbers of devices.
    #[must_use]
    pub fn markdown(&self, numbers: &[u64]) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_markdown(numbers, &mut text);
        text
    }

    fn write_markdown(&self, numbers: &[u64], out: &mut String) -> std::fmt::Result {
        let Host { cpus, memory_bytes, .. } = self.host;
        let mib = |bytes: u64| bytes >> 20;
        writeln!(
            out,
            "A host with {cpus} CPUs and {} GiB; windows of {} GiB; figures under {}.\n",
            memory_bytes / GIB,
            self.window_bytes / GIB,
            self.measured.accelerator.to_uppercase()
        )?;
        writeln!(
            out,
            "| devices | memory | without TCG's translated code | all ready after | CPUs while idle | wake-ups/s | threads | descriptors |"
        )?;
        writeln!(out, "| --- | --- | --- | --- | --- | --- | --- | --- |")?;
        for cost in numbers.iter().map(|devices| self.cost(*devices)) {
            writeln!(
                out,
                "| {} | {} MiB | {} MiB | {:.1} s | {:.3} | {} | {} | {} |",
                cost.devices,
                mib(cost.memory_bytes),
                mib(cost.memory_bytes - cost.translated_bytes),
                cost.start_ms as f64 / 1e3,
                cost.idle_milli_cpus as f64 / 1e3,
                cost.idle_wakeups_per_second,
                cost.threads,
                cost.descriptors
            )?;
        }
        writeln!(out, "\n| of the host | is enough for so many devices |\n| --- | --- |")?;
        for HostLimit { name, devices } in self.host_limits() {
            writeln!(out, "| {name} | {devices} |")?;
        }
        writeln!(out, "\n| of one device, whatever their number | limit | what takes of it |\n| --- | --- | --- |")?;
        for DeviceLimit { name, limit, use_of_it } in DEVICE_LIMITS {
            writeln!(out, "| {name} | {limit} | {use_of_it} |")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn measured() -> Measured {
        let start = Start {
            qemu_started: 1,
            kernel_started: 2,
            agent_started: 3,
            modules_loaded: 4,
            controls_started: 5,
            windows_open: 6,
            ready: 5000,
        };
        Measured {
            accelerator: "tcg".to_owned(),
            kernel: "6.12".to_owned(),
            window_bytes: 4 * GIB,
            start,
            start_cpu_ms: 4000,
            vm_bytes: 100 * MIB,
            translated_bytes: 70 * MIB,
            private_bytes: 10 * MIB,
            shared_bytes: 80 * MIB,
            processes: 3,
            threads: 8,
            descriptors: 100,
            most_descriptors: 60,
            bridge_wakeups_per_hour: 0,
            appliance_wakeups_per_hour: 7200,
            idle_cpu_ms_per_hour: 3600,
        }
    }

    #[test]
    fn what_is_shared_is_there_once_and_a_start_takes_its_time() {
        let measured = measured();
        let model = Model::new(&measured, Host::default(), 4 * GIB);
        let one = model.cost(1);
        assert_eq!((one.memory_bytes, one.translated_bytes), (260 * MIB, 70 * MIB));
        assert_eq!((one.start_ms, one.idle_milli_cpus, one.idle_wakeups_per_second), (5000, 1, 2));
        let many = model.cost(1000);
        assert_eq!(many.memory_bytes, 180_080 * MIB);
        assert_eq!((many.start_ms, many.threads, many.descriptors), (62_500, 8000, 100_000));
    }

    #[test]
    fn a_window_costs_its_page_descriptors() {
        let measured = measured();
        let of = |window| Model::new(&measured, Host::default(), window).cost(1).memory_bytes;
        assert_eq!(of(16 * GIB) - of(4 * GIB), 48 * MIB);
        assert_eq!(of(4 * GIB) - of(GIB), 12 * MIB);
    }

    #[test]
    fn the_limit_that_comes_first_is_told_first() {
        let measured = measured();
        let limits = Model::new(&measured, Host::default(), 4 * GIB).host_limits();
        assert_eq!(limits[0], HostLimit { name: "memory", devices: (256 * GIB - 80 * MIB) / (180 * MIB) });
        assert!(limits.is_sorted_by_key(|limit| limit.devices));
        let small = Host { pid_max: 80, ..Host::default() };
        let limits = Model::new(&measured, small, 4 * GIB).host_limits();
        assert_eq!(limits[0], HostLimit { name: "thread ids (kernel.pid_max)", devices: 10 });
    }

    /// The document holds what the model makes of the figures beside it.
    #[test]
    fn the_document_is_what_the_model_prints() {
        let measured: Measured = serde_json::from_str(include_str!("../../docs/capacity.json")).unwrap();
        let tables = Model::new(&measured, Host::default(), DEFAULT_WINDOW).markdown(&[1, 100, 1000]);
        let document = include_str!("../../docs/capacity.md");
        assert!(document.contains(&tables), "docs/capacity.md lacks what `cargo xtask capacity` prints:\n{tables}");
    }
}
