//! The file's form: text to [`Section`]s that know their lines. What they mean is checked elsewhere.
//!
//! Each section is read by itself, so that a mistake in one does not hide those in the others.

use super::limits::FILE_BYTES_MAX;
use super::{Flags, Mistakes};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

/// A value and where it stands.
#[derive(Debug, Clone, Default)]
pub(super) struct Section<T> {
    pub(super) value: T,
    /// `[[vm]]` in a file, or the flag.
    title: String,
    file: String,
    /// Line of the section's first key, and of each key; empty for flags.
    lines: BTreeMap<String, usize>,
}

impl<T> Section<T> {
    /// Where `key` stands, for a person.
    pub(super) fn place(&self, key: &str) -> String {
        let line = self.lines.get(key).or_else(|| self.lines.values().min());
        match line {
            Some(line) => format!("{}:{line}, {} {key}", self.file, self.title),
            None if self.file.is_empty() => self.title.clone(),
            None => format!("{}, {}", self.file, self.title),
        }
    }

    fn of_flag(title: &str, value: T) -> Self {
        Self {
            value,
            title: title.into(),
            file: String::new(),
            lines: BTreeMap::new(),
        }
    }
}

/// A file's sections.
#[derive(Debug, Default)]
pub(super) struct Sections {
    pub(super) server: Section<ServerSection>,
    pub(super) device: Section<DeviceSection>,
    pub(super) limits: Section<LimitsSection>,
    pub(super) sandbox: Section<SandboxSection>,
    pub(super) shares: Vec<Section<ShareSection>>,
    pub(super) vms: Vec<Section<VmSection>>,
    pub(super) sockets: Vec<Section<SocketSection>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct ServerSection {
    pub(super) control: Option<PathBuf>,
    pub(super) control_mode: Option<String>,
    pub(super) control_group: Option<String>,
    pub(super) log: Option<String>,
    pub(super) poll_us: Option<u64>,
    pub(super) workers: Option<u32>,
    pub(super) drain_deadline_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DeviceSection {
    pub(super) pci_vendor: Option<u16>,
    pub(super) pci_device: Option<u16>,
    pub(super) msix: Option<bool>,
    pub(super) vectors: Option<u8>,
    pub(super) rings: Option<u8>,
    pub(super) devices_max: Option<u32>,
    pub(super) maps_max: Option<u32>,
    pub(super) mapped_bytes_max: Option<Bytes>,
    pub(super) objects_max: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct SandboxSection {
    pub(super) enabled: Option<bool>,
    pub(super) front_user: Option<String>,
    pub(super) core_user: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct LimitsSection {
    pub(super) submissions_per_second_max: Option<u64>,
    pub(super) bytes_per_second_max: Option<Bytes>,
    pub(super) bytes_in_flight_max: Option<Bytes>,
    pub(super) submissions_in_flight_max: Option<u32>,
    pub(super) open_files_max: Option<u32>,
    pub(super) mailbox_bytes_max: Option<Bytes>,
    pub(super) mailbox_seconds_max: Option<u64>,
    pub(super) message_bytes_max: Option<Bytes>,
    pub(super) offers_max: Option<u32>,
    pub(super) receives_max: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct ShareSection {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) bytes_max: Option<Bytes>,
    pub(super) files_max: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct VmSection {
    pub(super) name: String,
    pub(super) socket: PathBuf,
    pub(super) mode: Option<String>,
    pub(super) group: Option<String>,
    #[serde(default)]
    pub(super) shares: Vec<String>,
    #[serde(default)]
    pub(super) reach: Vec<String>,
    #[serde(default)]
    pub(super) send_to_all: bool,
    pub(super) devices_max: Option<u32>,
    #[serde(default)]
    pub(super) limits: LimitsSection,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct SocketSection {
    pub(super) path: PathBuf,
    pub(super) identity: Option<String>,
    pub(super) mode: Option<String>,
    pub(super) group: Option<String>,
    #[serde(default)]
    pub(super) shares: Vec<String>,
    #[serde(default)]
    pub(super) reach: Vec<String>,
    #[serde(default)]
    pub(super) send_to_all: bool,
    pub(super) devices_max: Option<u32>,
    #[serde(default)]
    pub(super) limits: LimitsSection,
}

/// A number of bytes: `4096` or `"4 MiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Value")]
pub(super) struct Bytes(pub(super) u64);

impl TryFrom<toml::Value> for Bytes {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        let bytes = match &value {
            toml::Value::Integer(number) => u64::try_from(*number).ok(),
            toml::Value::String(text) => parse_bytes(text),
            _ => None,
        };
        bytes
            .map(Self)
            .ok_or_else(|| format!("{value} is no number of bytes such as 4096, \"64 KiB\" or \"4 GiB\""))
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Reads a file into its sections; what cannot be read is a mistake, the rest is given.
pub(super) fn read(path: &Path, mistakes: &mut Mistakes) -> Sections {
    let file = path.display().to_string();
    let remedy = "name a readable file: vmgmtd --config FILE (qemu-configs/vmgmtd.toml is an example)";
    let text = match std::fs::metadata(path).map(|metadata| metadata.len()) {
        Ok(bytes) if bytes > FILE_BYTES_MAX => {
            mistakes.push(file, format!("{bytes} bytes are no configuration"), remedy);
            return Sections::default();
        }
        _ => std::fs::read_to_string(path),
    };
    match text {
        Ok(text) => parse(&file, &text, mistakes),
        Err(error) => {
            mistakes.push(file, error.to_string(), remedy);
            Sections::default()
        }
    }
}

/// Reads a file's text into its sections.
pub(super) fn parse(file: &str, text: &str, mistakes: &mut Mistakes) -> Sections {
    let mut sections = Sections::default();
    let table = match DeTable::parse(text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            let line = line_of(text, error.span().map_or(0, |span| span.start));
            let remedy = "the file is TOML: strings in quotes, one `key = value` per line";
            mistakes.push(
                format!("{file}:{line}"),
                error.message().trim().to_owned(),
                remedy,
            );
            return sections;
        }
    };
    let mut reader = Reader { file, text, mistakes };
    for (key, value) in table {
        match key.get_ref().as_ref() {
            "server" => sections.server = reader.one("[server]", value),
            "device" => sections.device = reader.one("[device]", value),
            "limits" => sections.limits = reader.one("[limits]", value),
            "sandbox" => sections.sandbox = reader.one("[sandbox]", value),
            "share" => sections.shares = reader.many("[[share]]", value),
            "vm" => sections.vms = reader.many("[[vm]]", value),
            "socket" => sections.sockets = reader.many("[[socket]]", value),
            other => {
                let line = line_of(text, key.span().start);
                let remedy =
                    "there are [server], [sandbox], [device], [limits], [[share]], [[vm]] and [[socket]]";
                reader
                    .mistakes
                    .push(format!("{file}:{line}"), format!("no section {other:?}"), remedy);
            }
        }
    }
    sections
}

struct Reader<'a> {
    file: &'a str,
    text: &'a str,
    mistakes: &'a mut Mistakes,
}

impl Reader<'_> {
    fn one<T: DeserializeOwned + Default>(&mut self, title: &str, value: Spanned<DeValue<'_>>) -> Section<T> {
        self.section(title, value).unwrap_or_default()
    }

    fn many<T: DeserializeOwned>(&mut self, title: &str, value: Spanned<DeValue<'_>>) -> Vec<Section<T>> {
        let line = line_of(self.text, value.span().start);
        match value.into_inner() {
            DeValue::Array(values) => values
                .into_iter()
                .filter_map(|value| self.section(title, value))
                .collect(),
            _ => {
                let remedy = format!("write {title} with two brackets: there can be several");
                self.mistakes
                    .push(format!("{}:{line}", self.file), "not a list of sections", remedy);
                Vec::new()
            }
        }
    }

    fn section<T: DeserializeOwned>(
        &mut self,
        title: &str,
        value: Spanned<DeValue<'_>>,
    ) -> Option<Section<T>> {
        let start = value.span().start;
        let mut lines = BTreeMap::new();
        if let DeValue::Table(table) = value.get_ref() {
            for key in table.keys() {
                lines.insert(key.get_ref().to_string(), line_of(self.text, key.span().start));
            }
        }
        match T::deserialize(ValueDeserializer::from(value)) {
            Ok(value) => Some(Section {
                value,
                title: title.into(),
                file: self.file.into(),
                lines,
            }),
            Err(error) => {
                let line = line_of(self.text, error.span().map_or(start, |span| span.start));
                let message = error.message().trim().to_owned();
                let remedy = if message.starts_with("unknown field") {
                    "correct its spelling or take it out"
                } else {
                    "see qemu-configs/vmgmtd.toml, where every key is explained"
                };
                self.mistakes
                    .push(format!("{}:{line}, {title}", self.file), message, remedy);
                None
            }
        }
    }
}

/// Line of a byte of the text, from 1.
fn line_of(text: &str, byte: usize) -> usize {
    text.bytes().take(byte).filter(|byte| *byte == b'\n').count() + 1
}

/// Adds what the flags say as sections: shared sockets, and shares that all their VMs are granted.
pub(super) fn add_flags(sections: &mut Sections, flags: &Flags, mistakes: &mut Mistakes) {
    let mut grants = Vec::new();
    for text in &flags.shares {
        let place = format!("--share {text}");
        let Some((name, path)) = text.split_once('=') else {
            mistakes.push(
                place,
                "no NAME=DIR",
                "for example: --share pub=/srv/pub, or --share pub=/srv/pub:ro",
            );
            continue;
        };
        let (path, access) = match path.strip_suffix(":ro") {
            Some(path) => (path, "ro"),
            None => (path.strip_suffix(":rw").unwrap_or(path), "rw"),
        };
        grants.push(format!("{name}:{access}"));
        // A relative directory is meant from where the operator stands; one that is not there is found by the checks.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        let share = ShareSection {
            name: name.into(),
            path,
            ..ShareSection::default()
        };
        sections.shares.push(Section::of_flag(&place, share));
    }
    for path in &flags.sockets {
        let title = format!("--socket {}", path.display());
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let socket = SocketSection {
            path,
            shares: grants.clone(),
            ..SocketSection::default()
        };
        sections.sockets.push(Section::of_flag(&title, socket));
    }
}
