//! What a body that came in is made of, whatever kind of registry sent it.

use jiff::Timestamp;

use crate::oci::{self, Digest, Repository, Tag, media_type};

/// What a body brought: its events in order, or why it is none of this kind.
pub type Parsed<'a> = Result<Vec<Entry<'a>>, Refusal>;

/// One event of a body.
#[derive(Debug)]
pub enum Entry<'a> {
    /// A manifest became available.
    Push(Push),
    /// Nothing to sign, as nearly every event is: counted and dropped.
    Ignored(Ignored),
    /// Not to be believed: kept, with its own JSON text, for the administrator to see.
    Refused { refusal: Refusal, json: &'a str },
}

/// A push as far as its sender can tell of it. The registry is not in it: that is the source's, whatever the sender says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    /// The sender's id where it is fit for a log line; a digest of the event's text elsewhere, so that a redelivery repeats it.
    pub id: String,
    pub repository: Repository,
    pub tag: Option<Tag>,
    pub digest: Digest,
    /// When the registry says that it was pushed, if it says so readably.
    pub pushed_at: Option<Timestamp>,
    /// Untrusted text of at most 256 bytes.
    pub actor: Option<String>,
}

/// The longest free text of a sender that is kept, in bytes.
pub const LONGEST_TEXT: usize = 256;

/// More events than a relay has reason to put into one body.
pub(super) const MOST_EVENTS: usize = 10_000;

/// A sender's id, where it is fit for a log line; otherwise the digest of the event's text, so that a redelivery repeats it.
pub(super) fn log_id(id: Option<&str>, json: &[u8]) -> String {
    let fits = |id: &&str| id.len() <= LONGEST_TEXT && id.bytes().all(|b| b.is_ascii_graphic());
    id.filter(fits).map_or_else(|| Digest::of(json).to_string(), str::to_owned)
}

/// As much of a free text as is kept.
pub(super) fn shortened(text: &str) -> &str {
    let end = (0..=LONGEST_TEXT.min(text.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}

/// Why what is of this media type is not signed; None for the manifests that are.
pub(super) fn unsigned_media_type(named: &str) -> Option<Ignored> {
    match named {
        manifest if media_type::is_manifest(manifest) => None,
        "application/vnd.docker.distribution.manifest.v1+json" | "application/vnd.docker.distribution.manifest.v1+prettyjws" => {
            Some(Ignored::Schema1)
        }
        _ => Some(Ignored::Blob),
    }
}

/// Why an event needs nothing done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ignored {
    Pull,
    Delete,
    /// A layer that was made available from another repository.
    Mount,
    /// A layer or a config, or whatever else is not a manifest.
    Blob,
    /// A manifest of Docker's schema 1: nothing verifies signatures of these.
    Schema1,
    /// A signature, attestation or SBOM, told by its tag or its layers.
    Attachment,
    /// countersign's own write, told by its user agent.
    Own,
    /// An action that this version does not know.
    UnknownAction,
}

impl Ignored {
    pub const ALL: [Self; 8] =
        [Self::Pull, Self::Delete, Self::Mount, Self::Blob, Self::Schema1, Self::Attachment, Self::Own, Self::UnknownAction];

    /// The word that metrics use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Delete => "delete",
            Self::Mount => "mount",
            Self::Blob => "blob",
            Self::Schema1 => "schema1",
            Self::Attachment => "attachment",
            Self::Own => "own",
            Self::UnknownAction => "unknown_action",
        }
    }
}

/// Why a body or one of its events is kept aside instead of being handled.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No JSON, not of this kind's shape, nested too deep, or a member is named twice and parsers disagree on which counts.
    #[error("it cannot be read as an event of this source's kind")]
    Malformed(#[source] serde_json::Error),
    /// A repository, tag or digest outside its grammar.
    #[error(transparent)]
    Name(#[from] oci::ParseError),
    /// A push must say what was pushed.
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("it holds more than {0} events")]
    TooMany(usize),
    /// A CloudEvent of another version, or data that is not what its attributes say.
    #[error("it is no CloudEvent that can be read: {0}")]
    CloudEvent(&'static str),
}

impl Refusal {
    /// The words of [`Self::name`].
    pub const NAMES: [&'static str; 5] = ["malformed", "bad_name", "missing_member", "too_many", "bad_cloudevent"];

    /// The word that metrics use.
    #[must_use]
    pub fn name(&self) -> &'static str {
        Self::NAMES[self.index()]
    }

    /// Where [`Self::name`] stands in [`Self::NAMES`].
    pub(super) fn index(&self) -> usize {
        match self {
            Self::Malformed(_) => 0,
            Self::Name(_) => 1,
            Self::Missing(_) => 2,
            Self::TooMany(_) => 3,
            Self::CloudEvent(_) => 4,
        }
    }
}
