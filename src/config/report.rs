//! What was found wrong so far, and how it may be said.

use std::{cell::RefCell, collections::BTreeSet, ops::Range};

use super::{
    names::Names,
    outside::Outside,
    problem::{Hidden, Place, Problem, Severity, Source},
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

/// A text as it may be repeated in a message.
pub(crate) fn cut(text: &str) -> String {
    const READABLE: usize = 60;
    if may_hold_password(text) {
        return "…".to_owned();
    }
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut shown: String = text.chars().take(READABLE).map(printable).collect();
    if text.chars().count() > READABLE {
        shown.push('…');
    }
    shown
}

/// Whether a text could be a URL with a user and password in it, or a PKCS#11 URI with a PIN.
pub(crate) fn may_hold_password(text: &str) -> bool {
    text.contains('@') || text.to_ascii_lowercase().contains("pin-")
}
