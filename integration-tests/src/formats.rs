//! Signatures of every format, in registries of both kinds: pushing so that countersign hears of it, and what it then finds.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::StatusCode;
use serde_json::Value;

use crate::house::{House, TOKEN};
use crate::image::Image;
use crate::process::eventually;
use crate::registry::Options;

const LIMIT: Duration = Duration::from_secs(60);

/// How the registry lists referrers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Referrers {
    /// By itself: ferro-oci-server.
    Api,
    /// Under the fallback tag that its clients keep: docker-registry.
    FallbackTag,
}

impl Referrers {
    pub fn registry(self) -> Options {
        Options { referrers_api: self == Self::Api, ..Options::default() }
    }

    /// Pushes the image under this tag and lets countersign know, whether or not the registry does.
    pub async fn push(self, house: &House, image: &Image, repository: &str, tag: &str) -> Result<()> {
        house.push(image, repository, &[tag]).await?;
        if self == Self::Api {
            let event = House::event(&house.registry.host(), repository, Some(tag), &image.manifest.digest);
            let status = house.notify(Some(TOKEN), &event).await?;
            ensure!(status == StatusCode::ACCEPTED, "the event got {status}");
        }
        Ok(())
    }
}

/// Format, verdict and witness of a signature.
pub type Found = (String, String, String);

/// A signature of the witness `release` that stands.
pub fn ours(format: &str) -> Found {
    (format.into(), "verified".into(), "release".into())
}

/// The signatures in an answer of `countersign verify`, sorted.
pub fn listed(answer: &Value) -> Result<Vec<Found>> {
    let text = |value: &Value| value.as_str().unwrap_or("nobody").to_owned();
    let signatures = answer[0]["signatures"].as_array().with_context(|| format!("no signatures in {answer}"))?;
    let found = signatures.iter().map(|one| (text(&one["format"]), text(&one["verdict"]), text(&one["witness"])));
    let mut found: Vec<_> = found.collect();
    found.sort();
    Ok(found)
}

/// What `countersign verify` finds.
pub async fn found(house: &House, reference: &str) -> Result<Vec<Found>> {
    listed(&house.run(&["verify", reference, "--output", "json"]).await?.json()?)
}

/// Waits until countersign's signatures in these formats are there, and those of an index's platforms, which come with them.
pub async fn wait_for(house: &House, reference: &str, formats: &[&str]) -> Result<()> {
    eventually("all formats are written", LIMIT, async || {
        let found = found(house, reference).await?;
        Ok(formats.iter().all(|format| found.contains(&ours(format))).then_some(()))
    })
    .await?;
    house.wait_settled(1, LIMIT).await.map(drop)
}
