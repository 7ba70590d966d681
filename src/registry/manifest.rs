//! Manifests as a registry served them: hashed, bounded, and of a type that we know.

use std::{borrow::Cow, collections::BTreeMap};

use bytes::Bytes;
use serde::{Deserialize, de::IgnoredAny};

use super::Address;
use crate::oci::{Digest, media_type};

/// A manifest's bytes, and what is known of them: that they hash to `digest`, and that they are what `media_type` says.
///
/// There is no way to make one but [`Registry::manifest`](super::Registry::manifest).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    media_type: &'static str,
    digest: Digest,
    content: Bytes,
}

impl Manifest {
    /// The largest manifest that is read, in bytes: what distribution-spec 1.1 asks registries to take, and what
    /// containers/image reads.
    pub const LIMIT: usize = 4 * 1024 * 1024;

    /// One of the four manifest types of [`media_type`].
    pub fn media_type(&self) -> &'static str {
        self.media_type
    }

    /// The digest that was asked for, or the SHA-256 of the bytes if a tag was.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The bytes as served: a JSON object.
    pub fn content(&self) -> &Bytes {
        &self.content
    }

    /// `content_type` is the answer's header, `claimed` its `Docker-Content-Digest`.
    pub(super) fn new(
        at: &Address,
        content_type: Option<&str>,
        claimed: Option<&Digest>,
        content: Bytes,
    ) -> Result<Self, Refused> {
        let digest = match at {
            Address::Digest(digest) if digest.matches(&content) => digest.clone(),
            Address::Digest(digest) => {
                return Err(Refused::Mismatch { expected: digest.clone(), found: Digest::of(&content) });
            }
            Address::Tag(_) => Digest::of(&content),
        };
        // A claim in another algorithm says nothing about this one.
        if let Some(claimed) = claimed.filter(|claimed| claimed.algorithm() == digest.algorithm() && **claimed != digest) {
            return Err(Refused::Mismatch { expected: digest, found: claimed.clone() });
        }
        Ok(Self { media_type: media_type_of(content_type, &content)?, digest, content })
    }
}

/// Why an answer is not a [`Manifest`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Mismatch { expected: Digest, found: Digest },
    Malformed(String),
}

impl From<String> for Refused {
    fn from(problem: String) -> Self {
        Self::Malformed(problem)
    }
}

/// The type that both the content and the header agree on. Content that could be read as two types is refused, because two
/// readers could then see two different images in what we sign (CVE-2021-41190).
fn media_type_of(content_type: Option<&str>, content: &[u8]) -> Result<&'static str, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Shape<'a> {
        #[serde(borrow)]
        media_type: Option<Cow<'a, str>>,
        schema_version: u64,
        manifests: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        config: Option<IgnoredAny>,
        fs_layers: Option<IgnoredAny>,
    }

    let no_manifest = |error: serde_json::Error| format!("it is not a JSON manifest: {error}");
    let shape: Shape<'_> = serde_json::from_slice(content).map_err(no_manifest)?;
    // Readers in Go do not tell `Manifests` from `manifests`.
    #[expect(clippy::zero_sized_map_values, reason = "a set is not read from an object")]
    let members: BTreeMap<Cow<'_, str>, IgnoredAny> = serde_json::from_slice(content).map_err(no_manifest)?;
    let known = ["mediaType", "schemaVersion", "manifests", "layers", "config", "fsLayers"];
    if let Some(twin) = members.keys().find(|name| known.iter().any(|known| *name != known && folded(name) == folded(known))) {
        return Err(format!("it has a member {:?}, which some readers take for another", short(twin)));
    }
    if shape.schema_version != 2 || shape.fs_layers.is_some() {
        return Err(format!("its schemaVersion is {}, only 2 is handled", shape.schema_version));
    }
    let header = content_type.map(|text| text.split(';').next().unwrap_or_default().trim());
    let named = match (shape.media_type.as_deref(), header) {
        (Some(member), Some(header)) if !member.eq_ignore_ascii_case(header) => {
            return Err(format!("its mediaType is {:?}, but it was served as {:?}", short(member), short(header)));
        }
        (Some(named), _) | (None, Some(named)) => named,
        (None, None) => return Err("neither it nor the answer's header names its media type".to_owned()),
    };
    let known = [media_type::OCI_MANIFEST, media_type::OCI_INDEX, media_type::DOCKER_MANIFEST, media_type::DOCKER_MANIFEST_LIST]
        .into_iter()
        .find(|known| known.eq_ignore_ascii_case(named))
        .ok_or_else(|| format!("its media type is {:?}", short(named)))?;
    let as_index = shape.layers.is_none() && shape.config.is_none();
    // What has no members of either could be served as both.
    let as_image = shape.manifests.is_none() && !as_index;
    if if media_type::is_index(known) { as_index } else { as_image } {
        Ok(known)
    } else {
        Err(format!("it is served as {known}, but has members of another type or none of this one"))
    }
}

