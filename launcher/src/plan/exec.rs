//! What `vvu run exec` wants.

use anyhow::bail;
use vvu_appliance_config::{CONTROL_CHANNEL, Device, ExecDisk, ExecOptions};

use super::draft::{Class, DiskDraft, Draft, PortDraft};
use crate::cli::{DiskSpec, ExecArgs};
use crate::image::{Expected, Image};
use crate::image_lock::ImageLock;
use crate::overlay::Overlay;

/// Most channels of a program.
const MAX_PROGRAM_CHANNELS: usize = 8;

/// Most channels of an appliance VM, that to the agent included; a digit counts them.
pub(crate) const MAX_CHANNELS: usize = MAX_PROGRAM_CHANNELS + 1;

/// Most disks of a program: they stand on a PCI bus of 32 places.
const MAX_DISKS: usize = 16;

/// What stands for the vhost-user socket in a command.
const SOCKET: &str = "{socket}";

/// What stands for its path without the `0` at its end, which some programs add themselves.
const SOCKET_STEM: &str = "{socket-stem}";

impl Draft {
    /// A program of the operator's.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(crate) fn exec(args: &ExecArgs) -> anyhow::Result<Self> {
        check(args)?;
        let disks = args.disks.iter().map(disk).collect::<anyhow::Result<_>>()?;
        let overlay = Overlay::pack(&args.overlay)?;
        let exec_disk = |disk: &DiskSpec| ExecDisk { name: disk.name.clone(), read_only: disk.read_only };
        let options = ExecOptions { command: args.command.clone(), disks: args.disks.iter().map(exec_disk).collect() };
        let (socket, vrings) = (args.socket.clone(), args.queues);
        Ok(Self {
            ports: vec![PortDraft { socket, option: "--socket", queues: vrings, vrings, mac: None }],
            disks,
            channels: args.channels.iter().cloned().chain([CONTROL_CHANNEL.to_owned()]).collect(),
            overlay: Some(overlay),
            ..Self::of(Class::Exec, Device::Exec(options))
        })
    }
}

fn disk(spec: &DiskSpec) -> anyhow::Result<DiskDraft> {
    let mut image = Image::check(&spec.path, spec.read_only, Expected::AnyLength)?;
    let lock = Some(ImageLock::take(&image)?);
    if let Some(size) = spec.size {
        image.grow(size.0)?;
    }
    // What is only read is filled up to whole sectors by QEMU.
    if !spec.read_only {
        image.check_length()?;
    }
    // What a program makes of a disk nobody knows.
    Ok(DiskDraft { serial: spec.name.clone(), image, lock, has_metadata: true })
}

/// Names that are used must be there, so that a slip of the pen is told before a VM boots.
fn check(args: &ExecArgs) -> anyhow::Result<()> {
    let words = args.command.concat();
    if ![SOCKET, SOCKET_STEM].iter().any(|place| words.contains(place)) {
        bail!("the command has no {SOCKET}, so the program cannot know where to listen; put it into an argument");
    }
    let disks: Vec<&String> = args.disks.iter().map(|disk| &disk.name).collect();
    let channels: Vec<&String> = args.channels.iter().collect();
    for (kind, names, most) in [("disk", &disks, MAX_DISKS), ("channel", &channels, MAX_PROGRAM_CHANNELS)] {
        if names.len() > most {
            bail!("{} {kind}s are too many; name at most {most}", names.len());
        }
        let mut rest = words.as_str();
        while let Some((_, after)) = rest.split_once(&format!("{{{kind}:")) {
            let name = after.split('}').next().unwrap_or_default();
            if !names.iter().any(|known| *known == name) {
                bail!("the command uses {{{kind}:{name}}}, which is not there; add --{kind} for it");
            }
            rest = after;
        }
    }
    if args.channels.iter().any(|name| name == CONTROL_CHANNEL) {
        bail!("channel {CONTROL_CHANNEL} is vvu's own; choose another name");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command, Device as Class};

    fn draft(overlay: &Path, more: &[&str], command: &[&str]) -> anyhow::Result<Draft> {
        let overlay = overlay.to_str().unwrap();
        let start = ["vvu", "run", "exec", "--socket", "/run/s", "--overlay", overlay];
        match Cli::parse_from(start.iter().chain(more).chain(&["--"]).chain(command)).command {
            Command::Run(Class::Exec(args)) => Draft::exec(&args),
            _ => panic!("not exec"),
        }
    }

    #[test]
    fn the_command_is_passed_on_with_its_disks_and_channels() {
        let directory = tempfile::tempdir().unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(512).unwrap();
        let disk = format!("data={},size=1M", image.path().display());
        let words = ["daemon", "--socket={socket}", "{disk:data}", "{channel:qmp}"];
        let draft = draft(directory.path(), &["--disk", &disk, "--channel", "qmp"], &words).unwrap();
        let Device::Exec(options) = &draft.device else { panic!("not exec") };
        assert_eq!(options.command, words);
        assert_eq!(options.disks, [ExecDisk { name: "data".into(), read_only: false }]);
        assert_eq!(draft.channels, ["qmp", "control"]);
        assert_eq!(draft.disks[0].image.size_bytes, 1 << 20);
        assert!(!draft.can_stand_by(), "two programs would write to the disk");
    }

    #[test]
    fn a_disk_is_made_longer_before_its_length_is_judged() {
        let directory = tempfile::tempdir().unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        let with = |length: u64, more: &str| {
            image.as_file().set_len(length).unwrap();
            draft(directory.path(), &[&format!("--disk=data={}{more}", image.path().display())], &["{socket}"])
        };
        assert_eq!(with(196_616, ",size=1M").unwrap().disks[0].image.size_bytes, 1 << 20);
        assert_eq!(with(0, ",size=1M").unwrap().disks[0].image.size_bytes, 1 << 20);
        assert_eq!(with(196_616, ",ro").unwrap().disks[0].image.size_bytes, 196_616);
        assert!(with(196_616, "").unwrap_err().to_string().contains("no multiple of 512"));
    }

    #[test]
    fn slips_of_the_pen_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let refusal = |more: &[&str], words: &[&str]| draft(directory.path(), more, words).unwrap_err().to_string();
        assert!(refusal(&[], &["daemon"]).contains("no {socket}"));
        assert!(draft(directory.path(), &[], &["daemon", "--socket-path={socket-stem}"]).is_ok());
        assert!(refusal(&[], &["{socket}", "{disk:data}"]).contains("{disk:data}, which is not there; add --disk"));
        assert!(refusal(&["--channel", "qmp"], &["{socket}", "{channel:qmp}{channel:x}"]).contains("{channel:x}"));
        assert!(refusal(&["--channel", "control"], &["{socket}"]).contains("vvu's own"));
    }
}
