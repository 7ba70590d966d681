//! One value of the file, read as what its key is declared to be.

use std::{borrow::Cow, path::PathBuf, time::Duration};

use jiff::Timestamp;
use toml::{Spanned, de::DeValue};

use crate::kms::SecretSource;

use super::{
    Secret,
    reader::Section,
    report::{Report, Span, Wrong, cut, may_hold_password},
    secret,
    shape::{Key, Kind, Table, nearest},
    units,
};

/// One value that is being read.
#[derive(Clone)]
pub(crate) struct Value<'a> {
    pub report: &'a Report<'a>,
    /// The key that it stands under.
    pub key: &'static Key,
    /// The key's kind, or that of its elements.
    pub kind: &'static Kind,
    /// Where it stands; a default stands at its section's header.
    pub span: Span,
    pub toml: Cow<'a, Spanned<DeValue<'a>>>,
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

    /// What a file of text says, of at most `limit` bytes.
    pub(crate) fn read_file<T>(&self, limit: u64, parser: impl FnOnce(&str) -> Result<T, Wrong>) -> Option<T> {
        let path = self.path()?;
        let parsed = match self.report.outside.read(&path, limit) {
            Ok(contents) => parser(&String::from_utf8_lossy(&contents.bytes)),
            Err(error) => {
                let help = "relative paths are relative to the folder of this configuration file";
                return self.wrong(Wrong::new(format!("{}: {error}", path.display()), help));
            }
        };
        match parsed {
            Ok(parsed) => Some(parsed),
            Err(wrong) => self.wrong(Wrong { message: format!("{}: {}", path.display(), wrong.message), ..wrong }),
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

    /// Where a secret is that is read anew each time it is needed; that it can be read now is checked.
    pub(crate) fn secret_source(&self) -> Option<SecretSource> {
        self.secret().map(Secret::source)
    }

    /// A URL, and whether it stands in the file itself: if not, nothing of it is to be shown. Of one that does, this shows
    /// nothing either, unless it names a file.
    pub(crate) fn url(&self) -> Option<(Secret, bool)> {
        debug_assert!(matches!(self.kind, Kind::Url(_)), "{} is declared as something else", self.key.name);
        let Some(text) = self.toml.get_ref().as_str() else { return secret::read(self).map(|url| (url, false)) };
        if !text.starts_with("sqlite:") || may_hold_password(text) {
            self.report.hide(self.span.clone());
        }
        Some((Secret::new(text.to_owned()), true))
    }

    /// A file that this value names somewhere within it, relative to the configuration's folder; it is there and can be read.
    pub(crate) fn file_within(&self, name: &str) -> Result<PathBuf, Wrong> {
        const LARGEST: u64 = 4 << 20;
        let path = self.report.outside.resolve(name);
        match self.report.outside.read(&path, LARGEST) {
            Ok(_) => Ok(path),
            Err(error) => {
                let help = "relative paths are relative to the folder of this configuration file";
                Err(Wrong::new(format!("{}: {error}", cut(&path.display().to_string())), help))
            }
        }
    }

    fn str(&self) -> Option<&str> {
        let text = self.toml.get_ref().as_str();
        if text.is_some_and(may_hold_password) {
            self.report.hide(self.span.clone());
        }
        text.or_else(|| self.mismatch())
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
        // What is in it is not read, so it is not known which of it is a secret.
        let holds_more =
            self.toml.get_ref().is_table() || matches!(self.kind, Kind::Table(_) | Kind::Tables(_) | Kind::Secret | Kind::Url(_));
        if holds_more && !self.report.source.begins_line(self.span.start) {
            self.report.hide(self.span.clone());
        }
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
        let without_quotes = |text: &str| Some(format!("without quotes: {name} = {}", cut(text)));
        match (self.kind, self.toml.get_ref()) {
            (Kind::Flag, DeValue::String(text)) if matches!(text.as_ref(), "true" | "false") => without_quotes(text),
            (Kind::Count { .. }, DeValue::String(text)) if text.parse::<u64>().is_ok() => without_quotes(text),
            (Kind::Time, DeValue::String(text)) if text.parse::<Timestamp>().is_ok() => without_quotes(text),
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
