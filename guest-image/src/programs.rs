//! Copies programs out of a root directory, together with their loader and libraries.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use crate::elf::linkage;
use crate::error::{ImageError, at};
use crate::initramfs::Initramfs;

/// Where the loader searches by itself, relative to a root. A library keeps its directory in the image.
const LIBRARY_DIRECTORIES: [&str; 6] =
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64", "usr/lib", "lib"];

/// Most symbolic links that are followed for one path (Linux, `MAXSYMLINKS`).
const MAX_SYMLINKS: usize = 40;

/// Adds the program at `path` (relative, in `root`) to an image at the same path, with the libraries and
/// the dynamic loader that it needs. Symbolic links are followed inside `root` and become plain files. A library that is in
/// the image already stays: roots of one release may differ in its revisions.
///
/// # Errors
/// [`ImageError::NotInRoot`] for the program or one of its libraries, and errors of reading.
pub fn add_program(image: &mut Initramfs, root: &Path, path: &str) -> Result<(), ImageError> {
    let mut done = BTreeSet::new();
    let program = path;
    let mut pending = vec![path.to_owned()];
    while let Some(path) = pending.pop() {
        if !done.insert(path.clone()) || (path != program && image.contains(&path)) {
            continue;
        }
        let Some(file) = resolve(root, &path) else {
            return Err(ImageError::NotInRoot { name: path, root: root.into() });
        };
        let bytes = fs::read(&file).map_err(at(&file))?;
        let permissions = fs::metadata(&file).map_err(at(&file))?.permissions().mode() & 0o777;
        let linkage = linkage(&file, &bytes)?;
        image.add_file(&path, permissions | 0o444, bytes)?;
        if let Some(loader) = linkage.loader {
            pending.push(loader.trim_start_matches('/').to_owned());
        }
        let origin = file.strip_prefix(root).unwrap_or(&file).parent().unwrap_or(Path::new("")).display().to_string();
        let search: Vec<String> = linkage
            .search
            .iter()
            .map(|directory| directory.replace("$ORIGIN", &origin).trim_start_matches('/').to_owned())
            .chain(LIBRARY_DIRECTORIES.map(str::to_owned))
            .collect();
        for library in linkage.libraries {
            let found =
                search.iter().map(|directory| format!("{directory}/{library}")).find(|p| resolve(root, p).is_some());
            match found {
                Some(path) => pending.push(path),
                None => return Err(ImageError::NotInRoot { name: library, root: root.into() }),
            }
        }
    }
    Ok(())
}

/// The file at `path` as a process would see it whose root directory is `root`.
pub(crate) fn resolve(root: &Path, path: &str) -> Option<PathBuf> {
    let mut links = 0;
    // Components still to walk, last one first.
    let mut pending: Vec<String> = split(Path::new(path));
    let mut at = PathBuf::new();
    while let Some(part) = pending.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&part);
        let meta = fs::symlink_metadata(root.join(&next)).ok()?;
        if !meta.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_SYMLINKS {
            return None;
        }
        let target = fs::read_link(root.join(&next)).ok()?;
        if target.is_absolute() {
            at = PathBuf::new();
        }
        pending.extend(split(&target));
    }
    let file = root.join(at);
    file.is_file().then_some(file)
}

fn split(path: &Path) -> Vec<String> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        Component::ParentDir => Some("..".to_owned()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().rev().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_inside_the_root() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path();
        fs::create_dir_all(base.join("usr/lib")).unwrap();
        fs::write(base.join("usr/lib/real.so"), "").unwrap();
        symlink("usr/lib", base.join("lib")).unwrap();
        symlink("/lib/real.so", base.join("usr/lib/absolute.so")).unwrap();
        symlink("../../../../lib/real.so", base.join("usr/lib/above.so")).unwrap();
        symlink("loop.so", base.join("usr/lib/loop.so")).unwrap();
        for name in ["real.so", "absolute.so", "above.so"] {
            assert_eq!(resolve(base, &format!("lib/{name}")), Some(base.join("usr/lib/real.so")), "{name}");
        }
        assert_eq!(resolve(base, "lib/loop.so"), None);
        assert_eq!(resolve(base, "lib/missing.so"), None);
        assert_eq!(resolve(base, "lib"), None);
    }

    #[test]
    fn a_program_comes_with_its_loader_and_libraries() {
        let mut image = Initramfs::new();
        let exe = std::env::current_exe().unwrap();
        let path = exe.to_str().unwrap().trim_start_matches('/').to_owned();
        add_program(&mut image, Path::new("/"), &path).unwrap();
        let files = image.files();
        for expected in [path.as_str(), "ld-linux-x86-64.so.2", "libc.so.6"] {
            assert!(files.iter().any(|file| file.path.ends_with(expected)), "{expected}");
        }
        let refusal = add_program(&mut image, Path::new("/"), "bin/no-such-program").unwrap_err();
        assert!(matches!(refusal, ImageError::NotInRoot { .. }));
    }
}
