//! What this QEMU can do here: found out by asking it, over QMP, with the sandbox of the real run in place.
//!
//! One short-lived QEMU without a machine answers all questions: its version, the devices and options that it knows, and
//! which way of disk I/O works for each image on this host under this sandbox — tried by opening the image. Version
//! numbers would tell less: distributions leave things out, kernels forbid io_uring, file systems refuse O_DIRECT.

use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::image::Image;
use crate::log_follow::printable;
use crate::parent_death::die_with_parent;
use crate::qemu_args::{DISK_IO_WAYS, DiskIo, REQUIRED_DEVICES, SANDBOX, protocol_node};
use crate::qmp::{Qmp, QmpError};

/// What to do about a QEMU that cannot run the appliance VM.
pub(crate) const REMEDY: &str = "install QEMU 11 or newer, or name it with --qemu or $VVU_QEMU";

/// Oldest QEMU that has the three devices of the device set with shared memory regions.
pub(crate) const MIN_VERSION: Version = Version { major: 11, minor: 0, micro: 0 };

/// Longest time for all questions; a QEMU that loads slowly from a cold disk needs a few seconds.
const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// Most bytes of QEMU's standard error that are read when it fails.
const MAX_STDERR_BYTES: u64 = 4096;

/// A version of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    major: u64,
    minor: u64,
    micro: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct QemuFacts {
    /// Its version.
    pub(crate) version: Version,
    /// Devices of the appliance VM that it does not have.
    pub(crate) missing_devices: Vec<&'static str>,
    /// Whether it ends with its parent (`-run-with exit-with-parent=on`).
    pub(crate) exit_with_parent: bool,
    /// The best way of disk I/O for each image, or why none works.
    pub(crate) disk_io: Vec<Result<DiskIo, String>>,
}

impl QemuFacts {
    /// Why this QEMU cannot run the appliance VM, with the remedy; `None` if it can.
    pub(crate) fn refusal(&self) -> Option<String> {
        if self.version < MIN_VERSION {
            return Some(format!("QEMU is version {}, too old for the appliance VM; {REMEDY}", self.version));
        }
        if !self.missing_devices.is_empty() {
            let devices = self.missing_devices.join(", ");
            return Some(format!("QEMU {} was built without {devices}; {REMEDY}", self.version));
        }
        if !self.exit_with_parent {
            return Some(format!("QEMU {} has no -run-with exit-with-parent; {REMEDY}", self.version));
        }
        None
    }
}

/// Asks the QEMU at `qemu`, which tries to open each of `images`.
///
/// # Errors
/// It cannot be started, does not speak QMP, or refuses the sandbox; one line that says which.
pub(crate) async fn probe(qemu: &Path, images: &[&Image]) -> anyhow::Result<QemuFacts> {
    tokio::time::timeout(PROBE_LIMIT, ask_all(qemu, images))
        .await
        .with_context(|| format!("QEMU {} did not answer within {} s", qemu.display(), PROBE_LIMIT.as_secs()))?
}

async fn ask_all(qemu: &Path, images: &[&Image]) -> anyhow::Result<QemuFacts> {
    let (mut qmp, version) = Probed::start(qemu).await?;
    let types = qmp.ask("qom-list-types", json!({ "implements": "device", "abstract": false })).await??;
    // An unknown option is an error of this query, not of the conversation.
    let run_with = qmp.ask("query-command-line-options", json!({ "option": "run-with" })).await?.unwrap_or_default();
    let mut disk_io = Vec::new();
    for (number, image) in images.iter().enumerate() {
        disk_io.push(try_disk_io(&mut qmp, image, number).await?);
    }
    let missing_devices = REQUIRED_DEVICES.into_iter().filter(|name| !names(&types, "name").any(|it| it == *name));
    let facts = QemuFacts {
        version,
        missing_devices: missing_devices.collect(),
        exit_with_parent: option_has(&run_with, "exit-with-parent"),
        disk_io,
    };
    qmp.quit().await;
    Ok(facts)
}

/// Opens the image in each way until one works; the last refusal is the reason if none does.
async fn try_disk_io(qmp: &mut Probed, image: &Image, disk: usize) -> anyhow::Result<Result<DiskIo, String>> {
    let mut refusal = String::new();
    for (number, way) in DISK_IO_WAYS.into_iter().enumerate() {
        let node = protocol_node(image, way, &format!("disk{disk}-try{number}"));
        match qmp.ask("blockdev-add", node).await? {
            Ok(_) => return Ok(Ok(way)),
            Err(error) => refusal = error.to_string(),
        }
    }
    Ok(Err(refusal))
}

fn names<'a>(list: &'a Value, key: &'a str) -> impl Iterator<Item = &'a str> {
    list.as_array().into_iter().flatten().filter_map(move |entry| entry.get(key)?.as_str())
}

fn option_has(options: &Value, parameter: &str) -> bool {
    let all = options.as_array().into_iter().flatten();
    all.filter_map(|option| option.get("parameters")).any(|list| names(list, "name").any(|name| name == parameter))
}

/// A QEMU that answers on standard input and output.
#[derive(Debug)]
struct Probed {
    process: Child,
    qmp: Qmp<ChildStdin, ChildStdout>,
}

