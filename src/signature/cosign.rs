//! The `.sig` tag: simple signing payloads as the layers of one OCI image manifest.
//!
//! What is signed is SHA-256 of a small JSON payload that names the digest and the reference. The payload is a layer's
//! content; the signature is an annotation of the layer's descriptor. All signatures of a digest, by whomever, are
//! layers of one manifest, so writing is always reading, adding, and writing back. Everything here is pure.
//!
//! Source: sigstore's signature specification for simple signing, and containers/image's reader, which is the strictest.

mod manifest;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::Claim;
use crate::{
    kms::RawSignature,
    oci::{Digest, Reference},
    subject::Subject,
};
pub use manifest::{Entry, Error, SignatureManifest};

/// The media type of a layer that is a payload.
pub const LAYER_MEDIA_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// The type of a referrer that has such layers: what cosign writes in its experimental mode `oci-1-1` instead of the `.sig` tag, and
/// reads with `--experimental-oci11` only.
pub const ARTIFACT_TYPE: &str = "application/vnd.dev.cosign.artifact.sig.v1+json";
/// The annotation of such a layer that holds the signature, in standard base64.
pub const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";
/// No payload that any reader takes is larger, in bytes (containers/image takes 4 MiB; ours are some hundred bytes).
pub const MAX_PAYLOAD: u64 = 1024 * 1024;

/// What the payload's `type` must say.
const PAYLOAD_TYPE: &str = "cosign container image signature";

/// Bytes that are ready to be signed, made from a subject that the registry served and we hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    reference: Reference,
    digest: Digest,
    payload: Bytes,
    payload_sha256: [u8; 32],
}

impl Prepared {
    /// The payload that says: `digest` of `subject` is approved as `reference`. Same input, same bytes.
    #[must_use]
    pub fn new(subject: &Subject, reference: &Reference) -> Self {
        let payload = Payload {
            critical: Critical {
                identity: Identity { docker_reference: reference.to_string() },
                image: Image { docker_manifest_digest: subject.digest().to_string() },
                r#type: PAYLOAD_TYPE.into(),
            },
            optional: None,
        };
        let payload = Bytes::from(serde_json::to_vec(&payload).expect("strings always serialise"));
        let payload_sha256 = Sha256::digest(&payload).into();
        Self { reference: reference.clone(), digest: subject.digest().clone(), payload, payload_sha256 }
    }

    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The digest that the payload approves.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The layer's content.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// What the KMS signs: SHA-256 of the payload, 32 bytes.
    pub fn payload_sha256(&self) -> &[u8; 32] {
        &self.payload_sha256
    }

    /// The name of the payload's blob.
    pub fn payload_digest(&self) -> Digest {
        Digest::from_sha256(&self.payload_sha256)
    }

    /// The layer that holds this payload and its signature (PKCS#1 octets, or an ASN.1 `ECDSA-Sig-Value`).
    #[must_use]
    pub fn assemble(&self, signature: &RawSignature) -> Layer {
        Layer { payload: self.payload_digest(), size: self.payload.len() as u64, signature: signature.as_ref().to_vec() }
    }
}

/// One signature as it stands in the manifest: the payload by digest, and the signature over it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    payload: Digest,
    size: u64,
    signature: Vec<u8>,
}

impl Layer {
    /// The name of the payload's blob.
    pub fn payload(&self) -> &Digest {
        &self.payload
    }

    /// SHA-256 of the payload, if that is what its digest is: what the signature is over.
    pub fn payload_sha256(&self) -> Option<[u8; 32]> {
        let mut hash = [0; 32];
        (self.payload.algorithm() == "sha256").then(|| hex::decode_to_slice(self.payload.encoded(), &mut hash).ok())??;
        Some(hash)
    }

    pub fn signature(&self) -> &[u8] {
        &self.signature
    }

    /// What it says, if these are the bytes of its payload.
    ///
    /// # Errors
    /// A clause that says why no verifier would take them.
    pub fn claim(&self, payload: &[u8]) -> Result<Claim, String> {
        let signed_sha256 = self.payload_sha256().filter(|_| self.payload.matches(payload));
        let signed_sha256 = signed_sha256.ok_or_else(|| format!("its bytes are not those of {}", self.payload))?;
        let Statement { reference, digest } = Statement::read(payload)?;
        Ok(Claim {
            signed_sha256,
            signature: self.signature.clone(),
            digests: vec![digest],
            reference: Some(reference),
            notation: None,
        })
    }
}

/// Adds `layers` to an image config that lists its layers, as cosign writes it: one `diff_id` and one history entry
/// each. None if the content is no such config, which then stays as it is: no verifier reads it.
#[must_use]
pub fn extend_config(content: &[u8], layers: &[Layer]) -> Option<Vec<u8>> {
    let mut config: Map<String, Value> = serde_json::from_slice(content).ok()?;
    let ids = config.get_mut("rootfs")?.get_mut("diff_ids")?.as_array_mut()?;
    ids.extend(layers.iter().map(|layer| json!(layer.payload)));
    if let Some(history) = config.get_mut("history").and_then(Value::as_array_mut) {
        history.extend(layers.iter().map(|_| json!({ "created": "0001-01-01T00:00:00Z" })));
    }
    serde_json::to_vec(&config).ok()
}

