//! What an administrator can ask of the queue, the ledger and the pipeline: one API, whoever serves it.
//!
//! The daemon serves it on a socket in the state folder, which only its own user can open. When no daemon runs, the
//! command line serves it to itself, on the files. So each command is written once, against these routes.

mod dead;
mod past;
mod select;

use std::{fmt, path::Path, sync::Arc};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    routing::{get, post},
};
use jiff::Timestamp;
use queue::{Partition, Queue, Stats};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Clock,
    event::{self, PushEvent},
    http::Problem,
    kms::Algorithm,
    ledger::{EventRecord, Ledger, SignatureRecord, StoryQuery, Sums},
    oci::{Digest, RegistryName, Repository, Tag},
    outcome::Verdict,
    pipeline::Pipeline,
    rule::Rules,
    witness,
};

pub use self::{
    dead::{DeadLetterView, DeadPage, DeadQuery, Ids, Moved},
    past::{PastPage, PastQuery, PastView},
    select::Filter,
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
    /// The configured rules; where there is a pipeline, its own are in force instead.
    pub rules: Arc<Rules>,
    pub clock: Clock,
}

impl Admin {
    fn with_rules<T>(&self, ask: impl FnOnce(&Rules) -> T) -> T {
        match &self.pipeline {
            Some(pipeline) => ask(&pipeline.setup().rules),
            None => ask(&self.rules),
        }
    }
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
    /// What can be run again; absent if nothing is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryView>,
    /// Of what is ready or in flight, where the queue has partitions: those of the configured number, and of others as long as
    /// there is something in them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub partitions: Vec<PartitionView>,
}

impl QueueStatus {
    fn new(stats: Stats, sums: &Sums, now: Timestamp) -> Self {
        let age = |oldest: Option<Timestamp>| oldest.map(|oldest| now.duration_since(oldest).as_secs().max(0));
        let partition = |partition: Partition| PartitionView {
            oldest_seconds: age(partition.oldest),
            name: partition.name,
            holder: partition.holder,
            ready: partition.ready,
            in_flight: partition.in_flight,
        };
        Self {
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
            oldest_seconds: age(stats.oldest),
            history: stats.history.map(|history| HistoryView { oldest: history.oldest, events: history.messages }),
            partitions: stats.partitions.into_iter().map(partition).collect(),
        }
    }
}

/// What is in one partition.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PartitionView {
    /// `8.3`: the fourth of eight.
    pub name: String,
    /// The replica that its messages come to. The broker does not say: until the first one has, it is the one whose share it is.
    pub holder: Option<String>,
    pub ready: u64,
    pub in_flight: u64,
    /// How long the oldest that its holder has has been in the queue.
    pub oldest_seconds: Option<i64>,
}

/// What is kept of the past.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HistoryView {
    /// When the oldest event that is kept was accepted.
    pub oldest: Option<Timestamp>,
    /// About how many are kept.
    pub events: u64,
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

/// As an image reference.
impl fmt::Display for ImageView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        write!(f, "@{}", self.digest)
    }
}

impl From<PushEvent> for ImageView {
    fn from(event: PushEvent) -> Self {
        let PushEvent { source, registry, repository, tag, digest, .. } = event;
        Self { source, registry, repository, tag, digest }
    }
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

/// `GET /api/v1/witnesses`: those whose key is open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WitnessView {
    pub name: String,
    /// What the KMS calls the key.
    pub resolved: String,
    /// PEM.
    pub public_key: String,
    /// Those that its KMS signs with, which may be fewer than the kind of key allows.
    pub algorithms: Vec<Algorithm>,
    #[serde(flatten)]
    pub status: witness::Status,
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
    /// Accepted, and not tried yet.
    #[serde(default)]
    pub queued: Vec<PastView>,
}

/// The routes of the administrator's API.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/api/v1/queue", get(status))
        .route("/api/v1/queue/dead", get(dead::list))
        .route("/api/v1/queue/replay", post(dead::replay))
        .route("/api/v1/queue/discard", post(dead::discard))
        .route("/api/v1/queue/past", get(past::list))
        .route("/api/v1/queue/past/replay", post(past::replay))
        .route("/api/v1/story", get(story))
        .route("/api/v1/sign", post(sign))
        .route("/api/v1/witnesses", get(witnesses))
        .with_state(admin)
}

async fn status(State(admin): State<Admin>) -> Result<Json<QueueStatus>, Problem> {
    let stats = admin.queue.stats().await.map_err(unavailable)?;
    let sums = admin.ledger.sums().await.map_err(unavailable)?;
    Ok(Json(QueueStatus::new(stats, &sums, admin.clock.now())))
}

async fn witnesses(State(admin): State<Admin>) -> Result<Json<Vec<WitnessView>>, Problem> {
    let setup = admin.pipeline.ok_or_else(|| unavailable(NoPipeline))?.setup();
    let mut views: Vec<_> = setup
        .witnesses
        .values()
        .map(|witness| WitnessView {
            name: witness.name().to_owned(),
            resolved: witness.resolved_key().to_owned(),
            public_key: witness.public_key().to_pem(),
            algorithms: Algorithm::ALL.into_iter().filter(|algorithm| witness.allows(*algorithm)).collect(),
            status: witness.status(),
        })
        .collect();
    views.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Json(views))
}

async fn story(State(admin): State<Admin>, Query(request): Query<StoryRequest>) -> Result<Json<Story>, Problem> {
    const NEWEST: u32 = 20;
    let queued = past::untried(&admin, &request).await?;
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
    Ok(Json(Story { events, signatures, queued }))
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
