//! One `vvu run` with all of its processes, driven as an operator's service manager would drive it: by its command
//! line, its JSON events, its exit code and SIGTERM.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde::Deserialize;
use serde_json::json;
use vvu_guest_image::Manifest;

use crate::backend::ServedImage;
use crate::capacity::Start;
use crate::counters::BlkCounters;
use crate::process::{Process, Watched, command_that_dies_with_us, output_of};
use crate::qmp::Qmp;
use crate::surroundings::Surroundings;
use crate::testbed::{Testbed, target_dir, workspace_program};

mod settings;

/// How long the device may take to be ready: an appliance boots in a few seconds under TCG on an idle machine.
pub const READY_PATIENCE: Duration = Duration::from_secs(180);

/// How long anything of a run may take to end once it must.
pub const END_PATIENCE: Duration = Duration::from_secs(60);

/// How often a run is asked for its status while something of it is awaited of which it sends no event.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What `vvu run --json` says first.
#[derive(Debug, Clone, Deserialize)]
struct Starting {
    runtime_dir: PathBuf,
}

/// What `vvu run --json` says first about a run that is up; see the launcher's own list of events.
#[derive(Debug, Clone, Deserialize)]
struct Ready {
    socket: PathBuf,
    pids: Pids,
    timings_ms: TimingsMs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Pids {
    bridge: u32,
    qemu: u32,
}

/// What `vvu run --json` says when it has repaired a loss.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Restarted {
    pids: Pids,
}

/// What `vvu run --json` says when a driver VM goes on after a loss or with another appliance VM.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Active {
    pause_us: Option<u64>,
}

/// What `vvu status --json` says, as far as tests look at it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// The state in one word.
    pub state: String,
    /// The appliance VM in use.
    pub appliance: Option<ApplianceStatus>,
    /// Deaths that were repaired.
    pub restarts: u64,
    /// Its ports, each as the operator sees it.
    pub ports: Vec<serde_json::Value>,
    pids: LivePids,
}

/// Processes of a run that live at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct LivePids {
    bridge: Option<u32>,
    qemu: Option<u32>,
}

/// An appliance VM of a run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ApplianceStatus {
    /// How many appliance VMs the run had before this one, plus one.
    pub number: u32,
    /// Its QEMU.
    pub pid: u32,
    qmp: PathBuf,
    console: PathBuf,
}

/// What `vvu upgrade --json` says at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Replaced {
    pause_us: Option<u64>,
    took_ms: u64,
}

impl Replaced {
    /// From the first ring's stop to the last ring's start, as the bridge has measured it.
    ///
    /// # Errors
    /// If no driver VM was connected.
    pub fn pause(&self) -> Result<Duration> {
        self.pause_us.map(Duration::from_micros).context("no driver VM has gone along with the upgrade")
    }

    /// From the command until nothing of the old appliance VM was left.
    pub fn took(&self) -> Duration {
        Duration::from_millis(self.took_ms)
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct TimingsMs {
    ready: u64,
    #[serde(flatten)]
    steps: Option<Start>,
}

/// The last event of a run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Ended {
    /// Why the run is over, as one word.
    pub reason: String,
    /// What happened, in one line.
    pub message: String,
    /// The exit code that `vvu` says it will end with.
    pub exit_code: i32,
}

/// A device that is ready for a driver VM. Dropping it kills `vvu`, which takes its children along.
#[derive(Debug)]
pub struct VvuRun {
    vvu: Process,
    bridge: Watched,
    appliance: Watched,
    ready: Ready,
    runtime_dir: PathBuf,
}

/// A run whose device is not ready yet.
#[derive(Debug)]
pub struct BeginningRun {
    vvu: Process,
}

impl BeginningRun {
    /// Adds what every run of a test has, and the program for the appliance, and starts.
    fn spawn(testbed: &Testbed, name: &str, mut command: Command, program: &[String]) -> Result<Self> {
        let runtime_dir = testbed.runtime_dir()?;
        command.arg("--json").arg("--qemu").arg(&testbed.setup().qemu).arg("--appliance").arg(testbed.appliance());
        command.arg("--log-dir").arg(testbed.folder().join(format!("{name}-logs")));
        if !program.is_empty() {
            command.arg("--").args(program);
        }
        command.env("XDG_RUNTIME_DIR", &runtime_dir);
        Ok(Self { vvu: Process::spawn(name, command, testbed.folder())? })
    }

