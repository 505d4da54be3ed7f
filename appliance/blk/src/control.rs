//! What the control channel of `vvu-blk` can do: see the counters and settings, change the limits.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vvu_back_end::control_channel::{ControlChannel, SetLimits};
use vvu_back_end::listener::ListenerError;
use vvu_back_end::rate_limit::Limits;

use crate::counters::CounterReport;
use crate::device::Device;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    SetLimits(SetLimits),
    Query {},
}

/// Settings and counters at one moment.
#[derive(Debug, Serialize)]
struct Report {
    limits: Limits,
    /// In units of 512 bytes.
    capacity_sectors: u64,
    read_only: bool,
    counters: CounterReport,
}

/// Opens the channel at `path`.
pub(crate) fn open(path: &Path, device: &Arc<Device>) -> Result<ControlChannel, ListenerError> {
    let device = Arc::clone(device);
    ControlChannel::open(path, move |request| carry_out(&device, &request, Instant::now()))
}

fn carry_out(device: &Device, request: &Request, now: Instant) -> Result<Report, String> {
    if let Request::SetLimits(set_limits) = request {
        if set_limits.port != 0 {
            return Err(format!("there is no port {}, the only one is 0", set_limits.port));
        }
        device.rate_limit.set(set_limits.limits(), now);
        tracing::info!(limits = ?set_limits.limits(), "limits are changed");
    }
    let shape = device.shape();
    Ok(Report {
        limits: device.rate_limit.limits(),
        capacity_sectors: shape.capacity_sectors,
        read_only: shape.read_only,
        counters: device.counters.report(),
    })
}
