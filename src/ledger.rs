//! The audit trail: what is about to be signed is on record before a key is asked, and what became of it after.
//!
//! So whatever a key may have signed is known, even after a crash, and every event ends as a counted outcome. It also
//! answers `explain`.
//!
//! What is said here returns once it would survive the machine losing power; many who say something share one sync.

mod columns;
mod postgres;
mod sqlite;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    clock::Clock,
    event::{BY_HAND, PushEvent},
    kms::Algorithm,
    oci::{Digest, Reference, RegistryName, Repository, Tag},
    outcome::{Classify, Outcome, Skip, Verdict},
};

pub use postgres::{Authorities, Limits, Postgres, Trust};

/// The longest text of an error that is kept, in bytes: what peers say is of any length.
const LONGEST_DETAIL: usize = 2048;
/// Enough to share a commit well; not so many that the first waits for the last.
const MOST_PER_COMMIT: usize = 256;
/// More are in no one's interest: a manifest has a handful.
const MOST_SIGNATURES: u32 = 1000;

/// An open ledger. Clones share it; it closes when the last one is dropped.
///
/// Several processes may have one ledger open. Whoever waits at the same moment shares one commit.
#[derive(Clone)]
pub struct Ledger(Arc<dyn Backend>);

/// Where a ledger is kept.
#[async_trait]
trait Backend: fmt::Debug + Send + Sync {
    /// Returns once `work` would survive the machine losing power. Done as a whole, or not at all.
    async fn write(&self, work: Work) -> Result<(), Error>;
    async fn sums(&self) -> Result<Sums, Error>;
    async fn story(&self, query: StoryQuery) -> Result<Vec<EventRecord>, Error>;
    async fn rule_outcomes(&self, message_ids: Vec<String>) -> Result<HashMap<String, Vec<RuleOutcome>>, Error>;
    async fn signatures(
        &self,
        registry: RegistryName,
        repository: Repository,
        digest: Digest,
    ) -> Result<Vec<SignatureRecord>, Error>;
    async fn keep_certificate(&self, certificate: KeptCertificate) -> Result<(), Error>;
    async fn certificates(&self, witness: String, key: String) -> Result<Vec<KeptCertificate>, Error>;
}

/// What can be said to a ledger, but for the rare.
enum Work {
    /// At least one.
    Intend(Vec<Intent>),
    Conclude(Arc<Conclusion>),
    /// What was concluded dead until then.
    Forget(String, Timestamp),
    Check,
}

/// Only what has ended is counted; and of that, what was received: what was asked for by hand was not.
fn is_counted(source: Option<&str>, outcome: &Outcome) -> bool {
    !matches!(outcome, Outcome::Retrying) && source != Some(BY_HAND)
}

impl Ledger {
    /// Opens the file at `path`, and creates it (for this user only) if there is none; the folder must exist.
    ///
    /// # Errors
    /// [`Error::Foreign`] or [`Error::Newer`] when the file is something else: it is left as it was.
    pub fn open(path: &Path, clock: Clock) -> Result<Self, Error> {
        sqlite::Store::open(path, clock).map(|store| Self(Arc::new(store)))
    }

    /// The ledger in a PostgreSQL database, in a schema of its own. Nothing is connected to yet: that happens when something is
    /// said or asked, and again whenever the connection was lost. The schema is made, or migrated, by whoever comes first.
    ///
    /// # Errors
    /// [`Error::Refused`] if the certificate authorities cannot be read.
    pub fn connect(settings: Postgres, clock: Clock) -> Result<Self, Error> {
        postgres::Store::new(settings, clock).map(|store| Self(Arc::new(store)))
    }

    /// Puts on record, durably, that a key is about to be asked. Said again for the same message, it counts how often.
    ///
    /// # Errors
    /// Nothing is on record, so nothing may be signed. All of `intents` are, or none.
    pub async fn intend(&self, intents: Vec<Intent>) -> Result<(), Error> {
        if intents.is_empty() { Ok(()) } else { self.0.write(Work::Intend(intents)).await }
    }

    /// Records what became of one event. Said again for the same `message_id` (after a crash, a retry or a replay), it
    /// replaces what was said before.
    pub async fn conclude(&self, conclusion: impl Into<Arc<Conclusion>>) -> Result<(), Error> {
        self.0.write(Work::Conclude(conclusion.into())).await
    }

    /// A dead letter that is replayed is queued again, and no longer counts as dead. Its story stays. An event that is not dead
    /// here is left alone.
    pub async fn forget_event(&self, message_id: &str) -> Result<(), Error> {
        self.forget_event_until(message_id, Timestamp::MAX).await
    }

    /// As [`Self::forget_event`], of an event that was dead at `until`. With the time before the replay, this may come after it:
    /// an event that has died again meanwhile (poison takes a millisecond) stays dead.
    pub async fn forget_event_until(&self, message_id: &str, until: Timestamp) -> Result<(), Error> {
        self.0.write(Work::Forget(message_id.to_owned(), until)).await
    }

