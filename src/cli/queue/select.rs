//! What was typed, turned into what the queue is asked.

use anyhow::Context as _;
use jiff::{Timestamp, civil::Date, tz::TimeZone};

use super::Selection;
use crate::{admin::Filter, cli::Usage, clock::Clock, config::parse_duration};

impl Selection {
    pub(super) fn is_filtered(&self) -> bool {
        let Self { ids: _, rule, repository, kind, error, older_than, newer_than } = self;
        [rule, repository, kind, error, older_than, newer_than].into_iter().any(Option::is_some)
    }

    pub(super) fn filter(&self, clock: &Clock) -> anyhow::Result<Filter> {
        let ago = |flag: &str, age: &Option<String>| -> anyhow::Result<Option<Timestamp>> {
            let age = age.as_deref().map(parse_duration).transpose().map_err(|error| Usage(format!("{flag}: {error}")))?;
            let time = age.map(|age| clock.now().checked_sub(age)).transpose();
            time.with_context(|| Usage(format!("{flag} reaches before all time")))
        };
        Ok(Filter {
            rule: self.rule.clone(),
            repository: self.repository.clone(),
            kind: self.kind.clone(),
            error: self.error.clone(),
            buried_until: ago("--older-than", &self.older_than)?,
            buried_from: ago("--newer-than", &self.newer_than)?,
        })
    }
}

/// RFC 3339, with or without seconds, or a date in UTC.
pub(super) fn time(flag: &str, text: &str) -> Result<Timestamp, Usage> {
    let date = || text.parse::<Date>().ok().filter(|_| text.len() == "2026-11-20".len());
    text.parse()
        .ok()
        .or_else(|| date()?.to_zoned(TimeZone::UTC).ok().map(|midnight| midnight.timestamp()))
        .ok_or_else(|| Usage(format!("{flag}: {text:?} is no time: write 2026-11-20T00:00Z, with its offset, or 2026-11-20")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_offset_or_as_a_date() {
        for (text, expected) in [
            ("2026-11-20T00:00Z", "2026-11-20T00:00:00Z"),
            ("2026-11-20T00:00:01Z", "2026-11-20T00:00:01Z"),
            ("2026-11-20T01:30+01:00", "2026-11-20T00:30:00Z"),
            ("2026-11-20T00:00:00.123456789Z", "2026-11-20T00:00:00.123456789Z"),
            ("2026-11-20 12:00Z", "2026-11-20T12:00:00Z"),
            ("2026-11-20", "2026-11-20T00:00:00Z"),
        ] {
            assert_eq!(time("--since", text).unwrap(), expected.parse::<Timestamp>().unwrap(), "{text}");
        }
        for text in ["", "yesterday", "2026-11-20T00:00", "2026-11-20T00:00:00", "12:00Z", "2026-13-01", "7d"] {
            let error = time("--since", text).unwrap_err().to_string();
            assert!(error.starts_with("--since: ") && error.contains("2026-11-20T00:00Z"), "{error}");
        }
    }
}
