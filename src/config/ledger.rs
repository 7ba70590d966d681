use std::path::PathBuf;

use super::{
    postgres,
    queue::Backend,
    reader::Section,
    report::{Wrong, cut},
    shape::{Grammar, Key, Kind, Table},
    value::Value,
};
use crate::ledger::Postgres;

/// Where the audit trail is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ledger {
    Sqlite { path: PathBuf },
    Postgres(Box<Postgres>),
}

pub(crate) static TABLE: Table = Table {
    title: "[ledger]",
    doc: "The audit trail: what was signed, and what became of every event.",
    keys: &[Key::optional(
        "url",
        Kind::Url(&URL),
        "\"sqlite:///var/lib/countersign/ledger.db\"",
        "Where the ledger is. A SQLite file, by its absolute path: the file ledger.db in the queue's folder, if absent. Or a \
         PostgreSQL database, which many replicas share: \"postgres://countersign@db.example.com/countersign?sslmode=verify-full\". \
         With a password in it, it is a secret: { env = \"LEDGER_URL\" } or { file = \"…\" }. `sslmode` is disable, prefer \
         (the default), require, verify-ca or verify-full, and `sslrootcert` a file of certificates, as libpq has them.",
    )],
};

static URL: Grammar = Grammar { noun: "a URL in quotes", pattern: Some("^(sqlite:///|postgres(ql)?://).+") };

/// None if it is wrong, or if its default is needed and the queue has no folder.
pub(crate) fn read(section: &Section<'_>, backend: Option<&Backend>) -> Option<Ledger> {
    match section.value("url") {
        Some(value) => url(&value),
        None => backend.map(|backend| Ledger::Sqlite { path: backend.path().join("ledger.db") }),
    }
}

fn url(value: &Value<'_>) -> Option<Ledger> {
    const EXAMPLE: &str = "write a file's absolute path, \"sqlite:///var/lib/countersign/ledger.db\", with three slashes, or a \
                           database's URL, \"postgres://countersign@db.example.com/countersign?sslmode=verify-full\"";
    let (url, is_open) = value.url()?;
    let url = url.expose();
    let parsed = match url.split_once("://") {
        Some(("sqlite", path)) if path.starts_with('/') && !path.ends_with('/') && !path.contains(['?', '#', '\0']) => {
            Ok(Ledger::Sqlite { path: path.into() })
        }
        Some(("postgres" | "postgresql", _)) => return database(value, url, is_open),
        Some(("sqlite", _)) if is_open => Err(Wrong::new(format!("\"{}\" names no file", cut(url)), EXAMPLE)),
        Some(("sqlite", _)) => Err(Wrong::new("`url` names no file", EXAMPLE)),
        _ => Err(Wrong::new("`url` is no ledger that this version has", EXAMPLE)),
    };
    parsed.map_or_else(|wrong| value.wrong(wrong), Some)
}

fn database(value: &Value<'_>, url: &str, is_open: bool) -> Option<Ledger> {
    let settings = match postgres::read(url, |path| value.file_within(path)) {
        Ok(settings) => settings,
        Err(wrong) => return value.wrong(wrong),
    };
    if is_open && settings.connection.get_password().is_some() {
        let message = "`url` has a password in the configuration file itself";
        let help = "keep the URL in a file of its own: url = { file = \"/run/secrets/ledger-url\" }";
        value.report.warning(value.span.clone(), message, help.to_owned());
    }
    if postgres::is_exposed(&settings) {
        let message = "the database that `url` names is believed without a look at its certificate";
        let help = "write sslmode=verify-full, and sslrootcert=FILE if its certificate is of your own authority; or sslmode=disable \
                    where nobody can be in between";
        value.report.warning(value.span.clone(), message, help.to_owned());
    }
    Some(Ledger::Postgres(Box::new(settings)))
}
