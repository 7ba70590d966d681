//! Walks a parsed file by its declarations and collects what is wrong with it, rather than stopping at the first.
//!
//! Every read gives `None` for what is absent or wrong; what is wrong, or absent and required, has then been reported.

use std::{borrow::Cow, cell::RefCell, collections::BTreeSet, ops::Range, path::PathBuf, time::Duration};

use jiff::Timestamp;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    ROOT, Secret, home_of,
    names::Names,
    outside::Outside,
    problem::{Hidden, Place, Problem, Severity, Source},
    secret,
    shape::{Key, Kind, Presence, Table, nearest},
    units,
};

pub(crate) type Span = Range<usize>;

/// What was found wrong so far, and what there is to read from.
pub(crate) struct Report<'a> {
    pub source: Source<'a>,
    pub outside: Outside,
    /// The names that other sections refer to.
    pub names: Names,
    errors: RefCell<Vec<Found>>,
    warnings: RefCell<Vec<Found>>,
    hidden: RefCell<Vec<Span>>,
    /// Lines with syntax errors. Where there is one, what follows from something being absent is not reported: it may
    /// well stand in the part that could not be read.
    broken_lines: BTreeSet<usize>,
}

struct Found {
    severity: Severity,
    span: Span,
    message: String,
    help: Option<String>,
    show_line: bool,
}

impl<'a> Report<'a> {
    /// More errors than this nobody reads; a file that is no configuration could make one of each of its lines.
    const MOST: usize = 1000;

    pub(crate) fn new(source: Source<'a>, outside: Outside) -> Self {
        Self {
            source,
            outside,
            names: Names::default(),
            errors: RefCell::default(),
            warnings: RefCell::default(),
            hidden: RefCell::default(),
            broken_lines: BTreeSet::new(),
        }
    }

    /// Reports the first syntax error of a line: later ones are mostly about what the first one left over.
    pub(crate) fn syntax_error(&mut self, span: Span, (message, help): (String, Option<String>), show_line: bool) {
        if self.broken_lines.contains(&self.source.line(span.start)) {
            return;
        }
        self.break_line(self.source.line(span.start));
        self.record(Severity::Error, Found { severity: Severity::Error, span, message, help, show_line });
    }

    /// Nothing more is reported on this line.
    pub(crate) fn break_line(&mut self, line: usize) {
        self.broken_lines.insert(line);
    }

    pub(crate) fn error(&self, span: Span, message: impl Into<String>, help: impl Into<Option<String>>) {
        self.push(Severity::Error, span, message.into(), help.into());
    }

    pub(crate) fn warning(&self, span: Span, message: impl Into<String>, help: impl Into<Option<String>>) {
        self.push(Severity::Warning, span, message.into(), help.into());
    }

    /// An error that something is not there.
    pub(crate) fn absent(&self, span: Span, message: impl Into<String>, help: impl Into<Option<String>>) {
        if self.broken_lines.is_empty() {
            self.error(span, message, help);
        }
    }

    /// A warning that something is not there.
    pub(crate) fn absent_warning(&self, span: Span, message: impl Into<String>, help: impl Into<Option<String>>) {
        if self.broken_lines.is_empty() {
            self.warning(span, message, help);
        }
    }

    fn push(&self, severity: Severity, span: Span, message: String, help: Option<String>) {
        // A line that is no TOML is reported as that, once.
        if !self.broken_lines.contains(&self.source.line(span.start)) {
            self.record(severity, Found { severity, span, message, help, show_line: true });
        }
    }

    fn record(&self, severity: Severity, found: Found) {
        let mut list = match severity {
            Severity::Error => self.errors.borrow_mut(),
            Severity::Warning => self.warnings.borrow_mut(),
        };
        if list.len() < Self::MOST {
            list.push(found);
        }
    }

    /// Never shows this part of the file.
    pub(crate) fn hide(&self, span: Span) {
        self.hidden.borrow_mut().push(span);
    }

    pub(crate) fn place(&self, span: &Span) -> Place {
        self.source.place(span.start)
    }

    /// Everything found, in the order of the file.
    pub(crate) fn into_problems(self) -> Vec<Problem> {
        let mut found = self.errors.into_inner();
        found.append(&mut self.warnings.into_inner());
        found.sort_by_key(|one| one.span.start);
        let hidden = Hidden::new(self.hidden.into_inner());
        found
            .into_iter()
            .map(|one| self.source.problem((one.severity, one.message, one.help), &one.span, one.show_line.then_some(&hidden)))
            .collect()
    }
}

