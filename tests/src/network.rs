//! A switch with a port for each driver VM: in an appliance VM, or for comparison the same program on the host.

use std::env;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::backend::BACKEND_VARIABLE;
use crate::driver_vm::{DriverVm, Network};
use crate::process::{Process, command_that_dies_with_us};
use crate::testbed::{Testbed, workspace_program};
use crate::vvu_run::VvuRun;

pub mod statistics;
pub mod stream;
pub mod wire;

/// A port of a switch, and the driver VM's address behind it.
#[derive(Debug, Clone)]
pub struct Port {
    socket: PathBuf,
    number: u8,
    pairs: u16,
    options: String,
}

impl Port {
    /// Port `number`, from 1, with one pair of queues. The driver VM behind it has a MAC and an IPv4 address that end with
    /// this number.
    pub fn new(testbed: &Testbed, number: u8) -> Self {
        let socket = testbed.socket(&format!("port{number}.sock"));
        Self { socket, number, pairs: 1, options: String::new() }
    }

    /// Offers `pairs` pairs of queues.
    #[must_use]
    pub fn pairs(mut self, pairs: u16) -> Self {
        self.pairs = pairs;
        self
    }

    /// Adds options of `--port`: `,KEY=VALUE...`.
    #[must_use]
    pub fn options(mut self, options: &str) -> Self {
        self.options.push_str(options);
        self
    }

    /// Is behind another socket.
    #[must_use]
    pub fn at(mut self, socket: &Path) -> Self {
        socket.clone_into(&mut self.socket);
        self
    }

    /// The value of `--port` of `vvu run switch`.
    pub fn spec(&self) -> String {
        format!("{},{}", self.socket.display(), self.settings())
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its number.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The MAC address.
    pub fn mac(&self) -> String {
        format!("52:54:00:00:00:{:02x}", self.number)
    }

    /// The driver VM's IPv4 address.
    pub fn address(&self) -> String {
        format!("10.7.0.{}", self.number)
    }

    /// The network card for the driver VM.
    pub fn card(&self) -> Network {
        Network::at(&self.socket, &self.mac()).pairs(self.pairs)
    }

    /// The same network card, of which all is the back-end's ([`Network::whole_at`]).
    pub fn whole_card(&self) -> Network {
        Network::whole_at(&self.socket).pairs(self.pairs)
    }

    /// Brings the card up in the driver VM, with its address.
    ///
    /// # Errors
    /// If there is no card.
    pub fn bring_up(&self, vm: &mut DriverVm) -> Result<()> {
        let address = self.address();
        vm.run(&format!("ip link set lo up; ip link set eth0 up && ip addr add {address}/24 dev eth0")).map(drop)
    }

    fn settings(&self) -> String {
        format!("mac={},queues={}{}", self.mac(), self.pairs, self.options)
    }
}

/// A switch that runs.
#[derive(Debug)]
pub enum ServedSwitch {
    /// By `vvu run switch`.
    Vvu(Box<VvuRun>),
    /// By `vvu-net` on the host.
    OnHost(Process),
}

impl ServedSwitch {
    /// Starts a switch with these ports and further options: [`ServedSwitch::in_appliance`], or [`ServedSwitch::on_host`] if
    /// [`BACKEND_VARIABLE`] is `vvu-net`.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(testbed: &Testbed, ports: &[&Port], options: &[&str]) -> Result<Self> {
        if env::var_os(BACKEND_VARIABLE).is_some_and(|name| name == "vvu-net") {
            return Self::on_host(testbed, ports, options);
        }
        Self::in_appliance(testbed, ports, options)
    }

    /// Starts `vvu run switch` with these ports and further options.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn in_appliance(testbed: &Testbed, ports: &[&Port], options: &[&str]) -> Result<Self> {
        let ports = ports.iter().flat_map(|port| ["--port".to_owned(), port.spec()]);
        let options = ports.chain(options.iter().map(|option| (*option).to_owned())).collect::<Vec<_>>();
        Ok(Self::Vvu(Box::new(VvuRun::start_class(testbed, "switch", "switch", &options)?)))
    }

    /// Starts `vvu-net` on the host with these ports and further options. The sockets listen before it starts and are
    /// inherited, so there is nothing to wait for.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn on_host(testbed: &Testbed, ports: &[&Port], options: &[&str]) -> Result<Self> {
        let mut command = command_that_dies_with_us(workspace_program("vvu-net", "VVU_NET_BIN")?);
        let mut listeners = Vec::new();
        for port in ports {
            let path = port.socket();
            let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
            fcntl_setfd(&listener, FdFlags::empty()).context("cannot pass a socket on")?;
            command.args(["--port", &format!("fd={},{}", listener.as_raw_fd(), port.settings())]);
            listeners.push(listener);
        }
        command.args(options);
        Ok(Self::OnHost(Process::spawn("switch-on-host", command, testbed.folder())?))
    }

    /// The `vvu run`, if it is one.
    pub fn run(&mut self) -> Option<&mut VvuRun> {
        match self {
            Self::Vvu(run) => Some(run),
            Self::OnHost(_) => None,
        }
    }

    /// Ends the switch; `vvu run` is ended in order and leaves nothing behind.
    ///
    /// # Errors
    /// If it does not end as it should.
    pub fn stop(self) -> Result<()> {
        match self {
            Self::Vvu(run) => run.stop().map(drop),
            Self::OnHost(mut process) => process.kill(),
        }
    }
}
