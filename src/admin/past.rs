//! Events of the past: listed, and run again.
//!
//! To run one again is to push it under an id of its own, with its body as it was. So it is counted as received, it keeps
//! the time of its push (a rule for new images only signs no older ones because of it), and a tag that has moved on since
//! is found to have.

use axum::{
    Json,
    extract::{Query, State},
};
use jiff::Timestamp;
use queue::{Kept, Message};
use serde::{Deserialize, Serialize};

use super::{
    Admin, ImageView, StoryRequest,
    select::{Filter, Selector},
    unavailable,
};
use crate::{
    event::{self, PushEvent},
    http::Problem,
    intake,
};

/// Events that one request looks at, at most.
const LARGEST_PAGE: usize = 1000;

/// `GET /api/v1/queue/past` and `POST /api/v1/queue/past/replay`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PastQuery {
    /// Accepted then or later.
    pub from: Timestamp,
    /// Accepted before.
    pub until: Timestamp,
    /// `next` of the page before.
    pub after: Option<String>,
    /// How many events to look at.
    pub limit: Option<usize>,
    /// How many to find, at most: the page ends with that one.
    pub most: Option<usize>,
    #[serde(flatten)]
    pub filter: Filter,
}

/// Those that the filter holds of, among the next few: a page may be empty and not be the last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PastPage {
    pub events: Vec<PastView>,
    /// When the last one that was looked at was accepted.
    pub reached: Option<Timestamp>,
    /// Where the next page begins; absent at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// An event of the past as it is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PastView {
    pub id: String,
    pub accepted_at: Timestamp,
    #[serde(flatten)]
    pub image: ImageView,
    /// The id under which it was queued again, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replayed_as: Option<String>,
}

pub(super) async fn list(State(admin): State<Admin>, Query(query): Query<PastQuery>) -> Result<Json<PastPage>, Problem> {
    let (page, _) = look(&admin, &query).await?;
    Ok(Json(page))
}

/// Either all of the page is queued again, or none.
pub(super) async fn replay(State(admin): State<Admin>, Json(query): Json<PastQuery>) -> Result<Json<PastPage>, Problem> {
    let (mut page, mut messages) = look(&admin, &query).await?;
    let now = admin.clock.now();
    for (event, message) in page.events.iter_mut().zip(&mut messages) {
        message.replay_of = Some(std::mem::replace(&mut message.id, intake::message_id(now)));
        event.replayed_as = Some(message.id.clone());
    }
    admin.queue.push(messages).await.map_err(unavailable)?;
    Ok(Json(page))
}

/// The events of an image that were accepted and that nothing is on record of yet, oldest first: they wait in the queue, untried.
/// Only as far as the past is kept, and of that the part in which the queued ones were pushed: on a broker, as far as that is known.
pub(super) async fn untried(admin: &Admin, request: &StoryRequest) -> Result<Vec<PastView>, Problem> {
    /// More would keep whoever asks waiting.
    const MOST_PAGES: usize = 500;
    let stats = admin.queue.stats().await.map_err(unavailable)?;
    let Some(oldest) = stats.oldest else { return Ok(vec![]) };
    let is_asked_for = |event: &PushEvent| {
        event.registry == request.registry
            && event.repository == request.repository
            && match (&request.tag, &request.digest) {
                (None, None) => true,
                (tag, digest) => {
                    (tag.is_some() && event.tag == *tag) || digest.as_ref().is_some_and(|digest| event.digest == *digest)
                }
            }
    };
    let (mut found, mut after) = (vec![], None::<String>);
    for _ in 0..MOST_PAGES {
        let page = admin.queue.history(oldest, Timestamp::MAX, after.as_deref(), LARGEST_PAGE).await.map_err(unavailable)?;
        let Some(last) = page.last() else { break };
        after = Some(last.cursor.clone());
        for Kept { message, pushed_at, .. } in page {
            let event = (message.content_type == event::CONTENT_TYPE).then(|| PushEvent::from_cloud_event(&message.body).ok());
            if let Some(event) = event.flatten().filter(is_asked_for) {
                found.push(PastView { id: message.id, accepted_at: pushed_at, image: event.into(), replayed_as: None });
            }
        }
    }
    let ids = found.iter().map(|event| event.id.clone()).collect();
    let on_record = admin.ledger.rule_outcomes(ids).await.map_err(unavailable)?;
    found.retain(|event| !on_record.contains_key(&event.id));
    Ok(found)
}

/// What is shown of the events, and as many messages.
async fn look(admin: &Admin, query: &PastQuery) -> Result<(PastPage, Vec<Message>), Problem> {
    let selector = Selector::new(&query.filter, admin)?;
    let limit = query.limit.unwrap_or(LARGEST_PAGE).clamp(1, LARGEST_PAGE);
    let kept = admin.queue.history(query.from, query.until, query.after.as_deref(), limit).await.map_err(unavailable)?;
    let most = query.most.unwrap_or(LARGEST_PAGE).max(1);
    let (mut page, mut messages) = (PastPage::default(), Vec::new());
    for Kept { message, pushed_at, cursor } in kept {
        page.reached = Some(pushed_at);
        page.next = Some(cursor);
        // What was no event then is none now.
        let event = (message.content_type == event::CONTENT_TYPE).then(|| PushEvent::from_cloud_event(&message.body).ok());
        if let Some(event) = event.flatten().filter(|event| selector.holds_of_event(event)) {
            page.events.push(PastView { id: message.id.clone(), accepted_at: pushed_at, image: event.into(), replayed_as: None });
            messages.push(message);
            if messages.len() == most {
                break;
            }
        }
    }
    Ok((page, messages))
}
