//! What the host's `/proc` tells about who touches what.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Name that QEMU gives to a `memory-backend-memfd`, as `/proc/<pid>/maps` shows it.
const GUEST_MEMORY: &str = "/memfd:memory-backend-memfd";

/// One file mapping of a process, with what of it is in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMap {
    /// Device and inode: the file's identity, whatever its name.
    pub file: (String, u64),
    /// What may be done with it, as `rw-p`.
    pub permissions: String,
    /// Name, as far as the kernel tells; empty for anonymous memory.
    pub path: String,
    /// Length of the mapping in bytes.
    pub len: u64,
    /// Bytes of it in memory.
    pub resident: u64,
    /// As `resident`, each page divided by the number of processes that map it.
    pub proportional: u64,
}

/// All mappings of process `pid`, from `/proc/<pid>/smaps` (proc(5)).
///
/// # Errors
/// If the process is gone or belongs to someone else.
pub fn maps(pid: u32) -> Result<Vec<FileMap>> {
    let path = format!("/proc/{pid}/smaps");
    parse_smaps(&fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?)
}

/// How often the threads of process `pid` have been switched from, by themselves or not, since they were started: one that
/// has not run meanwhile has the same number as before (`/proc/<pid>/task/*/status`, proc(5)).
///
/// # Errors
/// If the process is gone or belongs to someone else.
pub fn context_switches(pid: u32) -> Result<u64> {
    let tasks = format!("/proc/{pid}/task");
    let mut sum = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("cannot read {tasks}"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let counts = status.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
        for (_, count) in counts {
            sum += count.trim().parse::<u64>().context("cannot read a number of context switches")?;
        }
    }
    Ok(sum)
}

fn parse_smaps(text: &str) -> Result<Vec<FileMap>> {
    let mut maps: Vec<FileMap> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            maps.push(parse_header(start, end, words).with_context(|| format!("cannot read the mapping {line:?}"))?);
        } else if let (Some(map), Some(kib)) = (maps.last_mut(), words.next()) {
            match first {
                "Rss:" => map.resident = kib.parse::<u64>()? * 1024,
                "Pss:" => map.proportional = kib.parse::<u64>()? * 1024,
                _ => {}
            }
        }
    }
    Ok(maps)
}

/// Header of a mapping: `start-end permissions offset device inode path`.
fn parse_header<'a>(start: &str, end: &str, mut words: impl Iterator<Item = &'a str>) -> Result<FileMap> {
    let len = u64::from_str_radix(end, 16)?.checked_sub(u64::from_str_radix(start, 16)?).context("ends early")?;
    let permissions = words.next().context("no permissions")?.to_owned();
    let device = words.nth(1).context("no device")?.to_owned();
    let inode = words.next().context("no inode")?.parse()?;
    let path = words.collect::<Vec<_>>().join(" ");
    Ok(FileMap { file: (device, inode), permissions, path, len, resident: 0, proportional: 0 })
}

/// The memory of a VM: the memory files that its QEMU maps and nobody else gave to it.
///
/// # Errors
/// If the process is gone, or maps no memory file (then a proof built on this would prove nothing).
pub fn guest_memory(qemu_pid: u32) -> Result<Vec<FileMap>> {
    let mut memory = maps(qemu_pid)?;
    memory.retain(|map| map.path.starts_with(GUEST_MEMORY));
    if memory.is_empty() {
        bail!("QEMU (pid {qemu_pid}) maps no {GUEST_MEMORY}");
    }
    Ok(memory)
}

/// Bytes that process `pid` maps of the given files.
///
/// # Errors
/// If the process is gone or belongs to someone else.
pub fn bytes_mapped_of(pid: u32, files: &[FileMap]) -> Result<u64> {
    Ok(maps(pid)?.iter().filter(|map| files.iter().any(|other| other.file == map.file)).map(|map| map.len).sum())
}

/// Bytes of process `pid` that are in memory, and their proportional share, the given files not counted.
///
/// # Errors
/// If the process is gone or belongs to someone else.
pub fn memory_without(pid: u32, files: &[FileMap]) -> Result<(u64, u64)> {
    let mut own = maps(pid)?;
    own.retain(|map| !files.iter().any(|other| other.file == map.file));
    Ok((own.iter().map(|map| map.resident).sum(), own.iter().map(|map| map.proportional).sum()))
}

/// Whether process `pid` has `path` open.
///
/// # Errors
/// If the process is gone or belongs to someone else, or there is no such file.
pub fn has_open(pid: u32, path: &Path) -> Result<bool> {
    let wanted = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    let folder = format!("/proc/{pid}/fd");
    let descriptors = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    // A descriptor may be closed between the two looks.
    let open = descriptors.flatten().filter_map(|descriptor| fs::metadata(descriptor.path()).ok());
    Ok(open.into_iter().any(|file| file.dev() == wanted.dev() && file.ino() == wanted.ino()))
}

/// Bytes that a process has moved so far (`/proc/<pid>/io`, proc(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Bytes passed to read-like system calls, of all descriptors.
    pub read_calls: u64,
    /// Bytes passed to write-like system calls.
    pub write_calls: u64,
    /// Bytes fetched from storage on behalf of the process, io_uring included.
    pub storage_read: u64,
    /// Bytes sent to storage.
    pub storage_written: u64,
}

/// Reads the counters of process `pid`.
///
/// # Errors
/// If the process is gone or belongs to someone else.
pub fn moved(pid: u32) -> Result<Moved> {
    let path = format!("/proc/{pid}/io");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        Ok(line.with_context(|| format!("{path} has no {name}"))?.trim().parse()?)
    };
    Ok(Moved {
        read_calls: field("rchar")?,
        write_calls: field("wchar")?,
        storage_read: field("read_bytes")?,
        storage_written: field("write_bytes")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_text_is_understood() {
        let text = "7f0000000000-7f0000200000 rw-s 00000000 00:01 1029 /memfd:memory-backend-memfd (deleted)\n\
                    Size:               2048 kB\nRss:                 100 kB\nPss:                  50 kB\n\
                    VmFlags: rd wr sh mr mw me ms sd\n\
                    7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0 [vdso]\nRss:                   4 kB\n";
        let maps = parse_smaps(text).unwrap();
        assert_eq!(maps.len(), 2);
        assert_eq!(maps[0].file, ("00:01".to_owned(), 1029));
        assert_eq!(maps[0].path, "/memfd:memory-backend-memfd (deleted)");
        assert_eq!((maps[0].len, maps[0].resident, maps[0].proportional), (2 << 20, 100 << 10, 50 << 10));
        assert_eq!((maps[1].len, maps[1].resident), (4096, 4096));
    }

    #[test]
    fn our_own_process_can_be_read() {
        let pid = std::process::id();
        assert!(maps(pid).unwrap().iter().any(|map| map.path == "[stack]"));
        assert!(moved(pid).unwrap().read_calls > 0);
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(has_open(pid, file.path()).unwrap());
        assert!(!has_open(pid, Path::new("/proc/version")).unwrap());
    }
}