    /// Whether the ledger can be written now, found out by writing.
    pub async fn check(&self) -> Result<(), Error> {
        self.0.write(Work::Check).await
    }

    /// How many events ended how, ever. Costs the same however many there are.
    pub async fn sums(&self) -> Result<Sums, Error> {
        self.0.sums().await
    }

    /// The events of one repository that `query` names, the one heard of last first.
    pub async fn story(&self, query: StoryQuery) -> Result<Vec<EventRecord>, Error> {
        self.0.story(query).await
    }

    /// What each rule made of these messages, as far as they are on record.
    pub async fn rule_outcomes(&self, message_ids: Vec<String>) -> Result<HashMap<String, Vec<RuleOutcome>>, Error> {
        self.0.rule_outcomes(message_ids).await
    }

    /// Every signature of this manifest that a key was asked for, or that was found to be there, newest first; the newest
    /// thousand if there are more.
    pub async fn signatures(
        &self,
        registry: &RegistryName,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Vec<SignatureRecord>, Error> {
        self.0.signatures(registry.clone(), repository.clone(), digest.clone()).await
    }

    /// Keeps a certificate that a witness's key signed for itself, durably, unless there is one of its number already: of
    /// replicas that made one at the same moment, one was first, and [`Self::certificates`] tells all of them which.
    pub async fn keep_certificate(&self, certificate: KeptCertificate) -> Result<(), Error> {
        self.0.keep_certificate(certificate).await
    }

    /// The certificates that are kept of a witness's key (by its fingerprint), newest first.
    pub async fn certificates(&self, witness: &str, key: &str) -> Result<Vec<KeptCertificate>, Error> {
        self.0.certificates(witness.to_owned(), key.to_owned()).await
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ledger").field(&self.0).finish()
    }
}

/// One signature that a key is about to be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// The queue's id of the event that asks.
    pub message_id: String,
    pub rule: String,
    pub witness: String,
    /// What the KMS itself calls the key: an alias says nothing once it has been moved.
    pub key: String,
    pub algorithm: Algorithm,
    /// The signature format's name: `cosign`.
    pub format: &'static str,
    pub registry: RegistryName,
    pub repository: Repository,
    /// The manifest that is signed: the event's, or a child of it.
    pub digest: Digest,
    /// The reference that the signature vouches for.
    pub reference: Reference,
    /// What the key is handed: the hash of the bytes to sign.
    pub payload_sha256: [u8; 32],
}

/// What became of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conclusion {
    pub event: EventFacts,
    /// Of the event as a whole.
    pub outcome: Outcome,
    /// Of each rule that was looked at, in the order of the configuration.
    pub rules: Vec<RuleOutcome>,
    pub signatures: Vec<SignatureResult>,
    /// The error's text, for an event that is retried or dead.
    pub detail: Option<String>,
    /// Deliveries so far, this one included.
    pub attempt: u32,
}

/// What is known of an event. Only the message's id always is: a poison body says nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventFacts {
    /// The queue's id.
    pub message_id: String,
    /// The source that it came in by.
    pub source: Option<String>,
    /// The sender's own id.
    pub event_id: Option<String>,
    pub registry: Option<RegistryName>,
    pub repository: Option<Repository>,
    pub tag: Option<Tag>,
    pub digest: Option<Digest>,
    /// Kept to the microsecond, as all times here.
    pub pushed_at: Option<Timestamp>,
    pub received_at: Option<Timestamp>,
    /// Untrusted text.
    pub actor: Option<String>,
}

impl EventFacts {
    /// Of a push event that came as the message `message_id`.
    #[must_use]
    pub fn of(message_id: impl Into<String>, event: &PushEvent) -> Self {
        Self {
            message_id: message_id.into(),
            source: Some(event.source.clone()),
            event_id: Some(event.id.clone()),
            registry: Some(event.registry.clone()),
            repository: Some(event.repository.clone()),
            tag: event.tag.clone(),
            digest: Some(event.digest.clone()),
            pushed_at: Some(event.pushed_at),
            received_at: Some(event.received_at),
            actor: event.actor.clone(),
        }
    }

    /// Of a message that is no push event, and went onto the queue at `received_at`.
    #[must_use]
    pub fn poison(message_id: impl Into<String>, received_at: Timestamp) -> Self {
        Self {
            message_id: message_id.into(),
            source: None,
            event_id: None,
            registry: None,
            repository: None,
            tag: None,
            digest: None,
            pushed_at: None,
            received_at: Some(received_at),
            actor: None,
        }
    }
}

/// What one rule made of an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleOutcome {
    pub rule: String,
    pub outcome: Outcome,
    pub detail: Option<String>,
}

