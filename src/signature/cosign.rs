//! The `.sig` tag: simple signing payloads as the layers of one OCI image manifest.
//!
//! What is signed is SHA-256 of a small JSON payload that names the digest and the reference. The payload is a layer's
//! content; the signature is an annotation of the layer's descriptor. All signatures of a digest, by whomever, are
//! layers of one manifest, so writing is always reading, adding, and writing back. Everything here is pure.
//!
//! Source: sigstore's signature specification for simple signing, and containers/image's reader, which is the strictest.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    kms::RawSignature,
    oci::{Digest, Reference, media_type},
    registry::Manifest,
    subject::Subject,
};

/// The media type of a layer that is a payload.
pub const LAYER_MEDIA_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// The annotation of such a layer that holds the signature, in standard base64.
pub const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";
/// The content of the config blob: constant, so that a repository needs it once.
pub const EMPTY_CONFIG: &[u8] = b"{}";
/// No payload that any reader takes is larger, in bytes (containers/image takes 4 MiB; ours are some hundred bytes).
pub const MAX_PAYLOAD: u64 = 1024 * 1024;

/// What the payload's `type` must say.
const PAYLOAD_TYPE: &str = "cosign container image signature";
/// cosign reads no more layers than these, so a further signature would be invisible.
const MAX_LAYERS: usize = 1000;

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

    fn to_descriptor(&self) -> Value {
        json!({
            "mediaType": LAYER_MEDIA_TYPE,
            "size": self.size,
            "digest": self.payload,
            "annotations": { SIGNATURE_ANNOTATION: BASE64_STANDARD.encode(&self.signature) },
        })
    }

    fn from_descriptor(descriptor: &Value) -> Option<Self> {
        let descriptor: LayerDescriptor = serde_json::from_value(descriptor.clone()).ok()?;
        if descriptor.media_type != LAYER_MEDIA_TYPE {
            return None;
        }
        let signature = BASE64_STANDARD.decode(descriptor.annotations.get(SIGNATURE_ANNOTATION)?.as_str()?).ok()?;
        Some(Self { payload: descriptor.digest, size: descriptor.size, signature })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayerDescriptor {
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, Value>,
}

/// Why what the `.sig` tag points to cannot be added to. It is never overwritten.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it is not JSON")]
    NotJson(#[from] serde_json::Error),
    #[error("it is {0}, not an image manifest")]
    NotAManifest(String),
    #[error("its `layers` are not a list")]
    NoLayers,
    #[error("it holds {0} signatures, and verifiers read no more than {MAX_LAYERS}")]
    Full(usize),
    #[error("it would have {0} bytes with a further signature, and nobody reads more than {limit}", limit = Manifest::LIMIT)]
    TooLarge(usize),
}

/// The manifest under the `.sig` tag, with everything in it that others wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct SignatureManifest {
    /// As it was read, so that adding to it changes nothing else.
    document: Map<String, Value>,
    layers: Vec<Layer>,
}

impl SignatureManifest {
    /// One without signatures yet, with the constant config.
    #[must_use]
    pub fn empty() -> Self {
        let config = json!({
            "mediaType": media_type::OCI_CONFIG,
            "size": EMPTY_CONFIG.len(),
            "digest": Digest::of(EMPTY_CONFIG),
        });
        let document = [
            ("schemaVersion".to_owned(), json!(2)),
            ("mediaType".to_owned(), json!(media_type::OCI_MANIFEST)),
            ("config".to_owned(), config),
            ("layers".to_owned(), json!([])),
        ];
        Self { document: document.into_iter().collect(), layers: vec![] }
    }

    /// Reads what a registry serves under the tag. Layers that are no signatures are kept and not looked at.
    pub fn read(media_type: &str, content: &[u8]) -> Result<Self, Error> {
        if !matches!(media_type, media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST) {
            return Err(Error::NotAManifest(media_type.escape_debug().to_string()));
        }
        let document: Map<String, Value> = serde_json::from_slice(content)?;
        let layers = document.get("layers").and_then(Value::as_array).ok_or(Error::NoLayers)?;
        let layers = layers.iter().filter_map(Layer::from_descriptor).collect();
        Ok(Self { document, layers })
    }

    /// The signatures in it, as claimed: nothing here has been verified.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Whether it holds exactly this signature.
    #[must_use]
    pub fn contains(&self, layer: &Layer) -> bool {
        self.layers.contains(layer)
    }

    /// Adds signatures that are not in it yet. All that others wrote stays, unknown members included.
    pub fn add(&mut self, layers: impl IntoIterator<Item = Layer>) -> Result<(), Error> {
        // containers/image takes OCI manifests only, so one that another tool wrote with Docker's type is rewritten.
        self.document.insert("mediaType".into(), json!(media_type::OCI_MANIFEST));
        for layer in layers {
            if self.contains(&layer) {
                continue;
            }
            let descriptors = self.document.get_mut("layers").and_then(Value::as_array_mut).ok_or(Error::NoLayers)?;
            if descriptors.len() >= MAX_LAYERS {
                return Err(Error::Full(descriptors.len()));
            }
            descriptors.push(layer.to_descriptor());
            self.layers.push(layer);
        }
        Ok(())
    }

    /// The config's blob, if it is not the constant one and so lists the layers: adding one must extend it.
    #[must_use]
    pub fn own_config(&self) -> Option<Digest> {
        let digest: Digest = self.document.get("config")?.get("digest")?.as_str()?.parse().ok()?;
        (digest != Digest::of(EMPTY_CONFIG)).then_some(digest)
    }

