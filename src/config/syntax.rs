//! What the TOML parser says about text that is no TOML, in words for an administrator.

use toml::de::Error;

use super::reader::{Report, Span};

/// Reports the parser's errors, and returns the lines that they are on.
pub(crate) fn report(report: &Report<'_>, errors: &[Error]) -> Vec<usize> {
    let mut lines = Vec::new();
    for error in errors {
        let end = report.source.text.len();
        let span = error.span().unwrap_or(end..end);
        let line = report.source.line(span.start);
        // Later errors on a line are mostly about what the first one left over.
        if lines.contains(&line) {
            continue;
        }
        lines.push(line);
        let (_, text) = report.source.line_text(line);
        report.syntax_error(
            span.clone(),
            format!("not TOML: {}", error.message()),
            help(error.message(), text, &span),
            may_be_shown(text),
        );
    }
    lines
}

fn help(message: &str, line: &str, _span: &Span) -> Option<String> {
    let help = if message.contains("duplicate key") {
        "keep one of them; a list of tables is begun with [[…]] each time"
    } else if message.contains("string") && line.contains('=') {
        "texts stand in quotes: name = \"text\""
    } else {
        return None;
    };
    Some(help.to_owned())
}

/// Whether a line that could not be read surely holds no secret: one that names none, and is no part of a longer text.
fn may_be_shown(line: &str) -> bool {
    const TELLTALE: [&str; 8] = ["pass", "token", "secret", "key", "basic", "hmac", "pwd", "@"];
    let lower = line.to_lowercase();
    let is_plain = line.contains('=') || line.trim_start().starts_with('[');
    is_plain && !TELLTALE.iter().any(|word| lower.contains(word))
}
