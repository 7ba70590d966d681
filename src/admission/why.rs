//! Why an image does not meet a policy, in words, with the cure.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{evidence::Failure, pull_secrets::Unread};
use crate::{
    oci::{ParseError, Reference, RegistryName},
    verify::Rejection,
};

/// Secrets that are named in one answer.
const MOST_UNREAD: usize = 8;

/// Why an image does not meet a policy.
#[derive(Debug, Clone)]
pub enum Why {
    /// It is no reference that any client would take.
    NoReference(String),
    /// No registry of that name is configured, and no other is ever contacted.
    NoRegistry(RegistryName),
    /// The registry could not be asked.
    Registry(Failure),
    /// The registry has no such image.
    Absent,
    /// The registry keeps it from those who ask, and what they were to log in with could not be read.
    Locked { why: Box<Why>, unread: Arc<[Unread]> },
    /// It is used by a tag, and is otherwise as the policy wants it, or not.
    Tag { pinned: Box<Reference>, otherwise: Option<Box<Why>> },
    /// It is used by a tag that the mutating webhook should have pinned.
    NotPinned { pinned: Box<Reference> },
    /// A witness has not signed it.
    Unsigned { witness: String, fault: Fault },
    /// It was built too long ago.
    Old { built: Timestamp, max_age: Duration },
    /// There is a bound for its age, and it does not say when it was built.
    Ageless,
    /// The time for the review was over first.
    Late(Duration),
    /// The policy cannot be used, whatever the image is.
    Refused(Arc<str>),
}

/// What there is instead of the witness's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    Nothing,
    /// By keys of nobody who is known here.
    OtherKey,
    /// By other witnesses than the one asked for.
    Others(Vec<String>),
    OtherFormat(Vec<&'static str>),
    /// The witness signed it as something else.
    OtherName(String),
    /// The witness's key does not count any more, or the signature is broken.
    Rejected(Rejection),
    Unreadable(String),
}

impl Why {
    /// The word that metrics use.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoReference(_) => "no_reference",
            Self::NoRegistry(_) => "no_registry",
            Self::Registry(_) => "registry",
            Self::Absent => "absent",
            Self::Locked { why, .. } => why.name(),
            Self::Tag { .. } => "tag",
            Self::NotPinned { .. } => "not_pinned",
            Self::Unsigned { fault, .. } => match fault {
                Fault::Nothing => "unsigned",
                Fault::OtherKey => "other_key",
                Fault::Others(_) => "other_witness",
                Fault::OtherFormat(_) => "other_format",
                Fault::OtherName(_) => "other_reference",
                Fault::Rejected(rejection) => rejection.name(),
                Fault::Unreadable(_) => "unreadable",
            },
            Self::Old { .. } | Self::Ageless => "age",
            Self::Late(_) => "late",
            Self::Refused(_) => "policy_refused",
        }
    }

    /// Whether a signature that is still to come could change it.
    #[must_use]
    pub fn awaits_signature(&self) -> bool {
        match self {
            Self::Unsigned { .. } => true,
            Self::Tag { otherwise, .. } => otherwise.as_deref().is_some_and(Self::awaits_signature),
            Self::NoReference(_)
            | Self::NoRegistry(_)
            | Self::Registry(_)
            | Self::Absent
            | Self::Locked { .. }
            | Self::NotPinned { .. }
            | Self::Old { .. }
            | Self::Ageless
            | Self::Late(_)
            | Self::Refused(_) => false,
        }
    }

    /// Whether it says nothing of the image: its registry did not answer, or what is demanded of it could not be read.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        match self {
            Self::Registry(_) | Self::Late(_) | Self::Refused(_) => true,
            Self::Locked { why, .. } => why.is_unknown(),
            Self::NoReference(_)
            | Self::NoRegistry(_)
            | Self::Absent
            | Self::Tag { .. }
            | Self::NotPinned { .. }
            | Self::Unsigned { .. }
            | Self::Old { .. }
            | Self::Ageless => false,
        }
    }

    /// Whether another login could change it: a registry may also say of what it hides that there is no such thing.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        match self {
            Self::Registry(failure) => failure.is_refusal(),
            why => matches!(why, Self::Absent),
        }
    }

    pub(super) fn no_reference(error: &ParseError) -> Self {
        Self::NoReference(error.to_string())
    }
}

