//! Printing answers: lines for people, one document for programs.

use std::io::Write as _;

use serde::Serialize;

use super::Output;

/// Prints `value` as JSON, or what `text` makes of it. A reader that closed the pipe has seen enough.
pub fn print<T: Serialize>(output: Output, value: &T, text: impl FnOnce(&T) -> String) {
    let rendered = match output {
        Output::Json => serde_json::to_string_pretty(value).expect("answers are plain data"),
        Output::Text => text(value),
    };
    drop(writeln!(std::io::stdout().lock(), "{}", rendered.trim_end()));
}

/// Many answers, printed as they come: lines for people, one JSON array for programs.
#[derive(Debug)]
pub struct List {
    output: Output,
    is_empty: bool,
}

impl List {
    #[must_use]
    pub fn begin(output: Output) -> Self {
        Self { output, is_empty: true }
    }

    /// False if nobody reads any more.
    pub fn item<T: Serialize>(&mut self, value: &T, text: impl FnOnce(&T) -> String) -> bool {
        let rendered = match self.output {
            Output::Json => {
                let item = serde_json::to_string(value).expect("answers are plain data");
                format!("{}{item}", if self.is_empty { "[\n  " } else { ",\n  " })
            }
            Output::Text => format!("{}\n", text(value).trim_end()),
        };
        self.is_empty = false;
        std::io::stdout().lock().write_all(rendered.as_bytes()).is_ok()
    }

    /// `nothing`: what people are told if there was nothing.
    pub fn end(self, nothing: &str) {
        let end = match (self.output, self.is_empty) {
            (Output::Json, true) => "[]",
            (Output::Json, false) => "\n]",
            (Output::Text, true) => nothing,
            (Output::Text, false) => return,
        };
        drop(writeln!(std::io::stdout().lock(), "{end}"));
    }
}

/// Columns, each as wide as its widest cell. The last is not padded.
#[must_use]
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut header.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}
