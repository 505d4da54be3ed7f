//! A private apt: its own sources, lists, cache and (empty) package database, so that the host's
//! packages are neither asked nor changed, and an ordinary user may run it.
//!
//! apt checks every list and package against Debian's keyring. Of the machine's configuration only the
//! `Acquire` settings are taken over (proxies, timeouts); what would weaken that check is set back.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::SetupError;
use crate::command::{line_of, name_of, output_of};
use crate::error::at;
use crate::run::Lock;

/// Where Debian's package `debian-archive-keyring` has the keys of the archive, newest name first.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.pgp", "/usr/share/keyrings/debian-archive-keyring.gpg"];

/// Shortest time between two lines of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// What one set-up step wants of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// Packages and all that they depend on, from `target` where that suite has it.
    WithDependencies {
        /// Suite preferred over the others.
        target: String,
        /// Names of packages.
        packages: Vec<String>,
    },
    /// One package alone.
    Alone(String),
}

/// A package file of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) file_name: String,
    pub(crate) size_bytes: u64,
}

/// A private apt for some suites of one mirror.
pub(crate) struct Apt<'a> {
    directory: PathBuf,
    lock: &'a Lock,
}

impl<'a> Apt<'a> {
    /// Writes the configuration into `directory` and fetches the lists of packages.
    pub(crate) fn open(directory: &Path, mirror: &str, suites: &[String], lock: &'a Lock) -> Result<Self, SetupError> {
        for part in ["lists/partial", "archives/partial", "empty/partial"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(at(path))?;
        }
        let acquire = output_of(Command::new("apt-config").arg("dump"))?;
        let files = [
            ("sources.list", sources_list(mirror, suites)),
            ("apt.conf", configuration(directory, &acquire)),
            ("status", String::new()),
        ];
        for (name, text) in files {
            let path = directory.join(name);
            fs::write(&path, text).map_err(at(path))?;
        }
        let apt = Self { directory: directory.to_owned(), lock };
        apt.run_with_progress(apt.command("apt-get").arg("update"), "lists of packages")?;
        Ok(apt)
    }

    /// The package that a package without content of its own stands for: the first of its dependencies.
    pub(crate) fn dependency_of(&self, name: &str) -> Result<String, SetupError> {
        let text = output_of(self.command("apt-cache").args(["show", "--no-all-versions", name]))?;
        first_dependency(&text)
            .ok_or_else(|| SetupError::Incomplete { what: format!("package {name}"), root: self.directory.clone() })
    }

    /// All package files of a selection, whether fetched already or not.
    pub(crate) fn plan(&self, selection: &Selection) -> Result<Vec<Package>, SetupError> {
        // apt leaves out what it has already, so it is asked with a cache that has nothing.
        let mut command = self.select(selection, "empty");
        Ok(output_of(command.arg("--print-uris"))?.lines().filter_map(parse_print_uris).collect())
    }

    /// Fetches a selection's package files into the cache; what was interrupted is continued.
    pub(crate) fn fetch(&self, selection: &Selection, megabytes: &str) -> Result<(), SetupError> {
        let mut command = self.select(selection, "archives");
        if matches!(selection, Selection::WithDependencies { .. }) {
            command.arg("--download-only");
        }
        self.run_with_progress(&mut command, megabytes)
    }

    /// Where [`Apt::fetch`] left a package file.
    pub(crate) fn path_of(&self, package: &Package) -> PathBuf {
        self.directory.join("archives").join(&package.file_name)
    }

    fn select(&self, selection: &Selection, cache: &str) -> Command {
        let cache = self.directory.join(cache);
        let mut command = self.command("apt-get");
        command.arg("--yes").arg("--option").arg(format!("Dir::Cache::archives={}/", cache.display()));
        match selection {
            Selection::WithDependencies { target, packages } => {
                command.args(["install", "--target-release", target]).args(packages)
            }
            // `download` leaves the package in the current directory.
            Selection::Alone(package) => command.current_dir(cache).args(["download", package]),
        };
        command
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf")).env("LC_ALL", "C").arg("-qq");
        command
    }

