//! A gateway in front of a KMS that speaks as AWS does: it counts what is asked, allows only so much a second, and can be made to
//! bring wrong answers. Whatever it lets through the KMS behind it checks and answers itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::process::http_client;

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Passed,
    Throttled,
    /// Its answer was made a wrong one.
    Spoilt,
}

/// One call, by its operation: `Sign`.
#[derive(Debug, Clone)]
pub struct Call {
    pub operation: String,
    pub at: Instant,
    pub fate: Fate,
}

#[derive(Debug)]
pub struct Gate {
    port: u16,
    desk: Arc<Desk>,
    _server: JoinSet<()>,
}

#[derive(Debug)]
struct Desk {
    target: String,
    http: reqwest::Client,
    state: Mutex<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    quota: Option<Quota>,
    spoils: bool,
    calls: Vec<Call>,
}

/// A bucket of a second's calls, refilled evenly.
#[derive(Debug)]
struct Quota {
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Quota {
    fn allows(&mut self) -> bool {
        let now = Instant::now();
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * self.per_second).min(self.per_second);
        self.at = now;
        let allows = self.left >= 1.0;
        self.left -= f64::from(u8::from(allows));
        allows
    }
}

impl Gate {
    /// In front of `target` (`host:port`).
    pub async fn start(target: &str) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("bind the gate")?;
        let port = listener.local_addr()?.port();
        let desk = Arc::new(Desk { target: target.to_owned(), http: http_client()?, state: Mutex::default() });
        let router = Router::new().fallback(pass).with_state(Arc::clone(&desk));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("serving ends with its task only") });
        Ok(Self { port, desk, _server: server })
    }

    /// `127.0.0.1:PORT`
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// From now on so many signatures a second; what is asked beyond is throttled as AWS documents it.
    pub fn limit(&self, per_second: u32) {
        let per_second = f64::from(per_second);
        self.desk.state().quota = Some(Quota { per_second, left: per_second, at: Instant::now() });
    }

    /// From now on, or no longer: a bit of each signature is turned, and signatures that are to be verified are called wrong.
    pub fn spoil(&self, spoils: bool) {
        self.desk.state().spoils = spoils;
    }

    /// What was asked so far.
    pub fn calls(&self, operation: &str) -> Vec<Call> {
        self.desk.state().calls.iter().filter(|call| call.operation == operation).cloned().collect()
    }
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, Rules> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judge(&self, operation: &str) -> Fate {
        let mut state = self.state();
        let throttled = operation == "Sign" && state.quota.as_mut().is_some_and(|quota| !quota.allows());
        let fate = match operation {
            _ if throttled => Fate::Throttled,
            "Sign" | "Verify" if state.spoils => Fate::Spoilt,
            _ => Fate::Passed,
        };
        state.calls.push(Call { operation: operation.to_owned(), at: Instant::now(), fate });
        fate
    }
}

async fn pass(State(desk): State<Arc<Desk>>, request: Request) -> Response {
    let target = request.headers().get("x-amz-target").and_then(|target| target.to_str().ok()).unwrap_or_default();
    let operation = target.rsplit('.').next().unwrap_or_default().to_owned();
    let fate = desk.judge(&operation);
    match (fate, operation.as_str()) {
        (Fate::Throttled, _) => {
            let words = "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.";
            refuse("ThrottlingException", words)
        }
        (Fate::Spoilt, "Verify") => refuse("KMSInvalidSignatureException", ""),
        (fate, _) => match ask(&desk, request).await {
            Ok((status, body)) if fate == Fate::Spoilt => answer(status, spoilt(&body)),
            Ok((status, body)) => answer(status, body),
            Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
        },
    }
}

/// With the headers as they came, the host's too: they are signed.
async fn ask(desk: &Desk, request: Request) -> Result<(StatusCode, Vec<u8>)> {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await?;
    let sent = desk.http.request(head.method, format!("http://{}{}", desk.target, head.uri)).headers(head.headers).body(body);
    let response = sent.timeout(Duration::from_secs(30)).send().await?;
    Ok((response.status(), response.bytes().await?.to_vec()))
}

fn spoilt(body: &[u8]) -> Vec<u8> {
    let Ok(mut answer) = serde_json::from_slice::<Value>(body) else { return body.to_vec() };
    let Some(Ok(mut signature)) = answer["Signature"].as_str().map(|text| STANDARD.decode(text)) else { return body.to_vec() };
    if let Some(last) = signature.last_mut() {
        *last ^= 1;
    }
    answer["Signature"] = STANDARD.encode(signature).into();
    answer.to_string().into_bytes()
}

fn refuse(code: &str, message: &str) -> Response {
    answer(StatusCode::BAD_REQUEST, json!({"__type": code, "message": message}).to_string().into_bytes())
}

fn answer(status: StatusCode, body: Vec<u8>) -> Response {
    let typed = Response::builder().status(status).header("content-type", "application/x-amz-json-1.1");
    typed.body(Body::from(body)).expect("a status and a type make an answer")
}
