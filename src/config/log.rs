use tracing::Level;

use super::{
    reader::Section,
    shape::{Choice, Key, Kind, Table, Word},
};

/// What is logged, to standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Log {
    pub format: LogFormat,
    pub level: Level,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Human,
    Json,
}

pub(crate) static TABLE: Table = Table {
    title: "[log]",
    doc: "What is logged, to standard error. No secret ever is.",
    keys: &[
        Key::defaulted("format", Kind::Choice(&FORMAT), "\"human\"", "How a log line looks."),
        Key::defaulted("level", Kind::Choice(&LEVEL), "\"info\"", "The least important lines that are still logged."),
    ],
};

static FORMAT: Choice = Choice {
    words: &[
        Word { text: "human", doc: "One line of text for each event." },
        Word { text: "json", doc: "One JSON object a line, for log collectors." },
    ],
    later: &[],
};

static LEVEL: Choice = Choice {
    words: &[
        Word { text: "error", doc: "What needs somebody." },
        Word { text: "warn", doc: "And what may soon." },
        Word { text: "info", doc: "And what was signed." },
        Word { text: "debug", doc: "And why, step by step." },
        Word { text: "trace", doc: "And what the libraries do." },
    ],
    later: &[],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Log> {
    let format = section.value("format").and_then(|value| value.choice([LogFormat::Human, LogFormat::Json]));
    let levels = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
    let level = section.value("level").and_then(|value| value.choice(levels));
    Some(Log { format: format?, level: level? })
}
