use std::fmt;

use globset::GlobBuilder;

use crate::oci::Repository;

use super::{
    report::{Report, Wrong, cut},
    shape::Grammar,
};

/// Which repositories a rule is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Scope {
    /// A namespace and all below it: `production` holds `production`, `production/app` and `production/team/app`.
    Namespace(String),
    /// A pattern for whole repository names, in globset's syntax with `literal_separator`: `*` and `?` stay within one
    /// segment, `**` crosses them.
    Glob(String),
}

impl Scope {
    /// Whether everything in `other` is surely in this as well; decided by the text alone.
    pub(crate) fn holds(&self, other: &Self) -> bool {
        let is_below = |namespace: &str| other.as_str().strip_prefix(namespace).is_some_and(|rest| rest.starts_with('/'));
        self == other
            || match self {
                Self::Namespace(namespace) => is_below(namespace),
                Self::Glob(pattern) => pattern == "**",
            }
    }

    /// The text as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Namespace(text) | Self::Glob(text) => text,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

pub(crate) static SCOPE: Grammar =
    Grammar { noun: "a namespace or a pattern in quotes", pattern: Some("^[^/A-Z\\s][^A-Z\\s]*$") };
pub(crate) static TAG_PATTERN: Grammar = Grammar { noun: "a tag or a pattern in quotes", pattern: Some("^[^/:@\\s]+$") };

const META: [char; 6] = ['*', '?', '[', ']', '{', '}'];

/// Longer than any repository name; a bound, because patterns are compiled.
const LONGEST: usize = 255;

pub(crate) fn scope(report: &Report<'_>, text: &str) -> Result<Scope, Wrong> {
    const HELP: &str = "write a namespace such as \"team/apps\", or a pattern such as \"team-*/apps/**\"";
    let wrong = |what: &str, help: String| Err(Wrong::new(format!("\"{}\" is no scope: {what}", cut(text)), help));
    if text.is_empty() {
        return wrong("it is empty", format!("{HELP}; \"**\" is all repositories"));
    }
    if text.len() > LONGEST {
        return wrong("it is longer than any repository name", HELP.to_owned());
    }
    let (first, rest) = text.split_once('/').unwrap_or((text, "**"));
    if report.names.registries.contains(first) {
        return wrong("it begins with a registry", format!("write registry = \"{first}\" and scope = \"{}\"", cut(rest)));
    }
    let segments: Vec<_> = text.split('/').filter(|segment| !segment.is_empty()).collect();
    let tidied = segments.join("/").to_ascii_lowercase();
    let write_tidied = format!("write \"{}\"", cut(&tidied));
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return wrong("repository names are lower-case", write_tidied);
    }
    if text.starts_with('/') || text.ends_with('/') {
        return wrong("it begins or ends with a slash", format!("{write_tidied}: a namespace holds all below it"));
    }
    if text.contains("//") {
        return wrong("there is nothing between two slashes", write_tidied);
    }
    if text.contains([':', '@']) {
        return wrong("it holds a port, a tag or a digest", "registries go to `registry`, tags to `tags`".to_owned());
    }
    if !text.contains(META) {
        return match text.parse::<Repository>() {
            Ok(_) => Ok(Scope::Namespace(text.to_owned())),
            Err(_) => wrong(
                "no repository can be named like this",
                "lower-case letters and digits, with single . _ or - between them, and / between segments".to_owned(),
            ),
        };
    }
    let stray = |c: &char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/,!^".contains(*c) || META.contains(c));
    if let Some(stray) = text.chars().find(stray) {
        return wrong(&format!("no repository's name holds {stray:?}"), HELP.to_owned());
    }
    match compile(text) {
        Ok(()) => Ok(Scope::Glob(text.to_owned())),
        Err(reason) => wrong(&reason, HELP.to_owned()),
    }
}

pub(crate) fn tag_pattern(text: &str) -> Result<String, Wrong> {
    const HELP: &str = "write a tag such as \"latest\", or a pattern such as \"v*\"";
    let wrong = |what: &str| Err(Wrong::new(format!("\"{}\" is no pattern for tags: {what}", cut(text)), HELP));
    if text.is_empty() {
        return wrong("it is empty");
    }
    if text.len() > LONGEST {
        return wrong("it is longer than any tag");
    }
    let stray = |c: &char| !(c.is_ascii_alphanumeric() || "._-,!^".contains(*c) || META.contains(c));
    if let Some(stray) = text.chars().find(stray) {
        return wrong(&format!("no tag holds {stray:?}"));
    }
    match compile(text) {
        Ok(()) => Ok(text.to_owned()),
        Err(reason) => wrong(&reason),
    }
}

/// Whether globset takes it, as the rules will use it.
fn compile(text: &str) -> Result<(), String> {
    GlobBuilder::new(text).literal_separator(true).build().map(drop).map_err(|error| error.kind().to_string())
}
