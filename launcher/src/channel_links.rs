//! Where the operator finds the channels of a run: links beside the vhost-user socket that lead to the appliance VM in use.
//!
//! Each appliance VM's QEMU has sockets of its own for the channels, since two of them may live at once. A link always
//! leads to one of them, and is moved over in one step, so who connects meets the old one or the new one.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// The links of a run; they vanish with the value.
#[derive(Debug, Default)]
pub(crate) struct ChannelLinks {
    /// Each with where it leads to now.
    links: Vec<(String, Option<PathBuf>)>,
}

impl ChannelLinks {
    /// Links at these paths, which lead nowhere yet.
    pub(crate) fn new(paths: impl Iterator<Item = String>) -> Self {
        Self { links: paths.map(|path| (path, None)).collect() }
    }

    /// Lets the link at `path` lead to `target`, which need not be there yet.
    ///
    /// # Errors
    /// The file system refuses it.
    pub(crate) fn lead(&mut self, path: &str, target: PathBuf) -> anyhow::Result<()> {
        for (link, leads_to) in self.links.iter_mut().filter(|(link, _)| link == path) {
            if leads_to.as_ref() != Some(&target) {
                replace(Path::new(link), &target).with_context(|| format!("cannot make the link {link}"))?;
                *leads_to = Some(target.clone());
            }
        }
        Ok(())
    }
}

impl Drop for ChannelLinks {
    fn drop(&mut self) {
        for (link, target) in &self.links {
            if target.is_some() && fs::read_link(link).ok() == *target {
                // Gone in the meantime is what was wanted.
                let _ = fs::remove_file(link);
            }
        }
    }
}

fn replace(link: &Path, target: &Path) -> io::Result<()> {
    let mut new = link.as_os_str().to_owned();
    new.push(".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(target, &new)?;
    fs::rename(&new, link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_moves_and_vanishes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d.sock.qmp").display().to_string();
        let mut links = ChannelLinks::new([path.clone()].into_iter());
        for target in ["/one", "/two", "/two"] {
            links.lead(&path, target.into()).unwrap();
            assert_eq!(fs::read_link(&path).unwrap(), Path::new(target));
        }
        links.lead("/another", "/three".into()).unwrap();
        drop(links);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn somebody_elses_link_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d.sock.qmp").display().to_string();
        let mut links = ChannelLinks::new([path.clone()].into_iter());
        links.lead(&path, "/one".into()).unwrap();
        fs::remove_file(&path).unwrap();
        symlink("/theirs", &path).unwrap();
        drop(links);
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("/theirs"));
    }
}
