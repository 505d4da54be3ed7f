//! Finds out whether this machine is a Debian, which release, and which mirror it uses.

use std::fs;
use std::path::{Path, PathBuf};

use crate::SetupError;
use crate::error::at;
use crate::qemu::program_on_path;
use crate::sources::{Source, debian_mirror, parse_deb822, parse_list};

/// The machine's release and its mirror of the Debian archive.
pub(crate) struct Debian {
    pub(crate) codename: String,
    pub(crate) mirror: String,
}

/// Looks at the machine. The inner error says why it is no Debian that the set-up could use.
pub(crate) fn detect() -> Result<Result<Debian, String>, SetupError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Ok(Err("another processor".into()));
    }
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if value_of(&release, "ID") != Some("debian") {
        return Ok(Err(format!("it is {}", value_of(&release, "PRETTY_NAME").unwrap_or("without /etc/os-release"))));
    }
    let search = std::env::var_os("PATH");
    for program in ["apt-get", "apt-cache", "apt-config", "dpkg-deb"] {
        if program_on_path(search.as_deref(), program).is_none() {
            return Ok(Err(format!("it has no {program}")));
        }
    }
    let Some(codename) = value_of(&release, "VERSION_CODENAME").map(str::to_owned) else {
        return Ok(Err("its release has no codename".into()));
    };
    match debian_mirror(&read_sources(Path::new("/etc/apt"))?, &codename) {
        Some(mirror) => Ok(Ok(Debian { codename, mirror })),
        None => Err(SetupError::NoMirror { codename }),
    }
}

/// A variable of os-release(5).
fn value_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim().trim_matches(['"', '\'']))
}

/// All entries of `sources.list` and `sources.list.d` below apt's configuration directory, in the order
/// of file names.
fn read_sources(directory: &Path) -> Result<Vec<Source>, SetupError> {
    let mut files: Vec<PathBuf> = vec![directory.join("sources.list")];
    if let Ok(entries) = fs::read_dir(directory.join("sources.list.d")) {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files.into_iter().filter(|file| file.is_file()) {
        let read = || fs::read_to_string(&file).map_err(at(&file));
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_list(&read()?)),
            Some("sources") => sources.extend(parse_deb822(&read()?)),
            _ => {}
        }
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_is_read() {
        let text =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\nVERSION_CODENAME=bookworm\n";
        assert_eq!(value_of(text, "ID"), Some("debian"));
        assert_eq!(value_of(text, "PRETTY_NAME"), Some("Debian GNU/Linux 12 (bookworm)"));
        assert_eq!(value_of(text, "HOME_URL"), None);
    }

    #[test]
    fn both_formats_are_read_and_other_files_are_not() {
        let apt = tempfile::tempdir().unwrap();
        let parts = apt.path().join("sources.list.d");
        fs::create_dir(&parts).unwrap();
        fs::write(apt.path().join("sources.list"), "deb http://a.example/debian bookworm main\n").unwrap();
        fs::write(parts.join("b.sources"), "Types: deb\nURIs: http://b.example/x\nSuites: x\nComponents: main\n")
            .unwrap();
        fs::write(parts.join("c.list"), "deb http://c.example/x x main\n").unwrap();
        fs::write(parts.join("d.list.disabled"), "deb http://d.example/x x main\n").unwrap();
        let uris: Vec<_> = read_sources(apt.path()).unwrap().into_iter().map(|source| source.uri).collect();
        assert_eq!(uris, ["http://a.example/debian", "http://b.example/x", "http://c.example/x"]);
    }
}
