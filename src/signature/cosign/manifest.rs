//! The manifest under the `.sig` tag: read within bounds, added to, and written back with all that others put there.

use std::borrow::Cow;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};

use super::{LAYER_MEDIA_TYPE, Layer, SIGNATURE_ANNOTATION};
use crate::{
    oci::{
        Digest,
        document::{self, Document, Members},
        media_type,
    },
    registry::Manifest,
    signature::EMPTY_CONFIG,
};

/// cosign reads no more layers than these, so a further signature would be invisible.
const MAX_LAYERS: usize = 1000;

/// Why what the `.sig` tag points to cannot be added to. It is never overwritten.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it is not a manifest that can be read")]
    Malformed(#[from] serde_json::Error),
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
#[derive(Debug, Clone)]
pub struct SignatureManifest {
    document: Document,
    /// Those of its layers that are signatures.
    layers: Vec<Layer>,
}

/// A signature as it stands in a manifest, with all that its writer noted in its descriptor: cosign keeps a certificate or a
/// log's receipt there.
#[derive(Debug, Clone)]
pub struct Entry {
    layer: Layer,
    descriptor: Box<RawValue>,
}

impl Entry {
    pub fn layer(&self) -> &Layer {
        &self.layer
    }
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
        let mut document = Document::empty(media_type::OCI_MANIFEST, "layers");
        document.set("config", &config);
        Self { document, layers: vec![] }
    }

    /// Reads what a registry serves under the tag. Layers that are no signatures are kept and not looked at.
    pub fn read(media_type: &str, content: &[u8]) -> Result<Self, Error> {
        if !matches!(media_type, media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST) {
            return Err(Error::NotAManifest(media_type.escape_debug().to_string()));
        }
        let document = Document::read(content, "layers").map_err(|error| match error {
            document::Error::Malformed(error) => Error::Malformed(error),
            document::Error::NoList(_) => Error::NoLayers,
        })?;
        let layers = document.entries().iter().filter_map(|descriptor| Layer::from_descriptor(descriptor)).collect();
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

    /// The same, each with all that its writer noted beside it.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        let entry = |text: &RawValue| Some(Entry { layer: Layer::from_descriptor(text)?, descriptor: text.to_owned() });
        self.document.entries().iter().filter_map(move |text| entry(text))
    }

    /// Adds signatures that are not in it yet. All that others wrote stays, unknown members included.
    pub fn add(&mut self, layers: impl IntoIterator<Item = Layer>) -> Result<(), Error> {
        layers.into_iter().try_for_each(|layer| self.add_one(&layer, &layer.to_descriptor()))
    }

    /// The same with signatures of another such manifest, as they stand there.
    pub fn add_entries<'a>(&mut self, entries: impl IntoIterator<Item = &'a Entry>) -> Result<(), Error> {
        entries.into_iter().try_for_each(|entry| self.add_one(&entry.layer, &entry.descriptor))
    }

    fn add_one(&mut self, layer: &Layer, descriptor: &impl Serialize) -> Result<(), Error> {
        // containers/image takes OCI manifests only, so one that another tool wrote with Docker's type is rewritten.
        self.document.set("mediaType", &media_type::OCI_MANIFEST);
        if self.contains(layer) {
            return Ok(());
        }
        let count = self.document.entries().len();
        if count >= MAX_LAYERS {
            return Err(Error::Full(count));
        }
        self.document.push(descriptor);
        self.layers.push(layer.clone());
        Ok(())
    }

    /// The config's blob, if it is not the constant one and so lists the layers: adding one must extend it.
    #[must_use]
    pub fn own_config(&self) -> Option<Digest> {
        #[derive(Deserialize)]
        struct Config {
            digest: Digest,
        }
        let config: Config = serde_json::from_str(self.document.get("config")?.get()).ok()?;
        (config.digest != Digest::of(EMPTY_CONFIG)).then_some(config.digest)
    }

    /// Points the manifest at a config that [`super::extend_config`] made.
    pub fn set_config(&mut self, content: &[u8]) {
        let config = self.document.get("config").and_then(|config| serde_json::from_str::<Members>(config.get()).ok());
        if let Some(mut config) = config {
            config.set("digest", &Digest::of(content));
            config.set("size", &content.len());
            self.document.set("config", &config);
        }
    }

    /// The bytes to store, and their media type is always [`media_type::OCI_MANIFEST`].
    ///
    /// # Errors
    /// When they are more than anybody reads: storing them would hide the signatures that are there.
    pub fn to_bytes(&self) -> Result<Bytes, Error> {
        let content = self.document.to_bytes();
        if content.len() > Manifest::LIMIT { Err(Error::TooLarge(content.len())) } else { Ok(content) }
    }
}

