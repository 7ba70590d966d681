//! What was pushed, for as long as it is kept: a stream with a copy of every push.
//!
//! The broker forgets the oldest by size alone; what is older than `history` is not shown. The stream is in the order of
//! arrival, and that is the order of time but for what the replicas' clocks differ by.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};

use super::{
    Core, lock,
    session::Session,
    stream::{Counter, Place, Reader},
};
use crate::{Error, History, Kept};

/// A page has no more than this, whatever is asked for.
const PAGE: usize = 1000;
/// Nor more bytes of bodies than this and one more.
const PAGE_BYTES: usize = 8 * 1024 * 1024;
/// Records that are sent ahead.
const WINDOW: u16 = 64;
/// And when many are gone through.
const AHEAD: u16 = 512;
/// What the clocks of two replicas may differ by.
const SKEW: SignedDuration = SignedDuration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Past {
    pub pushed: Counter,
    /// The session, and where it found the first record that is still kept: the next search begins there.
    first: Mutex<(u64, u64)>,
}

impl Past {
    /// As [`crate::Queue::history`].
    pub async fn list(
        &self,
        core: &Core,
        (from, until): (Timestamp, Timestamp),
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Kept>, Error> {
        let Some(begin) = begin(core) else { return Ok(vec![]) };
        let from = from.max(begin);
        if limit == 0 || from >= until {
            return Ok(vec![]);
        }
        let session = core.session()?;
        let end = self.pushed.total(&session, &core.topology.history()).await?.end;
        let place = match after.and_then(|after| after.parse::<u64>().ok()) {
            Some(after) => Some(after.saturating_add(1)),
            None => first_since(core, &session, less(from, SKEW), 0, end).await?.map(|(number, _)| number),
        };
        let Some(place) = place.filter(|place| *place < end) else { return Ok(vec![]) };
        let mut reader = Reader::open(&session, &core.topology.history(), Place::At(place), WINDOW).await?;
        let (mut page, mut bytes) = (Vec::new(), 0);
        while page.len() < limit.min(PAGE) && bytes < PAGE_BYTES {
            let record = reader.expect().await?;
            let number = record.number;
            let envelope = record.read(core.now());
            let (message, pushed_at) = (envelope.message, envelope.pushed_at);
            if (from..until).contains(&pushed_at) && message.replay_of.is_none() {
                bytes += message.body.len();
                page.push(Kept { cursor: number.to_string(), message, pushed_at });
            }
            if number + 1 >= end || less(pushed_at, SKEW) >= until {
                break;
            }
        }
        Ok(page)
    }

    /// The ids of what was pushed from then on, or not long before.
    pub async fn ids_since(&self, core: &Core, session: &Arc<Session>, from: Timestamp) -> Result<HashSet<String>, Error> {
        let stream = core.topology.history();
        let end = self.pushed.total(session, &stream).await?.end;
        let mut ids = HashSet::new();
        let Some((first, _)) = first_since(core, session, less(from, SKEW), 0, end).await? else { return Ok(ids) };
        let mut reader = Reader::open(session, &stream, Place::At(first), AHEAD).await?;
        loop {
            let record = reader.expect().await?;
            let number = record.number;
            ids.insert(record.read(core.now()).message.id);
            if number + 1 >= end {
                return Ok(ids);
            }
        }
    }

    /// When the last but so many were pushed (`many` is not 0), or a bit later.
    pub async fn last_but(&self, core: &Core, session: &Arc<Session>, many: u64) -> Result<Option<Timestamp>, Error> {
        let stream = core.topology.history();
        let end = self.pushed.total(session, &stream).await?.end;
        if end == 0 {
            return Ok(None);
        }
        let mut reader = Reader::open(session, &stream, Place::At(end.saturating_sub(many)), 1).await?;
        Ok(Some(reader.expect().await?.read(core.now()).pushed_at))
    }

    /// How far back [`Past::list`] reaches, with the stream ending before that number. The broker's own numbers count as well:
    /// one in a segment.
    pub async fn reach(&self, core: &Core, session: &Arc<Session>, end: u64) -> Result<Option<History>, Error> {
        let Some(begin) = begin(core) else { return Ok(None) };
        let (of, known) = *lock(&self.first);
        let known = if of == session.number { known } else { 0 };
        let found = first_since(core, session, begin, known, end).await?;
        *lock(&self.first) = (session.number, found.map_or(end, |(first, _)| first));
        Ok(Some(found.map_or_else(History::default, |(first, oldest)| History { oldest: Some(oldest), messages: end - first })))
    }
}

/// What was pushed before this is not kept; `None` if nothing is.
fn begin(core: &Core) -> Option<Timestamp> {
    let history = core.options.history;
    (history > Duration::ZERO).then(|| less(core.now(), SignedDuration::try_from(history).unwrap_or(SignedDuration::MAX)))
}

fn less(time: Timestamp, span: SignedDuration) -> Timestamp {
    time.checked_sub(span).unwrap_or(Timestamp::MIN)
}

/// The first record of `low..high` that was pushed at that time or later, and when: looked for by halves.
async fn first_since(
    core: &Core,
    session: &Arc<Session>,
    time: Timestamp,
    mut low: u64,
    mut high: u64,
) -> Result<Option<(u64, Timestamp)>, Error> {
    let stream = core.topology.history();
    let (mut found, mut middle) = (None, low);
    while low < high {
        let mut reader = Reader::open(session, &stream, Place::At(middle), 1).await?;
        let record = reader.expect().await?;
        let number = record.number;
        let pushed_at = record.read(core.now()).pushed_at;
        if pushed_at >= time {
            found = Some((number, pushed_at));
            if middle == low {
                break;
            }
            high = middle;
        } else {
            low = number + 1;
        }
        middle = low + high.saturating_sub(low) / 2;
    }
    Ok(found)
}
