//! Dead letters: listed, put back, dropped.

use std::collections::HashMap;

use axum::{
    Json,
    extract::{Query, State},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use queue::DeadLetter;
use serde::{Deserialize, Serialize};

use super::{
    Admin, ImageView,
    select::{Filter, Selector},
    unavailable,
};
use crate::{
    event::{self, PushEvent},
    http::Problem,
};

/// Dead letters that one request looks at, at most.
const LARGEST_PAGE: usize = 1000;
/// Dead letters of one request that are moved at the same time, so that they share syncs.
const AT_ONCE: usize = 64;

/// A dead letter as it is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeadLetterView {
    pub id: String,
    pub kind: String,
    pub reason: String,
    pub pushed_at: Timestamp,
    pub buried_at: Timestamp,
    pub attempts: u32,
    /// The id of the message that it ran again, if it is a replay of the past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_of: Option<String>,
    /// What it is about, if it is a push event.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageView>,
    /// The untouched bytes, base64, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// `GET /api/v1/queue/dead`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DeadQuery {
    /// `next` of the page before.
    pub after: Option<String>,
    /// How many letters to look at.
    pub limit: Option<usize>,
    #[serde(flatten)]
    pub filter: Filter,
}

/// Those that the filter holds of, among the next few: a page may be empty and not be the last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DeadPage {
    pub letters: Vec<DeadLetterView>,
    /// Where the next page begins; absent at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// `POST /api/v1/queue/replay` and `/discard`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ids {
    pub ids: Vec<String>,
}

/// How many of the ids were dead letters, and which were not.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Moved {
    pub done: u64,
    pub unknown: Vec<String>,
}

pub(super) async fn list(State(admin): State<Admin>, Query(query): Query<DeadQuery>) -> Result<Json<DeadPage>, Problem> {
    let selector = Selector::new(&query.filter, &admin)?;
    let limit = query.limit.unwrap_or(LARGEST_PAGE).min(LARGEST_PAGE);
    let letters = admin.queue.dead_letters(query.after.as_deref(), limit).await.map_err(unavailable)?;
    let recorded = if selector.asks_the_ledger() {
        let ids = letters.iter().map(|letter| letter.message.id.clone()).collect();
        admin.ledger.rule_outcomes(ids).await.map_err(unavailable)?
    } else {
        HashMap::new()
    };
    let next = letters.last().map(|letter| letter.message.id.clone());
    let letters = letters.into_iter().filter_map(|letter| {
        let event = event_in(&letter);
        let recorded = recorded.get(&letter.message.id).map(Vec::as_slice);
        selector.holds_of_letter(&letter, event.as_ref(), recorded).then(|| view(letter, event))
    });
    Ok(Json(DeadPage { letters: letters.collect(), next }))
}

fn event_in(letter: &DeadLetter) -> Option<PushEvent> {
    let is_event = letter.message.content_type == event::CONTENT_TYPE;
    is_event.then(|| PushEvent::from_cloud_event(&letter.message.body).ok()).flatten()
}

fn view(letter: DeadLetter, event: Option<PushEvent>) -> DeadLetterView {
    let image = event.map(ImageView::from);
    DeadLetterView {
        id: letter.message.id,
        kind: letter.burial.kind,
        reason: letter.burial.reason,
        pushed_at: letter.pushed_at,
        buried_at: letter.buried_at,
        attempts: letter.attempts,
        replay_of: letter.message.replay_of,
        body: image.is_none().then(|| BASE64_STANDARD.encode(&letter.message.body)),
        image,
    }
}

pub(super) async fn replay(State(admin): State<Admin>, Json(request): Json<Ids>) -> Result<Json<Moved>, Problem> {
    let moves = request.ids.into_iter().map(|id| put_back(admin.clone(), id));
    gather(stream::iter(moves.collect::<Vec<_>>()).buffered(AT_ONCE).collect().await)
}

pub(super) async fn discard(State(admin): State<Admin>, Json(request): Json<Ids>) -> Result<Json<Moved>, Problem> {
    let moves = request.ids.into_iter().map(|id| drop_for_good(admin.clone(), id));
    gather(stream::iter(moves.collect::<Vec<_>>()).buffered(AT_ONCE).collect().await)
}

/// With the id, whether there was such a dead letter.
type Move = Result<(String, bool), Problem>;

async fn put_back(admin: Admin, id: String) -> Move {
    let until = admin.clock.now();
    let is_there = admin.queue.replay(&id).await.map_err(unavailable)?;
    if is_there {
        // It is queued again, so it no longer counts as dead; unless it has died again meanwhile.
        admin.ledger.forget_event_until(&id, until).await.map_err(unavailable)?;
    }
    Ok((id, is_there))
}

async fn drop_for_good(admin: Admin, id: String) -> Move {
    let is_there = admin.queue.discard(&id).await.map_err(unavailable)?;
    Ok((id, is_there))
}

/// All have come to their end: one that failed breaks off none of the others.
fn gather(all: Vec<Move>) -> Result<Json<Moved>, Problem> {
    let mut moved = Moved::default();
    for one in all {
        match one? {
            (_, true) => moved.done += 1,
            (id, false) => moved.unknown.push(id),
        }
    }
    Ok(Json(moved))
}
