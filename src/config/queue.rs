use std::{path::PathBuf, time::Duration};

use super::{
    reader::Section,
    shape::{Choice, Key, Kind, Table, Word},
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
            "The folder that holds the events, the ledger and the daemon's socket. One process uses it at a time.",
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
             them again after a rule or a key was wrong. \"0s\" keeps none.",
        ),
        Key::defaulted(
            "history_size",
            Kind::Size { least: 0, most: 1 << 50 },
            "\"1GiB\"",
            "What the embedded queue may take on disk before the oldest of those are forgotten early. An event takes about \
             2 KiB.",
        ),
        Key::later("url"),
        Key::later("partitions"),
    ],
};

static BACKEND: Choice =
    Choice { words: &[Word { text: "embedded", doc: "A folder on this machine; no server is needed." }], later: &["amqp"] };

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
    let backend = section.value("backend").and_then(|value| value.choice([()]));
    let path = section.value("path").and_then(|value| value.path());
    let in_flight = section.value("in_flight").and_then(|value| value.count());
    let retry = section.value("retry").and_then(|value| value.table()).as_ref().and_then(retry);
    let history = section.value("history").and_then(|value| value.duration());
    let history_size = section.value("history_size").and_then(|value| value.size());
    let backend = backend.and(path).map(|path| Backend::Embedded { path });
    Some(Queue { backend: backend?, in_flight: in_flight?, retry: retry?, history: history?, history_size: history_size? })
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
