//! Takes an image's signatures along to where the image has been copied to: whosever they are, and as they are.
//!
//! Nothing is verified and nothing is changed, because a signature that is not known here may be known there. What is there
//! already stays: signatures are added as those that are made here are, by `crate::pipeline::write`.

mod layers;
mod referrers;

use std::collections::HashSet;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;

use crate::{
    oci::{Digest, Reference, Repository, Tag},
    outcome::{Classify as _, Verdict},
    pipeline::{self, in_words},
    registry::{self, Registry},
    subject::{self, Children, Located},
    verify,
};

/// Manifests whose signatures are copied at once: the platforms of an index.
const DIGESTS_AT_ONCE: usize = 4;

/// No more layers of one image are copied in one place: cosign reads no more.
const MOST_LAYERS: usize = 1000;

/// An image in its registry.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub registry: &'a Registry,
    pub reference: &'a Reference,
}

impl Place<'_> {
    fn repository(&self) -> &Repository {
        &self.reference.repository
    }

    async fn resolve(&self) -> Result<Option<Digest>, registry::Error> {
        match (&self.reference.digest, &self.reference.tag) {
            (Some(digest), _) => Ok(Some(digest.clone())),
            (None, tag) => self.registry.resolve(self.repository(), tag.as_ref().unwrap_or(&Tag::latest())).await,
        }
    }
}

/// What was taken along.
#[derive(Debug, Serialize)]
pub struct Copies {
    pub source: Reference,
    pub destination: Reference,
    /// Of the image, in both places.
    pub digest: Digest,
    pub signatures: Vec<Copied>,
}

/// One signature of the source, and what became of it.
#[derive(Debug, Serialize)]
pub struct Copied {
    /// Whose signature it is: the image's, or a child's.
    pub digest: Digest,
    pub format: Kind,
    /// As what it says that it approves the digest; None: as anything, or of a layer, that it could not be read.
    pub reference: Option<String>,
    /// Whether that is known to approve the destination's name too.
    pub approves_destination: bool,
    #[serde(flatten)]
    pub state: State,
}

/// How a signature is written down, by whomever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A layer under the `.sig` tag.
    Cosign,
    /// A sigstore bundle of any version, as a referrer.
    Bundle,
    /// One of notation's, as a referrer.
    Notation,
    /// A layer of a referrer, as cosign's mode `oci-1-1` has them.
    #[serde(rename = "cosign-oci-1-1")]
    CosignReferrer,
}

impl Kind {
    /// Whether it says itself what it approves the digest as.
    fn is_layer(self) -> bool {
        matches!(self, Self::Cosign | Self::CosignReferrer)
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosign => "cosign",
            Self::Bundle => "bundle",
            Self::Notation => "notation",
            Self::CosignReferrer => "cosign-oci-1-1",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Written, and found there afterwards.
    Copied,
    /// It was there.
    Present,
    /// It would be copied, and this was a dry run.
    Missing,
    /// It is of no use there.
    LeftOut { reason: &'static str },
    /// With the cure, if there is one that is known. `retry`: it may pass.
    Failed { error: String, retry: bool },
}

impl State {
    fn failed(error: &pipeline::Error) -> Self {
        Self::Failed { error: in_words(error), retry: matches!(error.verdict(), Verdict::Retry { .. }) }
    }
}

/// Why nothing can be copied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}: the registry has no such image")]
    NoSource(Reference),
    #[error("{0} is itself a signature or another artifact of an image: name the image")]
    Attachment(Reference),
    #[error(
        "{destination} is not there yet: copy the image first, so that it keeps its digest \
         (skopeo copy --all --preserve-digests docker://{source_name} docker://{destination})"
    )]
    NotCopied { source_name: Reference, destination: Reference },
    #[error(
        "{destination} is {found} and {source_name} is {expected}, and a signature is one of a digest: copy the image so that it \
         keeps its digest (skopeo copy --all --preserve-digests), or name both by digest"
    )]
    OtherDigest { source_name: Reference, destination: Reference, expected: Digest, found: Digest },
    #[error(transparent)]
    Subject(#[from] subject::Error),
    #[error(transparent)]
    Registry(#[from] registry::Error),
}

impl Error {
    /// Whether this is an answer, and not the lack of one.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        match self {
            Self::NoSource(_) | Self::Attachment(_) | Self::NotCopied { .. } | Self::OtherDigest { .. } => true,
            Self::Subject(_) | Self::Registry(_) => false,
        }
    }
}