/// As Go's `encoding/json` compares names: letters are the same in either case, and so are the two others that fold to one in ASCII.
fn folded(name: &str) -> String {
    name.replace('\u{17f}', "s").replace('\u{212a}', "k").to_ascii_lowercase()
}

fn short(text: &str) -> String {
    super::error::cut(text, 120)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(content_type: Option<&str>, content: &str) -> Result<&'static str, String> {
        media_type_of(content_type, content.as_bytes())
    }

    #[test]
    fn the_media_type_is_what_content_and_header_agree_on() {
        let oci = media_type::OCI_MANIFEST;
        let member = format!(r#"{{"schemaVersion":2,"mediaType":"{oci}","config":{{}},"layers":[]}}"#);
        let bare = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
        assert_eq!(typed(Some(oci), &member), Ok(oci));
        assert_eq!(typed(None, &member), Ok(oci));
        assert_eq!(typed(Some(oci), bare), Ok(oci));
        assert_eq!(typed(Some("Application/vnd.OCI.image.manifest.v1+json; charset=utf-8"), &member), Ok(oci));
        assert!(typed(Some(media_type::DOCKER_MANIFEST), &member).is_err());
        assert!(typed(Some("text/html"), &member).is_err());
        assert!(typed(None, bare).is_err());
        assert!(typed(Some("application/json"), bare).is_err());
    }

    #[test]
    fn content_that_two_readers_could_take_for_two_things_is_refused() {
        let (image, index) = (media_type::OCI_MANIFEST, media_type::OCI_INDEX);
        for (header, content) in [
            (image, r#"{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}"#),
            (index, r#"{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}"#),
            (index, r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#),
            (image, r#"{"schemaVersion":2,"layers":[],"layers":[]}"#),
            (image, r#"{"schemaVersion":2}"#),
            (image, r#"{"schemaVersion":2,"config":{},"layers":[],"Manifests":[]}"#),
            (image, "{\"schemaVersion\":2,\"config\":{},\"layers\":[],\"manifest\u{17f}\":[]}"),
            (image, r#"{"schemaVersion":2,"fsLayers":[]}"#),
            (image, r#"{"schemaVersion":1,"layers":[]}"#),
            (image, r#"{"layers":[]}"#),
            (image, "<html>"),
            (image, "[]"),
            (image, ""),
        ] {
            assert!(typed(Some(header), content).is_err(), "{content}");
        }
    }

    #[test]
    fn bytes_of_another_digest_are_refused() {
        let content = Bytes::from_static(br#"{"schemaVersion":2,"config":{},"layers":[]}"#);
        let asked = Address::Digest(Digest::of(b"other"));
        assert!(matches!(
            Manifest::new(&asked, Some(media_type::OCI_MANIFEST), None, content.clone()),
            Err(Refused::Mismatch { .. })
        ));
        let tag = Address::Tag("1".parse().unwrap());
        let lie = Digest::of(b"other");
        assert!(matches!(
            Manifest::new(&tag, Some(media_type::OCI_MANIFEST), Some(&lie), content.clone()),
            Err(Refused::Mismatch { .. })
        ));
        let manifest = Manifest::new(&tag, Some(media_type::OCI_MANIFEST), None, content.clone()).unwrap();
        assert_eq!(manifest.digest(), &Digest::of(&content));
    }
}
