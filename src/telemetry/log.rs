//! The log: one line an event on stderr, for people or as JSON.
//!
//! A line carries the fields of its spans and its own; of equal names the innermost holds. An error is told with its
//! causes. Whatever a field says, it stays on its line: control characters are escaped.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    env,
    error::Error as StdError,
    fmt::{self, Write as _},
    io::{self, IsTerminal, Write as _},
    os::unix::fs::MetadataExt,
    panic::{self, PanicHookInfo},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};
use serde_json::Value;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::LevelFilter,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    reload,
};

use crate::clock::Clock;

/// How lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people: in colour on a terminal (unless `NO_COLOR` is set), with priorities instead of times under systemd.
    #[default]
    Human,
    /// One JSON object a line: `time` (RFC 3339, UTC), `level`, `message`, `target`, `span`, and all fields beside them.
    Json,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    pub format: LogFormat,
    /// What is logged: a level, or several of `target=level`, with commas between: `info,countersign::registry=debug`.
    pub filter: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{filter:?} is no log filter: write error, warn, info, debug or trace, and target=level after commas for details")]
    Filter {
        filter: String,
        #[source]
        source: Option<tracing_subscriber::filter::ParseError>,
    },
    #[error("a log is installed in this process already")]
    Installed(#[from] tracing::subscriber::SetGlobalDefaultError),
}

/// Sends this process's log to stderr from here on, panics included. Once in a process.
pub fn install(settings: &LogSettings) -> Result<LogHandle, Error> {
    let (filter, handle) = reload::Layer::new(filter(&settings.filter)?);
    let style = match settings.format {
        LogFormat::Json => Style::Json,
        LogFormat::Human if stderr_is_the_journal() => Style::Journal,
        LogFormat::Human => {
            let colour = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            Style::Human { colour }
        }
    };
    // In one write, so that lines stay whole. Nobody is left to tell if it fails.
    let out = |line: &str| drop(io::stderr().write_all(line.as_bytes()));
    let lines = Lines { style, clock: Clock::system(), out };
    tracing::subscriber::set_global_default(Registry::default().with(filter).with(lines))?;
    panic::set_hook(Box::new(log_panic));
    Ok(LogHandle(handle))
}

/// The installed log.
#[derive(Clone, Debug)]
pub struct LogHandle(reload::Handle<EnvFilter, Registry>);

impl LogHandle {
    /// Another filter from here on, as after a reload of the configuration.
    pub fn set_filter(&self, text: &str) -> Result<(), Error> {
        let new = filter(text)?;
        self.0.reload(new).expect("the log lives as long as the process");
        Ok(())
    }
}

fn filter(text: &str) -> Result<EnvFilter, Error> {
    let wrong = |source| Error::Filter { filter: text.to_owned(), source };
    let parts: Vec<&str> = text.split(',').map(str::trim).collect();
    // A misspelt level would be taken for a target, and everything else would be silent.
    if parts.iter().any(|part| part.is_empty() || !part.contains(['=', '[']) && part.parse::<LevelFilter>().is_err()) {
        return Err(wrong(None));
    }
    // The AMQP client warns of each message that a broker returns, whole; the client of Kubernetes of each call that fails. Who
    // asked says itself what is wrong.
    let quiet = "lapin::returned_messages=off,kube_client=off";
    EnvFilter::builder().with_regex(false).parse(format!("{quiet},{}", parts.join(","))).map_err(|source| wrong(Some(source)))
}

/// As systemd says it: `JOURNAL_STREAM` names the device and inode of the stream (systemd.exec(5)).
fn stderr_is_the_journal() -> bool {
    let stream = env::var("JOURNAL_STREAM").ok();
    let stderr = std::fs::metadata("/proc/self/fd/2").ok();
    stream.zip(stderr).is_some_and(|(stream, stderr)| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let location = panic.location().map(ToString::to_string);
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    let thread = std::thread::current();
    tracing::error!(
        panic = text,
        location,
        thread = thread.name(),
        backtrace,
        "a thread panicked, which is a bug in countersign"
    );
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Human {
        colour: bool,
    },
    /// The journal knows the time, and takes `<N>` at the beginning for the priority (sd-daemon(3)).
    Journal,
    Json,
}

/// Writes each event as one line to `out`.
struct Lines<W> {
    style: Style,
    clock: Clock,
    out: W,
}

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(&str) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        for span in context.event_scope(event).into_iter().flat_map(tracing_subscriber::registry::Scope::from_root) {
            if let Some(of_span) = span.extensions().get::<Fields>() {
                of_span.0.iter().for_each(|(name, value)| fields.set(name, value.clone()));
            }
        }
        event.record(&mut fields);
        let line = Line {
            time: self.clock.now(),
            level: *event.metadata().level(),
            target: event.metadata().target(),
            span: context.event_span(event).map(|span| span.name()),
            message: fields.take("message"),
            fields: fields.0,
        };
        (self.out)(&line.render(self.style));
    }
}

