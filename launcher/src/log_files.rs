//! The log files of `--log-dir`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;

use crate::events::Source;

/// Size at which a log file is set aside as `NAME.1` (replacing the last one) and begun anew, in bytes.
const MAX_LOG_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// The files of `--log-dir`, one for each source.
#[derive(Debug)]
pub(crate) struct LogFiles {
    started: Instant,
    files: BTreeMap<&'static str, LogFile>,
}

#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: File,
    len_bytes: u64,
}

impl LogFiles {
    /// Creates the directory and empty files in it. Lines are stamped with the seconds since `started`.
    ///
    /// # Errors
    /// The directory or a file in it cannot be created.
    pub(crate) fn open(directory: &Path, started: Instant) -> anyhow::Result<Self> {
        let context = || format!("cannot write logs to {}; name another --log-dir", directory.display());
        std::fs::create_dir_all(directory).with_context(context)?;
        let mut files = BTreeMap::new();
        for name in Source::NAMES {
            let path = directory.join(format!("{name}.log"));
            let file = File::create(&path).with_context(context)?;
            files.insert(name, LogFile { path, file, len_bytes: 0 });
        }
        Ok(Self { started, files })
    }

    /// Writes one line with the seconds since the start before it, and whose it is if that is not the first of its kind.
    pub(crate) fn write(&mut self, source: Source, line: &str) -> io::Result<()> {
        let Some(log) = self.files.get_mut(source.name()) else { return Ok(()) };
        let owner = source.owner().map(|owner| format!("{owner}: ")).unwrap_or_default();
        let text = format!("[{:>10.3}] {owner}{line}\n", self.started.elapsed().as_secs_f64());
        if log.len_bytes >= MAX_LOG_FILE_BYTES {
            std::fs::rename(&log.path, log.path.with_extension("log.1"))?;
            log.file = File::create(&log.path)?;
            log.len_bytes = 0;
        }
        log.file.write_all(text.as_bytes())?;
        log.len_bytes += text.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::ApplianceId;

    #[test]
    fn a_log_file_is_set_aside_when_it_is_full() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = LogFiles::open(&directory.path().join("new/logs"), Instant::now()).unwrap();
        files.write(Source::Appliance(ApplianceId(1)), "old").unwrap();
        files.files.get_mut("appliance").unwrap().len_bytes = MAX_LOG_FILE_BYTES;
        files.write(Source::Appliance(ApplianceId(2)), "fresh").unwrap();
        let read = |name: &str| std::fs::read_to_string(directory.path().join("new/logs").join(name)).unwrap();
        assert!(read("appliance.log.1").ends_with("] old\n"));
        assert!(read("appliance.log").ends_with("] appliance 2: fresh\n"));
    }
}
