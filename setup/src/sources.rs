//! Reads the machine's own apt sources, in both of their formats, to learn which mirror of the Debian
//! archive it uses (sources.list(5): one-line style and deb822 style).
//!
//! Which entry is chosen decides only where packages are asked for. Whether they are Debian's is for
//! apt to check against Debian's keyring, so a wrong choice fails and harms nobody.

/// One line or one (suite, URI) pair of a stanza, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) uri: String,
    pub(crate) suite: String,
    pub(crate) components: Vec<String>,
    /// Names of keyrings in the entry's `signed-by` option, empty without one.
    pub(crate) signed_by: String,
}

/// Entries of a file in one-line style (`*.list`). Lines that do not parse are passed over, as the
/// machine's own apt has complained about them already.
pub(crate) fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut signed_by = String::new();
    if let Some(bracketed) = rest.strip_prefix('[') {
        let (options, after) = bracketed.split_once(']')?;
        signed_by =
            options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).unwrap_or("").into();
        rest = after.trim_start();
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source { uri: words.next()?, suite: words.next()?, components: words.collect(), signed_by })
}

/// Entries of a file in deb822 style (`*.sources`).
pub(crate) fn parse_deb822(text: &str) -> Vec<Source> {
    // A stanza ends at an empty line; a comment line does not end it.
    let text: String =
        text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line.trim_end(), "\n"]).collect();
    text.split("\n\n").flat_map(parse_stanza).collect()
}

fn parse_stanza(stanza: &str) -> Vec<Source> {
    let enabled = !matches!(field(stanza, "Enabled").as_str(), "no" | "false" | "without" | "off" | "disable");
    if !enabled || !field(stanza, "Types").split_whitespace().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let components: Vec<String> = field(stanza, "Components").split_whitespace().map(str::to_owned).collect();
    let (suites, signed_by) = (field(stanza, "Suites"), field(stanza, "Signed-By"));
    let uris = field(stanza, "URIs");
    let pairs = uris.split_whitespace().flat_map(|uri| suites.split_whitespace().map(move |suite| (uri, suite)));
    pairs
        .map(|(uri, suite)| Source {
            uri: uri.into(),
            suite: suite.into(),
            components: components.clone(),
            signed_by: signed_by.clone(),
        })
        .collect()
}

/// A field's value with its continuation lines, or nothing. Field names compare without case.
fn field(stanza: &str, name: &str) -> String {
    let mut value = String::new();
    let mut inside = false;
    for line in stanza.lines() {
        if line.starts_with([' ', '\t']) {
            if inside {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((key, first)) = line.split_once(':') {
            inside = key.eq_ignore_ascii_case(name);
            if inside {
                value = first.trim().into();
            }
        }
    }
    value
}

/// The address from which this machine gets its own release of Debian.
///
/// Security updates, backports and other people's archives have suites of other names or other keys.
/// If several entries remain, one that names Debian's keyring is best, then one whose path says `debian`.
pub(crate) fn debian_mirror(sources: &[Source], codename: &str) -> Option<String> {
    let own = sources
        .iter()
        .filter(|source| source.suite == codename && source.components.iter().any(|component| component == "main"));
    // `max_by_key` takes the last of equals, and the first entry is the one a person thinks of.
    let best = own.rev().max_by_key(|source| {
        (source.signed_by.contains("debian-archive"), source.uri.trim_end_matches('/').ends_with("debian"))
    });
    best.map(|source| source.uri.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "\
# comment before
Types: deb deb-src
# a comment inside
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
";

    #[test]
    fn deb822_stanzas_are_read() {
        let sources = parse_deb822(STANZAS);
        assert_eq!(sources.len(), 3);
        assert_eq!(sources[1].suite, "bookworm-updates");
        assert_eq!(sources[1].components, ["main", "contrib"]);
        assert_eq!(debian_mirror(&sources, "bookworm").unwrap(), "http://mirror.example/debian");
    }

    #[test]
    fn deb822_values_continue_on_the_next_line_and_names_have_no_case() {
        let sources = parse_deb822(
            "types: deb\nuris:\n http://a.example/debian\n http://b.example/debian\nsuites: trixie\ncomponents: main\n",
        );
        let uris: Vec<_> = sources.iter().map(|source| source.uri.as_str()).collect();
        assert_eq!(uris, ["http://a.example/debian", "http://b.example/debian"]);
    }

    #[test]
    fn a_key_written_into_the_stanza_does_not_confuse() {
        let sources = parse_deb822(
            "Types: deb\nURIs: http://a.example/debian\nSuites: trixie\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n Suites: sid\n",
        );
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].suite, "trixie");
    }

    #[test]
    fn disabled_stanzas_and_source_packages_are_passed_over() {
        assert_eq!(parse_deb822(&format!("Enabled: no\n{STANZAS}")).len(), 1);
        assert_eq!(
            parse_deb822("Types: deb-src\nURIs: http://a.example/debian\nSuites: trixie\nComponents: main\n"),
            []
        );
        assert_eq!(
            parse_list("deb-src http://a.example/debian trixie main\n# deb http://b.example trixie main\n\n"),
            []
        );
    }

    #[test]
    fn one_line_entries_are_read() {
        let sources = parse_list(
            "deb [arch=amd64 signed-by=/k/debian-archive-keyring.gpg] http://a.example/debian/ bookworm main # ours\n\
             deb http://security.example/debian-security bookworm-security main\n\
             deb\thttp://b.example/debian bookworm main contrib\n",
        );
        assert_eq!(sources.len(), 3);
        assert_eq!(sources[0].signed_by, "/k/debian-archive-keyring.gpg");
        assert_eq!(debian_mirror(&sources, "bookworm").unwrap(), "http://a.example/debian/");
        assert_eq!(debian_mirror(&sources, "trixie"), None);
    }

    #[test]
    fn the_archive_of_others_is_not_chosen() {
        let sources = parse_list(
            "deb http://other.example/linux bookworm main\n\
             deb http://docker.example/linux/debian bookworm stable\n\
             deb http://first.example/debian bookworm main\n\
             deb http://second.example/debian bookworm main\n",
        );
        assert_eq!(debian_mirror(&sources, "bookworm").unwrap(), "http://first.example/debian");
    }
}
