//! What may be signed: a manifest that the configured registry served and we hashed, and the tag if it still names it.
//!
//! A [`Subject`] can only be made here, from bytes that hash to the digest it has. Nothing that an event claims gets
//! further than the request that looks for it.

use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;

use crate::{
    attachment,
    oci::{Descriptor, Digest, RegistryName, Repository, Tag, media_type},
    outcome::{Classify, Verdict},
    registry::{self, Address, Manifest, Registry},
};

/// Indexes within indexes are followed this deep; the outermost is depth 0.
const MAX_DEPTH: usize = 3;
/// No more children than these are taken from one push. The largest public images have some thirty.
const MAX_CHILDREN: usize = 256;
/// Children that are fetched at once.
const FETCHES: usize = 4;

/// A manifest that the registry serves in this repository, whose bytes hash to this digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    registry: RegistryName,
    repository: Repository,
    digest: Digest,
    media_type: String,
    size: u64,
}

impl Subject {
    pub fn registry(&self) -> &RegistryName {
        &self.registry
    }

    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    pub fn media_type(&self) -> &str {
        &self.media_type
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// One that no registry served, for tests of what is done with it.
    #[cfg(test)]
    pub(crate) fn in_test(reference: &str, content: &[u8]) -> Self {
        let crate::oci::Reference { registry, repository, .. } = reference.parse().unwrap();
        Self {
            registry,
            repository,
            digest: Digest::of(content),
            media_type: media_type::OCI_MANIFEST.into(),
            size: content.len() as u64,
        }
    }

    fn new(registry: &Registry, repository: &Repository, manifest: &Manifest) -> Self {
        Self {
            registry: registry.name().clone(),
            repository: repository.clone(),
            digest: manifest.digest().clone(),
            media_type: manifest.media_type().to_owned(),
            size: manifest.content().len() as u64,
        }
    }
}

/// What the registry says today about what an event named.
#[derive(Debug)]
pub enum Located {
    /// There, and something to sign.
    Image(Image),
    /// There, and itself a signature, attestation, SBOM or other referrer.
    Attachment,
    /// Not there: deleted meanwhile, or never pushed.
    Missing,
}

/// A manifest to sign, with the children that are signed with it.
#[derive(Debug)]
pub struct Image {
    pub root: Subject,
    /// The platform manifests of an index, and those of indexes within it: each once, and as many as were asked for.
    pub children: Vec<Subject>,
    pub tag: TagState,
}

/// Which manifests of an index are wanted with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Children {
    /// Those that are signed with it: its platforms.
    Signed,
    /// Those that somebody may have signed: build attestations, too.
    All,
}

impl Children {
    /// There is one build attestation for each platform.
    fn most(self) -> usize {
        match self {
            Self::Signed => MAX_CHILDREN,
            Self::All => 2 * MAX_CHILDREN,
        }
    }
}

/// What became of the tag that the event named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagState {
    /// The registry resolves it to the subject's digest.
    Current(Tag),
    /// It names another digest, or nothing, by now.
    Moved(Tag),
    /// The push was by digest.
    None,
}

/// Why it cannot be told what to sign.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error("the manifest {0} cannot be read as a manifest")]
    Malformed(Digest, #[source] serde_json::Error),
    #[error("the index {0} has more than {MAX_CHILDREN} children")]
    TooManyChildren(Digest),
}

impl Classify for Error {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Registry(error) => error.verdict(),
            Self::Malformed(..) => {
                Verdict::Refuse { cure: "push the image again with a tool that writes OCI or Docker schema 2 manifests" }
            }
            Self::TooManyChildren(_) => {
                Verdict::Refuse { cure: "sign the images one by one: the index is larger than any that is known" }
            }
        }
    }
}

/// Asks the registry for `digest` in `repository`, for the tag as it stands now, and for these children of an index.
///
/// One request serves both questions while the tag has not moved: what is served under the tag hashes to the digest.
pub async fn locate(
    registry: &Registry,
    repository: &Repository,
    tag: Option<&Tag>,
    digest: &Digest,
    wanted: Children,
) -> Result<Located, Error> {
    let mut found = None;
    let mut state = TagState::None;
    if let Some(tag) = tag {
        found = registry.manifest(repository, &Address::Tag(tag.clone())).await?.filter(|manifest| manifest.digest() == digest);
        state = if found.is_some() { TagState::Current(tag.clone()) } else { TagState::Moved(tag.clone()) };
    }
    let manifest = match found {
        Some(manifest) => manifest,
        None => match registry.manifest(repository, &Address::Digest(digest.clone())).await? {
            Some(manifest) => manifest,
            None => return Ok(Located::Missing),
        },
    };
    let content = Content::read(&manifest)?;
    if content.is_attachment() {
        return Ok(Located::Attachment);
    }
    let children = children(registry, repository, &manifest, content, wanted).await?;
    Ok(Located::Image(Image { root: Subject::new(registry, repository, &manifest), children, tag: state }))
}