impl Probed {
    async fn start(qemu: &Path) -> anyhow::Result<(Self, Version)> {
        let shown = qemu.display();
        let mut command = Command::new(qemu);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX]);
        command.args(["-machine", "none,accel=tcg:kvm", "-qmp", "stdio"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        die_with_parent(&mut command);
        let mut process = command.spawn().with_context(|| format!("cannot start QEMU {shown}"))?;
        let requests = process.stdin.take().context("QEMU has no standard input")?;
        let answers = process.stdout.take().context("QEMU has no standard output")?;
        let not_qemu = || format!("{shown} is not QEMU: it does not speak QMP; name QEMU with --qemu or $VVU_QEMU");
        match Qmp::greet(requests, answers).await {
            Ok((qmp, greeting)) => {
                let version = version_of(&greeting).with_context(not_qemu)?;
                Ok((Self { process, qmp }, version))
            }
            Err(QmpError::NotQmp) => bail!("{}", not_qemu()),
            Err(_) => bail!("QEMU {shown} does not start: {}", complaint(&mut process).await),
        }
    }

    /// Sends one command and waits for its answer. The inner result is QEMU's, the outer one the conversation's.
    async fn ask(&mut self, command: &str, arguments: Value) -> anyhow::Result<Result<Value, QmpError>> {
        match self.qmp.ask(command, arguments).await {
            Err(QmpError::Closed) => {
                bail!("QEMU ended while it was asked for {command}: {}", complaint(&mut self.process).await)
            }
            Ok(answer) => Ok(Ok(answer)),
            Err(QmpError::Refused(text)) => Ok(Err(QmpError::Refused(text))),
            Err(error) => Err(error).with_context(|| format!("QEMU was asked for {command}")),
        }
    }

    async fn quit(mut self) {
        // If it does not go in order it is killed when it is dropped.
        self.qmp.quit().await;
        let _ = self.process.wait().await;
    }
}

/// The first line that QEMU wrote on its standard error.
async fn complaint(process: &mut Child) -> String {
    let mut bytes = Vec::new();
    if let Some(stderr) = process.stderr.take() {
        // What could not be read is not there to be shown.
        let _ = stderr.take(MAX_STDERR_BYTES).read_to_end(&mut bytes).await;
    }
    let text = String::from_utf8_lossy(&bytes);
    let first = text.lines().map(str::trim).find(|line| !line.is_empty());
    printable(first.unwrap_or("it says nothing on standard error"))
}

/// The version in QMP's greeting (QMP specification, section 2.2).
fn version_of(greeting: &Value) -> Option<Version> {
    let version = greeting.pointer("/QMP/version/qemu")?;
    let number = |name: &str| version.get(name)?.as_u64();
    Some(Version { major: number("major")?, minor: number("minor")?, micro: number("micro")? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Expected;

    fn facts() -> QemuFacts {
        QemuFacts {
            version: Version { major: 11, minor: 1, micro: 3 },
            missing_devices: vec![],
            exit_with_parent: true,
            disk_io: vec![Ok(DISK_IO_WAYS[0])],
        }
    }

    #[test]
    fn the_version_is_read_from_the_greeting() {
        let greeting = json!({ "QMP": { "version": { "qemu": { "micro": 3, "minor": 1, "major": 11 } } } });
        assert_eq!(version_of(&greeting).unwrap().to_string(), "11.1.3");
        assert_eq!(version_of(&json!({ "QMP": {} })), None);
    }

    #[test]
    fn each_shortcoming_is_named_with_a_remedy() {
        assert_eq!(facts().refusal(), None);
        let cases = [
            (QemuFacts { version: Version { major: 10, minor: 2, micro: 9 }, ..facts() }, "version 10.2.9, too old"),
            (QemuFacts { missing_devices: vec!["intel-iommu"], ..facts() }, "without intel-iommu"),
            (QemuFacts { exit_with_parent: false, ..facts() }, "exit-with-parent"),
        ];
        for (facts, expected) in cases {
            let refusal = facts.refusal().unwrap();
            assert!(refusal.contains(expected) && refusal.contains("--qemu"), "{refusal}");
        }
    }

    #[test]
    fn options_are_found_in_qemus_own_shape() {
        let options = json!([{ "option": "run-with", "parameters": [{ "name": "exit-with-parent" }] }]);
        assert!(option_has(&options, "exit-with-parent"));
        assert!(!option_has(&options, "chroot"));
        assert!(!option_has(&Value::Null, "exit-with-parent"));
    }

    fn image() -> Image {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        Image::check(file.path(), true, Expected::Raw).unwrap()
    }

    #[tokio::test]
    async fn a_program_that_is_no_qemu_is_told_apart() {
        let image = image();
        let silent = probe(Path::new("/bin/false"), &[&image]).await.unwrap_err();
        assert!(format!("{silent:#}").contains("does not start"), "{silent:#}");
        let other = probe(Path::new("/bin/echo"), &[&image]).await.unwrap_err();
        assert!(format!("{other:#}").contains("is not QEMU"), "{other:#}");
    }
}