/// Why a text was not taken: what is wrong with it, and what would be right.
pub(crate) struct Wrong {
    pub message: String,
    pub help: Option<String>,
}

impl Wrong {
    pub(crate) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: Some(help.into()) }
    }
}

/// A table of the file that is being read.
pub(crate) struct Section<'a> {
    pub report: &'a Report<'a>,
    /// Its header, or all of an inline table.
    pub span: Span,
    shape: &'static Table,
    values: Cow<'a, DeTable<'a>>,
    asked: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Section<'a> {
    /// Begins to read `values`; keys that are not declared are reported here.
    pub(crate) fn new(report: &'a Report<'a>, shape: &'static Table, values: Cow<'a, DeTable<'a>>, span: Span) -> Self {
        let section = Self { report, span, shape, values, asked: RefCell::default() };
        section.report_unknown_keys();
        section
    }

    /// A declared key's value, or its default. Required keys that are absent are reported.
    pub(crate) fn value(&self, name: &'static str) -> Option<Value<'a>> {
        let key = self.shape.key(name).unwrap_or_else(|| panic!("{}.{name} is read but not declared", self.shape.title));
        self.asked.borrow_mut().insert(name);
        if let Some((_, value)) = self.entry(name) {
            return Some(Value { report: self.report, key, kind: &key.kind, span: value.span(), toml: value });
        }
        match key.presence {
            Presence::Optional | Presence::Later => None,
            Presence::Required => {
                let help = format!("{} For example: {name} = {}", key.doc, key.example);
                self.report.absent(self.span.clone(), format!("{} has no `{name}`", self.shape.title), help);
                None
            }
            Presence::Defaulted => {
                let default = DeValue::parse(key.example).expect("a test reads every default");
                let span = self.span.clone();
                Some(Value { report: self.report, key, kind: &key.kind, span, toml: Cow::Owned(default) })
            }
        }
    }

    /// Where the key stands, if it was written.
    pub(crate) fn written(&self, name: &str) -> Option<Span> {
        self.entry(name).map(|(span, _)| span)
    }

    /// Where the key's value stands; the section's header if it was not written.
    pub(crate) fn value_span(&self, name: &str) -> Span {
        self.entry(name).map_or_else(|| self.span.clone(), |(_, value)| value.span())
    }

    fn entry(&self, name: &str) -> Option<(Span, Cow<'a, Spanned<DeValue<'a>>>)> {
        match &self.values {
            Cow::Borrowed(table) => table.get_key_value(name).map(|(key, value)| (key.span(), Cow::Borrowed(value))),
            Cow::Owned(table) => table.get_key_value(name).map(|(key, value)| (key.span(), Cow::Owned(value.clone()))),
        }
    }

    fn report_unknown_keys(&self) {
        for (key, value) in self.values.iter() {
            let name = key.get_ref().as_ref();
            let declared = self.shape.key(name);
            if declared.is_some_and(|key| key.presence != Presence::Later) {
                continue;
            }
            // It may be a password under a misspelt name. A section's header holds none.
            let is_section = value.span().start <= key.span().start;
            if !is_section {
                self.report.hide(value.span());
            }
            let is_root = self.shape.title == ROOT.title;
            let message = match (declared, is_section) {
                (Some(_), _) => format!("`{name}` is not in this version"),
                (None, false) if is_root => format!("`{}` stands in no section", cut(name)),
                (None, true) => format!("there is no section `{}`", cut(name)),
                (None, false) => format!("unknown key `{}` in {}", cut(name), self.shape.title),
            };
            let near = nearest(name, self.shape.current_keys().map(|key| key.name));
            let help = match (declared, near.and_then(|near| self.shape.key(near)), home_of(name)) {
                (None, Some(near), _) => format!("did you mean {}?", near.shown()),
                (None, None, Some(home)) => format!("`{name}` belongs to {home}; {}", self.known_keys()),
                _ => self.known_keys(),
            };
            self.report.error(key.span(), message, help);
        }
    }

    /// Whether nothing at all was written into it.
    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn known_keys(&self) -> String {
        let names: Vec<_> = self.shape.current_keys().map(Key::shown).collect();
        format!("{} has {}", self.shape.title, names.join(", "))
    }
}

