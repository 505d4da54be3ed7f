//! Private roots: directories with the content of packages, and the scripts that run programs out of
//! them with their own dynamic loader and libraries.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::SetupError;
use crate::command::output_of;
use crate::error::at;

/// Where packages put what no program reads.
const DOCUMENTATION: [&str; 7] = ["doc", "man", "info", "locale", "lintian", "bug", "icons"];

/// The loader's places, with and without merged `/usr`, relative to a root.
const LOADERS: [&str; 2] =
    ["usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"];

/// Where a system emulator of a private root finds firmware; it would search below its loader.
const FIRMWARE_OPTIONS: &str = r#"-L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu""#;

/// Unpacks package files into `root`, which appears whole or not at all.
pub(crate) fn unpack(archives: &[PathBuf], root: &Path) -> Result<(), SetupError> {
    let fresh = root.with_extension("new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).map_err(at(&fresh))?;
    }
    fs::create_dir_all(&fresh).map_err(at(&fresh))?;
    for archive in archives {
        output_of(Command::new("dpkg-deb").arg("--extract").arg(archive).arg(&fresh))?;
    }
    for name in DOCUMENTATION {
        let path = fresh.join("usr/share").join(name);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(at(path))?;
        }
    }
    merge_usr(&fresh)?;
    drop_privileges_in(&fresh)?;
    fs::rename(&fresh, root).map_err(at(root))
}

/// Makes the links that an installed system has for programs that were linked before `/usr` was merged,
/// so that `/lib64/ld-linux-x86-64.so.2` is a file in the root.
fn merge_usr(root: &Path) -> Result<(), SetupError> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        let (link, target) = (root.join(name), Path::new("usr").join(name));
        if !link.exists() && root.join(&target).is_dir() {
            symlink(&target, &link).map_err(at(link))?;
        }
    }
    Ok(())
}

/// Takes set-user-id and set-group-id from all files: nobody keeps these programs up to date.
fn drop_privileges_in(directory: &Path) -> Result<(), SetupError> {
    for entry in fs::read_dir(directory).map_err(at(directory))? {
        let path = entry.map_err(at(directory))?.path();
        let meta = path.symlink_metadata().map_err(at(&path))?;
        if meta.is_dir() {
            drop_privileges_in(&path)?;
        } else if meta.is_file() && meta.permissions().mode() & 0o6000 != 0 {
            let plain = fs::Permissions::from_mode(meta.permissions().mode() & 0o777);
            fs::set_permissions(&path, plain).map_err(at(path))?;
        }
    }
    Ok(())
}

/// Bytes of all regular files below a directory.
pub(crate) fn size_of(directory: &Path) -> Result<u64, SetupError> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).map_err(at(directory))? {
        let path = entry.map_err(at(directory))?.path();
        let meta = path.symlink_metadata().map_err(at(&path))?;
        bytes += if meta.is_dir() { size_of(&path)? } else { meta.len() };
    }
    Ok(bytes)
}

/// Writes the script `wrapper`, which runs `program` (relative to `root`) with the root's own loader,
/// libraries, QEMU modules and firmware, and returns its path.
pub(crate) fn wrap(root: &Path, program: &str, wrapper: PathBuf) -> Result<PathBuf, SetupError> {
    let missing = |what: &str| SetupError::Incomplete { what: what.into(), root: root.to_owned() };
    if !root.join(program).exists() {
        return Err(missing(program));
    }
    let loader = LOADERS.into_iter().find(|path| root.join(path).exists()).ok_or_else(|| missing("dynamic loader"))?;
    let firmware = if program.contains("qemu-system") { FIRMWARE_OPTIONS } else { "" };
    let text = format!(
        r#"#!/bin/sh
# Runs a program of a private root with that root's loader, libraries and firmware.
root={root}
export QEMU_MODULE_DIR="$root/usr/lib/x86_64-linux-gnu/qemu"
exec "$root/{loader}" --inhibit-cache --argv0 "$0" \
    --library-path "$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu" \
    "$root/{program}" {firmware} "$@"
"#,
        root = quoted(root),
    );
    if let Some(directory) = wrapper.parent() {
        fs::create_dir_all(directory).map_err(at(directory))?;
    }
    let fresh = wrapper.with_extension("new");
    fs::write(&fresh, text).map_err(at(&fresh))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755)).map_err(at(&fresh))?;
    fs::rename(&fresh, &wrapper).map_err(at(&wrapper))?;
    Ok(wrapper)
}

/// A path as one word of a shell script.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapper_passes_its_arguments_to_the_program_under_the_roots_loader() {
        let cache = tempfile::tempdir().unwrap();
        // An apostrophe in the path must not end the script's quotes.
        let root = cache.path().join("it's");
        let install = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        install(LOADERS[0], "#!/bin/sh\nfor word; do echo \"$word\"; done\n");
        install("usr/bin/qemu-system-x86_64", "");
        install("usr/bin/qemu-img", "");

        let words_of = |program: &str| -> Vec<String> {
            let wrapper = wrap(&root, program, cache.path().join("bin/program")).unwrap();
            let output = output_of(Command::new(wrapper).args(["one two", "three"])).unwrap();
            output.lines().map(str::to_owned).collect()
        };
        let program = |name: &str| root.join(name).display().to_string();

        let words = words_of("usr/bin/qemu-img");
        assert_eq!(words[words.len() - 3..], [program("usr/bin/qemu-img"), "one two".into(), "three".into()]);
        let words = words_of("usr/bin/qemu-system-x86_64");
        assert!(words.contains(&program("usr/share/seabios")));
        assert_eq!(words.last().unwrap(), "three");
    }

    #[test]
    fn a_wrapper_of_what_is_not_there_is_refused() {
        let cache = tempfile::tempdir().unwrap();
        let refusal = wrap(cache.path(), "usr/bin/fio", cache.path().join("fio")).unwrap_err();
        assert!(refusal.to_string().contains("have no usr/bin/fio"));
    }

    #[test]
    fn links_of_a_merged_usr_are_made_and_real_directories_stay() {
        let root = tempfile::tempdir().unwrap();
        for path in ["usr/lib64", "usr/lib", "lib"] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        merge_usr(root.path()).unwrap();
        assert_eq!(fs::read_link(root.path().join("lib64")).unwrap(), Path::new("usr/lib64"));
        assert!(!root.path().join("lib").is_symlink());
        assert!(!root.path().join("bin").exists());
    }

    #[test]
    fn privileges_are_dropped_and_sizes_add_up() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("su");
        fs::write(&path, "12345").unwrap();
        fs::create_dir(root.path().join("sub")).unwrap();
        fs::write(root.path().join("sub/more"), "123").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
        drop_privileges_in(root.path()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o755);
        assert_eq!(size_of(root.path()).unwrap(), 8);
    }
}
