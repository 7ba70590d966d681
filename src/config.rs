//! What an administrator writes, read into what the code needs.
//!
//! A [`Config`] that exists can be used: every value is in bounds, every reference resolves, every secret has been read.
//! A file from which none can be made is answered with all that is wrong with it, each with its line and its cure.
//! Every section and key is declared once (`shape.rs`); the reader, the JSON Schema and `config/default.toml` follow it.

mod admission;
mod door;
mod kubernetes;
mod ledger;
mod log;
mod names;
mod outside;
mod policy;
mod postgres;
mod problem;
mod queue;
mod reader;
mod registry;
mod report;
pub mod resource;
mod rule;
mod schema;
mod scope;
mod secret;
mod server;
mod shape;
mod source;
mod syntax;
mod units;
mod value;
mod witness;

use std::{borrow::Cow, path::Path};

use toml::de::DeTable;

use crate::policy::Policy;

pub use self::{
    admission::{Admission, Breakglass, Cache, Certificate, CustomKind},
    door::Door,
    kubernetes::{Kubernetes, Recheck},
    ledger::Ledger,
    log::{Log, LogFormat},
    problem::{Place, Problem, Problems, Severity, in_full},
    queue::{Amqp, Backend, Queue, Retry, Tls as BrokerTls},
    registry::{Login, Registry},
    rule::{Rule, check_rule_against_key},
    schema::schema,
    scope::Scope,
    secret::Secret,
    server::{Server, Tls},
    source::{Source, SourceAuth, SourceKind, SourceQueue},
    witness::{FormerKey, Rate, Witness},
};
use self::{
    names::Names,
    outside::{Outside, Unreadable},
    reader::Section,
    report::Report,
    shape::{Key, Kind, Table},
};

/// Everything that countersign does, as one file says it.
#[derive(Debug, Clone)]
pub struct Config {
    pub server: Server,
    pub queue: Queue,
    pub ledger: Ledger,
    pub log: Log,
    pub registries: Vec<Registry>,
    pub sources: Vec<Source>,
    pub witnesses: Vec<Witness>,
    pub rules: Vec<Rule>,
    pub policies: Vec<Policy>,
    pub admission: Admission,
}

/// The defaults, with every key and what it means: `config/default.toml`.
pub const DEFAULT_TOML: &str = include_str!("../config/default.toml");

/// Ten thousand rules are four megabytes.
const LARGEST_FILE: u64 = 16 << 20;

/// Reads a length of time as the configuration has it: `500ms`, `30s`, `10m`, `24h`.
///
/// # Errors
/// A sentence that shows how one is written.
pub fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    units::duration(text).ok_or_else(|| format!("{text:?} is no length of time: write 500ms, 30s, 10m or 24h"))
}

impl Config {
    /// Reads a file, and the secrets that it refers to. The problems returned beside the configuration are warnings.
    pub fn load(path: &Path) -> Result<(Self, Vec<Problem>), Problems> {
        Self::parse(&text_of(path)?, path)
    }

    /// Reads a text as if it stood in the file `path`, whose folder relative paths start from.
    pub fn parse(text: &str, path: &Path) -> Result<(Self, Vec<Problem>), Problems> {
        Self::parse_with(text, path, Outside::machine(path.parent().unwrap_or(Path::new(""))))
    }

    /// What an empty file means.
    #[must_use]
    pub fn embedded_default() -> Self {
        Self::parse(DEFAULT_TOML, Path::new("default.toml")).expect("a test parses it").0
    }

    fn parse_with(text: &str, path: &Path, outside: Outside) -> Result<(Self, Vec<Problem>), Problems> {
        let mut report = Report::new(problem::Source::new(text, path), outside);
        let readable = syntax::readable(text, &mut report);
        let document = syntax::document(&readable, &mut report);
        report.names = Names::gather(&document);
        let config = read(&report, &document);
        let problems = report.into_problems();
        if problems.iter().any(|problem| problem.severity == Severity::Error) {
            return Err(Problems::new(problems));
        }
        Ok((config.expect("whatever is missing has been reported as an error"), problems))
    }
}

