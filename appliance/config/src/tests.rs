use super::*;

fn with(device: Device) -> ApplianceConfig {
    let back_end = BackEnd {
        device_sets: vec!["6f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a11".into()],
        channels: vec![CONTROL_CHANNEL.into()],
        device,
    };
    ApplianceConfig { version: CONFIG_VERSION, log: "info".into(), back_ends: vec![back_end] }
}

fn blk_example() -> ApplianceConfig {
    let layer = |serial: &str, format| Layer { disk_serial: serial.into(), format };
    with(Device::Blk(BlkOptions {
        image: layer("vvu-disk-0", Format::Qcow2),
        backing: vec![layer("vvu-disk-1", Format::Raw)],
        read_only: false,
        queues: 4,
        serial: "vvu-0".into(),
        limits: Limits { operations_per_second: 100, bytes_per_second: 0 },
        threads: Threads { poll: Poll::Always, poll_window_us: 50, cpus: vec![0, 2] },
    }))
}

fn net_port() -> PortOptions {
    PortOptions {
        mac: "52:54:00:12:34:56".into(),
        queues: 2,
        link: true,
        filter: PortFilter { macs: Vec::new(), vlans: vec![0, 7] },
        limits: Limits::default(),
    }
}

fn net_example() -> ApplianceConfig {
    with(Device::Net(NetOptions {
        ports: vec![net_port()],
        uplink: Some("52:54:00:00:00:01".into()),
        mtu: 1500,
        threads: Threads::default(),
    }))
}

fn exec_example() -> ApplianceConfig {
    let disks = vec![ExecDisk { name: "data".into(), read_only: true }];
    with(Device::Exec(ExecOptions { command: vec!["/bin/program".into(), "{socket}".into()], disks }))
}

#[test]
fn a_document_survives_the_round_trip() {
    for config in [blk_example(), net_example(), exec_example()] {
        assert_eq!(ApplianceConfig::from_json(&config.to_json().unwrap()).unwrap(), config);
    }
}

#[test]
fn each_broken_rule_is_named() {
    type Breakage = fn(&mut ApplianceConfig);
    let of_all: [(Breakage, &str); 7] = [
        (|c| c.version = 1, "version 1"),
        (|c| c.back_ends.clear(), "0 device sets"),
        (|c| c.back_ends[0].device_sets.clear(), "0 device sets"),
        (|c| c.back_ends.push(c.back_ends[0].clone()), "twice"),
        (|c| c.back_ends[0].device_sets[0] = "6F1C".into(), "not a uuid"),
        (|c| c.back_ends[0].channels.push("../up".into()), "not a name"),
        (|c| c.back_ends[0].channels.push(CONTROL_CHANNEL.into()), "named twice"),
    ];
    let of_blk: [(Breakage, &str); 6] = [
        (
            |c| c.back_ends[0].device_sets.push("6f1c1c0e-2b57-4a55-9d0f-0d6d1f7f3a12".into()),
            "2 device sets, expected 1",
        ),
        (|c| blk(c).queues = 0, "0 queues"),
        (|c| blk(c).serial = "with space".into(), "serial number"),
        (|c| blk(c).backing[0].disk_serial = "x".repeat(21), "serial number"),
        (|c| blk(c).threads.poll_window_us = 1_000_001, "1000001 us"),
        (|c| blk(c).threads.cpus = vec![0, 1024], "CPU 1024"),
    ];
    let of_net: [(Breakage, &str); 7] = [
        (|c| net(c).ports.resize(2, net_port()), "1 device sets, expected 2"),
        (|c| net(c).ports[0].queues = 65, "65 queues"),
        (|c| net(c).ports[0].mac = "53:54:00:12:34:56".into(), "not the MAC address"),
        (|c| net(c).ports[0].filter.macs.push("52-54-00-12-34-56".into()), "not the MAC address"),
        (|c| net(c).uplink = Some(String::new()), "not the MAC address"),
        (|c| net(c).mtu = 67, "MTU 67"),
        (|c| net(c).threads.poll_window_us = u32::MAX, "4294967295 us"),
    ];
    let of_exec: [(Breakage, &str); 2] =
        [(|c| exec(c).command.clear(), "empty"), (|c| exec(c).disks[0].name = String::new(), "not a name")];
    let all = of_all.map(|case| (blk_example(), case)).into_iter();
    let all = all.chain(of_blk.map(|case| (blk_example(), case)));
    let all = all.chain(of_net.map(|case| (net_example(), case)));
    for (mut config, (breakage, expected)) in all.chain(of_exec.map(|case| (exec_example(), case))) {
        breakage(&mut config);
        let message = config.to_json().unwrap_err().to_string();
        assert!(message.contains(expected), "{message} does not say {expected}");
    }
}

#[test]
fn unknown_fields_and_oversize_are_refused() {
    let text = String::from_utf8(blk_example().to_json().unwrap()).unwrap();
    let extended = text.replacen('{', "{\"surprise\": 1,", 1);
    assert!(matches!(ApplianceConfig::from_json(extended.as_bytes()), Err(ConfigError::Json(_))));
    let long = vec![b' '; MAX_CONFIG_LEN + 1];
    assert!(matches!(ApplianceConfig::from_json(&long), Err(ConfigError::TooLong { .. })));
}

fn blk(config: &mut ApplianceConfig) -> &mut BlkOptions {
    let Device::Blk(options) = &mut config.back_ends[0].device else { panic!() };
    options
}

fn net(config: &mut ApplianceConfig) -> &mut NetOptions {
    let Device::Net(options) = &mut config.back_ends[0].device else { panic!() };
    options
}

fn exec(config: &mut ApplianceConfig) -> &mut ExecOptions {
    let Device::Exec(options) = &mut config.back_ends[0].device else { panic!() };
    options
}
