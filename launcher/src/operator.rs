//! The commands that act on a device that another `vvu` runs: one request over its control socket, answers printed as they
//! come.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines, Take};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use vvu_appliance_config::Limits;

use crate::cli::{FilterArgs, LinkArgs, LiveLimitArgs, ResizeArgs, RunArgs, UpgradeArgs};
use crate::control::{self, Reply, Request, Status};
use crate::live::Settings;
use crate::live_counters::Counters;
use crate::log_follow::printable;
use crate::net_options::{Link, Macs};
use crate::output::in_milliseconds;
use crate::size::Size;
use crate::supervisor::PortId;

/// Longest wait for the answer to what is done at once.
const SHORT_LIMIT: Duration = Duration::from_secs(60);

/// Longest wait for another appliance VM; the run itself gives up earlier.
const REPLACE_LIMIT: Duration = Duration::from_secs(300);

/// Most bytes that a run may answer to one request.
const MAX_ANSWER_BYTES: u64 = 1024 * 1024;

/// `vvu status`.
///
/// # Errors
/// One line with the remedy, as for all of these.
pub(crate) async fn status(run: &RunArgs) -> anyhow::Result<ExitCode> {
    ask(run, &Request::Status {}, SHORT_LIMIT).await
}

/// `vvu upgrade`.
pub(crate) async fn upgrade(args: &UpgradeArgs) -> anyhow::Result<ExitCode> {
    // The run has another working directory.
    let appliance = args.appliance.as_deref().map(std::path::absolute).transpose();
    let appliance = appliance.context("the appliance image's path cannot be used")?;
    ask(&args.run, &Request::Upgrade { appliance }, REPLACE_LIMIT).await
}

/// `vvu restart`.
pub(crate) async fn restart(run: &RunArgs) -> anyhow::Result<ExitCode> {
    ask(run, &Request::Restart {}, REPLACE_LIMIT).await
}

/// `vvu resize`.
pub(crate) async fn resize(args: &ResizeArgs) -> anyhow::Result<ExitCode> {
    ask(&args.run, &Request::Resize { size_bytes: args.size.0, shrink: args.shrink }, SHORT_LIMIT).await
}

/// `vvu limit`.
pub(crate) async fn limit(args: &LiveLimitArgs) -> anyhow::Result<ExitCode> {
    let (port, bytes_per_second) = (PortId(args.port), args.bandwidth.map(|size| size.0));
    ask(&args.run, &Request::Limit { port, operations_per_second: args.iops, bytes_per_second }, SHORT_LIMIT).await
}

/// `vvu link`.
pub(crate) async fn link(args: &LinkArgs) -> anyhow::Result<ExitCode> {
    ask(&args.run, &Request::Link { port: PortId(args.port), up: args.state == Link::Up }, SHORT_LIMIT).await
}

/// `vvu filter`.
pub(crate) async fn filter(args: &FilterArgs) -> anyhow::Result<ExitCode> {
    let (macs, vlans) = (args.macs.as_ref().map(Macs::texts), args.vlans.as_ref().map(|vlans| vlans.0.clone()));
    ask(&args.run, &Request::Filter { port: PortId(args.port), macs, vlans }, SHORT_LIMIT).await
}

async fn ask(run: &RunArgs, request: &Request, limit: Duration) -> anyhow::Result<ExitCode> {
    let conversation = async {
        let mut answers = send(run, request).await?;
        while let Some(line) = answers.next_line().await.context("the run's answer cannot be read")? {
            let reply: Reply = serde_json::from_str(&line).context("the run's answer is not understood")?;
            if let Some(code) = print(&reply, run.json)? {
                return Ok(code);
            }
        }
        bail!("the run ended before it answered")
    };
    let answered = tokio::time::timeout(limit, conversation).await;
    answered.with_context(|| format!("the run did not answer within {} s", limit.as_secs()))?
}

async fn send(run: &RunArgs, request: &Request) -> anyhow::Result<Lines<BufReader<Take<OwnedReadHalf>>>> {
    let path: PathBuf = run.control.clone().unwrap_or_else(|| control::beside(&run.socket));
    let shown = path.display();
    let stream = UnixStream::connect(&path).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => anyhow::anyhow!(
            "no vvu run listens at {shown}; name the socket of a running device, or its control socket with --control"
        ),
        _ => anyhow::Error::from(error).context(format!("control socket {shown} cannot be connected to")),
    })?;
    let (reader, mut writer) = stream.into_split();
    let line = serde_json::to_string(request)? + "\n";
    writer.write_all(line.as_bytes()).await.context("the run does not take the request")?;
    // Its end would tell the run that nobody waits any more: it goes with this process.
    writer.forget();
    Ok(BufReader::new(reader.take(MAX_ANSWER_BYTES)).lines())
}

