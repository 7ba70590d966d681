//! The push event: all that crosses the queue.
//!
//! On the queue it is a CloudEvents 1.0 JSON document (structured mode), whoever sent it in whatever shape. What a
//! registry sent raw ends at intake.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::oci::{Digest, RegistryName, Repository, Tag};

/// The content type of a [`PushEvent`] on the queue.
pub const CONTENT_TYPE: &str = "application/cloudevents+json";
/// The content type of a body that was authenticated but is no event: it is kept, untouched, as a dead letter.
pub const QUARANTINE_CONTENT_TYPE: &str = "application/vnd.countersign.quarantined";

/// The source of what an administrator asks for by `countersign sign`: no configured source can have this name, and it is
/// counted nowhere as received.
pub const BY_HAND: &str = "(by hand)";

const TYPE: &str = "io.countersign.image.pushed.v1";

/// One image manifest that became available in a registry: a hint to look there, never an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushEvent {
    /// The sender's own id, unique within `source`; a redelivery repeats it.
    pub id: String,
    /// The configured source that it came in by, or [`BY_HAND`].
    pub source: String,
    /// From the source's configuration, never from the payload.
    pub registry: RegistryName,
    pub repository: Repository,
    pub tag: Option<Tag>,
    pub digest: Digest,
    /// When the registry says that the manifest was pushed; the time of receipt where it does not say.
    pub pushed_at: Timestamp,
    /// When intake took it in.
    pub received_at: Timestamp,
    /// Who pushed, as the sender has it: for the log, never for a decision. Untrusted text.
    pub actor: Option<String>,
}

/// The body is no push event of ours.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the body is not a CloudEvents document of a push event")]
    Malformed(#[from] serde_json::Error),
    #[error("specversion is {0:?}, expected \"1.0\"")]
    SpecVersion(String),
    #[error("type is {0:?}, expected {TYPE:?}")]
    Type(String),
}

impl PushEvent {
    /// The bytes to queue: UTF-8 JSON.
    #[must_use]
    pub fn to_cloud_event(&self) -> Vec<u8> {
        let document = CloudEvent {
            specversion: "1.0".into(),
            id: self.id.clone(),
            source: self.source.clone(),
            r#type: TYPE.into(),
            time: self.pushed_at,
            datacontenttype: "application/json".into(),
            data: Data {
                registry: self.registry.clone(),
                repository: self.repository.clone(),
                tag: self.tag.clone(),
                digest: self.digest.clone(),
                received_at: self.received_at,
                actor: self.actor.clone(),
            },
        };
        serde_json::to_vec(&document).expect("strings and numbers always serialise")
    }

    /// Reads what [`Self::to_cloud_event`] wrote, by this version or another.
    ///
    /// # Errors
    /// When the bytes are anything else: the message is poison.
    pub fn from_cloud_event(body: &[u8]) -> Result<Self, Error> {
        let document: CloudEvent = serde_json::from_slice(body)?;
        if document.specversion != "1.0" {
            return Err(Error::SpecVersion(document.specversion));
        }
        if document.r#type != TYPE {
            return Err(Error::Type(document.r#type));
        }
        let data = document.data;
        Ok(Self {
            id: document.id,
            source: document.source,
            registry: data.registry,
            repository: data.repository,
            tag: data.tag,
            digest: data.digest,
            pushed_at: document.time,
            received_at: data.received_at,
            actor: data.actor,
        })
    }

    /// What must never be in two hands at once: every signature of one digest lives in one place of the registry.
    #[must_use]
    pub fn partition_key(&self) -> String {
        format!("{}/{}@{}", self.registry, self.repository, self.digest)
    }
}

#[derive(Serialize, Deserialize)]
struct CloudEvent {
    specversion: String,
    id: String,
    source: String,
    r#type: String,
    time: Timestamp,
    datacontenttype: String,
    data: Data,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    registry: RegistryName,
    repository: Repository,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<Tag>,
    digest: Digest,
    received_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_survives_the_queue_unchanged() {
        let event = PushEvent {
            id: "1".into(),
            source: "main".into(),
            registry: "registry.example.com".parse().unwrap(),
            repository: "team/app".parse().unwrap(),
            tag: Some("1.0".parse().unwrap()),
            digest: Digest::of(b"x"),
            pushed_at: "2026-11-21T09:00:00.123456789Z".parse().unwrap(),
            received_at: "2026-11-21T09:00:01Z".parse().unwrap(),
            actor: Some("ci \"bot\"\n".into()),
        };
        assert_eq!(PushEvent::from_cloud_event(&event.to_cloud_event()).unwrap(), event);
    }

    #[test]
    fn what_is_never_in_two_hands_is_a_digest_in_a_repository_whatever_its_tag() {
        let event = |registry: &str, repository: &str, digest: &[u8], tag: Option<&str>| {
            let event = PushEvent {
                id: "1".into(),
                source: "main".into(),
                registry: registry.parse().unwrap(),
                repository: repository.parse().unwrap(),
                tag: tag.map(|tag| tag.parse().unwrap()),
                digest: Digest::of(digest),
                pushed_at: Timestamp::UNIX_EPOCH,
                received_at: Timestamp::UNIX_EPOCH,
                actor: None,
            };
            event.partition_key()
        };
        let key = event("registry.example.com", "team/app", b"x", Some("1.0"));
        assert_eq!(key, format!("registry.example.com/team/app@{}", Digest::of(b"x")));
        assert_eq!(key, event("registry.example.com", "team/app", b"x", None));
        for other in [
            event("other.example.com", "team/app", b"x", Some("1.0")),
            event("registry.example.com", "team/web", b"x", Some("1.0")),
            event("registry.example.com", "team/app", b"y", Some("1.0")),
        ] {
            assert_ne!(key, other);
        }
    }

    #[test]
    fn what_is_no_event_is_told_apart() {
        for body in [&b""[..], b"{}", b"\xff", br#"{"specversion":"1.0"}"#] {
            assert!(matches!(PushEvent::from_cloud_event(body), Err(Error::Malformed(_))));
        }
    }
}
