//! What the TOML parser finds in text that is no TOML, in words for an administrator.

use std::{borrow::Cow, collections::BTreeSet};

use toml::de::{DeTable, Error};

use super::{
    ROOT,
    report::Report,
    shape::{Kind, Table},
};

/// Reports what is no TOML, and returns the text without the lines after which the parser would give up: as long as it was,
/// with everything else where it was.
pub(crate) fn readable<'a>(text: &'a str, report: &mut Report<'_>) -> Cow<'a, str> {
    let (_, errors) = DeTable::parse_recoverable(text);
    let mut readable = Cow::Borrowed(text);
    for line in report_all(report, &errors) {
        let (start, line) = report.source.line_text(line);
        let blank = " ".repeat(line.len());
        readable.to_mut().replace_range(start..start + line.len(), &blank);
    }
    readable
}

/// What can be read of a text that [`readable`] has been through. Reports what the parser had not come to before.
pub(crate) fn document<'a>(readable: &'a str, report: &mut Report<'_>) -> DeTable<'a> {
    let (document, errors) = DeTable::parse_recoverable(readable);
    report_all(report, &errors);
    document.into_inner()
}

/// Reports the parser's errors, and returns the lines that it gives up after.
fn report_all(report: &mut Report<'_>, errors: &[Error]) -> BTreeSet<usize> {
    let mut given_up = BTreeSet::new();
    let mut something_is_open = false;
    for error in errors {
        let end = report.source.text.len();
        let span = error.span().unwrap_or(end..end);
        let line = report.source.line(span.start);
        let (_, text) = report.source.line_text(line);
        let fault = Fault::of(error.message(), text);
        // In a list or table that has no end, every further line is an error.
        if something_is_open && fault == Fault::Open {
            report.break_line(line);
            continue;
        }
        something_is_open |= fault == Fault::Open;
        if matches!(fault, Fault::NoValue | Fault::NoKey) && !text.trim_start().starts_with('[') {
            given_up.insert(line);
        }
        report.syntax_error(span, fault.explain(error.message(), text), may_be_shown(text));
    }
    given_up
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    RepeatedKey,
    RepeatedSection,
    NoValue,
    BadValue,
    EndlessText,
    /// A list or table that has no end, or lacks a comma.
    Open,
    OpenHeader,
    Leftover,
    Escape,
    NoKey,
    TooDeep,
    BadTime,
    Other,
}

impl Fault {
    /// By the words of the parser. What is not recognised is passed on as the parser has it.
    fn of(message: &str, line: &str) -> Self {
        let is_header = line.trim_start().starts_with('[');
        let what = message.split(", expected").next().unwrap_or_default();
        match what {
            "duplicate key" if is_header => Self::RepeatedSection,
            "duplicate key" => Self::RepeatedKey,
            "key with no value" | "missing value for key" | "missing value" => Self::NoValue,
            "string values must be quoted"
            | "missing opening quote"
            | "invalid value"
            | "unexpected leading zero"
            | "invalid boolean"
            | "invalid float"
            | "invalid integer"
            | "invalid number"
            | "invalid datetime" => Self::BadValue,
            "unclosed table" | "unclosed array table" => Self::OpenHeader,
            "unclosed inline table"
            | "unclosed array"
            | "missing key for inline table element"
            | "missing comma between array elements"
            | "missing comma between key-value pairs" => Self::Open,
            "unexpected key or value" | "unexpected content" => Self::Leftover,
            "missing escaped value" => Self::Escape,
            "invalid key-value pair" | "invalid unquoted key" | "unquoted keys cannot be empty" => Self::NoKey,
            "cannot recurse further; max recursion depth met" => Self::TooDeep,
            "invalid date" | "invalid time" | "invalid time offset" => Self::BadTime,
            _ if what.ends_with("string") && message.contains("expected") => Self::EndlessText,
            _ => Self::Other,
        }
    }

    fn explain(self, message: &str, line: &str) -> (String, Option<String>) {
        let (what, help) = match self {
            Self::RepeatedKey => ("this key is written twice", "keep one of them"),
            Self::RepeatedSection => (
                "this section begins twice",
                "put all of it in one place; only lists begin again, each time with two brackets, as [[rule]] does",
            ),
            Self::NoValue => ("a key has no value", "write name = value"),
            Self::BadValue => return ("this is no value".to_owned(), Some(quoted(line))),
            Self::EndlessText => (
                "a text does not end",
                "it begins and ends with a quote on the same line; one of several lines with three of them",
            ),
            Self::Open => (
                "a comma is missing, or a list or table that began before this has no end",
                "lists end with ], tables with }, and commas stand between what is in them",
            ),
            Self::OpenHeader => ("a section's header has no end", "write [server], or [[rule]] for what there can be several of"),
            Self::Leftover => ("something stands behind the value", "begin a new line for each key"),
            Self::Escape => (
                "a backslash in double quotes begins an escape, and this is none",
                "write two backslashes, or the text in single quotes",
            ),
            Self::NoKey => ("this is no line of TOML", "a line is [section], name = value, or a comment after #"),
            Self::TooDeep => ("lists and tables stand in each other too deeply", "nothing here is more than four deep"),
            Self::BadTime => return (message.to_owned(), Some("write a date and time as 2026-11-21T09:00:00Z".to_owned())),
            Self::Other => return (format!("not TOML: {message}"), None),
        };
        (what.to_owned(), Some(help.to_owned()))
    }
}

/// How the value of a line was probably meant.
fn quoted(line: &str) -> String {
    const GENERAL: &str = "texts stand in quotes; other values are numbers, dates, true and false";
    let Some((name, value)) = line.split_once('=').filter(|_| may_be_shown(line)) else { return GENERAL.to_owned() };
    let (name, value) = (name.trim(), value.split('#').next().unwrap_or_default().trim());
    match value.to_lowercase().as_str() {
        "true" | "yes" | "on" => format!("write {name} = true"),
        "false" | "no" | "off" => format!("write {name} = false"),
        _ if value.is_empty() || value.contains(['"', '\'', '[', ']', '{', '}', '\\']) => GENERAL.to_owned(),
        _ => format!("texts stand in quotes: {name} = \"{}\"", super::report::cut(value)),
    }
}

/// Whether a line that could not be read surely holds no secret: it begins with a section's header or with a key that is
/// known, and nothing in it looks like a secret. Anything else could be a line of a private key.
fn may_be_shown(line: &str) -> bool {
    const TELLTALE: [&str; 8] = ["pass", "token", "secret", "key", "basic", "hmac", "pwd", "@"];
    let line = line.trim_start().to_lowercase();
    let word = line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next().unwrap_or_default();
    (line.starts_with('[') || has_key(&ROOT, word)) && !TELLTALE.iter().any(|telltale| line.contains(telltale))
}

fn has_key(table: &Table, name: &str) -> bool {
    table
        .current_keys()
        .any(|key| key.name == name || matches!(key.kind, Kind::Table(nested) | Kind::Tables(nested) if has_key(nested, name)))
}