impl From<Failure> for Why {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NoRegistry(name) => Self::NoRegistry(name),
            Failure::Registry(_) => Self::Registry(failure),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoReference(problem) => write!(f, "it is no image reference: {problem}"),
            Self::NoRegistry(name) => write!(
                f,
                "images of the registry {name} cannot be verified here: use an image of a configured registry, or add a [[registry]] \
                 for this one"
            ),
            Self::Registry(failure) if failure.is_refusal() => write!(
                f,
                "its registry could not be asked: {}; give the [[registry]] a login that may pull it, or let countersign read what \
                 pods are pulled with (`pull_secrets` in [admission] kubernetes)",
                chain(failure)
            ),
            Self::Registry(failure) => write!(f, "its registry could not be asked: {}; try again", chain(failure)),
            Self::Locked { why, unread } => {
                match &**why {
                    Self::Registry(failure) => write!(f, "its registry could not be asked: {}", chain(failure))?,
                    why => write!(f, "{why}")?,
                }
                unread.iter().take(MOST_UNREAD).try_for_each(|unread| write!(f, "; {unread}"))?;
                match unread.len().saturating_sub(MOST_UNREAD) {
                    0 => Ok(()),
                    more => write!(f, "; and {more} more that could not be read"),
                }
            }
            Self::Absent => f.write_str("its registry has no such image: check the name, and push it first"),
            Self::Tag { pinned, otherwise: None } => {
                write!(f, "it is used by a tag, and tags can be moved; use the digest, which is attested: {pinned}")
            }
            Self::Tag { pinned, otherwise: Some(why) } => write!(
                f,
                "it is used by a tag, and tags can be moved; use a digest. The one that the tag names now, {pinned}, would not do \
                 either: {why}"
            ),
            Self::NotPinned { pinned } => write!(
                f,
                "it is used by a tag that was not pinned on its way here: let the mutating webhook (/mutate) be called for this \
                 object too, or use the digest: {pinned}"
            ),
            Self::Unsigned { witness, fault } => write_fault(f, witness, fault),
            Self::Old { built, max_age } => {
                write!(f, "it was built on {built}, and may be {} old at most: build it again", days(*max_age))
            }
            Self::Ageless => f.write_str("it does not say when it was built, and its age is bounded: build it with its time"),
            Self::Late(deadline) => write!(
                f,
                "its registry did not answer within the {:.1} s that the cluster waits; try again",
                deadline.as_secs_f64()
            ),
            Self::Refused(reason) => write!(f, "nothing is admitted as long as this policy cannot be used: {reason}"),
        }
    }
}

fn write_fault(f: &mut fmt::Formatter<'_>, witness: &str, fault: &Fault) -> fmt::Result {
    match fault {
        Fault::Nothing => write!(f, "it is not signed, and witness {witness} must have signed it"),
        Fault::OtherKey => write!(f, "it is signed by another key, and not by one of witness {witness}"),
        Fault::Others(others) => write!(f, "it is signed by {}, and not by witness {witness}", others.join(" and ")),
        Fault::OtherFormat(formats) => {
            write!(f, "witness {witness} signed it in the format {}, which this policy does not take", formats.join(" and "))
        }
        Fault::OtherName(name) => {
            write!(
                f,
                "witness {witness} signed it as {name}, and not under this name: use that name, or have it signed under this"
            )
        }
        Fault::Rejected(rejection @ (Rejection::Expired { .. } | Rejection::Revoked { .. })) => {
            write!(f, "{rejection}: have it signed again, with a key that counts")
        }
        Fault::Rejected(rejection) => {
            write!(f, "its signature does not count, {rejection}, and witness {witness} must have signed it")
        }
        Fault::Unreadable(problem) => write!(f, "what is stored as its signatures cannot be read: {problem}"),
    }
}

/// An error with what caused it.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn days(span: Duration) -> String {
    let hours = span.as_secs() / 3600;
    match hours {
        0 => format!("{} min", span.as_secs() / 60),
        1..48 => format!("{hours} h"),
        _ => format!("{} days", hours / 24),
    }
}
