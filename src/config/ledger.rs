use std::path::PathBuf;

use super::{
    queue::Backend,
    reader::Section,
    report::{Wrong, cut},
    shape::{Grammar, Key, Kind, Table},
};

/// Where the audit trail is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ledger {
    Sqlite { path: PathBuf },
}

pub(crate) static TABLE: Table = Table {
    title: "[ledger]",
    doc: "The audit trail: what was signed, and what became of every event.",
    keys: &[Key::optional(
        "url",
        Kind::Text(&URL),
        "\"sqlite:///var/lib/countersign/ledger.db\"",
        "Where the ledger is: a SQLite file, by its absolute path. The file ledger.db in the queue's folder, if absent.",
    )],
};

static URL: Grammar = Grammar { noun: "a URL in quotes", pattern: Some("^sqlite:///.+") };

/// None if it is wrong, or if its default is needed and the queue has no folder.
pub(crate) fn read(section: &Section<'_>, backend: Option<&Backend>) -> Option<Ledger> {
    match section.value("url") {
        Some(value) => value.parse(sqlite).map(|path| Ledger::Sqlite { path }),
        None => backend.map(|backend| Ledger::Sqlite { path: backend.path().join("ledger.db") }),
    }
}

fn sqlite(text: &str) -> Result<PathBuf, Wrong> {
    const EXAMPLE: &str = "write a file's absolute path: \"sqlite:///var/lib/countersign/ledger.db\", with three slashes";
    match text.split_once("://") {
        Some(("sqlite", path)) if path.starts_with('/') && !path.ends_with('/') && !path.contains(['?', '#', '\0']) => {
            Ok(path.into())
        }
        Some(("postgres" | "postgresql", _)) => Err(Wrong::new("a PostgreSQL ledger is not in this version", EXAMPLE)),
        Some(("sqlite", _)) => Err(Wrong::new(format!("\"{}\" names no file", cut(text)), EXAMPLE)),
        _ => Err(Wrong::new("`url` is no ledger that this version has", EXAMPLE)),
    }
}