/// All manifests below an index that are wanted, breadth first.
async fn children(
    registry: &Registry,
    repository: &Repository,
    root: &Manifest,
    content: Content,
    wanted: Children,
) -> Result<Vec<Subject>, Error> {
    let mut seen = vec![root.digest().clone()];
    let mut subjects = vec![];
    let mut level = content.children(wanted);
    for _ in 0..MAX_DEPTH {
        level.retain(|child| !seen.contains(child));
        level.sort_unstable();
        level.dedup();
        seen.extend(level.iter().cloned());
        // `seen` has the root, too.
        if seen.len() > wanted.most() + 1 {
            return Err(Error::TooManyChildren(root.digest().clone()));
        }
        // What is read of a child is kept and its bytes are not: hundreds of times 4 MiB is more than there is.
        let found: Vec<_> = stream::iter(std::mem::take(&mut level))
            .map(|child| async move { child_of(registry, repository, child, wanted).await })
            .buffered(FETCHES)
            .try_collect()
            .await?;
        for (subject, children) in found.into_iter().flatten() {
            level.extend(children);
            subjects.push(subject);
        }
        if level.is_empty() {
            break;
        }
    }
    Ok(subjects)
}

/// A child, and its own children. None of one that is attached to an image, if only those that are signed are wanted, and of one
/// that is not in this repository, as sparse indexes have them: nothing can be said about it.
async fn child_of(
    registry: &Registry,
    repository: &Repository,
    digest: Digest,
    wanted: Children,
) -> Result<Option<(Subject, Vec<Digest>)>, Error> {
    let Some(manifest) = registry.manifest(repository, &Address::Digest(digest)).await? else { return Ok(None) };
    let content = Content::read(&manifest)?;
    if wanted == Children::Signed && content.is_attachment() {
        return Ok(None);
    }
    let mut children = content.children(wanted);
    // More are too many, whatever they are.
    children.truncate(wanted.most() + 1);
    Ok(Some((Subject::new(registry, repository, &manifest), children)))
}

/// What is read of a manifest to tell images from what is attached to images.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Content {
    artifact_type: Option<String>,
    config: Option<TypedDescriptor>,
    // Absent or null where there are none: Go writes the latter for a list that was never made.
    layers: Option<Vec<TypedDescriptor>>,
    manifests: Option<Vec<Descriptor>>,
    subject: Option<serde::de::IgnoredAny>,
    #[serde(skip)]
    is_index: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypedDescriptor {
    #[serde(default)]
    media_type: String,
}

impl Content {
    fn read(manifest: &Manifest) -> Result<Self, Error> {
        Self::parse(manifest.media_type(), manifest.content()).map_err(|error| Error::Malformed(manifest.digest().clone(), error))
    }

    /// Reads the bytes of a manifest of this media type.
    pub fn parse(media_type: &str, content: &[u8]) -> Result<Self, serde_json::Error> {
        let mut this: Self = serde_json::from_slice(content)?;
        this.is_index = media_type::is_index(media_type);
        Ok(this)
    }

    /// Whether this belongs to another manifest, and so must not be signed: rules 6 to 10 of the formats' section E.
    pub fn is_attachment(&self) -> bool {
        if self.subject.is_some() {
            return true;
        }
        if self.is_index {
            // A referrers fallback index under another name: all children are typed artifacts, none is for a platform.
            let manifests = self.manifests.as_deref().unwrap_or_default();
            return !manifests.is_empty()
                && manifests.iter().all(|child| child.artifact_type.is_some() && child.platform.is_none());
        }
        let config_type = self.config.as_ref().map(|config| config.media_type.as_str());
        if self.artifact_type.as_deref().into_iter().chain(config_type).any(attachment::is_config) {
            return true;
        }
        let layers = self.layers.as_deref().unwrap_or_default();
        !layers.is_empty() && layers.iter().all(|layer| attachment::is_layer(&layer.media_type))
    }