    /// Waits until its device is ready.
    ///
    /// # Errors
    /// If it does not come up in [`READY_PATIENCE`].
    pub fn await_ready(self) -> Result<VvuRun> {
        let Self { mut vvu } = self;
        let starting: Starting = vvu.await_line("first event", READY_PATIENCE, |line| event(line, "starting"))?;
        let ready: Ready = vvu.await_line("ready event", READY_PATIENCE, |line| event(line, "ready"))?;
        let bridge = Watched::open("the bridge", ready.pids.bridge)?;
        let appliance = Watched::open("the appliance's QEMU", ready.pids.qemu)?;
        Ok(VvuRun { vvu, bridge, appliance, ready, runtime_dir: starting.runtime_dir })
    }
}

impl VvuRun {
    /// Runs `vvu run blk` and waits until its device is ready; `name` is for logs and the socket.
    ///
    /// # Errors
    /// If `vvu` or the appliance image are not built, or the device does not come up in [`READY_PATIENCE`].
    pub fn start(testbed: &Testbed, name: &str, image: &ServedImage) -> Result<Self> {
        Self::start_with(testbed, name, image, &[])
    }

    /// As [`VvuRun::start`], with further options of `vvu run blk`.
    ///
    /// # Errors
    /// As [`VvuRun::start`].
    pub fn start_with(testbed: &Testbed, name: &str, image: &ServedImage, options: &[&str]) -> Result<Self> {
        Self::begin_with(testbed, name, image, options)?.await_ready()
    }

    /// As [`VvuRun::start_with`] without waiting, so that several can start at once.
    ///
    /// # Errors
    /// If `vvu` or the appliance image are not built.
    pub fn begin_with(testbed: &Testbed, name: &str, image: &ServedImage, options: &[&str]) -> Result<BeginningRun> {
        let mut command = image.command(workspace_program("vvu", "VVU_BIN")?);
        command.args(["run", "blk", "--image"]).arg(&image.image);
        command.arg("--socket").arg(testbed.socket(&format!("{name}.sock")));
        command.args(["--queues", &image.queues.to_string()]);
        if image.read_only {
            command.arg("--read-only");
        }
        if image.shared {
            command.arg("--share-image");
        }
        command.args(options);
        BeginningRun::spawn(testbed, name, command, &[])
    }

    /// Runs a device of another class, with its options, and waits until it is ready.
    ///
    /// # Errors
    /// As [`VvuRun::start`].
    pub fn start_class(testbed: &Testbed, name: &str, class: &str, options: &[String]) -> Result<Self> {
        let mut command = command_that_dies_with_us(workspace_program("vvu", "VVU_BIN")?);
        command.args(["run", class]).args(options);
        Self::launch(testbed, name, command, &[])
    }

    /// As [`VvuRun::start_class`], with all of the run in these surroundings.
    ///
    /// # Errors
    /// As [`VvuRun::start`].
    pub fn start_class_in(
        testbed: &Testbed,
        name: &str,
        surroundings: &Surroundings,
        class: &str,
        options: &[String],
    ) -> Result<Self> {
        let mut command = surroundings.command_in(workspace_program("vvu", "VVU_BIN")?);
        command.args(["run", class]).args(options);
        Self::launch(testbed, name, command, &[])
    }

    /// Runs a program of an overlay as a device (`vvu run exec`), with further options, and waits until it is ready.
    ///
    /// # Errors
    /// As [`VvuRun::start`].
    pub fn start_program(testbed: &Testbed, name: &str, options: &[String], program: &[String]) -> Result<Self> {
        let mut command = command_that_dies_with_us(workspace_program("vvu", "VVU_BIN")?);
        command.args(["run", "exec"]).args(options);
        command.arg("--socket").arg(testbed.socket(&format!("{name}.sock")));
        Self::launch(testbed, name, command, program)
    }

    fn launch(testbed: &Testbed, name: &str, command: Command, program: &[String]) -> Result<Self> {
        BeginningRun::spawn(testbed, name, command, program)?.await_ready()
    }

    /// The socket for the driver VM's VMM.
    pub fn socket(&self) -> &Path {
        &self.ready.socket
    }

    /// Time from the start of `vvu` until the device was ready.
    pub fn time_to_ready(&self) -> Duration {
        Duration::from_millis(self.ready.timings_ms.ready)
    }

    /// The steps of the start, if the appliance told them in time.
    pub fn start_steps(&self) -> Option<Start> {
        self.ready.timings_ms.steps.map(|steps| Start { ready: self.ready.timings_ms.ready, ..steps })
    }

    /// The `vvu` process.
    pub fn vvu(&self) -> &Watched {
        self.vvu.watched()
    }

    /// The bridge.
    pub fn bridge(&self) -> &Watched {
        &self.bridge
    }

    /// The appliance VM's QEMU.
    pub fn appliance(&self) -> &Watched {
        &self.appliance
    }

