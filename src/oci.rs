//! The nouns of an OCI registry, parsed once and believed afterwards.
//!
//! Names, tags and digests arrive from events, users and registries, all of whom may lie. Each type here can only be
//! made by its parser, so a value that exists is well-formed: it is safe to put into a URL, a log line or a payload.
//!
//! Grammar: OCI distribution-spec 1.1, "Pulling manifests", and distribution/reference for host names.

pub(crate) mod document;
mod reference;

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256, Sha512};

pub use self::reference::Reference;

/// Why a text is not the name it was taken for. The text itself is quoted with escapes, cut to a readable length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid {what}: {expected}")]
pub struct ParseError {
    what: &'static str,
    expected: &'static str,
    text: String,
}

impl ParseError {
    fn new(what: &'static str, expected: &'static str, text: &str) -> Self {
        const READABLE: usize = 120;
        let mut shown: String = text.chars().take(READABLE).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        Self { what, expected, text: shown }
    }
}

/// Implements what every validated text has: reading, printing, serde through the parser.
macro_rules! validated_text {
    ($name:ident) => {
        impl $name {
            /// The text as it stands in references and URLs.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

/// A registry's name as clients type it: a host, with a port where it is not the default. `registry.example.com`,
/// `127.0.0.1:5000`, `[::1]:5000`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistryName(Arc<str>);

validated_text!(RegistryName);

impl RegistryName {
    /// The name that references without a host belong to.
    #[must_use]
    pub fn docker_hub() -> Self {
        Self("docker.io".into())
    }
}

impl FromStr for RegistryName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong =
            || ParseError::new("registry name", "a host name or address, with :port if needed, and no scheme or path", text);
        if text.len() > 255 {
            return Err(wrong());
        }
        if ["index.docker.io", "registry-1.docker.io"].iter().any(|other| text.eq_ignore_ascii_case(other)) {
            return Ok(Self::docker_hub());
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
            _ => (text, None),
        };
        if port.is_some_and(|port| port.len() > 5 || port.parse::<u16>().map_or(true, |port| port == 0)) {
            return Err(wrong());
        }
        let is_address = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
        let is_label = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if is_address || host.split('.').all(is_label) { Ok(Self(text.to_ascii_lowercase().into())) } else { Err(wrong()) }
    }
}

/// A repository's path within its registry: `team/app`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository(Arc<str>);

validated_text!(Repository);

impl Repository {
    /// The path components, outermost namespace first. There is at least one.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }
}

impl FromStr for Repository {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.len() <= 255 && text.split('/').all(is_path_component) {
            Ok(Self(text.into()))
        } else {
            Err(ParseError::new(
                "repository name",
                "at most 255 characters: lower-case letters and digits, separated by one of . _ __ - or /",
                text,
            ))
        }
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    if !is_word(first) || !is_word(last) {
        return false;
    }
    bytes
        .split(|&b| is_word(b))
        .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&b| b == b'-'))
}

/// A tag: `1.0`, `latest`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(Arc<str>);

validated_text!(Tag);

impl Tag {
    /// What a reference without tag and digest means.
    #[must_use]
    pub fn latest() -> Self {
        Self("latest".into())
    }

    /// The tag under which every cosign signature of `digest` is stored: `sha256-<hex>.sig`. None for a SHA-512 digest:
    /// such a tag would be longer than tags may be.
    #[must_use]
    pub fn cosign_signatures(digest: &Digest) -> Option<Self> {
        (digest.algorithm() == "sha256").then(|| Self(format!("sha256-{}.sig", digest.encoded()).into()))
    }

    /// The tag under which the index of `digest`'s referrers is kept in registries without the referrers API: OCI
    /// distribution-spec 1.1, "Referrers Tag Schema".
    #[must_use]
    pub fn referrers(digest: &Digest) -> Self {
        let encoded = &digest.encoded()[..digest.encoded().len().min(64)];
        Self(format!("{}-{encoded}", digest.algorithm()).into())
    }

    /// Whether this tag is where signers keep what belongs to another manifest: signatures (`.sig`), attestations
    /// (`.att`), SBOMs (`.sbom`), or the referrers fallback index (no suffix). `formats.md` E rule 1.
    #[must_use]
    pub fn is_attachment(&self) -> bool {
        let Some(rest) = ["sha256-", "sha384-", "sha512-"].iter().find_map(|prefix| self.0.strip_prefix(prefix)) else {
            return false;
        };
        let (encoded, suffix) = rest.split_once('.').map_or((rest, None), |(encoded, suffix)| (encoded, Some(suffix)));
        (64..=128).contains(&encoded.len())
            && encoded.bytes().all(is_lower_hex)
            && suffix.is_none_or(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric()))
    }
}

impl FromStr for Tag {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let well_formed = text.len() <= 128
            && text.bytes().next().is_some_and(is_word)
            && text.bytes().all(|b| is_word(b) || b == b'.' || b == b'-');
        if well_formed {
            Ok(Self(text.into()))
        } else {
            Err(ParseError::new("tag", "at most 128 letters, digits, _ . -, not beginning with . or -", text))
        }
    }
}

/// The content address of a manifest or blob: `sha256:<64 lower-case hex>` or `sha512:<128>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(Arc<str>);

validated_text!(Digest);

