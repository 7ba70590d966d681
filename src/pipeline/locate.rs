//! What the registry says of the pushes of one digest: the image is asked for once, and each tag once.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::Error;
use crate::{
    clock::Clock,
    event::{self, PushEvent},
    oci::Tag,
    outcome::Skip,
    registry::Registry,
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
    pub found: Vec<Result<Found, Error>>,
}

/// What became of one push.
#[derive(Debug, Clone)]
pub enum Found {
    /// The image is there.
    Image(TagState),
    Nothing(Skip),
}

/// Asks the registry for what these events, all of one digest, name.
///
/// docker-registry tells of a push before it lets the tag name it, and others take a while to serve everywhere what
/// was stored. So while an event is young, "not there" and "elsewhere" are asked again before they are believed.
pub async fn locate(registry: &Registry, events: &[&PushEvent], clock: &Clock) -> Looked {
    let mut looked = Looked { image: None, asked: Instant::now(), found: vec![] };
    for event in events {
        match first(registry, event, clock).await {
            Ok((asked, Located::Image(image))) => {
                looked.asked = asked;
                looked.found.push(Ok(Found::Image(image.tag.clone())));
                looked.image = Some(image);
                break;
            }
            Ok((_, Located::Attachment)) => {
                looked.found.resize_with(events.len(), || Ok(Found::Nothing(Skip::Attachment)));
                return looked;
            }
            Ok((_, Located::Missing)) => looked.found.push(Ok(Found::Nothing(Skip::NotFound))),
            // It is this push that is on its way: another tag may name the image already.
            Err(error @ Error::Unsettled) => looked.found.push(Err(error)),
            // What the registry does not answer for one it does not for the others.
            Err(error) => {
                let error = Arc::new(error);
                looked.found.resize_with(events.len(), || Err(Error::Shared(error.clone())));
                return looked;
            }
        }
    }
    let (seen, others) = events.split_at(looked.found.len());
    // Of pushes of one tag the last is the one that may still be on its way.
    let mut last: HashMap<&Tag, &PushEvent> = HashMap::new();
    for event in others {
        if let Some(tag) = &event.tag {
            let known = last.entry(tag).or_insert(event);
            if event.received_at > known.received_at {
                *known = event;
            }
        }
    }
    // The image's own tag was asked for with it.
    let own = seen.last().and_then(|event| event.tag.as_ref()).zip(looked.found.last());
    if let Some((tag, Ok(Found::Image(TagState::Current(_))))) = own {
        last.remove(tag);
    }
    let looks =
        last.into_iter().map(|(tag, event)| async move { (tag, of_tag(registry, event, tag, clock).await.map_err(Arc::new)) });
    let looks: Vec<_> = looks.collect();
    let states: HashMap<_, _> = stream::iter(looks).buffer_unordered(TAGS_AT_ONCE).collect().await;
    for event in others {
        looked.found.push(match &event.tag {
            None => Ok(Found::Image(TagState::None)),
            Some(tag) => match states.get(tag) {
                None => Ok(Found::Image(TagState::Current(tag.clone()))),
                Some(Ok(state)) => Ok(Found::Image(state.clone())),
                Some(Err(error)) => Err(Error::Shared(error.clone())),
            },
        });
    }
    looked
}

/// The image that an event names, and when its tag was resolved.
async fn first(registry: &Registry, event: &PushEvent, clock: &Clock) -> Result<(Instant, Located), Error> {
    for wait in LOOKS_AFTER {
        tokio::time::sleep(wait).await;
        let asked = Instant::now();
        let located = subject::locate(registry, &event.repository, event.tag.as_ref(), &event.digest, Children::Signed).await?;
        let is_settled = match &located {
            Located::Image(image) => !matches!(image.tag, TagState::Moved(_)),
            Located::Attachment => true,
            Located::Missing => false,
        };
        if is_settled || is_believed(event, clock) {
            return Ok((asked, located));
        }
    }
    Err(Error::Unsettled)
}

/// Whether the tag names the digest of this event, which is there.
async fn of_tag(registry: &Registry, event: &PushEvent, tag: &Tag, clock: &Clock) -> Result<TagState, Error> {
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