/// In the order of their first mention; a name occurs once.
#[derive(Default)]
struct Fields(Vec<(&'static str, Value)>);

impl Fields {
    fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        let value = value.into();
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    fn take(&mut self, name: &str) -> String {
        let found = self.0.iter().position(|(known, _)| *known == name);
        found.map_or_else(String::new, |index| match self.0.remove(index).1 {
            Value::String(text) => text,
            other => other.to_string(),
        })
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field.name(), value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field.name(), value);
    }

    fn record_error(&mut self, field: &Field, error: &(dyn StdError + 'static)) {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let _ = write!(text, ": {error}");
            cause = error.source();
        }
        self.set(field.name(), text);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field.name(), format!("{value:?}"));
    }
}

struct Line<'a> {
    time: Timestamp,
    level: Level,
    target: &'a str,
    /// The innermost.
    span: Option<&'static str>,
    message: String,
    fields: Vec<(&'static str, Value)>,
}

impl Line<'_> {
    fn render(&self, style: Style) -> String {
        let mut line = match style {
            Style::Json => self.json(),
            Style::Journal => format!("<{}>{}", priority(self.level), self.words(false)),
            Style::Human { colour } => {
                let dim = Paint { code: "2", on: colour };
                let level = Paint { code: colour_of(self.level), on: colour };
                format!(
                    "{} {} {}",
                    dim.paint(format_args!("{:.3}", self.time)),
                    level.paint(format_args!("{:<5}", self.level)),
                    self.words(colour)
                )
            }
        };
        line.push('\n');
        line
    }

    fn json(&self) -> String {
        let write = |out: &mut Vec<u8>| {
            let mut json = serde_json::Serializer::new(out);
            let mut object = json.serialize_map(None)?;
            object.serialize_entry("time", &format!("{:.6}", self.time))?;
            object.serialize_entry("level", &self.level.as_str().to_ascii_lowercase())?;
            object.serialize_entry("message", &self.message)?;
            object.serialize_entry("target", self.target)?;
            if let Some(span) = self.span {
                object.serialize_entry("span", span)?;
            }
            self.fields.iter().try_for_each(|(name, value)| object.serialize_entry(name, value))?;
            object.end()
        };
        let mut out = Vec::with_capacity(512);
        write(&mut out).expect("strings and numbers always serialise");
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    fn words(&self, colour: bool) -> String {
        let dim = Paint { code: "2", on: colour };
        let mut out = String::with_capacity(256);
        for character in self.message.chars() {
            if is_plain(character) { out.push(character) } else { out.extend(character.escape_default()) }
        }
        for (name, value) in &self.fields {
            let _ = write!(out, " {}", dim.paint(format_args!("{name}=")));
            let _ = match value {
                Value::String(text) if reads_as_one_word(text) => write!(out, "{text}"),
                Value::String(text) => write!(out, "{text:?}"),
                other => write!(out, "{other}"),
            };
        }
        // Whoever turns details on wants to know where they come from.
        if self.level > Level::INFO {
            let _ = write!(out, " {}", dim.paint(format_args!("target={}", self.target)));
        }
        out
    }
}

fn reads_as_one_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'=' | b'\\'))
}

/// What neither ends a line, nor moves the cursor, nor turns the direction of writing.
fn is_plain(character: char) -> bool {
    !character.is_control()
        && !matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// ECMA-48, "Select graphic rendition".
fn colour_of(level: Level) -> &'static str {
    match level {
        Level::ERROR => "31",
        Level::WARN => "33",
        Level::INFO => "32",
        Level::DEBUG => "34",
        Level::TRACE => "35",
    }
}

struct Paint {
    code: &'static str,
    on: bool,
}

impl Paint {
    fn paint(&self, text: impl fmt::Display) -> String {
        if self.on { format!("\x1b[{}m{text}\x1b[0m", self.code) } else { text.to_string() }
    }
}

#[cfg(test)]
mod tests;
