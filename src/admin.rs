//! What an administrator can ask of the queue, the ledger and the pipeline: one API, whoever serves it.
//!
//! The daemon serves it on a socket in the state folder, which only its own user can open. When no daemon runs, the
//! command line serves it to itself, on the files. So each command is written once, against these routes.

use std::{path::Path, sync::Arc};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    routing::{get, post},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use queue::{DeadLetter, Queue};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Clock,
    event::{self, PushEvent},
    http::Problem,
    ledger::{EventRecord, Ledger, SignatureRecord, StoryQuery},
    oci::{Digest, RegistryName, Repository, Tag},
    outcome::Verdict,
    pipeline::Pipeline,
};

/// The socket's name in the state folder.
pub const SOCKET: &str = "countersign.sock";

/// Where the daemon of this state folder listens for its administrator.
pub fn socket_path(state: &Path) -> std::path::PathBuf {
    state.join(SOCKET)
}

/// What the routes work on.
#[derive(Clone, Debug)]
pub struct Admin {
    pub queue: Arc<dyn Queue>,
    pub ledger: Ledger,
    /// Absent where only queue and ledger were opened.
    pub pipeline: Option<Arc<Pipeline>>,
    pub clock: Clock,
}

/// Where every event stands. `received = signed + already_signed + skipped + dead + queued`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QueueStatus {
    pub received: u64,
    pub signed: u64,
    pub already_signed: u64,
    pub skipped: u64,
    /// Dead letters, discarded ones included.
    pub dead: u64,
    /// Ready, waiting and in flight.
    pub queued: u64,
    pub ready: u64,
    /// Handed back and not due yet.
    pub waiting: u64,
    pub in_flight: u64,
    /// Dead letters that can be replayed or discarded.
    pub dead_letters: u64,
    /// How long the oldest event that is not done has been here.
    pub oldest_seconds: Option<i64>,
}

/// A dead letter as it is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeadLetterView {
    pub id: String,
    pub kind: String,
    pub reason: String,
    pub pushed_at: Timestamp,
    pub buried_at: Timestamp,
    pub attempts: u32,
    /// What it is about, if it is a push event.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageView>,
    /// The untouched bytes, base64, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// The image of an event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageView {
    pub source: String,
    pub registry: RegistryName,
    pub repository: Repository,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<Tag>,
    pub digest: Digest,
}

/// `GET /api/v1/queue/dead`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Page {
    pub after: Option<String>,
    pub limit: Option<usize>,
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

/// `POST /api/v1/sign`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SignRequest {
    pub registry: RegistryName,
    pub repository: Repository,
    pub tag: Option<Tag>,
    pub digest: Digest,
}

/// What became of one image that was signed by hand.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SignAnswer {
    pub outcome: String,
    pub reason: Option<String>,
    pub rules: Vec<RuleView>,
    pub signatures: Vec<SignatureView>,
    pub error: Option<String>,
    /// Whether trying again unchanged may help.
    pub retry: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RuleView {
    pub rule: String,
    pub outcome: String,
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SignatureView {
    pub witness: String,
    pub format: String,
    pub digest: Digest,
    pub reference: String,
    pub state: String,
}

/// `GET /api/v1/story`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StoryRequest {
    pub registry: RegistryName,
    pub repository: Repository,
    pub tag: Option<Tag>,
    pub digest: Option<Digest>,
}

/// What the ledger and the queue know of an image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Story {
    pub events: Vec<EventRecord>,
    pub signatures: Vec<SignatureRecord>,
}

/// The routes of the administrator's API.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/api/v1/queue", get(status))
        .route("/api/v1/queue/dead", get(dead))
        .route("/api/v1/queue/replay", post(replay))
        .route("/api/v1/queue/discard", post(discard))
        .route("/api/v1/story", get(story))
        .route("/api/v1/sign", post(sign))
        .with_state(admin)
}

async fn status(State(admin): State<Admin>) -> Result<Json<QueueStatus>, Problem> {
    let stats = admin.queue.stats().await.map_err(unavailable)?;
    let sums = admin.ledger.sums().await.map_err(unavailable)?;
    Ok(Json(QueueStatus {
        received: stats.pushed_total,
        signed: sums.signed,
        already_signed: sums.already_signed,
        skipped: sums.skipped,
        dead: sums.dead,
        queued: stats.queued(),
        ready: stats.ready,
        waiting: stats.waiting,
        in_flight: stats.in_flight,
        dead_letters: stats.dead,
        oldest_seconds: stats.oldest.map(|oldest| admin.clock.now().duration_since(oldest).as_secs().max(0)),
    }))
}