impl Drop for Section<'_> {
    /// A key that is declared and never read would be taken from administrators and do nothing.
    fn drop(&mut self) {
        if cfg!(debug_assertions) && !std::thread::panicking() {
            for key in self.shape.current_keys() {
                assert!(self.asked.borrow().contains(key.name), "{}.{} is declared but not read", self.shape.title, key.name);
            }
        }
    }
}

/// A name as it may be repeated in a message.
pub(crate) fn cut(text: &str) -> String {
    const READABLE: usize = 60;
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut shown: String = text.chars().take(READABLE).map(printable).collect();
    if text.chars().count() > READABLE {
        shown.push('…');
    }
    shown
}

/// One value that is being read.
#[derive(Clone)]
pub(crate) struct Value<'a> {
    pub report: &'a Report<'a>,
    /// The key that it stands under.
    pub key: &'static Key,
    /// The key's kind, or that of its elements.
    kind: &'static Kind,
    /// Where it stands; a default stands at its section's header.
    pub span: Span,
    toml: Cow<'a, Spanned<DeValue<'a>>>,
}

impl<'a> Value<'a> {
    pub(crate) fn wrong<T>(&self, wrong: Wrong) -> Option<T> {
        self.report.error(self.span.clone(), wrong.message, wrong.help);
        None
    }

    /// A text by its own grammar.
    pub(crate) fn parse<T>(&self, parser: impl FnOnce(&str) -> Result<T, Wrong>) -> Option<T> {
        debug_assert!(matches!(self.kind, Kind::Text(_)), "{} is declared as something else", self.key.name);
        match parser(self.str()?) {
            Ok(parsed) => Some(parsed),
            Err(wrong) => self.wrong(wrong),
        }
    }

    pub(crate) fn text(&self) -> Option<String> {
        self.parse(|text| Ok(text.to_owned()))
    }

    pub(crate) fn flag(&self) -> Option<bool> {
        debug_assert!(matches!(self.kind, Kind::Flag), "{} is declared as something else", self.key.name);
        self.toml.get_ref().as_bool().or_else(|| self.mismatch())
    }

    /// A whole number within the declared bounds.
    pub(crate) fn count<T: TryFrom<u64>>(&self) -> Option<T> {
        let Kind::Count { least, most } = *self.kind else { unreachable!("{} is declared as something else", self.key.name) };
        let Some(integer) = self.toml.get_ref().as_integer() else { return self.mismatch() };
        u64::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .filter(|count| (least..=most).contains(count))
            .and_then(|count| T::try_from(count).ok())
            .or_else(|| self.out_of_bounds(&integer.to_string(), &least.to_string(), &most.to_string()))
    }

    pub(crate) fn duration(&self) -> Option<Duration> {
        let Kind::Duration { least, most } = *self.kind else { unreachable!("{} is declared as something else", self.key.name) };
        let text = self.str()?;
        let Some(duration) = units::duration(text) else {
            let help = format!("a whole number and a unit: \"500ms\", \"20s\", \"10m\", \"24h\" or \"7d\"; {}", self.example());
            return self.wrong(Wrong::new(format!("\"{}\" is no length of time", cut(text)), help));
        };
        if (u128::from(least)..=u128::from(most)).contains(&duration.as_millis()) {
            return Some(duration);
        }
        self.out_of_bounds(&cut(text), &units::show_duration(least), &units::show_duration(most))
    }

    /// Bytes.
    pub(crate) fn size(&self) -> Option<u64> {
        let Kind::Size { least, most } = *self.kind else { unreachable!("{} is declared as something else", self.key.name) };
        let text = self.str()?;
        let Some(size) = units::size(text) else {
            let help = format!("a whole number and a unit: \"512KiB\", \"5MiB\" or \"1GiB\"; {}", self.example());
            return self.wrong(Wrong::new(format!("\"{}\" is no size", cut(text)), help));
        };
        if (least..=most).contains(&size) {
            return Some(size);
        }
        self.out_of_bounds(&cut(text), &units::show_size(least), &units::show_size(most))
    }

