//! The daemon that signs, asked whether an image is still to be signed.

use std::{fmt, path::PathBuf, time::Duration};

use jiff::Timestamp;
use reqwest::Url;

use crate::{
    admin::{Story, StoryRequest},
    oci::Reference,
    outcome::Outcome,
};

/// An answer about one image is some kilobytes.
const LARGEST_ANSWER: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(2);

/// The API of a daemon.
pub struct Daemon {
    base: Url,
    client: reqwest::Client,
}

/// An image that is still to be signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// How long its push is ago.
    pub seconds: i64,
}

impl fmt::Display for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pushed {} s ago, being signed: retry", self.seconds)
    }
}

impl Daemon {
    /// `url` is `http://…`, `https://…` or `unix:///path/of/countersign.sock`.
    pub fn new(url: &Url) -> Result<Self, reqwest::Error> {
        let builder =
            reqwest::Client::builder().connect_timeout(PATIENCE).timeout(PATIENCE).redirect(reqwest::redirect::Policy::none());
        let (builder, base) = if url.scheme() == "unix" {
            let base = "http://localhost/".parse().expect("it is a URL");
            (builder.no_proxy().unix_socket(PathBuf::from(url.path())), base)
        } else {
            (builder, url.clone())
        };
        Ok(Self { base, client: builder.build()? })
    }

    /// Whether the image's push waits to be signed. None if not, and also if the daemon does not answer: it only says more.
    pub async fn pending(&self, image: &Reference, now: Timestamp) -> Option<Pending> {
        let story = self.story(image).await.inspect_err(|error| {
            tracing::debug!(error = error as &dyn std::error::Error, "the daemon could not be asked");
        });
        pending(&story.ok()??, now)
    }

    async fn story(&self, image: &Reference) -> Result<Option<Story>, reqwest::Error> {
        let request = StoryRequest {
            registry: image.registry.clone(),
            repository: image.repository.clone(),
            tag: image.tag.clone(),
            digest: image.digest.clone(),
        };
        let Ok(query) = serde_urlencoded::to_string(request) else { return Ok(None) };
        let mut url = self.base.clone();
        url.set_path(&format!("{}/api/v1/story", self.base.path().trim_end_matches('/')));
        url.set_query(Some(&query));
        let mut response = self.client.get(url).send().await?.error_for_status()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if body.len() + chunk.len() > LARGEST_ANSWER {
                return Ok(None);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(serde_json::from_slice(&body).ok())
    }
}

fn pending(story: &Story, now: Timestamp) -> Option<Pending> {
    let queued = story.queued.iter().map(|event| event.accepted_at).max();
    let retried = || story.events.first().filter(|event| event.outcome == Outcome::Retrying).map(|event| event.concluded_at);
    let since = queued.or_else(retried)?;
    Some(Pending { seconds: now.duration_since(since).as_secs().max(0) })
}

impl fmt::Debug for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Daemon({})", self.base)
    }
}