async fn dead(State(admin): State<Admin>, Query(page): Query<Page>) -> Result<Json<Vec<DeadLetterView>>, Problem> {
    const LARGEST_PAGE: usize = 1000;
    let limit = page.limit.unwrap_or(LARGEST_PAGE).min(LARGEST_PAGE);
    let letters = admin.queue.dead_letters(page.after.as_deref(), limit).await.map_err(unavailable)?;
    Ok(Json(letters.into_iter().map(view).collect()))
}

fn view(letter: DeadLetter) -> DeadLetterView {
    let event =
        (letter.message.content_type == event::CONTENT_TYPE).then(|| PushEvent::from_cloud_event(&letter.message.body).ok());
    let image = event.flatten().map(|event| ImageView {
        source: event.source,
        registry: event.registry,
        repository: event.repository,
        tag: event.tag,
        digest: event.digest,
    });
    DeadLetterView {
        id: letter.message.id,
        kind: letter.burial.kind,
        reason: letter.burial.reason,
        pushed_at: letter.pushed_at,
        buried_at: letter.buried_at,
        attempts: letter.attempts,
        body: image.is_none().then(|| BASE64_STANDARD.encode(&letter.message.body)),
        image,
    }
}

async fn replay(State(admin): State<Admin>, Json(request): Json<Ids>) -> Result<Json<Moved>, Problem> {
    let mut moved = Moved::default();
    for id in request.ids {
        let until = admin.clock.now();
        if admin.queue.replay(&id).await.map_err(unavailable)? {
            // It is queued again, so it no longer counts as dead; unless it has died again meanwhile.
            admin.ledger.forget_event_until(&id, until).await.map_err(unavailable)?;
            moved.done += 1;
        } else {
            moved.unknown.push(id);
        }
    }
    Ok(Json(moved))
}

async fn discard(State(admin): State<Admin>, Json(request): Json<Ids>) -> Result<Json<Moved>, Problem> {
    let mut moved = Moved::default();
    for id in request.ids {
        if admin.queue.discard(&id).await.map_err(unavailable)? {
            moved.done += 1;
        } else {
            moved.unknown.push(id);
        }
    }
    Ok(Json(moved))
}

async fn story(State(admin): State<Admin>, Query(request): Query<StoryRequest>) -> Result<Json<Story>, Problem> {
    const NEWEST: u32 = 20;
    let query = StoryQuery {
        registry: request.registry.clone(),
        repository: request.repository.clone(),
        tag: request.tag,
        digest: request.digest.clone(),
        limit: NEWEST,
    };
    let events = admin.ledger.story(query).await.map_err(unavailable)?;
    let signatures = match request.digest {
        Some(digest) => admin.ledger.signatures(&request.registry, &request.repository, &digest).await.map_err(unavailable)?,
        None => vec![],
    };
    Ok(Json(Story { events, signatures }))
}

async fn sign(State(admin): State<Admin>, Json(request): Json<SignRequest>) -> Result<Json<SignAnswer>, Problem> {
    let pipeline = admin.pipeline.ok_or_else(|| unavailable(NoPipeline))?;
    let now = admin.clock.now();
    let event = PushEvent {
        id: uuid::Uuid::now_v7().to_string(),
        source: event::BY_HAND.into(),
        registry: request.registry,
        repository: request.repository,
        tag: request.tag,
        digest: request.digest,
        pushed_at: now,
        received_at: now,
        actor: None,
    };
    let report = pipeline.sign_by_hand(&event).await.map_err(unavailable)?;
    let error = report.detail();
    let verdict = report.verdict();
    let (outcome, reason) = match &verdict {
        None => {
            let outcome = report.outcome();
            let reason = match outcome {
                crate::outcome::Outcome::Skipped(skip) => Some(skip.reason().to_owned()),
                _ => None,
            };
            (outcome.name(), reason)
        }
        Some(_) => ("failed", None),
    };
    Ok(Json(SignAnswer {
        outcome: outcome.to_owned(),
        reason,
        rules: report
            .rules
            .iter()
            .map(|rule| RuleView {
                rule: rule.rule.clone(),
                outcome: rule.outcome.name().to_owned(),
                reason: rule.detail.clone(),
            })
            .collect(),
        signatures: report
            .signatures
            .iter()
            .map(|signature| SignatureView {
                witness: signature.witness.clone(),
                format: signature.format.to_owned(),
                digest: signature.digest.clone(),
                reference: signature.reference.to_string(),
                state: signature.state.name().to_owned(),
            })
            .collect(),
        error,
        retry: matches!(verdict, Some(Verdict::Retry { .. })),
    }))
}

#[derive(Debug, thiserror::Error)]
#[error("this process opened the queue only, it cannot sign")]
struct NoPipeline;

fn unavailable(error: impl std::error::Error) -> Problem {
    let mut detail = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        detail.push_str(": ");
        detail.push_str(&error.to_string());
        cause = error.source();
    }
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
}

#[cfg(test)]
mod tests;
