//! What can go wrong between us and a registry, and what each of it means for the event in hand.

use std::{fmt, sync::Arc, time::Duration};

use http::StatusCode;
use hyper_util::client::legacy;
use serde::Deserialize;

use crate::{
    oci::{RegistryName, Repository},
    outcome::{Classify, Verdict},
};

/// Why the registry did not do what it was asked. Every message says what could not be done, with which repository, at
/// which registry; none repeats a credential, a token or a URL's query. What a registry said itself is quoted, cut and escaped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The settings cannot work with any registry.
    #[error("registry {registry}: {problem}")]
    Settings { registry: RegistryName, problem: String },
    /// Name resolution, connection, TLS, a time-out, or an answer that broke off.
    #[error("{at}: the registry does not answer")]
    Unreachable { at: At, source: Broken },
    /// 429, or an error of the code TOOMANYREQUESTS.
    #[error("{at}: the registry asks for fewer requests ({reported})")]
    Throttled { at: At, retry_after: Option<Duration>, reported: Reported },
    /// 5xx, and the few 4xx that mean the same (408, 425).
    #[error("{at}: the registry has a fault of its own ({reported})")]
    ServerError { at: At, retry_after: Option<Duration>, reported: Reported },
    /// 401, also with the credentials or the token that it asked for.
    #[error("{at}: {account} is not let in, or may not {need} ({reported})")]
    Unauthorized { at: At, account: Account, need: &'static str, reported: Reported },
    /// 403.
    #[error("{at}: {account} may not {need} ({reported})")]
    Denied { at: At, account: Account, need: &'static str, reported: Reported },
    /// A manifest was refused for a blob that is not there (any more, or yet: docker-registry says so too while the same blob
    /// is uploaded twice at once), or an upload session was lost. What was known of the repository's blobs is forgotten.
    #[error("{at}: the registry does not have a blob or an upload that it was given ({reported})")]
    BlobUnknown { at: At, reported: Reported },
    /// The tag exists and the registry does not let it be written again.
    #[error("{at}: the registry does not let this tag be changed ({reported})")]
    ImmutableTag { at: At, reported: Reported },
    /// The registry takes no writes at all: it is in maintenance, or the replica of another.
    #[error("{at}: the registry is read-only ({reported})")]
    ReadOnly { at: At, reported: Reported },
    /// The repository's or the project's share of the registry's storage is used up.
    #[error("{at}: the registry's quota is used up ({reported})")]
    Quota { at: At, reported: Reported },
    /// The project lets nobody pull the image as it is (unsigned, or with vulnerabilities), and made no exception for who is to sign it.
    #[error("{at}: a policy of the registry keeps {account} from pulling this ({reported})")]
    Policy { at: At, account: Account, reported: Reported },
    /// Any other 4xx by which a registry refuses.
    #[error("{at}: the registry refuses ({reported})")]
    Rejected { at: At, reported: Reported },
    /// An answer that no registry gives here, such as a proxy's own 404 page. Never taken for "not there".
    #[error("{at}: this is not a registry's answer ({reported})")]
    Unexpected { at: At, reported: Reported },
    /// Other bytes were served, or another digest named, than the digest that was asked for.
    #[error("{at}: the registry's content or its word for it is {found}, expected {expected}")]
    DigestMismatch { at: At, expected: String, found: String },
    /// More bytes, entries or pages than are ever read here.
    #[error("{at}: the answer is larger than {limit}")]
    Oversized { at: At, limit: String },
    /// A success whose headers or body do not make sense.
    #[error("{at}: the answer makes no sense: {problem}")]
    Malformed { at: At, problem: String },
    /// Content that hashes to the digest asked for, and so will never be anything else, is no manifest that we can handle.
    #[error("{at}: the content is no manifest that can be handled: {problem}")]
    Unsupported { at: At, problem: String },
    /// The fallback tag of a manifest's referrers holds something else. It is never overwritten.
    #[error("{at}: what the tag holds is no index of referrers that could be added to: {problem}")]
    NoIndex { at: At, problem: String },
    /// The registry points somewhere that credentials must not go, or that makes an https connection a plain one.
    #[error("{at}: the registry points to {target}, {problem}")]
    Elsewhere { at: At, target: String, problem: &'static str, cure: &'static str },
}

/// How an exchange over the network failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Broken {
    /// Nothing was sent.
    #[error("no connection could be made")]
    Connect(#[source] Arc<legacy::Error>),
    /// It is not known whether the request was read.
    #[error("the connection ended before the answer began")]
    Lost(#[source] Arc<legacy::Error>),
    #[error("the answer broke off")]
    Cut(#[source] Arc<hyper::Error>),
    #[error("no whole answer came within {0:?}")]
    Slow(Duration),
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Settings { .. } => Verdict::Refuse { cure: "correct this registry's section in the configuration" },
            Self::Throttled { retry_after, .. } => Verdict::Retry { after: *retry_after, throttled: true },
            Self::ServerError { retry_after, .. } => Verdict::Retry { after: *retry_after, throttled: false },
            // A proxy, a cache node or a replica that is behind can each cause the last three, and each passes. Nothing was
            // signed or written on their word, and a registry that keeps lying runs into the queue's patience.
            Self::Unreachable { .. }
            | Self::BlobUnknown { .. }
            // Maintenance ends.
            | Self::ReadOnly { .. }
            | Self::Unexpected { .. }
            | Self::DigestMismatch { .. }
            | Self::Malformed { .. } => Verdict::TRANSIENT,
            Self::Unauthorized { .. } => Verdict::Refuse {
                cure: "check the registry's username and password in the configuration, and that the account may pull from \
                       and push to this repository",
            },
            Self::Denied { .. } => Verdict::Refuse {
                cure: "allow the registry account of the configuration to pull from and push to this repository",
            },
            Self::ImmutableTag { .. } => {
                Verdict::Refuse { cure: "exempt tags of the form sha256-* from the registry's tag immutability" }
            }
            Self::Quota { .. } => {
                Verdict::Refuse { cure: "raise the quota in the registry or delete what nobody needs there, and replay the event" }
            }
            Self::Policy { .. } => Verdict::Refuse {
                cure: "allow the registry account of the configuration to push to this repository: who may, may read there what is \
                       to be signed",
            },
            Self::Rejected { .. } => {
                Verdict::Refuse { cure: "see what the registry says, correct it there, and replay the event" }
            }
            Self::Oversized { .. } => Verdict::Refuse {
                cure: "answers of this size are never read: have what is so large made smaller, or discard the event",
            },
            Self::Unsupported { .. } => {
                Verdict::Refuse { cure: "have the image pushed as an OCI or Docker v2 schema 2 manifest, or discard the event" }
            }
            Self::NoIndex { .. } => {
                Verdict::Refuse { cure: "look at what the tag holds; if nobody needs it, delete the tag and replay this event" }
            }
            Self::Elsewhere { cure, .. } => Verdict::Refuse { cure },
        }
    }
}

impl Error {
    /// Whether a registry refuses what it was sent, rather than who sends it, where to, or when.
    #[must_use]
    pub fn is_of_content(&self) -> bool {
        matches!(self, Self::Rejected { reported, .. } if matches!(reported.status.as_u16(), 400 | 415 | 422))
    }
}

/// What was being done, as the beginning of a sentence: `cannot read the manifest team/app:1.0 at registry.example.com`.
#[derive(Clone)]
pub struct At(Arc<str>);

impl At {
    pub(super) fn new(registry: &RegistryName, doing: &str, object: impl fmt::Display) -> Self {
        let object = object.to_string();
        let space = if object.is_empty() { "" } else { " " };
        Self(format!("cannot {doing}{space}{object} at {registry}").into())
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Whom the registry took us for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account(pub(super) Option<String>);

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(name) => write!(f, "the account {name:?}"),
            None => f.write_str("a client without an account"),
        }
    }
}

