//! What is wrong with a configuration, said so that it can be put right: where, what, and what would be right.

use std::{fmt, ops::Range, path::Path, sync::Arc};

use serde_json::{Value, json};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The configuration is not used.
    Error,
    /// The configuration is used, and somebody should look at it.
    Warning,
}

impl Severity {
    /// The word that text and JSON output use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// A place in the configuration file, printed as `file:line:column`.
#[derive(Debug, Clone)]
pub struct Place {
    pub file: Arc<Path>,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file.display(), self.line, self.column)
    }
}

/// The line that a problem is on, as it may be shown: secrets hidden, control characters replaced, long lines cut.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Excerpt {
    text: String,
    /// Where the carets go, in characters of `text`.
    marked: Range<usize>,
}

/// One thing that is wrong. `Display` is the whole story over several lines; no secret is in it.
#[derive(Debug, Clone)]
pub struct Problem {
    pub severity: Severity,
    /// What is wrong: a lower-case clause.
    pub message: String,
    /// What would be right.
    pub help: Option<String>,
    pub file: Arc<Path>,
    /// None if the file as a whole is meant.
    pub place: Option<Place>,
    excerpt: Option<Excerpt>,
}

impl Problem {
    /// A problem with the file as a whole.
    pub(crate) fn of_file(file: &Path, message: String, help: Option<String>) -> Self {
        Self { severity: Severity::Error, message, help, file: file.into(), place: None, excerpt: None }
    }

    /// For `--output json`: `severity`, `file`, `line`, `column`, `message`, `help`, `excerpt`; null where there is none.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "severity": self.severity.name(),
            "file": self.file.display().to_string(),
            "line": self.place.as_ref().map(|place| place.line),
            "column": self.place.as_ref().map(|place| place.column),
            "message": self.message,
            "help": self.help,
            "excerpt": self.excerpt.as_ref().map(|excerpt| &excerpt.text),
        })
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity.name(), self.message)?;
        let number = self.place.as_ref().map(|place| place.line.to_string()).unwrap_or_default();
        let gutter = " ".repeat(number.len());
        match &self.place {
            Some(place) => write!(f, "\n{gutter}--> {place}")?,
            None => write!(f, "\n{gutter}--> {}", self.file.display())?,
        }
        if let Some(Excerpt { text, marked }) = &self.excerpt {
            write!(f, "\n{gutter} |\n{number} | {text}\n{gutter} | ")?;
            write!(f, "{}{}", " ".repeat(marked.start), "^".repeat(marked.len().max(1)))?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n{gutter} = help: {help}")?;
        }
        Ok(())
    }
}

/// All that is wrong with a configuration that is not used, in the order of the file; at least one is an error.
/// `Display` prints them all.
#[derive(Debug, Clone)]
pub struct Problems(Vec<Problem>);

impl Problems {
    pub(crate) fn new(problems: Vec<Problem>) -> Self {
        debug_assert!(problems.iter().any(|problem| problem.severity == Severity::Error));
        Self(problems)
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self::new(vec![problem])
    }
}

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&in_full(&self.0))
    }
}

/// Every problem in full, a blank line between them, and how many there are at the end. Empty if there is none.
#[must_use]
pub fn in_full(problems: &[Problem]) -> String {
    if problems.is_empty() {
        return String::new();
    }
    let mut parts: Vec<String> = problems.iter().map(ToString::to_string).collect();
    parts.push(tally(problems));
    parts.join("\n\n")
}

/// `2 errors, 1 warning`
fn tally(problems: &[Problem]) -> String {
    let count = |severity: Severity| match problems.iter().filter(|problem| problem.severity == severity).count() {
        0 => None,
        1 => Some(format!("1 {}", severity.name())),
        n => Some(format!("{n} {}s", severity.name())),
    };
    [Severity::Error, Severity::Warning].into_iter().filter_map(count).collect::<Vec<_>>().join(", ")
}

/// The parts of a file that are not shown.
pub(crate) struct Hidden(Vec<Range<usize>>);

