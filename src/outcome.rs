//! How the handling of an event can end, and what an error means for what happens next.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// What an error asks of the event that met it. Every error type answers this itself, through [`Classify`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// May pass unchanged later.
    Retry {
        /// The time that the peer named (`Retry-After`), if it did.
        after: Option<Duration>,
        /// The peer asks for less (429, quota), or was not asked at all because too much waits for it or because it is known to be
        /// away: such a wait is not counted as an attempt, and never uses up an event's patience. Only what was really tried is.
        throttled: bool,
    },
    /// Will never succeed as things stand: dead-letter now, with what the administrator has to do.
    Refuse { cure: &'static str },
    /// The body is no event: dead-letter the bytes untouched.
    Poison,
}

impl Verdict {
    /// A passing fault: try again with back-off.
    pub const TRANSIENT: Self = Self::Retry { after: None, throttled: false };
}

/// Asked of every error that can end the handling of an event.
pub trait Classify {
    fn verdict(&self) -> Verdict;
}

/// What became of one (event, rule).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// At least one new signature was written, read back and verified.
    Signed,
    /// Every signature that the rule asks for was there and valid.
    AlreadySigned,
    /// There was nothing to sign, for this reason.
    Skipped(Skip),
    /// Handed back to the queue.
    Retrying,
    /// Dead-lettered.
    Dead,
}

impl Outcome {
    /// The word that metrics, the ledger and JSON output use.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Signed => "signed",
            Self::AlreadySigned => "already_signed",
            Self::Skipped(_) => "skipped",
            Self::Retrying => "retrying",
            Self::Dead => "dead",
        }
    }
}

/// Why there was nothing to sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Skip {
    /// No rule's scope holds this repository.
    NoRule,
    /// The rule's `exclude` holds this repository.
    Excluded,
    /// The rule's `tags` do not hold this tag.
    TagNotMatched,
    /// The image was pushed before the rule was created.
    BeforeRule,
    /// The rule is switched off.
    Disabled,
    /// The rule signs only by `countersign sign`.
    ManualOnly,
    /// Pushed by digest alone, as children of an index and referrers are.
    Untagged,
    /// The tag names another digest by now; that push has its own event.
    Superseded,
    /// The registry does not have this manifest: deleted meanwhile, or never pushed.
    NotFound,
    /// The manifest is a signature, attestation, SBOM or another referrer.
    Attachment,
    /// The digest is not SHA-256, which is all that the signature formats' readers find.
    UnsupportedDigest,
}

impl Skip {
    /// The word that metrics, the ledger and JSON output use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoRule => "no_rule",
            Self::Excluded => "excluded",
            Self::TagNotMatched => "tag_not_matched",
            Self::BeforeRule => "before_rule",
            Self::Disabled => "disabled",
            Self::ManualOnly => "manual_only",
            Self::Untagged => "untagged",
            Self::Superseded => "superseded",
            Self::NotFound => "not_found",
            Self::Attachment => "attachment",
            Self::UnsupportedDigest => "unsupported_digest",
        }
    }

    /// A sentence for `explain`.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoRule => "no rule's scope holds this repository",
            Self::Excluded => "the rule's `exclude` holds this repository",
            Self::TagNotMatched => "the rule's `tags` do not hold this tag",
            Self::BeforeRule => "the image was pushed before the rule was created",
            Self::Disabled => "the rule is not enabled",
            Self::ManualOnly => "the rule's trigger is manual: sign with `countersign sign`",
            Self::Untagged => {
                "pushed by digest alone, as children of an index are; set `untagged = true` on the rule to sign these too"
            }
            Self::Superseded => "the tag names another digest by now, whose push has its own event",
            Self::NotFound => "the registry does not have this manifest",
            Self::Attachment => "the manifest is itself a signature, attestation, SBOM or other referrer",
            Self::UnsupportedDigest => "the digest is not SHA-256, and no verifier finds signatures for other digests",
        }
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}
