//! The command of an overlay: what stands for a path in it, and where its program is.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What the names in a command stand for.
#[derive(Debug)]
pub(super) struct Places<'a> {
    pub(super) socket: &'a Path,
    /// The path of the socket without the `0` at its end: some programs number their sockets themselves.
    pub(super) stem: &'a Path,
    pub(super) channels: &'a [(&'a str, PathBuf)],
    pub(super) disks: &'a [(&'a str, PathBuf)],
}

/// A name in the command stands for nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the command names the {kind} '{name}', which is not given to it: there {known}")]
pub(super) struct UnknownName {
    kind: &'static str,
    name: String,
    known: String,
}

/// Replaces `{socket}`, `{socket-stem}`, `{channel:NAME}` and `{disk:NAME}`. Every other brace is what it is: arguments are often JSON.
pub(super) fn substitute(word: &str, places: &Places<'_>) -> Result<OsString, UnknownName> {
    let mut result = OsString::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('{') {
        result.push(before);
        rest = match place(after, places)? {
            Some((path, behind)) => {
                result.push(path);
                behind
            }
            None => {
                result.push("{");
                after
            }
        };
    }
    result.push(rest);
    Ok(result)
}

/// The path that the text between a brace and the next closing one stands for, and what comes behind.
fn place<'a>(after: &'a str, places: &Places<'a>) -> Result<Option<(&'a Path, &'a str)>, UnknownName> {
    let Some((inside, behind)) = after.split_once('}') else { return Ok(None) };
    let path = if inside == "socket" {
        places.socket
    } else if inside == "socket-stem" {
        places.stem
    } else if let Some(name) = inside.strip_prefix("channel:") {
        look_up("channel", name, places.channels)?
    } else if let Some(name) = inside.strip_prefix("disk:") {
        look_up("disk", name, places.disks)?
    } else {
        return Ok(None);
    };
    Ok(Some((path, behind)))
}

fn look_up<'a>(kind: &'static str, name: &str, all: &'a [(&str, PathBuf)]) -> Result<&'a Path, UnknownName> {
    if let Some((_, path)) = all.iter().find(|(known, _)| *known == name) {
        return Ok(path);
    }
    let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
    let known = if names.is_empty() { "is none".to_owned() } else { format!("is {}", names.join(", ")) };
    Err(UnknownName { kind, name: name.to_owned(), known })
}

/// The program of a command: a path, or a name in one of the directories of `search`. `None` if there is no executable file.
pub(super) fn find(program: &Path, search: &str) -> Option<PathBuf> {
    let candidates: Vec<PathBuf> = if program.as_os_str().as_encoded_bytes().contains(&b'/') {
        // Its directory is empty, so no path is relative to that.
        vec![program.to_owned()]
    } else {
        std::env::split_paths(OsStr::new(search)).map(|directory| directory.join(program)).collect()
    };
    candidates.into_iter().find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replaced(word: &str) -> Result<String, UnknownName> {
        let channels = [("qmp", "/run/channel-qmp.sock".into())];
        let disks = [("data", "/dev/vda".into()), ("base", "/dev/vdb".into())];
        let (socket, stem) = (Path::new("/run/back-end0"), Path::new("/run/back-end"));
        let places = Places { socket, stem, channels: &channels, disks: &disks };
        substitute(word, &places).map(|word| word.into_string().unwrap())
    }

    #[test]
    fn names_become_paths_wherever_they_stand() {
        for (word, expected) in [
            ("{socket}", "/run/back-end0"),
            ("--socket-path={socket-stem}", "--socket-path=/run/back-end"),
            ("--socket-path={socket},x={socket}", "--socket-path=/run/back-end0,x=/run/back-end0"),
            ("socket,path={channel:qmp},server=on", "socket,path=/run/channel-qmp.sock,server=on"),
            ("{disk:data}{disk:base}", "/dev/vda/dev/vdb"),
            (r#"{"driver":"file","filename":"{disk:data}"}"#, r#"{"driver":"file","filename":"/dev/vda"}"#),
        ] {
            assert_eq!(replaced(word).unwrap(), expected);
        }
    }

    #[test]
    fn other_braces_stay() {
        for word in
            ["", "{", "}", "{}", "{sockets}", "{ socket}", "{{}}", "a{b}c", "{socket", "{disk}", "{\"disk:data\"}"]
        {
            assert_eq!(replaced(word).unwrap(), word);
        }
        assert_eq!(replaced("{{socket}}").unwrap(), "{/run/back-end0}");
    }

    #[test]
    fn a_name_that_stands_for_nothing_is_told_with_those_that_do() {
        let error = replaced("x={disk:date}").unwrap_err().to_string();
        assert_eq!(error, "the command names the disk 'date', which is not given to it: there is data, base");
        let places = Places { socket: Path::new("s0"), stem: Path::new("s"), channels: &[], disks: &[] };
        let error = substitute("{channel:qmp}", &places).unwrap_err().to_string();
        assert_eq!(error, "the command names the channel 'qmp', which is not given to it: there is none");
    }

    #[test]
    fn programs_are_found_by_name_and_by_path() {
        assert_eq!(find(Path::new("sh"), "/nowhere:/bin"), Some("/bin/sh".into()));
        assert_eq!(find(Path::new("/bin/sh"), ""), Some("/bin/sh".into()));
        assert_eq!(find(Path::new("sh"), "/nowhere"), None);
        assert_eq!(find(Path::new("/bin"), ""), None);
        assert_eq!(find(Path::new("/etc/passwd"), ""), None);
    }
}
