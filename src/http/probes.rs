use std::{fmt, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use futures::future::{BoxFuture, join_all};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use super::Problem;

/// What one check may take.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long an answer stands, so that probes cannot hammer a registry.
const FRESH: Duration = Duration::from_secs(1);

/// A named question, which is asked when it is polled.
pub type Check = (String, BoxFuture<'static, Result<(), String>>);
type Source = Box<dyn Fn() -> Vec<Check> + Send + Sync>;
type Note = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// Whether this process can do its work, as named checks say.
#[derive(Default)]
pub struct Readiness {
    sources: Vec<Source>,
    notes: Vec<(String, Note)>,
    last: Mutex<Option<Results>>,
}

/// What the checks said, in their order.
struct Results {
    at: Instant,
    each: Vec<(String, Result<(), String>)>,
}

impl Readiness {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a check. Its reason for failing is shown to whoever may probe: it must hold no secret. It is dropped, and has
    /// failed, after two seconds.
    #[must_use]
    pub fn check<F, R>(self, name: impl Into<String>, check: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = Result<(), String>> + Send + 'static,
    {
        let name = name.into();
        self.checks(move || vec![(name.clone(), Box::pin(check()))])
    }

    /// Adds checks that may be others at each probe, as the configuration that is in force has them. Else as [`Self::check`].
    #[must_use]
    pub fn checks(mut self, checks: impl Fn() -> Vec<Check> + Send + Sync + 'static) -> Self {
        self.sources.push(Box::new(checks));
        self
    }

    /// What is to be known of a check even while it is ok: its member `note`, where there is something.
    #[must_use]
    pub fn note(mut self, check: impl Into<String>, note: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.notes.push((check.into(), Box::new(note)));
        self
    }

    /// `/livez`: 200 while requests are answered at all. `/readyz`: 200, or 503 as a problem document; in both the member
    /// `checks` has each check's name, whether it is `ok`, and the `reason` if it is not.
    pub fn router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/livez", get(async || Json(json!({ "status": "alive" }))))
            .route("/readyz", get(async |State(readiness): State<Arc<Self>>| readiness.answer().await))
            .with_state(self)
    }

    async fn answer(&self) -> Response {
        // Held while the checks run: who comes meanwhile waits for the same result.
        let mut last = self.last.lock().await;
        let results = match &*last {
            Some(Results { at, each }) if at.elapsed() < FRESH => each,
            _ => {
                let each = join_all(self.sources.iter().flat_map(|source| source()).map(run)).await;
                &last.insert(Results { at: Instant::now(), each }).each
            }
        };
        let checks: Vec<Value> = results
            .iter()
            .map(|(name, result)| {
                let mut check = match result {
                    Ok(()) => json!({ "name": name, "ok": true }),
                    Err(reason) => json!({ "name": name, "ok": false, "reason": reason }),
                };
                let note = self.notes.iter().find(|(of, _)| of == name).and_then(|(_, note)| note());
                if let Some(note) = note {
                    check["note"] = note.into();
                }
                check
            })
            .collect();
        if results.iter().all(|(_, result)| result.is_ok()) {
            return Json(json!({ "status": "ready", "checks": checks })).into_response();
        }
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not ready").with("checks", checks).into_response()
    }
}

async fn run((name, check): Check) -> (String, Result<(), String>) {
    let result = timeout(DEADLINE, check).await;
    (name, result.unwrap_or_else(|_| Err(format!("no answer within {} s", DEADLINE.as_secs()))))
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("sources", &self.sources.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use axum::body::Body;
    use http::{Request, header};
    use http_body_util::BodyExt;
    use tokio::sync::Barrier;
    use tower::ServiceExt;

    use super::*;

    async fn probe(readiness: &Arc<Readiness>, path: &str) -> (StatusCode, Value) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = Arc::clone(readiness).router().oneshot(request).await.unwrap();
        let status = response.status();
        let kind = response.headers()[header::CONTENT_TYPE].clone();
        assert_eq!(kind, if status.is_success() { "application/json" } else { "application/problem+json" });
        (status, serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap())
    }

    #[tokio::test]
    async fn ready_is_when_every_check_says_so() {
        let readiness = Arc::new(Readiness::new().check("queue", async || Ok(())).check("keys", async || Ok(())));
        let (status, body) = probe(&readiness, "/readyz").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(body["checks"], json!([{ "name": "queue", "ok": true }, { "name": "keys", "ok": true }]));

        let readiness =
            Arc::new(Readiness::new().check("queue", async || Ok(())).check("keys", async || Err("no answer".to_owned())));
        let (status, body) = probe(&readiness, "/readyz").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(
            body["checks"],
            json!([{ "name": "queue", "ok": true }, { "name": "keys", "ok": false, "reason": "no answer" }])
        );
        assert_eq!(probe(&readiness, "/livez").await.0, StatusCode::OK, "alive all the same");
    }

    #[tokio::test(start_paused = true)]
    async fn checks_follow_what_is_in_force() {
        let names = Arc::new(std::sync::Mutex::new(vec!["old"]));
        let current = Arc::clone(&names);
        let check = |name: &&str| -> Check { ((*name).to_owned(), Box::pin(async { Ok(()) })) };
        let readiness = Arc::new(Readiness::new().checks(move || current.lock().unwrap().iter().map(check).collect()));
        assert_eq!(probe(&readiness, "/readyz").await.1["checks"], json!([{ "name": "old", "ok": true }]));
        *names.lock().unwrap() = vec!["new", "newer"];
        tokio::time::advance(FRESH).await;
        assert_eq!(probe(&readiness, "/readyz").await.1["checks"][1], json!({ "name": "newer", "ok": true }));
    }

    #[tokio::test(start_paused = true)]
    async fn checks_run_beside_each_other() {
        let barrier = Arc::new(Barrier::new(2));
        let meet = move || {
            let barrier = Arc::clone(&barrier);
            async move {
                barrier.wait().await;
                Ok(())
            }
        };
        let readiness = Arc::new(Readiness::new().check("one", meet.clone()).check("other", meet));
        assert_eq!(probe(&readiness, "/readyz").await.0, StatusCode::OK);
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_hangs_has_failed_after_two_seconds() {
        let readiness = Arc::new(Readiness::new().check("registry", std::future::pending));
        let start = Instant::now();
        assert_eq!(probe(&readiness, "/readyz").await.1["checks"][0]["reason"], "no answer within 2 s");
        assert_eq!(start.elapsed().as_secs(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn probes_within_a_second_share_one_answer() {
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&runs);
        let readiness = Arc::new(Readiness::new().check("registry", move || {
            counted.fetch_add(1, SeqCst);
            async { Ok(()) }
        }));
        for _ in 0..10 {
            futures::future::join(probe(&readiness, "/readyz"), probe(&readiness, "/readyz")).await;
        }
        assert_eq!(runs.load(SeqCst), 1);
        tokio::time::advance(FRESH).await;
        probe(&readiness, "/readyz").await;
        assert_eq!(runs.load(SeqCst), 2);
    }
}