/// What became of one signature. The intent that it belongs to is the latest with the same members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureResult {
    pub rule: String,
    pub witness: String,
    pub format: &'static str,
    pub digest: Digest,
    pub reference: Reference,
    pub payload_sha256: [u8; 32],
    pub state: SignatureState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SignatureState {
    /// Written by us, read back and verified.
    Written,
    /// It was there already, and valid. This never replaces `Written`.
    Found,
    /// The key or the registry failed, with this error. The key may have signed all the same.
    Failed(String),
}

impl SignatureState {
    /// The word for output.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Found => "found",
            Self::Failed(_) => "failed",
        }
    }
}

/// How events ended: each counts once, under its latest outcome. Events that are retried count nowhere, nor does what was
/// signed by hand, which nobody received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sums {
    pub signed: u64,
    pub already_signed: u64,
    pub skipped: u64,
    /// Dead letters, the discarded ones included, the replayed ones not.
    pub dead: u64,
    /// `skipped`, by reason.
    pub skip_reasons: BTreeMap<Skip, u64>,
}

impl Sums {
    /// Every event that has ended.
    #[must_use]
    pub fn concluded(&self) -> u64 {
        self.signed + self.already_signed + self.skipped + self.dead
    }

    /// Adds what a row says: so many events ended with this outcome, and if it is `skipped` for this reason. None if these are
    /// no words of ours.
    fn add(&mut self, outcome: &str, reason: &str, events: u64) -> Option<()> {
        match outcome {
            "signed" => self.signed += events,
            "already_signed" => self.already_signed += events,
            "dead" => self.dead += events,
            "skipped" => {
                *self.skip_reasons.entry(columns::read_skip(reason)?).or_default() += events;
                self.skipped += events;
            }
            _ => return None,
        }
        Some(())
    }
}

/// Which events to tell of: those of one repository, and of them those with this tag and with this digest, where given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoryQuery {
    pub registry: RegistryName,
    pub repository: Repository,
    pub tag: Option<Tag>,
    pub digest: Option<Digest>,
    pub limit: u32,
}

/// One event, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    pub event: EventFacts,
    pub outcome: Outcome,
    pub rules: Vec<RuleOutcome>,
    pub detail: Option<String>,
    pub attempt: u32,
    /// When the outcome was recorded.
    pub concluded_at: Timestamp,
}

/// One signature that a key was asked for, or that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignatureRecord {
    pub message_id: String,
    pub rule: String,
    pub witness: String,
    pub format: String,
    pub reference: Reference,
    pub payload_sha256: [u8; 32],
    /// None for a signature that was found and that nobody here asked a key for.
    pub asked: Option<Asked>,
    /// None while the key is being asked, and for ever if nobody lived to say: then it may have signed.
    pub state: Option<SignatureState>,
    /// When `state` was recorded.
    pub concluded_at: Option<Timestamp>,
}

/// That a key was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub key: String,
    pub algorithm: Algorithm,
    pub times: u32,
    pub first_at: Timestamp,
    pub last_at: Timestamp,
}

/// A certificate that a witness's key signed for itself: what readers of its notation signatures have in their trust stores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptCertificate {
    pub witness: String,
    /// SHA-256 of the key's `SubjectPublicKeyInfo`, lower-case hex.
    pub key: String,
    /// Counted from 1; each renewal is one more.
    pub number: u32,
    pub pem: String,
}

/// What a database said, shared by all who waited for the same commit.
type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// Why the ledger did not open, or did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("cannot create the ledger {path}: its folder must exist and be writable")]
    Create {
        path: PathBuf,
        #[source]
        source: Cause,
    },
    /// It was not touched.
    #[error("{place} is not a ledger: {cure}")]
    Foreign { place: String, cure: &'static str },
    /// It was not touched.
    #[error("the ledger {place} has version {found}, and this countersign knows versions up to {known}: use a newer one")]
    Newer { place: String, found: i64, known: i64 },
    #[error("cannot open the ledger {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: Cause,
    },
    /// Nothing was recorded: full disk, failing disk, a database that is away, another process in a long transaction. May pass.
    #[error("the ledger cannot be {what} now")]
    Unavailable {
        what: &'static str,
        #[source]
        source: Cause,
    },
    /// The database does not let this be done, whenever it is tried.
    #[error("the ledger's database refuses: {cure}")]
    Refused {
        cure: &'static str,
        #[source]
        source: Cause,
    },
    /// Its thread has ended, which it does only when this process does.
    #[error("the ledger is closed")]
    Closed,
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Unavailable { .. } | Self::Closed => Verdict::TRANSIENT,
            Self::Create { .. } | Self::Open { .. } => {
                Verdict::Refuse { cure: "name a file for the ledger that countersign can create or wrote itself" }
            }
            Self::Newer { .. } => Verdict::Refuse { cure: "use the newer countersign" },
            Self::Foreign { cure, .. } | Self::Refused { cure, .. } => Verdict::Refuse { cure },
        }
    }
}

#[cfg(test)]
mod tests;
