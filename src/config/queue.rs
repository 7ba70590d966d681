use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    reader::{Section, optional},
    report::{Wrong, cut},
    secret::Secret,
    shape::{Choice, Grammar, Key, Kind, Table, Word},
};

/// Where push events wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    pub backend: Backend,
    /// Events that are handled at once.
    pub in_flight: usize,
    pub retry: Retry,
    /// How long accepted events are kept, so that they can be run again. Zero keeps none.
    pub history: Duration,
    /// Bytes that the embedded queue may take before the oldest of those are forgotten early. Zero keeps none.
    pub history_size: u64,
}

/// What keeps the events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// A folder of this machine, which also holds the daemon's socket.
    Embedded { path: PathBuf },
    /// RabbitMQ.
    Amqp(Box<Amqp>),
}

impl Backend {
    /// The folder of what this process keeps on this machine: the daemon's socket, pinned keys, a SQLite ledger.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Embedded { path } => path,
            Self::Amqp(amqp) => &amqp.path,
        }
    }
}

/// The brokers, and how they are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Amqp {
    pub path: PathBuf,
    /// One URL or several, with commas between: they hold the password.
    pub url: Secret,
    pub prefix: String,
    pub partitions: u16,
    pub tls: Tls,
}

/// How `amqps://` is checked; the system's roots and no client certificate, if nothing is said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    pub ca: Option<PathBuf>,
    /// The client certificate and its key.
    pub identity: Option<(PathBuf, Secret)>,
}

/// When an event that failed is tried again. `first` ≤ `longest` ≤ `give_up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// The wait after the first failure; it doubles with each further one.
    pub first: Duration,
    pub longest: Duration,
    /// The sum of an event's waits, those that a peer asked for aside, beyond which it is a dead letter.
    pub give_up: Duration,
}

const DAY: u64 = 86_400_000;

pub(crate) static TABLE: Table = Table {
    title: "[queue]",
    doc: "Where push events wait until they are handled.",
    keys: &[
        Key::defaulted("backend", Kind::Choice(&BACKEND), "\"embedded\"", "What keeps the events."),
        Key::defaulted(
            "path",
            Kind::Path,
            "\"/var/lib/countersign\"",
            "The folder that holds the events (if the backend is embedded), the ledger and the daemon's socket. One process uses \
             it at a time.",
        ),
        Key::defaulted("in_flight", Kind::Count { least: 1, most: 4096 }, "32", "How many events are handled at once."),
        Key::defaulted(
            "retry",
            Kind::Table(&RETRY),
            "{ first = \"1s\", longest = \"10m\", give_up = \"24h\" }",
            "When an event that failed is tried again, and when it becomes a dead letter. It goes by time, not by count; \
             being throttled by a KMS or a registry uses none of it up.",
        ),
        Key::defaulted(
            "history",
            Kind::Duration { least: 0, most: 366 * DAY },
            "\"7d\"",
            "How long accepted events are kept, whatever became of them, so that `countersign queue replay --since` can run \
             them again after a rule or a key was wrong. \"0s\" keeps none. On RabbitMQ it is how far back they can be had, with \
             the newest 2 GiB at most; the broker keeps those whatever is said here, unless a policy of its says less.",
        ),
        Key::defaulted(
            "history_size",
            Kind::Size { least: 0, most: 1 << 50 },
            "\"1GiB\"",
            "What the embedded queue may take on disk before the oldest of those are forgotten early. An event takes about \
             2 KiB.",
        ),
        Key::optional(
            "url",
            Kind::Secret,
            "{ file = \"/run/secrets/amqp-url\" }",
            "The brokers, if the backend is amqp: amqp://USER:PASSWORD@HOST:5672/VHOST, or amqps:// for TLS. Several with commas \
             between are tried in turn. A file is read again at each connect, so that a password can be rotated.",
        ),
        Key::defaulted(
            "partitions",
            Kind::Count { least: 1, most: 64 },
            "8",
            "Partitions on the broker: at most so many replicas work at once. The same in all replicas.",
        ),
        Key::defaulted("prefix", Kind::Text(&PREFIX), "\"countersign\"", "What all names on the broker begin with."),
        Key::optional("tls", Kind::Table(&TLS), "{ ca = \"tls/broker-ca.pem\" }", "How a broker's certificate is checked."),
    ],
};

static BACKEND: Choice = Choice {
    words: &[
        Word { text: "embedded", doc: "A folder on this machine; no server is needed." },
        Word { text: "amqp", doc: "RabbitMQ, for any number of replicas." },
    ],
    later: &[],
};

static PREFIX: Grammar = Grammar { noun: "a name in quotes", pattern: Some("^[A-Za-z0-9._-]{1,64}$") };