/// Prints one reply; the exit code if it is the last one.
fn print(reply: &Reply, json: bool) -> anyhow::Result<Option<ExitCode>> {
    let code = match reply {
        Reply::Progress { .. } => None,
        Reply::Failed { .. } => Some(ExitCode::FAILURE),
        Reply::Status(_) | Reply::Replaced { .. } | Reply::Resized { .. } | Reply::Changed { .. } => {
            Some(ExitCode::SUCCESS)
        }
    };
    if json {
        write(io::stdout(), &(serde_json::to_string(reply)? + "\n"))?;
        return Ok(code);
    }
    match reply {
        Reply::Progress { text, .. } => write(io::stderr(), &format!("vvu: {}\n", printable(text)))?,
        Reply::Failed { message } => write(io::stderr(), &format!("vvu: {}\n", printable(message)))?,
        Reply::Status(status) => write(io::stdout(), &status_text(status))?,
        Reply::Replaced { appliance, pause_us, took_ms } => {
            let pause = match pause_us {
                Some(pause_us) => format!("the driver VM paused {:.1} ms", in_milliseconds(*pause_us)),
                None => "no driver VM was connected".to_owned(),
            };
            let took = Duration::from_millis(*took_ms).as_secs_f64();
            write(io::stdout(), &format!("appliance {appliance} is in use after {took:.2} s; {pause}\n"))?;
        }
        Reply::Resized { old_bytes, new_bytes } => {
            write(io::stdout(), &format!("resized from {} to {}\n", Size(*old_bytes), Size(*new_bytes)))?;
        }
        Reply::Changed { port, settings } => {
            write(io::stdout(), &format!("port {port}: {}\n", printable(&settings_text(settings))))?;
        }
    }
    Ok(code)
}

fn write(mut stream: impl io::Write, text: &str) -> anyhow::Result<()> {
    stream.write_all(text.as_bytes()).context("cannot write the answer")
}

fn settings_text(settings: &Settings) -> String {
    let Limits { operations_per_second, bytes_per_second } = settings.limits;
    let number = |number: u64, text: String| if number == 0 { "no limit".to_owned() } else { text };
    let mut text = format!(
        "operations {}, bandwidth {}",
        number(operations_per_second, format!("{operations_per_second}/s")),
        number(bytes_per_second, format!("{}/s", Size(bytes_per_second)))
    );
    if let Some(up) = settings.link {
        text.push_str(if up { ", link up" } else { ", link down" });
    }
    if let Some(filter) = &settings.filter {
        let vlans: Vec<_> = filter.vlans.iter().map(u16::to_string).collect();
        for (name, list) in [("macs", &filter.macs), ("vlans", &vlans)] {
            let list = if list.is_empty() { "any".to_owned() } else { list.join(";") };
            text.push_str(&format!(", {name} {list}"));
        }
    }
    text
}

/// What has happened so far; what has not is left out.
fn counters_text(counters: &Counters) -> String {
    let told: Vec<_> =
        counters.iter().filter(|(_, number)| **number > 0).map(|(name, number)| format!("{name} {number}")).collect();
    if told.is_empty() { "all 0".to_owned() } else { told.join(", ") }
}

fn status_text(status: &Status) -> String {
    let pid = |pid: Option<u32>| pid.map_or_else(|| "not running".to_owned(), |pid| format!("pid {pid}"));
    let mut text = format!("{:<10} {} ({})\n", "state", status.state, printable(&status.text));
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<10} {}\n", printable(&value)));
    line("class", status.class.clone());
    for image in &status.disks {
        let access = if image.read_only { ", read-only" } else { "" };
        let lock = if image.shared { ", shared" } else { "" };
        line("image", format!("{}, {}{access}{lock}", image.path, Size(image.size_bytes)));
    }
    line("vvu", format!("pid {}, up {} s", status.pids.vvu, status.uptime_ms / 1000));
    for port in &status.ports {
        let number = if status.ports.len() > 1 { format!("port {}: ", port.port) } else { String::new() };
        line("socket", format!("{number}{}", port.socket));
        let mac = port.mac.as_ref().map(|mac| format!("MAC address {mac}, ")).unwrap_or_default();
        line("device", format!("{mac}queues {}", port.queues));
        line("bridge", format!("{} ({})", pid(port.bridge), port.text));
        if let Some(settings) = &port.settings {
            line("settings", settings_text(settings));
        }
        if let Some(counters) = &port.counters {
            line("counters", counters_text(counters));
        }
    }
    if let Some(counters) = &status.uplink_counters {
        line("uplink", counters_text(counters));
    }
    if let Some(why) = &status.counters_missing {
        line("counters", format!("not known: {why}"));
    }
    for channel in &status.channels {
        line("channel", format!("{} at {}", channel.name, channel.path));
    }
    for (name, appliance) in [("appliance", &status.appliance), ("standby", &status.standby)] {
        if let Some(appliance) = appliance {
            let (number, pid, qmp) = (appliance.number, appliance.pid, appliance.qmp.display());
            line(name, format!("number {number}, pid {pid}, QMP {qmp}"));
        }
    }
    line("restarts", status.restarts.to_string());
    if let Some(pause_us) = status.last_pause_us {
        line("last pause", format!("{:.1} ms", in_milliseconds(pause_us)));
    }
    text
}