    /// Waits until `vvu` has started what was lost, and the device is ready again; from then on [`VvuRun::bridge`] and
    /// [`VvuRun::appliance`] are the new ones.
    ///
    /// # Errors
    /// If the run ends, or it takes longer than [`READY_PATIENCE`].
    pub fn await_restarted(&mut self) -> Result<()> {
        let restarted: Restarted = self.vvu.await_line("restart", READY_PATIENCE, |line| event(line, "restarted"))?;
        self.watch(restarted.pids)
    }

    /// Waits until the driver VM goes on after a loss inside the appliance VM; returns the pause that the bridge has
    /// measured.
    ///
    /// # Errors
    /// If the run ends, or it takes longer than [`READY_PATIENCE`].
    pub fn await_resumed(&mut self) -> Result<Duration> {
        self.vvu.await_line("end of a pause", READY_PATIENCE, |line| {
            event::<Active>(line, "active")?.pause_us.map(Duration::from_micros)
        })
    }

    /// Waits until the device is served by another appliance VM than those whose QEMU is among `lost`, with bridge and
    /// appliance VM as they are then.
    ///
    /// # Errors
    /// If it is not within [`READY_PATIENCE`].
    pub fn await_serving(&mut self, lost: &[u32]) -> Result<()> {
        let deadline = Instant::now() + READY_PATIENCE;
        loop {
            let status = self.status()?;
            let is_another = status.pids.qemu.is_some_and(|pid| !lost.contains(&pid));
            if status.state == "serving" && is_another && self.find_again()? {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "after {READY_PATIENCE:.0?} the run is {status:?}");
            sleep(LOOK_EVERY);
        }
    }

    /// Finds out which processes bridge and appliance VM are now; false if there is no such pair at the moment.
    ///
    /// # Errors
    /// If `vvu` does not answer.
    pub fn find_again(&mut self) -> Result<bool> {
        let pids = self.status()?.pids;
        let (Some(bridge), Some(qemu)) = (pids.bridge, pids.qemu) else { return Ok(false) };
        // They may have gone since.
        Ok(self.watch(Pids { bridge, qemu }).is_ok())
    }

    /// Lets what `vvu` has said so far go: what is awaited next comes later.
    pub fn forget_events(&mut self) {
        self.vvu.forget_lines();
    }

    fn watch(&mut self, pids: Pids) -> Result<()> {
        self.bridge = Watched::open("the bridge", pids.bridge)?;
        self.appliance = Watched::open("the appliance's QEMU", pids.qemu)?;
        Ok(())
    }

    /// `vvu status`.
    ///
    /// # Errors
    /// If the command fails.
    pub fn status(&self) -> Result<Status> {
        self.command("status", &[])
    }

    /// `vvu upgrade` to the image in use, read anew.
    ///
    /// # Errors
    /// If the command fails.
    pub fn upgrade(&mut self) -> Result<Replaced> {
        self.replace_by("upgrade", &[])
    }

    /// `vvu upgrade` to another image.
    ///
    /// # Errors
    /// If the command fails.
    pub fn upgrade_to(&mut self, appliance: &Path) -> Result<Replaced> {
        let appliance = appliance.to_str().context("an image's path is text")?;
        self.replace_by("upgrade", &["--appliance", appliance])
    }

    /// `vvu restart`.
    ///
    /// # Errors
    /// If the command fails.
    pub fn restart(&mut self) -> Result<Replaced> {
        self.replace_by("restart", &[])
    }

    fn replace_by(&mut self, command: &str, options: &[&str]) -> Result<Replaced> {
        let replaced = self.command(command, options)?;
        let now = self.status()?.appliance.with_context(|| format!("no appliance VM after vvu {command}"))?;
        self.watch(Pids { bridge: self.bridge.pid(), qemu: now.pid })?;
        Ok(replaced)
    }

    /// `vvu resize`, with the consent to a smaller size.
    ///
    /// # Errors
    /// If the command fails.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        self.command::<serde_json::Value>("resize", &[&bytes.to_string(), "--shrink"]).map(drop)
    }

    /// Runs a command on this run; its last line is the answer.
    fn command<T: for<'a> Deserialize<'a>>(&self, name: &str, arguments: &[&str]) -> Result<T> {
        let mut command = command_that_dies_with_us(workspace_program("vvu", "VVU_BIN")?);
        command.args([name, "--json"]).arg(self.socket()).args(arguments);
        let output = output_of(&mut command)?;
        let last = output.lines().last().with_context(|| format!("vvu {name} says nothing"))?;
        serde_json::from_str(last).with_context(|| format!("vvu {name} says {last}"))
    }