    /// Runs apt and prints how far it says it is.
    fn run_with_progress(&self, command: &mut Command, what: &str) -> Result<(), SetupError> {
        let log_path = self.directory.join("apt.log");
        let log = File::create(&log_path).map_err(at(&log_path))?;
        command
            .args(["--option", "APT::Status-Fd=1"])
            .stdin(self.lock.as_input().map_err(at(&log_path))?)
            .stdout(Stdio::piped())
            .stderr(log);
        let mut child = command.spawn().map_err(|source| SetupError::Start { program: name_of(command), source })?;
        let mut other = String::new();
        if let Some(stdout) = child.stdout.take() {
            let mut last = Instant::now();
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                match parse_status(&line) {
                    Some(percent) if last.elapsed() >= PROGRESS_INTERVAL => {
                        last = Instant::now();
                        eprintln!("setup:   {percent} % of {what}");
                    }
                    Some(_) => {}
                    None => other = other + &line + "\n",
                }
            }
        }
        let status = child.wait().map_err(at(&log_path))?;
        if status.success() {
            return Ok(());
        }
        let output = other + &fs::read_to_string(&log_path).map_err(at(&log_path))?;
        Err(SetupError::Failed { program: line_of(command), status, output: output.trim_end().into() })
    }
}

fn sources_list(mirror: &str, suites: &[String]) -> String {
    let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).exists()).unwrap_or(KEYRINGS[0]);
    suites.iter().fold(String::new(), |mut list, suite| {
        let _infallible = writeln!(list, "deb [signed-by={keyring}] {mirror} {suite} main");
        list
    })
}

/// The whole configuration (apt.conf(5)); the machine's own files are not read.
fn configuration(directory: &Path, machine: &str) -> String {
    let directory = directory.display();
    let mut text = format!(
        r#"Dir::State "{directory}";
Dir::State::lists "{directory}/lists";
Dir::State::status "{directory}/status";
Dir::State::extended_states "{directory}/extended_states";
Dir::Cache "{directory}";
Dir::Cache::archives "{directory}/archives";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "{directory}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "{directory}";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
"#
    );
    // What is to be fetched is decided here; how it is fetched is the machine's business.
    for line in machine.lines() {
        let ours = ["Acquire::IndexTargets", "Acquire::Languages"].iter().any(|prefix| line.starts_with(prefix));
        if line.starts_with("Acquire::") && !ours {
            text.push_str(line);
            text.push('\n');
        }
    }
    text.push_str(
        r#"Acquire::Languages "none";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
APT::Get::AllowUnauthenticated "false";
"#,
    );
    text
}

/// A line of `apt-get --print-uris`: `'URI' FILE SIZE HASH`.
fn parse_print_uris(line: &str) -> Option<Package> {
    let (_, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    let mut words = rest.split(' ');
    Some(Package { file_name: words.next()?.into(), size_bytes: words.next()?.parse().ok()? })
}

/// Percentage in a line of `APT::Status-Fd`: `dlstatus:FILES:PERCENT:TEXT`.
fn parse_status(line: &str) -> Option<&str> {
    let percent = line.strip_prefix("dlstatus:")?.split(':').nth(1)?;
    percent.split('.').next()
}

/// First package of the `Depends` field in what `apt-cache show` prints.
fn first_dependency(text: &str) -> Option<String> {
    let depends = text.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    depends.split([' ', ',', '|']).next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_files_are_listed_with_their_sizes() {
        let line = "'http://a.example/pool/q_1%3a2.deb' q_1%3a2_amd64.deb 1995168 MD5Sum:0123";
        assert_eq!(
            parse_print_uris(line),
            Some(Package { file_name: "q_1%3a2_amd64.deb".into(), size_bytes: 1_995_168 })
        );
        assert_eq!(parse_print_uris("Reading package lists..."), None);
    }

    #[test]
    fn progress_is_read_and_other_lines_are_not() {
        assert_eq!(parse_status("dlstatus:1:20.5000:Retrieving file 3 of 91 (2s remaining)"), Some("20"));
        assert_eq!(parse_status("E: something else"), None);
    }

    #[test]
    fn a_kernel_meta_package_names_its_kernel() {
        let text = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.12.1-cloud-amd64 (= 6.12.1-1)\n\n";
        assert_eq!(first_dependency(text).unwrap(), "linux-image-6.12.1-cloud-amd64");
        assert_eq!(first_dependency("Package: x\n"), None);
    }

    #[test]
    fn the_machine_decides_how_to_fetch_but_not_what_to_trust() {
        let machine = "Acquire::http::Proxy \"http://proxy.example\";\n\
                       Acquire::IndexTargets::deb::DEP-11 \"\";\n\
                       Acquire::AllowInsecureRepositories \"1\";\n\
                       APT::Get::AllowUnauthenticated \"1\";\n";
        let text = configuration(Path::new("/c"), machine);
        assert!(text.contains("Proxy \"http://proxy.example\";\n"));
        assert!(!text.contains("DEP-11"));
        // The last setting of a name counts.
        for name in ["Acquire::AllowInsecureRepositories", "APT::Get::AllowUnauthenticated"] {
            let last = text.lines().rfind(|line| line.starts_with(name)).unwrap();
            assert_eq!(last, format!("{name} \"false\";"));
        }
    }
}