impl Hidden {
    pub(crate) fn new(mut ranges: Vec<Range<usize>>) -> Self {
        ranges.sort_by_key(|range| range.start);
        let mut apart: Vec<Range<usize>> = Vec::new();
        for range in ranges {
            match apart.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => apart.push(range),
            }
        }
        Self(apart)
    }

    /// The first hidden byte between two offsets.
    fn first_within(&self, start: usize, end: usize) -> Option<usize> {
        let candidate = self.0.get(self.0.partition_point(|range| range.end <= start))?;
        (candidate.start < end).then_some(candidate.start.max(start))
    }
}

/// The text of a configuration file, and what of it must not be shown.
pub(crate) struct Source<'a> {
    pub text: &'a str,
    pub file: Arc<Path>,
    /// Byte offsets at which lines begin; the first is 0.
    line_starts: Vec<usize>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(text: &'a str, file: &Path) -> Self {
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { text, file: file.into(), line_starts }
    }

    /// The line (from 1) that the byte at `offset` is on.
    pub(crate) fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    pub(crate) fn place(&self, offset: usize) -> Place {
        let line = self.line(offset);
        let before = self.text.get(self.line_starts[line - 1]..offset).unwrap_or_default();
        Place { file: self.file.clone(), line, column: before.chars().count() + 1 }
    }

    /// The text of a line, and the byte offset at which it begins.
    pub(crate) fn line_text(&self, line: usize) -> (usize, &'a str) {
        let start = self.line_starts[line - 1];
        let end = self.line_starts.get(line).map_or(self.text.len(), |next| next - 1);
        (start, self.text[start..end].trim_end_matches('\r'))
    }

    /// Whether nothing but blanks stands before `offset` on its line, as it is with a section's header.
    pub(crate) fn begins_line(&self, offset: usize) -> bool {
        let (start, text) = self.line_text(self.line(offset));
        start + text.len() - text.trim_start().len() == offset
    }

    /// A problem at `span`, with its line, of which nothing in `hidden` is shown. None of it is, if it cannot be known what is
    /// a secret.
    pub(crate) fn problem(
        &self,
        (severity, message, help): (Severity, String, Option<String>),
        span: &Range<usize>,
        hidden: Option<&Hidden>,
    ) -> Problem {
        let start = (0..=span.start.min(self.text.len())).rev().find(|at| self.text.is_char_boundary(*at)).unwrap_or_default();
        let excerpt = hidden.map(|hidden| self.excerpt(start, span.end, hidden));
        Problem { severity, message, help, file: self.file.clone(), place: Some(self.place(start)), excerpt }
    }

    fn excerpt(&self, start: usize, end: usize, hidden: &Hidden) -> Excerpt {
        const HIDDEN: &str = "<not shown>";
        let (line_start, line) = self.line_text(self.line(start));
        let line_end = line_start + line.len();
        // The line's end may itself be what is wrong.
        let (start, end) = (start.min(line_end), end.clamp(start.min(line_end), line_end));
        // From the first hidden byte on, nothing of the line is shown: not even how long the secret is.
        let cut = hidden.first_within(line_start, line_end);
        let shown_end = cut.unwrap_or(line_end);
        let characters = |range: Range<usize>| self.text.get(range).map_or(0, |text| text.chars().count());
        let from = characters(line_start..start.min(shown_end));
        let mut to = from + characters(start.min(shown_end)..end.min(shown_end));
        let mut text: String = self.text.get(line_start..shown_end).unwrap_or_default().to_owned();
        if cut.is_some() {
            text.push_str(HIDDEN);
            if end > shown_end {
                to += HIDDEN.len();
            }
        }
        shortened(&text, from..to)
    }
}

/// Cuts a long line to what surrounds the marked part, and replaces what a terminal might obey.
fn shortened(text: &str, marked: Range<usize>) -> Excerpt {
    const WIDTH: usize = 120;
    const BEFORE: usize = 40;
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let length = text.chars().count();
    if length <= WIDTH {
        return Excerpt { text: text.chars().map(printable).collect(), marked };
    }
    let first = marked.start.saturating_sub(BEFORE).min(length - WIDTH);
    let mut cut: String = text.chars().skip(first).take(WIDTH).map(printable).collect();
    let mut shift = 0;
    if first > 0 {
        cut.insert(0, '…');
        shift = 1;
    }
    if first + WIDTH < length {
        cut.push('…');
    }
    let end = (marked.end - first).min(WIDTH) + shift;
    Excerpt { text: cut, marked: marked.start - first + shift..end }
}
