//! Setup, the address book: which Debian mirror this host's own apt uses.
//!
//! In: the host's apt sources. Out: one URI. No host name of a mirror may stand in this project: whoever runs it
//! has already said where packages come from, and only that place may be reachable.

use anyhow::{Context, Result};
use std::{fs, path::Path};

/// Overrides what is found in the apt sources.
pub const MIRROR_VARIABLE: &str = "VMGMT_DEBIAN_MIRROR";

/// The archive URI of Debian's `main` on this host, from `VMGMT_DEBIAN_MIRROR` or the apt sources below `etc_apt`.
pub fn debian_mirror(etc_apt: &Path) -> Result<String> {
    if let Ok(chosen) = std::env::var(MIRROR_VARIABLE) {
        return Ok(chosen);
    }
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc_apt.join("sources.list.d")) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    files
        .iter()
        .filter_map(|file| {
            let text = fs::read_to_string(file).ok()?;
            let lines = match file.extension()?.to_str()? {
                "list" => one_line_sources(&text),
                "sources" => stanza_sources(&text),
                _ => return None,
            };
            lines.into_iter().find(is_debian_archive).map(|source| source.uri)
        })
        .next()
        .with_context(|| {
            format!(
                "no Debian archive found in the apt sources below {}: set {MIRROR_VARIABLE} to the URI of one",
                etc_apt.display()
            )
        })
}

/// One archive as apt knows it.
struct Source {
    uri: String,
    suite: String,
    components: Vec<String>,
}

/// Whether this is the archive with Debian's releases itself: not security, not another vendor's packages.
fn is_debian_archive(source: &Source) -> bool {
    let release = source.suite.split('/').next().unwrap_or_default();
    let extra = ["-security", "-updates", "-backports"]
        .iter()
        .any(|suffix| release.ends_with(suffix));
    let path = source.uri.trim_end_matches('/');
    // Cloud images name a file with mirrors: `mirror+file:///etc/apt/mirrors/debian.list`.
    let named = path.ends_with("debian") || path.ends_with("debian.list");
    !extra && named && source.components.iter().any(|component| component == "main")
}

/// `deb [options] URI SUITE COMPONENT…`, one a line (sources.list(5)).
fn one_line_sources(text: &str) -> Vec<Source> {
    let parse = |line: &str| {
        let mut rest = line
            .trim()
            .strip_prefix("deb")?
            .trim_start_matches(|c: char| c != ' ' && c != '\t');
        rest = rest.trim_start();
        if let Some(options) = rest.strip_prefix('[') {
            rest = options.split_once(']')?.1;
        }
        let mut words = rest.split_whitespace().map(str::to_owned);
        Some(Source {
            uri: words.next()?,
            suite: words.next()?,
            components: words.collect(),
        })
    };
    text.lines()
        .filter(|line| !line.trim_start().starts_with("deb-src"))
        .filter_map(parse)
        .collect()
}

/// `URIs:`, `Suites:`, `Components:` in stanzas parted by empty lines (deb822 style, sources.list(5)).
fn stanza_sources(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| -> Vec<String> {
            let mut words = Vec::new();
            let mut inside = false;
            for line in stanza.lines().filter(|line| !line.starts_with('#')) {
                match line.split_once(':') {
                    Some((key, value)) if !line.starts_with([' ', '\t']) => {
                        inside = key.eq_ignore_ascii_case(name);
                        if inside {
                            words.extend(value.split_whitespace().map(str::to_owned));
                        }
                    }
                    _ if inside => words.extend(line.split_whitespace().map(str::to_owned)),
                    _ => {}
                }
            }
            words
        };
        let enabled = !field("Enabled").iter().any(|word| word == "no");
        let binary = field("Types").iter().any(|word| word == "deb");
        for uri in field("URIs").iter().filter(|_| enabled && binary) {
            for suite in field("Suites") {
                sources.push(Source {
                    uri: uri.clone(),
                    suite,
                    components: field("Components"),
                });
            }
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror_of(name: &str, text: &str) -> Result<String> {
        let folder = tempfile::tempdir()?;
        fs::create_dir(folder.path().join("sources.list.d"))?;
        fs::write(folder.path().join(name), text)?;
        debian_mirror(folder.path())
    }

    #[test]
    fn stanzas_are_read() {
        let text = "Types: deb\nURIs: http://a.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\n# a remark\nURIs: http://a.example/debian\nSuites: bookworm\n bookworm-updates\nComponents: main\n";
        assert_eq!(
            mirror_of("sources.list.d/debian.sources", text).unwrap(),
            "http://a.example/debian"
        );
    }

    #[test]
    fn one_line_sources_are_read() {
        let text = "deb https://other.example/tools stable main\ndeb-src http://b.example/debian bookworm main\n\
                    deb [signed-by=/x arch=amd64] http://c.example/pub/debian/ bookworm main contrib\n";
        assert_eq!(
            mirror_of("sources.list", text).unwrap(),
            "http://c.example/pub/debian/"
        );
    }

    #[test]
    fn no_archive_is_an_error_that_says_what_to_do() {
        let error = mirror_of("sources.list", "deb https://other.example/tools stable main\n").unwrap_err();
        assert!(error.to_string().contains(MIRROR_VARIABLE), "{error}");
    }
}
