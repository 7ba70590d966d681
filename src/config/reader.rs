//! Walks a parsed file by its declarations and collects what is wrong with it, rather than stopping at the first.
//!
//! Every read gives `None` for what is absent or wrong; what is wrong, or absent and required, has then been reported.

use std::{borrow::Cow, cell::RefCell, collections::BTreeSet};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    ROOT, home_of,
    report::{Report, Span, cut},
    shape::{Key, Presence, Table, nearest},
    value::Value,
};

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

/// An optional key's value: None outside if it was written and wrong, None inside if it was not written.
#[expect(clippy::option_option, reason = "the two have different meanings here, and only here")]
pub(crate) fn optional<T>(value: Option<Option<T>>) -> Option<Option<T>> {
    match value {
        Some(Some(value)) => Some(Some(value)),
        Some(None) => None,
        None => Some(None),
    }
}
