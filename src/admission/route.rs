use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::{
    Router,
    extract::{Request as HttpRequest, State},
    response::{IntoResponse, Response as HttpResponse},
    routing::post,
};
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use tokio::time::Instant;

use super::{Counters, Endpoint, Judge, Request, review::timeout_of};
use crate::{
    http::{Problem, collect},
    telemetry::Metrics,
};

/// The webhook's state: what it judges by, replaced as a whole when the configuration is read again.
pub struct Webhook {
    judge: RwLock<Arc<Judge>>,
    /// The most that a review may take.
    patience: Duration,
    counters: Arc<Counters>,
    metrics: Metrics,
}

impl Webhook {
    #[must_use]
    pub fn new(judge: Judge, patience: Duration, metrics: Metrics) -> Self {
        Self { judge: RwLock::new(Arc::new(judge)), patience, counters: Arc::default(), metrics }
    }

    /// What is in force now.
    pub fn judge(&self) -> Arc<Judge> {
        self.judge.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From the next review on. What was remembered is forgotten with the old one.
    pub fn replace(&self, judge: Judge) {
        *self.judge.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(judge);
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// How long a call may take: some of what the API server waits is needed for the way back.
    fn patience(&self, query: Option<&str>) -> Duration {
        let within = |timeout: Duration| timeout.saturating_sub((timeout / 10).max(WAY_BACK).min(timeout / 2));
        timeout_of(query).map_or(self.patience, within).min(self.patience)
    }

    async fn answer(&self, endpoint: Endpoint, request: HttpRequest) -> Result<HttpResponse, Problem> {
        let began = Instant::now();
        let patience = self.patience(request.uri().query());
        let body = collect(request.into_body()).await?;
        let request = Request::parse(&body).map_err(|error| {
            self.counters.malformed();
            Problem::new(StatusCode::BAD_REQUEST, error.to_string())
        })?;
        let judge = self.judge();
        let (decision, response) = judge.review(&request, endpoint, began + patience, patience, &self.counters).await;
        self.metrics.review_answered(endpoint.name(), decision.name(), began.elapsed());
        tracing::debug!(
            uid = &*request.uid,
            namespace = request.namespace,
            kind = request.kind.kind,
            name = request.name,
            decision = decision.name(),
            "reviewed"
        );
        let json = HeaderValue::from_static("application/json");
        Ok(([(CONTENT_TYPE, json)], response.to_json(&request.uid)).into_response())
    }
}

/// Kept back of short time-outs, at least.
const WAY_BACK: Duration = Duration::from_millis(200);

/// `POST /validate` and `POST /mutate`.
pub fn router(webhook: Arc<Webhook>) -> Router {
    let at = |endpoint| {
        post(
            move |State(webhook): State<Arc<Webhook>>, request: HttpRequest| async move { webhook.answer(endpoint, request).await },
        )
    };
    Router::new().route("/validate", at(Endpoint::Validate)).route("/mutate", at(Endpoint::Mutate)).with_state(webhook)
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").field("patience", &self.patience).finish_non_exhaustive()
    }
}
