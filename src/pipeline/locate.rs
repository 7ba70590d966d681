//! What the registry says of the pushes of one digest: the image is asked for with the first tag, and of the others what they
//! name.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::Error;
use crate::{
    clock::Clock,
    event::{self, PushEvent},
    oci::Tag,
    outcome::Skip,
    registry::{self, Registry},
    subject::{self, Children, Image, Located, TagState},
};

/// How long after its event a push may still be on its way into the registry.
const SETTLING: Duration = Duration::from_secs(5);
/// Waits before each look for a push that is on its way. What is not there then goes back to the queue.
const LOOKS_AFTER: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(300)];
/// Tags that are looked up at once.
pub(super) const TAGS_AT_ONCE: usize = 4;

/// What the pushes name.
pub struct Looked {
    /// None if it is not there, or nothing to sign.
    pub image: Option<Image>,
    /// When the first of the tags was resolved.
    pub asked: Instant,
    /// Of each push, in order.
    pub seen: Vec<Result<Seen, Error>>,
}

/// What one push names.
#[derive(Debug, Clone)]
pub enum Seen {
    Image(TagState),
    Nothing(Skip),
}

/// Asks the registry for what these events, all of one digest, name.
///
/// docker-registry tells of a push before it lets the tag name it, and others take a while to serve everywhere what
/// was stored. So while an event is young, "not there" and "elsewhere" are asked again before they are believed.
pub async fn locate(registry: &Registry, events: &[&PushEvent], clock: &Clock) -> Looked {
    let mut seen = vec![];
    let (asked, found) = find(registry, events, clock, &mut seen).await;
    let others = &events[seen.len()..];
    let mut image = None;
    match found {
        Ok(Some(Located::Image(found))) => {
            seen.extend(tags(registry, others, &found.tag, clock).await);
            image = Some(found);
        }
        Ok(Some(Located::Attachment)) => seen.extend(others.iter().map(|_| Ok(Seen::Nothing(Skip::Attachment)))),
        Ok(Some(Located::Missing)) => {
            let nothing = || Ok(Seen::Nothing(Skip::NotFound));
            seen.extend(others.iter().map(|event| if is_believed(event, clock) { nothing() } else { Err(Error::Unsettled) }));
        }
        Ok(None) => {}
        Err(error) => {
            let error = Arc::new(error);
            seen.extend(others.iter().map(|_| Err(Error::Shared(error.clone()))));
        }
    }
    Looked { image, asked, seen }
}

/// The image, asked for with the tag of the first event whose tag does not keep it from being read; those before fail, each by
/// its own. None if all did.
async fn find(
    registry: &Registry,
    events: &[&PushEvent],
    clock: &Clock,
    failed: &mut Vec<Result<Seen, Error>>,
) -> (Instant, Result<Option<Located>, Error>) {
    let mut asked = Instant::now();
    let mut missing = None;
    for wait in LOOKS_AFTER {
        tokio::time::sleep(wait).await;
        while let Some(first) = events.get(failed.len()) {
            asked = Instant::now();
            let located = subject::locate(registry, &first.repository, first.tag.as_ref(), &first.digest, Children::Signed);
            match located.await {
                Ok(Located::Missing) => {
                    missing = Some(Located::Missing);
                    break;
                }
                Ok(found) => return (asked, Ok(Some(found))),
                Err(error) if is_of_all(&error) => return (asked, Err(error.into())),
                // The tag may name by now what cannot be read, and the others' do not.
                Err(error) => failed.push(Err(error.into())),
            }
        }
        if events[failed.len()..].iter().all(|event| is_believed(event, clock)) {
            break;
        }
    }
    (asked, Ok(missing.filter(|_| failed.len() < events.len())))
}

/// Whether the registry would answer the same whatever it is asked.
fn is_of_all(error: &subject::Error) -> bool {
    use registry::Error::{Denied, Throttled, Unauthorized, Unreachable};
    let subject::Error::Registry(error) = error else { return false };
    matches!(error, Unreachable { .. } | Throttled { .. } | Unauthorized { .. } | Denied { .. })
}

/// What the tags of these events name, the first of which has been seen with the image.
async fn tags(registry: &Registry, events: &[&PushEvent], first: &TagState, clock: &Clock) -> Vec<Result<Seen, Error>> {
    // Of pushes of one tag the last is the one that may still be on its way.
    let mut last: HashMap<&Tag, &PushEvent> = HashMap::new();
    for event in events {
        if let Some(tag) = &event.tag {
            let known = last.entry(tag).or_insert(event);
            if event.received_at > known.received_at {
                *known = event;
            }
        }
    }
    let looks: Vec<_> = last
        .into_iter()
        .map(|(tag, event)| async move {
            let is_first = matches!(first, TagState::Current(seen) | TagState::Moved(seen) if seen == tag);
            let state = if is_first && (matches!(first, TagState::Current(_)) || is_believed(event, clock)) {
                Ok(first.clone())
            } else {
                look(registry, event, tag, clock).await
            };
            (tag, state.map_err(Arc::new))
        })
        .collect();
    let states: HashMap<_, _> = stream::iter(looks).buffer_unordered(TAGS_AT_ONCE).collect().await;
    let of = |event: &PushEvent| match event.tag.as_ref().map(|tag| &states[tag]) {
        None => Ok(Seen::Image(TagState::None)),
        Some(Ok(state)) => Ok(Seen::Image(state.clone())),
        Some(Err(error)) => Err(Error::Shared(error.clone())),
    };
    events.iter().map(|event| of(event)).collect()
}

/// Whether the tag names the digest of this event, which is there.
async fn look(registry: &Registry, event: &PushEvent, tag: &Tag, clock: &Clock) -> Result<TagState, Error> {
    for wait in LOOKS_AFTER {
        tokio::time::sleep(wait).await;
        if registry.resolve(&event.repository, tag).await?.as_ref() == Some(&event.digest) {
            return Ok(TagState::Current(tag.clone()));
        }
        if is_believed(event, clock) {
            return Ok(TagState::Moved(tag.clone()));
        }
    }
    Err(Error::Unsettled)
}

/// Whether what is not there for this event now will not come any more.
fn is_believed(event: &PushEvent, clock: &Clock) -> bool {
    let age = Duration::try_from(clock.now().duration_since(event.received_at)).unwrap_or_default();
    age >= SETTLING || event.source == event::BY_HAND
}