    /// Has the appliance VM's kernel do what `key` stands for (its document sysrq.rst). It must have been booted with
    /// `sysrq_always_enabled`.
    ///
    /// # Errors
    /// If the appliance VM's console cannot be reached.
    pub fn press_sysrq(&self, key: char) -> Result<()> {
        let appliance = self.status()?.appliance.context("no appliance VM is in use")?;
        let mut qmp = Qmp::greet(UnixStream::connect(&appliance.qmp).context("cannot reach the appliance's QMP")?)?;
        qmp.execute_with("chardev-send-break", &json!({ "id": "console" }))?;
        fs::write(&appliance.console, key.to_string()).context("cannot type on the appliance's console")
    }

    /// Waits for the counters that the back-end writes when a front-end has left.
    ///
    /// # Errors
    /// If the run ends first, or [`END_PATIENCE`] runs out.
    pub fn await_counters(&mut self) -> Result<BlkCounters> {
        self.vvu.await_line("back-end's counters", END_PATIENCE, |line| {
            BlkCounters::on_line(&event::<ApplianceLine>(line, "appliance-log")?.line)
        })
    }

    /// Ends the run with SIGTERM, as a service manager does, and checks that it ends well and leaves nothing behind.
    ///
    /// # Errors
    /// If the exit code is not 0, or a process, socket or directory is left.
    pub fn stop(self) -> Result<Ended> {
        self.vvu.watched().signal(Signal::TERM)?;
        let (status, ended) = self.await_end()?;
        ensure!(status.code() == Some(0), "vvu ended with {status} after SIGTERM: {}", ended.message);
        Ok(ended)
    }

    /// Waits until the run ends by itself, and checks that it leaves nothing behind.
    ///
    /// # Errors
    /// If it does not end in [`END_PATIENCE`], or a process, socket or directory is left.
    pub fn await_end(mut self) -> Result<(ExitStatus, Ended)> {
        let ended: Ended = self.vvu.await_line("last event", END_PATIENCE, |line| event(line, "ended"))?;
        let status = self.vvu.await_end(END_PATIENCE)?;
        // Both were its children: with vvu they are gone, not only going.
        for child in [&self.bridge, &self.appliance] {
            if !child.has_ended()? {
                bail!("{} (pid {}) outlives vvu, which ended with {status}", child.name(), child.pid());
            }
        }
        self.check_nothing_left()?;
        Ok((status, ended))
    }

    /// Kills `vvu` itself with SIGKILL, and checks that its children follow.
    ///
    /// # Errors
    /// If one of them still runs after [`END_PATIENCE`].
    pub fn kill_vvu(mut self) -> Result<()> {
        self.vvu.kill()?;
        self.bridge.await_end(END_PATIENCE)?;
        self.appliance.await_end(END_PATIENCE)
    }

    fn check_nothing_left(&self) -> Result<()> {
        if self.ready.socket.exists() {
            bail!("{} is left behind", self.ready.socket.display());
        }
        if self.runtime_dir.exists() {
            bail!("{} is left behind", self.runtime_dir.display());
        }
        Ok(())
    }
}

/// The appliance image: `$VVU_APPLIANCE`, else the one that `cargo xtask image` has built.
///
/// # Errors
/// If this executable was moved out of the target directory.
pub fn appliance_dir() -> Result<PathBuf> {
    match env::var_os("VVU_APPLIANCE") {
        Some(dir) => Ok(dir.into()),
        None => Ok(target_dir()?.join("appliance")),
    }
}

/// Which kernel an appliance image has, as `uname -r` says there.
///
/// # Errors
/// If its manifest cannot be read.
pub fn kernel_release(appliance: &Path) -> Result<String> {
    let path = appliance.join("manifest.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let manifest: Manifest = serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
    Ok(manifest.kernel_release)
}

/// A line of the appliance's console.
#[derive(Deserialize)]
struct ApplianceLine {
    line: String,
}

/// The event of kind `kind` on `line`, if that is what it holds.
fn event<T: for<'a> Deserialize<'a>>(line: &str, kind: &str) -> Option<T> {
    #[derive(Deserialize)]
    struct Kind<'a> {
        event: &'a str,
    }
    let found: Kind<'_> = serde_json::from_str(line).ok()?;
    (found.event == kind).then(|| serde_json::from_str(line).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_apart() {
        let ended = r#"{"event":"ended","reason":"signal","message":"ended","exit_code":0,"last_lines":[]}"#;
        assert!(event::<Ready>(ended, "ready").is_none());
        assert_eq!(event::<Ended>(ended, "ended").unwrap().reason, "signal");
        let ready = r#"{"event":"ready","socket":"/s","pids":{"vvu":1,"bridge":2,"qemu":3},
            "timings_ms":{"bridge_listening":1,"qemu_started":2,"ready":4000},"vmms":[]}"#;
        assert_eq!(event::<Ready>(ready, "ready").unwrap().pids.qemu, 3);
        assert!(event::<Ended>("Linux version", "ended").is_none());
    }
}