pub(super) static TLS: Table = Table {
    title: "`tls`",
    doc: "How a broker's certificate is checked, and our own.",
    keys: &[
        Key::optional(
            "ca",
            Kind::Path,
            "\"tls/broker-ca.pem\"",
            "A PEM file: the certificates that the broker's may lead to. The system's, if absent.",
        ),
        Key::optional(
            "certificate",
            Kind::Path,
            "\"tls/client.pem\"",
            "A PEM file: the client certificate, if the broker wants one.",
        ),
        Key::optional("key", Kind::Secret, "{ file = \"tls/client.key\" }", "The client certificate's private key, as PEM."),
    ],
};

static RETRY: Table = Table {
    title: "`retry`",
    doc: "When an event that failed is tried again.",
    keys: &[
        Key::defaulted(
            "first",
            Kind::Duration { least: 10, most: DAY },
            "\"1s\"",
            "The wait after the first failure. It doubles with each further one.",
        ),
        Key::defaulted("longest", Kind::Duration { least: 10, most: 30 * DAY }, "\"10m\"", "The longest wait between two tries."),
        Key::defaulted(
            "give_up",
            Kind::Duration { least: 1000, most: 366 * DAY },
            "\"24h\"",
            "An event whose waits add up to more than this becomes a dead letter. Waits that a peer asked for do not count.",
        ),
    ],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Queue> {
    let backend = section.value("backend").and_then(|value| value.choice([Kept::Here, Kept::ByBroker]));
    let path = section.value("path").and_then(|value| value.path());
    let in_flight = section.value("in_flight").and_then(|value| value.count());
    let retry = section.value("retry").and_then(|value| value.table()).as_ref().and_then(retry);
    let history = section.value("history").and_then(|value| value.duration());
    let history_size = section.value("history_size").and_then(|value| value.size());
    let amqp = amqp(section);
    let backend = match backend? {
        Kept::Here => Backend::Embedded { path: path? },
        Kept::ByBroker => {
            let (url, rest) = amqp?;
            let Some(url) = url else {
                section.report.error(
                    section.value_span("backend"),
                    "the backend \"amqp\" needs `url`",
                    "write url = { file = \"…\" }; the file holds amqp://USER:PASSWORD@HOST:5672/VHOST".to_owned(),
                );
                return None;
            };
            Backend::Amqp(Box::new(Amqp { path: path?, url, ..rest }))
        }
    };
    Some(Queue { backend, in_flight: in_flight?, retry: retry?, history: history?, history_size: history_size? })
}

/// What the word says.
#[derive(Clone, Copy)]
enum Kept {
    Here,
    ByBroker,
}

/// The URL, if there is one, and everything else but the path.
fn amqp(section: &Section<'_>) -> Option<(Option<Secret>, Amqp)> {
    let url = optional(section.value("url").map(|value| value.secret()));
    let prefix = section.value("prefix").and_then(|value| value.parse(prefix));
    let partitions = section.value("partitions").and_then(|value| value.count());
    let tls = optional(section.value("tls").map(|value| value.table().as_ref().and_then(tls)));
    let rest = Amqp {
        path: PathBuf::new(),
        url: Secret::new(String::new()),
        prefix: prefix?,
        partitions: partitions?,
        tls: tls?.unwrap_or_default(),
    };
    Some((url?, rest))
}

pub(super) fn tls(section: &Section<'_>) -> Option<Tls> {
    let ca = optional(section.value("ca").map(|value| value.readable_file()));
    let certificate = optional(section.value("certificate").map(|value| value.readable_file()));
    let key = optional(section.value("key").map(|value| value.secret()));
    let identity = match (certificate?, key?) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        (certificate, _) => {
            let (there, missing) = if certificate.is_some() { ("certificate", "key") } else { ("key", "certificate") };
            let message = format!("`{there}` of the client needs `{missing}`");
            section.report.error(section.value_span(there), message, format!("write `{missing}` as well, or remove `{there}`"));
            return None;
        }
    };
    Some(Tls { ca: ca?, identity })
}

fn prefix(text: &str) -> Result<String, Wrong> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if (1..=64).contains(&text.len()) && text.bytes().all(fits) {
        return Ok(text.to_owned());
    }
    let help = "letters, digits, dots, dashes and underscores, 64 at most: \"countersign\"";
    Err(Wrong::new(format!("\"{}\" cannot begin names on a broker", cut(text)), help))
}

fn retry(section: &Section<'_>) -> Option<Retry> {
    let first = section.value("first").and_then(|value| value.duration());
    let longest = section.value("longest").and_then(|value| value.duration());
    let give_up = section.value("give_up").and_then(|value| value.duration());
    let retry = Retry { first: first?, longest: longest?, give_up: give_up? };
    let help = "first is at most longest, and longest is at most give_up; what is not written has its default: 1s, 10m, 24h";
    if retry.first > retry.longest {
        section.report.error(section.value_span("longest"), "`longest` is shorter than `first`", help.to_owned());
        return None;
    }
    if retry.longest > retry.give_up {
        section.report.error(section.value_span("give_up"), "`give_up` is shorter than `longest`", help.to_owned());
        return None;
    }
    Some(retry)
}
