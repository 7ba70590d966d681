//! The administrator's API, from the running daemon or, when none runs, from the files themselves.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, anyhow};
use axum::{Router, body::Body};
use serde::{Serialize, de::DeserializeOwned};
use tower::ServiceExt as _;

use super::Usage;
use crate::admin::socket_path;

/// Answers larger than this are not ours.
const LARGEST_ANSWER: usize = 64 * 1024 * 1024;

/// Whoever serves [`crate::admin::router`].
#[derive(Debug)]
pub enum Client {
    Daemon(reqwest::Client),
    Here(Router),
}

impl Client {
    /// The daemon of this state folder, if one answers on its socket.
    pub async fn daemon(state: &Path) -> anyhow::Result<Option<Self>> {
        let socket = socket_path(state);
        match tokio::net::UnixStream::connect(&socket).await {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => {
                return Err(anyhow!(error).context(format!(
                    "{}: the daemon's socket cannot be used; run this as the daemon's user",
                    socket.display()
                )));
            }
        }
        let client = reqwest::Client::builder()
            .unix_socket(socket)
            .connect_timeout(Duration::from_secs(2))
            .timeout(Duration::from_secs(180))
            .build()
            .context("cannot build the client of the daemon's socket")?;
        Ok(Some(Self::Daemon(client)))
    }

    pub async fn get<Q: Serialize, T: DeserializeOwned>(&self, path: &str, query: &Q) -> anyhow::Result<T> {
        let query = serde_urlencoded::to_string(query).context("cannot encode the question")?;
        self.ask(http::Method::GET, &format!("{path}?{query}"), None).await
    }

    pub async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> anyhow::Result<T> {
        self.ask(http::Method::POST, path, Some(serde_json::to_vec(body)?)).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: http::Method,
        path_and_query: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<T> {
        let (status, answer) = match self {
            Self::Daemon(client) => {
                let request = client.request(method, format!("http://localhost{path_and_query}"));
                let request = match body {
                    Some(body) => request.header(http::header::CONTENT_TYPE, "application/json").body(body),
                    None => request,
                };
                let response = request.send().await.context("the daemon does not answer")?;
                (response.status(), response.bytes().await.context("the daemon's answer broke off")?)
            }
            Self::Here(router) => {
                let request = http::Request::builder().method(method).uri(path_and_query);
                let request = match body {
                    Some(body) => request.header(http::header::CONTENT_TYPE, "application/json").body(Body::from(body)),
                    None => request.body(Body::empty()),
                };
                let Ok(response) = router.clone().oneshot(request?).await;
                (response.status(), axum::body::to_bytes(response.into_body(), LARGEST_ANSWER).await?)
            }
        };
        if status.is_success() {
            return serde_json::from_slice(&answer)
                .context("the answer is not of this version; is the daemon older or newer than this command?");
        }
        let problem: serde_json::Value = serde_json::from_slice(&answer).unwrap_or_default();
        let text = |key: &str| problem.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
        let detail = text("detail").or(text("title")).unwrap_or_else(|| String::from_utf8_lossy(&answer).into_owned());
        Err(if status == http::StatusCode::BAD_REQUEST { Usage(detail).into() } else { anyhow!(detail) })
    }
}