impl Digest {
    /// SHA-256 of `content`, which is what this project names its own artifacts by.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        Self::from_sha256(&Sha256::digest(content).into())
    }

    /// The digest whose raw SHA-256 value is `hash` (32 bytes).
    #[must_use]
    pub fn from_sha256(hash: &[u8; 32]) -> Self {
        Self(format!("sha256:{}", hex::encode(hash)).into())
    }

    /// Whether `content` hashes to this digest, by this digest's own algorithm.
    #[must_use]
    pub fn matches(&self, content: &[u8]) -> bool {
        match self.algorithm() {
            "sha512" => hex::encode(Sha512::digest(content)) == self.encoded(),
            _ => hex::encode(Sha256::digest(content)) == self.encoded(),
        }
    }

    /// `sha256` or `sha512`.
    #[must_use]
    pub fn algorithm(&self) -> &str {
        self.split().0
    }

    /// The lower-case hex after the colon.
    #[must_use]
    pub fn encoded(&self) -> &str {
        self.split().1
    }

    fn split(&self) -> (&str, &str) {
        self.0.split_once(':').expect("the parser lets no digest without a colon through")
    }
}

impl FromStr for Digest {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let well_formed = text.split_once(':').is_some_and(|(algorithm, encoded)| {
            let length = match algorithm {
                "sha256" => 64,
                "sha512" => 128,
                _ => return false,
            };
            encoded.len() == length && encoded.bytes().all(is_lower_hex)
        });
        if well_formed {
            Ok(Self(text.into()))
        } else {
            Err(ParseError::new("digest", "sha256: and 64 lower-case hex digits, or sha512: and 128", text))
        }
    }
}

fn is_lower_hex(b: u8) -> bool {
    b.is_ascii_digit() || (b'a'..=b'f').contains(&b)
}

/// What a manifest points at: OCI image-spec 1.1, "Content Descriptors". Members that we do not read are not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, deserialize_with = "null_is_none", skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// Annotations that are null are none, as Go's readers have it.
pub(crate) fn null_is_none<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<std::collections::BTreeMap<String, String>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// The machine that a child of an index is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Media types that this project meets. OCI image-spec 1.1 and Docker's image manifest v2, schema 2.
pub mod media_type {
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    pub const DOCKER_MANIFEST_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// Of the blob `{}`, where nothing is to be said: OCI image-spec 1.1, "Guidance for an Empty Descriptor".
    pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";

    /// Sent with every manifest request, in one line: without it distribution 2.8 answers 404 for a manifest that is there.
    pub const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
         application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

    /// Whether content of this type is a manifest that could be signed (an image or an index).
    #[must_use]
    pub fn is_manifest(media_type: &str) -> bool {
        is_index(media_type) || matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
    }

    /// Whether content of this type lists other manifests.
    #[must_use]
    pub fn is_index(media_type: &str) -> bool {
        matches!(media_type, OCI_INDEX | DOCKER_MANIFEST_LIST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e9b028cb7b49c4dae3dc661c2e147f3d78b9b4d1165c406256db92f18d4a0454";

    #[test]
    fn repository_names_follow_the_distribution_grammar() {
        for good in ["a", "a/b", "a.b", "a_b", "a__b", "a-b", "a---b", "0/1"] {
            assert!(good.parse::<Repository>().is_ok(), "{good}");
        }
        let long = "a".repeat(256);
        for bad in ["", "/", "a/", "/a", "A", "a..b", "a___b", "a._b", "-a", "a-", ".", "..", "a/../b", "a\nb", "a%2fb", &long] {
            assert!(bad.parse::<Repository>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tags_of_attachments_are_told_from_tags_of_images() {
        let hex = "ab".repeat(32);
        for attachment in
            [format!("sha256-{hex}"), format!("sha256-{hex}.sig"), format!("sha512-{hex}.att"), format!("sha256-{hex}.sbom")]
        {
            assert!(attachment.parse::<Tag>().unwrap().is_attachment(), "{attachment}");
        }
        for image in [
            "latest".to_owned(),
            "sha256-abc.sig".to_owned(),
            format!("sha256-{hex}."),
            format!("sha256-{hex}.a.b"),
            format!("x-sha256-{hex}"),
        ] {
            assert!(!image.parse::<Tag>().unwrap().is_attachment(), "{image}");
        }
        for bad in ["", ".a", "-a", "a/b", "a:b", &"a".repeat(129)] {
            assert!(bad.parse::<Tag>().is_err(), "{bad}");
        }
    }

    /// distribution-spec 1.1, "Referrers Tag Schema": at most 32 characters of the algorithm, 64 of what is encoded.
    #[test]
    fn the_tag_of_a_digests_referrers_is_cut_as_the_specification_has_it() {
        let tag = |digest: &str| Tag::referrers(&digest.parse().unwrap());
        let (short, long) = ("ab".repeat(32), "ab".repeat(32) + &"cd".repeat(32));
        assert_eq!(tag(&format!("sha256:{short}")).as_str(), format!("sha256-{short}"));
        let cut = tag(&format!("sha512:{long}"));
        assert_eq!(cut.as_str(), format!("sha512-{short}"));
        assert!(cut.is_attachment() && cut.as_str().parse::<Tag>().is_ok());
    }

    #[test]
    fn digests_are_lower_case_hex_of_the_right_length_and_match_their_content() {
        let upper = D.to_uppercase();
        for bad in ["", "sha256:", "sha256:ab", &upper, &format!("md5:{}", "a".repeat(32)), &format!("sha512:{}", "a".repeat(64))]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        let empty = Digest::of(b"{}");
        assert_eq!(empty.as_str(), "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
        assert!(empty.matches(b"{}") && !empty.matches(b"{ }"));
        let sha512: Digest = format!("sha512:{}", hex::encode(Sha512::digest(b"x"))).parse().unwrap();
        assert!(sha512.matches(b"x") && !sha512.matches(b"y"));
    }
}
