//! What an operator can change and ask while the switch works.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vvu_back_end::control_channel::SetLimits;
use vvu_back_end::rate_limit::Limits;

use crate::counters::CounterValues;
use crate::ethernet::MacAddress;
use crate::filter::PortFilter;
use crate::port::Port;
use crate::switch::Switch;

/// One line of the control channel.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    SetLimits(SetLimits),
    SetLink(SetLink),
    SetFilter(SetFilter),
    Query(Query),
}

/// Pulls a port's cable, or puts it in.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetLink {
    #[serde(default)]
    port: u16,
    up: bool,
}

/// Changes what passes a port.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetFilter {
    #[serde(default)]
    port: u16,
    macs: Vec<MacAddress>,
    vlans: Vec<u16>,
}

/// Asks for settings and counters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {}

/// What is answered.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Answer {
    /// It is done.
    Done {},
    /// To [`Query`].
    Report(Box<Report>),
}

/// Settings and counters of a switch.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    ports: Vec<PortReport>,
    uplink: Option<CounterValues>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct PortReport {
    mac: MacAddress,
    link: bool,
    /// Receive queues in service.
    receiving: u32,
    filter: PortFilter,
    limits: Limits,
    counters: CounterValues,
}

impl Report {
    pub(crate) fn of(switch: &Switch) -> Self {
        let ports = switch.ports().iter().map(|port| PortReport {
            mac: port.mac(),
            link: port.link_up(),
            receiving: port.receiving(),
            filter: port.filter().map(|filter| filter.clone()).unwrap_or_default(),
            limits: port.limit.limits(),
            counters: port.counters.values(),
        });
        Self { ports: ports.collect(), uplink: switch.uplink().map(|uplink| uplink.counters.values()) }
    }

    /// Writes it to the log: the word `counters`, then JSON, on one line.
    pub(crate) fn log(&self) {
        match serde_json::to_string(self) {
            Ok(json) => tracing::info!("counters {json}"),
            Err(error) => tracing::error!(%error, "counters cannot be written"),
        }
    }
}

/// Carries out a request. An error is one line for the operator.
pub(crate) fn carry_out(switch: &Arc<Switch>, request: Request) -> Result<Answer, String> {
    match request {
        Request::SetLimits(request) => port(switch, request.port)?.limit.set(request.limits(), Instant::now()),
        Request::SetLink(request) => port(switch, request.port)?.set_link(request.up),
        Request::SetFilter(SetFilter { port: number, macs, vlans }) => {
            let filter = PortFilter { macs, vlans };
            filter.check().map_err(|error| error.to_string())?;
            port(switch, number)?.set_filter(filter);
        }
        Request::Query(Query {}) => return Ok(Answer::Report(Box::new(Report::of(switch)))),
    }
    Ok(Answer::Done {})
}

fn port(switch: &Switch, number: u16) -> Result<&Port, String> {
    let count = switch.ports().len();
    switch.port(usize::from(number)).ok_or_else(|| format!("there is no port {number}, the switch has {count} of them"))
}
