//! The program under test.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) use vvu_test_driver::event::LIMIT;
use vvu_test_driver::process::Process;

/// A running `vvu-blk`, ended and cleaned up with the value.
pub(crate) struct Program {
    process: Process,
    directory: tempfile::TempDir,
}

impl Deref for Program {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Program {
    /// Serves `image` with further arguments.
    pub(crate) fn start(image: &Path, arguments: &[&str]) -> Self {
        Self::start_in("", image, arguments)
    }

    /// Serves a disk that keeps nothing, with further arguments.
    pub(crate) fn start_null(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vvu-blk"));
        command.arg("--socket-path").arg(directory.path().join("socket")).args(["--null", "1G"]).args(arguments);
        command.env("RUST_LOG", "vvu_blk=debug,vvu_back_end=debug").stdin(Stdio::null());
        let program = Self::spawn(command, directory);
        program.wait_for_line(|line| line.contains("listening"));
        program
    }

    /// The same, after the shell commands `prelude`.
    pub(crate) fn start_in(prelude: &str, image: &Path, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = if prelude.is_empty() {
            Command::new(env!("CARGO_BIN_EXE_vvu-blk"))
        } else {
            let mut unshare = Command::new("unshare");
            if !rustix::process::geteuid().is_root() {
                unshare.args(["--user", "--map-root-user"]);
            }
            let script = format!("{prelude} && exec \"$0\" \"$@\"");
            unshare.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_vvu-blk")]);
            unshare
        };
        command.arg("--socket-path").arg(&socket).arg("--image").arg(image).args(arguments);
        command.env("RUST_LOG", "vvu_blk=debug,vvu_back_end=debug").stdin(Stdio::null());
        let program = Self::spawn(command, directory);
        program.wait_for_line(|line| line.contains("listening"));
        program
    }

    pub(crate) fn spawn(command: Command, directory: tempfile::TempDir) -> Self {
        Self { process: Process::spawn("vvu-blk", command), directory }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// True if it listens, false if it has ended.
    pub(crate) fn listens(&self) -> bool {
        self.wait_for(|lines, more_to_come| {
            let listens = lines.iter().any(|line| line.contains("listening"));
            (listens || !more_to_come).then_some(listens)
        })
    }

    /// The counters at this moment, summed up over the queues, by SIGUSR1.
    pub(crate) fn counters(&self) -> serde_json::Value {
        self.reported("counters ")
    }

    /// The counters of one of several queues.
    pub(crate) fn counters_of(&self, queue: u16) -> serde_json::Value {
        self.reported(&format!("counters of queue {queue} "))
    }

    fn reported(&self, words: &str) -> serde_json::Value {
        let line_start = format!("{words}{{");
        let before = self.count_lines(&line_start);
        self.signal(rustix::process::Signal::USR1);
        self.wait_for(|lines, _more_to_come| {
            let line = lines.iter().filter(|line| line.contains(&line_start)).nth(before)?;
            Some(serde_json::from_str(line.split_once(words).unwrap().1).unwrap())
        })
    }

    /// One counter, summed up over the queues.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.counters()[name].as_u64().unwrap_or_else(|| panic!("there is no counter {name}"))
    }

    /// Where the program has mapped what lies at `offset` of a file.
    pub(crate) fn address_of(&self, file: &std::fs::File, offset: u64) -> usize {
        let inode = rustix::fs::fstat(file).unwrap().st_ino.to_string();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.id())).unwrap();
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let mut places = maps.lines().filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-').unwrap();
            let (start, end, mapped) = (hex(start), hex(end), hex(fields[2]));
            let inside = fields[4] == inode && (mapped..mapped + (end - start)).contains(&offset);
            inside.then(|| usize::try_from(start + offset - mapped).unwrap())
        });
        places.next_back().unwrap()
    }
}

/// A directory on the file system of the build, which is one with direct I/O where anything is.
pub(crate) fn disk_directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// An image of `len` bytes in a directory of its own.
pub(crate) struct ImageFile {
    directory: tempfile::TempDir,
}

impl ImageFile {
    pub(crate) fn new(len: u64) -> Self {
        Self::in_directory(disk_directory(), len)
    }

    pub(crate) fn in_directory(directory: tempfile::TempDir, len: u64) -> Self {
        let image = Self { directory };
        std::fs::File::create(image.path()).unwrap().set_len(len).unwrap();
        image
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }

    pub(crate) fn resize(&self, len: u64) {
        std::fs::OpenOptions::new().write(true).open(self.path()).unwrap().set_len(len).unwrap();
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// Bytes that the file has allocated.
    pub(crate) fn allocated(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(self.path()).unwrap()) * 512
    }

    /// Lets qemu-io check that `len` bytes at `offset` are all `pattern`, if it is installed.
    pub(crate) fn check_by_qemu(&self, pattern: u8, offset: u64, len: u64) {
        let read = format!("read -P {pattern} {offset} {len}");
        let Ok(output) = Command::new("qemu-io").args(["-r", "-f", "raw", "-c", &read]).arg(self.path()).output()
        else {
            eprintln!("qemu-io is not installed: second opinion left out");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !text.contains("verification failed"), "qemu-io: {text}");
    }
}

/// A block device with blocks of 4 KiB; needs the rights of root.
pub(crate) struct LoopDevice {
    pub(crate) path: String,
}

impl LoopDevice {
    pub(crate) fn new(image: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", "4096", "--direct-io=off"])
            .arg(image)
            .output()
            .unwrap();
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Self { path: String::from_utf8(output.stdout).unwrap().trim().to_owned() }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Detached when the program has closed it.
        let _detached = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}
