//! Names that sections give and other sections refer to.

use std::collections::{HashMap, HashSet};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::oci::RegistryName;

use super::{
    report::{Report, Span, Wrong, cut},
    shape::nearest,
    value::Value,
};

/// Every name in the file, gathered before the sections are read, so that a mistake elsewhere in a section does not make
/// every reference to it another mistake.
#[derive(Default)]
pub(crate) struct Names {
    pub registries: Given,
    pub sources: Given,
    pub witnesses: Given,
    pub rules: Given,
    pub policies: Given,
    /// The registries that sources are for.
    sources_for: HashSet<String>,
}

impl Names {
    pub(crate) fn gather(document: &DeTable<'_>) -> Self {
        let as_written = |name: &str| Some(name.to_owned());
        let canonical = |name: &str| name.parse().ok().map(|name: RegistryName| name.to_string());
        let sources_for =
            tables(document, "source").filter_map(|source| canonical(source.get_ref().get("registry")?.get_ref().as_str()?));
        Self {
            sources_for: sources_for.collect(),
            registries: Given::gather(document, "registry", canonical),
            sources: Given::gather(document, "source", as_written),
            witnesses: Given::gather(document, "witness", as_written),
            rules: Given::gather(document, "rule", as_written),
            policies: Given::gather(document, "policy", as_written),
        }
    }

    /// As if these witnesses stood in the file.
    pub(crate) fn of_witnesses(names: &[&str]) -> Self {
        let names = names.iter().map(|&name| (name.to_owned(), 0..0)).collect();
        Self { witnesses: Given { section: "witness", names, some_missing: false }, ..Self::default() }
    }

    pub(crate) fn has_source_for(&self, registry: &RegistryName) -> bool {
        self.sources_for.contains(registry.as_str())
    }
}

/// The tables of a list of tables, as far as it is one.
fn tables<'a>(document: &'a DeTable<'_>, section: &str) -> impl Iterator<Item = &'a Spanned<DeValue<'a>>> {
    document.get(section).and_then(|value| value.get_ref().as_array()).into_iter().flatten()
}

/// The names that the sections of one kind have.
#[derive(Default)]
pub(crate) struct Given {
    section: &'static str,
    names: Vec<(String, Span)>,
    /// A section has no name that could be read.
    some_missing: bool,
}

impl Given {
    fn gather(document: &DeTable<'_>, section: &'static str, canonical: impl Fn(&str) -> Option<String>) -> Self {
        let mut given = Self { section, ..Self::default() };
        for element in tables(document, section) {
            let name = element.get_ref().get("name");
            match name.and_then(|name| name.get_ref().as_str()).and_then(&canonical) {
                Some(text) => given.names.push((text, name.map_or_else(|| element.span(), Spanned::span))),
                None => given.some_missing = true,
            }
        }
        given
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.names.is_empty() && !self.some_missing
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.names.iter().any(|(given, _)| given == name)
    }

    pub(crate) fn span(&self, name: &str) -> Span {
        self.names.iter().find(|(given, _)| given == name).map_or(0..0, |(_, span)| span.clone())
    }

    /// Reports names that are given more than once, at each but the first.
    pub(crate) fn report_repeated(&self, report: &Report<'_>) {
        let mut first = HashMap::new();
        for (name, span) in &self.names {
            if let Some(earlier) = first.get(name.as_str()) {
                let message = format!("two [[{}]] are named \"{}\"", self.section, cut(name));
                report.error(
                    span.clone(),
                    message,
                    format!("names are unique; the first is on line {}", report.source.line(*earlier)),
                );
            } else {
                first.insert(name.as_str(), span.start);
            }
        }
    }

    /// Reports `name`, which `value` refers to, if nothing has it.
    pub(crate) fn check(&self, value: &Value<'_>, name: &str) {
        if self.some_missing || self.contains(name) {
            return;
        }
        let message = format!("no [[{}]] is named \"{}\"", self.section, cut(name));
        let names = || self.names.iter().map(|(name, _)| name.as_str());
        let help = match nearest(name, names()) {
            _ if self.names.is_empty() => format!("there is none: add a [[{}]]", self.section),
            Some(near) => format!("did you mean \"{near}\"?"),
            None => {
                const READABLE: usize = 10;
                let mut listed: Vec<_> = names().take(READABLE).map(|name| format!("\"{}\"", cut(name))).collect();
                if self.names.len() > READABLE {
                    listed.push("…".to_owned());
                }
                format!("there is {}", listed.join(", "))
            }
        };
        value.report.absent(value.span.clone(), message, help);
    }
}

/// A section's name: part of paths, metric labels and messages.
pub(crate) fn plain(text: &str) -> Result<String, Wrong> {
    const LONGEST: usize = 63;
    let is_plain = text.len() <= LONGEST
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if is_plain {
        return Ok(text.to_owned());
    }
    let help = "1 to 63 letters, digits, - _ or . and a letter or digit first";
    Err(Wrong::new(format!("\"{}\" cannot be a name here", cut(text)), help))
}

/// The grammar of [`plain`].
pub(crate) static PLAIN: super::shape::Grammar =
    super::shape::Grammar { noun: "a name in quotes", pattern: Some("^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$") };