    /// A moment, from a date-time with its offset.
    pub(crate) fn time(&self) -> Option<Timestamp> {
        debug_assert!(matches!(self.kind, Kind::Time), "{} is declared as something else", self.key.name);
        let DeValue::Datetime(written) = self.toml.get_ref() else { return self.mismatch() };
        if written.date.is_none() || written.time.is_none() {
            let missing = if written.date.is_none() { "date" } else { "time of day" };
            let help = "write the date, the time and the offset: 2026-11-21T09:00:00Z";
            return self.wrong(Wrong::new(format!("`{}` has no {missing}", self.key.name), help));
        }
        if written.offset.is_none() {
            let help = format!("write {written}Z if it is UTC, otherwise the offset as in {written}+02:00");
            return self.wrong(Wrong::new(format!("`{}` has no offset from UTC", self.key.name), help));
        }
        let Ok(time) = written.to_string().parse() else {
            let help = "write a date and time as 2026-11-21T09:00:00Z";
            return self.wrong(Wrong::new(format!("`{}` is no point in time that can be counted with", self.key.name), help));
        };
        Some(time)
    }

    /// A path, relative to the configuration's folder. Nothing is opened.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        debug_assert!(matches!(self.kind, Kind::Path), "{} is declared as something else", self.key.name);
        let text = self.str()?;
        if text.is_empty() || text.contains('\0') {
            return self.wrong(Wrong::new(format!("`{}` is no path", self.key.name), self.example()));
        }
        Some(self.report.outside.resolve(text))
    }

    /// A path to a file that is there and can be read.
    pub(crate) fn readable_file(&self) -> Option<PathBuf> {
        const LARGEST: u64 = 4 << 20;
        let path = self.path()?;
        match self.report.outside.read(&path, LARGEST) {
            Ok(contents) if contents.bytes.is_empty() => {
                self.wrong(Wrong::new(format!("{} is empty", path.display()), "put the PEM text into it"))
            }
            Ok(_) => Some(path),
            Err(error) => {
                let help = "relative paths are relative to the folder of this configuration file";
                self.wrong(Wrong::new(format!("{}: {error}", path.display()), help))
            }
        }
    }

    /// One of the declared words, as the choice at the same position.
    pub(crate) fn choice<T: Copy, const N: usize>(&self, choices: [T; N]) -> Option<T> {
        let Kind::Choice(choice) = self.kind else { unreachable!("{} is declared as something else", self.key.name) };
        debug_assert_eq!(choice.words.len(), N, "{} is declared with other words", self.key.name);
        let text = self.str()?;
        if let Some(index) = choice.words.iter().position(|word| word.text == text) {
            return choices.get(index).copied();
        }
        let words = match choice.words {
            [only] => format!("this version has \"{}\"", only.text),
            _ => format!("it is one of {}", choice.listed()),
        };
        if choice.later.contains(&text) {
            return self.wrong(Wrong::new(format!("`{}` \"{text}\" is not in this version", self.key.name), words));
        }
        let help = match nearest(text, choice.words.iter().map(|word| word.text)) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None => words,
        };
        self.wrong(Wrong::new(format!("`{}` cannot be \"{}\"", self.key.name, cut(text)), help))
    }

    /// Every element of a list as `read` has it; None if one of them was wrong.
    pub(crate) fn each<T>(&self, read: impl Fn(&Self) -> Option<T>) -> Option<Vec<T>> {
        let Kind::List(kind) = self.kind else { unreachable!("{} is declared as something else", self.key.name) };
        all(self.elements(kind)?.iter().map(read).collect())
    }

    pub(crate) fn table(&self) -> Option<Section<'a>> {
        let Kind::Table(shape) = self.kind else { unreachable!("{} is declared as something else", self.key.name) };
        self.section(shape)
    }

    /// Every table of a list of tables as `read` has it; None if one of them was wrong.
    pub(crate) fn each_table<T>(&self, read: impl Fn(&Section<'a>) -> Option<T>) -> Option<Vec<T>> {
        let Kind::Tables(shape) = self.kind else { unreachable!("{} is declared as something else", self.key.name) };
        all(self.elements(self.kind)?.iter().map(|element| element.section(shape).as_ref().and_then(&read)).collect())
    }

    fn elements(&self, kind: &'static Kind) -> Option<Vec<Self>> {
        let element = |value: Cow<'a, Spanned<DeValue<'a>>>| Self { kind, span: value.span(), toml: value, ..*self };
        match &self.toml {
            Cow::Borrowed(value) => {
                value.get_ref().as_array().map(|array| array.iter().map(|v| element(Cow::Borrowed(v))).collect())
            }
            Cow::Owned(value) => {
                value.get_ref().as_array().map(|array| array.iter().map(|v| element(Cow::Owned(v.clone()))).collect())
            }
        }
        .or_else(|| self.mismatch())
    }

    /// This value as a table of that shape.
    pub(crate) fn section(&self, shape: &'static Table) -> Option<Section<'a>> {
        let table = match &self.toml {
            Cow::Borrowed(value) => value.get_ref().as_table().map(Cow::Borrowed),
            Cow::Owned(value) => value.get_ref().as_table().cloned().map(Cow::Owned),
        };
        let Some(table) = table else { return self.mismatch() };
        Some(Section::new(self.report, shape, table, self.span.clone()))
    }

    /// A secret: read from its file or its environment variable, or, with a warning, as it stands.
    pub(crate) fn secret(&self) -> Option<Secret> {
        debug_assert!(matches!(self.kind, Kind::Secret), "{} is declared as something else", self.key.name);
        secret::read(self)
    }

    pub(crate) fn toml(&self) -> &DeValue<'a> {
        self.toml.get_ref()
    }

    fn str(&self) -> Option<&str> {
        self.toml.get_ref().as_str().or_else(|| self.mismatch())
    }

    fn example(&self) -> String {
        format!("for example {} = {}", self.key.name, self.key.example)
    }

    fn out_of_bounds<T>(&self, written: &str, least: &str, most: &str) -> Option<T> {
        let help = format!("from {least} to {most}");
        self.wrong(Wrong::new(format!("`{}` cannot be {written}", self.key.name), help))
    }

    /// Reports that the value is of another TOML type.
    pub(crate) fn mismatch<T>(&self) -> Option<T> {
        let written = match self.toml.get_ref() {
            DeValue::String(_) => "a text",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a number with a decimal point",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        let is_element = matches!(self.key.kind, Kind::List(_)) && !matches!(self.kind, Kind::List(_));
        let takes = if is_element { "holds" } else { "is" };
        let message = format!("`{}` {takes} {}, not {written}", self.key.name, self.kind.noun());
        self.report.error(self.span.clone(), message, self.rewritten());
        None
    }

    /// The value as it should have been written, where that can be known.
    fn rewritten(&self) -> Option<String> {
        let written = self.report.source.text.get(self.toml.span())?;
        let name = self.key.name;
        let text = self.toml.get_ref().as_str();
        match (self.kind, self.toml.get_ref()) {
            (Kind::Flag, _) if matches!(text, Some("true" | "false")) => Some(format!("without quotes: {name} = {}", text?)),
            (Kind::Count { .. }, _) if text?.bytes().all(|b| b.is_ascii_digit()) => {
                Some(format!("without quotes: {name} = {}", cut(text?)))
            }
            (Kind::Time, DeValue::String(text)) if text.parse::<Timestamp>().is_ok() => {
                Some(format!("without quotes: {name} = {}", cut(text)))
            }
            (Kind::Duration { .. }, DeValue::Integer(_)) => {
                Some(format!("with its unit, in quotes: {name} = \"{}s\"", cut(written)))
            }
            (Kind::Size { .. }, DeValue::Integer(_)) => Some(format!("with its unit, in quotes: {name} = \"{}B\"", cut(written))),
            (Kind::List(_), DeValue::String(_)) => Some(format!("in square brackets: {name} = [{}]", cut(written))),
            (Kind::Tables(_), DeValue::Table(_)) => Some(format!("write [[{name}]], once for each")),
            (Kind::Table(_), DeValue::Array(_)) => Some(format!("write [{name}], once")),
            _ if self.key.example == "[]" => None,
            _ => Some(self.example()),
        }
    }
}

/// All of them, or None if one is missing.
fn all<T>(values: Vec<Option<T>>) -> Option<Vec<T>> {
    values.into_iter().collect()
}

/// An optional key's value: None outside if it was written and wrong, None inside if it was not written.
#[expect(clippy::option_option, reason = "the two have different meanings here, and only here")]
pub(crate) fn optional<T>(value: Option<Option<T>>) -> Option<Option<T>> {
    match value {
        Some(Some(value)) => Some(Some(value)),
        Some(None) => None,
        None => Some(None),
    }
}