    /// Points the manifest at a config that [`extend_config`] made.
    pub fn set_config(&mut self, content: &[u8]) {
        if let Some(config) = self.document.get_mut("config").and_then(Value::as_object_mut) {
            config.insert("digest".into(), json!(Digest::of(content)));
            config.insert("size".into(), json!(content.len()));
        }
    }

    /// The bytes to store, and their media type is always [`media_type::OCI_MANIFEST`].
    ///
    /// # Errors
    /// When they are more than anybody reads: storing them would hide the signatures that are there.
    pub fn to_bytes(&self) -> Result<Bytes, Error> {
        let content = serde_json::to_vec(&self.document).expect("JSON values always serialise");
        if content.len() > Manifest::LIMIT { Err(Error::TooLarge(content.len())) } else { Ok(content.into()) }
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
mod tests {
    use super::*;

    const IMAGE: &[u8] = include_bytes!("../../tests/data/vectors/image/manifest.json");
    const REFERENCE: &str = "registry.example.com/team/app:1.0";

    fn vector(folder: &str, file: &str) -> Vec<u8> {
        let path = format!("{}/tests/data/vectors/{folder}/{file}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn prepared(reference: &str) -> Prepared {
        Prepared::new(&Subject::in_test(REFERENCE, IMAGE), &reference.parse().unwrap())
    }

    fn signature(folder: &str) -> RawSignature {
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
    fn the_layer_is_the_vectors_and_the_config_is_the_constant_one() {
        let written: Value = serde_json::from_slice(&vector("A-rsa-pkcs1", "manifest.json")).unwrap();
        let mut manifest = SignatureManifest::empty();
        manifest.add([prepared(REFERENCE).assemble(&signature("A-rsa-pkcs1"))]).unwrap();
        let ours: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();
        assert_eq!(ours["layers"], written["layers"]);
        assert_eq!(ours["mediaType"], written["mediaType"]);
        assert_eq!(ours["config"]["digest"], "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
        assert_eq!(manifest.own_config(), None);
    }

    #[test]
    fn what_others_wrote_survives_an_addition() {
        let theirs = vector("A-two-tags-rsa-pkcs1", "manifest.json");
        let mut document: Value = serde_json::from_slice(&theirs).unwrap();
        document["annotations"] = json!({ "kept": "yes" });
        document["layers"][0]["annotations"]["of/another"] = json!("kept");
        document["layers"].as_array_mut().unwrap().push(json!({ "mediaType": "application/x-unknown", "odd": [1, 2] }));
        let mut manifest = SignatureManifest::read(media_type::DOCKER_MANIFEST, document.to_string().as_bytes()).unwrap();
        assert_eq!(manifest.layers().len(), 2);
        manifest.add([prepared(REFERENCE).assemble(&RawSignature(vec![1, 2, 3]))]).unwrap();
        let after: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();
        assert_eq!(after["annotations"], document["annotations"]);
        assert_eq!(after["layers"].as_array().unwrap()[..3], document["layers"].as_array().unwrap()[..3]);
        assert_eq!(after["layers"].as_array().unwrap().len(), 4);
        assert_eq!(after["mediaType"], media_type::OCI_MANIFEST);
    }

    #[test]
    fn adding_twice_adds_once() {
        let layer = prepared(REFERENCE).assemble(&signature("A-rsa-pkcs1"));
        let mut manifest = SignatureManifest::empty();
        manifest.add([layer.clone(), layer.clone()]).unwrap();
        manifest.add([layer]).unwrap();
        assert_eq!(manifest.layers().len(), 1);
    }

    #[test]
    fn a_config_that_lists_layers_is_extended_as_cosign_does() {
        let manifest = SignatureManifest::read(media_type::OCI_MANIFEST, &vector("A-rsa-pkcs1", "manifest.json")).unwrap();
        let config = vector("A-rsa-pkcs1", "config.json");
        assert_eq!(manifest.own_config(), Some(Digest::of(&config)));
        let layer = prepared(REFERENCE).assemble(&signature("A-rsa-pkcs1"));
        let extended: Value = serde_json::from_slice(&extend_config(&config, std::slice::from_ref(&layer)).unwrap()).unwrap();
        assert_eq!(extended["rootfs"]["diff_ids"].as_array().unwrap().len(), 2);
        assert_eq!(extended["rootfs"]["diff_ids"][1], json!(layer.payload()));
        assert_eq!(extended["history"].as_array().unwrap().len(), 2);
        assert_eq!(extend_config(b"{}", &[layer]), None);
    }

    #[test]
    fn what_is_no_signature_manifest_is_never_added_to() {
        for (media_type, content) in [
            (media_type::OCI_INDEX, r#"{"manifests":[]}"#),
            (media_type::OCI_MANIFEST, "not json"),
            (media_type::OCI_MANIFEST, "[]"),
            (media_type::OCI_MANIFEST, r#"{"layers":{}}"#),
            (media_type::OCI_MANIFEST, "{}"),
        ] {
            assert!(SignatureManifest::read(media_type, content.as_bytes()).is_err(), "{content}");
        }
        let full: Vec<Value> = (0..MAX_LAYERS).map(|_| json!({})).collect();
        let full = json!({ "layers": full }).to_string();
        let mut manifest = SignatureManifest::read(media_type::OCI_MANIFEST, full.as_bytes()).unwrap();
        let layer = prepared(REFERENCE).assemble(&RawSignature(vec![1]));
        assert!(matches!(manifest.add([layer]), Err(Error::Full(MAX_LAYERS))));
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
            format!("{good}x"),
        ] {
            assert!(read(&strict).is_err(), "{strict}");
        }
    }
}
