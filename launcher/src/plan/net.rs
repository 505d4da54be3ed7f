//! What `vvu run net` and `vvu run switch` want.

use anyhow::{Context, bail};
use vvu_appliance_config::{CONTROL_CHANNEL, Device, MAX_DEVICE_SETS, NetOptions, Threads};

use super::draft::{Class, Draft, Nic, PortDraft};
use crate::cli::{NetArgs, SwitchArgs, UplinkArgs};
use crate::mac::Mac;
use crate::net_options::PortSpec;

impl Draft {
    /// One network device.
    ///
    /// # Errors
    /// One line with the remedy, as for all of these.
    pub(crate) fn net(args: &NetArgs) -> anyhow::Result<Self> {
        let port = PortSpec {
            socket: args.socket.clone(),
            mac: args.mac,
            queues: args.queues,
            link: args.link,
            macs: args.macs.clone(),
            vlans: args.vlans.clone(),
            limits: args.limits.limits(),
        };
        switch(&[port], "--socket", &args.uplink, args.threads.threads(args.machine.cpus)?)
    }

    /// Several network devices, connected to each other.
    pub(crate) fn switch(args: &SwitchArgs) -> anyhow::Result<Self> {
        switch(&args.ports, "--port", &args.uplink, args.threads.threads(args.machine.cpus)?)
    }
}

fn switch(specs: &[PortSpec], option: &'static str, args: &UplinkArgs, threads: Threads) -> anyhow::Result<Draft> {
    if specs.len() > MAX_DEVICE_SETS {
        bail!("{} ports are too many for one appliance VM; start another switch after {MAX_DEVICE_SETS}", specs.len());
    }
    let (mut ports, mut options) = (Vec::new(), Vec::new());
    let mut uplink_mac = None;
    for spec in specs {
        let path = std::path::absolute(&spec.socket)
            .with_context(|| format!("socket path {} cannot be used", spec.socket.display()))?;
        let place = path.to_string_lossy();
        let mac = spec.mac.unwrap_or_else(|| Mac::derived("port", &place));
        uplink_mac.get_or_insert_with(|| Mac::derived("uplink", &place));
        if ports.iter().any(|port: &PortDraft| port.mac == Some(mac)) {
            bail!("two ports have the MAC address {mac}; give each its own");
        }
        options.push(spec.options(mac));
        let vrings = 2 * spec.queues + 1;
        ports.push(PortDraft { socket: spec.socket.clone(), option, queues: spec.queues, vrings, mac: Some(mac) });
    }
    let nic = match (&args.uplink, uplink_mac) {
        (Some(uplink), Some(mac)) => {
            Some(Nic { netdev: uplink.netdev(Nic::ID), mac, can_be_shared: uplink.can_be_shared() })
        }
        _ => None,
    };
    let uplink = nic.as_ref().map(|nic| nic.mac.to_string());
    Ok(Draft {
        ports,
        nic,
        channels: vec![CONTROL_CHANNEL.to_owned()],
        ..Draft::of(Class::Net, Device::Net(NetOptions { ports: options, uplink, mtu: args.mtu, threads }))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use vvu_appliance_config::Poll;

    use super::*;
    use crate::cli::{Cli, Command, Device as Class};

    fn draft(arguments: &[&str]) -> anyhow::Result<Draft> {
        let all = ["vvu", "run"].iter().chain(arguments);
        match Cli::parse_from(all).command {
            Command::Run(Class::Net(args)) => Draft::net(&args),
            Command::Run(Class::Switch(args)) => Draft::switch(&args),
            _ => panic!("no network"),
        }
    }

    #[test]
    fn a_switch_has_a_device_set_for_each_port() {
        let two = draft(&["switch", "--port", "/run/a.sock,queues=4", "--port", "/run/b.sock,mac=52:54:00:00:00:01"]);
        let two = two.unwrap();
        let Device::Net(options) = &two.device else { panic!("not net") };
        assert_eq!((options.ports.len(), options.mtu, &options.uplink), (2, 1500, &None));
        assert_eq!(options.ports[1].mac, "52:54:00:00:00:01");
        assert_eq!(two.ports.iter().map(|port| port.vrings).collect::<Vec<_>>(), [9, 3]);
        assert!(two.nic.is_none());
        assert_ne!(options.ports[0].mac, options.ports[1].mac);
    }

    #[test]
    fn an_uplink_has_an_address_of_its_own() {
        let one = draft(&["net", "--socket", "/run/a.sock", "--uplink", "tap=tap0", "--mtu", "9000"]).unwrap();
        let Device::Net(options) = &one.device else { panic!("not net") };
        let nic = one.nic.as_ref().unwrap();
        assert_eq!((options.uplink.as_ref(), options.mtu), (Some(&nic.mac.to_string()), 9000));
        assert_ne!(options.ports[0].mac, nic.mac.to_string());
        assert!(!nic.can_be_shared);
    }

    #[test]
    fn queues_run_on_cpus_that_there_are() {
        let net =
            |cpus| draft(&["net", "--socket", "/run/a.sock", "--cpus", cpus, "--queue-cpus", "0,2", "--poll", "off"]);
        let Device::Net(options) = net("3").unwrap().device else { panic!("not net") };
        assert_eq!(options.threads, Threads { poll: Poll::Off, poll_window_us: 32, cpus: vec![0, 2] });
        assert!(net("2").unwrap_err().to_string().contains("raise --cpus"));
    }

    #[test]
    fn ports_that_do_not_fit_together_are_refused() {
        let twice = ["switch", "--port", "/a,mac=52:54:00:00:00:01", "--port", "/b,mac=52:54:00:00:00:01"];
        assert!(draft(&twice).unwrap_err().to_string().contains("give each its own"));
        let nine: Vec<_> = (0..9).map(|number| format!("--port=/run/{number}.sock")).collect();
        let nine: Vec<_> = ["switch"].into_iter().chain(nine.iter().map(String::as_str)).collect();
        assert!(draft(&nine).unwrap_err().to_string().contains("too many"));
    }
}