/// Bytes of a reference that a payload approves: more than any has, and few enough to be repeated for each of ten thousand layers
/// over one payload.
const LONGEST_REFERENCE: usize = 1024;

/// What a payload says, read as strictly as the strictest verifier reads it: exactly these members, none twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// As it stands; cosign itself writes a bare `host/repository`.
    pub reference: String,
    pub digest: Digest,
}

impl Statement {
    /// # Errors
    /// A clause that says what no verifier would take.
    pub fn read(payload: &[u8]) -> Result<Self, String> {
        let payload: Payload = serde_json::from_slice(payload).map_err(|error| error.to_string())?;
        if payload.critical.r#type != PAYLOAD_TYPE {
            return Err(format!("its type is {:?}, not {PAYLOAD_TYPE:?}", payload.critical.r#type));
        }
        if payload.critical.identity.docker_reference.len() > LONGEST_REFERENCE {
            return Err(format!("its reference is longer than {LONGEST_REFERENCE} bytes, which none is"));
        }
        let digest =
            payload.critical.image.docker_manifest_digest.parse().map_err(|error: crate::oci::ParseError| error.to_string())?;
        Ok(Self { reference: payload.critical.identity.docker_reference, digest })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    critical: Critical,
    #[serde(deserialize_with = "present")]
    optional: Option<Optional>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Critical {
    identity: Identity,
    image: Image,
    r#type: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    #[serde(rename = "docker-reference")]
    docker_reference: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    docker_manifest_digest: String,
}

/// Annotations of the signer's own. Two keys have types that readers insist on.
#[derive(Serialize, Deserialize)]
struct Optional {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    creator: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timestamp: Option<i64>,
    #[serde(flatten)]
    rest: UniqueKeys,
}

/// `null` is a value here, and absence is an error: a plain `Option` would take both alike.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Optional>, D::Error> {
    Option::deserialize(deserializer)
}

#[derive(Serialize)]
#[serde(transparent)]
struct UniqueKeys(Map<String, Value>);

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = UniqueKeys;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object without duplicate keys")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut access: A) -> Result<UniqueKeys, A::Error> {
                let mut map = Map::new();
                while let Some((key, value)) = access.next_entry::<String, Value>()? {
                    if map.contains_key(&key) {
                        return Err(de::Error::custom(format_args!("duplicate key {key:?}")));
                    }
                    map.insert(key, value);
                }
                Ok(UniqueKeys(map))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use base64::{Engine as _, prelude::BASE64_STANDARD};

    use super::*;

    pub(crate) const IMAGE: &[u8] = include_bytes!("../../tests/data/vectors/image/manifest.json");
    pub(crate) const REFERENCE: &str = "registry.example.com/team/app:1.0";

    pub(crate) fn vector(folder: &str, file: &str) -> Vec<u8> {
        let path = format!("{}/tests/data/vectors/{folder}/{file}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub(super) fn prepared(reference: &str) -> Prepared {
        Prepared::new(&Subject::in_test(REFERENCE, IMAGE), &reference.parse().unwrap())
    }

    pub(super) fn signature(folder: &str) -> RawSignature {
        let text = String::from_utf8(vector(folder, "signature.b64")).unwrap();
        RawSignature(BASE64_STANDARD.decode(text.trim()).unwrap())
    }

    #[test]
    fn payloads_are_the_vectors_byte_for_byte() {
        for folder in ["A-rsa-pkcs1", "A-ecdsa-p256"] {
            let prepared = prepared(REFERENCE);
            assert_eq!(prepared.payload(), &vector(folder, "payload.json"), "{folder}");
            let hash = String::from_utf8(vector(folder, "payload.sha256.hex")).unwrap();
            assert_eq!(hex::encode(prepared.payload_sha256()), hash.trim(), "{folder}");
        }
        assert_eq!(prepared("registry.example.com/team/app").payload(), &vector("A-repo-only-rsa-pkcs1", "payload.json"));
    }

    #[test]
    fn payloads_are_read_as_strictly_as_the_strictest_verifier_reads_them() {
        let good = String::from_utf8(prepared(REFERENCE).payload().to_vec()).unwrap();
        let read = |text: &str| Statement::read(text.as_bytes());
        let statement = read(&good).unwrap();
        assert_eq!((statement.reference.as_str(), statement.digest), (REFERENCE, Digest::of(IMAGE)));
        for lenient in
            [good.replace("null", "{}"), good.replace("null", r#"{"creator":"me","timestamp":1,"a":"b"}"#), format!("{good}\n")]
        {
            assert!(read(&lenient).is_ok(), "{lenient}");
        }
        for strict in [
            good.replace(r#","optional":null"#, ""),
            good.replace("null", "1"),
            good.replace("null", r#"{"creator":1}"#),
            good.replace("null", r#"{"timestamp":"now"}"#),
            good.replace("null", r#"{"a":"1","a":"2"}"#),
            good.replace(r#""optional":"#, r#""extra":1,"optional":"#),
            good.replace(r#""type":"#, r#""more":1,"type":"#),
            good.replace("cosign container image signature", "atomic container signature"),
            good.replace(r#"{"docker-reference":"#, r#"{"docker-reference":"x","docker-reference":"#),
            good.replace("sha256:", "sha1:"),
            good.replace(REFERENCE, &"x".repeat(1025)),
            format!("{good}x"),
        ] {
            assert!(read(&strict).is_err(), "{strict}");
        }
    }
}