/// What a registry said of its refusal: OCI distribution-spec 1.1, "Error Codes". All of it is cut to a readable length.
#[derive(Debug, Clone)]
pub struct Reported {
    status: StatusCode,
    codes: Arc<[String]>,
    message: Arc<str>,
    /// The body was no error document, and not empty either.
    foreign: bool,
    /// distribution's detail of a manifest that it looked for by its digest.
    revision: bool,
}

impl Reported {
    /// Reads an error body. What repeats one of `secrets` is not kept.
    pub(super) fn read(status: StatusCode, body: &[u8], secrets: &[&str]) -> Self {
        #[derive(Deserialize)]
        struct Body {
            errors: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            code: Option<String>,
            #[serde(default)]
            message: Option<String>,
            #[serde(default)]
            detail: serde_json::Value,
        }
        const MOST: usize = 8;

        let entries = serde_json::from_slice::<Body>(body).map(|body| body.errors).unwrap_or_default();
        let foreign = entries.is_empty() && !body.is_empty();
        let is_safe = |text: &&str| !secrets.iter().any(|secret| text.contains(secret));
        let codes = entries
            .iter()
            .filter_map(|entry| entry.code.as_deref())
            .filter(is_safe)
            .map(|code| cut(code, 60))
            .take(MOST)
            .collect();
        let message = entries.iter().filter_map(|entry| entry.message.as_deref()).find(|message| !message.is_empty());
        let message = match message {
            Some(message) if is_safe(&message) => cut(message, 300),
            Some(_) => "withheld, because it repeats a credential".to_owned(),
            None => String::new(),
        };
        let revision = entries.iter().any(|entry| entry.detail.get("Revision").is_some());
        Self { status, codes, message: message.into(), foreign, revision }
    }

    /// The HTTP status of the answer.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The error codes of the body, such as `MANIFEST_UNKNOWN`.
    pub fn codes(&self) -> impl Iterator<Item = &str> {
        self.codes.iter().map(String::as_str)
    }

    pub(super) fn has(&self, wanted: &[&str]) -> bool {
        self.codes().any(|code| wanted.contains(&code))
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// Whether it is about a manifest by its digest, however that was asked for.
    pub(super) fn names_revision(&self) -> bool {
        self.revision
    }

    /// Whether there was a body that no registry writes.
    pub(super) fn is_foreign(&self) -> bool {
        self.foreign
    }
}

impl fmt::Display for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {}", self.status.as_u16())?;
        for code in self.codes() {
            write!(f, " {}", code.escape_debug())?;
        }
        if !self.message.is_empty() {
            write!(f, ": {:?}", self.message)?;
        }
        Ok(())
    }
}

/// What an error is about, within a registry.
pub(super) struct Object<'a> {
    pub(super) repository: Option<&'a Repository>,
    pub(super) item: Option<(char, &'a str)>,
}

impl fmt::Display for Object<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(repository) = self.repository {
            write!(f, "{repository}")?;
        }
        if let Some((separator, item)) = self.item {
            write!(f, "{separator}{item}")?;
        }
        Ok(())
    }
}

/// The beginning of `text`, at most `most` characters.
pub(super) fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
