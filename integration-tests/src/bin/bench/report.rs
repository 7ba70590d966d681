//! Tables for people, the same numbers as JSON, and the aims that are held beside them.

use std::time::Duration;
use std::{fmt, fs};

use anyhow::Result;
use serde_json::{Map, Value, json};

/// What a measured number is held to.
#[derive(Debug, Clone, Copy)]
pub enum Aim {
    AtLeast(f64),
    AtMost(f64),
}

impl Aim {
    fn is_met(self, measured: f64) -> bool {
        match self {
            Self::AtLeast(limit) => measured >= limit,
            Self::AtMost(limit) => measured <= limit,
        }
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
        }
    }
}

#[derive(Debug, Clone)]
pub enum Cell {
    Text(String),
    /// And how many digits after the point are shown.
    Number(f64, usize),
    /// Nothing was measured here.
    None,
}

pub fn text(text: impl Into<String>) -> Cell {
    Cell::Text(text.into())
}

pub fn number(value: f64, places: usize) -> Cell {
    Cell::Number(value, places)
}

/// Milliseconds.
pub fn milliseconds(value: Duration) -> Cell {
    Cell::Number(value.as_secs_f64() * 1e3, 2)
}

impl Cell {
    fn json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Number(value, _) => json!(value),
            Self::None => Value::Null,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.pad(text),
            Self::Number(value, places) => f.pad(&format!("{value:.places$}")),
            Self::None => f.pad("-"),
        }
    }
}

/// One part of the benchmark. Each row says what was measured, and where the number in one of its columns has an aim.
#[derive(Debug)]
pub struct Table {
    name: &'static str,
    title: String,
    columns: Vec<&'static str>,
    rows: Vec<Row>,
    notes: Vec<String>,
    loads: (String, String),
}

#[derive(Debug)]
struct Row {
    cells: Vec<Cell>,
    aims: Vec<Held>,
}

/// A number, held to its aim.
#[derive(Debug, Clone)]
struct Held {
    what: String,
    measured: f64,
    aim: Aim,
}

impl Held {
    fn verdict(&self) -> &'static str {
        if self.aim.is_met(self.measured) { "met" } else { "MISSED" }
    }
}

impl Table {
    pub fn new(name: &'static str, title: impl Into<String>, columns: &[&'static str]) -> Self {
        let loads = (load_average(), String::new());
        Self { name, title: title.into(), columns: columns.to_vec(), rows: Vec::new(), notes: Vec::new(), loads }
    }

    /// The first cell says what the row is about.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(Row { cells: cells.into_iter().collect(), aims: Vec::new() });
    }

    /// Holds the last row's number in this column to an aim; `what` names it in the summary.
    pub fn aim(&mut self, column: &str, aim: Aim, what: impl Into<String>) {
        let index = self.columns.iter().position(|known| *known == column).expect("the aim names a column of its table");
        let row = self.rows.last_mut().expect("an aim follows its row");
        if let Cell::Number(measured, _) = row.cells[index] {
            row.aims.push(Held { what: what.into(), measured, aim });
        }
    }

    /// Whether a number falls short of its aim.
    pub fn misses(&self) -> bool {
        self.rows.iter().flat_map(|row| &row.aims).any(|held| !held.aim.is_met(held.measured))
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Prints it. The load average is that of this moment.
    pub fn close(&mut self) {
        self.loads.1 = load_average();
        println!("\n{} ({}; load average {} before, {} after)", self.title, self.name, self.loads.0, self.loads.1);
        let mut lines: Vec<Vec<String>> = vec![self.columns.iter().map(|column| (*column).to_owned()).collect()];
        lines[0].push("aim".to_owned());
        for row in &self.rows {
            let mut line: Vec<String> = row.cells.iter().map(ToString::to_string).collect();
            let aims = row.aims.iter().map(|held| format!("{} {}", held.aim, held.verdict()));
            line.push(aims.collect::<Vec<_>>().join(", "));
            lines.push(line);
        }
        let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..=self.columns.len()).map(|column| width(column).unwrap_or_default()).collect();
        for line in &lines {
            let first = line.first().map(|cell| format!("  {cell:<width$}", width = widths[0])).unwrap_or_default();
            let middle = line[1..self.columns.len()].iter().zip(&widths[1..]).map(|(cell, width)| format!("  {cell:>width$}"));
            let printed = format!("{first}{}  {}", middle.collect::<String>(), line[self.columns.len()]);
            println!("{}", printed.trim_end());
        }
        for note in &self.notes {
            println!("  . {note}");
        }
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let cells = self.columns.iter().zip(&row.cells);
            let mut object: Map<String, Value> = cells.map(|(column, cell)| ((*column).to_owned(), cell.json())).collect();
            if !row.aims.is_empty() {
                let aims = row.aims.iter().map(|held| {
                    json!({"what": held.what, "measured": held.measured, "aim": held.aim.to_string(), "met": held.aim.is_met(held.measured)})
                });
                object.insert("aims".to_owned(), aims.collect());
            }
            Value::Object(object)
        });
        json!({
            "name": self.name,
            "title": self.title,
            "load_before": self.loads.0,
            "load_after": self.loads.1,
            "rows": rows.collect::<Vec<_>>(),
            "notes": self.notes,
        })
    }
}

/// Every aim in one list, and all tables as one JSON document.
pub fn summary(tables: &[Table]) -> Value {
    let aims: Vec<&Held> = tables.iter().flat_map(|table| &table.rows).flat_map(|row| &row.aims).collect();
    if !aims.is_empty() {
        println!("\nAims");
    }
    let width = aims.iter().map(|held| held.what.chars().count()).max().unwrap_or_default();
    for held in &aims {
        let Held { what, measured, aim, .. } = held;
        println!("  {what:<width$}  {measured:>9.3}  {:<8} {}", aim.to_string(), held.verdict());
    }
    json!({"tables": tables.iter().map(Table::json).collect::<Vec<_>>()})
}

/// That of the last minute.
pub fn load_average() -> String {
    let line = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    line.split(' ').next().unwrap_or_default().to_owned()
}

/// The middle one; of an even number, the upper of the two. NaN of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The time within which this share of them lies.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index into a list of some thousand"
)]
pub fn percentile(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    let index = (times.len().saturating_sub(1) as f64 * share).round() as usize;
    times.get(index).copied().unwrap_or_default()
}

/// Counts as numbers to reckon with.
#[expect(clippy::cast_precision_loss, reason = "counts of a benchmark are far below 2^52")]
pub fn float(count: impl TryInto<u64>) -> f64 {
    count.try_into().map_or(f64::NAN, |count| count as f64)
}

/// Where a file that `make bench` leaves behind goes, and with it what has to be on a disk: the folder `target`.
pub fn target() -> Result<std::path::PathBuf> {
    let program = std::env::current_exe()?;
    // target/release/bench
    Ok(program.ancestors().nth(2).unwrap_or(&program).to_owned())
}