/// What a configuration file holds.
fn text_of(path: &Path) -> Result<String, Problems> {
    let unreadable = |error: Unreadable| {
        let help = match error {
            Unreadable::Missing => "name the configuration with --config",
            Unreadable::NotAFile => "--config names one file",
            Unreadable::TooLarge(_) => "is this a configuration?",
            Unreadable::Io(_) => "the user that countersign runs as must be able to read it",
        };
        Problem::of_file(path, format!("the configuration cannot be used: {error}"), Some(help.to_owned()))
    };
    let contents = outside::read_file(path, LARGEST_FILE).map_err(unreadable)?;
    String::from_utf8(contents.bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let readable = std::str::from_utf8(&error.as_bytes()[..at]).expect("it is valid up to there");
        let problem = ("the configuration is no UTF-8 text".to_owned(), Some("save it as UTF-8".to_owned()));
        let source = problem::Source::new(readable, path);
        source.problem((Severity::Error, problem.0, problem.1), &(at..at), None).into()
    })
}

static ROOT: Table = Table {
    title: "the file",
    doc: "The configuration of countersign.",
    keys: &[
        Key::defaulted("server", Kind::Table(&server::TABLE), "{}", server::TABLE.doc),
        Key::defaulted("queue", Kind::Table(&queue::TABLE), "{}", queue::TABLE.doc),
        Key::defaulted("ledger", Kind::Table(&ledger::TABLE), "{}", ledger::TABLE.doc),
        Key::defaulted("log", Kind::Table(&log::TABLE), "{}", log::TABLE.doc),
        Key::defaulted("registry", Kind::Tables(&registry::TABLE), "[]", registry::TABLE.doc),
        Key::defaulted("source", Kind::Tables(&source::TABLE), "[]", source::TABLE.doc),
        Key::defaulted("witness", Kind::Tables(&witness::TABLE), "[]", witness::TABLE.doc),
        Key::defaulted("rule", Kind::Tables(&rule::TABLE), "[]", rule::TABLE.doc),
        Key::defaulted("policy", Kind::Tables(&policy::TABLE), "[]", policy::TABLE.doc),
        Key::defaulted("admission", Kind::Table(&admission::TABLE), "{}", admission::TABLE.doc),
    ],
};

fn read(report: &Report<'_>, document: &DeTable<'_>) -> Option<Config> {
    for given in
        [&report.names.registries, &report.names.sources, &report.names.witnesses, &report.names.rules, &report.names.policies]
    {
        given.report_repeated(report);
    }
    let root = Section::new(report, &ROOT, Cow::Borrowed(document), 0..0);
    let one = |name| root.value(name).and_then(|value| value.table());
    let server = one("server").as_ref().and_then(server::read);
    let queue = one("queue").as_ref().and_then(queue::read);
    let ledger = one("ledger").as_ref().and_then(|section| ledger::read(section, queue.as_ref().map(|queue| &queue.backend)));
    let log = one("log").as_ref().and_then(log::read);
    let registries = root.value("registry").and_then(|value| value.each_table(registry::read));
    let sources = root.value("source").and_then(|value| value.each_table(source::read));
    let witnesses = root.value("witness").and_then(|value| value.each_table(witness::read));
    let rules = root.value("rule").and_then(|value| value.each_table(rule::read));
    let policies = root.value("policy").and_then(|value| value.each_table(policy::read));
    let admission = one("admission").as_ref().and_then(admission::read);
    if let Some(rules) = &rules {
        rule::report_same(report, rules);
    }
    Some(Config {
        server: server?,
        queue: queue?,
        ledger: ledger?,
        log: log?,
        registries: registries?,
        sources: sources?,
        witnesses: witnesses?,
        rules: rules?,
        policies: policies?,
        admission: admission?,
    })
}

/// The one section that a key would be right in.
fn home_of(name: &str) -> Option<&'static str> {
    let mut homes = ROOT.keys.iter().filter_map(|section| match section.kind {
        Kind::Table(table) | Kind::Tables(table) => table.current_keys().find(|key| key.name == name).map(|_| table.title),
        _ => None,
    });
    let home = homes.next()?;
    homes.next().is_none().then_some(home)
}

#[cfg(test)]
mod tests;