impl Layer {
    fn to_descriptor(&self) -> Value {
        json!({
            "mediaType": LAYER_MEDIA_TYPE,
            "size": self.size,
            "digest": self.payload,
            "annotations": { SIGNATURE_ANNOTATION: BASE64_STANDARD.encode(&self.signature) },
        })
    }

    fn from_descriptor(descriptor: &RawValue) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Descriptor<'a> {
            #[serde(borrow)]
            media_type: Cow<'a, str>,
            digest: Digest,
            size: u64,
            #[serde(borrow)]
            annotations: Annotations<'a>,
        }
        // Its name is `SIGNATURE_ANNOTATION`.
        #[derive(Deserialize)]
        struct Annotations<'a> {
            #[serde(borrow, rename = "dev.cosignproject.cosign/signature")]
            signature: Cow<'a, str>,
        }
        let descriptor: Descriptor<'_> = serde_json::from_str(descriptor.get()).ok()?;
        if descriptor.media_type != LAYER_MEDIA_TYPE {
            return None;
        }
        let signature = BASE64_STANDARD.decode(descriptor.annotations.signature.as_bytes()).ok()?;
        Some(Self { payload: descriptor.digest, size: descriptor.size, signature })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        kms::RawSignature,
        oci::document::{MAX_ENTRIES, MAX_MEMBERS},
        signature::cosign::{extend_config, tests::*},
    };

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

    proptest! {
        #[test]
        fn what_is_written_is_read(
            tag in "[A-Za-z0-9_][A-Za-z0-9._-]{0,40}",
            path in "[a-z0-9]{1,9}(/[a-z0-9]{1,9}){0,4}",
            signatures: BTreeSet<Vec<u8>>,
        ) {
            let reference = format!("registry.example.com:5000/{path}:{tag}");
            let prepared = prepared(&reference);
            let layers: Vec<_> = signatures.iter().map(|one| prepared.assemble(&RawSignature(one.clone()))).collect();
            let mut written = SignatureManifest::empty();
            written.add(layers.clone()).unwrap();
            let read = SignatureManifest::read(media_type::OCI_MANIFEST, &written.to_bytes().unwrap()).unwrap();
            prop_assert_eq!(read.layers(), &layers);
            for (layer, signature) in read.layers().iter().zip(signatures) {
                let claim = layer.claim(prepared.payload()).unwrap();
                prop_assert_eq!((claim.signature, claim.signed_sha256), (signature, *prepared.payload_sha256()));
                prop_assert_eq!((claim.reference, claim.digests), (Some(reference.clone()), vec![Digest::of(IMAGE)]));
            }
            // And taken along to another place.
            let mut copied = SignatureManifest::empty();
            copied.add_entries(&read.entries().collect::<Vec<_>>()).unwrap();
            prop_assert_eq!(copied.to_bytes().unwrap(), written.to_bytes().unwrap());
        }
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
    fn what_is_absurdly_large_in_number_is_given_up() {
        let read = |content: String| SignatureManifest::read(media_type::OCI_MANIFEST, content.as_bytes());
        let layers = |count: usize| format!(r#"{{"layers":[{}]}}"#, vec!["0"; count].join(","));
        assert!(read(layers(MAX_ENTRIES)).is_ok());
        assert!(matches!(read(layers(MAX_ENTRIES + 1)), Err(Error::Malformed(why)) if why.to_string().contains("entries")));
        let members = |count: usize| {
            let names: Vec<_> = (1..count).map(|n| format!(r#""m{n}":0,"#)).collect();
            format!(r#"{{{}"layers":[]}}"#, names.concat())
        };
        assert!(read(members(MAX_MEMBERS)).is_ok());
        assert!(read(members(MAX_MEMBERS + 1)).is_err());
    }

    #[test]
    fn text_that_is_not_looked_at_stays_as_it_was_written() {
        let odd =
            r#"{"layers":[{"size":1e400, "a" : [ ]}],"config":{"digest":"x","big":123456789012345678901234567890},"b":1.0}"#;
        let mut manifest = SignatureManifest::read(media_type::OCI_MANIFEST, odd.as_bytes()).unwrap();
        manifest.add([prepared(REFERENCE).assemble(&RawSignature(vec![1]))]).unwrap();
        let bytes = manifest.to_bytes().unwrap();
        let text = std::str::from_utf8(&bytes).unwrap();
        for kept in [r#"{"size":1e400, "a" : [ ]}"#, r#"{"digest":"x","big":123456789012345678901234567890}"#, r#""b":1.0"#] {
            assert!(text.contains(kept), "{text}");
        }
    }
}