    /// The children of an index that are wanted.
    fn children(&self, wanted: Children) -> Vec<Digest> {
        let is_wanted = |child: &Descriptor| wanted == Children::All || !is_build_attestation(child);
        let signable = |child: &&Descriptor| media_type::is_manifest(&child.media_type) && is_wanted(child);
        let manifests = self.manifests.as_deref().filter(|_| self.is_index).unwrap_or_default();
        manifests.iter().filter(signable).map(|child| child.digest.clone()).collect()
    }
}

/// `BuildKit` puts attestations beside the platforms of an index, marked so.
fn is_build_attestation(child: &Descriptor) -> bool {
    let unknown_platform =
        child.platform.as_ref().is_some_and(|platform| platform.os == "unknown" && platform.architecture == "unknown");
    let marked = child.annotations.get("vnd.docker.reference.type").is_some_and(|kind| kind == "attestation-manifest");
    unknown_platform && marked
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn is_attachment(media_type: &str, content: &serde_json::Value) -> bool {
        Content::parse(media_type, content.to_string().as_bytes()).unwrap().is_attachment()
    }

    fn descriptor(media_type: &str) -> serde_json::Value {
        json!({ "mediaType": media_type, "digest": Digest::of(media_type.as_bytes()), "size": 2 })
    }

    #[test]
    fn what_belongs_to_another_manifest_is_told_from_what_is_signed() {
        let config = descriptor(media_type::OCI_CONFIG);
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar+gzip");
        let image = json!({ "config": config, "layers": [layer] });
        let helm = json!({ "config": descriptor("application/vnd.cncf.helm.config.v1+json"), "layers": [descriptor("application/vnd.cncf.helm.chart.content.v1.tar+gzip")] });
        let empty = json!({ "config": config, "layers": [] });
        let null = json!({ "config": config, "layers": null, "subject": null, "artifactType": null });
        for signed in [&image, &helm, &empty, &null] {
            assert!(!is_attachment(media_type::OCI_MANIFEST, signed), "{signed}");
        }
        let with = |key: &str, value: serde_json::Value| {
            let mut changed = image.clone();
            changed[key] = value;
            changed
        };
        for attachment in [
            with("subject", descriptor(media_type::OCI_MANIFEST)),
            with("artifactType", json!("application/vnd.dev.sigstore.bundle.v0.3+json")),
            with("config", descriptor("application/vnd.cncf.notary.signature")),
            with("config", descriptor("application/vnd.dev.cosign.artifact.sbom.v1+json")),
            with("layers", json!([descriptor("application/vnd.dev.cosign.simplesigning.v1+json")])),
            with("layers", json!([descriptor("application/vnd.in-toto+json"), descriptor("application/vnd.in-toto+json")])),
            with("layers", json!([descriptor("text/spdx+json")])),
        ] {
            assert!(is_attachment(media_type::OCI_MANIFEST, &attachment), "{attachment}");
        }
        assert!(!is_attachment(media_type::OCI_MANIFEST, &with("layers", json!([descriptor("application/cose"), layer]))));
    }

    #[test]
    fn an_index_is_signed_with_its_platforms_and_without_its_attestations() {
        let platform = json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(b"1"), "size": 1, "platform": { "os": "linux", "architecture": "amd64" } });
        let attestation = json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(b"2"), "size": 1,
            "platform": { "os": "unknown", "architecture": "unknown" }, "annotations": { "vnd.docker.reference.type": "attestation-manifest" } });
        let foreign = json!({ "mediaType": "application/octet-stream", "digest": Digest::of(b"3"), "size": 1 });
        let index = json!({ "manifests": [platform, attestation, foreign] }).to_string();
        let content = Content::parse(media_type::OCI_INDEX, index.as_bytes()).unwrap();
        assert!(!content.is_attachment());
        assert_eq!(content.children(Children::Signed), [Digest::of(b"1")]);
        assert_eq!(content.children(Children::All), [Digest::of(b"1"), Digest::of(b"2")]);
    }

    #[test]
    fn a_referrers_index_under_any_name_is_an_attachment() {
        let referrer = json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(b"1"), "size": 1, "artifactType": "application/vnd.cncf.notary.signature" });
        assert!(is_attachment(media_type::OCI_INDEX, &json!({ "manifests": [referrer] })));
        for empty in [json!({ "manifests": [] }), json!({ "manifests": null }), json!({})] {
            assert!(!is_attachment(media_type::OCI_INDEX, &empty), "{empty}");
        }
    }
}