/// Copies the signatures of the image at `source`, and of its children if it is an index, to the same image at `destination`;
/// or only says which it would.
///
/// # Errors
/// When the image is not the same in both places, or one of the registries could not be asked. What fails for some of the
/// signatures is told of these.
pub async fn copy(source: Place<'_>, destination: Place<'_>, dry_run: bool) -> Result<Copies, Error> {
    let nowhere = || Error::NoSource(source.reference.clone());
    let not_copied = || Error::NotCopied { source_name: source.reference.clone(), destination: destination.reference.clone() };
    let digest = source.resolve().await?.ok_or_else(nowhere)?;
    let children = match subject::locate(source.registry, source.repository(), None, &digest, Children::All).await? {
        Located::Image(image) => image.children,
        Located::Attachment => return Err(Error::Attachment(source.reference.clone())),
        Located::Missing => return Err(nowhere()),
    };
    let found = destination.resolve().await?.ok_or_else(not_copied)?;
    if found != digest {
        return Err(Error::OtherDigest {
            source_name: source.reference.clone(),
            destination: destination.reference.clone(),
            expected: digest,
            found,
        });
    }
    let there = match subject::locate(destination.registry, destination.repository(), None, &digest, Children::All).await? {
        Located::Image(image) => image,
        Located::Attachment | Located::Missing => return Err(not_copied()),
    };
    let there: HashSet<&Digest> = there.children.iter().map(subject::Subject::digest).chain([&digest]).collect();
    let subjects = [&digest].into_iter().chain(children.iter().map(subject::Subject::digest));
    let routes: Vec<_> =
        subjects.map(|subject| Route { source, destination, subject, has_subject: there.contains(subject), dry_run }).collect();
    let copied: Vec<Vec<Copied>> = stream::iter(routes.iter().map(Route::copy)).buffered(DIGESTS_AT_ONCE).try_collect().await?;
    Ok(Copies {
        source: source.reference.clone(),
        destination: destination.reference.clone(),
        signatures: copied.into_iter().flatten().collect(),
        digest,
    })
}

/// One digest's signatures, on their way.
#[derive(Debug)]
struct Route<'a> {
    source: Place<'a>,
    destination: Place<'a>,
    subject: &'a Digest,
    /// Whether the destination has this manifest: a mirror may leave platforms out.
    has_subject: bool,
    dry_run: bool,
}

impl Route<'_> {
    async fn copy(&self) -> Result<Vec<Copied>, Error> {
        let (mut copied, referrers) = tokio::try_join!(self.layers(), self.referrers())?;
        copied.extend(referrers);
        Ok(copied)
    }

    fn copied(&self, format: Kind, reference: Option<String>, state: State) -> Copied {
        let approves = |signed: &String| verify::approves(signed, self.subject, self.destination.reference);
        let approves_destination = reference.as_ref().map_or(!format.is_layer(), approves);
        Copied { digest: self.subject.clone(), format, reference, approves_destination, state }
    }

    /// What becomes of a signature that is not to be written; None of one that is.
    fn unwritten(&self, is_there: bool) -> Option<State> {
        match (is_there, self.has_subject) {
            (true, _) => Some(State::Present),
            (false, false) => Some(State::LeftOut { reason: "the destination does not have this manifest" }),
            (false, true) => self.dry_run.then_some(State::Missing),
        }
    }
}

/// What was to be copied was, or failed by this.
fn settle(copied: &mut [Copied], written: Result<(), pipeline::Error>) {
    let Err(error) = written else { return };
    let open = copied.iter_mut().filter(|copied| copied.state == State::Copied);
    open.for_each(|copied| copied.state = State::failed(&error));
}

#[cfg(test)]
mod tests;
